"""Programs that one runs or submits: each reads files, maps a function of avsep over them, writes files."""

RECIPES = ("default", "paper", "audioset")  # their names; recipes.py has them
