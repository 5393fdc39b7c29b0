"""A set as MUSIC is one, from its table and people's copies of its videos to the results, with its own vocabulary."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avsep import datasets, media, shards
from avsep.audioset import hash_percent
from avsep.model import Model
from avsep.records import read_vocabulary
from avsep.synthetic import performance
from pipelines import collect, evaluate, extract, manifest, train

RATE = 48_000
PLAYED = ("acoustic_guitar", "flute", "violin")
LENGTH_S = 16  # an excerpt from 10 s to the end, and five beyond it
N_VIDEOS = {"train": 30, "val": 3, "test": 4}


def ids_of(split: str, n: int) -> list[str]:
    """Ids as YouTube's that are in a split, all with a dash in front."""
    low, high = {"val": (0, 4), "train": (4, 90), "test": (90, 100)}[split]
    named = (f"-{split:_<5}{i:05}" for i in range(5000))
    return [video for video in named if low <= hash_percent(video) < high][:n]


def render(folder: Path) -> Path:
    """MUSIC's solos and duets as files of 16 s named by their ids: one with pictures, the others sound alone."""
    videos: dict[str, list[str]] = {}
    (folder / "media").mkdir(parents=True)
    for split, n in N_VIDEOS.items():
        for number, video in enumerate(ids_of(split, n)):
            rng = np.random.default_rng(number + 1000 * n)
            names = [PLAYED[(number + i) % 3] for i in range(2 if number == 29 else 1)]
            path = folder / "media" / f"{video}.flac"
            soundfile.write(path, sum(0.4 * performance(name, rng, LENGTH_S) for name in names), RATE)
            if number == 29:
                picture = ["-f", "lavfi", "-i", f"color=c=gray:s=64x64:r=2:d={LENGTH_S}", "-preset", "ultrafast"]
                command = [media.ffmpeg_executable(), "-nostdin", "-v", "error", "-i", str(path), *picture]
                subprocess.run([*command, "-threads", "1", str(path.with_suffix(".mp4"))], check=True, timeout=120)
                path.unlink()
            videos.setdefault(" ".join(names), []).append(video)
    for kind in ("solo", "duet"):
        some = {label: v for label, v in videos.items() if (" " in label) == (kind == "duet")}
        (folder / f"MUSIC_{kind}_videos.json").write_text(json.dumps({"version": 1.0, "videos": some}, indent=4))
    return folder


@pytest.mark.slow
def test_music_goes_all_the_way_with_its_own_instruments(tmp_path: Path) -> None:
    folder = render(tmp_path / "music")
    out = {name: str(tmp_path / name) for name in ("manifest", "clips", "train", "results")}
    tables = [str(folder / f"MUSIC_{kind}_videos.json") for kind in ("solo", "duet")]
    assert manifest.main(["--music", *tables, "--out", out["manifest"]]) == 0
    own = datasets.vocabulary("music_11")
    assert read_vocabulary(out["manifest"]) == own

    given = ["--segments", out["manifest"], "--media", str(folder / "media"), "--out", out["clips"]]
    assert extract.main([*given, "--in-process"]) == 0
    state = shards.read_state(out["clips"])
    n = sum(N_VIDEOS.values())
    assert len(state.clip_ids) == n and all(i.endswith("_10000") for i in state.clip_ids)
    assert Counter(r.reason for r in state.rejections.values()) == {"past_end": 5 * n}

    assert train.main(["--clips", out["clips"], "--out", out["train"], "--epochs", "6", "--in-process"]) == 0
    model = str(tmp_path / "train" / "model")
    assert Model.load(model).config.objects == own.names
    assert collect.main(["--model", model, "--clips", out["clips"], "--in-process"]) == 0
    command = ["--model", model, "--segments", out["manifest"], "--media", str(folder / "media"), "--in-process"]
    assert evaluate.main([*command, "--out", out["results"], "--protocol", "pairs"]) == 0
    said = json.loads((tmp_path / "results" / "results.json").read_text())
    sdr = {name: entry["mean"]["sdr"] for name, entry in said["separators"].items()}
    assert sdr["mixture"] + 3 < sdr["default"] < sdr["ideal_mask"]
    assert len(said["clips"]) == 5 and set(said["separators"]["default"]["by_object"]) == set(PLAYED)
