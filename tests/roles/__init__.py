"""A package, because a benchmark is called like this folder."""
