"""Rewards: guards around reward functions, services, step and implicit rewards, adapters, objectives, verifiers."""
