"""The service's configuration."""

from __future__ import annotations

import logging
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from avsep import media, storage
from avsep.service.results import ResultStore
from avsep.videos import FileLimits

ENVIRONMENT = "AVSEP_SERVE_"
log = logging.getLogger("avsep.service")


_LEAST = {  # of settings that may be zero, or less
    "replicas": 0, "devices": -1, "upload_grace_s": 0, "min_upload_rate": 0, "answer_within_s": 0,
}  # fmt: skip


class UnusableSettings(Exception):
    """A service can't start so: one line that names the value, the rule and the remedy."""


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
        variables = {f.name: f"{ENVIRONMENT}{f.name.upper()}" for f in fields(cls)}
        known = {variable: name for name, variable in variables.items()}
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
        for name, value in values.items():
            least = _LEAST.get(name)
            if kinds[name] in (int, float) and not (value > 0 if least is None else value >= least):  # nor NaN
                rule = "more than 0" if least is None else f"{least:.0f} or more"
                raise ValueError(f"{variables[name]}={value}: give {rule}")
        if values.get("token") is not None:
            values["token"] = values["token"].strip()  # a secret's file ends with a line break
            if not values["token"]:
                raise ValueError(f"{ENVIRONMENT}TOKEN is empty; give what clients must send, or unset it to let all in")
        if (folder := values.get("examples")) and not os.path.isdir(folder):
            raise ValueError(f"{ENVIRONMENT}EXAMPLES={folder}: there is no such folder")
        if folder := values.get("results"):
            if storage.is_uri(folder):
                raise ValueError(f"{ENVIRONMENT}RESULTS={folder}: give a folder that all its processes see, not a URI")
            if wrong := storage.unwritable(folder):
                raise ValueError(f"{ENVIRONMENT}RESULTS: {wrong}")
        return cls(**values)

    @property
    def n_replicas(self) -> int:
        """How many processes are to separate."""
        return self.replicas or max(1, len(os.sched_getaffinity(0)))

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
