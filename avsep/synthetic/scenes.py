"""Clips with known sources, pictures and bases, for tests, the demo and the docs; all of it generated.

Six objects play: their sounds are synthesised by mechanism (plucked, bowed, blown, struck,
barked, fired), their pictures drawn with Pillow. Each clip has its own players, room and look,
drawn from the stream of its (seed, split, number), so no timbre occurs in two clips.
"""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg
import numpy as np
import soundfile
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from avsep import storage
from avsep.records import SPLITS, Segment, names_cell
from avsep.synthetic.drawings import DRAWERS, compose, draw_scenery, draw_sprite
from avsep.synthetic.sounds import OBJECTS, OFFSCREEN, Sound, performance, rms, shaped_noise

_STEP = 2.0**-23  # of 24-bit samples: float32 adds multiples of it below 1 without rounding


# ------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class SceneConfig:
    """What clips are like. Shares are of clips; levels are drawn uniformly from (lowest, highest)."""

    objects: tuple[str, ...] = OBJECTS
    n_objects_shares: tuple[float, ...] = (0.25, 0.55, 0.20)  # with one, two, three audible objects
    silent_share: float = 0.10  # another object is shown that makes no sound
    hidden_share: float = 0.05  # one of the audible objects is never shown
    offscreen_share: float = 0.12  # one of OFFSCREEN sounds
    empty_shot_share: float = 0.30  # a second of the video shows the scene without objects
    object_level_db: tuple[float, float] = (-3.0, 3.0)
    offscreen_level_db: tuple[float, float] = (-12.0, -5.0)  # relative to the objects' mean level
    noise_level_db: tuple[float, float] = (-50.0, -35.0)  # relative to the mix
    mix_level_db: tuple[float, float] = (-24.0, -14.0)  # RMS, full scale = 0, less where peaks forbid it
    seconds: int = 10
    sample_rate: int = 48_000
    images_per_s: int = 5
    size: tuple[int, int] = (320, 240)  # pixels, width and height, both even


@dataclass(frozen=True)
class Shot:
    """A part of the video between two cuts: one object close up, several at once, or none."""

    start_s: int
    end_s: int
    objects: tuple[str, ...]


@dataclass(frozen=True)
class ScenePlan:
    """Everything about a clip that is decided before anything is rendered."""

    segment_id: str
    number: int
    split: str
    seed: int
    audible: tuple[str, ...]
    visible: tuple[str, ...]
    offscreen: str | None
    shots: tuple[Shot, ...]
    config: SceneConfig


@dataclass(frozen=True)
class Scene:
    """A rendered clip. `mix` is exactly the sum of the sources and `rest`, in any order of adding."""

    plan: ScenePlan
    mix: Sound  # (S,)
    sources: dict[str, Sound]  # what each audible object contributed, (S,) each
    rest: Sound  # (S,), off-screen sound and noise


def plan_scene(
    number: int, split: str, seed: int, config: SceneConfig | None = None, n_objects: int | None = None
) -> ScenePlan:
    """Decide what is heard and shown in clip `number` of a split; cheap, nothing is rendered.

    `n_objects` fixes the number of audible objects. Every visible object is close up for at
    least two whole seconds. Raises ValueError for an unknown split or object, or when the
    numbers of objects and seconds don't allow it.
    """
    config = config or SceneConfig()
    if unknown := set(config.objects) - set(DRAWERS):
        raise ValueError(f"{sorted(unknown)} can't be rendered; {', '.join(DRAWERS)} can")
    rng = _stream(number, split, seed, "plan", n_objects)
    audible_count = n_objects or 1 + int(rng.choice(len(config.n_objects_shares), p=config.n_objects_shares))
    if not 1 <= audible_count <= len(config.objects):
        raise ValueError(f"n_objects is {audible_count}; it must lie in 1…{len(config.objects)}")
    shuffled = [config.objects[i] for i in rng.permutation(len(config.objects))]
    audible, others = shuffled[:audible_count], shuffled[audible_count:]
    visible = audible[rng.random() < config.hidden_share :] + others[: rng.random() < config.silent_share]
    if 2 * len(visible) > config.seconds:
        raise ValueError(f"{config.seconds} s are too short to show {len(visible)} objects for two seconds each")
    offscreen = str(rng.choice(OFFSCREEN)) if rng.random() < config.offscreen_share else None
    return ScenePlan(
        segment_id=f"synthetic-{split}-{seed}-{n_objects or 'x'}-{number:05d}",
        number=number,
        split=split,
        seed=seed,
        audible=tuple(sorted(audible)),
        visible=tuple(sorted(visible)),
        offscreen=offscreen,
        shots=_plan_shots(visible, config, rng),
        config=config,
    )


