"""Which scored rollouts are trained on, and how they get to the rank that trains on them."""
