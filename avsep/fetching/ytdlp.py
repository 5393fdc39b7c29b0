"""yt-dlp in a supervised child."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avsep import media, storage
from avsep.fetching.answers import classify
from avsep.fetching.egress import EgressIdentity
from avsep.fetching.options import FetchOptions
from avsep.records import ClipError, Reason, Segment

_REPLY_BYTES = 1 << 20
STALE_S = 60.0  # a younger work folder may not be locked yet
_DETAIL_CHARACTERS = 300
_CHILD = Path(__file__).with_name("child.py")
_REFUSED = re.compile("Connection refused|Name or service|name resolution|No route|SOCKS", re.IGNORECASE)


def check_tools() -> list[str]:
    """Return what would keep downloads from YouTube from working well, a line each.

    Raises ModuleNotFoundError when there is no yt-dlp.
    """
    need_yt_dlp()
    notes = []
    if not shutil.which("deno", path=_search_path()) and not _node_counts():
        notes.append("no JavaScript runtime for yt-dlp (deno, or node from version 22): YouTube will fail")
    if importlib.util.find_spec("yt_dlp_ejs") is None:
        notes.append("yt-dlp-ejs isn't installed: YouTube will fail; pip install 'yt-dlp[default,deno]'")
    return notes


def need_yt_dlp() -> None:
    """Raise ModuleNotFoundError where there is no yt-dlp."""
    if importlib.util.find_spec("yt_dlp") is None:
        raise ModuleNotFoundError("fetching needs yt-dlp: pip install 'yt-dlp[default,deno]'")


def _search_path() -> str:
    """Where programs are looked for: beside this Python first, where the registry's deno lands."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _node_counts() -> bool:
    node = shutil.which("node", path=_search_path())
    if not node:
        return False
    try:
        version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    match = re.match(r"v(\d+)", version)
    return match is not None and int(match[1]) >= 22


# Downloading


@contextlib.contextmanager
def temporary_folder(parent: str | None) -> Iterator[Path]:
    """Give a folder that goes when the block ends, or, when the process dies, with the next one's start."""
    root = Path(parent or tempfile.gettempdir()) / f"avsep-fetch-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to someone else; give another work folder, or set TMPDIR")
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_S and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
    folder = Path(tempfile.mkdtemp(dir=root))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder, for as long as this process lives; None when another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def retrieve(
    url: str, segment: Segment, folder: Path, identity: EgressIdentity, options: FetchOptions, deadline: float
) -> tuple[list[Path], float | None]:
    """Download a source's streams whole → (files, how long the site says it is)."""
    low = f"[height<={options.max_height}]"
    unknown = f"[height<=?{options.max_height}]"
    request: dict[str, Any] = {
        "parent": os.getpid(),
        "url": url,
        "max_bytes": options.max_bytes,
        "params": {
            "format": f"bv{low}+ba/b{low}/bv*{unknown}+ba/b{unknown}/wv*+ba/w/ba",
            "socket_timeout": options.socket_timeout_s,
            "retries": 2,  # of a transfer, which goes on where it broke off
            "fragment_retries": 2,
            "skip_unavailable_fragments": False,
            "max_filesize": options.max_bytes,
            "hls_prefer_native": True,
            "noplaylist": True,
            "playlist_items": "1",
            "updatetime": False,
            "noprogress": True,
            "quiet": True,
            "no_color": True,
            "js_runtimes": {"deno": {}, "node": {}},
            "ffmpeg_location": media.ffmpeg_executable(),
        },
    }
    if identity.proxy is not None:
        request["params"]["proxy"] = identity.proxy
    if identity.cookies is not None:
        copy = folder / "cookies.txt"  # yt-dlp writes to it
        copy.touch(mode=0o600)
        try:
            copy.write_bytes(storage.read_bytes(identity.cookies))
        except FileNotFoundError:
            raise ClipError(
                Reason.EGRESS_BLOCKED, f"cookie file {identity.cookies} doesn't exist", transient=True
            ) from None
        request["params"]["cookiefile"] = str(copy)
    with _YtDlp(folder, identity) as child:
        found = child.ask(request, min(deadline, time.monotonic() + options.resolve_timeout_s))
        said_s = found["duration"]
        if said_s is not None and segment.start_s >= said_s:
            raise ClipError(Reason.PAST_END, f"starts at {segment.start_s:g} s; the site says {said_s:g} s")
        if found["live"]:
            raise ClipError(Reason.TRANSIENT, "is live", transient=True)
        if sum(found["bytes"]) > options.max_bytes:
            raise ClipError(Reason.TOO_LARGE, f"{sum(found['bytes'])} bytes; the limit is {options.max_bytes}")
        done = child.ask({}, deadline)
    return [folder / name for name in done["files"]], said_s


