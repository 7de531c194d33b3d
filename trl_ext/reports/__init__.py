"""What a run leaves behind for people: figures, cards, summaries."""
