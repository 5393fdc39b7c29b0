"""The extraction's driver when things go wrong: two drivers, dead workers, full disks, failing stores."""

import functools
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from avsep import fetching, shards, stages, storage, work
from avsep.audit import check_commits
from avsep.extraction import Extraction
from avsep.factors import DataConfig, ExtractionConfig
from avsep.objects import AUDIOSET_23
from avsep.records import ClipRecord, Reason, Rejection, Segment
from pipelines import console, downloads, extract, runners, shardtasks
from pipelines.progress import Progress
from tests.benchmarks import extraction_driver as simulation
from tests.support.sounds import table

ROOT = Path(__file__).parents[2]
N = 12  # two shards


MADE_WITH = DataConfig(ExtractionConfig(), AUDIOSET_23)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("sounds") / "t", N)


def files(out: Path) -> set[str]:
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}


def committed(out: Path) -> set[str]:
    named = {f.path for c in shards.read_commits(str(out)) for f in (c.clips, c.rejections) if f}
    return named | {f"commits/{c.shard}-g{c.generation}.json" for c in shards.read_commits(str(out))}


def command(sounds: Path, out: Path, *more: str) -> list[str]:
    return ["--segments", str(sounds), "--out", str(out), "--in-process", *more]


# ------------------------------------------------------------------------------- two drivers


@pytest.mark.parametrize("enough", [True, False])
def test_segments_too_large_together_are_done_one_after_the_other(tmp_path, enough):
    """As where a worker's memory holds one of them, not four."""
    asked: Counter[str] = Counter()

    def process(segments, *_):
        asked.update(s.segment_id for s in segments)
        if len(segments) > 1 or (not enough and asked["s3"] == 3):  # when it is done, after it was tried alone
            raise console.WorkerDied("out of memory")
        return [], [Rejection(s.segment_id, "decode", "silent", False) for s in segments], {"decode": 1.0}

    segments = [Segment(f"s{i}", f"{i}.wav", 0.0, 1.0, "train", labels=("dog",)) for i in range(4)]
    made, progress = (
        Extraction(str(tmp_path), MADE_WITH, process),
        Progress("x", 4, "s"),
    )
    works = work.plan_work(shards.read_state(str(tmp_path)), segments)
    if enough:
        shardtasks.extract_shards(works, made, runners.InProcess(), progress)
        (commit,) = shards.read_commits(str(tmp_path))
        assert sorted(commit.rejection_ids) == [s.segment_id for s in segments] and commit.timings_s == {"decode": 4.0}
    else:
        with pytest.raises(console.UsageError, match="with its 4 segments, though with none of them alone; give"):
            shardtasks.extract_shards(works, made, runners.InProcess(), progress)
        assert shards.read_ids(str(tmp_path)) == ([], [])


def test_a_run_ends_with_one_line_once_no_download_is_worth_a_try(tmp_path):
    """The worker raises what a budget said, and the driver ends: no segment is rejected for it."""

    def process(*_):
        raise pickle.loads(pickle.dumps(fetching.Stopped("update yt-dlp")))  # as it comes from another process

    segments = [Segment("s", "youtube:aaaaaaaaaaa", 0.0, 1.0, "train", labels=("dog",))]
    made, progress = (
        Extraction(str(tmp_path), MADE_WITH, process),
        Progress("x", 1, "s"),
    )
    works = work.plan_work(shards.read_state(str(tmp_path)), segments)
    with pytest.raises(console.UsageError, match=r"^update yt-dlp$"):
        shardtasks.extract_shards(works, made, runners.InProcess(), progress)
    assert shards.read_ids(str(tmp_path)) == ([], [])


def test_a_shared_budget_keeps_what_was_spent(tmp_path):
    make = functools.partial(downloads.BudgetKeeper, [], [], 3600.0, str(tmp_path))
    (caller,) = runners.InProcess().actors(make, 1, gpus=0)
    budget = downloads.SharedBudget(caller)
    lease = budget.acquire("m", "youtube:x")
    assert isinstance(lease, fetching.Lease) and isinstance(budget.acquire("m", "youtube:x"), fetching.Wait)
    budget.report(lease, None)
    left_s, (status,) = budget.outlook(10)
    assert left_s > 0 and status.outcomes == {"ok": 1}
    assert "machine m" in json.loads((tmp_path / downloads.EGRESS_FILE).read_text())["identities"]


