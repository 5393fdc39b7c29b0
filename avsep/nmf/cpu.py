"""KL-NMF's updates as machine code for this CPU, emitted by LLVM when first needed and then cached.

One half of an iteration is one pass over V: with Y held, `X ← X ∘ (Y (V/(XᵀY))ᵀ) / (Y 1)`. It serves
both factors: for the bases `X = Wᵀ` and `Y = H`; for the activations `X = H` and `Y = Wᵀ`, on
V transposed. A tile of `V/(XᵀY)` is made in registers and used up there, so nothing of V's
size is ever written, and every lane of every multiplication counts whatever M is.

Layout: X `(M, n)` lies in panels `[n / S][M][S]`, S floats wide, padded with zeros, and V in
`[n_x / S][n_y][S]`, in the order in which the pass reads it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avsep.nmf import code
from avsep.nmf.code import FLOOR, TINY, Emitter, Instructions, zeros


@dataclass(frozen=True)
class Tile(Instructions):
    """How many registers' worth of V/(WH) are in flight: `vectors × rows`."""

    vectors: int
    rows: int

    @property
    def width(self) -> int:
        """S, a panel's width in floats."""
        return self.lanes * self.vectors


AVX512 = Tile(16, "llvm.x86.avx512.rcp14.ps.512", vectors=3, rows=8)  # 24 of 32 registers
AVX2 = Tile(8, "llvm.x86.avx.rcp.ps.256", vectors=3, rows=4)  # 12 of 16


class Kernel:
    """The compiled updates, for one CPU.

    Args:
        tile: the instruction set's.
        machine_code: the object file that `build` made.
    """

    def __init__(self, tile: Tile, machine_code: bytes) -> None:
        self.tile, self.code = tile, code.Code(machine_code, tile)
        self.run = self.code.function("run", ctypes.c_double, *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 8)

    def start(self, V: Tensor, W: Tensor, H: Tensor) -> OnVectors:
        """Lay one clip out: V `(F, N)`, W `(F, M)`, H `(M, N)`, float32 on the CPU."""
        return OnVectors(self, V, W, H)