class _YtDlp:
    """yt-dlp in a child with a process group of its own, which ends with the `with` block or its parent."""

    def __init__(self, folder: Path, identity: EgressIdentity) -> None:
        self._folder, self._identity = folder, identity
        self._replies = self._log = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "PATH": _search_path(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
            preexec_fn=media.die_with_parent,
        )

    def __enter__(self) -> _YtDlp:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        with contextlib.suppress(BrokenPipeError), self._process:
            pass

    def ask(self, line: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send a line and wait for the answer; raises ClipError when it is a failure, or none comes."""
        started = time.monotonic()
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            selector.register(self._process.stderr, selectors.EVENT_READ)
            while b"\n" not in self._replies:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() > deadline:
                    spent_s = time.monotonic() - started
                    raise ClipError(Reason.TIMEOUT, f"yt-dlp took more than {spent_s:.3g} s", transient=True)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        if key.fileobj is self._process.stdout:
                            raise self._died()
                    elif key.fileobj is self._process.stdout:
                        self._replies += data
                        if len(self._replies) > _REPLY_BYTES:
                            raise ClipError(Reason.TOOL_OUTDATED, "yt-dlp says too much", transient=True)
                    else:
                        self._log = (self._log + data)[-_REPLY_BYTES:]
        reply, _, self._replies = self._replies.partition(b"\n")
        answer = json.loads(reply)
        if "failure" in answer:
            raise self._failure(answer)
        return answer

    def _failure(self, answer: dict[str, Any]) -> Exception:
        message = answer["failure"]
        if answer["errno"]:  # the machine's trouble, not the clip's
            remedy = "make room for downloads there, or let TMPDIR name a folder that has some and can be written to"
            return OSError(answer["errno"], f"{os.strerror(answer['errno'])}; {remedy}", str(self._folder.parent))
        reason, transient = classify(message, status=answer["status"], kinds=answer["kinds"])
        if self._identity.proxy and reason == Reason.TRANSIENT and _REFUSED.search(message):
            reason = Reason.EGRESS_BLOCKED  # by the proxy itself: sites that refuse come as its HTTP errors
        if reason == Reason.TOOL_OUTDATED and answer["warnings"]:
            message += " (" + answer["warnings"][-1] + ")"
        return ClipError(reason, self._detail(message), transient=transient)

    def _died(self) -> ClipError:
        deadline = time.monotonic() + 2
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (end := os.waitid(os.P_PID, self._process.pid, flags)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if end is not None and end.si_code != os.CLD_EXITED:
            said = f"died of {signal.Signals(end.si_status).name}"
        else:
            log = self._log.decode(errors="replace").strip()
            said = "ended without an answer: " + log.rpartition("\n")[2]
        return ClipError(Reason.TRANSIENT, self._detail(f"yt-dlp {said}"), transient=True)

    def _detail(self, message: str) -> str:
        """One line, without the appeal to report it, and without the proxy, which may hold a password."""
        text = " ".join(message.split()).removeprefix("ERROR: ")
        text = re.sub(r"^\[[\w:+-]+\] ([\w-]+: )?", "", text)
        text = re.sub(r"[;.] ?please report this issue on .*?yt-dlp -U", "", text, flags=re.IGNORECASE)
        if self._identity.proxy:
            text = text.replace(self._identity.proxy, "the proxy")
        return text[:_DETAIL_CHARACTERS]
