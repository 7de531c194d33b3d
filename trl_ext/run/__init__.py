"""
What recipes and the `trl-ext` command do: arguments, loading, training, measuring, publishing.

Recipes import it before anything else, so that it can leave out what other packages say while they are imported.
"""

from .quiet import be_quiet


be_quiet()
