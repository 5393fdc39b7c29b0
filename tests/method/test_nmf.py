import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import NMF

from avsep.nmf import amx, cpu, factorize, infer_activations, kl, kl_divergence
from avsep.stft import STFT
from avsep.synthetic import planted_bases

ROUNDING = {"matrix units": 2**-15, "vector units": 1e-5, "torch": 1e-5}  # of an update


@pytest.fixture(params=list(ROUNDING), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on each compiled kernel, whatever the shape, and on plain torch."""
    kernel = {"matrix units": amx.load, "vector units": cpu.load, "torch": lambda: None}[request.param]()
    if kernel is None and request.param != "torch":
        pytest.skip(f"this processor has no {request.param}")
    others = cpu.load()

    def choose(n_bins: int, n_frames: int, n_bases: int) -> object:
        few = n_bases <= amx.MAX_BASES
        return kernel if few or request.param != "matrix units" else others

    monkeypatch.setattr(kl, "cpu_kernel", choose)
    return request.param


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def spectrogram(seed: int = 0) -> torch.Tensor:
    """Magnitudes of decaying tones in noise, (F, N) = (301, 61): more rows than one of nmf's blocks."""
    rng = np.random.default_rng(seed)
    t = np.arange(18_000)
    x = 0.01 * rng.standard_normal(len(t))
    for onset, pitch in zip((0, 4000, 8000, 12_000), rng.uniform(0.02, 0.3, 4), strict=True):
        x += np.where(t >= onset, np.sin(pitch * t) * np.exp(-np.maximum(t - onset, 0) / 3000), 0)
    return STFT(n_fft=600, hop_length=300)(torch.from_numpy(x.astype(np.float32))).abs()


def divergence_by_hand(V: np.ndarray, WH: np.ndarray) -> float:
    V, WH = V.astype(float), WH.astype(float)
    logs = np.zeros_like(V)
    np.log(V / np.where(V > 0, WH, 1), out=logs, where=V > 0)
    return float((V * logs - V + WH).sum())


def test_agrees_with_scikit_learn_from_the_same_start() -> None:
    V = spectrogram()
    W0, H0 = uniform(301, 6, seed=1) + 0.1, uniform(6, 61, seed=2) + 0.1
    W, H = factorize(V, 6, n_iter=200, W0=W0, H0=H0)
    theirs = NMF(6, init="custom", solver="mu", beta_loss="kullback-leibler", max_iter=200, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, as asked
        W_sk = theirs.fit_transform(V.double().numpy(), W=W0.double().numpy(), H=H0.double().numpy())
    expected = divergence_by_hand(V.numpy(), W_sk @ theirs.components_)
    assert float(kl_divergence(V, W, H)) == pytest.approx(expected, rel=1e-4)


def test_one_iteration_is_the_printed_update_of_W_and_then_of_H(path: str) -> None:
    start = uniform(150, 9), uniform(150, 3, seed=1), uniform(3, 9, seed=2)
    V, W0, H0 = (x.double().numpy() for x in start)
    W1 = W0 * ((V / (W0 @ H0)) @ H0.T) / H0.sum(1)
    H1 = H0 * (W1.T @ (V / (W1 @ H0))) / W1.sum(0)[:, None]
    V_, W_, H_ = map(torch.from_numpy, (V, W0, H0))
    W, H = factorize(V_, 3, n_iter=1, W0=W_, H0=H_)
    assert np.allclose(W.numpy(), W1 / W1.max(0), rtol=ROUNDING[path])
    assert np.allclose(H.numpy(), H1 * W1.max(0)[:, None], rtol=ROUNDING[path])


def test_the_divergence_never_rises() -> None:
    V = spectrogram(1)
    W, H = factorize(V, 5, n_iter=0, seeds=3)
    figures = [float(kl_divergence(V, W, H))]
    for _ in range(60):
        W, H = factorize(V, 5, n_iter=1, W0=W, H0=H)
        figures.append(float(kl_divergence(V, W, H)))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(figures))
    assert figures[-1] < 0.3 * figures[0]


def test_exact_factors_are_kept() -> None:
    """Where V = WH the updates multiply by one."""
    planted = planted_bases(2)
    W, H = factorize(planted.V, 6, n_iter=20, W0=planted.W, H0=planted.H)
    assert torch.allclose(W, planted.W, atol=1e-4) and torch.allclose(H, planted.H, atol=1e-4)


def test_a_matrix_of_rank_one_is_found_exactly() -> None:
    w, h = uniform(40, 1) + 0.05, uniform(1, 30, seed=1) * 7
    W, H = factorize(w @ h, 1, n_iter=3)
    assert torch.allclose(W, w / w.max(), rtol=1e-4)
    assert torch.allclose(H, h * w.max(), rtol=1e-4)


@pytest.mark.parametrize("level", [1e-6, 1.0, 1e4])
def test_bases_have_maximum_one_and_normalising_leaves_the_product(level: float) -> None:
    V, W0, H0 = level * uniform(30, 20), uniform(30, 4, seed=1), level * uniform(4, 20, seed=2)
    W, H = factorize(V, 4, n_iter=0, W0=W0, H0=H0)
    assert torch.equal(W.amax(0), torch.ones(4))
    assert torch.allclose(W @ H, W0 @ H0, rtol=1e-5)
    assert torch.equal(factorize(V, 4, n_iter=50)[0].amax(0), torch.ones(4))


@pytest.mark.parametrize("level", [2.0**-100, 2.0**120])
def test_any_level_will_do(level: float) -> None:
    V = spectrogram(4)
    W, H = factorize(V, 5, n_iter=20)
    W_2, H_2 = factorize(V * level, 5, n_iter=20)
    assert torch.allclose(W, W_2, rtol=1e-3, atol=1e-5) and torch.allclose(H * level, H_2, rtol=1e-3, atol=1e-5 * level)
    assert torch.allclose(infer_activations(V, W) * level, infer_activations(V * level, W), rtol=1e-3)
    W_3, H_3 = factorize(V, 5, n_iter=20, W0=torch.full_like(W, 1e15) * (W + 0.1), H0=torch.full_like(H, 1e15))
    assert float(kl_divergence(V, W_3, H_3)) < 2 * float(kl_divergence(V, W, H))


def test_a_clip_does_not_depend_on_its_batch() -> None:
    V = uniform(3, 40, 25)
    W, H = factorize(V, 4, n_iter=30, seeds=[5, 6, 7])
    for order in ([1], [2, 1], [0, 1, 2]):
        W_other, H_other = factorize(V[order], 4, n_iter=30, seeds=[5 + i for i in order])
        at = order.index(1)
        assert torch.allclose(W_other[at], W[1], rtol=1e-4, atol=1e-6)
        assert torch.allclose(H_other[at], H[1], rtol=1e-4, atol=1e-6)


def test_equal_seeds_start_alike_and_different_ones_do_not() -> None:
    V = uniform(40, 25).expand(3, 40, 25)
    W, _ = factorize(V, 4, n_iter=0, seeds=[1, 1, 2])
    assert torch.equal(W[0], W[1]) and not torch.equal(W[0], W[2])
    assert torch.equal(factorize(V, 4, n_iter=0, seeds=2)[0][0], W[2])
    assert torch.equal(factorize(V, 4, n_iter=0)[0], factorize(V, 4, n_iter=0, seeds=0)[0])
    assert not torch.equal(factorize(V[0], 4, n_iter=0, seeds=2**32 - 1)[0], W[0])
    for two in (np.int64(2), np.asarray(2), torch.tensor(2), np.full(3, 2), torch.full((3,), 2)):
        assert torch.equal(factorize(V, np.asarray(4), n_iter=np.uint8(0), seeds=two)[0][0], W[2])


def test_leading_axes_and_the_global_random_state() -> None:
    V = uniform(2, 3, 20, 10)
    before = torch.random.get_rng_state()
    W, H = factorize(V, 2, n_iter=5, seeds=list(range(6)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert W.shape == (2, 3, 20, 2) and H.shape == (2, 3, 2, 10)
    assert kl_divergence(V, W, H).shape == (2, 3)
    assert infer_activations(V, W).shape == (2, 3, 2, 10)


def test_inputs_are_left_as_they_were() -> None:
    V, W0, H0 = uniform(20, 10), uniform(20, 2), uniform(2, 10)
    copies = [x.clone() for x in (V, W0, H0)]
    factorize(V, 2, n_iter=5, W0=W0, H0=H0)
    infer_activations(V, W0, n_iter=5)
    assert all(torch.equal(x, y) for x, y in zip((V, W0, H0), copies, strict=True))


def test_a_silent_clip_gives_zeros_beside_a_sounding_one() -> None:
    V = torch.stack([torch.zeros(30, 20), uniform(30, 20)])
    W, H = factorize(V, 3, n_iter=20)
    assert not W[0].any() and not H[0].any()
    assert torch.equal(W[1].amax(0), torch.ones(3))
    assert kl_divergence(V, W, H)[0] == 0
    assert not infer_activations(V, uniform(2, 30, 3))[0].any()


def test_infer_activations_finds_planted_ones() -> None:
    """With W held the problem is convex; where V = WH with independent columns its minimum is H."""
    planted = planted_bases(3, variation=0.5)
    H = infer_activations(planted.V, planted.W, n_iter=3000)
    assert float((H - planted.H).norm() / planted.H.norm()) < 0.02
    few, more = (
        float(kl_divergence(planted.V, planted.W, infer_activations(planted.V, planted.W, n_iter=n)).sum())
        for n in (5, 6)
    )
    assert more < few


def test_a_start_near_the_solution_saves_updates() -> None:
    """Each frame's level in it means nothing, and what is zero stays zero."""
    planted = planted_bases(3, variation=0.5)
    levels = 10.0 ** torch.arange(-9, 9).repeat(100)[: planted.H.shape[-1]]
    near = planted.H * (1 + 0.1 * uniform(*planted.H.shape)) * levels
    few = infer_activations(planted.V, planted.W, n_iter=2, H0=near)
    many = infer_activations(planted.V, planted.W, n_iter=50)
    assert (few - planted.H).norm() < (many - planted.H).norm()
    near[..., 0, :] = 0
    assert not infer_activations(planted.V, planted.W, n_iter=5, H0=near)[..., 0, :].any()
    with pytest.raises(ValueError, match="H0 is"):
        infer_activations(planted.V, planted.W, H0=near[..., :-1])


def test_one_basis_has_activations_in_closed_form(path: str) -> None:
    """For a single basis the minimum is the ratio of the column sums of V and W."""
    V, W = uniform(30, 20), uniform(30, 1, seed=1)
    expected = V.sum(0, keepdim=True) / W.sum()
    assert torch.allclose(infer_activations(V, W, n_iter=1), expected, rtol=ROUNDING[path])


def test_kl_divergence_is_its_formula_with_its_limits() -> None:
    V, W, H = uniform(2, 30, 20), uniform(2, 30, 3, seed=1), uniform(2, 3, 20, seed=2)
    V[:, 4] = 0
    found = kl_divergence(V, W, H)
    assert found.dtype == torch.float64
    for i in range(2):
        expected = divergence_by_hand(V[i].numpy(), (W[i] @ H[i]).numpy())
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(W @ H, W, H).abs().max()) < 1e-5
    lost = kl_divergence(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1), torch.ones(1, 2))
    assert float(lost) == float("inf")  # V has what WH lacks
    nothing = kl_divergence(torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[3.0, 0.0]]))
    assert float(nothing) == 3  # WH has what V lacks
    assert kl_divergence(torch.tensor([[float("nan")]]), torch.ones(1, 1), torch.ones(1, 1)).isnan()


