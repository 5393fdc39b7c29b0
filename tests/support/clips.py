"""Clip shards with planted bases, which a network can tell apart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsep import shards
from avsep.factors import DataConfig, ExtractionConfig
from avsep.objects import AUDIOSET_23, N_IMAGENET_CLASSES, Vocabulary
from avsep.records import ClipRecord
from avsep.stft import STFT
from avsep.synthetic import planted_bases

SMALL = STFT(sample_rate=8000, n_fft=94, hop_length=47)  # F = 48, as the planted bases have
N_BASES, N_OBJECTS = 6, 4
VOCABULARY = Vocabulary(tuple(list(AUDIOSET_23)[:N_OBJECTS]))
MADE_WITH = DataConfig(ExtractionConfig(stft=SMALL, n_bases=N_BASES, looks="centre"), VOCABULARY, "resnet152", "0" * 64)
SPLITS = ("train", "train", "val", "train", "test")


def records(n_clips: int) -> list[ClipRecord]:
    """Planted bases; every third clip has pictures in place of given labels, every seventh nothing, and all differ."""
    p = planted_bases(n_clips, n_bins=SMALL.n_bins, n_bases=N_BASES)
    made = []
    for i in range(n_clips):
        names = tuple(VOCABULARY.names[j] for j in p.labels[i].nonzero()[:, 0].tolist())
        logits = np.full((2, N_IMAGENET_CLASSES), -20, np.float16)
        for name in names:
            logits[:, VOCABULARY.imagenet_classes("everyday")[VOCABULARY.index(name)][0]] = 20
        seen, unknown = i % 3 == 2, i % 7 == 6
        H = p.H[i].numpy()[:, : 20 + i % 4]
        energy = (p.W[i].numpy() ** 2).sum(0) * (H**2).sum(1)
        made.append(
            ClipRecord(
                f"c{i:03d}", "no/such.mp4", 0.0, None, SPLITS[i % 5], None, None if seen or unknown else names,
                p.W[i].numpy().astype(np.float16), (H / H.max()).astype(np.float16), float(H.max()),
                (energy / energy.sum()).astype(np.float32), logits if seen and not unknown else None, 0.1,
                (H.shape[1] - 1) * SMALL.hop_length / SMALL.sample_rate, -20.0, "", "given",
            )
        )  # fmt: skip
    return made


def write(folder: Path, made: Sequence[ClipRecord], a_shard: int = 40, config: DataConfig = MADE_WITH) -> Path:
    for number, first in enumerate(range(0, len(made), a_shard)):
        some = made[first : first + a_shard]
        options = {"configuration": config.as_dict(), "shape": (SMALL.n_bins, N_BASES)}
        shards.write_shard(str(folder), f"{number:05d}-{len(made)}", 0, some, [], **options)
    return folder
