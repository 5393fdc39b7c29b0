"""Correct a finished job by hand: its sounds rendered again from the bases that were kept with it."""

from __future__ import annotations

import functools
import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from avsep import stems, storage
from avsep.edits import Edits
from avsep.model import ModelConfig
from avsep.outputs import HEARD, MIXTURE, Output, Shape, write_sounds
from avsep.separation import Assigned, EditedPlan, Plan, Planned
from avsep.service.results import ResultStore
from avsep.service.state import First, FoundObject, Heard, Outcome, State
from avsep.service.window import TRACKS, KeptWindow

MOST_BYTES = 1 << 20  # of edits as JSON
_BASES = "bases.zip"
_EDITED = "edited"  # folders of sounds rendered again: the present one, and the one before, which may be being read
_BLOCK = 1 << 20  # samples
_WINDOW_HEADS = 2048  # bytes of kept bases beside the numbers: of each window, of all, of each of a model's objects
_ABOUT_BYTES, _OBJECT_BYTES = 4096, 256
_SLACK_S = 0.1  # by which a sound may be longer than its header says
_HELD_BYTES = 8 << 20  # of kept bases, which take four times as much in memory
_BESIDE_BYTES = 1 << 20  # of edited sounds: the relation map's window


def keep(plan: Planned, folder: Path) -> bool:
    """Keep a plan's bases in a job's folder, to be edited; False where they can't be."""
    if not isinstance(plan, Plan) or not plan.is_editable:
        return False
    with storage.aside(folder / _BASES) as part:  # a worker that was thought dead may write it again while it is read
        plan.assigned.write(part)
    return True


