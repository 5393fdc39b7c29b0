"""Mix and separate: a U-Net learns to divide mixtures of clips by the clips' weak labels (Gao and Grauman 2019).

Two or three clips are mixed. The masks of one clip's labelled objects must sum to that clip's part of the mixture. A
classifier beside it must recognise each object in what is separated for it. References are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from avsep.stft import STFT
from avsep.unet import Bands, UNet, UNetConfig

_FRAMES = 96  # of each excerpt
_LEARNING_RATE = 2e-3
_TRIOS = 0.35  # share of the batches that mix three clips
_SOLO = 0.5  # how often a clip is drawn from those of one label alone
_HIDDEN, _SILENT = 0.25, 0.1  # shares of mixtures of which one clip's objects aren't told, or one too many
_GAIN_DB, _COLOUR_DB, _SPEED = 5.0, 3.0, 0.06
_CONSISTENCY = 0.05  # weight of the classifier's loss, as published


@dataclass(frozen=True)
class LabelledSound:
    """A training clip: its samples `(S,)`, as 16-bit integers to save memory, and its weak labels, boolean `(L,)`."""

    samples: NDArray[np.int16]
    labels: NDArray[np.bool_]

    @classmethod
    def of(cls, waveform: NDArray[np.float32], labels: Sequence[bool]) -> LabelledSound:
        """Keep a waveform `(S,)`; what is beyond ±1 is clipped."""
        return cls((np.clip(waveform, -1, 1) * 32767).round().astype(np.int16), np.array(labels, bool))


@dataclass
class Mixtures:
    """A batch of mixtures of G clips."""

    power: Tensor  # (B, bands, N)
    parts: Tensor  # (B, G + 1, bands, N): each clip's part of it, what isn't told last; sum to one
    members: Tensor  # (B, G + 1, L + 1): whose masks make up each part
    told: Tensor  # boolean (B, L)


class Classifier(nn.Module):
    """Recognise an object in what was separated for it: power `(B, bands, N)` → logits `(B, L)`."""

    def __init__(self, n_objects: int, widths: Sequence[int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(4, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], n_objects)

    def forward(self, power: Tensor) -> Tensor:
        """Give each object's logit."""
        level = 0.1 * (power / power.mean((1, 2), keepdim=True).clamp_min(1e-30) + 1e-6).log()
        with torch.autocast(power.device.type, torch.bfloat16):
            x = self.layers(level.unsqueeze(1))
        return self.last(x.float().amax((2, 3)))


@dataclass
class Mixer:
    """Draw mixtures of clips whose labels differ, each changed in time, speed, colour and level."""

    sounds: Sequence[LabelledSound]
    bands: Bands  # of an STFT at the sounds' rate
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self._labels = np.stack([s.labels for s in self.sounds])  # (clips, L)
        self._alone = self._labels.sum(1) == 1

    def __call__(self, size: int) -> Mixtures:
        """Draw `size` mixtures of as many clips each."""
        count = 3 if self.rng.random() < _TRIOS else 2
        drawn = [self._clips(count) for _ in range(size)]
        sounds = torch.stack([torch.stack([self._perform(s) for s in clips]) for clips in drawn])
        X = self.bands.stft(sounds)[:, :, : self.bands.n_seen] * self._colours(size, count)  # (B, G, F', N)
        mixture = X.sum(1)
        power = self.bands.average(mixture.abs().square())
        parts = self.bands.average((X * mixture.conj().unsqueeze(1)).real).clamp_min(0)
        parts = parts / parts.sum(1, keepdim=True).clamp_min(1e-20)
        labels = torch.from_numpy(np.stack([[s.labels for s in clips] for clips in drawn]))
        return self._tell(power, parts, labels)

    def _clips(self, count: int) -> list[LabelledSound]:
        """Choose clips without a label in common; where there are no more of them, silence."""
        chosen: list[LabelledSound] = []
        taken = np.zeros_like(self._labels[0])
        while len(chosen) < count:
            free = ~(self._labels & taken).any(1)
            if self.rng.random() < _SOLO and (free & self._alone).any():
                free &= self._alone
            which = np.flatnonzero(free)
            silence = LabelledSound(np.zeros(1, np.int16), np.zeros_like(taken))
            chosen.append(self.sounds[self.rng.choice(which)] if len(which) else silence)
            taken = taken | chosen[-1].labels
        return chosen

    def _perform(self, sound: LabelledSound) -> Tensor:
        """Return an excerpt of a clip, at another speed and level; a clip that is too short is repeated."""
        length = (_FRAMES - 1) * self.bands.stft.hop_length
        long = int(length * np.exp(self.rng.uniform(-_SPEED, _SPEED)))
        samples = sound.samples if len(sound.samples) >= long else np.resize(sound.samples, long)
        start = int(self.rng.integers(len(samples) - long + 1))
        x = torch.from_numpy(samples[start : start + long].astype(np.float32) / 32768)
        gain = 10 ** (self.rng.uniform(-_GAIN_DB, _GAIN_DB) / 20)
        return gain * functional.interpolate(x[None, None], length, mode="linear")[0, 0]

    def _colours(self, size: int, count: int) -> Tensor:
        """Return smooth gains over frequency, `(B, G, F', 1)`."""
        octaves = np.log2(np.maximum(np.arange(self.bands.n_seen), 3))
        points = np.linspace(octaves[0], octaves[-1], 8)
        curves = [np.interp(octaves, points, self.rng.normal(0, _COLOUR_DB, 8)) for _ in range(size * count)]
        return torch.from_numpy(10 ** (np.stack(curves) / 20)).float().reshape(size, count, -1, 1)

    def _tell(self, power: Tensor, parts: Tensor, labels: Tensor) -> Mixtures:
        """Say of which objects the network is told, `(B, G, L)` being the labels; the others' parts are the rest."""
        size, count, n_objects = labels.shape
        hidden = ~labels.any(2)
        for b in range(size):
            if self.rng.random() < _HIDDEN:
                hidden[b, int(self.rng.integers(count))] = True
        there, labels = labels.any(1), labels & ~hidden.unsqueeze(2)
        members = torch.zeros(size, count + 1, n_objects + 1)
        members[:, :-1, :-1] = labels.float()
        members[:, -1, -1] = 1
        rest = (parts * hidden[:, :, None, None]).sum(1, keepdim=True)
        told = labels.any(1)
        for b in range(size):
            extra = int(self.rng.integers(n_objects))
            told[b, extra] |= bool(self.rng.random() < _SILENT) and not bool(there[b, extra])
        return Mixtures(power, torch.cat([parts * ~hidden[:, :, None, None], rest], 1), members, told)


