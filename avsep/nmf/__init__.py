"""KL-NMF: V ≈ W · H, on CPUs' matrix and vector units, and on GPUs."""

from avsep.nmf.kl import factorize, infer_activations, kl_divergence

divergence = kl_divergence  # what makes this room a `factors.Factorizer`

__all__ = ["divergence", "factorize", "infer_activations", "kl_divergence"]
