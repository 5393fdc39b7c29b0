"""The picture network: images to ImageNet logits."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import re
import socket
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from avsep import storage
from avsep.objects import N_IMAGENET_CLASSES

# Published thresholds belong to this network and these weights.
DEFAULT_ARCHITECTURE = "resnet152"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BFLOAT16_FROM = 10_000_000  # parameters; smaller networks gain nothing
_CPU_BATCH = 10  # pictures; 40 take 1.4 times as long each
_BFLOAT16_ERROR = 0.01  # of the logits' range, at most


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
            weights: a file or URI. `.safetensors` as `save` writes it names its own architecture
                and classes; a `.pth` state dict whose name ends in 8 or more hex digits, as
                torchvision's do, is checked against them. None takes torchvision's ImageNet
                weights (V1), from its cache or the internet.

        Raises:
            LabellerUnavailable: no internet and no cached copy, no such file, a file that is
                damaged or doesn't fit.
        """
        if weights is None:
            return cls._load_published(architecture, device)
        try:
            with storage.local_file(str(weights)) as path:
                return cls._load_file(architecture, str(weights), path, device)
        except (OSError, ValueError) as error:
            raise LabellerUnavailable(f"weights {weights} can't be read: {error}") from None

    @classmethod
    def _load_file(cls, architecture: str, weights: str, path: Path, device: str) -> ImageLabeller:
        if not path.is_file():
            raise LabellerUnavailable(f"weights {weights}: no such file; give a .pth or .safetensors file")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = re.search(r"-([0-9a-f]{8,64})$", storage.name(weights).rsplit(".", 1)[0])
        if expected and not sha256.startswith(expected[1]):
            raise LabellerUnavailable(
                f"weights {weights}: its SHA-256 starts with {sha256[:8]}, its name says {expected[1]}; "
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
            reason = "its layers are others" if isinstance(error, RuntimeError) else "it is no weights file"
            raise LabellerUnavailable(f"weights {weights} doesn't fit {architecture}: {reason}") from None
        if not all(x.isfinite().all() for x in network.state_dict().values()):
            raise LabellerUnavailable(f"weights {weights} holds NaN or infinity; copy the file again")
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

    @functools.cached_property
    def _classify(self) -> nn.Module:
        """The network as it runs: in bfloat16 where that is quick and changes no logit by 1 % of their range."""
        return _in_bfloat16(self.network, self.device) or self.network

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor, batch_size: int | None = None) -> Tensor:
        """Classify RGB pictures, `(n, height, width, 3)` uint8 → `(n, 1000)` float32 logits."""
        pixels = torch.as_tensor(images)
        batch_size = batch_size or (_CPU_BATCH if self.device == "cpu" else 40)
        outputs = []
        for batch in pixels.split(batch_size):
            logits = self._classify(normalise(batch.to(self.device)))
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


@functools.cache
def _torchvision() -> ModuleType:
    """Import torchvision: only where there are pictures, and without torch's compiler.

    torchvision imports that one, two seconds' work, for a question that only its detectors ask. A stand-in takes the
    question, and imports the compiler when it is asked.
    """
    package, utils = "torch._dynamo", "torch._dynamo.utils"
    if "torchvision" in sys.modules or package in sys.modules:
        return importlib.import_module("torchvision")
    stand_ins = {name: ModuleType(name) for name in (package, utils)}

    def leave() -> None:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def real(name: str) -> Any:
        if name.startswith("__"):  # `inspect` looks through all modules
            raise AttributeError(name)
        leave()
        return getattr(importlib.import_module(utils), name)

    vars(stand_ins[utils])["is_compile_supported"] = lambda device: real("is_compile_supported")(device)
    vars(stand_ins[utils])["__getattr__"] = real  # of a version that asks for more
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("torchvision")
    finally:
        leave()


def published_weights(architecture: str) -> Any:
    """Return torchvision's ImageNet weights (V1); LabellerUnavailable names an unknown architecture."""
    try:
        return _torchvision().models.get_model_weights(architecture)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        raise LabellerUnavailable(
            f"{architecture!r} is no torchvision classifier with ImageNet weights; resnet152 is the default"
        ) from None


def build_network(architecture: str, n_outputs: int) -> nn.Module:
    """Build an untrained torchvision classifier with `n_outputs` logits."""
    return _torchvision().models.get_model(architecture, weights=None, num_classes=n_outputs)


class _Cast(nn.Module):
    """Run a network on inputs of another type or memory format."""

    def __init__(self, network: nn.Module, **kind: Any) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(**self.kind))


@torch.no_grad()
def _in_bfloat16(network: nn.Module, device: str) -> nn.Module | None:
    """Return a channels-last bfloat16 copy with batch norm folded in, its last layer still float32.

    None where it would bring nothing (a small network, a CPU without such units), or where its
    logits of a few drawn pictures differ from float32's by 1 % of their range.
    """
    units = torch.device(device).type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    if not units or sum(p.numel() for p in network.parameters()) < _BFLOAT16_FROM:
        return None
    from torch.fx.experimental.optimization import fuse

    linear = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    try:
        folded = fuse(network)  # a copy
        name, last = linear[-1]
        folded.to(dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        folded.set_submodule(name, _Cast(copy.deepcopy(last), dtype=torch.float32))
        quick = _Cast(folded, dtype=torch.bfloat16, memory_format=torch.channels_last).eval()
        pictures = normalise(_drawn_pictures().to(device))
        exact, found = network(pictures), quick(pictures)
    except Exception:  # whatever keeps a network from being rewritten, it runs as it is
        return None
    error = (found - exact).abs().max() / (exact.max() - exact.min())
    return quick if float(error) <= _BFLOAT16_ERROR else None


def _drawn_pictures() -> Tensor:
    """Two pictures of soft colour blots, the same always, `(2, 224, 224, 3)` uint8."""
    noise = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(noise, size=224, mode="bilinear")).byte().permute(0, 2, 3, 1)


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
