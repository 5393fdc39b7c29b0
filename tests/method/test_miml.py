import math

import pytest
import torch
from torch import Tensor, nn

from avsep.miml import (
    MIML,
    N_STATISTICS,
    MeanMIML,
    activation_statistics,
    basis_posteriors,
    energy_shares,
    multilabel_margin,
    partial_label_loss,
    relate_at_pitches,
    target_loss,
    warp_frequencies,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**options: object) -> MIML:
    torch.manual_seed(0)
    return MIML(20, 5, 3, 16, **options).eval()


def test_the_published_networks_parameters() -> None:
    """F→1024 and 1024→K·L with biases, and a scale and a shift for each batch norm."""
    network = MIML()
    n_parameters = sum(p.numel() for p in network.parameters())
    assert n_parameters == (2401 + 1) * 1024 + 2 * 1024 + (1024 + 1) * 92 + 2 * 92
    assert (network.n_bins, network.n_objects, network.n_subconcepts) == (2401, 23, 4)


def test_relation_and_scores_are_maxima_of_the_layers_by_hand() -> None:
    """max over K gives the relation map, max over M the scores; sub-concepts of one object lie together."""
    network, bases = small(), seeded(2, 4, 20).abs()
    x = bases / bases.amax(-1, keepdim=True)
    features = network.shared(x.reshape(-1, 20))
    y = network.head(network.subconcepts(features)).reshape(2, 4, 5, 3)  # (B, M, L, K)
    relation = network.relation(bases)
    assert relation.shape == (2, 5, 4)
    assert torch.allclose(relation, y.amax(-1).transpose(1, 2))
    assert torch.equal(network(bases), relation.amax(-1)) and network(bases).shape == (2, 5)
    assert (relation >= 0).all()
    unbounded = small(published_head=False)
    with torch.no_grad():
        unbounded.subconcepts.bias.fill_(-2)
    assert (unbounded.relation(bases) < 0).all()


def test_several_networks_relate_as_the_mean_of_theirs() -> None:
    """With statistics, too; its weights go through a file and back."""
    networks = [MIML(20, 5, 3, 16, statistics=True).eval() for _ in range(2)]
    mean, (W, H) = MeanMIML(networks).eval(), (seeded(20, 4).abs(), seeded(4, 30).abs())
    expected = (networks[0].relate(W, H) + networks[1].relate(W, H)) / 2
    torch.testing.assert_close(mean.relate(W, H), expected)
    torch.testing.assert_close(
        mean.relation(W.T[None], statistics=activation_statistics(H[None]))[0], expected, atol=1e-6, rtol=1e-5
    )
    again = MeanMIML([MIML(20, 5, 3, 16, statistics=True) for _ in range(2)])
    again.load_state_dict(mean.state_dict())
    assert torch.equal(again.eval().relate(W, H), mean.relate(W, H))
    assert (mean.n_bins, mean.n_objects) == (20, 5)


@pytest.mark.parametrize("options", [{}, {"published_head": False, "square_root": True, "log_bands": True}])
def test_level_and_order_of_the_bases_mean_nothing(options: dict[str, bool]) -> None:
    network, bases = small(**options), seeded(2, 6, 20).abs()
    relation = network.relation(bases)
    levels = torch.tensor([1e-4, 1.0, 3.0, 10.0, 1e3, 0.5])[:, None]
    assert torch.allclose(network.relation(bases * levels), relation, atol=1e-5)
    order = [3, 0, 5, 1, 2, 4]
    assert torch.allclose(network.relation(bases[:, order]), relation[:, :, order], atol=1e-6)
    assert torch.allclose(network.relation(bases[:, :1]), relation[:, :, :1], atol=1e-6)  # any M
    assert torch.allclose(network(bases[:, order]), network(bases), atol=1e-6)


def test_padding_takes_no_part() -> None:
    """A padded bag in a batch scores as it does alone, and leaves batch statistics alone."""
    bases, valid = seeded(2, 4, 20).abs(), torch.tensor([[True] * 4, [True, True, False, False]])
    other = bases.clone()
    other[1, 2:] = 99.0
    networks = [small().train(), small().train()]
    scores = [n(b, valid) for n, b in zip(networks, (bases, other), strict=True)]
    assert torch.equal(*scores)
    assert torch.equal(networks[0].shared[1].running_mean, networks[1].shared[1].running_mean)
    network = small()
    assert torch.allclose(network(other, valid)[1], network(bases[1:, :2])[0], atol=1e-6)
    assert not network.relation(bases, valid)[1, :, 2:].any()


