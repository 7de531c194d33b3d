"""Recipes are scripts: they find each other in their own folder."""

import sys
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"
for folder in (RECIPES, RECIPES / "tasks"):
    sys.path.insert(0, str(folder))
