"""Preference pairs: made from a policy, judged, cleaned."""
