"""A trained network learns another collection's clips, and keeps what it knew."""

import copy
from dataclasses import replace

import pytest
import torch

from avsep.evidence import LabelQuality
from avsep.factors import ExtractionConfig
from avsep.familiarity import Familiarity
from avsep.learning import adapting
from avsep.learning.adapting import AdaptingConfig, Judgement, agreements, halves, invent_bases, judge_half, learn
from avsep.learning.bags import Bags, shuffled_batches
from avsep.learning.training import TrainingConfig, optimiser_for, train_epoch
from avsep.miml import MIML, MeanMIML, basis_posteriors, warp_frequencies
from avsep.model import Model, ModelConfig
from avsep.objects import Vocabulary
from avsep.synthetic import planted_bases

GOOD = LabelQuality.good(4)
CONFIG = AdaptingConfig(epochs=8, learning_rate=1e-2, n_invented=300, invented_per_step=50)
OBJECTS = Vocabulary.from_list([{"name": n, "imagenet": [], "audioset": [], "aliases": []} for n in "abcd"])


def clips(count: int, stretch: float = 1.0, seed: int = 0) -> Bags:
    """Bags of planted bases; another collection's are the same, stretched in frequency."""
    p = planted_bases(240)
    rows = torch.randperm(240, generator=torch.Generator().manual_seed(seed))[:count]
    bases = p.W.mT.reshape(-1, 48)
    bases = warp_frequencies(bases, torch.full((len(bases),), stretch)).reshape(240, 6, 48)[rows]
    energy = ((p.W**2).sum(1) * (p.H**2).sum(2))[rows]
    energy = energy / energy.sum(1, keepdim=True)
    return Bags([f"c{i:03d}" for i in rows.tolist()], bases.half(), energy > 0, energy, p.labels[rows])


@pytest.fixture(scope="module")
def start() -> Model:
    """The mean of two networks, trained on the first collection."""
    networks, known = [], clips(200)
    for seed in (0, 1):
        torch.manual_seed(seed)
        network, config = MIML(48, 4, 2, 32, published_head=False, square_root=True), TrainingConfig(batch_size=32)
        optimiser, _ = optimiser_for(network, replace(config, learning_rate=1e-2))
        for epoch in range(8):
            train_epoch(network, shuffled_batches(known, 32, epoch), optimiser, config, epoch)
        networks.append(network)
    return Model(ModelConfig(OBJECTS, ExtractionConfig(), n_networks=2), MeanMIML(networks).eval())


@pytest.fixture(scope="module")
def own() -> Bags:
    return clips(48, 1.1, seed=1)


def test_clips_of_another_collection_are_heard_better_afterwards(start: Model, own: Bags) -> None:
    both = [judge_half(start, own, GOOD, CONFIG, half) for half in (0, 1)]
    judgement = Judgement.of(*([x for half in both for x in half[when]] for when in (0, 1)))
    assert judgement.better and judgement.clips == 48
    assert judgement.after > judgement.before + 0.1
    network, rows = learn(start, own, GOOD, CONFIG)
    new = clips(100, 1.1, seed=2)
    assert float(agreements(network, new).mean()) > float(agreements(start.network, new).mean()) + 0.1
    assert len(rows) == CONFIG.epochs and rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_have_nothing_to_do_with_the_sound_are_no_gain(start: Model, own: Bags, seed: int) -> None:
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    wrong = replace(own, labels=own.labels[order])
    both = [judge_half(start, wrong, GOOD, CONFIG, half) for half in (0, 1)]
    assert not Judgement.of(*([x for half in both for x in half[when]] for when in (0, 1))).better


def test_to_know_what_is_frequent_is_no_agreement(own: Bags) -> None:
    class Frequent(MIML):
        def _score(self, bases, statistics=None):
            return torch.tensor([3.0, 0.0, 0.0, 0.0]).expand(len(bases), 4)

    assert abs(float(agreements(Frequent(48, 4, hidden=4), own).mean())) < 1e-6


