"""Practice mixtures: clips in which one object seems to play alone, mixed, so that the sources are known.

No label beyond the weak ones is used: a trained relation map finds the solos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avsep.context import TOP_SHARE, BasisContext, pair_features
from avsep.evidence import LabelQuality
from avsep.factors import DEFAULT_FACTORIZER, get_factorizer
from avsep.learning.bags import Bags
from avsep.miml import AnyMIML, activation_statistics, basis_posteriors, energy_shares, warp_frequencies
from avsep.records import ClipRecord

_NOISE = 0.1  # how likely noise is, beside a visible object
_HEARD = 0.15  # share of the sound from which an unseen object is taken for present
_COUNTS = (0.1, 0.5, 0.4)  # shares of mixtures of one, two and three
_HIDDEN, _SILENT = 0.25, 0.1  # shares of mixtures, in a training step, of which one object isn't told, or one too many
_WARP, _COLOUR_DB, _GAIN_DB, _FLOOR_DB = 0.06, 3.0, 4.0, -45.0
_NOISY, _NOISE_DB = 0.25, (-25.0, 3.0)  # share of mixtures with audible noise, and its level beside the rest


@dataclass
class Solo:
    """The bases of a clip's one object, with their activations; `F'` are the lower bins."""

    object_index: int
    bases: Tensor  # (F', m)
    activations: Tensor  # (m, N)


@dataclass
class Practice:
    """A mixture factorised, with what is true of its bases."""

    bases: Tensor  # (M, F), zero above F'
    activations: Tensor  # (M, N)
    basis_energy: Tensor  # (M,)
    shares: Tensor  # (L + 1, M): of each basis's energy, noise last
    present: Tensor  # boolean (L,)


@torch.inference_mode()
def find_solo(
    network: AnyMIML, record: ClipRecord, labels: Tensor, quality: LabelQuality, threshold: float = 0.85
) -> Solo | None:
    """Return a clip's sounding object with its bases, when one visible object has `threshold` of the sound.

    The poorer the labels, the likelier it is that an object without a label plays, too.
    """
    bases, activations = (torch.from_numpy(x) for x in record.factors())
    posteriors, shares = _informed(network, bases, activations, torch.from_numpy(record.basis_energy), labels, quality)
    index = int(shares.argmax())
    own = posteriors[index] > 0.5
    if not labels[index] or shares[index] < threshold or not own.any():
        return None
    top = int(bases.shape[0] * TOP_SHARE) + 1
    return Solo(index, bases[:top, own].half(), activations[own])


def _informed(
    network: AnyMIML, W: Tensor, H: Tensor, basis_energy: Tensor, labels: Tensor, quality: LabelQuality
) -> tuple[Tensor, Tensor]:
    """Weigh a clip's posteriors by what its pictures show: `(L + 1, M)`, and the objects' shares of it, `(L,)`."""
    prior = torch.cat([torch.where(labels, torch.ones(()), quality.missed()), torch.tensor([_NOISE])])
    posteriors = basis_posteriors(network.relate(W, H).unsqueeze(0)) * prior[:, None]
    posteriors = posteriors / posteriors.sum(1, keepdim=True)
    shares = energy_shares(posteriors, basis_energy.unsqueeze(0))[0]
    return posteriors[0], shares / shares.sum().clamp_min(1e-9)


@dataclass
class Teacher:
    """Say whose a training clip's bases are: a trained network, its context, and what the pictures show."""

    network: AnyMIML
    context: BasisContext
    quality: LabelQuality

    @torch.inference_mode()
    def __call__(self, W: Tensor, H: Tensor, basis_energy: Tensor, labels: Tensor) -> Tensor:
        """Return each basis's shares, `(L + 1, M)`, noise last; an object that is clearly heard counts as shown."""
        posteriors, shares = _informed(self.network, W, H, basis_energy, labels, self.quality)
        present = (labels | (shares > _HEARD)).unsqueeze(0)
        pairs = pair_features(W.T[None], H[None], basis_energy[None])
        return self.context(posteriors[None], pairs, present, settle=False)[0].exp()  # settled, it costs 2 dB


def as_bags(practices: Sequence[Practice]) -> Bags:
    """Turn practice mixtures into bags whose bases' owners are known."""
    return Bags(
        [f"practice-{i}" for i in range(len(practices))],
        torch.stack([p.bases for p in practices]),
        torch.stack([p.basis_energy for p in practices]) > 0,
        torch.stack([p.basis_energy for p in practices]),
        torch.stack([p.present for p in practices]),
        torch.stack([activation_statistics(p.activations[None])[0] for p in practices]),
        torch.stack([p.shares for p in practices]),
    )


def mix_solos(
    solos: Sequence[Solo],
    n_objects: int,
    n_bins: int,
    n_bases: int,
    n_frames: int,
    seed: int,
    n_iter: int = 150,
    factorizer: str = DEFAULT_FACTORIZER,
) -> Practice:
    """Mix solos of one to three objects, each changed in pitch, colour, level and time, and factorise the mixture.

    Args:
        solos: of at least two objects.
        n_objects, n_bins, n_bases, n_frames: L, F, M, N.
        seed: everything follows from it.
        factorizer: that of the clips, by name.
    """
    rng = np.random.default_rng(seed)
    by_object: dict[int, list[Solo]] = {}
    for solo in solos:
        by_object.setdefault(solo.object_index, []).append(solo)
    if len(by_object) < 2:
        raise ValueError("the solos are all of one object; mixtures need two at least")
    count = min(1 + int(rng.choice(3, p=_COUNTS)), len(by_object))
    chosen = [int(i) for i in rng.choice(sorted(by_object), count, replace=False)]
    parts = torch.stack([_perform(by_object[i][rng.integers(len(by_object[i]))], n_frames, rng) for i in chosen])
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, parts.shape).astype(np.float32))
    noise = _noise(parts.shape[1:], rng) * parts.square().sum(0).mean().sqrt()
    parts = torch.cat([parts, noise.abs().unsqueeze(0)])
    V = (torch.polar(parts[:-1], phases).sum(0) + noise).abs()
    W, H = get_factorizer(factorizer).factorize(V, n_bases, n_iter=n_iter, seeds=seed)
    shares = torch.zeros(n_objects + 1, n_bases)
    shares[[*chosen, n_objects]] = source_shares(parts, W, H)
    bases = torch.zeros(n_bases, n_bins)
    bases[:, : W.shape[0]] = W.T
    energy = W.square().sum(0) * H.square().sum(1)
    present = torch.zeros(n_objects, dtype=torch.bool)
    present[chosen] = True
    return Practice(bases.half(), H, energy / energy.sum().clamp_min(1e-30), shares, present)


def _noise(shape: torch.Size, rng: np.random.Generator) -> Tensor:
    """Return steady noise, complex `(F', N)`: mostly a faint floor, now and then loud; 0 dB is a mean power of one."""
    level = rng.uniform(*_NOISE_DB) if rng.random() < _NOISY else _FLOOR_DB
    tilt = rng.uniform(-0.5, 0) * np.log2(np.arange(1, shape[0] + 1))  # up to −3 dB an octave
    gain = 2.0**tilt
    noise = rng.standard_normal((2, *shape)) * (gain / np.sqrt((gain**2).mean()))[:, None]
    return torch.from_numpy((noise[0] + 1j * noise[1]).astype(np.complex64)) * (10 ** (level / 20) / 2**0.5)


def source_shares(magnitudes: Tensor, W: Tensor, H: Tensor) -> Tensor:
    """Return what share of each basis's energy comes from each source, `(J, F, N)` → `(J, M)`; columns sum to one.

    Basis m holds `W_m H_m / (W H)` of every bin, and a bin's energy is the sources' in proportion to theirs.
    """
    power = magnitudes.square()
    explained = (W @ H).clamp_min(1e-9) * power / power.sum(0).clamp_min(1e-12)
    energy = torch.stack([((W.T @ e) * H).sum(1) for e in explained])
    return energy / energy.sum(0).clamp_min(1e-20)


def _perform(solo: Solo, n_frames: int, rng: np.random.Generator) -> Tensor:
    """Render a solo's magnitudes `(F', N)`, changed at random."""
    W = solo.bases.float().T
    factor = float(np.exp(rng.uniform(-1, 1) * np.log1p(_WARP)))
    W = warp_frequencies(W, torch.full((len(W),), factor))
    octaves = np.log2(np.maximum(np.arange(W.shape[1]), 3))
    colour = np.interp(octaves, np.linspace(octaves[0], octaves[-1], 8), rng.normal(0, _COLOUR_DB, 8))
    W = W * torch.from_numpy(10 ** (colour / 20)).float()
    shift = int(rng.integers(solo.activations.shape[1]))
    frames = (torch.arange(n_frames) + shift) % solo.activations.shape[1]
    V = W.T @ solo.activations[:, frames]
    return V / V.square().mean().sqrt().clamp_min(1e-9) * 10 ** (rng.uniform(-_GAIN_DB, _GAIN_DB) / 20)


def train_context(
    network: AnyMIML, practices: Sequence[Practice], *, epochs: int, learning_rate: float = 3e-3, seed: int = 0
) -> tuple[BasisContext, dict[str, float]]:
    """Train a context on practice mixtures; return it with the cross-entropy before and after.

    Now and then one of a mixture's objects isn't told, and what is its becomes the rest's, or one is told
    that isn't there. The last eighth of the mixtures is held out for the figures.
    """
    torch.manual_seed(seed)
    mixtures = as_bags(practices)
    activations = [p.activations for p in practices]
    posteriors, pairs = [], []
    with torch.inference_mode():
        for i in range(0, len(mixtures), 64):
            part = mixtures.take(slice(i, i + 64))
            bases = part.bases.float()
            posteriors.append(basis_posteriors(network.relation(bases, statistics=part.statistics)))
            pairs.append(pair_features(bases, torch.stack(activations[i : i + 64]), part.basis_energy))
    p, features = torch.cat(posteriors).clone(), torch.cat(pairs).clone()  # out of inference mode
    assert mixtures.targets is not None
    n_train = len(mixtures) - max(1, len(mixtures) // 8)
    heard = mixtures.labels.any(0).nonzero().flatten()
    context = BasisContext()
    x = context.inputs(p, features, mixtures.labels)[:n_train].flatten(0, 2)
    context.mean.copy_(x.mean(0))
    context.deviation.copy_(x.std(0) + 1e-6)

    def loss(rows: Tensor, told: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(context(p[rows], features[rows], told), targets, mixtures.basis_energy[rows].sqrt())

    held = torch.arange(n_train, len(mixtures))
    checked = held, mixtures.labels[held], mixtures.targets[held]
    with torch.no_grad():
        figures = {"before": float(loss(*checked))}  # it starts as the identity
    optimiser = torch.optim.Adam(context.parameters(), learning_rate, weight_decay=1e-5)
    batch_size = min(32, n_train)
    steps = epochs * -(-n_train // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(n_train).split(batch_size):
            optimiser.zero_grad()
            loss(rows, *_told(mixtures.labels[rows], mixtures.targets[rows], heard)).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        figures["after"] = float(loss(*checked))
    return context.eval(), figures


def _cross_entropy(log_q: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return (-(targets * log_q.clamp_min(-20)).sum(1) * weight).sum() / weight.sum()


def _told(present: Tensor, targets: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
    """Leave an object out, or add one, in some of the clips: `(B, L)` and `(B, L + 1, M)`, with the targets moved."""
    told, moved = present.clone(), targets.clone()
    draws = torch.rand(len(present), 2)
    for clip, (hide, add) in enumerate(draws.tolist()):
        there = present[clip].nonzero().flatten()
        if hide < _HIDDEN and len(there) > 1:
            hidden = int(there[int(torch.randint(len(there), ()))])
            told[clip, hidden] = False
            moved[clip, -1] += moved[clip, hidden]
            moved[clip, hidden] = 0
        if add < _SILENT:
            extra = int(heard[int(torch.randint(len(heard), ()))])
            told[clip, extra] = told[clip, extra] or not present[clip, extra]
    return told, moved
