"""A service's work without its scheduler: take a job from the store, separate it, say how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
import time
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image

from avsep import fetch, media, plots, storage
from avsep.egress import EgressIdentity
from avsep.model import CONFIG_FILE, LABELLER_FILE, MODEL_FILES, ModelConfig, training_facts
from avsep.objects import OBJECT_NAMES
from avsep.records import ClipError, Reason, Segment
from avsep.results import FINISHED, UPLOAD, NoSuchJob, ResultStore, StoreFull
from avsep.stft import STFT
from avsep.uploads import BadUpload, download
from avsep.videos import MIXTURE, FileLimits, FileSeparation, VideoSeparator
from avsep.vision import LabellerUnavailable

TRACKS = "tracks"  # a result's folder of WAVs
_WINDOW, _FRAME = "window.npz", "frame.png"
_STEP_S = 0.25  # between looks at the store
_SWEEP_S = 2.0
_SETTLED_S = 1.0  # a model whose files changed later than that may still be in the writing
_BLIND = "the pictures were not looked at: this service has no picture network"
_LEAST_BYTE_RATE = 4000  # of media that don't say how long they are
_BESIDE_BYTES = 1 << 16  # of a result, beside its sounds
_TOO_MUCH = (Reason.TOO_LONG, Reason.TOO_LARGE)
ENVIRONMENT = "AVSEP_SERVE_"
log = logging.getLogger("avsep.jobs")


@dataclass(frozen=True)
class ServiceConfig:
    """What a service runs, and what its clients may; `AVSEP_SERVE_TOKEN=…` and the like set it."""

    model: str
    results: str = ""  # folder; every process of the service sees it
    weights: str | None = None  # of the picture network, in place of the model's own or torchvision's
    examples: str | None = None  # folder of files that the page offers; None: rendered ones
    token: str | None = None  # clients must send it as `Authorization: Bearer …`
    host: str = "127.0.0.1"
    replicas: int = 0  # that separate; 0: one a core
    devices: int = -1  # processes, a GPU each, that label and factorise for those; -1: one a GPU that Ray has
    allow_urls: bool = False  # let clients name public URLs and YouTube ids
    max_upload_bytes: int = 256 << 20
    max_upload_s: float = 1800.0
    min_upload_rate: float = 10_000.0  # bytes a second; slower uploads are ended
    upload_grace_s: float = 10.0  # before that counts
    max_uploads: int = 64  # unfinished ones together
    max_uploads_per_client: int = (
        8  # of one address; behind a proxy of yours, which is all clients', as many as together
    )
    max_duration_s: float = 600.0  # of a file's sound
    max_pixels: int = 4096 * 2304
    decode_timeout_s: float = 60.0  # of one run of ffmpeg, or of its silence
    decode_bytes: int = 2 << 30  # ffmpeg's address space
    max_pending: int = 16  # waiting and running jobs, without uploads; from then on no upload is begun
    answer_within_s: float = 20.0  # then 202, unless a client prefers otherwise
    max_work_s: float = 900.0  # from the end of the upload to the result
    results_bytes: int = 20 << 30
    results_jobs: int = 1000
    results_ttl_s: float = 3600.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **values: Any) -> ServiceConfig:
        """Read the fields that the environment sets; ValueError names the variable that is wrong."""
        kinds = typing.get_type_hints(cls)
        known = {f"{ENVIRONMENT}{f.name.upper()}": f.name for f in fields(cls)}
        for variable, text in environment.items():
            if not variable.startswith(ENVIRONMENT):
                continue
            if variable not in known:
                raise ValueError(f"{variable} sets nothing; there are {', '.join(sorted(known))}")
            name = known[variable]
            kind = kinds[name]
            try:
                if kind is bool:
                    values[name] = {"1": True, "true": True, "0": False, "false": False}[text.lower()]
                else:
                    values[name] = kind(text) if kind in (int, float) else text
            except (KeyError, ValueError):
                raise ValueError(f"{variable}={text}: give {'0 or 1' if kind is bool else 'a number'}") from None
        if values.get("token") is not None:
            values["token"] = values["token"].strip()  # a secret's file ends with a line break
            if not values["token"]:
                raise ValueError(f"{ENVIRONMENT}TOKEN is empty; give what clients must send, or unset it to let all in")
        return cls(**values)

    def store(self) -> ResultStore:
        """Return the store of results; its folder is made where there is none."""
        os.makedirs(self.results, mode=0o700, exist_ok=True)
        stale_s = max(self.max_work_s, self.max_upload_s) + 600
        return ResultStore(Path(self.results), self.results_bytes, self.results_jobs, self.results_ttl_s, stale_s)

    def limits(self) -> FileLimits:
        """Return what a file may be."""
        decode = media.DecodeLimits(
            timeout_s=self.decode_timeout_s, max_pixels=self.max_pixels, max_memory_bytes=self.decode_bytes
        )
        return FileLimits(self.max_duration_s, decode)


class OutOfTime(Exception):
    """A job took longer than a service's jobs may."""


