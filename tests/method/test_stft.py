import math

import numpy as np
import pytest
import scipy.signal
import torch

from avsep.stft import STFT

SMALL = STFT(sample_rate=800, n_fft=80, hop_length=40)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ten_seconds_give_exactly_2401_by_201_and_come_back() -> None:
    stft, x = STFT(), noise(480_000)
    X = stft(x)
    assert X.shape == (2401, 201) and X.dtype == torch.complex64
    back = stft.inverse(X, 480_000)
    assert back.dtype == torch.float32
    assert (back - x).norm() / x.norm() < 1e-5


def test_a_sinusoid_in_the_middle_of_a_bin_has_its_closed_form() -> None:
    """A Hann window of n samples turns `a cos(2πkt/n)` into a·n/4 at bin k, half of that beside it."""
    k, amplitude, n = 12, 0.7, SMALL.n_fft
    x = amplitude * torch.cos(2 * math.pi * k * torch.arange(800, dtype=torch.float64) / n)
    magnitude = SMALL(x).abs()[:, 2:-2]
    expected = torch.zeros(SMALL.n_bins, dtype=torch.float64)
    expected[k - 1 : k + 2] = amplitude * n / 4 * torch.tensor([0.5, 1.0, 0.5])
    assert torch.allclose(magnitude, expected[:, None].expand_as(magnitude), atol=1e-9)
    assert float(SMALL.frequencies_hz[k]) == k * 800 / 80


def test_agrees_with_scipy_in_both_directions() -> None:
    x = noise(4000).double()
    X = SMALL(x)
    _, _, theirs = scipy.signal.stft(x.numpy(), nperseg=80, noverlap=40, window="hann", boundary="zeros")
    theirs *= scipy.signal.get_window("hann", 80).sum()
    assert np.allclose(X.numpy(), theirs[:, : X.shape[1]], atol=1e-10)
    _, back = scipy.signal.istft(X.numpy() / 40, nperseg=80, noverlap=40, window="hann", boundary=True)
    assert np.allclose(back[:4000], SMALL.inverse(X, 4000).numpy(), atol=1e-10)


@pytest.mark.parametrize("length", [40, 41, 79, 80, 81, 119, 120, 121, 3999, 4000])
def test_the_inverse_is_exact_for_any_length_from_half_a_window(length: int) -> None:
    x = noise(length, seed=length)
    X = SMALL(x)
    assert X.shape == (SMALL.n_bins, SMALL.n_frames(length))
    assert (SMALL.inverse(X, length) - x).norm() / x.norm() < 1e-5


def test_leading_axes_are_batches() -> None:
    x = noise(2, 3, 500)
    X = SMALL(x)
    assert X.shape == (2, 3, 41, SMALL.n_frames(500))
    assert torch.equal(X[1, 2], SMALL(x[1, 2]))
    assert SMALL.inverse(X, 500).shape == x.shape
    assert torch.allclose(SMALL.inverse(X, 500), x, atol=1e-5)


def test_integers_are_taken_as_they_are_and_an_empty_batch_stays_empty() -> None:
    x = (100 * noise(500)).to(torch.int16)
    assert torch.equal(SMALL(x), SMALL(x.float())) and torch.equal(SMALL(x.half()), SMALL(x.float()))
    assert SMALL.inverse(SMALL(torch.zeros(0, 500)), 500).shape == (0, 500)


def test_a_smaller_hop_is_inverted_too() -> None:
    stft, x = STFT(n_fft=80, hop_length=20), noise(1234)
    assert torch.allclose(stft.inverse(stft(x), 1234), x, atol=1e-5)


def test_errors_name_the_value_the_rule_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"39 samples.*half a window, 40.*pad it with zeros"):
        SMALL(torch.zeros(39))
    with pytest.raises(ValueError, match=r"0 samples"):
        SMALL(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(41, 14\).*600 samples need.*\(41, 16\).*pass the length"):
        SMALL.inverse(SMALL(torch.zeros(500)), 600)
    with pytest.raises(ValueError, match=r"complex64; the STFT takes real samples"):
        SMALL(torch.zeros(500, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"float32; the inverse needs complex values"):
        SMALL.inverse(SMALL(torch.zeros(500)).abs(), 500)
    with pytest.raises(ValueError, match=r"sample_rate is 0; it must be above 0 Hz"):
        STFT(sample_rate=0)
    with pytest.raises(ValueError, match=r"n_fft is 81; it must be a positive even number"):
        STFT(n_fft=81)
    with pytest.raises(ValueError, match=r"hop_length is 41; it must lie in 1…40"):
        STFT(n_fft=80, hop_length=41)
