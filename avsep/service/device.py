"""The stages that a GPU does for several workers: requests in batches, an answer or an exception for each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avsep.factors import ExtractionConfig, Factors, factorize_clips
from avsep.locating import Seen
from avsep.service.config import ServiceConfig, log
from avsep.service.elsewhere import OtherNetwork
from avsep.service.hotmodel import HotModel

# What `elsewhere.LabelBy` and `factors.Factorize` are given.
ToLabel = tuple[NDArray[np.uint8], str]
ToFactorize = tuple[Sequence[NDArray[np.float32]], Sequence[int], ExtractionConfig]


class Device:
    """Labels and factorises on a GPU, or on the CPU where torch finds none, with the model that is in use."""

    def __init__(self, config: ServiceConfig) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            log.warning("torch finds no GPU: its work is done on the CPU")
        self._model = HotModel(config.model, config.weights, config.limits(), self._device)

    def check(self) -> None:
        """Raise RuntimeError where an error of the GPU's spoils all that follows."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def label(self, requests: Sequence[ToLabel]) -> list[Seen | Exception]:
        """Classify each request's pictures and say where objects are; OtherNetwork for those of another model's."""
        model = self._model()
        labeller, own = model.labeller, model.sees
        mine = [images for images, sees in requests if sees == own]
        if not mine or isinstance(labeller, str):
            return [OtherNetwork() for _ in requests]
        seen = labeller.see(np.concatenate(mine), model.labels.groups)
        sizes = [len(p) for p in mine]
        cells = [None] * len(mine) if seen.cells is None else seen.cells.split(sizes)
        parts = map(Seen, seen.logits.split(sizes), cells)
        return [next(parts) if sees == own else OtherNetwork() for _, sees in requests]

    def factorize(self, requests: Sequence[ToFactorize]) -> list[list[Factors]]:
        """Factorise each request's waveforms, those of one configuration together."""
        found: dict[int, list[Factors]] = {}
        for extraction in {c for _, _, c in requests}:  # windows, and their parts in a second look
            rows = [i for i, r in enumerate(requests) if r[2] == extraction]
            waveforms = [w for i in rows for w in requests[i][0]]
            seeds = [seed for i in rows for seed in requests[i][1]]
            factors = iter(factorize_clips(waveforms, seeds, extraction, self._device))
            found |= {i: [next(factors) for _ in requests[i][1]] for i in rows}
        return [found[i] for i in range(len(requests))]


class Together:
    """Takes requests one by one and does them in batches: what comes during one batch is the next."""

    def __init__(self, function: Callable[[list], list], most: int = 16) -> None:
        self._function, self._most = function, most
        self.sizes: Counter[int] = Counter()  # of how many requests the batches were
        self._waiting: list[tuple[Any, asyncio.Future]] = []
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, *request: Any) -> Any:
        """Do one request, with others; an exception is returned."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            batch = [(request, answer) for request, answer in batch if not answer.done()]  # not cancelled
            if not batch:
                continue
            self.sizes[len(batch)] += 1
            results = await asyncio.to_thread(each, self._function, [request for request, _ in batch])
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)


def each(function: Callable[[list], list], requests: list) -> list:
    """Do requests together; where that fails each by itself, so that one bad request doesn't fail the others."""
    try:
        return function(requests)
    except Exception as error:
        return [error] if len(requests) == 1 else [each(function, [r])[0] for r in requests]
