"""What is done to a segment, stage by stage: decode, factorise, label, record."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from avsep import looks, media, storage
from avsep.factors import CLIPS_IN_FLIGHT, ExtractionConfig, Factorize, Factors, factorize, factorize_clips, seed_of
from avsep.locating import Seen
from avsep.records import Clip, ClipError, ClipRecord, Reason, Rejection, Segment
from avsep.vision import ImageLabeller

_SILENCE_DB = -80.0  # RMS below this, full scale = 0, is no sound

Locate = Callable[[Segment], Segment]  # where a segment's media are: the same excerpt of another source


@dataclass(frozen=True)
class Label:
    """How clips get their picture evidence."""

    looking: looks.Looking
    classify: Callable[[NDArray[np.uint8]], Future]  # (n, size, size, 3) pictures → a future of `Seen`


@dataclass
class Decoded:
    """A segment's media in memory."""

    clip: Clip
    sha256: str  # of the media file


def decode(segment: Segment, config: ExtractionConfig, *, images: bool = True) -> Decoded:
    """Decode a segment's excerpt, its pictures where they are wanted; ClipError says why it can't be used."""
    try:
        with storage.local_file(segment.source) as path:
            clip = media.decode(
                path,
                segment.start_s,
                segment.end_s,
                sample_rate=config.stft.sample_rate,
                image_size=config.image_size,
                limits=config.limits,
                images=images,
            )
            with open(path, "rb") as f:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        raise ClipError(Reason.MISSING, f"{segment.source} doesn't exist") from None
    except ValueError as error:  # no such scheme
        raise ClipError(Reason.MISSING, str(error)) from None
    if len(clip.images) == 0 and segment.labels is None:
        raise ClipError(Reason.NO_VIDEO, _with("no picture, and the table gives no labels", clip))
    if len(clip.waveform) < config.stft.n_fft // 2:
        raise ClipError(Reason.TOO_SHORT, f"{len(clip.waveform)} samples; half a window is {config.stft.n_fft // 2}")
    if rms_db(clip.waveform) < _SILENCE_DB:
        level = f"RMS {rms_db(clip.waveform):.0f} dB, below {_SILENCE_DB:.0f} dB of full scale"
        raise ClipError(Reason.SILENT, _with(level, clip))
    return Decoded(clip, sha256)


def _with(detail: str, clip: Clip) -> str:
    return "; ".join((detail, *clip.notes))


def rms_db(waveform: NDArray[np.float32]) -> float:
    """Return the RMS level in dB, full scale = 0; −inf for silence."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.mean(np.square(waveform, dtype=np.float64))))


def middle_image(source: str, start_s: float, end_s: float | None) -> NDArray[np.uint8] | None:
    """Decode one picture, `(height, width, 3)`, to show beside a figure; None when there is none to be had."""
    try:
        with storage.local_file(source) as path:
            end_s = end_s if end_s is not None else media.probe(path).duration_s
            middle = start_s if end_s is None else max(start_s, (start_s + end_s) / 2 - 0.5)
            images = media.decode(path, middle, middle + 1, sound=False).images
    except (ClipError, FileNotFoundError, ValueError):
        return None
    return images[0] if len(images) else None


@dataclass
class DeviceStages:
    """The stages that gain from a GPU, together: whichever has work gets it, so neither waits for the other's share."""

    labeller: ImageLabeller | None
    device: str
    groups: Sequence[Sequence[int]] | None = None  # the L objects' ImageNet classes, to be found in pictures, too

    def label(self, images: NDArray[np.uint8]) -> Seen:
        """Label pictures, `(n, size, size, 3)`: logits `(n, 1000)`; with `groups`, the cells `(n, L, h, w)` of each."""
        assert self.labeller is not None
        return self.labeller.see(images, self.groups)

    def factorize(
        self, waveforms: Sequence[NDArray[np.float32]], seeds: Sequence[int], config: ExtractionConfig
    ) -> list[Factors]:
        """Factorise waveforms with their seeds."""
        return factorize_clips(waveforms, seeds, config, self.device)


def to_record(
    segment: Segment, decoded: Decoded, factors: Factors, logits: NDArray | None, sample_rate: int
) -> ClipRecord:
    """Put a segment's results together."""
    clip = decoded.clip
    scale = float(factors.H.max()) or 1.0
    with_images = logits is not None and len(logits) > 0
    return ClipRecord(
        segment_id=segment.segment_id,
        source=segment.source,
        start_s=segment.start_s,
        end_s=segment.end_s,
        split=segment.split,
        objects=segment.objects,
        labels=segment.labels,
        bases=factors.W.numpy().astype(np.float16),
        activations=(factors.H / scale).numpy().astype(np.float16),
        activation_scale=scale,
        basis_energy=factors.basis_energy.numpy(),
        image_logits=_as_float16(logits) if with_images and logits is not None else None,
        kl_divergence=factors.kl_divergence,
        duration_s=len(clip.waveform) / sample_rate,
        rms_db=rms_db(clip.waveform),
        media_sha256=decoded.sha256,
        label_source="given" if segment.labels is not None else "pictures" if with_images else "none",
    )


