import base64
import copy
import gc
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from avsep.context import BasisContext
from avsep.dictionary import BasisDictionary
from avsep.edits import Edits
from avsep.evidence import Evidence
from avsep.factors import Factors
from avsep.miml import basis_posteriors
from avsep.model import (
    Model,
    ModelConfig,
    SeparationConfig,
    add_training_facts,
    describe_training,
)
from avsep.objects import OBJECT_NAMES
from avsep.records import ClipError
from avsep.separation import Separator, at_least, basis_shares, ratio_masks, separate
from avsep.separation.assigned import AssignedWindow
from avsep.separation.masks import levelled, rest_at_most
from avsep.separation.trained import Bounds
from avsep.stft import STFT
from tests.support.tones import DOG, PITCH, RATE, SMALL, VIOLIN, model, tone


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def gain(reference: torch.Tensor, estimate: torch.Tensor) -> float:
    """How far the error lies under the reference, in dB."""
    return float(10 * torch.log10((reference**2).sum() / ((estimate - reference) ** 2).sum()))


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("level", [1e-30, 1.0, 1e30])
def test_ratio_masks_sum_to_one(power: float, level: float) -> None:
    V = level * uniform(3, 8, 9)
    V[:, 2] = 0
    masks = ratio_masks(V, power)
    assert torch.allclose(masks.sum(0), torch.ones(8, 9), atol=1e-6)
    assert (masks >= 0).all() and (masks <= 1).all()
    assert torch.equal(masks[:, 2], torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 9))  # silence is the rest's


def test_ratio_masks_by_hand() -> None:
    V = torch.tensor([[[1.0]], [[3.0]]])
    assert ratio_masks(V).flatten().tolist() == pytest.approx([0.25, 0.75])
    assert ratio_masks(V, 2.0).flatten().tolist() == pytest.approx([0.1, 0.9])
    assert V.flatten().tolist() == [1, 3]


def test_separate_keeps_the_phase_and_adds_up() -> None:
    x = torch.randn(1234, generator=torch.Generator().manual_seed(0))
    masks = ratio_masks(uniform(3, *SMALL(x).shape))
    parts = separate(x, masks, SMALL)
    assert parts.shape == (3, 1234)
    assert torch.allclose(parts.sum(0), x, atol=1e-5)
    assert torch.allclose(separate(x, torch.full_like(masks[:1], 0.25), SMALL)[0], x / 4, atol=1e-6)


# ------------------------------------------------------------------------------- basis shares


def test_soft_shares_sum_to_one_for_each_basis() -> None:
    relation = 3 * torch.randn(23, 40, generator=torch.Generator().manual_seed(0))
    for objects in ([DOG, VIOLIN], [5], list(range(23)), []):
        for config in (SeparationConfig(), SeparationConfig(posterior_power=2.0, rest_below=0.1)):
            shares = basis_shares(relation, objects, config)
            assert shares.shape == (len(objects) + 1, 40)
            assert torch.allclose(shares.sum(0), torch.ones(40), atol=1e-5) and (shares >= 0).all()
    assert torch.equal(basis_shares(relation, [], SeparationConfig())[0], torch.ones(40))  # all is rest


def test_soft_shares_are_in_proportion_to_the_posteriors() -> None:
    relation = 2 * torch.randn(23, 10, generator=torch.Generator().manual_seed(1))
    posteriors = basis_posteriors(relation[None])[0]
    own = basis_shares(relation, [DOG, VIOLIN], SeparationConfig(posterior_power=1.0, rest_below=0.0))[:-1]
    assert torch.allclose(own[0] / own[1], posteriors[DOG] / posteriors[VIOLIN], rtol=1e-4)
    sharp = basis_shares(relation, [DOG, VIOLIN], SeparationConfig(posterior_power=2.0, rest_below=0.0))[:-1]
    assert torch.allclose(sharp[0] / sharp[1], (own[0] / own[1]) ** 2, rtol=1e-4)


def test_shares_by_threshold_are_the_published_ones() -> None:
    """An object takes each basis of half its largest score or more; two may take one, the rest none."""
    relation = torch.zeros(23, 4)
    relation[DOG], relation[VIOLIN] = torch.tensor([2.0, 1.0, 0.9, 0.0]), torch.tensor([0.0, 3.0, 1.4, 1.5])
    shares = basis_shares(relation, [DOG, VIOLIN], SeparationConfig(assignment="threshold"))
    assert shares.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


# ---------------------------------------------------------------------------------- separator


