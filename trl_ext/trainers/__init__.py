"""One file a method, its Config and its Trainer together. A method is a preset on the axes of `grpo.py`."""
