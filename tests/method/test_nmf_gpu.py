"""The Triton kernel, by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import torch
from avsep.nmf import gpu, kl

device = "cuda" if torch.cuda.is_available() else "cpu"
for n_bins, n_frames, n_bases in ((130, 70, 5), (65, 3, 20), (1, 1, 1), (70, 66, 100)):
    g = torch.Generator().manual_seed(0)
    V, W, H = (torch.rand(2, *s, generator=g) for s in ((n_bins, n_frames), (n_bins, n_bases), (n_bases, n_frames)))
    V[0, :, 0] = 0
    for update_bases in (True, False):
        expected = W.clone(), H.clone()
        kl.Blocks(V, *expected).run(2, update_bases=update_bases)
        found = W.to(device, copy=True), H.to(device, copy=True)
        gpu.iterate(V.to(device), *found, 2, update_bases=update_bases)
        for a, b in zip(found, expected):
            assert torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-6), (n_bins, n_frames, n_bases, update_bases)
print("alike")
"""


def test_the_kernel_does_what_torch_does() -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout == "alike\n", done.stderr
