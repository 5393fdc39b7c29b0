"""Extraction, and many separations, on a cluster of three nodes while driver, workers and nodes are killed."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from avsep import audit, many, media, shards, storage
from tests.support import tones

N_FILES = int(os.environ.get("AVSEP_CHAOS_FILES", "300"))
N_SOUNDS = int(os.environ.get("AVSEP_CHAOS_SOUNDS", "200"))
N_KILLS = int(os.environ.get("AVSEP_CHAOS_KILLS", "12"))
RATE = 48_000


def make_media(folder: Path, n: int) -> Path:
    """Make small films with sound, one in eight of them cut short or no film at all, and their table."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(n):
        rng = np.random.default_rng(i)
        t = np.arange(2 * RATE) / RATE
        sound = sum(np.sin(2 * np.pi * rng.uniform(100, 4000) * t) * (t % rng.uniform(0.2, 1.0)) for _ in range(4))
        wav, film = folder / "sound.wav", folder / f"{i}.mp4"
        soundfile.write(wav, 0.05 * sound + 0.001 * rng.standard_normal(len(t)), RATE)
        command = [
            media.ffmpeg_executable(),
            "-loglevel",
            "error",
            "-f",
            "lavfi",
            "-i",
            f"testsrc=s=64x48:r=5:d=2,hue=h={i}",
        ]
        command += ["-i", str(wav), "-threads", "1", "-c:v", "libx264", "-preset", "ultrafast", "-shortest", str(film)]
        subprocess.run(command, check=True)
        if i % 8 == 3:
            film.write_bytes(film.read_bytes()[: 500 * (i % 3)])
        rows.append({"segment_id": f"-{i}_{i:03d}", "source": film.name, "labels": "drum"})
    wav.unlink()
    with (folder / "table.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "table.csv"


def stand(out: Path) -> dict[str, tuple[int, int, int]]:
    """What is committed, file by file, as the file system knows it."""
    paths = []
    for commit in shards.read_commits(str(out)) if (out / "commits").exists() else []:
        paths += [f.path for f in (commit.clips, commit.rejections) if f]
        paths.append(f"commits/{commit.shard}-g{commit.generation}.json")
    return {p: ((s := (out / p).stat()).st_ino, s.st_mtime_ns, s.st_size) for p in paths}


def disturb(program: list[str], task: str, committed: Path, n_kills: int, log: Path, monkeypatch) -> None:
    """Run a program on a cluster of three nodes to its end while driver, workers and nodes are killed, and once more.

    What is committed is never touched again. `task` is what its Ray tasks are called.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves the workers
    for name, value in {
        "period_ms": "2000",
        "timeout_ms": "5000",
        "failure_threshold": "4",
        "initial_delay_ms": "0",
    }.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    from ray.cluster_utils import Cluster

    cluster = Cluster()

    def add_nodes(count: int, tries: int, **options: object) -> list:
        """Start nodes; on a busy machine one may not start within Ray's 30 s."""
        started: list = []
        for _ in range(tries):
            with contextlib.suppress(Exception):
                while len(started) < count:
                    started.append(cluster.add_node(num_cpus=1, **options))
        return started

    add_nodes(1, 5, include_dashboard=False)
    nodes = add_nodes(2, 5)
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    rng = random.Random(int(os.environ.get("AVSEP_CHAOS_SEED", "0")))
    said = log.open("w")
    kills: Counter[str] = Counter()
    first = ["node", *rng.sample(["driver", "worker"], 2)]  # the node last: all may be done until another has started
    stood: dict[str, tuple[int, int, int]] = {}

    def start() -> subprocess.Popen:
        return subprocess.Popen(program, env=environment, stdout=said, stderr=said)

    def workers() -> list[int]:
        """Find those processes of this cluster that do a shard."""
        raylets = {n.all_processes["raylet"][0].process.pid for n in (cluster.head_node, *nodes)}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in raylets and f"ray::{task}".encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass
        return found

    if not nodes:
        cluster.shutdown()
        pytest.fail("no cluster of two nodes or more started in 5 tries")
    driver = start()
    deadline = time.monotonic() + 1000
    try:
        while kills.total() < n_kills and time.monotonic() < deadline:
            time.sleep(rng.uniform(0.2, 1.0) if first else rng.uniform(0.5, 4.0))
            if driver.poll() is not None:
                assert driver.returncode == 0, log.read_text()[-3000:]
                break
            at_work = workers()
            if not at_work or (not first and len(stand(committed)) == len(stood) and rng.random() < 0.8):
                continue  # one of each soon, as work may be done soon; then mostly something is committed in between
            what = first.pop() if first else rng.choice(["driver", "worker", "worker", "node"])
            if what == "driver":
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                driver = start()
            elif what == "worker":
                os.kill(rng.choice(at_work), signal.SIGKILL)
            elif kills["node"] < 2 and nodes:
                cluster.remove_node(nodes.pop(rng.randrange(len(nodes))), allow_graceful=False)
                nodes += add_nodes(1, 2)
            else:
                continue
            kills[what] += 1
            now = stand(committed)
            assert stood.items() <= now.items()  # what was committed is untouched
            stood = now
        assert driver.wait(timeout=max(60, deadline - time.monotonic())) == 0, log.read_text()[-3000:]
        again = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stderr
    finally:
        driver.kill()
        driver.wait()
        cluster.shutdown()
        said.close()
    print(f"killed: {dict(kills)}")
    assert kills["driver"] and kills["worker"] and kills["node"], kills
    assert stood.items() <= stand(committed).items()


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_whatever_is_killed_each_segment_ends_up_once(tmp_path, monkeypatch):
    table, out, calm = make_media(tmp_path / "media", N_FILES), tmp_path / "out", tmp_path / "calm"
    program = [sys.executable, "-m", "pipelines.extract", "--segments", str(table), "--out"]
    assert subprocess.run([*program, str(calm), "--in-process"], timeout=600).returncode == 0
    disturb([*program, str(out)], "extract_shard", out, N_KILLS, tmp_path / "log", monkeypatch)

    ids = shards.read_ids(str(out))
    assert ids == shards.read_ids(str(calm)) and len(ids[0]) + len(ids[1]) == N_FILES
    commits, findings = audit.check_commits(str(out))
    for kind, file, digest in [
        (k, f, c.digest) for c in commits for k in ("clips", "rejections") if (f := getattr(c, k))
    ]:
        findings += audit.check_file(str(out), kind, file, digest)[0].damage
    assert findings == []  # no orphans, no temporary files, nothing twice
    assert not list(out.rglob("*.tmp")) and not storage.exists(str(out / shards.LOCK_FILE))
    one, other = ({r.segment_id: r for r in shards.read_clips(str(o))} for o in (out, calm))
    for segment_id, record in one.items():
        same = other[segment_id]
        np.testing.assert_allclose(record.bases.astype(float), same.bases.astype(float), atol=2e-3)
        assert record.kl_divergence == pytest.approx(same.kl_divergence, rel=1e-4)
        assert record.media_sha256 == same.media_sha256
    reasons = [{r.segment_id: r.reason for r in shards.read_rejections(str(o))} for o in (out, calm)]
    assert reasons[0] == reasons[1]
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_whatever_is_killed_each_file_is_separated_or_rejected_once(tmp_path, monkeypatch):
    videos, out, calm = tmp_path / "videos", tmp_path / "out", tmp_path / "calm"
    make_media(videos / "films", 8)
    for i in range(N_SOUNDS):
        rng = np.random.default_rng(i)
        loud, beat = rng.uniform(0.05, 0.3), rng.uniform(1.0, 4.0)
        sound = loud * tones.tone(tones.DOG, 0.6, beat) + 0.2 * tones.tone(tones.VIOLIN, 0.6)
        path = videos / "ab"[i % 2] / f"{i // 2}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, sound.numpy(), tones.RATE)
        if i % 10 == 3:
            path.write_bytes(path.read_bytes()[: 30 * (i % 3)])
    tones.model(tones.UNSEEN).save(tmp_path / "model")
    program = [sys.executable, "-m", "pipelines.separate", "--model", str(tmp_path / "model")]
    program += ["--videos", *(str(videos / name) for name in ("films", "a", "b")), "--out"]
    assert subprocess.run([*program, str(calm), "--in-process"], timeout=600).returncode == 0
    disturb([*program, str(out)], "separate_shard", out / "_shards", N_KILLS // 2, tmp_path / "log", monkeypatch)

    one, other = ({t: pq.read_table(o / t).to_pylist() for t in (many.RESULTS, many.REJECTIONS)} for o in (out, calm))
    done, rejected = ([r["file"] for r in one[t]] for t in (many.RESULTS, many.REJECTIONS))
    assert sorted({*done, *rejected}) == sorted(str(p) for p in videos.rglob("*.*") if p.suffix in (".wav", ".mp4"))
    assert not {*done} & {*rejected} and len(rejected) == len({*rejected}) > N_SOUNDS // 20
    assert len({(r["file"], r["object"]) for r in one[many.RESULTS]}) == len(done)
    for table in (many.RESULTS, many.REJECTIONS):
        for mine, theirs in zip(one[table], other[table], strict=True):
            assert mine == {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in theirs.items()}
    for folder in {r["folder"] for r in one[many.RESULTS]}:
        names = {p.name for p in (calm / folder).iterdir()}
        assert {p.name for p in (out / folder).iterdir()} == names
        for name in (n for n in names if n.endswith(".wav")):
            sounds = [soundfile.read(o / folder / name)[0] for o in (out, calm)]
            np.testing.assert_allclose(*sounds, atol=1e-4)
    assert not list(out.rglob("*.tmp")) and not (out / many.LOCK_FILE).exists()
    assert json.loads((out / many.STATUS_FILE).read_text())["state"] == "finished"