def _plan_shots(visible: Sequence[str], config: SceneConfig, rng: Generator) -> tuple[Shot, ...]:
    """Cut the clip at whole seconds: two-second close-ups first, what is left as it comes."""
    contents: list[tuple[tuple[str, ...], int]] = [((name,), 2) for name in visible]
    free = config.seconds - 2 * len(visible)
    if free and (not visible or rng.random() < config.empty_shot_share):
        contents.append(((), 1))
        free -= 1
    while free:
        length = min(free, int(rng.integers(1, 4)))
        names = [visible[i] for i in rng.permutation(len(visible))]
        wide = len(names) > 1 and rng.random() < 0.6
        contents.append((tuple(names if wide else names[:1]), length))
        free -= length
    shots, start = [], 0
    for i in rng.permutation(len(contents)):
        names, length = contents[i]
        shots.append(Shot(start, start + length, tuple(names)))
        start += length
    return tuple(shots)


def render_scene(
    number: int, split: str, seed: int, config: SceneConfig | None = None, n_objects: int | None = None
) -> Scene:
    """Play clip `number` of a split; all of it follows from the arguments. See `plan_scene`."""
    plan = plan_scene(number, split, seed, config, n_objects)
    config = plan.config
    rng = _stream(number, split, seed, "levels", n_objects)

    def play(name: str, level_db: tuple[float, float]) -> Sound:
        stream = _stream(number, split, seed, f"sound of {name}", n_objects)
        gain = np.float32(10 ** (rng.uniform(*level_db) / 20))
        return gain * performance(name, stream, config.seconds, config.sample_rate)

    parts = {name: play(name, config.object_level_db) for name in plan.audible}
    n_samples = config.seconds * config.sample_rate
    rest = np.zeros(n_samples, np.float32)
    if plan.offscreen is not None:
        rest += play(plan.offscreen, config.offscreen_level_db)
    noise = shaped_noise(rng, n_samples, 300, config.sample_rate)
    level = 10 ** (rng.uniform(*config.noise_level_db) / 20)
    rest += np.float32(level * rms(np.sum(list(parts.values()), 0))) * noise
    parts["_rest"] = rest
    together = np.stack(list(parts.values()))
    gain = 10 ** (rng.uniform(*config.mix_level_db) / 20) / rms(together.sum(0))
    gain = min(gain, 0.99 / float(np.abs(together).sum(0).max()))
    # On the grid of 24-bit samples, and any partial sum below full scale: adding is exact, FLAC keeps it.
    grid = (np.round(together.astype(np.float64) * (gain / _STEP)) * _STEP).astype(np.float32)
    sources = dict(zip(parts, grid, strict=True))
    rest = sources.pop("_rest")
    return Scene(plan, grid.sum(0), sources, rest)


