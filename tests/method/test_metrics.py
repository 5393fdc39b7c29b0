import fast_bss_eval
import numpy as np
import pytest
import scipy.linalg
import torch

from avsep.metrics import bss_eval, calibration, improvement, si_sar, si_sdr


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def by_projection(references: np.ndarray, estimate: np.ndarray, j: int, taps: int) -> tuple[float, ...]:
    """BSS-eval v3 by least squares on `taps` shifts of the references, as it is defined (Vincent 2006)."""
    n = references.shape[1] + taps - 1
    shifts = [scipy.linalg.toeplitz(np.pad(r, (0, n - len(r))), [r[0], *[0] * (taps - 1)]) for r in references]
    e = np.pad(estimate, (0, taps - 1))
    target, everything = (a @ np.linalg.lstsq(a, e)[0] for a in (shifts[j], np.concatenate(shifts, 1)))
    interference, artefacts = everything - target, e - everything
    ratios = ((target, interference + artefacts), (target, interference), (everything, artefacts))
    return tuple(float(10 * np.log10((a**2).sum() / (b**2).sum())) for a, b in ratios)


@pytest.mark.parametrize("scale", [1e-3, 1.0, -20.0])
@pytest.mark.parametrize("decibel", [-30.0, 0.0, 40.0])
def test_si_sdr_of_orthogonal_noise_is_known_and_scale_means_nothing(scale: float, decibel: float) -> None:
    r, n = noise(2, 500)
    n -= (n @ r) / (r @ r) * r  # orthogonal to the reference
    n *= np.sqrt((r @ r) / (n @ n) / 10 ** (decibel / 10))
    assert float(si_sdr(r, scale * (r + n))) == pytest.approx(decibel, abs=1e-6)


def test_si_sdr_takes_batches_and_lists() -> None:
    r, e = noise(2, 3, 100), noise(2, 3, 100, seed=1)
    values = si_sdr(r, e)
    assert values.shape == (2, 3) and values.dtype == np.float64
    assert values[1, 2] == pytest.approx(float(si_sdr(r[1, 2].tolist(), e[1, 2])))
    assert si_sdr(r, r.copy()).min() > 250


def test_bss_eval_is_its_definition_by_least_squares() -> None:
    taps, references = 8, noise(3, 400)
    mixing = np.array([[1.0, 0.3, 0.1], [0.2, 1.0, 0.0], [0.1, 0.4, 1.0]])
    estimates = mixing @ references + 0.2 * noise(3, 400, seed=1)
    found = bss_eval(references, estimates, filter_length=taps)
    for j in range(3):
        expected = by_projection(references, estimates[j], j, taps)
        assert (found.sdr[j], found.sir[j], found.sar[j]) == pytest.approx(expected, abs=1e-4)


def test_many_estimates_at_once_are_each_alone_and_agree_with_fast_bss_eval() -> None:
    """At the length of a clip, whose last block is not a whole one."""
    lowpass = np.hanning(41)[:, None] * np.ones(3)
    references = np.stack([np.convolve(x, w)[:48_000] for x, w in zip(noise(3, 48_000), lowpass.T, strict=True)])
    mixing = np.eye(3) + 0.3 * noise(4, 3, 3, seed=1)
    estimates = mixing @ references + 0.1 * noise(4, 3, 48_000, seed=2)
    found = bss_eval(references, estimates)
    assert found.sdr.shape == (4, 3)
    for k, own in enumerate(estimates):
        alone = bss_eval(references, own)
        expected = fast_bss_eval.bss_eval_sources(
            torch.from_numpy(references), torch.from_numpy(own), filter_length=512, compute_permutation=False
        )
        for figure, theirs in zip(("sdr", "sir", "sar"), expected[:3], strict=True):
            assert getattr(found, figure)[k] == pytest.approx(getattr(alone, figure), abs=1e-9)
            assert getattr(found, figure)[k] == pytest.approx(theirs.numpy(), abs=1e-4)


def test_nothing_interferes_with_a_single_source() -> None:
    a, n = noise(2, 2000)
    found = bss_eval(a[None], (a + 0.1 * n)[None])
    with np.errstate(divide="ignore"):
        expected = by_projection(a[None], a + 0.1 * n, 0, 512)
    assert np.isnan(found.sir[0]) and (found.sdr[0], found.sar[0]) == pytest.approx(expected[::2], abs=1e-4)


def test_bss_eval_forgives_a_filter_and_separates_interference_from_artefacts() -> None:
    a, b = noise(2, 8000)
    filtered = np.convolve(a, [0.5, 0.0, -0.3, 0.2])[:8000]
    leaking = b + 0.1 * a  # 20 dB of interference, no artefacts
    found = bss_eval(np.stack([a, b]), np.stack([filtered, leaking]))
    assert found.sdr[0] > 30 and float(si_sdr(a, filtered)) < 10
    assert found.sir[1] == pytest.approx(20, abs=1) and found.sar[1] > 40


def test_bss_eval_keeps_the_order_given() -> None:
    references = noise(2, 2000)
    swapped = bss_eval(references, references[::-1] + 0.01 * noise(2, 2000, seed=3))
    assert (swapped.sdr < 0).all()