def same_media(record: ClipRecord, segment: Segment, locate: Locate | None = None) -> bool:
    """Tell whether a clip is what extraction would make of a segment, but for split, objects and labels.

    It is when the excerpt's times are the same, the media have the same bytes, and pictures were labelled
    where they are to decide.
    """
    if (record.start_s, record.end_s) != (segment.start_s, segment.end_s):
        return False
    if segment.labels is None and record.image_logits is None:
        return False
    try:
        with storage.local_file((locate(segment) if locate else segment).source) as path, open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == record.media_sha256
    except (ClipError, OSError, ValueError):
        return False


def relabelled(record: ClipRecord, segment: Segment) -> ClipRecord:
    """Return a clip with source, split, objects and labels as its segment has them now."""
    return replace(
        record,
        source=segment.source,
        split=segment.split,
        objects=segment.objects,
        labels=segment.labels,
        label_source="given" if segment.labels is not None else "pictures",
    )


def _as_float16(logits: NDArray) -> NDArray[np.float16]:
    """Convert logits, −inf among them; none becomes +inf, which would leave no probability."""
    with np.errstate(over="ignore"):
        return np.minimum(logits, np.finfo(np.float16).max).astype(np.float16)


def extract_record(segment: Segment, config: ExtractionConfig, label: Label | None) -> ClipRecord | Rejection:
    """Take one segment through every stage; a segment that can't be used comes back as a rejection."""
    records, rejections, _ = extract_records([segment], config, label)
    return (records or rejections)[0]


def extract_records(
    segments: Sequence[Segment],
    config: ExtractionConfig,
    label: Label | None,
    locate: Locate | None = None,
    factorize_elsewhere: Factorize | None = None,
) -> tuple[list[ClipRecord], list[Rejection], dict[str, float]]:
    """Take segments through every stage, labelling the pictures of several clips at a time.

    `locate` finds, or fetches, a segment's media; without it they are at the segment's source.
    The pictures of a few clips go to `label` together, and the clips are factorised while it
    works, here or by `factorize_elsewhere`. Returns records and rejections in the segments' order, and
    seconds by stage.
    """
    records: list[ClipRecord] = []
    rejections: list[Rejection] = []
    seconds = {"fetch": 0.0, "decode": 0.0, "factorize": 0.0, "label": 0.0}

    for group in _groups(segments, CLIPS_IN_FLIGHT):
        decoded: list[tuple[Segment, Decoded]] = []
        for segment in group:
            found, stage = segment, "fetch"
            try:
                if locate is not None:
                    with _timed(seconds, stage):
                        found = locate(segment)
                stage = "decode"
                with _timed(seconds, stage):
                    with_images = label is not None or segment.labels is None
                    decoded.append((segment, decode(found, config, images=with_images)))
            except ClipError as error:
                rejection = Rejection(segment.segment_id, stage, error.reason, error.transient, detail=error.detail)
                rejections.append(rejection)
        with _timed(seconds, "label"):  # at once where the network is in this process
            views = [label.looking(d.clip.images) for _, d in decoded] if label else []
            future = label.classify(looks.join(views)) if label and any(v.n_images for v in views) else None
        with _timed(seconds, "factorize"):
            waveforms, seeds = [d.clip.waveform for _, d in decoded], [seed_of(s.segment_id) for s, _ in decoded]
            if factorize_elsewhere is None:
                factors = [factorize(*x, config) for x in zip(waveforms, seeds, strict=True)]
            else:
                factors = factorize_elsewhere(waveforms, seeds, config).result() if waveforms else []
        with _timed(seconds, "label"):
            logits = [None] * len(decoded) if future is None else _split(future.result().logits, views)
        records += [
            to_record(s, d, f, x, config.stft.sample_rate)
            for (s, d), f, x in zip(decoded, factors, logits, strict=True)
        ]
    return records, rejections, seconds


def profile(seconds: Mapping[str, float], n_clips: int, n_workers: int, elapsed_s: float) -> list[str]:
    """Say where the workers' time went, a line each.

    A stage's rate is what the workers would reach if they did nothing else. Together the stages allow the rate of
    workers that are never idle. The run's own is given as a share of that.
    """
    used = {stage: s for stage, s in sorted(seconds.items(), key=lambda x: -x[1]) if s > 0}
    total = sum(used.values())
    if not used or not n_clips or elapsed_s <= 0:
        return []
    rates = {stage: n_clips * n_workers / s for stage, s in used.items()}
    lines = [f"{stage}: {s:.1f} s, {s / total:.0%}, alone {rates[stage]:.2f} clips/s" for stage, s in used.items()]
    rate, allowed = n_clips / elapsed_s, n_clips * n_workers / total
    slowest = next(iter(used))
    return [
        *lines,
        f"the run: {rate:.2f} clips/s on {n_workers} workers, {rate / rates[slowest]:.0%} of {slowest} alone, "
        f"{rate / allowed:.0%} of the {allowed:.2f} clips/s that the stages together allow",
    ]


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] += time.monotonic() - started


def _groups(items: Sequence[Segment], size: int) -> Iterable[Sequence[Segment]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _split(logits: NDArray, views: Sequence[looks.Views]) -> list[NDArray | None]:
    parts = np.split(np.asarray(logits), np.cumsum([len(v.owners) for v in views])[:-1])
    return [v.evidence(part).numpy() for v, part in zip(views, parts, strict=True)]
