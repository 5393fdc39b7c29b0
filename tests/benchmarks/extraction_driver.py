"""AudioSet's 190,000 segments through the real driver, with stages that only sleep, on a scaled clock.

    python tests/benchmarks/extraction_driver.py [--segments N] [--workers N] [--seconds S] [--out DIR]

The driver is killed when half is committed, and started again. Prints its CPU time and wall-clock time
beyond the sleeping, a segment; its memory along the way; and how long the restart took until shards
were committed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from avsep import shards
from avsep.factors import ExtractionConfig
from avsep.records import ClipRecord, Rejection, Segment, segments_to_table
from avsep.stft import STFT
from pipelines import extract, recipes

STAGES_S = {"fetch": 0.4, "decode": 0.5, "factorize": 0.5, "label": 0.6}  # of a segment, on one worker
TINY = recipes.Recipe("simulation", extraction=ExtractionConfig(stft=STFT(48_000, 8, 4), n_bases=2))


@dataclass(frozen=True)
class Sleep:
    """Stands where decoding, NMF and labelling stand: takes their time divided by `scale`, rejects one in ten."""

    scale: float

    def __call__(self, segments: Sequence[Segment], config: ExtractionConfig, label: object, locate: object):
        """Return small records after a while, as `stages.extract_records` does."""
        time.sleep(sum(STAGES_S.values()) * len(segments) / self.scale)
        records, rejections = [], []
        for s in segments:
            number = hashlib.sha256(s.segment_id.encode()).digest()
            if number[9] < 26:  # shards are ordered by the first bytes
                rejections.append(Rejection(s.segment_id, "fetch", "removed"))
                continue
            F, M = config.shape
            bases = np.frombuffer(number, np.uint8, F * M).reshape(F, M).astype(np.float16) + 1
            records.append(
                ClipRecord(
                    *(s.segment_id, s.source, s.start_s, s.end_s, s.split, s.objects, s.labels),
                    bases=bases / bases.max(0),
                    activations=np.ones((M, 3), np.float16),
                    activation_scale=1.0,
                    basis_energy=np.full(M, 1 / M, np.float32),
                    image_logits=None,
                    kl_divergence=1.0,
                    duration_s=10.0,
                    rms_db=-20.0,
                    media_sha256=number.hex(),
                    label_source="given",
                )
            )
        return records, rejections, {stage: s * len(segments) for stage, s in STAGES_S.items()}


def write_manifest(folder: Path, n_segments: int) -> Path:
    """Write a manifest as long as AudioSet's."""
    made = (
        Segment(f"-{i:010d}_{1000 * i}", f"/media/{i}.mkv", 0.0, 10.0, "train", ("dog",), ("dog",))
        for i in range(n_segments)
    )
    pq.write_table(segments_to_table(made), folder / "segments.parquet")
    return folder / "segments.parquet"


def rss_mb() -> float:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@dataclass
class Measured:
    """What one run of the driver took."""

    cpu_s: float
    wall_s: float
    first_s: float  # until a shard was committed
    first_cpu_s: float  # of this process, until then
    rss_mb: list[float]  # every fiftieth of the run


def drive(segments: Path, out: Path, scale: float, die_at: float = 2.0) -> Measured:
    """Run the driver; kill this process when a share of all shards is committed."""
    n = pq.read_metadata(segments).num_rows
    n_shards = -(-n // shards.default_shard_size(n))
    before = len(list((out / "commits").glob("*.json"))) if out.exists() else 0
    memory: list[float] = []
    first: list[tuple[float, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            done = len(os.listdir(out / "commits")) if (out / "commits").exists() else 0
            if done > before and not first:
                first.append((time.monotonic() - started, time.process_time() - cpu))
            if (done - before) * 50 >= len(memory) * max(1, n_shards - before) and done > before:
                memory.append(rss_mb())
            if done >= die_at * n_shards:
                os.kill(os.getpid(), signal.SIGKILL)

    started, cpu = time.monotonic(), time.process_time()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    arguments = extract.parser().parse_args(["--segments", str(segments), "--out", str(out)])
    status = extract.run(arguments, recipe=TINY, process=Sleep(scale))
    ended.set()
    watcher.join()
    assert status == 0, status
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    return Measured(cpu_s, wall_s, *(first or [(wall_s, cpu_s)])[0], memory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulation and print what it took."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--segments", type=int, default=190_000)
    p.add_argument("--workers", type=int, default=4)
    p.add_argument("--seconds", type=float, default=120.0, help="of sleeping in the whole run")
    p.add_argument("--out", help="default: a temporary folder")
    p.add_argument("--die", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    scale = a.segments * sum(STAGES_S.values()) / (a.workers * a.seconds)
    os.environ["AVSEP_CPUS"] = str(a.workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(a.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / "clips"
        if a.die:
            drive(folder / "segments.parquet", out, scale, die_at=0.5)
            return 1
        manifest = write_manifest(folder, a.segments)
        command = [sys.executable, __file__, "--segments", str(a.segments), "--workers", str(a.workers)]
        command += ["--seconds", str(a.seconds), "--out", str(folder), "--die"]
        died = subprocess.run(command, check=False).returncode
        assert died == -signal.SIGKILL, died
        time.sleep(5)  # until its workers have noticed
        done = sum(len(c.clip_ids) + len(c.rejection_ids) for c in shards.read_commits(str(out)))
        second = drive(manifest, out, scale)
        clips, rejections = shards.read_ids(str(out))
        assert len(set(clips) | set(rejections)) == len(clips) + len(rejections) == a.segments
        left = a.segments - done
        slept_s = left * sum(STAGES_S.values()) / scale / a.workers
        print(
            f"{a.segments} segments; killed after {done}, the rest: {second.wall_s:.1f} s, {slept_s:.1f} s of it asleep"
        )
        figures = {
            "driver_cpu_ms": round(1e3 * second.cpu_s / left, 4),
            "wall_beyond_sleep_ms": round(1e3 * (second.wall_s - slept_s) / left, 4),
            "restart_s": round(second.first_s, 1),
            "restart_cpu_s": round(second.first_cpu_s, 1),
            "rss_mb": [round(m) for m in second.rss_mb],
        }
        print("a segment, in ms: the driver's CPU time; wall clock beyond the sleep, Ray's start included.")
        print("then seconds from the restart to the next commit, the driver's CPU time until then, and its memory")
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
