"""`avsep separate | inspect | label`: the model on files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

EXAMPLES = """examples:
  avsep separate duet.mp4 --model out/run/model --out out/duet
  avsep separate duet.mp4 --model out/run/model --out out/duet --objects violin,dog
  avsep inspect out/run/model
  avsep label duet.mp4
  avsep label duet.mp4 --labeller efficientnet_lite2
"""


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    p = argparse.ArgumentParser(
        "avsep",
        description="Separate a video's sound into its objects.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    shown: dict[str, Any] = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    s = commands.add_parser("separate", help="one WAV per object, and the rest", **shown)
    s.add_argument("video", help="any file that ffmpeg reads; sound alone will do")
    s.add_argument("--model", required=True, help="the model folder that pipelines.train wrote")
    s.add_argument("--out", required=True, help="folder for the WAVs and separation.json")
    s.add_argument("--objects", help="comma-separated names; without it the pictures decide, or the sound")
    s.add_argument("--weights", help="weights of the picture network, in place of the model's own or torchvision's")
    s.add_argument("--track", type=int, default=1, help="which of several audio tracks, counted from 1")
    i = commands.add_parser("inspect", help="what is in a shard, an extraction's folder or a model", **shown)
    i.add_argument("path", help="a .parquet file or a folder")
    la = commands.add_parser("label", help="what the pictures show", **shown)
    la.add_argument("video")
    la.add_argument("--weights", help="weights of the picture network, a .pth or .safetensors file")
    la.add_argument(
        "--labeller",
        "--architecture",  # its former name
        metavar="NAME",
        help="the picture network: efficientnet_lite0 or efficientnet_lite2, which need no download, or a classifier "
        "of torchvision (default: the first to be had of resnet152 and efficientnet_lite2)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and status 2."""
    arguments = vars(parser().parse_args(argv))
    from avsep import commands  # after help and mistakes: it takes seconds

    return commands.run(**arguments)


if __name__ == "__main__":
    sys.exit(main())