def test_log_bands_turn_pitch_into_a_shift() -> None:
    """The bands' energy for a peak lies ever further up as its frequency rises, evenly in octaves."""
    bands = MIML(2401, 2, 1, 4, log_bands=True).bands
    assert bands.shape[0] == 2401 and (bands >= 0).all()
    assert torch.allclose(bands.sum(0), torch.ones(bands.shape[1]), atol=1e-4)
    centre = [float(bands[k].argmax()) for k in (200, 400, 800, 1600)]
    steps = torch.tensor(centre).diff()
    assert (steps > 0).all() and float(steps.max() - steps.min()) <= 2


def test_a_wrong_number_of_bins_is_named() -> None:
    with pytest.raises(ValueError, match=r"bases are \(2, 4, 21\); the network takes \(B, M ≥ 1, F = 20\)"):
        small().relation(torch.zeros(2, 4, 21))
    with pytest.raises(ValueError, match=r"bases are \(4, 20\)"):
        small()(torch.zeros(4, 20))
    with pytest.raises(ValueError, match=r"bases are \(2, 0, 20\)"):
        small()(torch.zeros(2, 0, 20))
    for valid in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"valid is \(2, \d\), .*; it must be boolean, \(2, 4\)"):
            small()(torch.zeros(2, 4, 20), valid)


def index_lists(labels: Tensor) -> Tensor:
    """What torch's loss takes: the true classes first, then −1."""
    lists = torch.full(labels.shape, -1)
    for row, mark in zip(lists, labels, strict=True):
        true = mark.nonzero().flatten()
        row[: len(true)] = true
    return lists


def test_multilabel_margin_is_torch_s() -> None:
    scores = seeded(9, 7).requires_grad_()
    labels = torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    labels[0], labels[1] = False, True  # no label at all, every label
    ours = multilabel_margin(scores, labels)
    theirs = nn.MultiLabelMarginLoss(reduction="none")(scores, index_lists(labels))
    assert ours.shape == (9,) and torch.allclose(ours, theirs, atol=1e-6)
    mean = nn.MultiLabelMarginLoss()(scores, index_lists(labels))
    assert ours.mean().item() == pytest.approx(mean.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours.mean(), scores, retain_graph=True)
    assert torch.allclose(gradient, torch.autograd.grad(mean, scores)[0], atol=1e-6)


def test_multilabel_margin_by_hand() -> None:
    """The first true: max(0, 1 − 1.5) + max(0, 1 − 3) = 0; the second: (2.5 + 0) / 3."""
    x = torch.tensor([[2.0, 0.5, -1.0], [2.0, 0.5, -1.0]])
    labels = torch.tensor([[True, False, False], [False, True, False]])
    assert multilabel_margin(x, labels).tolist() == pytest.approx([0.0, 2.5 / 3])


def test_basis_posteriors_are_a_softmax_beside_noise_of_score_zero() -> None:
    relation = torch.log(torch.tensor([[[1.0], [3.0]]]))  # e^x = 1, 3 and 1 for noise
    assert basis_posteriors(relation)[0, :, 0].tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert torch.allclose(basis_posteriors(seeded(2, 5, 4)).sum(1), torch.ones(2, 4))


def test_partial_label_loss_by_hand() -> None:
    """One basis, scores 0: p = 1/3 each. Explained: −log(1/3 + 0.05/3 + 0.3/3); present: 1 − e^{−8/3}."""
    relation, labels = torch.zeros(1, 2, 1), torch.tensor([[True, False]])
    present = torch.tensor(1 - torch.exp(torch.tensor(-8 / 3)).item())
    target = torch.tensor([0.92, 0.02])
    entropy = -(target * present.log() + (1 - target) * (1 - present).log()).mean()
    explained = -torch.log(torch.tensor((1 + 0.05 + 0.3) / 3))
    expected = float(explained + 0.5 * entropy)
    assert float(partial_label_loss(relation, labels)) == pytest.approx(expected, rel=1e-5)
    heavier = partial_label_loss(relation, labels, presence=0.0, missed=0.5, noise=0.0)
    assert float(heavier) == pytest.approx(-float(torch.log(torch.tensor(0.5))), rel=1e-5)


