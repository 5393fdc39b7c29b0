"""KL-NMF: V ≈ W · H, on CPUs' matrix and vector units, and on GPUs."""

from avsep.nmf.kl import factorize, infer_activations, kl_divergence

__all__ = ["factorize", "infer_activations", "kl_divergence"]