def test_the_network_of_these_tests_separates_its_tones() -> None:
    dog, violin = tone(DOG, 3.0), tone(VIOLIN, 3.0, 2.0)
    found = Separator(model())(dog + violin, ["dog", "violin"])
    assert found.objects == ("dog", "violin") and found.silent == ()
    assert gain(dog, found.estimates[0]) > 12 and gain(violin, found.estimates[1]) > 12
    assert found.sound_scores["dog"] + found.sound_scores["violin"] > 0.99
    named = Separator(model())(dog + violin, ["violin", "dog"])
    assert torch.allclose(named.estimates, found.estimates.flip(0), atol=1e-5)  # in the order asked for


LENGTHS = [1, 99, 100, 150, 1999, 4000, 5999, 6000, 6001, 9999, 13_037]  # a window has 4000


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("assignment", ["soft", "threshold"])
def test_estimates_and_rest_add_up_to_the_mixture_for_any_length(length: int, assignment: str) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(length))
    found = Separator(model(assignment=assignment, n_iter=5))(x.numpy(), ["dog", "violin"])
    assert found.estimates.shape == (2, length) and found.rest.shape == (length,)
    assert found.estimates.dtype == torch.float32
    error = (found.estimates.sum(0) + found.rest - x).norm() / x.norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("bases", ["learned", "both"])
def test_learned_bases_separate_and_add_up_too(bases: str) -> None:
    dog, violin = tone(DOG, 4.5), tone(VIOLIN, 4.5, 2.0)
    W = torch.zeros(SMALL.n_bins, 2)
    for column, hz in enumerate(PITCH.values()):
        k = hz // 10
        W[k - 1 : k + 2, column] = torch.tensor([0.5, 1.0, 0.5])
    trained = model(bases=bases)
    trained.dictionary = BasisDictionary({"dog": W[:, :1], "violin": W[:, 1:]})
    found = Separator(trained)(dog + violin, ["dog", "violin"])
    assert gain(dog, found.estimates[0]) > 12 and gain(violin, found.estimates[1]) > 12
    assert torch.allclose(found.estimates.sum(0) + found.rest, dog + violin, atol=1e-5)
    trained.dictionary = BasisDictionary({"dog": W[:, :1]})  # the violin was never collected: its own bases serve
    found = Separator(trained)(dog + violin, ["dog", "violin"])
    assert gain(violin, found.estimates[1]) > 12


def test_fine_masks_tell_close_partials_apart_better() -> None:
    """45 Hz apart is about a main lobe of the factors' windows; the masks' windows are half as long again."""
    t = torch.arange(4 * RATE) / RATE
    dog = torch.sin(2 * math.pi * 430 * t) * (1 + torch.sin(2 * math.pi * 0.7 * t))
    violin = torch.sin(2 * math.pi * 475 * t) * (1 + torch.sin(2 * math.pi * 1.1 * t + 2))
    coarse, fine = (Separator(model(fine_masks=fine)) for fine in (False, True))
    assert fine.mask_stft == STFT(RATE, 300, 75) and coarse.mask_stft == SMALL
    before, after = (s(dog + violin, ["dog", "violin"]).estimates for s in (coarse, fine))
    assert gain(dog, after[0]) > gain(dog, before[0]) + 0.5 and gain(violin, after[1]) > gain(violin, before[1]) + 0.5
    masks = fine.masks(dog + violin, fine.analyse(dog + violin), [DOG, VIOLIN])
    assert masks.shape == (3, *fine.mask_stft(dog).shape)
    assert torch.allclose(masks.sum(0), torch.ones(()), atol=1e-6)


def test_windows_do_not_depend_on_how_the_sound_arrives() -> None:
    x = (tone(DOG, 7.3) + tone(VIOLIN, 7.3, 2.0)).numpy()
    separator = Separator(model())

    def parts(sizes: int) -> np.ndarray:
        blocks = [x[i : i + sizes] for i in range(0, len(x), sizes)]
        plan = separator.plan(blocks, ["dog", "violin"])
        assert plan.n_samples == len(x)
        return np.concatenate(list(plan.render(blocks)), 1)

    whole = parts(len(x))
    assert whole.shape == (3, len(x))
    assert np.array_equal(parts(1000), whole) and np.array_equal(parts(7777), whole)


def test_no_window_leaves_a_seam() -> None:
    """Cross-fades keep a steady tone steady."""
    t = torch.arange(int(9.1 * RATE)) / RATE
    steady = torch.sin(2 * math.pi * PITCH[DOG] * t)
    found = Separator(model())(steady, ["dog"])
    inside = slice(200, -200)
    assert float((found.estimates[0] - steady)[inside].abs().max()) < 0.02


