"""Figures, as PNG bytes: loss curves, relation maps, spectrograms."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from avsep.stft import STFT

Box = tuple[float, float, float, float]
_BOX_COLOURS = ("#5cc4b7", "#e59a5f", "#98a3f0", "#dd8bbd", "#b3c45a", "#7fc0e3")
_FRAME_WIDTH, _FRAME_DPI = 480, 100  # pixels at least, so that names can be read


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def loss_curves(rows: Sequence[dict[str, float]]) -> bytes:
    """Draw train and validation loss, and the validation figures, by epoch; a line parts two passes."""
    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(rows) + 1)
    starts = [e - 0.5 for e, a, b in zip(epochs[1:], rows, rows[1:], strict=False) if a.get("pass") != b.get("pass")]
    for axes, keys in (
        (left, {"train_loss": "training", "val_loss": "validation"}),
        (right, {"val_map": "mAP of clip scores", "val_agreement": "basis–label agreement"}),
    ):
        for key, label in keys.items():
            if any(key in r for r in rows):
                axes.plot(epochs, [r.get(key, np.nan) for r in rows], label=label, marker=".")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        for start in starts:
            axes.axvline(start, color="0.6", linewidth=1)
    left.set_ylabel("loss")
    right.set_ylim(0, 1.02)
    return _png(figure)


def relation_map(
    relation: NDArray,
    objects: Sequence[str],
    basis_energy: NDArray,
    image: NDArray[np.uint8] | None = None,
    highlighted: Sequence[str] = (),
    owners: Sequence[int] | None = None,
    marks: Mapping[str, Box] | None = None,
) -> bytes:
    """Draw objects × bases, the loudest basis first, beside a picture of the clip.

    Args:
        relation: `(L, M)` scores, drawn as each basis's softmax over the objects and noise.
        objects: the L names. `highlighted` ones are set in bold.
        basis_energy: `(M,)`.
        image: `(height, width, 3)` uint8, or None.
        owners: each basis's true object, `(M,)` rows of the map (L for none), ringed; None when unknown.
        marks: boxes to draw into the picture, as `located` takes them.
    """
    scores = np.concatenate([relation, np.zeros_like(relation[:1])])
    scores = np.exp(scores - scores.max(0))
    order = np.argsort(-basis_energy, kind="stable")
    scores = (scores / scores.sum(0))[:, order]
    figure = Figure((8.5 if image is not None else 5.5, 4.6), layout="constrained")
    if image is not None:
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.6))
        left = figure.add_subplot(grid[0])
        _draw_marked(left, image, marks or {})
        axes = figure.add_subplot(grid[1])
    else:
        axes = figure.subplots()
    drawn = axes.imshow(scores, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    if owners is not None:
        axes.plot(np.asarray(owners)[order], "o", color="none", markeredgecolor="cyan", markersize=5)
    axes.set_yticks(range(len(objects) + 1), [*objects, "noise"], fontsize=7)
    for label in axes.get_yticklabels():
        if label.get_text() in highlighted:
            label.set_fontweight("bold")
    axes.set_xlabel("NMF bases, loudest first")
    figure.colorbar(drawn, ax=axes, label="p(object | basis)")
    return _png(figure)


def located(image: NDArray[np.uint8], marks: Mapping[str, Box]) -> bytes:
    """Draw a picture, `(height, width, 3)`, with a box around each object and its name.

    `marks` are boxes by name: left, top, right and bottom, as fractions of the picture's width and height.
    """
    height, width = image.shape[:2]
    inches = max(width, _FRAME_WIDTH) / _FRAME_DPI
    figure = Figure((inches, inches * height / width), dpi=_FRAME_DPI)
    _draw_marked(figure.add_axes((0, 0, 1, 1)), image, marks, size=13)
    return _png(figure)


def _draw_marked(axes: Axes, image: NDArray[np.uint8], marks: Mapping[str, Box], size: float = 8) -> None:
    """Draw a picture, and boxes in colours of their own; names stand inside their boxes, one below the other."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_axis_off()
    corners: list[tuple[float, float]] = []
    for i, (name, (left, top, right, bottom)) in enumerate(marks.items()):
        colour = _BOX_COLOURS[i % len(_BOX_COLOURS)]
        x, y = left * width, top * height
        for edge, line in (("black", 3.5), (colour, 2.0)):  # seen on any ground
            box = Rectangle((x, y), (right - left) * width, (bottom - top) * height, fill=False, ec=edge, lw=line)
            axes.add_patch(box)
        side, shift = ("left", 4) if left < 1 - right else ("right", -4)  # away from the nearer edge
        x = x if side == "left" else right * width
        y += 0.09 * height * sum(abs(x - a) < 0.2 * width and abs(y - b) < 0.09 * height for a, b in corners)
        corners.append((x, y))
        shown = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        axes.annotate(
            name.replace("_", " "), (x, y), (shift, -4), textcoords="offset points", ha=side, va="top",
            color="black", fontsize=size, bbox=shown,
        )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(height, 0))


