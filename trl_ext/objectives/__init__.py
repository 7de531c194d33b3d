"""The maths: torch in, torch out. No trainer, no config, no accelerate, no state."""
