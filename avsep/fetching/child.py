"""yt-dlp's half of a download: a program of its own, run by its path, since importing the package would take seconds.

It reads a request as a line of JSON, answers with what was found, reads a go-ahead, and answers with the files.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_MACHINES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # the machine's troubles, not the clip's


class Log:
    """What yt-dlp says: its last words, and its last warnings."""

    def __init__(self) -> None:
        self.last = "nothing was downloaded"
        self.warnings: list[str] = []

    def debug(self, text: str) -> None:
        """Keep it as the last words."""
        self.last = text

    def warning(self, text: str) -> None:
        """Keep it among the last five."""
        self.warnings = [*self.warnings, text[:500]][-5:]

    def error(self, text: str) -> None:
        """Keep it as the last words."""
        self.last = text


def bind_children() -> None:
    """Have every process that yt-dlp starts die with this one."""
    prctl = ctypes.PyDLL(None).prctl  # looked up here: a child must not import or take locks
    start: Any = subprocess.Popen.__init__

    def start_bound(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "preexec_fn": lambda: prctl(1, signal.SIGKILL)})

    subprocess.Popen.__init__ = start_bound  # type: ignore[method-assign]


def download(request: dict[str, Any], log: Log) -> Iterator[dict[str, Any]]:
    """Give what was found, then, asked on, the files."""
    import yt_dlp

    with yt_dlp.YoutubeDL({**request["params"], "logger": log}) as ydl:
        info = ydl.extract_info(request["url"], download=False)
        while info.get("_type", "video") != "video":  # a page with one video in it
            entries = [e for e in info.get("entries") or [] if e]
            if len(entries) != 1:
                raise ValueError(f"a playlist of {len(entries)} videos: give one")
            info = entries[0]
        streams = info.get("requested_formats") or [info]
        sizes = [s.get("filesize") or s.get("filesize_approx") or 0 for s in streams]
        yield {"duration": info.get("duration"), "live": bool(info.get("is_live")), "bytes": sizes}
        files = []
        for number, stream in enumerate(streams):
            files.append(f"stream{number}")
            one = {k: v for k, v in {**info, **stream}.items() if k != "requested_formats"}
            if not ydl.dl(files[-1], one)[0]:
                raise ValueError(log.last)
        yield {"files": files}


def describe(error: Exception, warnings: list[str]) -> dict[str, Any]:
    """Describe a failure with all its causes, for those who know what yt-dlp's words mean."""
    chain: list[BaseException] = []
    todo: list[object] = [error]
    while todo:
        cause = todo.pop()
        if isinstance(cause, BaseException) and cause not in chain:
            chain.append(cause)
            todo += [cause.__cause__, getattr(cause, "cause", None)]
            todo += getattr(cause, "exc_info", None) or ()
    numbers = [n for c in chain if isinstance(c, OSError) and (n := c.errno) in _MACHINES]
    full = [n for n in _MACHINES if f"[Errno {n}]" in str(error)]
    return {
        "failure": str(error) or type(error).__name__,
        "status": next((s for c in chain if isinstance(s := getattr(c, "status", None), int)), None),
        "kinds": sorted({k.__name__ for c in chain for k in type(c).__mro__}),
        "errno": next(iter(numbers + full), None),
        "warnings": warnings,
    }


def main(replies: TextIO) -> None:
    """Answer a request."""
    request = json.loads(sys.stdin.readline())
    if os.getppid() != request["parent"]:
        return  # it died before this process was bound to it
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], request["max_bytes"]))
    bind_children()
    log = Log()
    try:
        for number, answer in enumerate(download(request, log)):
            print(json.dumps(answer), file=replies, flush=True)
            if number == 0:
                sys.stdin.readline()
    except Exception as error:
        print(json.dumps(describe(error, log.warnings)), file=replies, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is log
    main(answers)
