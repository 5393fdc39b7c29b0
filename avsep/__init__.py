"""Learn what objects sound like by watching unlabelled video, and separate a video's sound into its objects.

Axes, everywhere: B clips, S samples, F frequency bins, N STFT frames, M bases of a clip, L objects,
K sub-concepts of an object, J sources in a mixture, C classes (the L objects, then noise).

    from avsep import Separator
    separation = Separator.load("out/demo/model")(waveform, ["violin", "dog"])
"""

from avsep.miml import MIML
from avsep.model import Model
from avsep.nmf import factorize, infer_activations, kl_divergence
from avsep.objects import OBJECT_NAMES, object_scores, weak_labels
from avsep.separation import Separation, Separator, ratio_masks, separate
from avsep.stft import STFT

__all__ = [
    "MIML",
    "OBJECT_NAMES",
    "STFT",
    "Model",
    "Separation",
    "Separator",
    "factorize",
    "infer_activations",
    "kl_divergence",
    "object_scores",
    "ratio_masks",
    "separate",
    "weak_labels",
]