def test_a_silent_clip_gives_zeros() -> None:
    for objects in (["dog", "violin"], None):
        found = Separator(model())(torch.zeros(5000), objects)
        assert not found.estimates.any() and not found.rest.any()
        assert found.silent == found.objects and not any(found.sound_scores.values())


def test_an_object_that_is_visible_but_silent_is_said_to_be() -> None:
    dog = tone(DOG, 3.0)
    for assignment in ("soft", "threshold"):
        found = Separator(model(assignment=assignment))(dog, seen=["violin", "dog"])
        assert found.silent == ("violin",) and not found.estimates[0].any()
        assert gain(dog, found.estimates[1]) > 20


def test_what_pictures_hardly_show_is_there_where_it_is_clearly_heard() -> None:
    """A violin that no picture shows for certain: its score tips the scale, and sound alone doesn't."""
    trained = model()
    trained.config = replace(
        trained.config,
        evidence=Evidence(1.0, 0.0, picture_slope=1.0, picture_offset=1.5),
        separation=replace(trained.config.separation, silent_share=0.9),  # what is believed sounds, whatever its share
    )
    both = [(tone(DOG, 3.0) + tone(VIOLIN, 3.0)).numpy()]
    separator = Separator(trained)
    sure, doubtful = {"dog": 0.9, "violin": 0.4}, {"dog": 0.9, "violin": 0.02, "cat": 0.4}
    assert separator.plan(both, seen=["dog"], scores=sure).objects == ("dog", "violin")
    assert separator.plan(both, seen=["dog"], scores=sure).silent == ()
    for scores in (None, doubtful):  # a cat that isn't heard isn't there either
        assert separator.plan(both, seen=["dog"], scores=scores).objects == ("dog",)


@pytest.mark.parametrize("seconds", [3.0, 9.0])  # one window; several
def test_an_object_that_is_named_is_there_though_the_model_does_not_know_its_sound(seconds: float) -> None:
    """Its part is taken from what the others claim least, and the doubt is told."""
    both = tone(DOG, seconds) + tone(VIOLIN, seconds, 2.0)
    separator = Separator(model())
    plan = separator.plan([both.numpy()], ["dog", "violin", "cat"])
    parts = np.concatenate(list(plan.render([both.numpy()])), 1)
    assert plan.silent == () and parts[2].any()
    assert set(plan.doubts) == {"cat"} and "named" in plan.doubts["cat"]
    assert np.allclose(parts.sum(0), both, atol=1e-5)
    assert separator(both, ["dog", "violin"]).silent == ()
    assert separator.plan([both.numpy()], seen=["dog", "cat"]).silent == ("cat",)  # nobody named it


def test_shares_are_raised_to_the_least_and_no_further() -> None:
    shares = torch.tensor([[0.9, 0.8, 0.98], [0.0999, 0.19, 1e-9], [1e-4, 1e-2, 0.02]])  # two objects, the rest
    energy = torch.tensor([0.2, 0.2, 0.6])
    raised = at_least(shares, energy, torch.tensor([0.3, 0.3]))
    assert torch.allclose(raised.sum(0), shares.sum(0), atol=1e-6)
    assert float(raised[1] @ energy) == pytest.approx(0.3, abs=2e-3)
    assert float(raised[1, 1]) > float(raised[1, 0]) > float(raised[1, 2])  # where it was likeliest
    assert torch.equal(at_least(shares, energy, torch.tensor([0.05, 0.05])), shares)


@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_doubted_objects_claims_are_levelled_before_the_bases_vote(pull: float) -> None:
    """Parts go with `p ** (1 - pull)`, and each basis stays whose it was likeliest."""
    claims = torch.tensor([[3.0, 2.0, 1.0, 2.5], [0.5, -1.0, 0.0, -2.0]])  # of two objects on four bases, as logs
    rest, energy = torch.full((1, 4), 0.2), torch.tensor([0.4, 0.3, 0.2, 0.1])

    def votes(log_weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.8 * (claims + log_weights[:, None]).softmax(0), rest])

    before, after = votes(torch.zeros(2)), levelled(votes, energy, 2, pull)[0]
    odds = [float((s[0] @ energy) / (s[1] @ energy)) for s in (before, after)]
    assert odds[0] > 5
    assert odds[1] == pytest.approx(odds[0] ** (1 - pull), rel=0.03)
    assert torch.allclose(after.sum(0), torch.ones(4))
    assert (after[1] / after[0]).argsort().tolist() == (before[1] / before[0]).argsort().tolist()


