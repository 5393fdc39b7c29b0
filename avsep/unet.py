"""A network that turns a spectrogram into one mask per object: the separator that people would use instead.

A U-Net as of *Co-Separating Sounds of Visual Objects* (Gao and Grauman, 2019), told which objects are there. It has
no bases, so nothing explains what it does. `learning.mixing` trains it with the same weak labels.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from avsep import storage
from avsep.model import CONFIG_FILE, UNET_FILE, check_fields
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.separation import Planned, Whole, separate
from avsep.stft import STFT

KIND = "unet"
_FLOOR = 1e-8  # of a sound's mean power: what is fainter looks the same
_WINDOW, _CONTEXT = 256, 32  # frames that are separated at once, and that are seen on either side
_RANGES = {  # of the configuration's numbers
    "stft.sample_rate": (1, 1_000_000),
    "stft.n_fft": (2, 1 << 20),
    "knee_hz": (1.0, 1e6),
    "top_hz": (1.0, 1e6),
}
_MOST_WIDTHS, _MOST_CHANNELS = 12, 2048


def is_unet(directory: storage.AnyPath) -> bool:
    """Say whether a folder's `config.json` is a U-Net's."""
    path = storage.join(directory, CONFIG_FILE)
    if not storage.exists(path):
        return False
    try:
        raw = json.loads(storage.read_bytes(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("kind") == KIND


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net's `config.json` holds. Raises ValueError for a value that no network can work with."""

    objects: tuple[str, ...]  # those that it learned, L of them
    vocabulary: Vocabulary = AUDIOSET_23  # where they come from
    stft: STFT = field(default_factory=lambda: STFT(48_000, 4096, 2048))
    knee_hz: float = 1150.0  # bands are bins far below it, and parts of an octave far above
    top_hz: float = 5500.0  # what is above isn't looked at, and follows the last band
    widths: tuple[int, ...] = (24, 48, 96, 192, 192)  # channels of each halving
    training: dict[str, Any] = field(default_factory=dict)
    kind: str = KIND

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if not least <= value <= most:  # NaN fails, too
                raise ValueError(f"{name} is {value}; it must lie in {least}…{most}")
        if not 1 <= len(self.widths) <= _MOST_WIDTHS or not all(_is_width(w) for w in self.widths):
            rule = f"it must be 1 to {_MOST_WIDTHS} whole numbers in 1…{_MOST_CHANNELS}"
            raise ValueError(f"widths is {list(self.widths)}; {rule}")
        known = self.vocabulary.names
        if strange := [name for name in self.objects if name not in known]:
            raise ValueError(f"objects names {strange[0]!r}; the vocabulary has {', '.join(known)}")
        if not self.objects or len(set(self.objects)) < len(self.objects):
            raise ValueError(f"objects is {list(self.objects)}; it must be one name or more, each once")

    def bands(self, stft: STFT | None = None) -> Bands:
        """Return the bands of an STFT, its own unless given: the same bands where the windows last as long."""
        return Bands(stft or self.stft, self.knee_hz, self.top_hz)

    def as_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        return asdict(self) | {"vocabulary": self.vocabulary.as_list()}

    @classmethod
    def from_dict(cls, raw: Any) -> UNetConfig:
        """Read the same again; raises ValueError for what isn't that."""
        if not isinstance(raw, dict) or raw.get("kind") != KIND:
            raise ValueError(f"it holds no {KIND}")
        check_fields("it", cls, raw)
        check_fields("stft", STFT, raw["stft"])
        values = raw | {"vocabulary": Vocabulary.from_list(raw["vocabulary"]), "stft": STFT(**raw["stft"])}
        return cls(**values | {"objects": tuple(raw["objects"]), "widths": tuple(raw["widths"])})


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_CHANNELS


@dataclass(frozen=True)
class Bands:
    """Bands that are bins far below a knee, and parts of an octave far above: band b at `knee · sinh(b / knee)` bins.

    Bins above the top are in none, and follow the last.
    """

    stft: STFT
    knee_hz: float
    top_hz: float

    @functools.cached_property
    def weights(self) -> Tensor:
        """What each bin takes from its two nearest bands, `(F, bands)`; rows sum to one."""
        knee, bins = self.knee_hz * self.stft.n_fft / self.stft.sample_rate, np.arange(self.stft.n_bins)
        place = knee * np.arcsinh(np.minimum(bins, self.n_seen - 1) / knee)
        bands = np.arange(int(np.ceil(place[-1])) + 1)
        return torch.from_numpy(np.maximum(0, 1 - np.abs(place[:, None] - bands)).astype(np.float32))

    @property
    def n_seen(self) -> int:
        """F', how many bins are below the top."""
        return min(self.stft.n_bins, int(self.top_hz * self.stft.n_fft / self.stft.sample_rate) + 1)

    def average(self, power: Tensor) -> Tensor:
        """Average bins in bands, `(…, F, N)` → `(…, bands, N)`."""
        weights = self.weights[: self.n_seen]
        return (weights / weights.sum(0).clamp_min(1e-9)).T @ power[..., : self.n_seen, :]

    def spread(self, masks: Tensor) -> Tensor:
        """Give bins what their bands have, `(…, bands, N)` → `(…, F, N)`."""
        return self.weights @ masks


