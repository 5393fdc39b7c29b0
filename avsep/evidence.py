"""What pictures and sound say together: how sure it is that an object sounds in a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_LEAST_SHARE, _LEAST_SCORE = 1e-4, 1e-3
_WITH_LABEL, _WITHOUT = 0.92, 0.02  # how likely an object sounds, with good labels
# A first network hears too little rather than too much: labels are never believed less than this, nor their lack less.
_LEAST_WITH_LABEL, _MOST_WITHOUT = 0.8, 0.3
_MISSED, _MOST_MISSED = 0.05, 0.15  # how far an object without a label explains a basis, beside one with it
_DRAWN = 20  # clips: an object of fewer labels is judged by the others, too
# How an object's share of sounds unlike the training's becomes a confidence. Fitted, by `fit_sound`, to 1,639 clips of
# collections that a model of 860 clips had not heard. Mixtures of sounds that a model has heard make it too sure.
ELSEWHERE = {"slope": 1.44, "offset": 2.76}
_FEW = 100  # clips, of which a first network has learned too little to judge their labels


@dataclass(frozen=True)
class Evidence:
    """Turn an object's share of the sound, and whether the pictures show it, into a probability that it sounds.

    The share alone gives `logit p = slope · log share + offset`. A picture shows the object, or doesn't: the odds are
    multiplied by how much likelier that is when it sounds than when it is silent (naive Bayes). The default figures
    come from recorded duets and trios.

    Where `picture_slope` isn't zero, pictures count by how surely they show an object: its score's log-odds add
    `picture_slope · logit score + picture_offset`. A doubtful picture then tips the scale for what sounds clearly.

    >>> evidence = Evidence()
    >>> p = evidence.confidence(torch.tensor([0.13, 0.13]), torch.tensor([True, False]))
    >>> [round(x, 2) for x in p.tolist()]  # a picture shows the first of two that are equally loud
    [0.93, 0.07]
    """

    slope: float = 8.0
    offset: float = 16.0
    shown_when_heard: float = 0.9
    shown_when_silent: float = 0.05
    picture_slope: float = 0.0
    picture_offset: float = 0.0

    def confidence(self, shares: Tensor, shown: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """Return the probability that each object sounds, `(…, L)`.

        Args:
            shares: of the sound, `(…, L)`.
            shown: what pictures show, boolean `(…, L)`; without it the probability rests on the sound alone.
            scores: how surely pictures show each object, in [0, 1], `(…, L)`; without them `shown` counts.
        """
        logit = self.slope * shares.clamp_min(_LEAST_SHARE).log() + self.offset
        if scores is not None and self.picture_slope:
            logit = logit + self.picture_slope * scores.clamp(_LEAST_SCORE, 1 - _LEAST_SCORE).logit()
            logit = logit + self.picture_offset
        elif shown is not None:
            for_it = np.log(self.shown_when_heard / self.shown_when_silent)
            against = np.log((1 - self.shown_when_heard) / (1 - self.shown_when_silent))
            logit = logit + torch.where(shown, for_it, against)
        return logit.sigmoid()

    def claim(self, shares: Tensor, shown: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """Return what may be claimed: `confidence`, but no more than sounds unlike the training's would allow.

        >>> [round(x, 2) for x in Evidence().claim(torch.tensor([0.6, 0.01])).tolist()]  # confidence says 1.0 and 0.0
        [0.88, 0.0]
        """
        elsewhere = replace(self, **ELSEWHERE)
        return torch.minimum(self.confidence(shares, shown, scores), elsewhere.confidence(shares, shown, scores))


def fit_sound(shares: Tensor, heard: Tensor, base: Evidence | None = None) -> Evidence:
    """Fit slope and offset to shares, `(n, L)`, of mixtures whose objects are known, boolean `(n, L)`.

    Platt's logistic regression on the share's logarithm, over the objects that are ever heard.
    """
    base = base or Evidence()
    usable = heard.any(0)
    x = shares[:, usable].clamp_min(_LEAST_SHARE).log().reshape(-1, 1).numpy()
    y = heard[:, usable].reshape(-1).numpy()
    if y.all() or not y.any():
        return base
    from sklearn.linear_model import LogisticRegression  # takes seconds, and whoever separates needs none of it

    fit = LogisticRegression(C=10.0).fit(x, y)
    slope, offset = max(float(fit.coef_[0, 0]), 0.1), float(fit.intercept_[0])
    return replace(base, slope=slope, offset=offset)


def fit_images(evidence: Evidence, shares: Tensor, shown: Tensor, n_iter: int = 20) -> Evidence:
    """Estimate how often pictures show a sounding and a silent object, from clips without any truth.

    Expectation–maximisation: the confidences say how often shown objects sound, which says how much
    to believe the pictures. Objects that are never shown don't count.

    Args:
        shares, shown: `(n, L)` of clips, `shown` boolean.
    """
    usable = shown.any(0)
    shares, shown = shares[:, usable], shown[:, usable]
    for _ in range(n_iter):
        p = evidence.confidence(shares, shown)
        hit = (float((p * shown).sum()) + 1) / (float(p.sum()) + 2)  # add-one smoothing
        false = (float(((1 - p) * shown).sum()) + 1) / (float((1 - p).sum()) + 2)
        evidence = replace(evidence, shown_when_heard=max(hit, false), shown_when_silent=min(hit, false))
    return evidence


@dataclass(frozen=True)
class LabelQuality:
    """What weak labels say: how likely each object sounds in a clip that has its label, and in one that hasn't.

    Pictures miss objects, show silent ones, and mistake others for them. The defaults are those of good labels.
    """

    with_label: tuple[float, ...]  # (L,)
    without: tuple[float, ...]  # (L,)

    @classmethod
    def good(cls, n_objects: int) -> LabelQuality:
        """Return what is assumed until more is known."""
        return cls((_WITH_LABEL,) * n_objects, (_WITHOUT,) * n_objects)

    def presence(self, labels: Tensor) -> Tensor:
        """Return how likely each object sounds, boolean `(B, L)` labels → `(B, L)`."""
        with_label, without = (torch.tensor(p, device=labels.device) for p in (self.with_label, self.without))
        return torch.where(labels, with_label, without)

    def missed(self) -> Tensor:
        """Return how far an object without its label explains a basis, beside one with it, `(L,)`."""
        return (torch.tensor(self.without) * _MISSED / _WITHOUT).clamp(_MISSED, _MOST_MISSED)


def judge_labels(evidence: Evidence, shares: Tensor, labels: Tensor) -> LabelQuality:
    """Estimate how good weak labels are from what a first network hears in the clips, without any truth.

    The confidences of sound and label together say how often an object sounds with and without its label. Figures of
    few clips are drawn towards those of all objects, and of good labels.

    Args:
        shares: `(n, L)` of the sound. labels: boolean `(n, L)`.
    """
    p = fit_images(evidence, shares, labels).confidence(shares, labels)
    heard, silent = p * labels, p * ~labels
    pooled_with = (float(heard.sum()) + _FEW * _WITH_LABEL) / (float(labels.sum()) + _FEW)
    with_label = (heard.sum(0) + _DRAWN * pooled_with) / (labels.sum(0) + _DRAWN)
    without = (silent.sum(0) + _FEW * _WITHOUT) / ((~labels).sum(0) + _FEW)
    return LabelQuality(
        tuple(with_label.clamp(_LEAST_WITH_LABEL, _WITH_LABEL).tolist()),
        tuple(without.clamp(_WITHOUT, _MOST_WITHOUT).tolist()),
    )
