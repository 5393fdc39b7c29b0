"""The results of a service: one folder a job, bounded in bytes, number and age; who deletes one stops its work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avsep.service.state import FINISHED, UNFINISHED, State, Status

_ID = re.compile(r"[0-9a-f]{32}")
_STATUS = "job.json"
_NETWORK = "network.txt"
UPLOAD = "upload"
_RECOUNT_S = 60.0  # after which a finished job is looked at again: FLACs are added as they are asked for


class NoSuchJob(Exception):
    """There is no such job, or no longer: it expired, made room for others, or was deleted."""


class StoreFull(Exception):
    """The results of work in progress fill the store, or its disk."""


@dataclass(frozen=True)
class ResultStore:
    """Jobs as folders under `root`, which every process of a service sees.

    A job's state is a small JSON file, replaced whole, so that no process has to be asked for it
    and none loses it by dying. Ids can't be guessed. Deleting a job renames its folder away first:
    whoever works on it finds it gone at the next step and stops.
    """

    root: Path
    max_bytes: int = 20 << 30
    max_jobs: int = 1000
    ttl_s: float = 3600.0  # after the work was finished
    stale_s: float = 1800.0  # unfinished work that nobody has touched for this long is given up
    _reserving: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    # finished jobs as they were when last looked at: state, bytes, and the time to look again
    _known: dict[str, tuple[State, int, float]] = field(default_factory=dict, repr=False, compare=False)

    def create(self) -> str:
        """Make an empty job and return its id."""
        job_id = secrets.token_hex(16)
        self._folder(job_id).mkdir(mode=0o700)
        try:
            self._write(State(id=job_id, status="uploading", created=time.time()))
        except OSError:
            shutil.rmtree(self._folder(job_id), ignore_errors=True)
            raise
        return job_id

    def reserve(self, job_id: str, n_bytes: int) -> None:
        """Keep `n_bytes` free for all that an unfinished job will hold; StoreFull where they don't fit.

        What is kept counts as used, for everybody, before it is. Results make room; where even all of them
        would not do, none has to.
        """
        with self._alone():
            if (lacking := -self._headroom({job_id: n_bytes})) > 0:
                raise StoreFull(f"{lacking} bytes are lacking")
            self.update(job_id, reserved=n_bytes)
        self.sweep()

    def make_room(self, job_id: str, n_bytes: int) -> None:
        """Have other results make room for `n_bytes` more of a finished job; StoreFull where even all would not do."""
        with self._alone():
            lacking = n_bytes + _size(self.path(job_id)) - self._headroom({})
            if lacking > 0:
                raise StoreFull(f"{lacking} bytes are lacking")
        self.sweep(n_bytes, keep=job_id)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other threads, and the other processes of this machine, from reserving."""
        folder = os.open(self.root, os.O_RDONLY)
        try:
            with self._reserving:
                with contextlib.suppress(OSError):  # some file systems have no locks
                    fcntl.flock(folder, fcntl.LOCK_EX)
                yield
        finally:
            os.close(folder)

    def room(self) -> int:
        """Say how many bytes one more job may hold, where all results make room."""
        return max(0, self._headroom({}))

    def _headroom(self, reserved: dict[str, int]) -> int:
        """Give the bytes beside what unfinished jobs hold, with other reservations for some."""
        stored = held = 0
        for job_id, state, size in self._jobs():
            stored += size
            held += _held(state, size, reserved.get(job_id, state.reserved))
        return min(self.max_bytes, stored + _free(self.root)) - held

    def path(self, job_id: str) -> Path:
        """Return a job's folder; NoSuchJob for anything that is not the id of one that is there."""
        folder = self._folder(job_id)
        if not folder.is_dir():
            raise NoSuchJob(job_id)
        return folder

    def job(self, job_id: str) -> State:
        """Read a job's state; NoSuchJob also where a crash of the machine left half of it."""
        try:
            return State.read((self._folder(job_id) / _STATUS).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise NoSuchJob(job_id) from None

    def update(self, job_id: str, **values: Any) -> State:
        """Change some fields of a job's state, and return it."""
        state = self.job(job_id).changed(**values)
        self._known.pop(job_id, None)
        self._write(state)
        return state

    def finish(self, job_id: str, status: Status, keep_upload: bool = False, **values: Any) -> None:
        """Say how a job ended; what was uploaded goes, unless it is to be kept with the result."""
        if not keep_upload:
            (self.path(job_id) / UPLOAD).unlink(missing_ok=True)
        self.update(job_id, status=status, finished=time.time(), **values)

    def delete(self, job_id: str) -> None:
        """Remove a job and, by that, stop its work. NoSuchJob when there is none."""
        folder = self._folder(job_id)
        gone = self.root / f".{job_id}.{secrets.token_hex(4)}"
        try:
            folder.rename(gone)
        except FileNotFoundError:
            raise NoSuchJob(job_id) from None
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self, n_bytes: int = 0, keep: str = "") -> None:
        """Remove what has expired or was given up, then the oldest results but `keep` until `n_bytes` more fit.

        They fit into `max_bytes` and onto the disk, beside what is reserved. Raises StoreFull where they don't, with
        all results gone.
        """
        now, finished = time.time(), []
        no_jobs = {*self._names(), *self._names(gone=True)}
        used, count, stored = n_bytes, 0, 0
        for job_id, state, size in self._jobs():
            no_jobs.discard(job_id)
            over = state.finished is not None and now - state.finished > self.ttl_s
            if over or (not state.is_finished and now - state.updated > self.stale_s):
                with contextlib.suppress(NoSuchJob):
                    self.delete(job_id)
                continue
            used, count, stored = used + max(size, _held(state, size, state.reserved)), count + 1, stored + size
            if state.is_finished and job_id != keep:
                finished.append((state.finished or 0.0, job_id, size))
        for entry in map(self.root.joinpath, no_jobs):
            with contextlib.suppress(FileNotFoundError):  # others are deleting too
                if now - entry.stat().st_mtime > self.stale_s:
                    shutil.rmtree(entry, ignore_errors=True)
        most = self.max_bytes if used == stored else min(self.max_bytes, stored + _free(self.root))
        for _, job_id, size in sorted(finished):
            if used <= most and count <= self.max_jobs:
                return
            with contextlib.suppress(NoSuchJob):
                self.delete(job_id)
            used, count = used - size, count - 1
        if used > most or count > self.max_jobs:
            raise StoreFull(f"{count} jobs in progress hold {used - n_bytes} of {most} bytes")

    def tell_network(self, name: str | None) -> None:
        """Keep which picture network the workers use, for `network`; None: they have none."""
        part = self.root / f"{_NETWORK}.{secrets.token_hex(4)}"
        part.write_text(name or "")
        part.replace(self.root / _NETWORK)

    def network(self) -> str | None:
        """Name the picture network that the workers use; None where they have none, or none has begun."""
        try:
            return (self.root / _NETWORK).read_text() or None
        except FileNotFoundError:
            return None

    def usage(self) -> dict[str, int]:
        """Count jobs by status, and the bytes of all."""
        counts: dict[str, int] = dict.fromkeys((*UNFINISHED, *FINISHED), 0)
        n_bytes = 0
        for _, state, size in self._jobs():
            counts[state.status] += 1
            n_bytes += size
        return {**counts, "bytes": n_bytes}

    def unfinished(self) -> list[str]:
        """List the jobs that are queued or running."""
        return [job_id for job_id, state, _ in self._jobs() if state.status in ("queued", "running")]

    def _jobs(self) -> Iterator[tuple[str, State, int]]:
        now, job_ids = time.monotonic(), self._names()
        for job_id in job_ids:
            known = self._known.get(job_id)
            if known is None or known[2] < now:
                try:
                    state = self.job(job_id)
                except NoSuchJob:
                    continue
                known = state, _size(self.root / job_id), now + _RECOUNT_S * random.uniform(0.5, 1.5)
                if state.is_finished:
                    slim = State(id=job_id, status=state.status, created=state.created, finished=state.finished)
                    self._known[job_id] = (slim, *known[1:])
            yield job_id, known[0], known[1]
        for gone in self._known.keys() - set(job_ids):
            self._known.pop(gone, None)

    def _names(self, gone: bool = False) -> list[str]:
        names = os.listdir(self.root)
        return [n for n in names if (n.startswith(".") and _ID.fullmatch(n[1:33]) if gone else _ID.fullmatch(n))]

    def _folder(self, job_id: str) -> Path:
        if not _ID.fullmatch(job_id):
            raise NoSuchJob(job_id)
        return self.root / job_id

    def _write(self, state: State) -> None:
        folder = self._folder(state.id)
        part = folder / f".{_STATUS}.{secrets.token_hex(4)}"
        try:
            part.write_text(state.written())
            part.replace(folder / _STATUS)
        except FileNotFoundError:
            raise NoSuchJob(state.id) from None
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _held(state: State, size: int, reserved: int) -> int:
    """Bytes that no other job may have: those of an unfinished job, or more that are reserved for it."""
    return 0 if state.is_finished else max(size, reserved)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
