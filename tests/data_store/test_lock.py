import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avsep import filesystems, lock, storage
from avsep.lock import Held, Lock
from tests.support.loopback import Google, Store

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


@pytest.fixture(params=["local", "memory", "s3", "gs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue(f"{request.param}_folder")
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


# ------------------------------------------------------------------------------------------------- object stores

RIVAL = """
import sys
from avsep.lock import Held, Lock
for line in sys.stdin:
    try:
        with Lock(line.strip(), "x"):
            print("got", flush=True)
            next(sys.stdin)
    except Held:
        print("refused", flush=True)
        next(sys.stdin)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_gets_it_every_time(store: Store, store_folder: str) -> None:
    """In a store whose answers take their time; every second time a dead run's lock lies there."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rivals = [subprocess.Popen([sys.executable, "-c", RIVAL], **pipes) for _ in range(2)]  # type: ignore[call-overload]
    dead = json.dumps({**lock.myself().__dict__, "pid": 2**22 + 1, "born": 7})
    chance = random.Random(0)

    def late(method: str, path: str) -> None:
        time.sleep(chance.uniform(0, 0.1))

    store.fault = late

    def ask(words: str) -> list[str]:
        for rival in rivals:
            rival.stdin.write(f"{words}\n")
            rival.stdin.flush()
        return [rival.stdout.readline().strip() for rival in rivals]

    try:
        for i in range(30):
            path = f"{store_folder}/{i}.lock"
            if i % 2:
                storage.write_text(path, dead)
            assert sorted(ask(path)) == ["got", "refused"]
            assert ask("on") == ["done", "done"] and not storage.exists(path)
    finally:
        for rival in rivals:
            rival.kill()
            rival.communicate()


@pytest.mark.parametrize("left", [False, True])
def test_a_write_that_comes_late_takes_no_lock_from_whoever_has_it(store, store_folder, monkeypatch, left) -> None:
    """Both see that nobody has it, or a dead run; the second's write comes when the first is at work."""
    path, got = f"{store_folder}/x.lock", []
    if left:
        storage.write_text(path, json.dumps({**lock.myself().__dict__, "pid": 2**22 + 1, "born": 7}))
    monkeypatch.setattr(lock, "SETTLE_S", 0.2)
    both, turns, done = threading.Barrier(2), itertools.count(), threading.Event()
    writers: set[int] = set()

    def second_waits(method: str, path: str) -> None:
        if method in ("PUT", "POST") and len(writers) < 2:
            turn = next(turns)
            writers.add(turn)
            both.wait(10)
            time.sleep(0.6 * turn)

    store.fault = second_waits

    def contend() -> str:
        try:
            with Lock(path, "x"):
                got.append(1)
                done.wait(10)
                return "got"
        except Held:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        contenders = [pool.submit(contend) for _ in range(2)]
        time.sleep(1.2)
        done.set()
        assert sorted(c.result() for c in contenders) == ["got", "refused"]


def test_a_lock_whose_answer_was_lost_is_had(store: Store, store_folder: str) -> None:
    path, faults = f"{store_folder}/x.lock", iter(["lost"])
    store.fault = lambda method, path: next(faults, None) if method in ("PUT", "POST") else None
    with Lock(path, "x", beat_s=0.1, stale_s=5.0) as mine:
        assert store.faults["lost"] == 1
        faults = iter(["lost"])  # of a renewal
        deadline = time.monotonic() + 10
        while store.faults["lost"] < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        mine.check()
    assert store.faults["lost"] == 2 and not storage.exists(path)
    assert not isinstance(store, Google) or store.unauthorised == 0


def test_a_holder_whose_store_does_not_answer_stops_when_others_may_take_over(store, store_folder, monkeypatch) -> None:
    monkeypatch.setattr(filesystems, "SILENCE_S", 5.0)  # for which a renewal waits, and others don't
    storage.forget_connections()
    answered = threading.Event()
    with Lock(f"{store_folder}/x.lock", "x", beat_s=0.1, stale_s=1.0) as mine:
        store.fault = lambda method, path: answered.wait(20) and None
        begun = time.monotonic()
        with pytest.raises(Held, match=r"wasn't renewed for 1 s; this run stops"):
            while time.monotonic() < begun + 10:
                mine.check()
                time.sleep(0.05)
        assert 0.8 < time.monotonic() - begun < 4
    assert time.monotonic() - begun < 4.5  # and waits no longer for what it asked
    answered.set()
    storage.forget_connections()


def test_a_renewal_does_not_replace_whoever_took_over_meanwhile(store: Store, store_folder: str) -> None:
    """Between the holder's last look at its lock and its write."""
    path = f"{store_folder}/x.lock"
    theirs = json.dumps({**lock.myself().__dict__, "host": "far", "machine": "another boot"}).encode()
    with Lock(path, "x", beat_s=0.1, stale_s=30.0) as mine:
        once = iter([True])

        def taken_over(method: str, _: str) -> None:
            if method in ("PUT", "POST") and next(once, False):
                store.put(path.partition("://")[2], theirs)

        store.fault = taken_over
        deadline = time.monotonic() + 10
        with pytest.raises(Held, match="taken over by process"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)
    assert storage.read_bytes(path) == theirs


@pytest.mark.parametrize("conditions", ["ignored", "refused"])
def test_a_store_without_conditions_keeps_out_who_comes_later_and_says_so_once(s3, s3_folder, conditions) -> None:
    s3.conditions = conditions
    path, said = f"{s3_folder}/x.lock", []
    with Lock(path, "x", tell=said.append, beat_s=0.1, stale_s=1.0) as mine:
        with pytest.raises(Held, match="in use by process"), Lock(path, "x"):
            pass
        time.sleep(0.3)
        mine.check()
    assert len(said) == 1 and "can't keep out a run that starts within the same second" in said[0]
    assert not storage.exists(path)


def test_where_the_store_refuses_it_is_said(store: Store, store_folder: str, impatient) -> None:
    path = f"{store_folder}/x.lock"
    store.fault = lambda method, path: "denied" if method in ("PUT", "POST") else None
    with pytest.raises(PermissionError, match=r"x\.lock: .*You may not; check the credentials"), Lock(path, "x"):
        pass
    store.fault = lambda method, path: "slow_down" if method in ("PUT", "POST") else None
    with pytest.raises(OSError, match=r"x\.lock: .*reduce your request rate; check the settings"), Lock(path, "x"):
        pass


def test_a_renewal_that_is_late_does_not_bring_back_a_lock_that_was_let_go(store: Store, store_folder: str) -> None:
    """Its store answers only after the run has ended; the next run gets the lock."""
    path, asked, answered = f"{store_folder}/x.lock", threading.Event(), threading.Event()

    def late(method: str, _: str) -> None:
        if method == "GET" and not asked.is_set():
            asked.set()
            answered.wait(10)

    with Lock(path, "x", beat_s=0.1, stale_s=60.0):
        store.fault = late
        assert asked.wait(10)
    answered.set()
    deadline = time.monotonic() + 10
    while lock.read_holder(path) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # in which a late write would come
    assert lock.read_holder(path) is None
    with Lock(path, "x"):
        assert lock.read_holder(path)