def test_what_it_knew_is_kept(start: Model, own: Bags) -> None:
    """Answers to bases unlike the clips' own change less than without the invented ones."""
    invented, _ = invent_bases(own, 200, seed=9)

    def change(keep: float) -> float:
        network, _ = learn(start, own, GOOD, replace(CONFIG, keep=keep))
        p, q = (basis_posteriors(n.relation(invented[None])) for n in (start.network, network))
        return float((p - q).detach().abs().sum(1).mean())

    assert change(10.0) < 0.7 * change(0.0)


def test_the_start_stays_and_all_follows_from_the_seed(start: Model, own: Bags) -> None:
    before = copy.deepcopy(start.network.state_dict())
    config = replace(CONFIG, epochs=1)
    first, again = (learn(start, own, GOOD, config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(before[k], v) for k, v in start.network.state_dict().items())
    assert all(torch.equal(again[k], v) for k, v in first.items())
    moved = {k for k, v in first.items() if not torch.equal(before[k], v)}
    assert {k.split(".")[1] for k in moved} == {"0", "1"} and not any("running" in k for k in moved)


def test_halves_hold_every_clip_once(own: Bags) -> None:
    first, second = halves(own)
    assert sorted(first.segment_ids + second.segment_ids) == sorted(own.segment_ids)
    assert abs(len(first) - len(second)) <= 1


def test_invented_bases_are_bases(own: Bags) -> None:
    own = replace(own, statistics=torch.rand(*own.valid.shape, 15))
    made, moves = invent_bases(own, 100, seed=3)
    assert made.shape == (100, 48) and moves is not None and moves.shape == (100, 15)
    assert bool((made >= 0).all()) and bool(made.isfinite().all())
    torch.testing.assert_close(made.amax(1), torch.ones(100))
    assert torch.equal(invent_bases(own, 100, seed=3)[0], made)


def test_a_gain_must_be_beyond_its_error() -> None:
    noise = torch.linspace(-1, 1, 20).tolist()
    assert Judgement.of([0.0] * 20, [x + 1 for x in noise]).better
    assert not Judgement.of([0.0] * 20, [x + 0.01 for x in noise]).better
    assert not Judgement.of([0.0] * 20, [0.0] * 20).better
    assert not Judgement.of([0.0] * 5, [1.0] * 5).better  # of fewer than ten clips
    assert not Judgement.of([], []).better


def test_counts_add_up_in_what_a_model_says(start: Model) -> None:
    said = {"clips": 7, "clips_by_label": {"b": 3}, "sources": {"files": 7}, "about": "planted bases"}
    model = replace(start, config=replace(start.config, training=said))
    facts = {"clips": 5, "clips_by_label": {"a": 2, "b": 4}, "sources": {"files": 5}}
    assert adapting.remember(model, model.config, [], facts).config.training == {
        "clips": 12,
        "clips_by_label": {"a": 2, "b": 7},
        "sources": {"files": 12},
        "about": "planted bases; adapted with 5 clips of one's own",
    }


def test_bases_of_own_clips_are_familiar_afterwards() -> None:
    g = torch.Generator().manual_seed(0)

    def factors(lowest: int) -> tuple[torch.Tensor, torch.Tensor]:
        W = torch.zeros(48, 6)
        W[lowest : lowest + 8] = torch.rand(8, 6, generator=g) + 0.1
        return W / W.amax(0), torch.rand(6, 40, generator=g)

    posteriors = torch.full((5, 6), 0.01)
    posteriors[0] = 0.96
    known = Familiarity.learn((*factors(2), posteriors) for _ in range(8))
    assert known is not None
    more = known.with_clips(factors(30) for _ in range(8))
    new, old = factors(30), factors(2)
    assert float(more.distance(*new).mean()) < 0.5 * float(known.distance(*new).mean())
    assert float(more.distance(*old).mean()) <= float(known.distance(*old).mean()) + 1e-6
