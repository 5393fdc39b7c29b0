"""One driver at a time: a lock file that a crash doesn't leave behind for good, on any storage.

The holder rewrites the file every few seconds. A file that stays the same for `STALE_S`, as seen by
whoever wants it, so that no two clocks are compared, belongs to a dead holder; one whose process on this
very machine is gone does so at once. Whoever takes it over writes its own name, waits, and
looks whose name stands. Local files are created exclusively. Object stores have no such thing
here: there two that start within the same second may both go on, until the first of them
finds, at its next beat, that the other's name stands, and stops.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow.fs as pafs

from avsep import storage

BEAT_S = 10.0
STALE_S = 90.0
_SETTLE_S = 1.0


class Held(ValueError):
    """Someone else has the lock, and is alive."""


@dataclass(frozen=True)
class Holder:
    """Who has a lock."""

    token: str
    host: str
    machine: str  # boot and process namespace, within which process ids mean something
    pid: int
    born: int  # in ticks since the boot: ids are used again
    command: str
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"

    @property
    def is_dead(self) -> bool:
        """Whether it surely is: a process of this machine that has ended."""
        return self.machine == _machine() and _born(self.pid) != self.born


def _machine() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return secrets.token_hex(8)  # can't be told: nobody's


def _born(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def myself() -> Holder:
    """Describe this process as a lock's holder."""
    return Holder(
        secrets.token_hex(8),
        socket.gethostname(),
        _machine(),
        os.getpid(),
        _born(os.getpid()) or 0,
        storage.redact(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))[:120],
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def read_holder(path: str) -> Holder | None:
    """Read who has a lock; None when nobody does. A file that says nothing is an unknown holder's."""
    try:
        return Holder(**json.loads(storage.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder("", "an unknown machine", "", 0, 0, "", "an unknown time")


def is_held(path: str) -> bool:
    """Tell whether a lock's holder seems alive: by its process here, else by its file's age."""
    holder = read_holder(path)
    if holder is None or holder.is_dead:
        return False
    if holder.machine == _machine():
        return True
    return not storage.is_older(storage.info(path), STALE_S)


class Lock:
    """Hold a lock file for the length of a `with` block; `check` raises when it was lost.

    Raises Held, with one line that says who has it.
    """

    def __init__(
        self,
        path: str,
        what: str,
        *,
        tell: Callable[[str], None] = lambda _: None,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.path, self.what, self._tell = path, what, tell
        self._beat_s, self._stale_s = beat_s, stale_s
        self._me = myself()
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Lock:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            holder = read_holder(self.path)
            if holder is not None and holder.token == self._me.token:
                storage.delete_file(self.path)

    def check(self) -> None:
        """Raise Held when the lock isn't ours any more."""
        if self._lost:
            raise Held(self._lost)

    def _acquire(self) -> None:
        local = isinstance(storage.filesystem(self.path)[0], pafs.LocalFileSystem)
        if self._write(exclusive=True):
            if not local:
                self._settle()
            return
        holder = read_holder(self.path)
        if holder is not None and not holder.is_dead:
            if holder.machine == self._me.machine:
                raise Held(self._refusal(holder))
            self._watch(holder)
        self._write()
        self._settle()

    def _watch(self, holder: Holder) -> None:
        """Wait to see whether a holder on another machine is alive."""
        self._tell(f"{self.what} is locked by {holder}; looking for {self._stale_s:.0f} s whether it is alive")
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_s / 3, self._stale_s / 3))
            now = read_holder(self.path)
            if now is None:
                return
            if now != holder:
                raise Held(self._refusal(now))

    def _settle(self) -> None:
        time.sleep(_SETTLE_S)
        holder = read_holder(self.path)
        if holder is None or holder.token != self._me.token:
            raise Held(self._refusal(holder))

    def _refusal(self, holder: Holder | None) -> str:
        return f"{self.what} is in use by {holder or 'another run'}; wait for it or stop it, then run this again"

    def _write(self, *, exclusive: bool = False) -> bool:
        return storage.write_bytes(self.path, json.dumps(asdict(self._me)).encode(), exclusive=exclusive)

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(self._beat_s):
            try:
                holder = read_holder(self.path)
                if holder is not None and holder.token != self._me.token:
                    self._lost = f"{self.what} was taken over by {holder}, for which this run seemed dead; it stops"
                    return
                self._me = replace(self._me, beat=self._me.beat + 1)
                self._write()
                renewed = time.monotonic()
            except OSError as error:
                if time.monotonic() - renewed > self._stale_s:
                    self._lost = f"{self.path} can't be renewed ({error}); this run stops"
                    return