def images(plan: ScenePlan) -> NDArray[np.uint8]:
    """Draw a clip's video, `(n_images, height, width, 3)`: cuts between shots, slow pans and zooms.

    One scenery and one look of each object run through the clip.
    """
    config, (width, height) = plan.config, plan.config.size
    rng = _stream(plan.number, plan.split, plan.seed, "pictures", plan.segment_id)
    larger = (int(1.2 * width), int(1.2 * height))
    scenery = draw_scenery(rng, larger)
    sprites = {name: draw_sprite(name, rng) for name in plan.visible}
    video = np.empty((config.seconds * config.images_per_s, height, width, 3), np.uint8)
    for shot in plan.shots:
        image = compose(scenery, [sprites[name] for name in shot.objects], rng)
        views = []  # left, top and width of what the camera sees first and last
        for _ in range(2):
            seen = rng.uniform(0.84, 1) * larger[0]
            left, top = rng.random(2) * (larger[0] - seen) * (1, height / width)
            views.append((left, top, seen))
        first, last = shot.start_s * config.images_per_s, shot.end_s * config.images_per_s
        for i, a in zip(range(first, last), np.linspace(0, 1, last - first), strict=True):
            left, top, seen = (1 - a) * np.array(views[0]) + a * np.array(views[1])
            view = (left, top, left + seen, min(top + seen * height / width, larger[1]))
            video[i] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=view))
    return video


def _stream(number: int, split: str, seed: int, purpose: str, variant: int | str | None = None) -> Generator:
    """Open the random stream of one purpose in one clip; no two are alike."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if number < 0 or seed < 0:
        raise ValueError(f"number and seed are {number} and {seed}; they count from 0")
    text = f"{purpose}/{variant}".encode()
    return np.random.default_rng([seed, SPLITS.index(split), number, *text])


# -------------------------------------------------------------------------------------- files


def write_scene(scene: Scene, folder: str | Path) -> Segment:
    """Write a clip and its references under a folder, and return its row for a table there.

    `clips/ID.mp4` is H.264 and AAC at 256 kbit/s, `references/ID/OBJECT.flac` and `_rest.flac` are
    24-bit mono: their sum is the mix before AAC, sample for sample. `objects` are the audible
    ones; `labels` None leaves the labels to the pictures.
    Raises RuntimeError with ffmpeg's words when it fails.
    """
    folder, plan = Path(folder), scene.plan
    clip = folder / "clips" / f"{plan.segment_id}.mp4"
    references = folder / "references" / plan.segment_id
    clip.parent.mkdir(parents=True, exist_ok=True)
    references.mkdir(parents=True, exist_ok=True)
    for name, sound in {**scene.sources, "_rest": scene.rest}.items():
        _write_flac(references / f"{name}.flac", sound, plan.config.sample_rate)
    video = images(plan)
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        soundfile.write(wav, scene.mix, plan.config.sample_rate, format="WAV", subtype="FLOAT")
        wav.flush()
        size, rate = "{}x{}".format(*plan.config.size), plan.config.images_per_s
        drawn = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=size, r=rate)
        output = ffmpeg.output(
            drawn,
            ffmpeg.input(wav.name),
            str(clip),
            **{"c:v": "libx264", "preset": "superfast", "pix_fmt": "yuv420p"},
            **{"c:a": "aac", "b:a": "256k", "aac_coder": "fast"},  # its noise is some 30 dB down
            **{"threads": 1, "loglevel": "error"},
        )
        executable = shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
        try:
            output.overwrite_output().run(executable, input=video.tobytes(), quiet=True)
        except ffmpeg.Error as error:
            raise RuntimeError(f"ffmpeg could not write {clip}: {error.stderr.decode(errors='replace')}") from None
    return Segment(plan.segment_id, f"clips/{clip.name}", 0.0, float(plan.config.seconds), plan.split, plan.audible)


def _write_flac(path: Path, sound: Sound, sample_rate: int) -> None:
    whole = np.round(sound.astype(np.float64) / _STEP).astype(np.int32)
    soundfile.write(path, whole << 8, sample_rate, subtype="PCM_24")  # libsndfile takes the upper 24 bits


def write_table(segments: Iterable[Segment], path_csv: str | Path) -> None:
    """Write the CSV table that `avsep.records.read_segments` reads, without labels."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["segment_id", "source", "start_s", "end_s", "split", "objects"])
    for s in segments:
        rows.writerow([s.segment_id, s.source, s.start_s, s.end_s, s.split, names_cell(s.objects)])
    storage.write_text(str(path_csv), text.getvalue())