def test_rows_are_walked_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    V = uniform(2, 70, 15)
    whole = factorize(V, 3, n_iter=10)
    monkeypatch.setattr(kl, "BLOCK", 32)  # two blocks and a shorter one
    pieces = factorize(V, 3, n_iter=10)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole, pieces, strict=True))


def test_acceleration_ends_no_worse() -> None:
    for seed in range(4):
        V = spectrogram(seed)
        exact, accelerated = (
            float(kl_divergence(V, *factorize(V, 8, n_iter=200, seeds=seed, accelerated=a))) for a in (False, True)
        )
        assert accelerated <= 1.002 * exact


def test_acceleration_of_a_batch_with_silence_in_it() -> None:
    V = torch.stack([spectrogram(1), torch.zeros(301, 61), spectrogram(2)])
    W, H = factorize(V, 5, n_iter=60, seeds=[1, 2, 3], accelerated=True)
    assert not W[1].any() and not H[1].any() and torch.isfinite(W).all() and torch.isfinite(H).all()
    alone, _ = factorize(V[2], 5, n_iter=60, seeds=3, accelerated=True)
    assert torch.allclose(W[2], alone, rtol=1e-3, atol=1e-4)
    few = factorize(V[0], 5, n_iter=20, accelerated=True)  # too few to be worth it: the exact ones
    assert torch.equal(few[0], factorize(V[0], 5, n_iter=20)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    V = uniform(3, 200, 60)
    here, there = (factorize(v, 5, n_iter=50, seeds=[1, 2, 3]) for v in (V, V.cuda()))
    assert there[0].is_cuda
    assert torch.allclose(kl_divergence(V, *here), kl_divergence(V, *(x.cpu() for x in there)), rtol=1e-4)


def test_errors_name_the_value_and_the_rule() -> None:
    V = uniform(20, 10)
    for bad in (-1.0, float("nan"), float("inf")):
        broken = V.clone()
        broken[3, 4] = bad
        with pytest.raises(ValueError, match=rf"{bad}.*finite and non-negative: pass abs\(\)"):
            factorize(broken, 2)
        with pytest.raises(ValueError, match="finite and non-negative"):
            infer_activations(V, broken[:, :5])
    for bases in (0, 2.0, "2", None):
        with pytest.raises(ValueError, match=rf"n_bases is {bases!r}; it must be a whole number from 1"):
            factorize(V, bases)
    for n_iter in (-1, 3.0):
        with pytest.raises(ValueError, match=rf"n_iter is {n_iter}; it must be a whole number from 0"):
            factorize(V, 2, n_iter=n_iter)
        with pytest.raises(ValueError, match=rf"n_iter is {n_iter}; it must be a whole number from 0"):
            infer_activations(V, uniform(20, 2), n_iter=n_iter)
    for seed in (1.5, 0.0, np.asarray(1.5), 2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seeds is .*; it must be a whole number from -9223372036854775808"):
            factorize(V, 2, seeds=seed)
    for seeds in ([1.5], "3", np.ones(1)):
        with pytest.raises(ValueError, match=r"a seed is .*; it must be a whole number from -9223372036854775808"):
            factorize(V, 2, seeds=seeds)
    with pytest.raises(ValueError, match=r"3 seeds for 1 clips: give one a clip"):
        factorize(V, 2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"W0 is \(20, 3\); it must be \(20, 2\)"):
        factorize(V, 2, W0=uniform(20, 3))
    with pytest.raises(ValueError, match=r"H0 is \(2, 9\); it must be \(2, 10\)"):
        factorize(V, 2, H0=uniform(2, 9))
    with pytest.raises(ValueError, match=r"W is \(19, 2\); for V \(20, 10\)"):
        infer_activations(V, uniform(19, 2))
    with pytest.raises(ValueError, match=r"shape \(20,\) was given"):
        factorize(V[:, 0], 2)
    with pytest.raises(ValueError, match=r"shape \(20, 0\) was given; it needs at least one"):
        factorize(V[:, :0], 2)
    with pytest.raises(ValueError, match=r"H \(2, 1\); for V \(20, 10\) they don't fit"):
        kl_divergence(V, uniform(20, 2), uniform(2, 1))
