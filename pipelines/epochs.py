"""A training's epochs as they end: printed, and given to logs, wherever the workers run."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from avsep.learning import run as runs
from avsep.learning.run import HISTORY_FILE
from pipelines.console import complain, say

Log = Callable[[dict[str, Any]], None]  # takes a row of the history


@contextlib.contextmanager
def following(out: str, epochs: int, logs: Sequence[Log] = ()) -> Iterator[None]:
    """Print each epoch's figures as the workers write them, wherever those run.

    The logs get every row of the history once, in order; of a resumed run those of before, too. One that raises is
    told, and gets no more.
    """
    said, ended, standing = 0, threading.Event(), list(logs)

    def say_new() -> None:
        nonlocal said
        rows = runs.read_history(out)
        if (now := len(rows)) > said:
            tell(standing, rows[said:])
            said = now
            row = rows[-1]
            names = ("val_loss", "val_map", "val_agreement", "val_assignment")
            keys = [k for k in names if not math.isnan(row.get(k, math.nan))]
            figures = ", ".join(f"{k.removeprefix('val_')} {row[k]:.3f}" for k in keys)
            seconds = sum(r["seconds"] for r in rows) / now
            tail = f"; validation {figures}" if figures else ""
            left = f"{(epochs - now) * seconds:.0f} s left"
            say(f"train: epoch {now}/{epochs}, loss {row['train_loss']:.3f}{tail}; {seconds:.1f} s an epoch, {left}")

    def watch() -> None:
        while not ended.wait(2.0):
            say_new()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        say_new()


def tell(logs: list[Log], rows: Sequence[dict[str, Any]]) -> None:
    """Give the logs new rows, and take those out that raise: a training doesn't end for them."""
    for log in tuple(logs):
        try:
            for row in rows:
                log(dict(row))
        except Exception as error:  # of whatever kind: it is somebody else's function
            logs.remove(log)
            complain(f"train: a log failed ({error!r}) and gets no more rows; {HISTORY_FILE} has them all")
