"""What a run leaves for people to read: summaries, figures, model cards."""
