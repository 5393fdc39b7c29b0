import math
from pathlib import Path

import pytest
import torch

from avsep.familiarity import Familiarity, deserved, familiarity

N_BINS, N_FRAMES = 201, 60
RNG = torch.Generator().manual_seed(3)


def clip(pitch: float, n_bases: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bases that are peaks near a pitch, in bins, under a random rhythm; two objects share them, half each."""
    centres = pitch * (1 + 0.1 * torch.rand(n_bases, generator=RNG))
    W = (-((torch.arange(N_BINS).unsqueeze(1) - centres) ** 2) / 20).exp()
    H = torch.rand(n_bases, N_FRAMES, generator=RNG)
    posteriors = torch.zeros(3, n_bases)
    posteriors[0, ::2] = posteriors[1, 1::2] = 1.0
    return W, H, posteriors


def learned() -> Familiarity:
    known = Familiarity.learn(clip(40.0) for _ in range(20))
    assert known is not None
    return known


def test_what_is_like_the_training_is_familiar_and_other_sounds_are_not() -> None:
    known = learned()
    fresh = torch.stack([familiarity(known, [clip(40.0)], 2) for _ in range(20)])
    assert float((fresh >= 0.8).float().mean()) > 0.85  # by its definition 0.95, but for the estimate's error
    for strange in (clip(150.0), (torch.rand(N_BINS, 6), *clip(40.0)[1:])):
        assert familiarity(known, [strange], 2).max() < 0.2
    both = familiarity(known, [clip(40.0), clip(150.0)], 2)  # windows of one sound
    assert (both < 0.5).all()


def test_each_object_is_judged_by_its_own_bases() -> None:
    known = learned()
    (W, H, posteriors), (strange, *_) = clip(40.0), clip(150.0)
    W = torch.where(posteriors[1] > 0, strange, W)
    first, second = familiarity(known, [(W, H, posteriors)], 2).tolist()
    assert first > 0.7 and second < 0.2


def test_confidence_is_bounded_by_what_was_learned() -> None:
    """Laplace: after n clips (n + 1) / (n + 2) at most; without any, one half."""
    objects, counts = ("dog", "violin", "cat"), {"dog": 8, "violin": 98}
    full = deserved(torch.ones(3), torch.ones(3), objects, counts)
    assert full.tolist() == pytest.approx([9 / 10, 99 / 100, 1 / 2])
    assert deserved(torch.ones(3), torch.zeros(3), objects, counts).tolist() == pytest.approx([0.5] * 3)
    assert deserved(torch.ones(3), torch.ones(3), objects, None).tolist() == [1.0] * 3  # it doesn't say
    low = deserved(torch.zeros(3), torch.tensor([1.0, 0.6, 1.0]), objects, counts)
    assert low.tolist() == pytest.approx([0.0, 0.2, 0.0])
    confidence = torch.linspace(0, 1, 3)
    assert deserved(confidence, torch.full((3,), 0.5), ("dog",) * 3, counts).tolist() == pytest.approx([0.25, 0.5, 0.7])


def test_a_model_without_training_bases_is_believed_less() -> None:
    assert familiarity(None, [clip(40.0)], 2).tolist() == pytest.approx([0.8, 0.8])
    assert Familiarity.learn([clip(40.0)]) is None  # no other clip to compare with
    assert Familiarity.learn([]) is None


def test_silence_is_no_exception() -> None:
    known = learned()
    silent = (torch.zeros(N_BINS, 6), torch.zeros(6, N_FRAMES), clip(40.0)[2])
    assert familiarity(known, [silent], 2).isfinite().all()
    assert Familiarity.learn([silent, silent]) is None


def test_it_is_written_and_read(tmp_path: Path) -> None:
    known, path = learned(), str(tmp_path / "familiarity.safetensors")
    known.save(path)
    again = Familiarity.load(path)
    W, H, _ = clip(40.0)
    assert torch.allclose(again.distance(W, H), known.distance(W, H), atol=1e-5)
    known.spread = torch.tensor([0.5, math.nan])
    known.save(path)
    with pytest.raises(ValueError, match="NaN"):
        Familiarity.load(path)
    known.features = known.features[:, 1:]
    known.save(path)
    with pytest.raises(ValueError, match="don't fit together"):
        Familiarity.load(path)
