"""A small picture network, trained on drawn pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from avsep.vision import ImageLabeller, build_network, preprocessing_of


def train_small_labeller(
    images: NDArray[np.uint8],
    targets: Sequence[int],
    classes: Sequence[int],
    *,
    architecture: str = "shufflenet_v2_x0_5",
    epochs: int = 6,
    batch_size: int = 32,
    seed: int = 0,
) -> ImageLabeller:
    """Train a classifier from scratch on single-object pictures, for data without ImageNet weights.

    It is shown the middle of each picture, then and later.

    Args:
        images: `(n, height, width, 3)` uint8.
        targets: for each picture, its position in `classes`.
        classes: the ImageNet index of each output.
    """
    torch.manual_seed(seed)
    network = build_network(architecture, len(classes)).train()
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    shown, labels = preprocessing_of(architecture)(torch.as_tensor(images)), torch.as_tensor(targets)
    for _ in range(epochs):
        for rows in torch.randperm(len(shown)).split(batch_size):
            if len(rows) < 2:  # batch norm needs two
                schedule.step()
                continue
            batch = shown[rows]
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            loss = nn.functional.cross_entropy(network(batch), labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return ImageLabeller(architecture, network.eval(), "", tuple(classes), way="centre")