def test_silence_is_handled() -> None:
    """A silent reference: nothing can be said (NaN). A silent estimate of a sound: it was lost (−inf)."""
    a, b = noise(2, 2000)
    zero = np.zeros(2000)
    assert np.isnan(si_sdr(zero, a)) and np.isneginf(si_sdr(a, zero)) and np.isnan(si_sdr(zero, zero))
    found = bss_eval(np.stack([a, zero, b]), np.stack([a + 0.1 * b, b, zero]))
    for figures in (found.sdr, found.sir, found.sar):
        assert np.isnan(figures[1]) and np.isneginf(figures[2])
    whole = bss_eval(np.stack([a, b]), np.stack([a + 0.1 * b, b]))  # the lost source still interferes
    assert (found.sdr[0], found.sir[0]) == pytest.approx((whole.sdr[0], whole.sir[0]))
    silent = bss_eval(np.zeros((2, 2000)), np.stack([a, b]))
    assert np.isnan([silent.sdr, silent.sir, silent.sar]).all()


def test_references_that_are_copies_of_each_other_do_not_crash() -> None:
    """Their normal equations are singular: SDR is still that of the one signal there is."""
    a, n = noise(2, 4000)
    found = bss_eval(np.stack([a, 2 * a]), np.stack([a + 0.1 * n, a + 0.1 * n]))
    alone = bss_eval(a[None], (a + 0.1 * n)[None])
    assert found.sdr == pytest.approx(np.repeat(alone.sdr, 2), abs=1e-3)


def test_improvement_is_a_difference_that_keeps_the_undefined() -> None:
    gains = improvement([5.0, np.nan, -np.inf], [1.0, 0.0, 2.0])
    assert gains[0] == 4 and np.isnan(gains[1]) and np.isneginf(gains[2])


def test_calibration_is_the_gap_between_scores_and_what_happened() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 20_000)
    honest = calibration(rng.uniform(0, 1, 20_000) < scores, scores)
    assert honest["expected_calibration_error"] < 0.02 and sum(b["count"] for b in honest["bins"]) == 20_000
    boastful = calibration([True, False, False, False], [0.9, 0.9, 0.9, 0.9])
    assert boastful["expected_calibration_error"] == pytest.approx(0.65)
    assert boastful["bins"] == [{"score": pytest.approx(0.9), "share": 0.25, "count": 4}]
    assert calibration([True, False], [1.0, 0.0])["expected_calibration_error"] == 0
    assert np.isnan(calibration([], [])["expected_calibration_error"])


def test_errors_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"reference \(5,\) and estimate \(6,\) must have one non-empty"):
        si_sdr(np.ones(5), np.ones(6))
    with pytest.raises(ValueError, match="non-empty"):
        si_sdr([], [])
    with pytest.raises(ValueError, match="NaN or infinity; metrics need finite samples"):
        si_sdr([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"references are \(2000,\); \(J, S\) is needed"):
        bss_eval(noise(2000), noise(2000))
    with pytest.raises(ValueError, match=r"100 samples; BSS-eval's filter of 512 taps.*smaller filter"):
        bss_eval(noise(2, 100), noise(2, 100))


# ------------------------------------------------------------------------------------------ SI-SAR


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_si_sar_counts_only_what_the_references_cannot_give(scale: float) -> None:
    """Orthogonal references and artefacts of known power; the other source in the estimate costs nothing."""
    r = np.eye(3, 64)[:2] * np.sqrt(64)
    artefact = np.eye(3, 64)[2] * np.sqrt(64)
    e = scale * np.stack([r[0] + 0.5 * r[1] + 0.1 * artefact, r[1] - 2.0 * r[0] + 0.01 * artefact])
    assert si_sar(r, e) == pytest.approx([20, 40], abs=1e-6)
    assert si_sar(r, np.stack([e, e])).shape == (2, 2)


def test_si_sdr_splits_into_interference_and_artefacts() -> None:
    """10^(−SI-SDR/10) = 10^(−SI-SIR/10) + 10^(−SI-SAR/10), the interference found by least squares."""
    rng = np.random.default_rng(0)
    r, e = rng.standard_normal((3, 500)), rng.standard_normal((3, 500))
    e += r + 0.3 * r[::-1]
    for j in range(3):
        target = (e[j] @ r[j]) / (r[j] @ r[j]) * r[j]
        within = r.T @ np.linalg.lstsq(r.T, e[j], rcond=None)[0]
        si_sir = 10 * np.log10((target @ target) / ((within - target) @ (within - target)))
        parts = 10 ** (-si_sir / 10) + 10 ** (-si_sar(r, e)[j] / 10)
        assert 10 ** (-float(si_sdr(r[j], e[j])) / 10) == pytest.approx(parts, rel=1e-9)


def test_si_sar_of_silence_copies_and_mixtures() -> None:
    rng = np.random.default_rng(1)
    a, b, zero = rng.standard_normal(400), rng.standard_normal(400), np.zeros(400)
    found = si_sar([a, zero], [a + b, b])
    assert found[0] == pytest.approx(float(si_sdr(a, a + b))) and np.isnan(found[1])  # a silent one explains nothing
    assert np.isneginf(si_sar([a, b], [zero, b])[0])
    assert (si_sar([a, b], [a + b, a + b]) > 100).all()  # a mixture of the references has no artefacts
    assert (si_sar([a, 2 * a], [a, a]) > 100).all()  # nor where they are linearly dependent
    with pytest.raises(ValueError, match=r"references are \(400,\); \(J, S\) is needed"):
        si_sar(a, a)


def test_nothing_is_gained_over_a_mixture_that_is_the_source_itself() -> None:
    assert np.isnan(improvement([np.inf, -np.inf], [np.inf, -np.inf])).all()
    assert improvement([np.inf], [3.0])[0] == np.inf
