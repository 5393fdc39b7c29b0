"""A service's work without its scheduler: take a job from the store, separate it, say how it ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile

from avsep import fetching, media, storage
from avsep.fetching import EgressIdentity
from avsep.model import ModelConfig
from avsep.records import ClipError, Reason, Segment
from avsep.service.config import ServiceConfig, log
from avsep.service.hotmodel import HotModel, learned, trained_on
from avsep.service.results import FINISHED, UPLOAD, NoSuchJob, ResultStore, StoreFull
from avsep.service.uploads import BadUpload, download
from avsep.service.window import TRACKS, write_window

_STEP_S = 0.25  # between looks at the store
_SWEEP_S = 2.0
_BLIND = "the pictures were not looked at: this service has no picture network"
_LEAST_BYTE_RATE = 4000  # of media that don't say how long they are
_BESIDE_BYTES = 1 << 16  # of a result, beside its sounds
_TOO_MUCH = (Reason.TOO_LONG, Reason.TOO_LARGE)


class OutOfTime(Exception):
    """A job took longer than a service's jobs may."""


class JobWorker:
    """Do jobs, one at a time; whatever happens, the job's state says it.

    `elsewhere` does stages in other processes, as `VideoSeparator` takes it.
    """

    def __init__(self, config: ServiceConfig, elsewhere: Callable[..., Future] | None = None) -> None:
        self.config, self.store = config, config.store()
        self._elsewhere = elsewhere
        self.model = HotModel(config.model, config.weights, config.limits())
        self._one = threading.Lock()

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
                if failure["reason"] == "internal":
                    log.exception("job %s", job_id)
                fail(self.store, job_id, failure)

    def _there(self, job_id: str) -> bool:
        try:
            return self.store.path(job_id).is_dir()
        except NoSuchJob:
            return False

    def _work(self, job_id: str) -> None:
        if self.store.job(job_id)["status"] in FINISHED:
            return  # another worker was thought dead, and was not
        job = self.store.update(job_id, status="running", started=time.time())
        folder, options = self.store.path(job_id), job["options"]
        deadline = job["queued"] + self.config.max_work_s
        looked = swept = 0.0
        part = folder / f"{TRACKS}.{secrets.token_hex(4)}.part"  # what a worker that died left stays beside it
        counted = False

        def step(stage: str, done: float) -> None:
            nonlocal looked, swept, counted
            now = time.time()
            if now > deadline:
                raise OutOfTime
            if now - looked >= _STEP_S:
                looked = now
                self.store.update(job_id, stage=stage, progress=round(done, 3))
            if now - swept >= _SWEEP_S:  # what is being written counts as it grows
                swept = now
                self.store.sweep()
            if stage == "separating" and not counted:  # now it is known how many sounds there are
                counted = True
                reserve(self.config, self.store, job_id, len(list(part.iterdir())))

        if options.get("url"):
            self._fetch(options["url"], folder, lambda: step("fetching", 0.0), deadline)
            measure(self.config, self.store, job_id)
        separate = self.model()
        given = (options.get("objects"), options.get("bases"))
        # without parents, so that a deleted job's folder isn't made again
        done = separate(folder / UPLOAD, part, *given, step, mixture=True, elsewhere=self._elsewhere, parents=False)
        write_window(folder, done)
        try:
            part.rename(folder / TRACKS)
        except OSError:
            if self.store.job(job_id)["status"] in FINISHED:
                return
            _remove(folder, TRACKS)  # of a worker that died before it could say that it was done
            part.rename(folder / TRACKS)
        ended = time.time()
        timings = {"queued_s": round(job["started"] - job["queued"], 3), **done.report["timings"]}
        timings["total_s"] = round(ended - job["queued"], 3)
        model = {"recipe": separate.separator.model.config.recipe, **separate.separator.model.config.versions}
        blind = _BLIND if done.report["labeller"] is None and len(done.pictures) else ""
        note = "; ".join(filter(None, (done.report.pop("unlearned"), *done.notes, blind)))
        known = learned(separate.separator.model.config)
        result = {
            **done.report,
            "objects": [{**o, "learned": o["name"] in known} for o in done.report["objects"]],
            "note": note,
            "timings": timings,
            "trained_on": trained_on(separate.separator.model.config),
            "model": model,
            "has_frame": bool(len(done.pictures)),
        }
        self.store.sweep()  # while this one is in progress: others make room, or there is none
        _remove(folder, f"{TRACKS}.*.part", "fetched")
        self.store.finish(job_id, "done", stage="done", progress=1.0, result=result)

    def _fetch(self, url: str, folder: Path, step: Any, deadline: float) -> None:
        """Bring what a client named to the job's folder."""
        left = min(self.config.max_upload_s, deadline - time.time())
        target = folder / UPLOAD
        if not url.startswith("youtube:"):
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