def most_bytes(config: ModelConfig, duration_s: float, n_objects: int) -> int:
    """Return how many bytes `keep` writes at most, of a sound that lasts so long and has so many objects."""
    stft, how = config.stft, config.separation
    n_samples = math.ceil(stft.sample_rate * (duration_s + _SLACK_S))
    length = max(int(how.window_s * stft.sample_rate), stft.n_fft)
    overlap = min(int(how.overlap_s * stft.sample_rate), length // 2)
    n_windows = 1 + max(0, math.ceil((n_samples - 1.5 * length) / (length - overlap)))  # as `windows.cut` has them
    parts = n_objects + 1 if how.second_look else 0
    n_bases = config.extraction.n_bases * (how.n_factorizations + parts)
    n_frames = (n_samples + n_windows * (overlap + 2 * stft.hop_length)) // stft.hop_length
    halves = n_windows * (stft.n_bins + len(config.objects)) + n_frames  # rows of W, relation and H
    arrays = n_bases * (2 * halves + 4 * (n_objects + 1) * n_windows)
    return arrays + n_windows * _WINDOW_HEADS + _ABOUT_BYTES + _OBJECT_BYTES * len(config.objects)


def sounds_of(folder: Path, result: Outcome) -> Path:
    """Return the folder of a job's sounds as they are now; the mixture's is always the first, `TRACKS`."""
    return folder / (result.edited or TRACKS)


def edit(store: ResultStore, job_id: str, edits: Edits, find: Callable[[str], str]) -> State:
    """Make edits on what a finished job's separation decided, in place of earlier ones, and return its new state.

    `find` gives the names of objects that people type. No edits bring back the first sounds. Raises ValueError for
    edits that can't be of this job, StoreFull where there is no room, NoSuchJob where it is gone.
    """
    folder, job = store.path(job_id), store.job(job_id)
    assert job.result is not None
    assigned = _assigned(folder / _BASES)
    edits = edits.named(lambda name: name if name in assigned.known else find(name))
    plan = assigned.edited(edits)
    if (one := job.options.two_stems) and one not in plan.objects:
        raise ValueError(f"the edits take {one} away, which 'two_stems' asks for; leave that out")
    name = ""
    if edits:
        names = job.options.output.names(plan.objects)
        mixture = (folder / TRACKS / f"{MIXTURE}.wav").stat()
        store.make_room(job_id, mixture.st_size * len(names) + _BESIDE_BYTES)
        name = f"{_EDITED}.{secrets.token_hex(4)}"
        part = folder / f"{name}.part"
        try:
            _render(plan, job.options.output, folder, part)
            part.rename(folder / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    state = store.update(job_id, result=outcome(job.result, plan).model_copy(update={"edited": name}))
    for other in folder.glob(f"{_EDITED}.*"):
        if other.name not in (name, job.result.edited):
            shutil.rmtree(other, ignore_errors=True)
    return state


@functools.lru_cache(maxsize=4)  # who edits a sound does so often, and one at a time
def _assigned(bases: Path) -> Assigned:
    """Read a job's bases, the same whenever they are written; those that aren't many stay in memory."""
    assigned = Assigned.read(bases)
    return assigned.held() if bases.stat().st_size <= _HELD_BYTES else assigned


def _render(plan: EditedPlan, output: Output, folder: Path, part: Path) -> None:
    """Write the sounds in the channels and at the rate of the mixture."""
    tracks = folder / TRACKS
    heard = tracks / f"{HEARD}.wav"
    mixture = soundfile.info(tracks / f"{MIXTURE}.wav")
    shape = Shape(mixture.samplerate, mixture.channels, duration_s=mixture.frames / mixture.samplerate)
    if heard.exists():
        rendered = plan.render(block[0] for block in _blocks(heard))
        channels, resolution = _blocks(tracks / f"{MIXTURE}.wav"), plan.assigned.how.mask_stft
        parts = stems.carry_over(rendered, channels, mixture.samplerate, resolution)
    else:
        parts = (e[:, None] for e in plan.render(block[0] for block in _blocks(tracks / f"{MIXTURE}.wav")))
    write_sounds(plan.objects, parts, part, shape, output, parents=False)  # a deleted job's folder isn't made again
    KeptWindow.read(folder).changed(plan.audible, plan.first_shares.numpy()).write(part)


def _blocks(file: Path) -> Iterator[NDArray[np.float32]]:
    """Read a sound from its start, `(C, S)` at a time."""
    with soundfile.SoundFile(file) as sound:
        for block in sound.blocks(_BLOCK // sound.channels, dtype="float32", always_2d=True):
            yield block.T


def outcome(before: Outcome, plan: EditedPlan) -> Outcome:
    """Say what a separation found, as edits have it; of no edits, what it found itself."""
    first = before.first or First(objects=before.objects, heard=before.heard, windows=before.windows)
    if not plan.edits:
        return before.model_copy(update={**dict(first), "first": None, "edited": "", "edits": None})
    known, counts = {o.name: o for o in first.objects}, before.trained_on.get("clips_by_label")
    objects = []
    for name in plan.objects:
        new = {"name": name, "from": "given", "confidence": plan.confidence[name], "silent": False}
        new["familiarity"] = plan.familiarity.get(name)
        new["learned"] = counts is None or bool(counts.get(name))
        heard = {"sound_score": plan.sound_scores[name], "silent": name in plan.silent}
        objects.append((known.get(name) or FoundObject.model_validate(new)).model_copy(update=heard))
    rate, names = plan.assigned.how.stft.sample_rate, plan.assigned.known
    windows = [
        Heard(start_s=start / rate, end_s=end / rate, heard=_loud(dict(zip(names, scores.tolist(), strict=True)), 0.05))
        for start, end, scores in plan.window_scores
    ]
    found = First(objects=tuple(objects), heard=_loud(plan.sound_scores, 0.01), windows=tuple(windows))
    return before.model_copy(update={**dict(found), "first": first, "edits": plan.edits.as_dict()})


def _loud(shares: dict[str, float], least: float) -> dict[str, float]:
    return {n: s for n, s in sorted(shares.items(), key=lambda x: -x[1]) if s >= least}
