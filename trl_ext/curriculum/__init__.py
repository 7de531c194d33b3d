"""What to train on next."""