def measure(config: ServiceConfig, store: ResultStore, job_id: str) -> None:
    """Note how long an upload's sound is by its header, as far as that can be read."""
    upload = store.path(job_id) / UPLOAD
    with contextlib.suppress(ClipError):  # who does the job will say what is wrong
        promised_s = media.probe(upload, timeout_s=config.decode_timeout_s).duration_s  # it may be too much
        duration_s = promised_s or upload.stat().st_size / _LEAST_BYTE_RATE
        store.update(job_id, duration_s=min(duration_s, config.max_duration_s))


def reserve(config: ServiceConfig, store: ResultStore, job_id: str, n_tracks: int) -> None:
    """Keep room for an upload that was measured and for `n_tracks` sounds; StoreFull where there is none."""
    n_samples = round(ModelConfig.read(config.model).stft.sample_rate * store.job(job_id).get("duration_s", 0.0))
    size = (store.path(job_id) / UPLOAD).stat().st_size
    store.reserve(job_id, size + 4 * n_samples * n_tracks + _BESIDE_BYTES)


def fail(store: ResultStore, job_id: str, failure: dict[str, Any]) -> None:
    """Keep a job's failure and nothing else of it; one that is done stays so."""
    if store.job(job_id)["status"] == "done":
        return
    _remove(store.path(job_id), TRACKS, f"{TRACKS}.*.part", "fetched")
    store.finish(job_id, "failed", error=failure)


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


_PLAIN = {  # with the decoder's own words, where they help
    Reason.EMPTY: "the file has nothing in it that can be heard",
    Reason.UNREADABLE: "this can't be read as a video or sound: it is damaged, protected, or another kind of file; "
    "what can be read is MP4, MOV, MKV, WebM, AVI, MP3, M4A, WAV, FLAC, OGG and most others",
    Reason.NO_AUDIO: "the file has no sound; there is nothing to separate",
    Reason.TRUNCATED: "the file is incomplete: it {}; copy or download it again",
    Reason.TOO_SHORT: "the sound is too short to separate: {}",
    Reason.TOO_LONG: "the sound is too long: {}, the most that this service takes; send a part of it, "
    "or use the command 'avsep separate', which takes any length",
    Reason.TOO_LARGE: "the pictures or streams are too large: {}; send a smaller version, or the sound alone",
    Reason.TIMEOUT: "it took too long to decode the file; convert it to MP4 or WAV first",
    Reason.CRASHED_DECODER: "the decoder gives up on this file; convert it to MP4 or WAV first",
}


def as_failure(error: BaseException) -> dict[str, Any]:
    """Say what an exception means to a client: `status` of HTTP, `reason` to branch on, `detail` to read."""
    if isinstance(error, ClipError):
        if error.transient and error.reason != Reason.TIMEOUT:
            return {"status": 503, "reason": str(error.reason), "detail": "the work was disturbed; try again"}
        status = 413 if error.reason in _TOO_MUCH else 422
        plain = _PLAIN.get(error.reason, "{}").format(error.detail)
        cause = {} if error.detail in plain else {"cause": error.detail}
        return {"status": status, "reason": str(error.reason), "detail": plain, **cause}
    if isinstance(error, BadUpload):
        return {"status": error.status, "reason": "upload", "detail": error.detail}
    if isinstance(error, OutOfTime):
        return {"status": 503, "reason": "out_of_time", "detail": "the work took longer than this service allows"}
    if isinstance(error, StoreFull) or (isinstance(error, OSError) and error.errno in storage.FULL):
        return {"status": 507, "reason": "storage_full", "detail": "there is no room for results; try again later"}
    if isinstance(error, soundfile.LibsndfileError):  # it forgets errno: a short write
        return {"status": 507, "reason": "storage_full", "detail": "the result can't be written; try again later"}
    if isinstance(error, ValueError):
        log.warning("unusable: %s", error)
        return {"status": 422, "reason": "unusable", "detail": "this can't be separated"}
    return {"status": 500, "reason": "internal", "detail": "the service failed; its log says why"}
