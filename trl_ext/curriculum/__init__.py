"""Which prompt is trained on when."""
