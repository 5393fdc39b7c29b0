"""`avsep separate | inspect | label`: the model on files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from avsep import console, storage

# Before torch is loaded. Threads that wait for work spin otherwise, which costs a busy machine half its time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EXAMPLES = """examples:
  avsep separate duet.mp4
  avsep separate duet.mp4 --objects violin,dog --out out/duet
  avsep separate duet.mp4 --two-stems violin --format flac
  avsep separate duet.mp4 --edit edits.json
  avsep separate videos/*.mp4 more/ --model out/run/model --out out/sounds
  avsep inspect out/run/model
  avsep label duet.mp4
  avsep label videos/ more/*.mp4 --labeller efficientnet_lite2
  avsep label duet.mp4 --model out/run/model
"""

FIRST = """avsep separates a video's sound into its objects. Begin with:
  avsep separate video.mp4

  avsep separate    one sound per object, and the rest
  avsep label       what the pictures show, and where
  avsep inspect     what is in a shard, an extraction's folder or a model

avsep --help shows examples, avsep COMMAND --help a command's options."""


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, and takes no empty value: such is that of an unset variable."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, _given)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("its value is empty: give one, or check the variable it came from")
    return text


def _counted(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    p = Parser(
        "avsep",
        description="Separate a video's sound into its objects.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action=_Version, help="show the version and end")
    commands = p.add_subparsers(dest="command", required=True)
    commands.type = str  # what follows a command is checked by its own parser
    s = commands.add_parser("separate", help="one sound per object, and the rest", **_examples("separate"))
    s.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="any file that ffmpeg reads, sound alone, too; a folder, whose videos and sounds are meant; or a pattern",
    )
    s.add_argument(
        "--out",
        help="folder for the sounds and separation.json (default: separated/NAME); several files, a folder or a "
        "pattern get one folder per file in it",
    )
    separation_options(s)
    s.add_argument(
        "--edit",
        metavar="JSON",
        help='corrections by hand: {"moves": [{"window": 0, "basis": 3, "to": "violin"}], "add": ["dog"], "remove": '
        '["cat"], "spans": [{"start_s": 2, "end_s": 4.5, "object": "violin", "present": false}]}; the bases of each '
        'window are in separation.json; "to": "_rest" gives one to the rest',
    )
    i = commands.add_parser(
        "inspect", help="what is in a shard, an extraction's folder or a model", **_examples("inspect")
    )
    i.add_argument("path", help="a .parquet file or a folder")
    la = commands.add_parser(
        "label",
        help="what the pictures show, and where",
        description="Say what a video's pictures show. Each label has its place in the picture that shows it best: "
        "[left, top, right, bottom] as fractions of width and height. Two of the same object share a place.",
        **_examples("label"),
    )
    la.add_argument("files", nargs="+", metavar="FILE", help="a video; a folder, whose videos are meant; or a pattern")
    la.add_argument(
        "--model",
        help="a model's folder, whose objects, picture network and thresholds are taken (default: the 23 objects, and "
        "the picture network of --labeller)",
    )
    la.add_argument("--weights", help="weights of the picture network, a .pth or .safetensors file")
    la.add_argument(
        "--labeller",
        "--architecture",  # its former name
        metavar="NAME",
        help="the picture network: efficientnet_lite0 or efficientnet_lite2, which need no download, or a classifier "
        "of torchvision (default: the model's; without one the first to be had of resnet152 and efficientnet_lite2)",
    )
    return p


def _examples(command: str) -> dict[str, Any]:
    """Have a command's help end with its own examples."""
    own = [line for line in EXAMPLES.splitlines() if f"avsep {command} " in line]
    return {"epilog": "\n".join(["examples:", *own]), "formatter_class": argparse.RawDescriptionHelpFormatter}


def separation_options(p: argparse.ArgumentParser) -> None:
    """Add what one file and many have in common: how they are separated, and what is written."""
    p.add_argument("--model", help="a folder that pipelines.train wrote (default: the starter model)")
    p.add_argument("--objects", help="names of what sounds, separated by commas; without it pictures and sound decide")
    p.add_argument("--weights", help="weights of the picture network, in place of the model's own or torchvision's")
    p.add_argument(
        "--two-stems", metavar="OBJECT", help="write only two sounds: OBJECT, and no_OBJECT with all the rest"
    )
    p.add_argument(
        "--format", default="wav", choices=("wav", "flac", "mp3"), help="format of the sounds (default: wav)"
    )
    p.add_argument("--mono", action="store_true", help="one channel at the model's sample rate, not as the file is")
    p.add_argument(
        "--video", dest="with_video", action="store_true", help="also write a video per object: the pictures, its sound"
    )
    p.add_argument("--track", type=_counted, default=1, help="which of several audio tracks, counted from 1")


class _Version(argparse.Action):
    """Print the version; it is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"avsep {version('avsep')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and status 2, Ctrl-C one line and status 130."""
    console.prepare()
    if not (sys.argv[1:] if argv is None else argv):
        console.complain(FIRST)
        return 2
    arguments = vars(parser().parse_args(argv))
    command = arguments["command"]
    for name in ("model", "out", "weights", "edit", "path"):  # a shell leaves --out=~/x as it is
        if arguments.get(name):
            arguments[name] = os.path.expanduser(arguments[name])
    try:
        if mistake := _mistake(arguments):
            console.complain(f"avsep {command}: {mistake}")
            return 2
        if command == "separate":
            console.say(f"loading {arguments['model'] or 'the starter model'}")
        from avsep import commands  # after help and mistakes: it takes seconds

        return commands.run(**arguments)
    except KeyboardInterrupt:
        console.complain(f"avsep {command}: interrupted")
        return console.INTERRUPTED


def _mistake(arguments: dict[str, Any]) -> str:
    """Say what is wrong with local paths, as far as that can be told at once; "" for nothing."""
    if "model" in arguments:
        model = arguments["model"]
        if model is not None and _is_local(model) and not os.path.isfile(os.path.join(model, "config.json")):
            return f"--model {model} holds no config.json; give the model folder that pipelines.train wrote"
    weights = arguments.get("weights")
    if weights and _is_local(weights) and not os.path.isfile(weights):
        return f"weights {weights}: no such file; give a .pth or .safetensors file"
    if (out := arguments.get("out")) and (wrong := storage.unwritable(out)):
        return f"--out {wrong}"
    edit = arguments.get("edit")
    if edit and _is_local(edit) and not os.path.isfile(edit):
        what = "is no file" if os.path.exists(edit) else "doesn't exist"
        return f"--edit {edit} {what}; give a JSON file, see --help"
    path = arguments.get("path", "")
    if os.path.isfile(path) and not path.endswith(".parquet"):
        return f"{path} is no .parquet file; give one, an extraction's folder or a model"
    named = arguments.get("files") or [v for k, v in arguments.items() if k == "path"]
    for file in named:
        if _is_local(file) and not os.path.exists(file) and not set(file) & set("*?["):
            return f"{file} doesn't exist; check the path"
        if len(named) == 1 and os.path.isfile(file) and not os.path.getsize(file):
            return f"{file} is empty: it has no bytes; give another file, or copy it again"
    return _misnamed(arguments) if arguments["command"] == "separate" else ""


def _misnamed(arguments: dict[str, Any]) -> str:
    """Say which object isn't one of the model's, or what is wrong with edits; "" for nothing, or not to be told yet."""
    from avsep.edits import Edits
    from avsep.objects import Vocabulary
    from avsep.starter import PATH  # none of them loads torch

    named = [arguments["two_stems"], *(arguments["objects"] or "").split(",")]
    try:
        with open(os.path.join(arguments["model"] or PATH, "config.json"), "rb") as file:
            vocabulary = Vocabulary.from_list(json.load(file)["vocabulary"])
    except (OSError, ValueError, LookupError, TypeError):  # elsewhere, or no such file: who loads it says so
        return ""
    try:
        for name in filter(None, (n and n.strip() for n in named)):
            vocabulary.find(name)
        if arguments["edit"] and _is_local(arguments["edit"]):
            with open(arguments["edit"], "rb") as file:
                Edits.from_json(file.read()).named(vocabulary.find)
    except OSError:
        return ""
    except ValueError as error:
        parts = (arguments["objects"] or "").replace(";", " ").split()
        names = {name for known in vocabulary for name in (known.name, *known.aliases)}
        several = len(parts) > 1 and all(part in names for part in parts)
        return f"{error}{' Separate several names by commas.' if several else ''}"
    return ""


def _is_local(path: str) -> bool:
    return not storage.is_uri(path)


if __name__ == "__main__":
    sys.exit(main())