def test_votes_that_tip_over_leave_the_nearest_round() -> None:
    """However far a weight goes, one of two objects gets nearly all."""
    asked: list[float] = []

    def votes(log_weights: torch.Tensor) -> torch.Tensor:
        asked.append(0.8 if float(log_weights[1] - log_weights[0]) < 0.6 else 0.1)
        return torch.tensor([[asked[-1]], [1 - asked[-1]], [0.0]])

    first = levelled(votes, torch.ones(1), 2, 0.5)[0][0]
    assert float(first) == pytest.approx(0.8)  # of .8 and .1 it is nearer to two thirds
    assert 0.1 in asked


def test_only_a_model_that_is_not_sure_levels() -> None:
    trained = model()
    window = Separator(trained).analyse(tone(DOG, 3.0) + tone(VIOLIN, 3.0, 0.3))
    energy, index = window.factors.basis_energy, [trained.config.objects.index(n) for n in ("dog", "violin")]

    def parts(levelling: float, bounds: Bounds | None) -> list[float]:
        config = replace(trained.config.separation, levelling=levelling)
        return (Separator(trained, config).shares(window, index, bounds) @ energy).tolist()

    sure, doubted = parts(0.5, None), parts(0.5, Bounds(None, 1.0))
    assert sure == parts(0.0, None) == pytest.approx(parts(0.0, Bounds(None, 1.0)), abs=1e-6)
    assert sure[0] > doubted[0] > doubted[1] > sure[1]


def test_the_rest_is_bounded_and_columns_keep_their_sums() -> None:
    shares = torch.tensor([[0.6, 0.0, 0.1], [0.2, 0.0, 0.1], [0.2, 1.0, 0.8]])  # two objects, the rest
    energy = torch.tensor([0.2, 0.2, 0.6])  # of which the rest has .72
    less = rest_at_most(shares, energy, 0.36)
    assert torch.allclose(less.sum(0), torch.ones(3), atol=1e-6)
    assert torch.allclose(less[-1], torch.tensor([0.1, 0.5, 0.4]))
    assert torch.allclose(less[:2, 0] / less[1, 0], torch.tensor([3.0, 1.0]))  # as they were
    assert torch.allclose(less[:2, 1], torch.tensor([0.25, 0.25]))  # they had nothing
    assert torch.equal(rest_at_most(shares, energy, 0.8), shares)


@pytest.mark.parametrize(("named", "at_most"), [(["dog", "cat"], 1 / 3), (["dog", "cat", "frog"], 1 / 4)])
def test_several_named_objects_that_are_doubted_leave_the_rest_an_equal_part(named: list[str], at_most: float) -> None:
    """The model hears a violin, which nobody named: it may be one of those that it doesn't hear."""
    trained = model()
    trained.context = BasisContext().eval()
    both = [(tone(DOG, 3.0) + tone(VIOLIN, 3.0, 2.0)).numpy()]
    separator = Separator(trained)

    def rest(objects: list[str]) -> float:
        return rest_of(separator.plan(both, objects).assign(0))

    def rest_of(window: AssignedWindow) -> float:
        energy = window.factors.basis_energy
        return float(window.shares[-1] @ energy / energy.sum())

    assert rest(["dog"]) > 0.4  # a single one: the violin is the rest, whole
    assert rest(named) < at_most + 0.02
    trained.config = replace(trained.config, evidence=Evidence(0.1, 1.0))  # it is a little sure of whatever is seen
    decided = separator.plan(both, seen=named)
    assert decided.silent == ()
    assert rest_of(decided.assign(0)) < at_most + 0.02


def test_what_no_named_object_explains_goes_to_the_rest() -> None:
    """A violin that nobody asked for is no part of the dog."""
    trained = model()
    trained.context = BasisContext().eval()
    dog, violin = tone(DOG, 3.0), tone(VIOLIN, 3.0, 2.0)
    found = Separator(trained)(dog + violin, ["dog"])
    assert gain(dog, found.estimates[0]) > 12 and gain(violin, found.rest) > 12
    both = Separator(trained)(dog + violin, ["dog", "violin"])
    assert gain(violin, both.estimates[1]) > 12 and float(both.rest.norm() / violin.norm()) < 0.1


