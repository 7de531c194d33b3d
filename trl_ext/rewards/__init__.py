"""Rewards: guards around reward functions, and (to come) implicit, adapter and step rewards."""
