"""One batch shared by several workers of torch.distributed, with the outcome that a single worker has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn


def place() -> tuple[int, int]:
    """Return this worker's number and how many there are; (0, 1) without torch.distributed."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def share_out(sizes: Sequence[int]) -> list[int]:
    """Return the worker of each item, so that all get about as much: the largest go first, to who has least."""
    loads = [0] * place()[1]
    workers = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        workers[item] = loads.index(min(loads))
        loads[workers[item]] += sizes[item]
    return workers


def gather(value: Any) -> list[Any]:
    """Return every worker's value, in their order; all must call it."""
    values = [value] * place()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor) -> Tensor:
    """Sum over the workers, in place."""
    if place()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def add_up_gradients(model: nn.Module) -> None:
    """Sum each parameter's gradient over the workers: that of losses which are each divided by the whole batch."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            add_up(parameter.grad)


def noise_of_part(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what draws `torch.randn_like` for a whole batch and gives a worker's rows, where boolean `rows` is true.

    All workers must have the same random state, and stay so.
    """

    def draw(like: Tensor) -> Tensor:
        return torch.randn(len(rows), *like.shape[1:], dtype=like.dtype, device=like.device)[rows.to(like.device)]

    return draw


class _Sum(torch.autograd.Function):
    """The sum over the workers; so is its gradient."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return add_up(tensor.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return add_up(gradient.clone())


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all workers; `torch.nn.SyncBatchNorm` needs GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(n, C)`; n may differ from worker to worker, and be zero."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        x = input.float()  # sums over many rows: under autocast it comes in bfloat16
        count = add_up(torch.tensor(float(len(x)), device=x.device))
        mean = _Sum.apply(x.sum(0)) / count
        centred = x - mean
        variance = _Sum.apply(centred.square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked = self.num_batches_tracked + 1 if self.num_batches_tracked is not None else None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp_min(1)), self.momentum)
        normal = centred * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normal.to(input.dtype)


def share_batch_norm(model: nn.Module) -> None:
    """Make a model's batch norms look at the rows of all workers, where there are several."""
    if place()[1] > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.__class__ = SharedBatchNorm
