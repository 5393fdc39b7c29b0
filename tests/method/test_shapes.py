"""The axes that avsep/__init__.py names, checked at run time: each call here is held to its annotation."""

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import Complex, Float, Float32, Float64, TypeCheckError, jaxtyped
from torch import Tensor

from avsep import metrics, miml, nmf, separation
from avsep.stft import STFT

checked = jaxtyped(typechecker=beartype)
SMALL = STFT(sample_rate=1000, n_fft=16, hop_length=4)
NDArray = np.ndarray


@checked
def transform(x: Float[Tensor, "*B S"], stft: STFT) -> Complex[Tensor, "*B {stft.n_bins} {stft.n_frames(x.shape[-1])}"]:
    return stft(x)


@checked
def invert(X: Complex[Tensor, "*B F N"], S: int) -> Float[Tensor, "*B {S}"]:
    return SMALL.inverse(X, S)


@checked
def factorize(V: Float[Tensor, "*B F N"], M: int) -> tuple[Float32[Tensor, "*B F {M}"], Float32[Tensor, "*B {M} N"]]:
    return nmf.factorize(V, M, n_iter=2)


@checked
def infer_activations(V: Float[Tensor, "*B F N"], W: Float[Tensor, "*B F M"]) -> Float32[Tensor, "*B M N"]:
    return nmf.infer_activations(V, W, n_iter=2)


@checked
def divergence(
    V: Float[Tensor, "*B F N"], W: Float[Tensor, "*B F M"], H: Float[Tensor, "*B M N"]
) -> Float64[Tensor, "*B"]:
    return nmf.kl_divergence(V, W, H)


@checked
def relate(network: miml.MIML, bases: Float[Tensor, "B M F"]) -> Float[Tensor, "B {network.n_objects} M"]:
    return network.relation(bases)


@checked
def score(network: miml.MIML, bases: Float[Tensor, "B M F"]) -> Float[Tensor, "B {network.n_objects}"]:
    return network(bases)


@checked
def posteriors(relation: Float[Tensor, "*B L M"]) -> Float[Tensor, "*B L+1 M"]:
    return miml.basis_posteriors(relation)


@checked
def masks(V: Float[Tensor, "J F N"]) -> Float[Tensor, "J F N"]:
    return separation.ratio_masks(V)


@checked
def separate(x: Float[Tensor, "S"], masks: Float[Tensor, "J F N"]) -> Float[Tensor, "J S"]:
    return separation.separate(x, masks, SMALL)


@checked
def si_sdr(reference: Float[NDArray, "*B S"], estimate: Float[NDArray, "*B S"]) -> Float64[NDArray, "*B"]:
    return np.asarray(metrics.si_sdr(reference, estimate))


@checked
def bss_eval(
    references: Float[NDArray, "J S"], estimates: Float[NDArray, "*B J S"]
) -> tuple[Float64[NDArray, "*B J"], Float64[NDArray, "*B J"], Float64[NDArray, "*B J"]]:
    found = metrics.bss_eval(references, estimates, filter_length=4)
    return found.sdr, found.sir, found.sar


@pytest.mark.parametrize("B", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("S", [8, 33])
def test_stft_and_nmf_take_any_batch(B: tuple[int, ...], S: int) -> None:
    X = transform(torch.randn(*B, S), SMALL)
    invert(X, S)
    W, H = factorize(X.abs(), 5)
    divergence(X.abs(), W, infer_activations(X.abs(), W))
    assert H.shape == (*B, 5, SMALL.n_frames(S))


@pytest.mark.parametrize(("B", "M"), [(1, 1), (3, 7)])
def test_the_network_maps_bags_to_relations_and_scores(B: int, M: int) -> None:
    network = miml.MIML(20, 5, 3, 16).eval()
    bases = torch.rand(B, M, 20)
    posteriors(relate(network, bases))
    score(network, bases)


@pytest.mark.parametrize("J", [1, 2, 4])
def test_masks_and_estimates_go_by_source(J: int) -> None:
    x = torch.randn(40)
    separate(x, masks(torch.rand(J, *SMALL(x).shape)))


@pytest.mark.parametrize("B", [(), (2,), (2, 3)])
@pytest.mark.parametrize("J", [1, 3])
def test_metrics_go_by_source_and_batch(B: tuple[int, ...], J: int) -> None:
    rng = np.random.default_rng(0)
    references, estimates = rng.standard_normal((J, 50)), rng.standard_normal((*B, J, 50))
    bss_eval(references, estimates)
    si_sdr(np.broadcast_to(references, estimates.shape), estimates)


def test_a_wrong_axis_is_seen() -> None:
    @checked
    def transposed(bases: Float[Tensor, "B M F"]) -> Float[Tensor, "B M L"]:
        return miml.MIML(20, 5, 3, 16).eval().relation(bases)

    with pytest.raises(TypeCheckError):
        transposed(torch.rand(2, 7, 20))