def test_an_object_heard_in_one_half_is_silent_in_the_other() -> None:
    dog, violin = tone(DOG, 8.0), tone(VIOLIN, 8.0, 2.0)
    dog[: 4 * RATE], violin[4 * RATE :] = 0, 0
    found = Separator(model())(dog + violin, ["dog", "violin"])
    assert found.silent == ()
    assert not found.estimates[0, : 2 * RATE].any() and not found.estimates[1, 6 * RATE :].any()
    assert gain(dog, found.estimates[0]) > 15 and gain(violin, found.estimates[1]) > 15


@pytest.mark.parametrize("named", [None, ["dog", "violin"]])
def test_an_object_of_one_window_is_found_in_a_long_sound(named: list[str] | None) -> None:
    """Two seconds of three minutes: less than an object must have of the whole to be heard."""
    dog, violin = tone(DOG, 180.0), tone(VIOLIN, 180.0, 2.0)
    violin[: 30 * RATE], violin[32 * RATE :] = 0, 0
    found = Separator(model())(dog + violin, named)
    assert found.objects == ("dog", "violin") and found.silent == ()
    assert found.sound_scores["violin"] < 0.02
    violin_found = found.estimates[1]
    assert not violin_found[: 27 * RATE].any() and not violin_found[35 * RATE :].any()
    assert gain(violin, violin_found) > 10


def test_pictures_and_sound_are_weighed() -> None:
    """The pictures show dog and cat, and the violin is heard (METHOD.md's banjo and guitar)."""
    x = tone(DOG, 3.0) + tone(VIOLIN, 3.0, 2.0)
    found = Separator(model())(x, seen=["dog", "cat"])
    assert found.objects == ("dog", "cat", "violin")
    assert found.silent == ("cat",) and not found.estimates[1].any()
    sure = found.confidence
    assert sure["dog"] > 0.5 > sure["violin"] > 0.3 > sure["cat"]  # of the unseen violin no more is claimed
    published = Separator(model(assignment="threshold"))(x, seen=["dog", "cat"])
    assert published.objects == ("dog", "cat")  # it believes the pictures


def test_several_factorisations_stand_side_by_side() -> None:
    x = tone(DOG, 2.0) + tone(VIOLIN, 2.0, 2.0)
    three = Separator(model(n_factorizations=3))
    window = three.analyse(x)
    assert window.factors.W.shape[1] == window.relation.shape[1] == 18
    V = three.stft(x).abs()
    assert float((window.factors.W @ window.factors.H - V).norm() / V.norm()) < 0.1  # they add up to one mixture
    trained = model()
    trained.context = BasisContext().eval()
    assert torch.allclose(Separator(trained).shares(window, [DOG, VIOLIN]).sum(0), torch.ones(18), atol=1e-5)


def test_a_second_look_divides_bases_that_two_objects_share() -> None:
    """Six partials with rhythms of their own, and four bases."""

    def chord(hz: Sequence[int], rhythms: Sequence[float], late: float) -> torch.Tensor:
        t = torch.arange(4 * RATE) / RATE
        beats = enumerate(zip(hz, rhythms, strict=True))
        return sum(
            torch.sin(2 * math.pi * f * t) * (torch.sin(2 * math.pi * r * t + k + late) > 0) for k, (f, r) in beats
        )

    def snr(true: torch.Tensor, found: torch.Tensor) -> float:
        return float(10 * torch.log10(true.square().sum() / (true - found).square().sum()))

    gains = []
    for k in range(6):
        dog, violin = chord((150, 230, 310), (1 + 0.1 * k, 1.7, 2.3), 0.0), chord((600, 720, 840), (1.1, 1.6, 2.9), 0.5)
        figures = []
        for second_look in (False, True):
            trained = model(second_look=second_look)
            trained.config = replace(trained.config, extraction=replace(trained.config.extraction, n_bases=4))
            found = Separator(trained)(dog + violin, ["dog", "violin"]).estimates
            figures.append(snr(dog, found[0]) + snr(violin, found[1]))
        gains.append((figures[1] - figures[0]) / 2)
    assert sum(gains) / 6 > 0.8 and min(gains) > -0.5, gains