def test_a_pause_is_told_while_no_shard_ends(tmp_path, capsys, monkeypatch):
    """Once, and the status file says it, too: else a run whose proxies all fail says nothing for hours."""
    monkeypatch.setattr(downloads, "ASK_EVERY_S", 0.02)
    make = functools.partial(downloads.BudgetKeeper, ["http://u:secret@h:9"], [], 3600.0, str(tmp_path))
    budget = downloads.SharedBudget(runners.InProcess().actors(make, 1, gpus=0)[0])
    store = fetching.MediaStore(str(tmp_path), {}, {"s"}, {})
    status = tmp_path / "status.json"
    budget.report(budget.acquire("m", "youtube:x"), Reason.EGRESS_BLOCKED)
    with downloads.Outlook(store, budget, Progress("x", 1, "s", status=str(status))):
        deadline = time.monotonic() + 20
        while not status.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    assert len(re.findall(r"^http://h:9 pauses for 1\d min", capsys.readouterr().out, re.M)) == 1
    (identity,) = json.loads(status.read_text())["egress"]["identities"]
    assert identity["paused_s"] > 500


def test_a_second_driver_on_the_same_output_refuses(sounds, tmp_path, capfd):
    out = tmp_path / "out"
    program = [sys.executable, "-m", "pipelines.extract", *command(sounds, out)]
    first = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (out / shards.LOCK_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # alive, and in no hurry
        before = files(out)
        assert extract.main(command(sounds, out)) == 2
        error = capfd.readouterr().err
        assert f"process {first.pid} on" in error and error.count("\n") == 1
        assert files(out) == before
        assert extract.main(command(sounds, out, "--dry-run")) == 0  # looking is free
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert len(shards.read_ids(str(out))[0]) == N
    assert files(out) == committed(out) | {"status.json"}


def test_what_killed_writers_left_is_swept_and_a_live_writers_is_not(sounds, tmp_path):
    out = tmp_path / "out"
    assert extract.main(command(sounds, out)) == 0
    whole = files(out)
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    shard = shards.read_commits(str(out))[0].shard
    lost = [
        f"clips/{shard}-g0-000000000000.parquet",  # its generation has a commit: nobody will name it
        f"clips/{shard}-g0-000000000000.parquet.{host}.{dead.pid}.0a.tmp",
        f"commits/{shard}-g0.json.{host}.{dead.pid}.0b.tmp",
        "rejections/old-g0-111111111111.parquet",
        "rejections/x.parquet.elsewhere.5.0c.tmp",
    ]
    live = [
        "clips/new-g0-222222222222.parquet",  # no commit yet, and young
        f"clips/new-g0-333333333333.parquet.{host}.{os.getpid()}.0d.tmp",
        "clips/new-g0-444444444444.parquet.elsewhere.5.0e.tmp",
        "clips/notes.txt",
    ]
    (out / "rejections").mkdir(exist_ok=True)
    for name in (*lost, *live):
        (out / name).write_text("x")
    long_ago = time.time() - 7200
    for name in lost[-2:]:
        os.utime(out / name, (long_ago, long_ago))
    assert extract.main(command(sounds, out)) == 0
    assert files(out) == whole | set(live)


# ------------------------------------------------------------------------ what changed since


@pytest.fixture
def extracted(tmp_path, monkeypatch):
    """Six sounds in two tables' worth of shards, extracted; a function writes the table anew and extracts again."""
    sounds = table(tmp_path / "t", 6)
    out = tmp_path / "out"
    arguments = extract.parser().parse_args(command(sounds, out))
    decoded: list[str] = []

    def process(segments, *others, **options):
        decoded.extend(s.segment_id for s in segments)
        return stages.extract_records(segments, *others, **options)

    def again(*rows: str) -> list[str]:
        """Extract; return the ids of what was decoded."""
        if rows:
            sounds.write_text("\n".join(["segment_id,source,start_s,split,labels", *rows]) + "\n")
        decoded.clear()
        assert extract.run(arguments, recipe=simulation.TINY, process=process) == 0
        clips, rejections = shards.read_ids(str(out))
        stored = [r.segment_id for r in shards.read_clips(str(out))]
        assert sorted(stored) == clips and not set(clips) & set(rejections)
        assert files(out) == committed(out) | {"status.json"}
        assert check_commits(str(out))[1] == []
        return sorted(decoded)

    again(*ROWS)
    return again, sounds.parent, out


ROWS = [f"s{i},{i}.wav,0,train,drum" for i in range(6)]


def clips_of(out: Path) -> dict[str, ClipRecord]:
    return {r.segment_id: r for r in shards.read_clips(str(out))}


def test_a_row_whose_labels_changed_gives_the_clip_its_new_labels(extracted, capfd):
    """Sound and pictures stay as they were: nothing is decoded."""
    again, _, out = extracted
    before = clips_of(out)
    assert again() == []
    capfd.readouterr()
    assert again(*ROWS[:1], "s1,1.wav,0,val,dog;cat", *ROWS[2:]) == []
    assert "1 segments changed since they were extracted (1 only in split, objects or labels)" in capfd.readouterr().out
    after = clips_of(out)
    assert (after["s1"].labels, after["s1"].split) == (("dog", "cat"), "val")
    for i, clip in after.items():
        assert np.array_equal(clip.activations, before[i].activations)
        assert i == "s1" or clip.labels == ("drum",)
    again()
    assert "changed" not in capfd.readouterr().out
    again(*ROWS[:1], "s1,1.wav,0,val,dog;cat", *ROWS[2:], "s9,1.wav,0,train,dog")  # shards are others now
    assert clips_of(out)["s1"].labels == ("dog", "cat")
    again(*ROWS, "s9,1.wav,0,train,cat")
    assert (clips_of(out)["s1"].labels, clips_of(out)["s9"].labels) == (("drum",), ("cat",))


def test_rows_whose_excerpt_changed_are_decoded_again(extracted):
    again, folder, out = extracted
    before = clips_of(out)
    (folder / "moved").mkdir()
    (folder / "3.wav").rename(folder / "moved" / "3.wav")
    rows = [ROWS[0], "s1,1.wav,0.1,train,drum", "s2,4.wav,0,train,drum", "s3,moved/3.wav,0,train,drum", *ROWS[4:]]
    assert again(*rows) == ["s1", "s2"]
    after = clips_of(out)
    assert after["s1"].duration_s == pytest.approx(before["s1"].duration_s - 0.1)
    assert after["s2"].media_sha256 == before["s4"].media_sha256
    assert after["s3"].source == str(folder / "moved" / "3.wav")  # the same bytes elsewhere
    assert np.array_equal(after["s3"].bases, before["s3"].bases)
    assert again() == []


def test_a_media_file_that_was_written_anew_is_decoded_again(extracted, capfd):
    again, folder, out = extracted
    time.sleep(0.02)
    (folder / "1.wav").touch()
    (folder / "2.wav").write_bytes((folder / "5.wav").read_bytes())
    assert again() == ["s2"]
    assert "2 media files are newer than their clips: done again if they differ" in capfd.readouterr().out
    after = clips_of(out)
    assert after["s2"].media_sha256 == after["s5"].media_sha256
    assert again() == []


def test_a_changed_row_that_cannot_be_used_is_rejected_and_comes_back(extracted):
    """A rejection is tried again when its row changes, and only then."""
    again, _, out = extracted
    assert again(*ROWS[:1], "s1,nowhere.wav,0,train,drum", *ROWS[2:]) == ["s1"]
    assert shards.read_ids(str(out)) == (["s0", "s2", "s3", "s4", "s5"], ["s1"])
    assert again() == []
    assert again(*ROWS) == ["s1"]
    assert shards.read_ids(str(out)) == ([f"s{i}" for i in range(6)], [])


def test_clips_whose_rows_are_gone_are_counted(extracted, capfd):
    again, _, out = extracted
    again(*ROWS[:4])
    said = " ".join(capfd.readouterr().out.split())
    assert f"{out} also holds 2 clips of segments that the table doesn't have: they stay, and training takes" in said
    assert len(clips_of(out)) == 6


def test_a_dry_run_tells_what_changed(extracted, capfd):
    _, folder, out = extracted
    (folder / "table.csv").write_text("segment_id,source,labels\n" + "s0,0.wav,dog\ns1,2.wav,drum\n")
    arguments = extract.parser().parse_args(command(folder / "table.csv", out, "--dry-run"))
    before = files(out)
    assert extract.run(arguments, recipe=simulation.TINY) == 0
    said = capfd.readouterr().out
    assert "2 segments changed since they were extracted (1 only in split, objects or labels)" in said
    assert "2 segments: 0 done, 2 to do" in said and files(out) == before


def test_a_changed_download_is_fetched_anew_and_a_users_own_file_stays(tmp_path):
    store = str(tmp_path)
    segment = Segment("v", "youtube:aaaaaaaaaaa", 0, 10)
    mine = tmp_path / "v.mkv"
    downloaded = Path(fetching.store_path(store, "v"))
    downloaded.parent.mkdir()
    for path in (mine, downloaded):
        path.write_text("x")
    work.forget_media(store, [segment, Segment("w", "w.mp4")])
    assert mine.exists() and not downloaded.exists()


# ----------------------------------------------------------------------- bad disks and stores


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(sounds, tmp_path):
    """No file may grow beyond what commit records take: the writing of clips fails as on a full disk."""
    out = tmp_path / "out"
    program = [sys.executable, "-m", "pipelines.extract", *command(sounds, out)]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    full = rf"\[Errno 27\] File too large; make room there, or write elsewhere: '{out}/clips/\S+.parquet'"
    assert re.search(full, done.stderr) and "Traceback" not in done.stderr and "trying again" in done.stdout
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert files(out) == {"status.json"}
    assert extract.main(command(sounds, out)) == 0
    assert len(shards.read_ids(str(out))[0]) == N


class Flaky(MemoryFileSystem):
    """An object store whose writes fail, some before and some after the object is there."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[str] = []  # noqa: RUF012

    def _open(self, path, mode="rb", **options):
        if mode == "wb" and "/status" not in path and "lock" not in path and self.failures:
            how = self.failures.pop()
            if how == "before":
                raise OSError("503 Slow Down")
            file = super()._open(path, mode, **options)
            close = file.close

            def close_and_fail():
                file.close = close  # the store keeps this very file, to be read later
                close()
                raise OSError("connection reset")

            if how == "after":
                file.close = close_and_fail
            return file
        return super()._open(path, mode, **options)


@pytest.mark.parametrize("failures", [["before"], ["after"], ["after", "", "before"]])
def test_a_store_that_fails_for_a_moment_costs_one_more_try(sounds, failures, capfd):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.failures[:] = failures
    out = "flaky://bucket/out"
    assert extract.main(["--segments", str(sounds), "--out", out, "--in-process"]) == 0
    assert "trying again" in capfd.readouterr().out
    assert len(shards.read_ids(out)[0]) == N and not Flaky.failures
    named = {f.path for c in shards.read_commits(out) for f in (c.clips, c.rejections) if f}
    found = {f"{k}/{storage.name(f)}" for k in ("clips", "rejections") for f in storage.list_files(f"{out}/{k}")}
    assert found == named


def test_a_store_that_keeps_failing_stops_the_run_and_the_next_one_goes_on(sounds, capfd):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.failures[:] = ["before"] * 50
    out = "flaky://bucket/out"
    arguments = ["--segments", str(sounds), "--out", out, "--in-process"]
    assert extract.main(arguments) == 2
    assert "503 Slow Down" in capfd.readouterr().err
    Flaky.failures.clear()
    assert extract.main(arguments) == 0
    assert len(shards.read_ids(out)[0]) == N


# ------------------------------------------------------------------------------ dead workers


def lethal(segments, config, label, locate):
    """Stages in which one segment kills its worker, as a decoder loaded into it would."""
    records, rejections, seconds = [], [], {"decode": 0.0}
    for s in segments:
        if s.segment_id == "s3":
            os.kill(os.getpid(), signal.SIGKILL)
        if s.segment_id == "s5":
            rejections.append(Rejection("s5", "decode", "silent"))
            continue
        found, lost, spent = stages.extract_records([s], config, label, locate)
        records += found
        rejections += lost
        seconds["decode"] += sum(spent.values())
    return records, rejections, seconds


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_segment_that_kills_its_worker_is_found_and_costs_itself_alone(sounds, tmp_path, capfd, monkeypatch):
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # workers import `lethal`, too
    out = tmp_path / "out"
    arguments = extract.parser().parse_args(["--segments", str(sounds), "--out", str(out)])
    assert extract.run(arguments, recipe=simulation.TINY, process=lethal) == 0
    assert "looking for the segment" in capfd.readouterr().out
    clips, rejections = shards.read_ids(str(out))
    assert rejections == ["s3", "s5"] and len(clips) == N - 2
    reasons = {r.segment_id: (r.reason, r.transient, r.attempts) for r in shards.read_rejections(str(out))}
    assert reasons["s3"] == ("crashed_decoder", True, 1) and reasons["s5"][0] == "silent"
    status = json.loads((out / "status.json").read_text())
    assert (status["done"], status["total"], status["state"]) == (N, N, "finished")
    assert status["rejected"] == {"crashed_decoder": 1, "silent": 1} and status["in_flight"] == 0
    assert files(out) == committed(out) | {"status.json"}

    # it was the machine, or has been mended: a retry visits those alone
    retry = [*["--segments", str(sounds), "--out", str(out)], "--retry-rejected", "crashed_decoder", "--in-process"]
    before = Counter(c.shard for c in shards.read_commits(str(out)))
    assert extract.run(extract.parser().parse_args(retry), recipe=simulation.TINY) == 0
    assert shards.read_ids(str(out))[1] == ["s5"]
    assert sum((Counter(c.shard for c in shards.read_commits(str(out))) - before).values()) == 1


# ---------------------------------------------------------------------------------- progress


def test_the_status_file_says_where_a_run_stands(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    path = tmp_path / "status.json"
    seen = []
    with Progress("extract", 100, "segments", done=10, rejected={"removed": 2}, status=str(path)) as progress:
        seen.append(json.loads(path.read_text()))
        progress.in_flight = 16
        for _ in range(3):
            clock[0] += 0.4
            progress.add(30, rejected={"removed": 1, "silent": 2}, seconds={"decode": 6.0, "label": 3.0})
    done = json.loads(path.read_text())
    assert (seen[0]["state"], seen[0]["done"], seen[0]["rate_per_s"]) == ("running", 10, 0)
    assert (done["state"], done["done"], done["total"], done["in_flight"]) == ("finished", 100, 100, 0)
    assert done["rejected"] == {"silent": 6, "removed": 5}
    assert done["rate_per_s"] == pytest.approx(75) and done["seconds_left"] == 0
    assert done["stages"]["decode"] == {"worker_seconds": 18.0, "per_worker_second": 5.0}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("extract: 100/100 segments, ") and "11 rejected (silent 6, removed 5)" in line
    assert "a worker: decode 5/s, label 10/s" in line


def test_the_rate_forgets_what_is_longer_ago_than_an_hour(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("extract", 10**6, "segments")
    for _ in range(100):  # fast for 100 minutes …
        clock[0] += 60
        progress.add(600)
    for _ in range(70):  # … then slow
        clock[0] += 60
        progress.add(60)
    assert progress.rate == pytest.approx(1.0, rel=0.03)
    assert progress.seconds_left == pytest.approx((10**6 - progress.count) / 1.0, rel=0.03)


def test_the_last_status_stays_the_last(tmp_path, monkeypatch):
    """A thread that is slow to write `running`, and one that comes later, leave what was written at the end."""
    path, writing, go_on = tmp_path / "status.json", threading.Event(), threading.Event()
    write = storage.write_text

    def slow(to: str, text: str) -> None:
        if '"in_flight": 7' in text:
            writing.set()
            go_on.wait(10)
        write(to, text)

    monkeypatch.setattr(storage, "write_text", slow)
    with Progress("extract", 2, "segments", status=str(path)) as progress:
        monkeypatch.setattr(time, "monotonic", lambda before=time.monotonic: before() + 60)  # time to write again
        progress.in_flight = 7
        watcher = threading.Thread(target=progress.write_status)
        watcher.start()
        assert writing.wait(10)
        threading.Timer(0.1, go_on.set).start()
    watcher.join(10)
    assert json.loads(path.read_text())["state"] == "finished"
    monkeypatch.setattr(time, "monotonic", lambda before=time.monotonic: before() + 60)
    progress.write_status()
    progress.add(1)
    assert json.loads(path.read_text())["state"] == "finished"


def test_a_dry_run_says_what_there_is_to_do_and_what_it_costs(sounds, tmp_path, capsys):
    rows = [f"v{i},youtube:{'a' * 10}{i},0,10,drum" for i in range(5)]
    remote = tmp_path / "remote.csv"
    remote.write_text("segment_id,source,start_s,end_s,labels\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    arguments = ["--segments", str(remote), "--out", str(out), "--media", str(tmp_path / "media"), "--rate", "10"]
    assert extract.main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "5 segments: 0 done, 5 to do in 1 shards" in text
    assert "fetch: 5 downloads at 10 an hour and identity, 1 of these: 30 min" in text
    assert "worker-seconds a segment (assumed)" in text and "GB of clips" in text
    assert "what takes longest: downloads" in text
    assert not out.exists() and not (tmp_path / "media").exists()


@pytest.mark.parametrize("labels", ["drum", ""])
def test_a_dry_run_downloads_and_loads_no_picture_network(sounds, tmp_path, monkeypatch, capsys, labels):
    """Where its weights are missing, too, which the run itself would need."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("it tried to download"))
    monkeypatch.setattr("avsep.vision.build_network", lambda *_: pytest.fail("it loaded a network"))
    (tmp_path / "t.csv").write_text(f"segment_id,source,labels\na,{sounds.parent}/0.wav,{labels}\n")
    arguments = ["--segments", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert extract.main(arguments) == 0
    told = capsys.readouterr().out
    assert "the weights of resnet152 aren't on this machine; the run brings and checks them" in told
    assert "pictures: resnet152, looks: tiles" in told and "1 segments: 0 done, 1 to do" in told
    assert extract.main([*arguments, "--labeller", "efficientnet_lite0"]) == 0  # installed
    told = capsys.readouterr().out
    assert "pictures: efficientnet_lite0, looks: tiles" in told and "this machine" not in told
    assert extract.main([*arguments, "--labeller", "nosuch"]) == 2
    (tmp_path / "own.pth").write_bytes(b"")
    assert extract.main([*arguments, "--labeller", "nosuch", "--weights", str(tmp_path / "own.pth")]) == 2
    assert "'nosuch' is no picture network" in capsys.readouterr().err
    (tmp_path / "own.pth").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]


# ------------------------------------------------------------------------------- at full size


def test_tasks_are_given_what_they_need_and_no_more():
    """190,000 known files must not travel with each of 750 tasks."""
    store = fetching.MediaStore("m", {f"{i}": f"m/{i}" for i in range(1000)}, {"x", "y"}, {})
    part = store.of([Segment("7", "youtube:a"), Segment("x", "youtube:b")])
    assert part.known == {"7": "m/7"} and part.missing == {"x"}


@pytest.mark.slow
def test_the_driver_costs_little_a_segment_and_restarts_fast(tmp_path):
    """A tenth of AudioSet's size; tests/benchmarks/extraction_driver.py runs the whole."""
    program = ROOT / "tests" / "benchmarks" / "extraction_driver.py"
    arguments = ["--segments", "20000", "--seconds", "20", "--workers", "2", "--out", str(tmp_path / "sim")]
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=280, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["driver_cpu_ms"] < 2.0, done.stdout
    assert figures["restart_cpu_s"] < 10, done.stdout  # wall clock is Ray's and the machine's
    memory = figures["rss_mb"]
    assert max(memory) < min(memory) + 30, done.stdout
