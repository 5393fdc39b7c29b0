"""How sure it is that an object sounds."""

import math

import pytest
import torch

from avsep.evidence import Evidence, LabelQuality, fit_images, fit_sound, judge_labels


def drawn(n: int = 4000, hit: float = 0.85, false: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Shares of four objects, which of them sound, and which the pictures show; the shares overlap."""
    generator = torch.Generator().manual_seed(seed)
    heard = torch.rand(n, 4, generator=generator) < 0.4
    shares = torch.where(heard, -1.5, -3.0) + 0.6 * torch.randn(n, 4, generator=generator)
    shown = torch.rand(n, 4, generator=generator) < torch.where(heard, hit, false)
    return shares.exp().clamp(max=1), heard, shown


def test_odds_are_multiplied_by_what_pictures_say() -> None:
    evidence = Evidence(2.0, 3.0, 0.9, 0.3)
    share = torch.tensor([0.2, 0.2])
    odds = math.exp(2 * math.log(0.2) + 3)
    alone = evidence.confidence(share)
    assert float(alone[0]) == pytest.approx(odds / (1 + odds))
    both = evidence.confidence(share, torch.tensor([True, False]))
    for p, factor in zip(both.tolist(), (0.9 / 0.3, 0.1 / 0.7), strict=True):
        assert p == pytest.approx(odds * factor / (1 + odds * factor))
    assert bool(evidence.confidence(torch.zeros(3)).isfinite().all())


def test_a_picture_counts_by_how_surely_it_shows_an_object() -> None:
    evidence = Evidence(2.0, 3.0, picture_slope=0.5, picture_offset=1.0)
    share, scores = torch.full((4,), 0.2), torch.tensor([0.0, 0.1, 0.5, 1.0])
    sound = 2 * math.log(0.2) + 3
    found = evidence.confidence(share, torch.tensor([False, False, True, True]), scores)
    for p, score in zip(found.tolist(), (0.001, 0.1, 0.5, 0.999), strict=True):
        logit = sound + 0.5 * math.log(score / (1 - score)) + 1
        assert p == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)
    marks = torch.tensor([True])
    plain = Evidence(2.0, 3.0)  # its slope is zero: what is shown counts, whatever the scores
    assert torch.equal(plain.confidence(share[:1], marks, scores[:1]), plain.confidence(share[:1], marks))
    assert torch.equal(evidence.confidence(share[:1], marks), plain.confidence(share[:1], marks))  # without scores


def test_fitted_confidence_is_calibrated_and_pictures_help() -> None:
    shares, heard, shown = drawn()
    evidence = fit_images(fit_sound(shares, heard), shares, shown)  # no truth beyond the mixtures'
    assert evidence.shown_when_heard == pytest.approx(0.85, abs=0.03)
    assert evidence.shown_when_silent == pytest.approx(0.10, abs=0.03)
    fresh = drawn(seed=1)
    for pictures in (None, fresh[2]):
        p = evidence.confidence(fresh[0], pictures)
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            inside = (p >= low) & (p < low + 0.2)
            assert float(fresh[1][inside].float().mean()) == pytest.approx(float(p[inside].mean()), abs=0.06)
    sound, both = (evidence.confidence(fresh[0], s) for s in (None, fresh[2]))
    wrong_alone, wrong = (float(((p > 0.5) != fresh[1]).float().mean()) for p in (sound, both))
    assert wrong < 0.7 * wrong_alone


def test_one_sided_mixtures_leave_the_defaults() -> None:
    assert fit_sound(torch.rand(10, 3), torch.ones(10, 3, dtype=torch.bool)) == Evidence()
    assert fit_sound(torch.rand(10, 3), torch.zeros(10, 3, dtype=torch.bool)) == Evidence()


@pytest.mark.parametrize("hit", [0.35, 0.6, 0.9])
def test_the_quality_of_labels_is_estimated_without_any_truth(hit: float) -> None:
    shares, heard, shown = drawn(hit=hit, false=0.02)
    quality = judge_labels(fit_sound(shares, heard), shares, shown)
    for object_ in range(4):
        labelled = shown[:, object_]
        with_label, without = (float(heard[rows, object_].float().mean()) for rows in (labelled, ~labelled))
        assert quality.with_label[object_] == pytest.approx(min(with_label, 0.92), abs=0.06)
        assert quality.without[object_] == pytest.approx(min(without, 0.3), abs=0.06)


def test_poor_labels_let_missed_objects_explain_more() -> None:
    good, poor = LabelQuality.good(2), LabelQuality((0.9, 0.9), (0.02, 0.2))
    assert good.missed().tolist() == pytest.approx([0.05, 0.05])
    assert poor.missed().tolist() == pytest.approx([0.05, 0.15])
    labels = torch.tensor([[True, False]])
    assert poor.presence(labels).tolist() == [pytest.approx([0.9, 0.2])]