@pytest.mark.parametrize("bounds", [None, Bounds(None, 1.0)])
def test_bases_of_a_part_lean_to_its_object_and_raised_claims_stay(bounds: Bounds | None) -> None:
    """By two in log odds, over what the network says of the part's bases by themselves."""
    trained = model(posterior_power=1.0, rest_below=0.0)
    with torch.no_grad():
        trained.network.subconcepts.weight[DOG, 0] = trained.network.subconcepts.weight[VIOLIN, 1] = 0.3
        trained.network.subconcepts.bias[[DOG, VIOLIN]] = torch.tensor([5.0, 4.0])
    separator, x, index = Separator(trained), tone(DOG, 3.0) + tone(VIOLIN, 3.0, 2.0), [DOG, VIOLIN]

    def odds(shares: torch.Tensor) -> torch.Tensor:
        return (shares[0] / shares[1]).log()

    window = separator.analyse(x)
    found = separator.assign(x, window, index, bounds)
    raised = odds(found.shares[:, : found.n_whole]) - odds(separator.shares(window, index))
    assert torch.allclose(raised, raised.mean(), atol=1e-3) and (raised.mean() < -0.1) == (bounds is not None)
    for owner, sign in ((0, 1), (1, -1)):
        of_part = slice(found.n_whole + 6 * owner, found.n_whole + 6 * owner + 6)
        factors = Factors(found.factors.W[:, of_part], found.factors.H[of_part], 0.0)
        bare = separator.shares(replace(window, factors=factors, relation=found.relation[:, of_part]), index)
        leans = odds(found.shares[:, of_part]) - odds(bare)
        assert torch.allclose(leans, raised.mean() + 2.0 * sign, atol=1e-3)


def test_bounds_hold_over_the_bases_of_both_looks() -> None:
    separator, x = Separator(model()), tone(DOG, 3.0)
    found = separator.assign(x, separator.analyse(x), [DOG, VIOLIN], Bounds(torch.tensor([0.0, 0.3]), 0.1))
    energy = found.factors.basis_energy / found.factors.basis_energy.sum()
    assert found.shares.shape[1] > found.n_whole
    assert found.shares[1] @ energy >= 0.29 and found.shares[-1] @ energy <= 0.11


def test_without_names_it_separates_what_it_hears() -> None:
    found = Separator(model())(tone(VIOLIN, 3.0))
    assert found.objects == ("violin",)
    both = Separator(model())(tone(VIOLIN, 3.0) + tone(DOG, 3.0, 2.0))
    assert both.objects == ("dog", "violin")


def test_the_same_sound_gives_the_same_estimates() -> None:
    x = torch.randn(7000, generator=torch.Generator().manual_seed(3))
    one, other = (Separator(model())(x, ["dog"]) for _ in range(2))
    assert torch.equal(one.estimates, other.estimates)


def test_objects_are_taken_by_other_names() -> None:
    separator = Separator(model())
    assert separator(tone(DOG, 1.0), ["Puppies", "fiddle"]).objects == ("dog", "violin")
    with pytest.raises(ValueError, match="objects are fiddle, violin; name each once"):
        separator(tone(DOG, 1.0), ["fiddle", "violin"])


def test_errors_name_the_value_and_the_remedy() -> None:
    separator = Separator(model())
    with pytest.raises(ValueError, match="unknown object 'tuba'; the objects are cat"):
        separator(torch.ones(500), ["tuba"])
    with pytest.raises(ValueError, match="no sample to separate"):
        separator(torch.ones(0), ["dog"])
    for sound, message in (
        (torch.ones(2, 500), r"the waveform is \(2, 500\); \(S,\) is needed"),
        (torch.full((500,), torch.nan), "the waveform holds NaN, infinity"),
        (torch.full((500,), 1e18), "samples above 1e\\+10"),
    ):
        with pytest.raises(ValueError, match=message):
            separator(sound, ["dog"])
    with pytest.raises(ValueError, match=r"masks are \(2, 5, 1\); they must be \(J, 5, "):
        separate(torch.ones(500), torch.ones(2, 5, 1), STFT(sample_rate=8000, n_fft=8, hop_length=4))
    with pytest.raises(ValueError, match="objects are 'dog'; give a list of names"):
        separator(torch.ones(500), "dog")
    with pytest.raises(ValueError, match="objects are dog, dog; name each once"):
        separator(torch.ones(500), ["dog", "dog"])
    with pytest.raises(ValueError, match=r"the model has no dictionary: run pipelines.collect"):
        Separator(model(bases="both"))
    with pytest.raises(ValueError, match="assignment is 'hard'; it is soft or threshold"):
        SeparationConfig(assignment="hard")
    with pytest.raises(ValueError, match="bases is 'all'; it is own, learned or both"):
        SeparationConfig(bases="all")


# ----------------------------------------------------------------------------- model directory


