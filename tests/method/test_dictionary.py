import random
from pathlib import Path

import numpy as np
import pytest
import torch

from avsep.dictionary import BasisDictionary, Candidate, candidate_bases, select_bases
from avsep.miml import MIML, basis_posteriors
from avsep.objects import OBJECT_NAMES, multi_hot, object_index
from avsep.records import ClipRecord

DOG, VIOLIN = object_index("dog"), object_index("violin")
F = 23  # as many bins as objects: bin f stands for object f


def network() -> MIML:
    """A network whose relation map is known: object f's score is 40 × the basis's bin f − 20."""
    model = MIML(F, 23, 1, F, published_head=False).eval()
    with torch.no_grad():
        for layer in (model.shared[0], model.subconcepts):
            layer.weight.copy_(torch.eye(F))
            layer.bias.zero_()
        model.subconcepts.weight.mul_(40)
        model.subconcepts.bias.fill_(-20)
    return model


def record(bases: np.ndarray, energy: list[float], segment_id: str = "a") -> ClipRecord:
    n = bases.shape[1]
    return ClipRecord(
        segment_id, "a.mp4", 0.0, None, "train", None, None, bases.astype(np.float16),
        np.ones((n, 4), np.float16), 1.0, np.asarray(energy, np.float32), None, 0.0, 10.0, -20.0, "", "given",
    )  # fmt: skip


def bases_of(*objects: int) -> np.ndarray:
    return np.eye(F)[:, list(objects)]


def candidate(score: float, segment_id: str = "a", index: int = DOG) -> Candidate:
    return Candidate(index, score, segment_id, np.full(F, score, np.float16))


def test_the_network_of_these_tests_is_what_it_says() -> None:
    relation = network().relation(torch.from_numpy(bases_of(DOG, VIOLIN).T.astype(np.float32))[None])[0]
    assert relation[DOG].tolist() == pytest.approx([20, -20], abs=1e-3)
    assert relation[:, 1].argmax() == VIOLIN


def test_select_bases_takes_what_picture_and_posterior_agree_on() -> None:
    posteriors = torch.tensor([[[0.6, 0.5, 0.2, 0.1], [0.3, 0.4, 0.7, 0.1], [0.1, 0.1, 0.1, 0.8]]])  # noise is last
    present = torch.tensor([[True, True]])
    assert select_bases(posteriors, present).int().tolist() == [[[1, 1, 0, 0], [0, 0, 1, 0]]]
    assert select_bases(posteriors, torch.tensor([[False, True]])).int().tolist() == [[[0] * 4, [0, 0, 1, 0]]]
    assert select_bases(posteriors, present, 0.65).int().tolist() == [[[0] * 4, [0, 0, 1, 0]]]


def test_above_one_half_a_basis_belongs_to_one_object_at_most() -> None:
    posteriors = basis_posteriors(3 * torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)))
    chosen = select_bases(posteriors, torch.ones(4, 6, dtype=torch.bool), 0.5)
    assert chosen.sum(1).max() == 1 and chosen.any()


def test_candidates_are_the_visible_objects_sure_and_sounding_bases() -> None:
    clip = record(bases_of(DOG, VIOLIN, DOG, 5, DOG), [0.36, 0.25, 0.04, 0.35, 0.0])
    found = candidate_bases(network(), clip, multi_hot(["dog", "banjo"]))
    assert [(c.object_index, c.segment_id) for c in found] == [(DOG, "a")] * 2  # violin unseen, 5 unseen, one silent
    assert [c.score for c in found] == pytest.approx([0.6, 0.2], abs=1e-3)  # posterior × root of energy
    assert found[0].basis.dtype == np.float16 and found[0].basis.argmax() == DOG
    assert candidate_bases(network(), clip, multi_hot([])) == []


def test_no_clip_dominates() -> None:
    clip = record(bases_of(*[DOG] * 8), [1 / 8] * 8)
    assert len(candidate_bases(network(), clip, multi_hot(["dog"]))) == 5
    assert len(candidate_bases(network(), clip, multi_hot(["dog"]), per_clip=2)) == 2


def test_unsure_bases_are_not_offered() -> None:
    """A basis half dog, half violin has posterior one half for each."""
    clip = record(bases_of(DOG) + bases_of(VIOLIN), [1.0])
    assert candidate_bases(network(), clip, multi_hot(["dog", "violin"])) == []
    assert len(candidate_bases(network(), clip, multi_hot(["dog", "violin"]), threshold=0.4)) == 2


def test_collect_keeps_the_best_in_any_order_of_arrival() -> None:
    offered = [candidate(i / 1000, f"s{i}") for i in range(100)] + [candidate(0.5, "v", VIOLIN)]
    kept = BasisDictionary.collect(offered, OBJECT_NAMES, per_object=7)
    assert kept.counts() == {"dog": 7, "violin": 1}
    assert list(kept.bases) == [n for n in OBJECT_NAMES if n in ("dog", "violin")]
    assert kept.bases["dog"].shape == (F, 7) and kept.bases["dog"].dtype == torch.float32
    assert kept.bases["dog"][0].tolist() == pytest.approx([i / 1000 for i in range(99, 92, -1)], rel=1e-3)
    random.Random(0).shuffle(offered)
    shuffled = BasisDictionary.collect(iter(offered), OBJECT_NAMES, per_object=7)
    assert all(torch.equal(W, kept.bases[n]) for n, W in shuffled.bases.items())
    assert BasisDictionary.collect([], OBJECT_NAMES).bases == {}


def test_a_dictionary_is_saved_and_loaded(tmp_path: Path) -> None:
    dictionary = BasisDictionary({"dog": torch.rand(F, 3), "violin": torch.rand(F, 1)})
    path = str(tmp_path / "dictionary.safetensors")
    dictionary.save(path)
    back = BasisDictionary.load(path)
    assert back.counts() == {"dog": 3, "violin": 1}
    for name, W in dictionary.bases.items():
        assert back.bases[name].dtype == torch.float32
        assert torch.allclose(back.bases[name], W, rtol=1e-3, atol=1e-4)  # stored as float16
