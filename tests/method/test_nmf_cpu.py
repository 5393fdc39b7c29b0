"""The compiled kernel beside plain torch; what both must do is in test_nmf.py."""

import functools
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from avsep import nmf
from avsep.nmf import amx, code, cpu, ends, kl
from avsep.stft import STFT
from avsep.synthetic import SceneConfig, render_scene

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="no compiled kernel for this processor")


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sounding(number: int) -> torch.Tensor:
    """Magnitudes of two seconds of a rendered scene, (2401, 41)."""
    scene = render_scene(number, "train", 5, SceneConfig(seconds=6))
    return STFT()(torch.as_tensor(scene.mix[:96_000])).abs()


@functools.cache
def kernels() -> list[cpu.Kernel | amx.Kernel]:
    """The kernels of every instruction set that this processor has."""
    best = cpu.load()
    if best is None:
        return []
    on_vectors = [cpu.Kernel(t, cpu.build(t)) for t in {best.tile, cpu.AVX2}]
    on_matrices = amx.load()
    return [*on_vectors, on_matrices] if on_matrices else list(on_vectors)


def started(V: torch.Tensor, W: torch.Tensor, H: torch.Tensor) -> list[code.Factorization]:
    """One for each kernel that takes so many bases."""
    few = len(H) <= amx.MAX_BASES
    return [k.start(V, W, H) for k in kernels() if few or not isinstance(k, amx.Kernel)]


@pytest.mark.parametrize(
    ("n_bins", "n_frames", "n_bases"),
    [(2401, 201, 25), (301, 61, 6), (1, 1, 1), (47, 3, 2), (48, 24, 40), (49, 25, 100), (130, 500, 3), (129, 33, 31)],
)
def test_the_kernel_does_what_torch_does(n_bins: int, n_frames: int, n_bases: int) -> None:
    """Any shape: panels and tiles that are full, ragged, or hold a single row."""
    V = uniform(n_bins, n_frames) ** 2
    V[:, 0] = 0
    W0, H0 = uniform(n_bins, n_bases, seed=1) + 0.1, uniform(n_bases, n_frames, seed=2) + 0.1
    W, H = W0[None].clone(), H0[None].clone()
    torch_measured = kl.Blocks(V[None], W, H).run(3, measure=True)
    for fit, held, before in zip(*(started(V, W0, H0) for _ in range(3)), strict=True):
        measured = fit.run(3, measure=True)
        assert all(torch.allclose(a, b[0], rtol=1e-4, atol=1e-7) for a, b in zip(fit.factors(), (W, H), strict=True))
        held.run(3, update_bases=False)
        assert torch.equal(held.factors()[0], W0)
        expected = H0[None].clone()
        kl.Blocks(V[None], W0[None], expected).run(3, update_bases=False)
        assert torch.allclose(held.factors()[1], expected[0], rtol=1e-4, atol=1e-7)
        # measured before the last half-iteration, so it lies above the end and below the end but one
        before.run(2)
        above = float(nmf.kl_divergence(V, *before.factors()))
        assert float(torch_measured) * (1 - 1e-4) <= float(measured) <= above * (1 + 1e-4) + 1e-4


@pytest.mark.skipif(amx.load() is None, reason="no matrix units")
def test_matrix_units_are_as_exact_as_float32() -> None:
    """200 iterations end as near to float64's factors as those of the vector units do."""
    V, n_bases = sounding(3), 25
    W0, H0 = (x[0] for x in ends.draw_start(V[None], n_bases, 0))
    W, H, V_64 = W0.double(), H0.double(), V.double()
    for _ in range(200):
        W *= (V_64 / (W @ H).clamp_min(1e-20)) @ H.T / H.sum(1)
        H *= W.T @ (V_64 / (W @ H).clamp_min(1e-20)) / W.sum(0)[:, None]
    exact = ends.normalise(W.float(), H.float())

    def distance(fit: code.Factorization) -> float:
        fit.run(200)
        found = ends.normalise(*fit.factors())
        return max(float((a - b).square().mean().sqrt() / b.max()) for a, b in zip(found, exact, strict=True))

    *on_vectors, on_matrices = (distance(p) for p in started(V, W0, H0))
    assert on_matrices < 5 * max(on_vectors) + 1e-6