class OnVectors(code.Factorization):
    """One clip's factorisation under way, in the kernel's layout."""

    def __init__(self, kernel: Kernel, V: Tensor, W: Tensor, H: Tensor) -> None:
        self.kernel, self.code, (self.n_bins, self.n_frames) = kernel, kernel.code, V.shape
        self.V_rows, self.V_columns = self._blocks(V), self._blocks(V.mT)
        self.W, self.H = self._panels(W.mT), self._panels(H)
        self.n_bases = len(H)
        self._scratch = zeros(self.n_bases * (kernel.tile.width + kernel.tile.lanes))
        self._inverse_sums = torch.empty(2, self.n_bases)
        self.sum_up()

    def run(self, n_iter: int, *, update_bases: bool = True, measure: bool = False) -> Tensor:
        """Do `n_iter` iterations; return the divergence before the last update, if it is to be measured, `(1,)`."""
        if n_iter < 1:
            return torch.full((1,), torch.nan)
        t = self.kernel.tile
        divergence = self.kernel.run(
            *(x.data_ptr() for x in (self.V_rows, self.V_columns, self.W, self.H, self._scratch, *self._inverse_sums)),
            *(-(-n // size) for n in (self.n_bins, self.n_frames) for size in (t.lanes, t.rows)),
            self.n_bases,
            n_iter,
            int(update_bases),
            int(measure),
        )
        return torch.tensor([divergence])

    def sum_up(self) -> None:
        """Sum the factors that the next iteration starts from."""
        for X, inverse in zip((self.W, self.H), self._inverse_sums, strict=True):
            torch.sum(X, (0, 2), out=inverse).clamp_min_(TINY).reciprocal_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return W `(F, M)` and H `(M, N)`."""
        W, H = (x.transpose(0, 1).reshape(self.n_bases, -1) for x in (self.W, self.H))
        return W[:, : self.n_bins].mT, H[:, : self.n_frames]

    def _panels(self, X: Tensor) -> Tensor:
        """`(M, n)` → `[n / S][M][S]`."""
        width, (n_bases, n) = self.kernel.tile.width, X.shape
        padded = torch.zeros(n_bases, -(-n // width) * width)
        padded[:, :n] = X
        return zeros(padded.numel()).view(-1, n_bases, width).copy_(padded.view(n_bases, -1, width).transpose(0, 1))

    def _blocks(self, V: Tensor) -> Tensor:
        """`(n_x, n_y)` → `[n_x / S][n_y, in whole tiles][S]`."""
        t, (n_x, n_y) = self.kernel.tile, V.shape
        blocks = zeros(-(-n_x // t.width) * -(-n_y // t.rows) * t.rows * t.width)
        blocks = blocks.view(-1, -(-n_y // t.rows) * t.rows, t.width)
        whole = n_x // t.width
        blocks[:whole, :n_y] = V[: whole * t.width].reshape(whole, t.width, n_y).transpose(1, 2)
        if n_x % t.width:
            blocks[whole, :n_y, : n_x % t.width] = V[whole * t.width :].mT
        return blocks


def find() -> Kernel | None:
    """Return this CPU's kernel; None where there is none (no AVX2, or llvmlite doesn't work here)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        tile = next((t for t, needs in _NEEDS if all(features.get(n) for n in needs)), None)
        return Kernel(tile, machine_code(tile)) if tile else None
    except (ImportError, OSError, RuntimeError, AttributeError):  # the last: no user ids on this system
        return None


@functools.cache
def load() -> Kernel | None:
    """Return what `find` does, of which there is one per process."""
    return find()


_NEEDS = ((AVX512, ("avx512f", "avx512dq", "avx512vl")), (AVX2, ("avx2", "fma")))


def machine_code(tile: Tile) -> bytes:
    """Take the updates' object file from the cache, or build it."""
    return code.cached(__file__, tile, lambda: build(tile))


def build(tile: Tile) -> bytes:
    """Compile the updates for this machine: an object file."""
    return _Updates(tile).compile()


class _Updates(Emitter):
    """Writes the updates."""

    def __init__(self, tile: Tile) -> None:
        super().__init__(tile)
        self.tile = tile
        panels = {(v, m): self._panel(v, m) for v in range(1, tile.vectors + 1) for m in (False, True)}
        plain, measured = (self._half([panels[v + 1, m] for v in range(tile.vectors)], m) for m in (False, True))
        self._iterations(plain, measured)

    def _panel(self, n_vectors: int, measure: bool) -> Any:
        """`out ← Y (V/(XᵀY))ᵀ` for one panel of X; returns its divergence, if it is to be measured."""
        t, width = self.tile, self.tile.width
        f = self._function(f"panel_{n_vectors}_{int(measure)}", self.float, [self.pointer] * 4 + [self.i64] * 2)
        V, X, Y, out, n_tiles, n_bases = f.args
        cells = [(row, vector) for row in range(t.rows) for vector in range(n_vectors)]
        zero = self.ir.Constant(self.vector, None)
        with self._loop(n_bases) as basis:
            for vector in range(t.vectors):
                self._store(zero, self._at(out, self.b.mul(basis.index, self.i64(width))), vector * t.lanes)
        with self._loop(n_tiles, [zero]) as tile:
            tiles = self.i64(width // t.rows)  # in a panel of Y
            panel = self.b.mul(self.b.udiv(tile.index, tiles), self.b.mul(n_bases, self.i64(width)))
            y = self._at(Y, panel, self.b.mul(self.b.urem(tile.index, tiles), self.i64(t.rows)))
            v = self._at(V, self.b.mul(tile.index, self.i64(t.rows * width)))
            with self._loop(n_bases, [zero] * len(cells)) as basis:
                row_of_basis = self.b.mul(basis.index, self.i64(width))
                x_m, y_m = self._at(X, row_of_basis), self._at(y, row_of_basis)
                x = [self._load(x_m, vector * t.lanes) for vector in range(n_vectors)]
                for row in range(t.rows):
                    scalar = self._scalar(y_m, row)
                    basis.next += [
                        self._fma(x[vector], scalar, basis.values[row * n_vectors + vector])
                        for vector in range(n_vectors)
                    ]
            total, ratios = tile.values[0], []
            for (row, vector), product in zip(cells, basis.next, strict=True):
                wh, value = self._max(product, FLOOR), self._load(v, row * width + vector * t.lanes)
                ratios.append(self._quotient(value, wh))
                if measure:  # V log(V/WH) − V + WH, never negative
                    log = self._log(self._max(ratios[-1], 1e-37))
                    total = self.b.fadd(total, self._fma(value, log, self.b.fsub(wh, value)))
            tile.next = [total]
            with self._loop(n_bases) as basis:
                row_of_basis = self.b.mul(basis.index, self.i64(width))
                y_m, out_m = self._at(y, row_of_basis), self._at(out, row_of_basis)
                sums = [self._load(out_m, vector * t.lanes) for vector in range(n_vectors)]
                for row in range(t.rows):
                    scalar = self._scalar(y_m, row)
                    for vector in range(n_vectors):
                        sums[vector] = self._fma(ratios[row * n_vectors + vector], scalar, sums[vector])
                for vector in range(n_vectors):
                    self._store(sums[vector], out_m, vector * t.lanes)
        self.b.ret(self._sum(tile.next[0]) if measure else self.float(0.0))
        return f

    def _half(self, panels: Sequence[Any], measure: bool) -> Any:
        """Update all of X: panels of `vectors` vectors, then one of what is left; returns the divergence."""
        t, width = self.tile, self.tile.width
        arguments = [self.pointer] * 6 + [self.i64] * 3
        f = self._function(f"half_{int(measure)}", self.double, arguments)
        V, X, Y, scratch, inverse_y, inverse_x, n_vectors, n_tiles, n_bases = f.args
        out = self._at(scratch, self.b.mul(n_bases, self.i64(t.lanes)))
        lanes, zero = self.i64(t.lanes), self.ir.Constant(self.vector, None)
        with self._loop(n_bases) as basis:
            self._store(zero, self._at(scratch, self.b.mul(basis.index, lanes)))
        panel_size, V_size = (self.b.mul(n, self.i64(k)) for n, k in ((n_bases, width), (n_tiles, t.rows * width)))
        n_panels = self.b.udiv(self.b.add(n_vectors, self.i64(t.vectors - 1)), self.i64(t.vectors))
        with self._loop(n_panels, [self.double(0.0)]) as panel:
            x = self._at(X, self.b.mul(panel.index, panel_size))
            v = self._at(V, self.b.mul(panel.index, V_size))
            left = self.b.sub(n_vectors, self.b.mul(panel.index, self.i64(t.vectors)))
            after = self.b.append_basic_block()
            blocks = [self.b.append_basic_block() for _ in panels]
            choice = self.b.switch(left, blocks[-1])
            for number, block in enumerate(blocks[:-1], 1):
                choice.add_case(self.i64(number), block)
            results = []
            for function, block in zip(panels, blocks, strict=True):
                self.b.position_at_end(block)
                results.append((self.b.call(function, [v, x, Y, out, n_tiles, n_bases]), block))
                self.b.branch(after)
            self.b.position_at_end(after)
            divergence = self.b.phi(self.float)
            for result, block in results:
                divergence.add_incoming(result, block)
            panel.next = [self.b.fadd(panel.values[0], self.b.fpext(divergence, self.double))]
            with self._loop(n_bases) as basis:
                offset = self.b.mul(basis.index, self.i64(width))
                inverse = self._scalar(inverse_y, basis.index)
                total = self._at(scratch, self.b.mul(basis.index, lanes))
                summed = self._load(total)
                for vector in range(t.vectors):  # lanes beyond the last are zero and stay so
                    place = self._at(x, offset, vector * t.lanes)
                    factor = self.b.fmul(self._load(self._at(out, offset), vector * t.lanes), inverse)
                    new = self.b.fmul(self._load(place), factor)
                    self._store(new, place)
                    summed = self.b.fadd(summed, new)
                self._store(summed, total)
        with self._loop(n_bases) as basis:
            total = self._sum(self._load(self._at(scratch, self.b.mul(basis.index, lanes))))
            least = self.float(TINY)
            total = self.b.select(self.b.fcmp_ordered(">", total, least), total, least)
            self.b.store(self.b.fdiv(self.float(1.0), total), self._at(inverse_x, basis.index), align=4)
        self.b.ret(panel.next[0])
        return f

    def _iterations(self, plain: Any, measured: Any) -> None:
        """`run`: whole iterations, the last one's divergence measured between its two halves."""
        arguments = [self.pointer] * 7 + [self.i64] * 8
        f = self._function("run", self.double, arguments, public=True)
        V_rows, V_columns, W, H, scratch, inverse_w, inverse_h, *rest = f.args
        f_vectors, f_tiles, n_vectors, n_tiles, n_bases, n_iter, update_bases, measure = rest
        mode = self._flush()
        with self._loop(n_iter) as turn:
            with self.b.if_then(self.b.icmp_unsigned("!=", update_bases, self.i64(0))):
                self.b.call(plain, [V_rows, W, H, scratch, inverse_h, inverse_w, f_vectors, n_tiles, n_bases])
            last = self.b.icmp_unsigned("==", turn.index, self.b.sub(n_iter, self.i64(1)))
            watched = self.b.and_(last, self.b.icmp_unsigned("!=", measure, self.i64(0)))
            operands = [V_columns, H, W, scratch, inverse_w, inverse_h, n_vectors, f_tiles, n_bases]
            blocks = [self.b.append_basic_block() for _ in range(3)]
            self.b.cbranch(watched, blocks[0], blocks[1])
            results = []
            for block, function in zip(blocks, (measured, plain), strict=False):
                self.b.position_at_end(block)
                results.append(self.b.call(function, operands))
                self.b.branch(blocks[2])
            self.b.position_at_end(blocks[2])
            divergence = self.b.phi(self.double)
            for block, result in zip(blocks, results, strict=False):
                divergence.add_incoming(result, block)
        self._restore(mode)
        self.b.ret(divergence)
