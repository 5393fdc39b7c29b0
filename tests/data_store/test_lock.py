import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from avsep import lock, storage
from avsep.lock import Held, Lock

HOLDER = """
import sys, time
from avsep.lock import Lock
with Lock(sys.argv[1], "the folder", beat_s=0.2, stale_s=1.0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock on this machine."""
    path = str(tmp_path / "x.lock")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_on_this_machine_refuses_at_once_and_names_the_first(holder) -> None:
    path, process = holder
    started = time.monotonic()
    with (
        pytest.raises(Held, match=rf"--out x is in use by process {process.pid} on .*; wait for it or stop it"),
        Lock(path, "--out x"),
    ):
        pass
    assert time.monotonic() - started < 5 and lock.is_held(path)  # one elsewhere is watched for longer


def test_a_killed_holders_lock_is_taken_over_at_once(holder) -> None:
    path, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert storage.exists(path) and not lock.is_held(path)
    started = time.monotonic()
    with Lock(path, "x") as mine:
        mine.check()
        assert lock.is_held(path)
    assert time.monotonic() - started < 5 and not storage.exists(path)


def elsewhere(path: str, beat: int = 0) -> None:
    """Write the lock as a holder on another machine would."""
    record = {"token": "t", "host": "far", "machine": "another boot", "pid": 1, "born": 1}
    storage.write_text(path, json.dumps(record | {"command": "c", "since": "s", "beat": beat}))


@pytest.fixture(params=["local", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue("memory_folder")
    return storage.join(folder, "x.lock")


def test_a_living_holder_elsewhere_is_waited_for_no_longer_than_its_next_beat(path: str) -> None:
    elsewhere(path)
    stop = threading.Event()

    def beats() -> None:
        beat = 0
        while not stop.wait(0.3):
            elsewhere(path, beat := beat + 1)

    thread = threading.Thread(target=beats)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(Held, match="process 1 on far"), Lock(path, "x", tell=said.append, beat_s=0.3, stale_s=30):
            pass
    finally:
        stop.set()
        thread.join()
    assert len(said) == 1 and "whether it is alive" in said[0]


def test_a_silent_holder_elsewhere_is_dead_after_a_while(path: str) -> None:
    elsewhere(path)
    with Lock(path, "x", beat_s=0.2, stale_s=1.0):
        holder = lock.read_holder(path)
        assert holder and holder.pid == os.getpid()
    assert not storage.exists(path)


def test_a_holder_that_was_taken_over_stops_and_leaves_the_others_lock(path: str) -> None:
    with Lock(path, "x", beat_s=0.1, stale_s=1.0) as mine:
        mine.check()
        elsewhere(path)
        deadline = time.monotonic() + 10
        with pytest.raises(Held, match=r"x was taken over by process 1 on far"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)
    holder = lock.read_holder(path)
    assert holder and holder.host == "far"


def test_of_many_at_once_one_gets_it(path: str) -> None:
    """Where a killed run's lock lies, too: its process number belongs to nobody here."""
    record = lock.myself()
    storage.write_text(path, json.dumps({**record.__dict__, "pid": 2**22 + 1, "born": 7}))
    got: list[str] = []
    refused: list[str] = []
    start, done = threading.Barrier(4), threading.Event()

    def contend(name: str) -> None:
        start.wait()
        try:
            with Lock(path, "x"):
                got.append(name)
                done.wait(10)
        except Held:
            refused.append(name)

    threads = [threading.Thread(target=contend, args=(str(i),)) for i in range(4)]
    for t in threads:
        t.start()
    deadline = time.monotonic() + 10
    while len(got) + len(refused) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for t in threads:
        t.join()
    assert (len(got), len(refused)) == (1, 3)
