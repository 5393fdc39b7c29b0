"""KL-NMF of a 10 s clip against scikit-learn, librosa, torchnmf, plain numpy and torch, from the same start.

python -m tests.benchmarks.nmf                     # peers: pip install -e '.[bench]'
python -m tests.benchmarks.nmf --rounds 2 --iterations 50 --processes 1
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from avsep import nmf
from avsep.nmf import amx, cpu, ends, kl
from avsep.stft import STFT
from tests.benchmarks import measure


def spectrogram(number: int = 0) -> torch.Tensor:
    """Return magnitudes of a rendered 10 s clip, (2401, 201)."""
    from avsep.synthetic import SceneConfig, render_scene  # here, so that what needs no clip needs no ffmpeg

    return STFT()(torch.as_tensor(render_scene(number, "train", 5, SceneConfig(seconds=10)).mix)).abs()


def sides(n_bases: int, n_iter: int, quick: bool = False) -> dict[str, Callable[[], Any]]:
    """Every implementation, ready to run; each returns its (W, H)."""
    warnings.simplefilter("ignore")
    V = spectrogram()
    W0, H0 = (x[0] for x in ends.draw_start(V.unsqueeze(0), n_bases, 0))
    v, w0, h0 = (x.numpy() for x in (V, W0, H0))

    def ours(accelerated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return nmf.factorize(V, n_bases, n_iter=n_iter, W0=W0, H0=H0, accelerated=accelerated)

    def in_blocks() -> tuple[torch.Tensor, torch.Tensor]:
        W, H = W0[None].clone(), H0[None].clone()
        kl.Blocks(V[None], W, H).run(n_iter)
        return W[0], H[0]

    def on_vector_units() -> tuple[torch.Tensor, torch.Tensor]:
        kernel = cpu.load()
        assert kernel is not None
        fit = kernel.start(V, W0, H0)
        fit.run(n_iter)
        return fit.factors()

    def plain_numpy() -> tuple[np.ndarray, np.ndarray]:
        W, H = w0.copy(), h0.copy()
        for _ in range(n_iter):
            W *= (v / np.maximum(W @ H, 1e-20)) @ H.T / H.sum(1)
            H *= W.T @ (v / np.maximum(W @ H, 1e-20)) / W.sum(0)[:, None]
        return W, H

    found: dict[str, Callable[[], Any]] = {
        "avsep": ours,
        "avsep accelerated": functools.partial(ours, accelerated=True),
        "torch in blocks (avsep's fallback)": in_blocks,
        "torch": functools.partial(plain_torch, V, W0, H0, n_iter),
        "numpy": plain_numpy,
        "scikit-learn float32": functools.partial(scikit_learn, v, w0, h0, n_iter, np.float32),
    }
    if amx.load():
        found["avsep without matrix units"] = on_vector_units
    if not quick:
        found["scikit-learn float64"] = functools.partial(scikit_learn, v, w0, h0, n_iter, np.float64)
        found |= peers(V, W0, H0, n_iter)
    return found


def plain_torch(V: torch.Tensor, W0: torch.Tensor, H0: torch.Tensor, n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the multiplicative updates as one writes them down, of one clip or of a batch, on any device."""
    W, H = W0.clone(), H0.clone()
    for _ in range(n_iter):
        W *= (V / (W @ H).clamp_min(1e-20)) @ H.mT / H.sum(-1).unsqueeze(-2)
        H *= W.mT @ (V / (W @ H).clamp_min(1e-20)) / W.sum(-2).unsqueeze(-1)
    return W, H


def with_torchnmf(
    V: torch.Tensor, W0: torch.Tensor, H0: torch.Tensor, n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run torchnmf's updates of one clip, on any device; ImportError where it isn't installed."""
    from torchnmf.nmf import NMF as TorchNMF

    model = TorchNMF(W=W0.clone(), H=H0.T.clone()).to(V.device)
    model.fit(V.T, beta=1, tol=0, max_iter=n_iter)
    return model.W.detach(), model.H.detach().T


def scikit_learn(v: np.ndarray, w0: np.ndarray, h0: np.ndarray, n_iter: int, dtype: type) -> tuple:
    """Run scikit-learn's multiplicative updates."""
    from sklearn.decomposition import NMF

    model = NMF(w0.shape[1], init="custom", solver="mu", beta_loss="kullback-leibler", max_iter=n_iter, tol=0)
    return model.fit_transform(v.astype(dtype), W=w0.astype(dtype), H=h0.astype(dtype)), model.components_


def peers(V: torch.Tensor, W0: torch.Tensor, H0: torch.Tensor, n_iter: int) -> dict[str, Callable[[], Any]]:
    """Return those of the optional peers that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    v, w0, h0 = (x.numpy() for x in (V, W0, H0))
    try:
        import librosa
        from sklearn.decomposition import NMF

        class FromOurStart(NMF):  # librosa passes no start on
            def fit_transform(self, X: np.ndarray) -> np.ndarray:
                return super().fit_transform(X, W=h0.T.copy(), H=w0.T.copy())

        def with_librosa() -> tuple:
            options: dict[str, Any] = {"init": "custom", "solver": "mu", "beta_loss": "kullback-leibler"}
            return librosa.decompose.decompose(
                v, transformer=FromOurStart(w0.shape[1], max_iter=n_iter, tol=0, **options)
            )

        found["librosa"] = with_librosa
    except ImportError:
        print("librosa isn't installed: pip install -e '.[bench]'")
    if importlib.util.find_spec("torchnmf"):
        found["torchnmf"] = functools.partial(with_torchnmf, V, W0, H0, n_iter)
    else:
        print("torchnmf isn't installed: pip install -e '.[bench]'")
    return found


def divergences(found: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run each side once and return its final divergence."""
    V = spectrogram()
    return {
        side: float(nmf.kl_divergence(V, *(torch.as_tensor(np.asarray(x)) for x in run())))
        for side, run in found.items()
    }


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.add_argument("--bases", type=int, default=25)
    p.add_argument("--iterations", type=int, default=200)
    p.add_argument("--quick", action="store_true", help="without the slow peers")
    arguments = p.parse_args()
    make = functools.partial(sides, arguments.bases, arguments.iterations, arguments.quick)
    kernel = kl.cpu_kernel(*spectrogram().shape, arguments.bases)
    print(
        f"kernel: {type(kernel).__module__ if kernel else 'torch'}; M = {arguments.bases}, {arguments.iterations} its"
    )
    ends = divergences(make())
    figures: dict[str, Any] = {"divergence": ends}
    for n in arguments.processes:
        times = measure.compare(make, arguments.rounds, n)
        notes = {side: f"divergence {ends[side] / ends['scikit-learn float32'] - 1:+.4%}" for side in times}
        for ours in ("avsep", "avsep accelerated"):
            measure.table(f"seconds a clip, {n} process(es) at once", ours, times, notes)
        figures[f"seconds, {n} processes"] = times
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