def loss(masks: Tensor, classifier: Classifier, mixtures: Mixtures) -> tuple[Tensor, Tensor]:
    """Return the co-separation loss of masks `(B, L + 1, bands, N)`, and the consistency loss.

    The first is the cross-entropy between each clip's part and the sum of its objects' masks, weighted by magnitude.
    """
    own = torch.einsum("bgl,blfn->bgfn", mixtures.members, masks)
    weight = mixtures.power.sqrt()
    weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1e-20)
    surprise = -(mixtures.parts * own.clamp_min(1e-4).log()).sum(1)
    separated = (surprise * weight).sum((1, 2)).mean()
    return separated, consistency(masks, classifier, mixtures)


def consistency(masks: Tensor, classifier: Classifier, mixtures: Mixtures) -> Tensor:
    """Return how badly each object is recognised in what is separated for it, and in clips of one label.

    The classifier learns from these clips alone. Learning from what is separated, as published, it would soon know
    each object by a mark that the masks leave.
    """
    alone = mixtures.members[:, :-1].sum(2) == 1
    part, clip = alone.nonzero(as_tuple=True)
    where, which = mixtures.members[:, :-1, :-1].sum(1).nonzero(as_tuple=True)
    if not len(part):
        return masks.new_zeros(())
    learned = functional.cross_entropy(
        classifier(mixtures.parts[part, clip] * mixtures.power[part]), mixtures.members[part, clip].argmax(1)
    )
    fixed = {name: weight.detach() for name, weight in classifier.named_parameters()}
    heard = masks[where, which] * mixtures.power[where]
    return learned + functional.cross_entropy(torch.func.functional_call(classifier, fixed, heard), which)


def train(
    sounds: Sequence[LabelledSound],
    config: UNetConfig,
    done: Callable[[int], float],
    *,
    batch: int = 16,
    seed: int = 0,
    report: Callable[[int, float, float], None] = lambda step, separated, consistent: None,
) -> UNet:
    """Train a U-Net on clips of the rate of `halved(config.stft)`, on batches of so many mixtures.

    `done` says after each number of batches which share of the training that is; it ends at one. `report` is told
    both losses of each batch. Raises ValueError where no clip has a label.
    """
    if not any(s.labels.any() for s in sounds):
        raise ValueError(f"none of {len(sounds)} clips has a label to learn from")
    torch.manual_seed(seed)
    network, classifier = UNet(config), Classifier(len(config.objects))
    mixer = Mixer(sounds, config.bands(halved(config.stft)), np.random.default_rng(seed))
    parameters = [*network.parameters(), *classifier.parameters()]
    optimiser = torch.optim.Adam(parameters, _LEARNING_RATE)
    step = 0
    while (share := done(step)) < 1:
        optimiser.param_groups[0]["lr"] = _LEARNING_RATE * learning_rate_at(share)
        mixtures = mixer(batch)
        separated, consistent = loss(network(mixtures.power, mixtures.told), classifier, mixtures)
        optimiser.zero_grad()
        (separated + _CONSISTENCY * consistent).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        report(step, separated.item(), consistent.item())
    return network.eval()


def halved(stft: STFT) -> STFT:
    """Return an STFT with the same bins and frames for sounds of half the rate, as training takes them."""
    return STFT(stft.sample_rate // 2, stft.n_fft // 2, stft.hop_length // 2)


def learning_rate_at(share: float) -> float:
    """Return the learning rate's part of its largest value: up in a tenth of the training, then down as a cosine."""
    return max(share, 1e-3) / 0.1 if share < 0.1 else 0.5 * (1 + math.cos(math.pi * (share - 0.1) / 0.9))