def test_a_model_directory_brings_everything_back(tmp_path: Path) -> None:
    trained = model()
    trained.dictionary = BasisDictionary({"dog": torch.ones(SMALL.n_bins, 2)})
    trained.save(str(tmp_path / "model"))
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert names == ["config.json", "dictionary.safetensors", "miml.safetensors"]
    back = Model.load(tmp_path / "model")
    assert back.config == trained.config and not back.network.training
    assert back.dictionary is not None and back.dictionary.counts() == {"dog": 2}
    x = tone(DOG, 2.0) + tone(VIOLIN, 2.0)
    loaded = Separator.load(str(tmp_path / "model"))(x, ["dog", "violin"])
    assert torch.equal(loaded.estimates, Separator(trained)(x, ["dog", "violin"]).estimates)


def test_config_json_holds_what_a_reader_needs(tmp_path: Path) -> None:
    model().save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["extraction"]["stft"] == {"sample_rate": RATE, "n_fft": 200, "hop_length": 100}
    assert config["extraction"]["n_bases"] == 6 and [o["name"] for o in config["vocabulary"]] == list(OBJECT_NAMES)
    assert config["format"] == 4
    assert config["network"]["n_subconcepts"] == 1 and config["labels"]["threshold"] == 0.3
    assert config["labeller"] == {"architecture": "resnet152", "sha256": None}