def reliability(curves: dict[str, Sequence[dict[str, float]]]) -> bytes:
    """Draw how often it is so against the score, by the bins of `metrics.calibration`; a marker's area is its count."""
    figure = Figure((4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for label, bins in curves.items():
        (line,) = axes.plot([b["score"] for b in bins], [b["share"] for b in bins], label=label)
        sizes = [10 + 3 * b["count"] ** 0.5 for b in bins]
        axes.scatter([b["score"] for b in bins], [b["share"] for b in bins], sizes, color=line.get_color())
    axes.set(xlabel="score", ylabel="share audible", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False)
    return _png(figure)


def overview(
    image: NDArray[np.uint8], sounds: Sequence[tuple[str, NDArray[np.float32]]], stft: STFT, top_hz: float = 8000.0
) -> bytes:
    """Draw the whole job in one figure: a picture, the mixture, and each separated sound, `(name, (S,))`."""
    figure = Figure((2.6 * (len(sounds) + 1), 2.5), layout="constrained")
    panels = figure.subplots(1, len(sounds) + 1)
    panels[0].imshow(image)
    panels[0].set_axis_off()
    panels[0].set_title("video", fontsize=9)
    levels = [_level(waveform, stft) for _, waveform in sounds]
    for axes, (name, waveform), level in zip(panels[1:], sounds, levels, strict=True):
        _draw_level(axes, level, len(waveform) / stft.sample_rate, stft.sample_rate, levels[0].max(), top_hz)
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
    return _png(figure)


def _level(waveform: NDArray[np.float32], stft: STFT) -> NDArray[np.float32]:
    """Return the spectrogram in dB, `(F, N)`."""
    samples = torch.from_numpy(np.ascontiguousarray(waveform, np.float32))
    return 20 * np.log10(stft(samples).abs().numpy() + 1e-6)


def _draw_level(axes: Axes, level: NDArray, seconds: float, sample_rate: int, peak: float, top_hz: float) -> None:
    """Draw a spectrogram 70 dB deep."""
    axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=max(peak, -40) - 70,
        vmax=max(peak, -40),
        extent=(0, seconds, 0, sample_rate / 2 / 1000),
    )
    axes.set_ylim(0, top_hz / 1000)
    axes.set_xlabel("s")


def spectrogram(
    waveform: NDArray[np.float32],
    stft: STFT,
    title: str = "",
    top_hz: float = 8000.0,
    *,
    beside: NDArray[np.float32] | None = None,
) -> bytes:
    """Draw a waveform's level over time and frequency, 70 dB deep, `(S,)`: from its own peak, or `beside`'s."""
    level = _level(waveform, stft)
    peak = level.max() if beside is None else _level(beside, stft).max()
    figure = Figure((4.2, 2.4), layout="constrained")
    axes = figure.subplots()
    _draw_level(axes, level, len(waveform) / stft.sample_rate, stft.sample_rate, peak, top_hz)
    axes.set_ylabel("kHz")
    if title:
        axes.set_title(title, fontsize=9)
    return _png(figure)


def histograms(panels: Sequence[tuple[str, Sequence[float | None], Sequence[int]]]) -> bytes:
    """Draw distributions side by side: axis label, bin edges (the last may be None, without end), counts."""
    figure = Figure((4.5 * len(panels), 3), layout="constrained")
    for axes, (label, edges, counts) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        filled = np.flatnonzero(counts)
        if len(filled):  # what is filled, with a bin on either side
            first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
            width = float(edges[1] or 0) - float(edges[0] or 0)
            axes.bar([float(e or 0) for e in edges[first:last]], counts[first:last], width, align="edge")
        if filled.size and filled[-1] == len(counts) - 1 and edges[-1] is None:
            axes.set_title(f"the last bar: {edges[-2]:g} and more", fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("clips")
        axes.grid(alpha=0.3, axis="y")
        axes.yaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def cooccurrence(together: NDArray, names: Sequence[str]) -> bytes:
    """Draw how often labels occur together as shares of rows, from `(L, L)` counts, a label's own on the diagonal."""
    figure = Figure((0.32 * len(names) + 3, 0.3 * len(names) + 2.2), layout="constrained")
    axes = figure.subplots()
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no labels", ha="center")
        return _png(figure)
    share = together / np.maximum(np.diag(together)[:, None], 1)
    np.fill_diagonal(share, np.nan)
    image = axes.imshow(
        share, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.05, float(np.nanmax(share, initial=0)))
    )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    counts = np.diag(together).astype(int)
    axes.set_yticks(range(len(names)), [f"{n} ({c:,})" for n, c in zip(names, counts, strict=True)], fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the row's clips", shrink=0.8)
    return _png(figure)
