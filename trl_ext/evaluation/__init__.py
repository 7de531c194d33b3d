"""How good a policy is: held-out estimates with intervals."""
