"""A test's own processes, as /proc has them: others that the machine runs are none of its business."""

import contextlib
import os
from pathlib import Path


def _state(pid: int) -> tuple[str, int]:
    """A process's state and its parent; OSError where there is none."""
    state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pid: int) -> bool:
    try:
        return _state(pid)[0] != "Z"
    except OSError:
        return False


def children(parent: int) -> set[int]:
    """The living processes that `parent` started."""
    found = set()
    for pid in _all():
        with contextlib.suppress(OSError):
            found |= {pid} if _state(pid)[1] == parent and alive(pid) else set()
    return found


_others: set[int] = set()  # children of this process that aren't the present test's


def begin() -> None:
    """From here on this process's children are the test's own, but for those that there are."""
    _others.clear()
    _others.update(children(os.getpid()))


def own_children() -> set[int]:
    """The living processes that this one has started since `begin`."""
    return children(os.getpid()) - _others


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, parents first, with their titles."""
    parents, titles = {}, {}
    for other in _all():
        with contextlib.suppress(OSError):
            parents[other] = _state(other)[1]
            titles[other] = Path(f"/proc/{other}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    found, below = {}, [pid]
    while below:
        below = [p for p, parent in parents.items() if parent in below]
        found |= {p: titles[p] for p in below if p in titles}
    return found


def marked(mark: str) -> dict[int, str]:
    """The living processes, wherever they hang, with a text in the environment that they were started with."""
    found = {}
    for pid in _all():
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes() and alive(pid):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