@pytest.mark.skipif(amx.load() is None, reason="no matrix units")
def test_others_use_the_matrix_units_in_turns() -> None:
    """torch multiplies bfloat16 on the same units, in the same thread."""
    V, a, b = sounding(6), uniform(300, 500).bfloat16(), uniform(500, 200).bfloat16()
    factors, product = nmf.factorize(V, 25, n_iter=5), a @ b
    for _ in range(3):
        again = nmf.factorize(V, 25, n_iter=5)
        assert torch.equal(a @ b, product)
        assert all(torch.equal(x, y) for x, y in zip(again, factors, strict=True))


def test_both_paths_end_at_the_same_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    V = sounding(5)
    found = [float(nmf.kl_divergence(V, *nmf.factorize(V, m, n_iter=200, seeds=1))) for m in (8, 25)]
    monkeypatch.setattr(kl, "cpu_kernel", lambda *_: None)
    in_torch = [float(nmf.kl_divergence(V, *nmf.factorize(V, m, n_iter=200, seeds=1))) for m in (8, 25)]
    assert found == pytest.approx(in_torch, rel=1e-4)


def test_clips_in_several_threads_are_the_same_clips() -> None:
    V, before = torch.stack([sounding(i) for i in range(3)]), torch.get_num_threads()
    W, H = nmf.factorize(V, 5, n_iter=20, seeds=[1, 2, 3])
    torch.set_num_threads(2)
    try:
        W_2, H_2 = nmf.factorize(V, 5, n_iter=20, seeds=[1, 2, 3])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(W, W_2) and torch.equal(H, H_2)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[cpu.Tile]:
    """An empty cache in tmp_path, and the list of what is compiled for want of it."""
    compiled: list[cpu.Tile] = []
    build = cpu.build

    def counted(tile: cpu.Tile) -> bytes:
        compiled.append(tile)
        return build(tile)

    monkeypatch.setattr(cpu, "build", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compiled


def test_compiled_code_is_kept_and_a_damaged_file_is_not_run(tmp_path: Path, builds: list[cpu.Tile]) -> None:
    code = cpu.machine_code(cpu.AVX2)
    assert cpu.machine_code(cpu.AVX2) == code and len(builds) == 1
    (kept,) = (tmp_path / "avsep").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.write_bytes(kept.read_bytes()[:-100])
    assert cpu.machine_code(cpu.AVX2) == code and len(builds) == 2
    assert cpu.machine_code(cpu.AVX2) == code and len(builds) == 2


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path, builds: list[cpu.Tile]) -> None:
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(cpu.machine_code, [cpu.AVX2] * 4))
    assert len(set(codes)) == 1 and len(list((tmp_path / "avsep").iterdir())) == 1


def test_no_place_to_keep_it_is_no_error(tmp_path: Path, builds: list, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (
        cpu.Kernel(cpu.AVX2, cpu.machine_code(cpu.AVX2))
        .start(uniform(9, 8), uniform(9, 2), uniform(2, 8))
        .run(1, measure=True)
        .isfinite()
    )


def test_without_a_home_folder_it_is_compiled_anew(builds: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54_321)  # nobody's
    assert cpu.machine_code(cpu.AVX2) and len(builds) == 1


@pytest.mark.skipif(amx.load() is None, reason="no matrix units")
def test_matrix_units_that_may_not_be_used_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "permitted", lambda: False)
    assert amx.find() is None


@pytest.mark.skipif(amx.load() is None, reason="no matrix units")
@pytest.mark.parametrize("first", ["matrix units", "small signal stack"])
def test_matrix_units_and_small_signal_stacks_exclude_each_other(first: str) -> None:
    """Whichever comes second is refused, and says so; faulthandler's own stack is large enough."""
    code = """if True:
        import ctypes, faulthandler, sys, threading
        from avsep.nmf import amx
        faulthandler.enable()
        memory = ctypes.create_string_buffer(4096)
        stack = (ctypes.c_void_p * 3)(ctypes.addressof(memory), 0, len(memory))
        loaded, refused = [], []
        def work():
            if sys.argv[1] == "matrix units":
                loaded.append(amx.load() is not None)
            refused.append(ctypes.CDLL(None).sigaltstack(stack, None) != 0)
            loaded.append(amx.load() is not None)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print(loaded, refused)
    """
    ran = subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == ("[True, True] [True]" if first == "matrix units" else "[False] [False]"), ran.stderr


def test_without_llvmlite_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert cpu.find() is None
