"""What recipes and the `trl-ext` command do: arguments, loading, training, measuring, publishing."""