def test_what_is_no_model_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give the model folder"):
        Model.load(str(tmp_path))
    good = tmp_path / "good"
    model().save(str(good))
    whole = {p.name: p.read_bytes() for p in good.iterdir()}
    config = json.loads(whole["config.json"])
    network, bases = safetensors.torch.load(whole["miml.safetensors"]), torch.ones(SMALL.n_bins, 2)
    damaged = network | {"subconcepts.bias": torch.full_like(network["subconcepts.bias"], torch.nan)}
    for name, content, reason in (
        ("config.json", b"{", "Expecting"),
        ("config.json", b"[" * 100_000, "recursion"),
        ("config.json", json.dumps(config | {"format": 99}).encode(), "its format is 99"),
        ("config.json", json.dumps(config | {"format": 3}).encode(), "its format is 3"),
        ("config.json", json.dumps(config | {"colour": "red"}).encode(), "colour is no setting"),
        ("config.json", json.dumps(config | {"vocabulary": ["dog"]}).encode(), "a vocabulary is a list of objects"),
        ("config.json", json.dumps([config]).encode(), "it is .*; it must be an object of fields"),
        ("miml.safetensors", safetensors.torch.save({"x": torch.zeros(2)}), "Missing key"),
        ("miml.safetensors", whole["miml.safetensors"][:-9], "incomplete"),
        ("miml.safetensors", b"", "header"),
        ("miml.safetensors", safetensors.torch.save(damaged), "subconcepts.bias holds NaN or infinity"),
        ("dictionary.safetensors", b"no tensors at all", "header"),
        ("dictionary.safetensors", safetensors.torch.save({"cow": bases}), "unknown object 'cow'"),
        (
            "dictionary.safetensors",
            safetensors.torch.save({"dog": bases[0]}),
            r"dog is \(2,\); it must be \(F, D ≥ 1\)",
        ),
        ("dictionary.safetensors", safetensors.torch.save({"dog": bases[1:]}), "dog has bases of 100 bins; .* on 101"),
        ("dictionary.safetensors", safetensors.torch.save({"dog": -bases}), "dog holds NaN, infinity or negative"),
    ):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for n, c in (whole | {name: content}).items():
            (folder / n).write_bytes(c)
        with pytest.raises(ValueError, match=rf"bad is no model of format 4: {name}: .*{reason}.*; copy the") as caught:
            Model.load(str(folder))
        assert "\n" not in str(caught.value)
    (good / "miml.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"good holds no miml.safetensors: copy the whole model folder"):
        Model.load(str(good))


def test_a_model_from_before_fine_masks_gets_them(tmp_path: Path) -> None:
    model().save(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["separation"]["fine_masks"]
    path.write_text(json.dumps(config))
    assert Separator.load(tmp_path).mask_stft.n_fft == 300


def test_each_setting_of_a_model_must_be_there_and_make_sense(tmp_path: Path) -> None:
    model().save(str(tmp_path))
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    free = {"training", "versions", "recipe", "architecture", "sha256"}  # of any content
    groups = {k: v for k, v in good.items() if isinstance(v, dict) and k not in free}
    places = [(k,) for k in good if k != "vocabulary"] + [
        (group, k) for group, settings in groups.items() for k in settings
    ]
    assert len(places) > 40
    for *outer, last in places:
        for bad in ("gone", None, "a", [{"a": 1}], -1_001, math.nan, 10**12):
            config = copy.deepcopy(good)
            settings = config[outer[0]] if outer else config
            if bad == "gone" and last in (
                "fine_masks",
                "second_look",
                "n_networks",
                "picture_slope",
                "picture_offset",
                "most_rest",
                "levelling",
                "n_pitches",
                "noise_weight",
            ):
                continue  # came later
            if bad == "gone":
                del settings[last]
            elif last in free or (last == "linear_bins" and bad is None):
                continue
            else:
                settings[last] = bad
            path.write_text(json.dumps(config))
            with pytest.raises(ValueError, match=rf"config.json: .*{last} (is|are) .*; copy the whole folder again"):
                ModelConfig.read(str(tmp_path))


def test_what_a_model_was_trained_on_is_kept_and_told(tmp_path: Path) -> None:
    known = model()
    known.config = replace(known.config, recipe="default", training={"seed": 3, "clips_by_label": {"dog": 1}})
    assert describe_training(known.config) == (
        "this model learned 1 object from an untold number of clips (recipe default): dog 1"
    )
    known.save(tmp_path)
    add_training_facts(tmp_path, clips=1, about="drawn clips")
    again = Model.load(tmp_path).config
    assert again == replace(known.config, training=known.config.training | {"clips": 1, "about": "drawn clips"})
    assert describe_training(again) == "this model learned 1 object from 1 clip (drawn clips; recipe default): dog 1"
    assert "doesn't say what it was trained on" in describe_training(model().config)


# ---------------------------------------------------------------------------------- files, and what a notebook shows


def test_a_files_sound_is_separated_as_its_samples_are(tmp_path: Path) -> None:
    sound = (tone(DOG, 3.0) / 4 + tone(VIOLIN, 3.0, 2.0) / 4).numpy()
    soundfile.write(tmp_path / "duet.wav", sound, RATE, subtype="FLOAT")
    separator = Separator(model())
    expected = separator(sound, ["dog"])
    for file in (tmp_path / "duet.wav", str(tmp_path / "duet.wav"), f"file://{tmp_path}/duet.wav"):
        assert torch.allclose(separator(file, ["dog"]).estimates, expected.estimates, atol=1e-5)
    with pytest.raises(ClipError, match="missing"):
        separator(tmp_path / "nosuch.wav")
    soundfile.write(tmp_path / "opposite.wav", np.stack([sound, -sound], 1), RATE, subtype="FLOAT")
    heard = separator(tmp_path / "opposite.wav")  # half the difference of channels that cancel each other
    assert torch.allclose(heard.estimates.sum(0) + heard.rest, torch.as_tensor(sound, dtype=torch.float32), atol=1e-4)


def test_only_a_file_needs_ffmpeg() -> None:
    program = (
        "import sys, torch\nfrom avsep import Separator\nassert not {'ffmpeg', 'torchvision', 'sklearn', 'matplotlib'}"
        " & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_separation_is_told_in_a_line_and_shown_with_players() -> None:
    sound = tone(DOG, 3.0) / 4
    found = Separator(model())(sound, ["dog"])
    assert repr(found) == "<Separation of 3.0 s at 2000 Hz: dog 100 %; the rest>"
    page = found._repr_html_()
    assert page.count("<audio") == page.count("data:audio/flac;base64,") == page.count("data:image/png;base64,") == 3
    assert [c.split("<")[0] for c in page.split("<figcaption>")[1:]] == ["mixture", "dog 100 %", "the rest"]
    flac = base64.b64decode(page.split("data:audio/flac;base64,")[1].split('"')[0])
    samples, rate = soundfile.read(io.BytesIO(flac))
    assert rate == RATE and np.abs(samples - sound.numpy()).max() < 1e-3
    silent = Separator(model())(torch.zeros(500), ["dog"])
    assert "dog silent" in repr(silent) and "<audio" in silent._repr_html_()
    long = replace(found, rest=torch.zeros(130_000), estimates=torch.zeros(1, 130_000))
    assert "The first 60 s of Separation of 65.0 s" in long._repr_html_()


def test_a_plan_s_files_go_with_it() -> None:
    """A service makes many: none waits for the garbage collector."""
    sound, separator = (tone(DOG, 5.0) + tone(VIOLIN, 5.0)) / 4, Separator(model())

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.disable()
    try:
        before = open_files()
        plan = separator.plan([sound.numpy()], ["dog", "violin"])
        list(plan.render([sound.numpy()]))
        plan.assigned.edited(Edits())
        assert open_files() > before
        del plan
        assert open_files() == before
    finally:
        gc.enable()
