import math

import numpy as np
import torch

from avsep.baselines import (
    blind_clustering,
    harmonic_percussive,
    ideal_ratio_mask,
    mfcc,
    mixture_as_estimate,
    oracle_assignment,
)
from avsep.factors import Factors
from avsep.metrics import si_sdr
from avsep.nmf import factorize
from avsep.stft import STFT

RATE = 8000
SMALL = STFT(sample_rate=RATE, n_fft=400, hop_length=200)


def tone(hz: float, rhythm: float, seconds: float = 1.0) -> torch.Tensor:
    """A sound of three partials, switched on and off."""
    t = torch.arange(int(RATE * seconds)) / RATE
    envelope = (torch.sin(2 * math.pi * rhythm * t) > 0).float()
    return envelope * sum(torch.sin(2 * math.pi * hz * k * t) / k for k in (1, 2, 3))


LOW, HIGH = tone(200, 3), tone(1300, 5)
REFERENCES = torch.stack([LOW, HIGH])
MIXTURE = LOW + HIGH


def factors(mixture: torch.Tensor, n_bases: int = 4) -> Factors:
    W, H = factorize(SMALL(mixture).abs(), n_bases, n_iter=100, seeds=1)
    return Factors(W, H, 0.0)


def quality(estimates: torch.Tensor) -> np.ndarray:
    return si_sdr(REFERENCES.numpy(), estimates.numpy())


def test_the_floor_is_the_mixture_itself() -> None:
    floor = mixture_as_estimate(MIXTURE, 2)
    assert torch.equal(floor, torch.stack([MIXTURE, MIXTURE]))


def test_the_ceiling_is_exact_where_the_sources_do_not_meet() -> None:
    estimates = ideal_ratio_mask(MIXTURE, REFERENCES, SMALL)
    assert torch.allclose(estimates.sum(0), MIXTURE, atol=1e-5)  # masks that sum to one
    assert quality(estimates).min() > 25
    gap = torch.cat([LOW, torch.zeros(RATE)]), torch.cat([torch.zeros(RATE), HIGH])  # one after the other
    apart = ideal_ratio_mask(sum(gap), torch.stack(gap), SMALL, power=1.0)
    away_from_the_seam = torch.cat([torch.arange(RATE - 400), torch.arange(RATE + 400, 2 * RATE)])
    assert torch.allclose(apart[:, away_from_the_seam], torch.stack(gap)[:, away_from_the_seam], atol=1e-4)


def test_a_sound_of_less_than_a_frame_has_a_ceiling_too() -> None:
    short = SMALL.n_fft // 2 - 1
    estimates = ideal_ratio_mask(MIXTURE[:short], REFERENCES[:, :short], SMALL)
    assert estimates.shape == (2, short) and torch.allclose(estimates.sum(0), MIXTURE[:short], atol=1e-5)


def test_oracle_assignment_gives_each_basis_to_its_source() -> None:
    found = factors(MIXTURE)
    estimates, owner = oracle_assignment(MIXTURE, REFERENCES, found, SMALL)
    pitch = found.W.argmax(0) * RATE / SMALL.n_fft
    assert torch.equal(owner, (pitch > 900).long())  # 200…600 Hz against 1300…3900 Hz
    assert set(owner.tolist()) == {0, 1}
    assert torch.allclose(estimates.sum(0), MIXTURE, atol=1e-4)
    assert quality(estimates).min() > 15


def test_blind_clustering_comes_back_in_the_references_order() -> None:
    found = factors(MIXTURE)
    estimates = blind_clustering(MIXTURE, REFERENCES, found, SMALL)
    assert quality(estimates).min() > 10
    swapped = blind_clustering(MIXTURE, REFERENCES.flip(0), found, SMALL)
    assert torch.allclose(swapped, estimates.flip(0), atol=1e-5)
    assert torch.allclose(estimates.sum(0), MIXTURE, atol=1e-4)


def test_blind_clustering_of_too_few_bases_shares_the_mixture() -> None:
    estimates = blind_clustering(MIXTURE, REFERENCES, factors(MIXTURE, 1), SMALL)
    assert torch.allclose(estimates, torch.stack([MIXTURE, MIXTURE]) / 2)


def test_a_chord_and_clicks_are_told_apart() -> None:
    t = torch.arange(2 * RATE) / RATE
    chord = torch.sin(2 * math.pi * 400 * t) + torch.sin(2 * math.pi * 1000 * t)
    clicks = torch.zeros(2 * RATE)
    clicks[1000::4000] = 40.0
    references = torch.stack([chord, clicks])  # in the order of the answer: harmonic, percussive
    estimates = harmonic_percussive(references.sum(0), SMALL)
    gains = si_sdr(references.numpy(), estimates.numpy()) - si_sdr(
        references.numpy(), references.sum(0).expand(2, -1).numpy()
    )
    assert gains.min() > 8
    assert torch.allclose(estimates.sum(0), references.sum(0), atol=1e-4)


def test_mfcc_ignores_level_and_tells_spectra_apart() -> None:
    """A gain moves coefficient 0 alone, which is left out."""
    W = torch.rand(SMALL.n_bins, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    features = mfcc(W, SMALL)
    assert features.shape == (3, 13) and features.dtype == torch.float32
    assert torch.allclose(mfcc(30 * W, SMALL), features, atol=1e-3)
    steep = W * torch.linspace(1, 0.01, SMALL.n_bins)[:, None]
    assert (mfcc(steep, SMALL)[:, 0] > features[:, 0] + 1).all()  # energy low down: a positive first cosine
