"""Programs that one runs or submits: each reads files, maps a function of avsep over them, writes files."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from avsep.cli import Parser

RECIPES = ("default", "paper", "audioset")  # their names; recipes.py has them


def arguments_of(program: str, description: str | None, epilog: str, *, abbreviations: bool = True) -> ArgumentParser:
    """Begin a program's parser; without abbreviations what it doesn't know can go to another."""
    return Parser(
        f"pipelines.{program}",
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=abbreviations,
    )
