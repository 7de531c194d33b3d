"""What a run from the command line needs: arguments, data, rewards, training, measuring, saving, publishing."""
