"""A service's work without its scheduler: take a job from the store, separate it, say how it ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep import fetching, media
from avsep.factors import Factorize
from avsep.fetching import EgressIdentity, sources
from avsep.outputs import HEARD, clipped
from avsep.records import ClipError, Segment
from avsep.separation import Separator
from avsep.service import editing, window
from avsep.service.answers import Card
from avsep.service.config import ServiceConfig, log
from avsep.service.elsewhere import LabelBy, OtherNetwork, OutOfTime
from avsep.service.failures import as_failure
from avsep.service.hotmodel import HotModel, Load, card_of
from avsep.service.located import write_image
from avsep.service.results import UPLOAD, NoSuchJob, ResultStore
from avsep.service.state import Failure, FoundObject, Outcome, State
from avsep.service.uploads import download
from avsep.service.window import TRACKS, KeptWindow
from avsep.stages import Label
from avsep.videos import FileSeparation, VideoSeparator

STEP_S = 0.25  # between looks at the store
_SWEEP_S = 2.0
_BLIND = "the pictures were not looked at: this service has no picture network"
_LEAST_BYTE_RATE = 4000  # of media that don't say how long they are
_BESIDE_BYTES = 1 << 16  # of a result, beside its sounds, its bases and its first window


class JobWorker:
    """Do jobs, one at a time; whatever happens, the job's state says it.

    `load` reads the model, as `HotModel` takes it. `label` and `factorize` do those stages in other processes, for
    the model that a job is done with.
    """

    def __init__(
        self,
        config: ServiceConfig,
        label: LabelBy | None = None,
        factorize: Factorize | None = None,
        load: Load | None = None,
    ) -> None:
        self.config, self.store = config, config.store()
        self._label, self._factorize = label, factorize
        self.model = HotModel(config.model, config.weights, config.limits(), load=load)
        self._told: VideoSeparator | None = None
        self._one = threading.Lock()
        self._present()

    def __call__(self, job_id: str) -> None:
        """Separate a job's upload; returns when the job is done, has failed or is gone."""
        with self._one:
            try:
                self._work(job_id)
            except NoSuchJob:
                return
            except Exception as error:
                if not self._there(job_id):  # deleted, so files can't be opened
                    return
                failure = as_failure(error)
                if failure.reason == "internal":
                    log.exception("job %s", job_id)
                fail(self.store, job_id, failure)

    def _there(self, job_id: str) -> bool:
        try:
            return self.store.path(job_id).is_dir()
        except NoSuchJob:
            return False

    def _present(self) -> VideoSeparator:
        """Give the present model; that it has changed is told to the ingress."""
        separate = self.model()
        if separate is not self._told:
            self._told = separate
            with contextlib.suppress(OSError):  # a full disk
                self.store.tell_network(card_of(separate).labeller)
        return separate

    def _work(self, job_id: str) -> None:
        if self.store.job(job_id).is_finished:
            return  # another worker was thought dead, and was not
        job = self.store.update(job_id, status="running", started=time.time())
        folder = self.store.path(job_id)
        part = folder / f"{TRACKS}.{secrets.token_hex(4)}.part"  # what a worker that died left stays beside it
        separate = self._present()
        steps = _Steps(self.config, self.store, job, part, card_of(separate))
        if job.options.url:
            self._fetch(job.options.url, folder, lambda: steps("fetching", 0.0), steps.deadline)
            measure(self.config, self.store, job_id)
        try:
            done = self._separate(separate, job, part, steps, self._label)
        except OtherNetwork:  # while a model is replaced: this one's is here
            done = self._separate(separate, job, part, steps, None)
        kept = KeptWindow.of(done.plan, done.opening)
        if kept is not None:
            kept.write(folder)
        editable = editing.keep(done.plan, folder)
        has_image = write_image(folder, done.images, done.locations)
        try:
            part.rename(folder / TRACKS)
        except OSError:
            if self.store.job(job_id).is_finished:
                return
            _remove(folder, TRACKS)  # of a worker that died before it could say that it was done
            part.rename(folder / TRACKS)
        video = self._container_of(folder / UPLOAD)
        more = {"has_image": has_image, "explained": kept is not None, "editable": editable, "video": video}
        more["located"] = has_image and done.locations is not None
        result = outcome(job, separate, done).model_copy(update=more)
        self.store.sweep()  # while this one is in progress: others make room, or there is none
        _remove(folder, "*.part", "fetched")
        self.store.finish(job_id, "done", video is not None, stage="done", progress=1.0, result=result)

    def _container_of(self, upload: Path) -> str | None:
        """Say what can hold an upload's pictures, of which mixes make videos; None where it has none."""
        try:
            return media.video_container(upload, limits=self.config.limits().decode)
        except ClipError:
            return None

    def _separate(
        self, separate: VideoSeparator, job: State, part: Path, steps: _Steps, label: LabelBy | None
    ) -> FileSeparation:
        if self._factorize is not None and isinstance(separate.separator, Separator):
            separate = separate.elsewhere(_label_of(separate, label), self._factorize)
        given = None if job.options.objects is None else list(job.options.objects)
        # without parents, so that a deleted job's folder isn't made again
        return separate(
            part.parent / UPLOAD, part, given, job.options.bases, steps,
            mixture=True, parents=False, output=job.options.output,
        )  # fmt: skip

    def _fetch(self, url: str, folder: Path, step: Any, deadline: float) -> None:
        """Bring what a client named to the job's folder."""
        left = min(self.config.max_upload_s, deadline - time.time())
        target = folder / UPLOAD
        if sources.is_web(url):
            download(url, target, self.config.max_upload_bytes, left, step=step)
            return
        options = fetching.FetchOptions(
            attempts=1,
            timeout_s=left,
            max_bytes=self.config.max_upload_bytes,
            work_folder=str(folder),
            limits=replace(self.config.limits().decode, max_duration_s=self.config.max_duration_s),
        )
        segment = Segment("video", url, 0.0, None, "test")
        result = fetching.download(segment, str(folder / "fetched"), EgressIdentity("service"), options)
        os.replace(result.path, target)