class HotModel:
    """A loaded model that follows its directory: replaced there, the next call gets the new one.

    A new model that can't be loaded changes nothing but `problem`.
    """

    def __init__(self, directory: str, weights: str | None, limits: FileLimits, device: str = "cpu") -> None:
        self._arguments = (directory, weights, limits, device)
        self.problem = ""
        self._stamp = model_stamp(directory)
        self._loaded = self._load()

    def _load(self) -> VideoSeparator:
        loaded = VideoSeparator.load(*self._arguments)
        _ = loaded.labeller  # now, and not in the first client's time
        return loaded

    def __call__(self) -> VideoSeparator:
        """Give the present model."""
        stamp = model_stamp(self._arguments[0])
        if stamp != self._stamp and _settled(stamp):
            try:
                loaded = self._load()
            except (LabellerUnavailable, OSError, ValueError) as error:
                self.problem = str(error)
                log.warning("the model in use stays: %s", error)
            else:
                self.problem = ""
                self._loaded = loaded
            self._stamp = stamp
        return self._loaded


Stamp = tuple[tuple[str, int, int, int], ...]


def model_stamp(directory: str) -> Stamp:
    """Tell one state of a local model directory from another; of a URI it is always the same."""
    stamps = []
    if not storage.is_uri(directory):
        for name in MODEL_FILES:
            try:
                stat = os.stat(os.path.join(directory, name))
            except OSError:
                continue
            stamps.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(stamps)


def _settled(stamp: Stamp) -> bool:
    names = {name for name, *_ in stamp}
    return CONFIG_FILE in names and time.time() - max(mtime for _, mtime, *_ in stamp) / 1e9 > _SETTLED_S


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
        _write_window(folder, done)
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
        options = fetch.FetchOptions(
            attempts=1,
            timeout_s=left,
            max_bytes=self.config.max_upload_bytes,
            work_folder=str(folder),
            limits=replace(self.config.limits().decode, max_duration_s=self.config.max_duration_s),
        )
        segment = Segment("video", url, 0.0, None, "test")
        result = fetch.download(segment, str(folder / "fetched"), EgressIdentity("service"), options)
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


def _write_window(folder: Path, done: FileSeparation) -> None:
    """Keep the first window's bases, for the relation map and for listening to each."""
    plan = done.plan
    window = plan.first_window.first(plan.separator.model.config.n_bases)
    indices = [i for i, name in zip(plan.indices, plan.objects, strict=True) if name not in plan.silent]
    n_samples = plan.n_samples if plan.n_samples <= plan.length + plan.length // 2 else plan.length
    stft = plan.separator.stft
    np.savez(
        folder / _WINDOW,
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
        picture.save(folder / _FRAME, compress_level=1)


def _window(folder: Path) -> dict[str, NDArray]:
    with np.load(folder / _WINDOW) as arrays:
        return dict(arrays)


def frame_path(folder: Path) -> Path:
    """Where a job's picture is, if it has one."""
    return folder / _FRAME


def relation(folder: Path) -> dict[str, Any]:
    """Say how the first window's bases relate to the objects, the loudest basis first.

    `posteriors` `(L + 1, M)` is each basis's softmax over the objects and, last, noise; `shares`
    `(J + 1, M)` is what became of it: how much went to each audible object and, last, to the rest.
    """
    w = _window(folder)
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
    w = _window(folder)
    picture = np.asarray(Image.open(frame_path(folder))) if frame_path(folder).exists() else None
    return plots.relation_map(w["relation"], OBJECT_NAMES, w["energy"], picture, w["names"].tolist())


@torch.inference_mode()
def basis_sound(folder: Path, basis: int) -> tuple[NDArray[np.float32], int]:
    """Filter one basis alone out of the first window, `(S,)`, and give the sample rate.

    All of them add up to the mixture. Raises IndexError for a basis that there isn't.
    """
    w = _window(folder)
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


def check_model(config: ServiceConfig) -> None:
    """Load what a service will; ValueError, OSError or LabellerUnavailable say what can't be used."""
    separate = VideoSeparator.load(config.model, config.weights)
    if config.weights is not None or storage.exists(storage.join(config.model, LABELLER_FILE)):
        _ = separate.labeller


def trained_on(config: ModelConfig) -> dict[str, Any]:
    """Say what a model learned from, as far as it says so itself."""
    return {name: fact for name, fact in training_facts(config).items() if name != "recipe" and fact is not None}


def learned(config: ModelConfig) -> list[str]:
    """List the objects that clips of the model's training had: of others it can't tell the sound."""
    counts = config.training.get("clips_by_label")
    return [name for name in config.objects if counts is None or counts.get(name)]


def model_card(directory: str) -> dict[str, Any]:
    """Describe a model directory without loading its weights."""
    config = ModelConfig.read(directory)
    return {
        "recipe": config.recipe,
        "objects": list(config.objects),
        "learned": learned(config),
        "trained_on": trained_on(config),
        "sample_rate": config.stft.sample_rate,
        "n_fft": config.stft.n_fft,
        "hop_length": config.stft.hop_length,
        "n_bases": config.n_bases,
        "bases": config.separation.bases,
        "dictionary": storage.exists(storage.join(directory, "dictionary.safetensors")),
        "labeller": config.labeller.architecture,
        "window_s": config.separation.window_s,
        "versions": config.versions,
    }
