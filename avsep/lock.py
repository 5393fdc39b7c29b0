"""One driver at a time: a lock file that a crash doesn't leave behind for good, on any storage.

The holder rewrites the file every few seconds. A file that stays the same for `STALE_S` belongs to a dead holder.
Whoever wants the lock measures that, so no two clocks are compared. A holder whose process on this very machine is gone
is dead at once.

S3 and Google's store write only where the file is still as it was read, in one step. So of any number one gets the
lock, and nobody loses it but who seemed dead. Local files are created that way, too. Other cases are stores that ignore
the condition, and a dead holder's local file. There whoever wrote waits, and looks whose name stands. In such a store
two that start within the same second may both go on. The first of them stops at its next beat, where it finds the
other's name.
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

from avsep import conditional, storage

BEAT_S = 10.0
STALE_S = 90.0
SETTLE_S = 1.0
_TRIES = 3  # at a renewal: a write whose answer is lost seems refused


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
        return _holder(storage.read_bytes(path))
    except FileNotFoundError:
        return None


def _holder(data: bytes) -> Holder:
    try:
        return Holder(**json.loads(data))
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
        self._place = conditional.place(path)
        self._lost = ""
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Lock:
        self._acquire()
        self._renewed = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._beat_s)  # it lets go of the lock; where it waits for an answer, when that comes

    def check(self) -> None:
        """Raise Held when the lock isn't ours any more, or wasn't renewed for so long that others may take it."""
        if not self._lost and time.monotonic() - self._renewed > self._stale_s:
            silent = f"{self.path} wasn't renewed for {self._stale_s:g} s"
            self._lost = f"{silent}; this run stops, since others may take it for dead"
        if self._lost:
            raise Held(self._lost)

    def _acquire(self) -> None:
        holder, version = self._read()
        if holder is not None and not holder.is_dead:
            if holder.machine == self._me.machine:
                raise Held(self._refusal(holder))
            version = self._watch(holder, version)
        if self._write(version) is None and not self._is_mine(now := self._read()[0]):
            raise Held(self._refusal(now))
        if self._place.is_exact(self._data, version is None):
            return
        if not self._place.is_exact(self._data, True):
            self._tell(f"{self.path}: this store can't keep out a run that starts within the same second as this one")
        time.sleep(SETTLE_S)
        if not self._is_mine(now := self._read()[0]):
            raise Held(self._refusal(now))

    def _watch(self, holder: Holder, version: str | None) -> str | None:
        """Wait to see whether a holder on another machine is alive; return its file's version, None when it is gone."""
        self._tell(f"{self.what} is locked by {holder}; looking for {self._stale_s:.0f} s whether it is alive")
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_s / 3, self._stale_s / 3))
            now, version = self._read()
            if now is None:
                break
            if now != holder:
                raise Held(self._refusal(now))
        return version

    def _refusal(self, holder: Holder | None) -> str:
        return f"{self.what} is in use by {holder or 'another run'}; wait for it or stop it, then run this again"

    @property
    def _data(self) -> bytes:
        return json.dumps(asdict(self._me)).encode()

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._me.token

    def _read(self) -> tuple[Holder | None, str | None]:
        """Return who has the lock, and its file's version; None twice when nobody does."""
        try:
            data, version = self._place.read()
        except FileNotFoundError:
            return None, None
        return _holder(data), version

    def _write(self, version: str | None) -> str | None:
        return self._place.write(self._data, version)

    def _beat(self) -> None:
        """Renew the lock until it is lost or not needed, then let go of it: in one thread, so that no write is late."""
        self._renew_often()
        with suppress(OSError):
            holder, version = self._read()
            if self._is_mine(holder) and version is not None:
                self._place.delete(version)

    def _renew_often(self) -> None:
        while not self._stop.wait(self._beat_s):
            begun = time.monotonic()
            try:
                if not self._renew():
                    return
                self._renewed = begun  # what was asked may have been done long before it was answered
            except OSError as error:
                if time.monotonic() - self._renewed > self._stale_s:
                    self._lost = f"{self.path} can't be renewed ({error}); this run stops"
                    return

    def _renew(self) -> bool:
        """Write the lock anew where it is still ours, or gone; False when somebody else has it."""
        for _ in range(_TRIES):
            holder, version = self._read()
            if holder is not None and not self._is_mine(holder):
                self._lost = f"{self.what} was taken over by {holder}, for which this run seemed dead; it stops"
                return False
            if self._stop.is_set():
                return False
            self._me = replace(self._me, beat=self._me.beat + 1)
            if self._write(version) is not None:
                return True
        raise OSError("its store says each time that it was written meanwhile")
