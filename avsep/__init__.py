"""Learn what objects sound like by watching unlabelled video, and separate a video's sound into its objects.

Axes of signals, everywhere: B clips, S samples, F frequency bins, N STFT frames, M bases of a clip. Axes of meaning:
L objects, K sub-concepts of an object, J sources in a mixture, C classes (the L objects, then noise).

    import avsep
    s = avsep.separate_file("duet.mp4")
    s["violin"].save("violin.wav")  # s["violin"].samples are an array (C, S)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avsep.edits import Edits
    from avsep.miml import MIML
    from avsep.model import Model
    from avsep.nmf import factorize, infer_activations, kl_divergence
    from avsep.objects import OBJECT_NAMES, object_scores, weak_labels
    from avsep.separated import Separated, separate_file, separate_sound
    from avsep.separation import Separation, Separator, ratio_masks, separate
    from avsep.stft import STFT

__all__ = [
    "MIML",
    "OBJECT_NAMES",
    "STFT",
    "Edits",
    "Model",
    "Separated",
    "Separation",
    "Separator",
    "factorize",
    "infer_activations",
    "kl_divergence",
    "object_scores",
    "ratio_masks",
    "separate",
    "separate_file",
    "separate_sound",
    "weak_labels",
]

_MODULES = ("metrics", "miml", "nmf", "objects", "records", "separation", "shards", "stft")
_HOMES = {
    "avsep.edits": ("Edits",),
    "avsep.miml": ("MIML",),
    "avsep.model": ("Model",),
    "avsep.nmf": ("factorize", "infer_activations", "kl_divergence"),
    "avsep.objects": ("OBJECT_NAMES", "object_scores", "weak_labels"),
    "avsep.separated": ("Separated", "separate_file", "separate_sound"),
    "avsep.separation": ("Separation", "Separator", "ratio_masks", "separate"),
    "avsep.stft": ("STFT",),
}


if not TYPE_CHECKING:  # type checkers would believe any name

    def __getattr__(name: str) -> Any:
        """Import a name when it is first asked for: torch takes seconds, and `avsep --help` needs none of it."""
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(home), name)
                return value
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
