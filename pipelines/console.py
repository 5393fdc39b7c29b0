"""What programs say, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from avsep import console, storage
from pipelines import INTERRUPTED, UNUSABLE, missing_input

DONE, SHORTFALL = 0, 1  # exit statuses, beside those of `pipelines`
PREVIOUS = "previous"  # folder of OUT for what --replace replaces
LOCAL_RUNNER = "FnApiRunner"  # Beam's default one tries to download another runner first


class UsageError(Exception):
    """Arguments or input that can't be used: one line that names the value, the rule and the remedy."""


def absolute(arguments: argparse.Namespace, *names: str) -> None:
    """Make local paths among the arguments absolute: workers may have another working directory."""
    for name in names:
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, storage.resolve(path, "."))


def keep_apart(arguments: argparse.Namespace, *inputs: str, writes: Sequence[str] = ()) -> None:
    """Refuse an --out that is one of the inputs, or the folder of one that would be overwritten or deleted there.

    `writes` are patterns of the names that the program writes to --out.
    """
    out = arguments.out
    for name in inputs:
        given = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        for path in given if isinstance(given, list) else filter(None, [given]):
            if storage.same(path, out):
                fail(f"--out {out} is what {flag} names; give another folder")
            kept = storage.resolve(storage.join(out, PREVIOUS), ".").rstrip("/")
            if f"{storage.resolve(path, '.').rstrip('/')}/".startswith(f"{kept}/"):
                fail(f"--out {out} would delete {flag} {path}, which it keeps of an earlier run; give another folder")
            written = any(fnmatch.fnmatch(storage.name(path.rstrip("/")).lower(), pattern) for pattern in writes)
            if written and storage.same(storage.parent(path.rstrip("/")), out):
                fail(f"--out {out} would overwrite {flag} {path}; give another folder")


def run(
    main: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    after: str = "",
) -> int:
    """Parse arguments, check inputs, run a program's main function; what goes wrong is one line, as in `guarded`."""
    arguments = parser.parse_args(argv)

    def checked() -> int:
        if mistake := missing_input(arguments):
            fail(mistake)
        return main(arguments)

    return guarded(checked, parser.prog, after)


def guarded(main: Callable[[], int], program: str, after: str = "") -> int:
    """Turn a user's mistake, lost workers, Ctrl-C and SIGTERM into one line and an exit status.

    `after` says how to go on after an interruption.
    """
    console.prepare()
    log_as_asked()
    try:
        with interruptible():
            return main()
    except (UsageError, OSError, ValueError) as error:
        if os.environ.get("AVSEP_TRACEBACK"):
            raise
        hint = "" if isinstance(error, UsageError) else " (AVSEP_TRACEBACK=1 shows where)"
        complain(f"{program}: {error}{hint}")
        return UNUSABLE
    except WorkerDied as error:
        complain(f"{program}: a worker died again and again: {error} Run fewer at once, such as AVSEP_CPUS=1")
        return UNUSABLE
    except KeyboardInterrupt:
        complain(f"{program}: interrupted{'; ' if after else ''}{after}")
        return INTERRUPTED


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM interrupt the main thread, as Ctrl-C does; signals that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_free(out: str, files: Sequence[str], made: str, replace: bool) -> None:
    """Raise UsageError where one of `files` is in OUT and isn't to be replaced; `made` says what they are."""
    if not replace and any(storage.exists(storage.join(out, f)) for f in files):
        fail(f"{made}; --replace makes it anew and keeps the last one in {storage.join(out, PREVIOUS)}")


def put_aside(out: str, files: Sequence[str]) -> None:
    """Make room in OUT for new files: earlier ones go to OUT/previous, where the last finished ones are kept.

    They were finished if the first of them is there; else they are deleted.
    """
    there = [f for f in files if storage.exists(storage.join(out, f))]
    if not there or files[0] not in there:
        for file in there:
            storage.delete_file(storage.join(out, file))
        return
    kept = storage.join(out, PREVIOUS)
    for file in files:
        storage.delete_file(storage.join(kept, file))
    for file in there:
        place = storage.join(kept, file)
        storage.make_directory(storage.parent(place))
        storage.move(storage.join(out, file), place)
    say(f"note: what was there is kept in {kept}")


class WorkerDied(Exception):
    """The process that worked on an item died, more than once: of the item, or of the machine."""


def whole_number(variable: str, least: int = 0) -> int | None:
    """Read an environment variable that is a whole number; None where it isn't set."""
    text = os.environ.get(variable)
    if text and (not text.isdecimal() or int(text) < least):
        fail(f"{variable}={text}: it must be a whole number from {least} up, such as 4; or leave it out")
    return int(text) if text else None


def is_local(options: Any) -> bool:
    """Tell our default Beam runner from others."""
    from apache_beam.options.pipeline_options import StandardOptions

    return options.view_as(StandardOptions).runner == LOCAL_RUNNER


def say(text: str, **fields: Any) -> None:
    """Print a line at once; with AVSEP_LOG=json it is an object with these fields, on stderr."""
    if as_json():
        _write("info", text, fields)
    else:
        console.say(text)


def log(text: str, **fields: Any) -> None:
    """Log what is for machines alone: nothing without AVSEP_LOG=json, which makes it an object on stderr."""
    if as_json():
        _write("info", text, fields)


def complain(text: str) -> None:
    """Print a line to stderr."""
    if as_json():
        _write("error", text, {})
    else:
        console.complain(text)


def as_json() -> bool:
    """Tell whether a log is wanted that machines read: AVSEP_LOG=json."""
    return os.environ.get("AVSEP_LOG") == "json"


def log_as_asked() -> None:
    """With AVSEP_LOG=json, make everything that this process logs one JSON object a line on stderr."""
    if as_json() and not any(isinstance(h, _JsonLines) for h in logging.getLogger().handlers):
        logging.getLogger().addHandler(_JsonLines(logging.WARNING))
        sys.excepthook = _log_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    _write("critical", f"{kind.__name__}: {error}", {"exception": text})


class _JsonLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = logging.Formatter().formatException(record.exc_info)
        _write(record.levelname.lower(), record.getMessage(), fields)


# user:password@ of URLs, and what signs them
_SECRETS = re.compile(
    r"(?<=://)[^/@\s\"]+(?=@)|(?<=[?&])[^?&=\s]*(?:sig|signature|token|credential|key)[^?&=\s]*=[^&\s\"]+", re.I
)


def _write(level: str, text: str, fields: Mapping[str, Any]) -> None:
    now = time.time()
    at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = _redacted({"time": at, "level": level, "message": text, **fields})
    console.complain(json.dumps(line, ensure_ascii=False, default=str))


def _redacted(value: Any) -> Any:
    """Hide secrets in a text, or in the texts of a mapping or list."""
    if isinstance(value, str):
        return _SECRETS.sub("…", storage.redact(value))
    if isinstance(value, Mapping):
        return {k: _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, (list, tuple)) else value


def fail(text: str) -> NoReturn:
    """Stop with status 2 and one line."""
    raise UsageError(text)