class UNet(nn.Module):
    """Power in bands, `(B, bands, N)`, and the told objects, boolean `(B, L)`, to masks `(B, L + 1, bands, N)`.

    Masks lie in [0, 1] and sum to one; the last one is the rest's, and what isn't told has none. Convolutions of 4 x 4
    halve the picture and double it again. The told objects scale and shift each channel on the way back.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        into = (2, *config.widths[:-1])
        out = (len(config.objects) + 1, *config.widths[:-1])
        wide = (*(2 * w for w in config.widths[:-1]), config.widths[-1])  # with what was seen on the way down
        self.down = nn.ModuleList(nn.Conv2d(i, w, 4, 2, 1) for i, w in zip(into, config.widths, strict=True))
        self.down_norm = nn.ModuleList(nn.BatchNorm2d(w) for w in config.widths)
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, o, 4, 2, 1) for w, o in zip(wide, out, strict=True))
        self.up_norm = nn.ModuleList(nn.BatchNorm2d(o) for o in out[1:])
        self.told = nn.ModuleList(nn.Linear(len(config.objects), 2 * o) for o in out[1:])
        for parameter in self.told.parameters():
            nn.init.zeros_(parameter)

    def forward(self, power: Tensor, told: Tensor) -> Tensor:
        """Give the masks."""
        n_bands, n_frames = power.shape[1:]
        level = 0.1 * (power / power.mean((1, 2), keepdim=True).clamp_min(1e-30) + _FLOOR).log()
        height = torch.linspace(-1, 1, n_bands)[:, None].expand_as(level)
        step = 2 ** len(self.down)
        x = functional.pad(torch.stack([level, height], 1), (0, -n_frames % step, 0, -n_bands % step))
        seen = []
        with torch.autocast(x.device.type, torch.bfloat16, self.training):
            for convolve, norm in zip(self.down, self.down_norm, strict=True):
                x = functional.leaky_relu(norm(convolve(x)), 0.2)
                seen.append(x)
            for i in reversed(range(len(self.up))):
                x = self.up[i](x if i == len(self.up) - 1 else torch.cat([x, seen[i]], 1))
                if i:
                    scale, shift = self.told[i - 1](told.float())[:, :, None, None].chunk(2, 1)
                    x = functional.relu(self.up_norm[i - 1](x) * (1 + scale) + shift)
        there = torch.cat([told, torch.ones_like(told[:, :1])], 1)[:, :, None, None]
        return x[:, :, :n_bands, :n_frames].float().masked_fill(~there, -torch.inf).softmax(1)


@dataclass
class UNetSeparator:
    """A trained U-Net as a separator; see `separation.Separates`. Its sounds fit into memory.

    >>> UNetSeparator.load("out/unet").plan([waveform], ["dog", "violin"])   # doctest: +SKIP
    """

    config: UNetConfig
    network: UNet

    def __post_init__(self) -> None:
        self.bands = self.config.bands()

    @property
    def sample_rate(self) -> int:
        """The sounds' sample rate in Hz."""
        return self.config.stft.sample_rate

    @property
    def objects(self) -> tuple[str, ...]:
        """The names that it knows."""
        return self.config.objects

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that they come from."""
        return self.config.vocabulary

    def plan(
        self,
        blocks: Iterable[NDArray[np.float32]],
        objects: Sequence[str] | None = None,
        seen: Sequence[str] | None = None,
    ) -> Planned:
        """Separate the sound. It can't say what sounds: what is seen counts as told, without either all it knows."""
        if objects is None and seen is not None:
            objects = [n for n in seen if n in self.objects]
        return Whole(self.estimate, self.sample_rate, self.objects).plan(blocks, objects)

    @torch.inference_mode()
    def estimate(self, mixture: Tensor, names: Sequence[str]) -> Tensor:
        """Separate a waveform `(S,)` into J named objects, `(J, S)`."""
        padded = functional.pad(mixture, (0, max(0, self.config.stft.n_fft - len(mixture))))
        masks = self.masks(self.config.stft(padded).abs().square(), names)
        return separate(padded, masks, self.config.stft)[:-1, : len(mixture)]

    @torch.inference_mode()
    def masks(self, power: Tensor, names: Sequence[str]) -> Tensor:
        """Return the masks of named objects and, last, of the rest: `(F, N)` → `(J + 1, F, N)`; they sum to one."""
        index = [self.objects.index(n) for n in names]
        told = torch.zeros(1, len(self.objects), dtype=torch.bool)
        told[0, index] = True
        bands = self.bands.average(power)
        parts = []
        for start in range(0, bands.shape[-1], _WINDOW):
            before = min(start, _CONTEXT)
            window = bands[:, start - before : start + _WINDOW + _CONTEXT]
            parts.append(self.network(window[None], told)[0][..., before : before + _WINDOW])
        return self.bands.spread(torch.cat(parts, -1)[[*index, len(self.objects)]])

    def save(self, directory: storage.AnyPath) -> None:
        """Write `config.json` and the weights."""
        weights = {k: v.detach().contiguous() for k, v in self.network.state_dict().items()}
        storage.write_bytes(storage.join(directory, UNET_FILE), safetensors.torch.save(weights))
        storage.write_text(storage.join(directory, CONFIG_FILE), json.dumps(self.config.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, directory: storage.AnyPath) -> UNetSeparator:
        """Read what `save` wrote; raises FileNotFoundError where there is none, ValueError where it is damaged."""
        paths = [storage.join(directory, f) for f in (CONFIG_FILE, UNET_FILE)]
        for path in paths:
            if not storage.exists(path):
                raise FileNotFoundError(f"{directory} holds no {storage.name(path)}; give a U-Net's folder")
        try:
            config = UNetConfig.from_dict(json.loads(storage.read_bytes(paths[0])))
            network = UNet(config)
            network.load_state_dict(safetensors.torch.load(storage.read_bytes(paths[1])))
        except (ValueError, RuntimeError, RecursionError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ValueError(
                f"{directory} is no {KIND}: {reason}; copy the whole folder again, or train it again"
            ) from None
        return cls(config, network.eval())
