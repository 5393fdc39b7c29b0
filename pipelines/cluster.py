"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.console import fail, say

_SIOCGIFADDR = 0x8915  # Linux's number for "the interface's address"
_STARTS = 3  # of Ray on this machine, before giving up
HEAD_S = 10.0  # in which a cluster's head answers
_WORKERS = {  # of workers; threads that wait sleep, and leave the CPUs to others
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_SOCKET_BYTES = 107  # Linux's limit to a socket's path


def meet_at_ray_s_address() -> None:
    """Have gloo use the interface of this node's address: else it takes the host's name, often that of the loopback."""
    import ray

    address = ray.util.get_node_ip_address()
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):  # it has none
            answer = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def one_thread() -> None:
    """Keep a worker to one thread: processes are the parallelism, and busy threads get in each other's way."""
    import torch

    torch.set_num_threads(1)


def init_ray(address: str, **settings: Any) -> None:
    """Connect to Ray, or start it, without a word."""
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **settings)
    except SystemExit:  # Ray's answer to SIGTERM meanwhile
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _with_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def join_ray(address: str) -> None:
    """Connect to the cluster that RAY_ADDRESS names."""
    where = re.fullmatch(r"(?:ray://)?\[?([^/]*?)\]?:(\d+)", address)
    until = time.monotonic() + HEAD_S
    try:
        while where:  # Ray itself asks for minutes
            try:
                socket.create_connection((where[1], int(where[2])), timeout=HEAD_S).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
        init_ray(address, runtime_env={"env_vars": _WORKERS})
    except Exception as error:  # of many kinds
        why = str(error).strip().splitlines()[0].rstrip(".")
        fail(f"RAY_ADDRESS={address}: {why}; give HEAD:6379 of a cluster, or unset it to run on this machine")


def start_ray(settings: dict[str, Any]) -> None:
    """Start Ray on this machine.

    Its parts give each other 15 and 30 s, too little where much else runs: then it is tried again, with files in cache.
    """
    folder = ray_folder()
    for left in reversed(range(_STARTS)):
        before = children()
        try:
            with _with_environment(_WORKERS):  # a job's own variables would start each of its workers twice
                return init_ray("local", _temp_dir=folder, **settings)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of no kind of its own
            why = _why_no_ray(folder, children() - before, error)
            end(children() - before)
        if left:
            say(f"Ray didn't start on this machine: {why}; trying again")
    fail(f"Ray didn't start on this machine in {_STARTS} tries: {why}; try again when less runs, or --in-process")


def ray_folder() -> str:
    """Choose the folder of Ray's files: RAY_TMPDIR's or TMPDIR's, or /tmp's, with a note, where that can't be used."""
    variable = next((v for v in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(v)), None)
    why = ""
    if variable:
        folder = os.path.join(os.path.abspath(os.environ[variable]), "ray")
        if not (why := _unfit(folder)):
            return folder
    for folder in ("/tmp/ray", f"/tmp/ray-{os.getuid()}"):
        if not (fallen := _unfit(folder)):
            if variable:
                say(f"note: {variable}={os.environ[variable]} {why}; Ray's files go to {folder}")
            return folder
    where = f"{variable}={os.environ[variable]} {why}" if variable else f"/tmp/ray {fallen}"
    fail(f"{where}; set RAY_TMPDIR to a short path that can be written to")


def _unfit(folder: str) -> str:
    """Say why Ray can't have its files in a folder; empty where it can."""
    socket_path = os.path.join(folder, f"session_2026-01-01_00-00-00_000000_{os.getpid()}", "sockets", "plasma_store")
    if over := max(0, len(os.fsencode(socket_path)) - _SOCKET_BYTES):
        return f"is {over} characters too long for Ray's sockets"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return "can't be written to"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "can't be written to"


def children() -> set[int]:
    """List this process's children."""
    found: set[int] = set()
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as f:
            found |= set(map(int, f.read().split()))
    return found


def _why_no_ray(folder: str, started: set[int], error: Exception) -> str:
    """Say why Ray didn't start: its raylet's last words where that has ended."""
    for pid in started:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
            if "(raylet) Z" in f.read():
                logs = sorted(glob.glob(os.path.join(glob.escape(folder), f"session_*_{os.getpid()}/logs/raylet.out")))
                return f"its raylet ended{last_words(logs[-1]) if logs else ''}"
    return f"{' '.join(str(error).split()).rstrip('.')} (it lives, but was given 30 s)"


def last_words(log: str) -> str:
    """Quote the error by which a raylet ended, and the function that it ended in."""
    with open(log, errors="replace") as f:
        text = f.read()
    fatal = re.findall(r"^\[[^\]]* [CFE] [^\]]*\] \(raylet\) \S+ +(.*)$", text, re.M)
    if not fatal:
        return ""
    where = re.search(r"ray::raylet::(\w+::\w+)\(\)", text)
    words = fatal[-1].rpartition("work with you to fix it. ")[2]
    return f": {words[:200]}{f' in {where[1]}' if where else ''}"


def end(processes: set[int]) -> None:
    """End what a failed start left running."""
    for number, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + wait_s
        while time.monotonic() < until and any(not _ended(pid) for pid in processes):
            time.sleep(0.05)


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
