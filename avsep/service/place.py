"""Where a service of one machine listens, and where it keeps its results."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from avsep.service.config import ENVIRONMENT, UnusableSettings


def check_address(host: str, port: int) -> None:
    """Raise UnusableSettings where nobody can listen."""
    if not 0 < port < 1 << 16:
        raise UnusableSettings(f"--port {port}: it must lie in 1…65535")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise UnusableSettings(f"--port {port}: only administrators may use it; give one from 1024 up") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UnusableSettings(f"--port {port}: another program uses it; give a free one") from None
            raise UnusableSettings(
                f"{ENVIRONMENT}HOST={host}: {error.strerror}; give an IPv4 address of this machine, or 0.0.0.0"
            ) from None


@contextlib.contextmanager
def results_folder(given: str, port: int) -> Iterator[str]:
    """Give the folder of results: the operator's, or one of this port that is emptied before and after."""
    if given:
        os.makedirs(given, mode=0o700, exist_ok=True)
        yield os.path.abspath(given)
        return
    # of a fixed name, so that what a killed service left is found by the next one
    folder = Path(tempfile.gettempdir(), f"avsep-serve-{os.getuid()}-{port}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UnusableSettings(f"{folder} isn't ours; remove it or set {ENVIRONMENT}RESULTS to another folder")
    try:
        _empty(folder)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
