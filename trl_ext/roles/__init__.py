"""The roles of an RLHF run on one trunk: critics, references, and how they are saved."""