def test_partial_label_loss_reads_the_visible_and_counted_bases_alone() -> None:
    labels = torch.tensor([[True, False, True]])
    sure = torch.full((1, 3, 4), -10.0)
    sure[0, 0, :2] = sure[0, 2, 2:] = 10.0
    swapped = sure[:, [1, 0, 2]]  # the first two bases go to the object that isn't there
    assert partial_label_loss(sure, labels) < partial_label_loss(torch.zeros_like(sure), labels)
    assert partial_label_loss(sure, labels) + 1 < partial_label_loss(swapped, labels)
    valid = torch.tensor([[True, True, True, True, False]])
    padded = torch.cat([sure, torch.full((1, 3, 1), 5.0)], 2)
    assert torch.allclose(partial_label_loss(padded, labels, valid), partial_label_loss(sure, labels))
    extreme = torch.full((1, 3, 4), 1e4, requires_grad=True)
    partial_label_loss(extreme, torch.zeros(1, 3, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(extreme.grad).all()


def test_energy_shares_weigh_bases_by_the_root_of_their_energy() -> None:
    posteriors = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]])  # the last row is noise
    shares = energy_shares(posteriors, torch.tensor([[9.0, 1.0, 4.0]]) / 14)
    assert shares[0].tolist() == pytest.approx([(3 + 1) / 6, 1 / 6])
    assert not energy_shares(posteriors, torch.zeros(1, 3)).any()  # a silent clip


def test_statistics_tell_struck_from_held_and_know_no_level() -> None:
    n = torch.arange(60.0)
    held, struck = torch.ones(60), torch.exp(-(n % 20) / 3)
    H = torch.stack([held, struck, 7 * struck])[None]
    held_stats, struck_stats, louder = activation_statistics(H)[0]
    assert held_stats.shape == (N_STATISTICS,)
    torch.testing.assert_close(struck_stats, louder)
    torch.testing.assert_close(held_stats[:4], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert struck_stats[4] > 0.8 and held_stats[4] == 0  # the largest rise
    assert held_stats[-1] == pytest.approx(59 / 60, abs=0.02) and struck_stats[-1] < 0.1  # how often steady
    for short in (1, 2, 5):
        assert bool(activation_statistics(torch.rand(1, 2, short)).isfinite().all())


def test_a_network_that_reads_statistics_needs_them() -> None:
    network = small(published_head=False, statistics=True)
    W, H = seeded(20, 4).abs(), seeded(4, 30, seed=1).abs()
    with pytest.raises(ValueError, match="statistics"):
        network.relation(W.T[None])
    relation = network.relate(W, H)
    assert relation.shape == (5, 4)
    torch.testing.assert_close(relation, network.relation(W.T[None], statistics=activation_statistics(H[None]))[0])
    assert not torch.allclose(relation, network.relate(W, H.flip(0)))
    plain = small()
    torch.testing.assert_close(plain.relate(W, H), plain.relation(W.T[None])[0])


def test_target_loss_is_the_cross_entropy_of_known_shares() -> None:
    """By hand: two bases of posteriors (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4), noise last, the second weighing three."""
    relation = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).log()
    targets = torch.tensor([[[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]]])
    expected = (1 * math.log(2) + 3 * 0.5 * (math.log(4) + math.log(2))) / 4
    assert float(target_loss(relation, targets, torch.tensor([[1.0, 3.0]]))) == pytest.approx(expected)
    padded = torch.cat([targets, torch.zeros(1, 3, 1)], 2)
    wider = torch.cat([relation, torch.zeros(1, 2, 1)], 2)
    assert float(target_loss(wider, padded, torch.tensor([[1.0, 3.0, 0.0]]))) == pytest.approx(expected)


@pytest.mark.parametrize("statistics", [True, False])
def test_bases_are_related_at_several_pitches_around_their_own(statistics: bool) -> None:
    """In the mean, each as if it were the clip's; one pitch is `relate`."""
    networks = [MIML(20, 5, 3, 16, statistics=statistics).eval() for _ in range(2)]
    W, H = seeded(20, 4).abs(), seeded(4, 30).abs()
    for network in (networks[0], MeanMIML(networks).eval()):
        torch.testing.assert_close(relate_at_pitches(network, W, H, 1), network.relate(W, H))
        pitches = [1 / 1.06, 1.0, 1.06]
        one_by_one = [network.relate(warp_frequencies(W.T, torch.full((4,), p)).T, H) for p in pitches]
        torch.testing.assert_close(relate_at_pitches(network, W, H, 3), torch.stack(one_by_one).mean(0))
        assert not torch.equal(one_by_one[0], one_by_one[1])
