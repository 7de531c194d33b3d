"""Several trainers one after the other on one trunk."""
