"""What pyproject.toml can't say: `recipes/`, at the top of the repository, is installed inside the package."""

from setuptools import find_namespace_packages, find_packages, setup


RECIPES = "trl_ext.recipes"

setup(
    packages=[
        *find_packages(include=["trl_ext*"]),
        RECIPES,
        *(f"{RECIPES}.{folder}" for folder in find_namespace_packages("recipes", exclude=["*__pycache__*"])),
    ],
    package_dir={RECIPES: "recipes"},
)
