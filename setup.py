"""What pyproject.toml can't say: `recipes/`, at the top of the repository, is installed inside the package."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["trl_ext*"]), "trl_ext.recipes"],
    package_dir={"trl_ext.recipes": "recipes"},
)
