"""What is kept of a separation's first window: relation map, basis sounds, frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image

from avsep import plots
from avsep.objects import OBJECT_NAMES
from avsep.stft import STFT
from avsep.videos import MIXTURE, FileSeparation

TRACKS = "tracks"  # a result's folder of WAVs
WINDOW_FILE, FRAME_FILE = "window.npz", "frame.png"


def write_window(folder: Path, done: FileSeparation) -> None:
    """Keep the first window's bases, for the relation map and for listening to each."""
    plan = done.plan
    window = plan.first_window.first(plan.separator.extraction.n_bases)
    indices = [i for i, name in zip(plan.indices, plan.objects, strict=True) if name not in plan.silent]
    n_samples = plan.n_samples if plan.n_samples <= plan.length + plan.length // 2 else plan.length
    stft = plan.separator.stft
    np.savez(
        folder / WINDOW_FILE,
        W=window.factors.W.numpy(),
        H=window.factors.H.numpy(),
        energy=window.factors.basis_energy.numpy(),
        relation=window.relation.numpy(),
        shares=plan.separator.shares(window, indices, plan.least(window, indices)).numpy(),
        names=np.array([plan.separator.model.config.objects[i] for i in indices], dtype=str),
        n_samples=n_samples,
        stft=np.array([stft.sample_rate, stft.n_fft, stft.hop_length]),
    )
    if len(done.pictures):
        picture = Image.fromarray(done.pictures[len(done.pictures) // 2])
        picture.save(folder / FRAME_FILE, compress_level=1)


def read_window(folder: Path) -> dict[str, NDArray]:
    """Read what `write_window` kept."""
    with np.load(folder / WINDOW_FILE) as arrays:
        return dict(arrays)


def frame_path(folder: Path) -> Path:
    """Where a job's picture is, if it has one."""
    return folder / FRAME_FILE


def relation(folder: Path) -> dict[str, Any]:
    """Say how the first window's bases relate to the objects, the loudest basis first.

    `posteriors` `(L + 1, M)` is each basis's softmax over the objects and, last, noise; `shares`
    `(J + 1, M)` is what became of it: how much went to each audible object and, last, to the rest.
    """
    w = read_window(folder)
    order = np.argsort(-w["energy"], kind="stable")
    scores = np.concatenate([w["relation"], np.zeros_like(w["relation"][:1])])
    scores = np.exp(scores - scores.max(0))
    return {
        "objects": [*OBJECT_NAMES[: len(scores) - 1], "noise"],
        "posteriors": np.round((scores / scores.sum(0))[:, order], 4).tolist(),
        "audible": [*w["names"].tolist(), "_rest"],
        "shares": np.round(w["shares"][:, order], 4).tolist(),
        "basis": order.tolist(),
        "energy": np.round(w["energy"][order], 5).tolist(),
        "start_s": 0.0,
        "duration_s": int(w["n_samples"]) / int(w["stft"][0]),
    }


def relation_png(folder: Path) -> bytes:
    """Draw the relation map beside the picture."""
    w = read_window(folder)
    picture = np.asarray(Image.open(frame_path(folder))) if frame_path(folder).exists() else None
    return plots.relation_map(w["relation"], OBJECT_NAMES, w["energy"], picture, w["names"].tolist())


@torch.inference_mode()
def basis_sound(folder: Path, basis: int) -> tuple[NDArray[np.float32], int]:
    """Filter one basis alone out of the first window, `(S,)`, and give the sample rate.

    All of them add up to the mixture. Raises IndexError for a basis that there isn't.
    """
    w = read_window(folder)
    if not 0 <= basis < w["W"].shape[1]:
        raise IndexError(basis)
    stft = STFT(*w["stft"].tolist())
    n_samples = int(w["n_samples"])
    mixture, _ = soundfile.read(folder / TRACKS / f"{MIXTURE}.wav", n_samples, dtype="float32")
    waveform = torch.from_numpy(np.pad(mixture, (0, max(0, stft.n_fft - n_samples))))
    V = torch.from_numpy(w["W"] @ w["H"])
    part = torch.from_numpy(np.outer(w["W"][:, basis], w["H"][basis]))
    mask = torch.where(V > 0, part / V.clamp_min(1e-30), 1.0 / w["W"].shape[1])
    sound = stft.inverse(mask * stft(waveform), len(waveform))
    return sound.numpy()[:n_samples], stft.sample_rate
