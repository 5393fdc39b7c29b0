"""Programs that one runs or submits: each reads files, maps a function of avsep over them, writes files."""

import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import Any

from avsep import starter, storage
from avsep.cli import Parser
from avsep.console import say

RECIPES = ("default", "paper", "audioset", "both_passes")  # their names; recipes.py has them
UNUSABLE, INTERRUPTED = 2, 130  # exit statuses
WITHOUT = "tables with the ids of clips to leave out, such as pipelines.audit's lists"
_QUICK_BYTES = 4 << 20  # of a table that is read twice
OUTPUTS = ("out", "media")  # arguments that name folders
# argument → what it must hold, if anything, and the remedy where it doesn't
INPUTS = {
    "segments": ("", "give a table (.csv, .parquet), or the folder that pipelines.manifest wrote"),
    "clips": ("commits", "give the folder that pipelines.extract wrote"),
    "model": ("config.json", "give the model folder that pipelines.train wrote"),
    "start": ("config.json", "give a model folder that pipelines.train wrote, or the word starter"),
    "paper_model": ("config.json", "give a model folder that pipelines.train --recipe paper wrote"),
    "references": ("", "give the folder of SEGMENT_ID/OBJECT.flac"),
    "weights": ("", "give a .pth or .safetensors file of the picture network"),
    "table": ("", "give a table, .csv or .parquet"),
    "videos": ("", "give files, folders, patterns or tables"),
    "audioset": ("", "give AudioSet's segment files"),
    "ontology": ("", "give AudioSet's ontology.json"),
    "without": ("", "give lists that pipelines.audit wrote, or tables with a column segment_id"),
    "cookies": ("", "give files of cookies, as browsers export them"),
}


def arguments_of(program: str, description: str | None, epilog: str, *, abbreviations: bool = True) -> ArgumentParser:
    """Begin a program's parser; without abbreviations what it doesn't know can go to another."""
    return Parser(
        f"pipelines.{program}",
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=abbreviations,
    )


def begin(parser: ArgumentParser, loads: str = "") -> None:
    """Do what a program can do before its imports, which take seconds.

    That is: answer --help, refuse mistaken arguments, inputs that aren't there and tables that are none, and end
    with one line on Ctrl-C and SIGTERM. `loads` names an argument, of which it says that it is being loaded.
    """

    def stop(*_: Any) -> None:
        print(f"{parser.prog}: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a script's background job does
            signal.signal(number, stop)
    arguments = parser.parse_args() if parser.allow_abbrev else parser.parse_known_args()[0]
    mistake = missing_input(arguments) or _bad_table(
        getattr(arguments, "segments", None), getattr(arguments, "model", None)
    )
    if mistake and os.environ.get("AVSEP_LOG") != "json":  # there the program itself says so, as JSON
        parser.exit(UNUSABLE, f"{parser.prog}: {mistake}\n")
    if loads and os.environ.get("AVSEP_LOG") != "json":
        path = getattr(arguments, loads)
        say(f"loading {'the starter model' if path == starter.PATH else path}")


def missing_input(arguments: Namespace) -> str:
    """Say which path among the arguments can't be what it must be, as far as is told at once; "" for none."""
    for name in vars(arguments):
        if name not in INPUTS and name not in OUTPUTS:
            continue
        given = getattr(arguments, name)
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, str) and (mistake := _mistake(name, path)):
                return f"--{name.replace('_', '-')} {mistake}"
    return ""


def _mistake(name: str, path: str) -> str:
    if name in OUTPUTS:
        if not path:
            return "is empty; give a folder"
        return "" if name == "media" and "://" in path else storage.unwritable(path)  # which most only read
    if "://" in path:
        return ""
    holds, remedy = INPUTS[name]
    if not path:
        return f"is empty; {remedy}"
    pattern = name == "videos" and set(path) & set("*?[")
    if not os.path.exists(path) and not pattern:
        return f"{path} doesn't exist; {remedy}"
    return f"{path} holds no {holds}; {remedy}" if holds and not os.path.exists(os.path.join(path, holds)) else ""


def _bad_table(path: str | None, model: str | None) -> str:
    """Say what is wrong with a small local table of segments; empty where nothing is, or it isn't one.

    With a model its objects are the model's; of a model that isn't here, or is broken, the program itself tells.
    """
    if path is None or not os.path.isfile(path) or os.path.getsize(path) > _QUICK_BYTES:
        return ""
    from avsep import objects, records  # takes half a second

    vocabulary = objects.AUDIOSET_23
    if model is not None:
        try:
            with open(os.path.join(model, "config.json"), encoding="utf-8") as f:
                vocabulary = objects.Vocabulary.from_list(json.load(f)["vocabulary"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""
    try:
        records.read_segments(path, vocabulary=vocabulary)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