class _Steps:
    """Tells a job's progress, stops what works on it at its deadline or when it is deleted, and keeps room for it."""

    def __init__(self, config: ServiceConfig, store: ResultStore, job: State, part: Path, card: Card) -> None:
        self._store, self._job_id, self._part, self._card = store, job.id, part, card
        self.deadline = (job.queued or job.created) + config.max_work_s
        self._mono = job.options.mono
        self._looked = self._swept = 0.0
        self._counted = False

    def __call__(self, stage: str, done: float) -> None:
        """Note the stage and how much is done in [0, 1]. Raises OutOfTime, NoSuchJob or StoreFull."""
        now = time.time()
        if now > self.deadline:
            raise OutOfTime
        if now - self._looked >= STEP_S:
            self._looked = now
            self._store.update(self._job_id, stage=stage, progress=round(done, 3))
        if now - self._swept >= _SWEEP_S:  # what is being written counts as it grows
            self._swept = now
            self._store.sweep()
        if stage == "separating" and not self._counted:  # now it is known how many sounds there are
            self._counted = True
            n_tracks = sum(not p.name.startswith(HEARD) for p in self._part.iterdir())
            reserve(self._store, self._job_id, n_tracks, self._card, self._mono)


def outcome(job: State, separate: VideoSeparator, done: FileSeparation) -> Outcome:
    """Say what a separation found, as far as it is no file's."""
    card, report = card_of(separate), done.report
    timings = {"queued_s": round((job.started or 0.0) - (job.queued or 0.0), 3), **report["timings"]}
    timings["total_s"] = round(time.time() - (job.queued or 0.0), 3)
    blind = _BLIND if report["labeller"] is None and len(done.images) else ""
    notes = (report["unlearned"], *done.notes, blind, clipped(done.loud, "flac", "mp3", "ogg"))
    return Outcome.model_validate(
        {
            **report,
            "objects": [
                FoundObject.model_validate({**o, "learned": o["name"] in card.learned}) for o in report["objects"]
            ],
            "note": "; ".join(filter(None, notes)),
            "timings": timings,
            "trained_on": card.trained_on,
            "model": {"recipe": card.recipe, **card.versions} if card.recipe else card.versions,
        }
    )


def _label_of(separate: VideoSeparator, label: LabelBy | None) -> Label | None:
    """Label with one model's own picture network; None where it has none."""
    own = separate.labeller
    if label is None or isinstance(own, str):
        return None

    def classify(images: NDArray[np.uint8]) -> Future:
        return label(images, separate.sees)

    return Label(own.looking(separate.config.extraction.looks), classify)


def measure(config: ServiceConfig, store: ResultStore, job_id: str) -> None:
    """Note an upload's length, sample rate and channels by its header, as far as that can be read."""
    upload = store.path(job_id) / UPLOAD
    with contextlib.suppress(ClipError):  # who does the job will say what is wrong
        header = media.probe(upload, timeout_s=config.decode_timeout_s)
        duration_s = header.duration_s or upload.stat().st_size / _LEAST_BYTE_RATE  # what it says may be too much
        duration_s = min(duration_s, config.max_duration_s)
        store.update(
            job_id, duration_s=duration_s, sample_rate=header.sample_rate or 48_000, channels=header.channels or 1
        )


def reserve(store: ResultStore, job_id: str, n_tracks: int, card: Card, mono: bool) -> None:
    """Keep room for an upload that was measured and for `n_tracks` sounds; StoreFull where there is none."""
    job = store.job(job_id)
    rate, channels = (card.sample_rate, 1) if mono else (job.sample_rate, job.channels)
    size = (store.path(job_id) / UPLOAD).stat().st_size
    sounds = 4 * round(rate * job.duration_s) * channels * n_tracks
    heard = (rate, channels) != (card.sample_rate, 1)  # the mono mix that is listened to is kept, too
    mono_mix = 4 * round(card.sample_rate * job.duration_s) * heard
    beside = 0
    if card.config is not None:
        beside = editing.most_bytes(card.config, job.duration_s, n_tracks)
        beside += window.most_bytes(card.config, job.duration_s, n_tracks)
    store.reserve(job_id, size + sounds + mono_mix + beside + _BESIDE_BYTES)


def fail(store: ResultStore, job_id: str, failure: Failure) -> None:
    """Keep a job's failure and nothing else of it; one that is done stays so."""
    if store.job(job_id).status == "done":
        return
    _remove(store.path(job_id), TRACKS, "*.part", "fetched")
    store.finish(job_id, "failed", error=failure)


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
