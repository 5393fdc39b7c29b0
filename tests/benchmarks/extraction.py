"""Extraction against a straightforward script of the same job, and against what its own stages allow.

The script takes one clip at a time: ffmpeg to WAV and PNG files, librosa's STFT, scikit-learn's NMF,
float32 ResNet-152 (with random weights, here as there), one Parquet file at the end.

python -m tests.benchmarks.extraction                # with pictures, and with labels given
python -m tests.benchmarks.extraction --clips 8 --script-clips 2 --architecture resnet18
"""

import argparse
import csv
import functools
import os
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avsep import media, records, stages, synthetic
from avsep.factors import factorize
from avsep.records import Segment, read_segments
from avsep.vision import ImageLabeller, Preprocessing, build_network
from pipelines import extract, recipes, runners
from tests.benchmarks import measure


def render(folder: Path, n_clips: int, seconds: int) -> None:
    """Render clips into a folder, with a table that gives their labels and one that doesn't."""
    config = synthetic.SceneConfig(seconds=seconds)
    rows = []
    for number in range(n_clips):
        scene = synthetic.render_scene(number, "train", 5, config)
        segment = synthetic.write_scene(scene, folder)
        rows.append({
            "segment_id": segment.segment_id, "source": segment.source, "start_s": 0, "end_s": seconds,
            "split": "train", "labels": records.names_cell(scene.plan.visible),
        })  # fmt: skip
    for name, columns in (("labels.csv", list(rows[0])), ("pictures.csv", list(rows[0])[:-1])):
        with (folder / name).open("w", newline="") as f:
            table = csv.DictWriter(f, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)


def random_weights(path: Path, architecture: str) -> str:
    """Write an untrained network's weights."""
    torch.manual_seed(0)
    torch.save(build_network(architecture, 1000).state_dict(), path)
    return str(path)


def straightforward(segments: list[Segment], folder: Path, network: torch.nn.Module | None) -> None:
    """Do the job the obvious way."""
    import librosa
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.decomposition import NMF

    warnings.simplefilter("ignore")
    rows = []
    for segment in segments:
        ffmpeg = [media.ffmpeg_executable(), "-loglevel", "error", "-y", "-i", str(segment.source)]
        wav, png = folder / "clip.wav", folder / "clip-%03d.png"
        subprocess.run([*ffmpeg, "-ac", "1", "-ar", "48000", str(wav)], check=True)
        sound, _ = librosa.load(wav, sr=None)
        V = np.abs(librosa.stft(sound, n_fft=4800, hop_length=2400, pad_mode="constant"))
        model = NMF(25, init="random", solver="mu", beta_loss="kullback-leibler", max_iter=200, tol=0, random_state=0)
        W = model.fit_transform(V)
        row = {"segment_id": segment.segment_id, "W": W.ravel(), "H": model.components_.ravel()}
        if network is not None:
            size = "scale=-2:256,crop=224:224"
            subprocess.run([*ffmpeg, "-vf", f"fps=1,{size}", str(png)], check=True)
            files = sorted(folder.glob("clip-*.png"))
            pictures = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files]))
            with torch.inference_mode():
                row["logits"] = network(Preprocessing()(pictures)).numpy().ravel()
            for f in files:
                f.unlink()
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")


def stage_sides(table: str, architecture: str, weights: str | None) -> dict[str, Callable[[], Any]]:
    """Each stage on one clip, alone."""
    config = recipes.default().extraction
    segment = read_segments(table)[0]
    decoded = stages.decode(segment, config)
    factors = factorize(decoded.clip.waveform, 0, config)
    labeller = ImageLabeller.load(architecture, weights) if weights else None
    views = labeller.looking(config.looks)(decoded.clip.images) if labeller else None
    logits = views.evidence(labeller(views.crops)).numpy() if labeller and views else None
    found: dict[str, Callable[[], Any]] = {
        "decode": functools.partial(stages.decode, segment, config),
        "factorize": functools.partial(factorize, decoded.clip.waveform, 0, config),
        "record": functools.partial(stages.to_record, segment, decoded, factors, logits, config.stft.sample_rate),
    }
    if labeller and views:
        crops = np.concatenate([views.crops] * 4)  # as many as extraction labels at a time
        found["label four clips"] = functools.partial(labeller, crops)
    return found


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Watch the memory of this process and its descendants, in GB; shared pages count once for each."""
    import psutil

    peak, done = [0.0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss - process.memory_info().shared
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 1e9)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def one(
    folder: Path, kind: str, weights: str | None, arguments: argparse.Namespace, processes: int
) -> dict[str, float]:
    """Measure extraction, the script and the stages, with pictures or with given labels."""
    table, segments = str(folder / f"{kind}.csv"), read_segments(str(folder / f"{kind}.csv"))
    options = ["--weights", weights, "--recipe", "default"] if weights else ["--recipe", "default"]
    recipe = recipes.Recipe("default", labeller=arguments.architecture)
    recipes.RECIPES["default"] = lambda: recipe
    os.environ["TORCH_HOME"] = str(folder / "none")  # no weights there: given labels go without pictures
    os.environ["https_proxy"] = os.environ["http_proxy"] = "http://127.0.0.1:9"
    with runners.session(), peak_memory() as peak:
        extract.main(["--segments", table, "--out", str(folder / f"warm-{kind}"), *options])  # workers start and load
        started = time.perf_counter()
        out = str(folder / f"out-{kind}")
        status = extract.main(["--segments", table, "--out", out, *options, "--profile"])
        ours = len(segments) / (time.perf_counter() - started)
        assert status == 0
    network = build_network(arguments.architecture, 1000).eval() if weights else None
    torch.set_num_threads(processes)
    straightforward(segments[:1], folder, network)
    few = segments[: arguments.script_clips]
    theirs = len(few) / measure.seconds(lambda: straightforward(few, folder, network))
    make = functools.partial(stage_sides, table, arguments.architecture, weights)
    alone = measure.compare(make, arguments.rounds, processes)
    each = {stage.split()[0]: t / (4 if "four" in stage else 1) for stage, t in alone.items()}
    allowed = processes / sum(each.values())
    print(f"\n{kind}: {ours:.2f} clips/s, the straightforward script {theirs:.2f}: {ours / theirs:.2f} times as fast")
    for stage, t in each.items():
        print(f"  {stage} alone: {t:.3f} s a clip on each of {processes} cores")
    print(f"  together the stages allow {allowed:.2f} clips/s; extraction reaches {ours / allowed:.0%}")
    print(f"  peak memory {peak[0]:.1f} GB")
    return {
        "clips/s": ours, "script clips/s": theirs, "ratio": ours / theirs, "allowed clips/s": allowed,
        "share of allowed": ours / allowed, "peak memory, GB": peak[0],
    }  # fmt: skip


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--clips", type=int, default=32)
    p.add_argument("--script-clips", type=int, default=4, help="of these the script is timed on")
    p.add_argument("--seconds", type=int, default=10)
    p.add_argument("--architecture", default="resnet152")
    p.add_argument("--kinds", nargs="+", default=["pictures", "labels"], choices=["pictures", "labels"])
    arguments = p.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        render(folder, arguments.clips, arguments.seconds)
        weights = random_weights(folder / "weights.pth", arguments.architecture)
        for kind in arguments.kinds:
            given = weights if kind == "pictures" else None
            figures[kind] = one(folder, kind, given, arguments, os.cpu_count() or 1)
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
