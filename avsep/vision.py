"""The picture network: images to ImageNet logits."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from avsep.objects import N_IMAGENET_CLASSES

# Published thresholds belong to this network and these weights.
DEFAULT_ARCHITECTURE = "resnet152"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LabellerUnavailable(Exception):
    """The labeller's weights can't be had; the message says what to do."""


@dataclass
class ImageLabeller:
    """Turn pictures into logits over ImageNet's 1000 classes.

    `classes` gives the ImageNet index of each output of `network`; None means it has all 1000.
    The others get −inf, so that a small or fine-tuned network fits wherever a full one does.
    """

    architecture: str
    network: nn.Module
    sha256: str
    classes: tuple[int, ...] | None = None
    device: str = "cpu"

    @classmethod
    def load(
        cls, architecture: str = DEFAULT_ARCHITECTURE, weights: str | Path | None = None, device: str = "cpu"
    ) -> ImageLabeller:
        """Load any torchvision classifier by name.

        Args:
            architecture: a name that `torchvision.models.get_model` knows.
            weights: a local file. `.safetensors` as `save` writes it names its own architecture
                and classes; a `.pth` state dict whose name ends in 8 or more hex digits, as
                torchvision's do, is checked against them. None takes torchvision's ImageNet
                weights (V1), from its cache or the internet.

        Raises:
            LabellerUnavailable: no internet and no cached copy, no such file, a file that is
                damaged or doesn't fit.
        """
        if weights is None:
            return cls._load_published(architecture, device)
        path = Path(weights)
        if not path.is_file():
            raise LabellerUnavailable(f"--weights {path}: no such file; give a .pth or .safetensors file")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = re.search(r"-([0-9a-f]{8,64})$", path.stem)
        if expected and not sha256.startswith(expected[1]):
            raise LabellerUnavailable(
                f"--weights {path}: its SHA-256 starts with {sha256[:8]}, its name says {expected[1]}; "
                "download the file again"
            )
        classes: tuple[int, ...] | None = None
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as f:
                    metadata = f.metadata() or {}
                architecture = metadata.get("architecture", architecture)
                classes = tuple(json.loads(metadata["classes"])) if "classes" in metadata else None
                state = safetensors.torch.load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            network = build_network(architecture, len(classes) if classes else N_IMAGENET_CLASSES)
            network.load_state_dict(state)
        except Exception as error:
            reason = str(error).split("\n")[0] if isinstance(error, RuntimeError) else "it is no weights file"
            raise LabellerUnavailable(f"--weights {path} doesn't fit {architecture}: {reason}") from None
        return cls(architecture, network.eval().to(device), sha256, classes, device)

    @classmethod
    def _load_published(cls, architecture: str, device: str) -> ImageLabeller:
        published = published_weights(architecture)
        cached = Path(torch.hub.get_dir(), "checkpoints", published.url.rsplit("/", 1)[-1])
        try:
            if not cached.exists():
                with socket.create_connection((urllib.parse.urlsplit(published.url).hostname or "", 443), timeout=10):
                    pass  # else a firewall would let the download hang
            state = published.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise LabellerUnavailable(
                f"the ImageNet weights of {architecture} can't be downloaded ({error}); "
                f"fetch {published.url} elsewhere and pass --weights FILE"
            ) from None
        network = build_network(architecture, N_IMAGENET_CLASSES)
        network.load_state_dict(state)
        sha256 = hashlib.sha256(cached.read_bytes()).hexdigest()
        return cls(architecture, network.eval().to(device), sha256, None, device)

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor, batch_size: int = 40) -> Tensor:
        """Classify RGB pictures, `(n, height, width, 3)` uint8 → `(n, 1000)` float32 logits."""
        pixels = torch.as_tensor(images)
        outputs = []
        for batch in pixels.split(batch_size):
            logits = self.network(normalise(batch.to(self.device)))
            outputs.append(logits.float().cpu())
        if not outputs:
            return torch.empty(0, N_IMAGENET_CLASSES)
        logits = torch.cat(outputs)
        if self.classes is None:
            return logits
        full = torch.full((len(logits), N_IMAGENET_CLASSES), -torch.inf)
        full[:, list(self.classes)] = logits
        return full

    def save(self, path: str | Path) -> None:
        """Write weights, architecture and classes as safetensors, for `load(weights=path)`."""
        metadata = {"architecture": self.architecture}
        if self.classes is not None:
            metadata["classes"] = json.dumps(self.classes)
        state = {k: v.contiguous() for k, v in self.network.state_dict().items()}
        safetensors.torch.save_file(state, path, metadata)


def published_weights(architecture: str) -> torchvision.models.WeightsEnum:
    """Return torchvision's ImageNet weights (V1); LabellerUnavailable names an unknown architecture."""
    try:
        return torchvision.models.get_model_weights(architecture)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        raise LabellerUnavailable(
            f"{architecture!r} is no torchvision classifier with ImageNet weights; resnet152 is the default"
        ) from None


def build_network(architecture: str, n_outputs: int) -> nn.Module:
    """Build an untrained torchvision classifier with `n_outputs` logits."""
    return torchvision.models.get_model(architecture, weights=None, num_classes=n_outputs)


def normalise(images: Tensor) -> Tensor:
    """Scale `(n, height, width, 3)` uint8 to ImageNet's mean and deviation, `(n, 3, height, width)`."""
    x = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (x - mean) / std


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
    pixels, labels = torch.as_tensor(images), torch.as_tensor(targets)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(batch_size):
            if len(rows) < 2:  # batch norm needs two
                schedule.step()
                continue
            batch = normalise(pixels[rows])
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            loss = nn.functional.cross_entropy(network(batch), labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return ImageLabeller(architecture, network.eval(), "", tuple(classes))
