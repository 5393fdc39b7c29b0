"""KL-NMF's updates on a CPU's matrix units (Intel AMX): float32's precision from products of bfloat16.

Every operand is split into two bfloat16 numbers, `x = high + low`, and `x y ≈ high high + low high + high low`,
summed in float32. What is lost of a product is 2⁻¹⁵ of it at most and nothing on average; 200 iterations end
about as near to float64's as those of float32 do (LOG.md). WH is never less than 10⁻¹⁸, where V's maximum is one.

An iteration is one pass over V, a panel of 32 rows at a time. With the activations held, a panel's new bases need that
panel of V alone. Then the panel adds its part to the activations' update. A block of V/(WH) is made in three steps: a
product on the matrix units, quotients on the vector units, a product again. Each step overlaps with those of its
neighbours.

Layout, padded with zeros: V `[panel][frames / 16][half][16][16]`, W `[rows][32]`, H `[32][frames]`. The matrix units'
operands are tiles of 16 rows of 16 pairs, a pair being the two bfloat16 numbers of 32 bits. Each comes twice, the high
parts and then the low ones:

- `W_rows`, of a half: row f, pair j: `W[f, j]` and `W[f, 16 + j]`;
- `W_columns`, of 16 bases: row m, pair j: `W[j, m]` and `W[16 + j, m]`;
- `H_rows`, of 16 frames: row j, pair n: `H[j, n]` and `H[16 + j, n]`;
- `H_columns`, of 32 frames and 16 bases: row j, pair m: `H[m, j]` and `H[m, 16 + j]`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avsep.nmf import code, cpu
from avsep.nmf.code import FLOOR, TINY, Emitter, zeros

MAX_BASES = 31  # the 32nd is a constant that keeps WH above zero
_TILE = 256  # numbers of 32 bits
_BASES, _PANEL, _PANELS = 32, 32, 4  # of H; of W; how many of these share a block of H
_SPARE = 7  # the register for operands that are used up at once
_TRUNCATED = 7e-6  # what cutting off loses on average
_HIGH_HALF = 0xFFFF0000 - 2**32  # of 32 bits, signed
_FIXED, _PER_PAIR, _PER_PANEL = 17 * _TILE, 12 * _TILE, 8 * _TILE  # scratch, see `_Updates._run`
# palette 1, eight registers of 16 rows of 64 bytes
_CONFIG = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


class Kernel:
    """The compiled updates.

    Args:
        machine_code: the object file that `build` made.
    """

    def __init__(self, machine_code: bytes) -> None:
        self.code = code.Code(machine_code, cpu.AVX512)
        self.run = self.code.function("run", ctypes.c_double, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 6)

    def start(self, V: Tensor, W: Tensor, H: Tensor) -> OnMatrices:
        """Lay one clip out: V `(F, N)`, W `(F, M)`, H `(M, N)`, float32 on the CPU, M at most 31."""
        return OnMatrices(self, V, W, H)


class OnMatrices(code.Factorization):
    """One clip's factorisation under way, in the kernel's layout."""

    def __init__(self, kernel: Kernel, V: Tensor, W: Tensor, H: Tensor) -> None:
        self.kernel, self.code, (self.n_bins, self.n_frames), self.n_bases = kernel, kernel.code, V.shape, len(H)
        self.n_panels, self.n_pairs = -(-self.n_bins // (_PANEL * _PANELS)) * _PANELS, -(-self.n_frames // 32)
        rows, frames = self.n_panels * _PANEL, self.n_pairs * 32
        padded = torch.zeros(rows, frames)
        padded[: self.n_bins, : self.n_frames] = V
        self.V = zeros(rows * frames).view(self.n_panels, -1, 2, 16, 16)
        self.V.copy_(padded.view(self.n_panels, 2, 16, -1, 16).permute(0, 3, 1, 2, 4))
        self.W, self.H = zeros(rows * _BASES).view(rows, -1), zeros(_BASES * frames).view(-1, frames)
        self.W[: self.n_bins, : self.n_bases], self.H[: self.n_bases, : self.n_frames] = W, H

    def run(self, n_iter: int, *, update_bases: bool = True, measure: bool = False) -> Tensor:
        """Do `n_iter` iterations; return the divergence before the last update, if it is to be measured, `(1,)`."""
        if n_iter < 1:
            return torch.full((1,), torch.nan)
        scratch = zeros(_FIXED + self.n_pairs * _PER_PAIR + (_PANELS if update_bases else self.n_panels) * _PER_PANEL)
        n_blocks = -(-self.n_frames // 16)
        divergence = self.kernel.run(
            *(x.data_ptr() for x in (self.V, self.W, self.H, scratch)),
            _CONFIG,
            *(self.n_panels, self.n_pairs, n_blocks, n_iter, int(update_bases), int(measure)),
        )
        return torch.tensor([divergence])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return W `(F, M)` and H `(M, N)`."""
        return self.W[: self.n_bins, : self.n_bases], self.H[: self.n_bases, : self.n_frames]


def find() -> Kernel | None:
    """Return this CPU's kernel; None where it has no matrix units, or they may not be used."""
    if cpu.load() is None or sys.platform != "linux":
        return None
    try:
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")) or not permitted():
            return None
        return Kernel(code.cached(__file__, cpu.AVX512, build))
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


@functools.cache
def load() -> Kernel | None:
    """Return what `find` does, of which there is one per process."""
    return find()


def permitted() -> bool:
    """Ask Linux for the registers of the matrix units, for this whole process and those that it forks.

    A signal's frame then has room for them. So no thread can set an alternate signal stack smaller than
    `getauxval(AT_MINSIGSTKSZ)`, about 12 kB, any more (ENOMEM). Python's faulthandler sets a larger one. Where a thread
    has a smaller one already, Linux refuses, and the vector units do the work.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def build() -> bytes:
    """Compile the updates for this machine: an object file."""
    return _Updates().compile()


Steps = list[Callable[[], None]]  # of a sequence that is written interleaved with another


class _Updates(Emitter):
    """Writes the updates."""

    def __init__(self) -> None:
        super().__init__(cpu.AVX512)
        self.void = self.ir.VoidType()
        self.transposed = self._transpose()
        self.functions = {
            "h": self._prepare_activations(),
            "rows": self._pack_rows(),
            "columns": self._pack_columns(),
            "bases": self._bases(),
            "update_w": self._update_bases(),
            "plain": self._activations(measure=False),
            "measured": self._activations(measure=True),
            "update_h": self._update_activations(),
        }
        self._run()

    # ------------------------------------------------------------------ small pieces

    def _times(self, index: Any, size: int) -> Any:
        return self.b.mul(index, self.i64(size))

    def _tile(self, name: str, *arguments: Any) -> None:
        i8 = self.ir.IntType(8)
        values = [i8(a) if isinstance(a, int) else a for a in arguments]
        if name in ("tileloadd64", "tilestored64"):
            values.append(self.i64(64))
        self._call(f"llvm.x86.{name}", self.void, values)

    def _loaded(self, registers: Sequence[int], place: Any) -> Steps:
        """Load consecutive tiles."""

        def load(number: int) -> None:
            self._tile("tileloadd64", registers[number], self._at(place, number * _TILE))

        return [functools.partial(load, number) for number in range(len(registers))]

    def _cleared(self, register: int) -> Steps:
        return [lambda: self._tile("tilezero", register)]

    def _stored(self, register: int, place: Any) -> Steps:
        return [lambda: self._tile("tilestored64", register, place)]

    def _pack(self, first: Any, second: Any, *, rounded: bool) -> tuple[Any, Any]:
        """Split 16 pairs of floats into pairs of their high parts and of their low ones, rounded or cut off."""
        b, mask = self.b, self._splat(_HIGH_HALF)

        def paired(bits: Sequence[Any]) -> Any:
            either = self.i32(0xF8)  # a | (b & c); written as such it would become a slower permutation
            upper = b.lshr(bits[0], self._splat(16))
            return b.bitcast(
                self._call("llvm.x86.avx512.pternlog.d.512", self.ints, [upper, bits[1], mask, either]), self.vector
            )

        bits = [b.bitcast(x, self.ints) for x in (first, second)]
        if rounded:
            bits = [b.add(x, self._splat(0x8000)) for x in bits]
        highs = [b.bitcast(b.and_(x, mask), self.vector) for x in bits]
        lows = [b.bitcast(b.fsub(x, h), self.ints) for x, h in zip((first, second), highs, strict=True)]
        if rounded:
            lows = [b.add(x, self._splat(0x8000)) for x in lows]
        return paired(bits), paired(lows)

    def _store_packed(self, first: Any, second: Any, place: Any, *, rounded: bool = True) -> None:
        """Store pairs' high parts, and a tile later their low ones."""
        for part, value in enumerate(self._pack(first, second, rounded=rounded)):
            self._store(value, place, part * _TILE)

    def _transpose(self) -> Any:
        """Transpose a tile of numbers of 32 bits."""
        f = self._function("transpose", self.void, [self.pointer] * 2)
        source, target = f.args
        rows = [self._load(source, 16 * row) for row in range(16)]
        for distance in (8, 4, 2, 1):  # exchange the off-diagonal quarters, of ever smaller squares
            new = list(rows)
            for row in (r for r in range(16) if not r & distance):
                a, b = rows[row], rows[row + distance]
                lower = [lane if not lane & distance else 16 + lane - distance for lane in range(16)]
                upper = [lane + distance if not lane & distance else 16 + lane for lane in range(16)]
                new[row] = self.b.shuffle_vector(a, b, self.ir.Constant(self.ints, lower))
                new[row + distance] = self.b.shuffle_vector(a, b, self.ir.Constant(self.ints, upper))
            rows = new
        for row, value in enumerate(rows):
            self._store(value, target, 16 * row)
        self.b.ret_void()
        return f

    def _inverse(self, total: Any) -> Any:
        least = self.ir.Constant(total.type, TINY if total.type == self.float else [TINY] * 16)
        one = self.ir.Constant(total.type, 1.0 if total.type == self.float else [1.0] * 16)
        return self.b.fdiv(one, self.b.select(self.b.fcmp_ordered(">", total, least), total, least))

    # ------------------------------------------------------------------ operands

    def _prepare_activations(self) -> Any:
        """Pack H into `H_rows` and `H_columns`, and sum it: `1 / (H 1)`."""
        f = self._function("prepare_activations", self.void, [self.pointer] * 5 + [self.i64])
        H, H_rows, H_columns, inverse_h, packed, n_pairs = f.args
        frames, zero, constant = self._times(n_pairs, 32), self._splat(0.0), self._splat(FLOOR**0.5)
        with self._loop(n_pairs) as pair:
            column = self._at(H, self._times(pair.index, 32))
            rows = self._at(H_rows, self._times(pair.index, 4 * _TILE))
            with self._loop(self.i64(16)) as j:
                upper = self._at(column, self.b.mul(j.index, frames))
                lower = self._at(upper, self.b.mul(self.i64(16), frames))
                place = self._at(rows, self._times(j.index, 16))
                is_last = self.b.icmp_unsigned("==", j.index, self.i64(15))
                for block in range(2):
                    first, second = (self._load(x, 16 * block) for x in (upper, lower))
                    second = self.b.fadd(second, self.b.select(is_last, constant, zero))
                    self._store_packed(first, second, self._at(place, block * 2 * _TILE))
            columns = self._at(H_columns, self._times(pair.index, 4 * _TILE))
            with self._loop(self.i64(2)) as half:
                place = self._at(columns, self._times(half.index, 2 * _TILE))
                with self._loop(self.i64(16)) as j:
                    basis = self.b.add(self._times(half.index, 16), j.index)
                    row = self._at(column, self.b.mul(basis, frames))
                    self._store_packed(self._load(row), self._load(row, 16), self._at(packed, self._times(j.index, 16)))
                for part in (0, _TILE):
                    self.b.call(self.transposed, [self._at(packed, part), self._at(place, part)])
        with self._loop(self.i64(_BASES)) as basis:
            row = self._at(H, self.b.mul(basis.index, frames))
            with self._loop(self._times(n_pairs, 2), [zero]) as vector:
                vector.next = [self.b.fadd(vector.values[0], self._load(self._at(row, self._times(vector.index, 16))))]
            self.b.store(self._inverse(self._sum(vector.next[0])), self._at(inverse_h, basis.index), align=4)
        self.b.ret_void()
        return f

    def _pack_rows(self) -> Any:
        """Pack a panel of W into `W_rows`."""
        f = self._function("pack_rows", self.void, [self.pointer] * 2)
        W, W_rows = f.args
        constant = self.ir.Constant(self.vector, [0.0] * 15 + [FLOOR**0.5])
        with self._loop(self.i64(16)) as j:
            for half in range(2):
                row = self._at(W, self._times(j.index, 32), half * 512)
                place = self._at(W_rows, self._times(j.index, 16), half * 2 * _TILE)
                self._store_packed(self._load(row), self.b.fadd(self._load(row, 16), constant), place)
        self.b.ret_void()
        return f

    def _pack_columns(self) -> Any:
        """Pack a panel of W into `W_columns`, and add it to the sums."""
        f = self._function("pack_columns", self.void, [self.pointer] * 4)
        W, W_columns, sums, packed = f.args
        for half in range(2):
            with self._loop(self.i64(16), [self.ir.Constant(self.vector, None)]) as j:
                upper = self._at(W, self._times(j.index, 32), half * 16)
                first, second = self._load(upper), self._load(upper, 512)
                self._store_packed(first, second, self._at(packed, self._times(j.index, 16)))
                j.next = [self.b.fadd(j.values[0], self.b.fadd(first, second))]
            total = self.b.fadd(self._load(sums, 16 * half), j.next[0])
            self._store(total, sums, 16 * half)
            for part in (0, _TILE):
                self.b.call(self.transposed, [self._at(packed, part), self._at(W_columns, half * 2 * _TILE + part)])
        self.b.ret_void()
        return f

    # ------------------------------------------------------------------ the three steps

    def _together(self, vector_steps: Steps, matrix_steps: Steps) -> None:
        """Write two independent sequences so that they run side by side."""
        done = 0
        for number, step in enumerate(vector_steps, 1):
            step()
            until = len(matrix_steps) * number // len(vector_steps)
            for matrix_step in matrix_steps[done:until]:
                matrix_step()
            done = until
        for matrix_step in matrix_steps[done:]:
            matrix_step()

    def _multiply(self, total: int, left: tuple[int, int] | Any, right: tuple[int, int] | Any) -> Steps:
        """`total += left × right`: one in registers, its high and its low part, the other in memory."""

        def times(part: int) -> None:
            operands = (_SPARE, right[part]) if isinstance(right, tuple) else (left[part], _SPARE)
            self._tile("tdpbf16ps", total, *operands)

        place = left if isinstance(right, tuple) else right
        return [
            *self._loaded((_SPARE,), place),
            lambda: times(0),
            lambda: times(1),
            *self._loaded((_SPARE,), self._at(place, _TILE)),
            lambda: times(0),
        ]

    def _quotients(
        self, first: Any, second: Any, products: Any, ratios: Any, total: Any = None, ahead: Any = None
    ) -> Steps:
        """From two tiles of V and of WH make one of packed V/(WH).

        Their divergence is added to `total`; what lies `ahead` of V is fetched from memory into the second cache.
        """

        def row(number: int) -> None:
            wh = [self._load(products, tile * _TILE + 16 * number) for tile in range(2)]
            v = [self._load(place, 16 * number) for place in (first, second)]
            for place in (first, second) if ahead is not None else ():
                later = self._at(place, ahead, 16 * number)
                self._call("llvm.prefetch.p0", self.void, [later, *(self.i32(n) for n in (0, 2, 1))])
            pair = self._two_quotients(v, wh, 1.0 if total is not None else 1.0 + _TRUNCATED)
            if total is not None:  # V log(V/WH) − V + WH, never negative
                terms = self._load(total)
                for value, product, ratio in zip(v, wh, pair, strict=True):
                    log = self._log(self._max(ratio, 1e-37))
                    terms = self.b.fadd(terms, self._fma(value, log, self.b.fsub(product, value)))
                self._store(terms, total)
            self._store_packed(pair[0], pair[1], self._at(ratios, 16 * number), rounded=total is not None)

        return [functools.partial(row, number) for number in range(16)]

    def _two_quotients(self, v: Sequence[Any], x: Sequence[Any], one: float) -> list[Any]:
        """`v / x` of two vectors from one reciprocal, an approximation and one step of Newton's."""
        b = self.b
        both = b.fmul(*x)
        y = self._reciprocal(both)
        y = self._fma(y, self._fma(b.fneg(both), y, self._splat(one)), y)
        return [b.fmul(b.fmul(v[0], x[1]), y), b.fmul(b.fmul(v[1], x[0]), y)]

    def _bases(self) -> Any:
        """`out ← (V/(WH)) Hᵀ` for a panel, a tile for each half of its rows and of the bases."""
        f = self._function("bases", self.void, [self.pointer] * 7 + [self.i64])
        V, W_rows, H_rows, H_columns, products, ratios, out, n_pairs = f.args
        product_tile, high, low = 4, 5, 6
        panel_size = self._times(n_pairs, 4 * _TILE)

        def product(pair: Any, half: int) -> Steps:
            w, h = self._at(W_rows, half * 2 * _TILE), self._at(H_rows, self._times(pair, 4 * _TILE))
            steps = self._loaded((high, low), w)
            for block in range(2):
                steps += self._cleared(product_tile)
                steps += self._multiply(product_tile, (high, low), self._at(h, block * 2 * _TILE))
                steps += self._stored(product_tile, self._at(products, (2 * half + block) * _TILE))
            return steps

        def quotients(pair: Any, half: int) -> Steps:
            v = self._at(V, self._times(pair, 4 * _TILE), half * _TILE)
            wh, ratio = (self._at(x, half * 2 * _TILE) for x in (products, ratios))
            return self._quotients(v, self._at(v, 2 * _TILE), wh, ratio, ahead=panel_size)

        def sums(pair: Any, half: int) -> Steps:
            r, h = self._at(ratios, half * 2 * _TILE), self._at(H_columns, self._times(pair, 4 * _TILE))
            steps = self._loaded((high, low), r)
            for bases in range(2):
                steps += self._multiply(2 * half + bases, (high, low), self._at(h, bases * 2 * _TILE))
            return steps

        zero, last = self.i64(0), self.b.sub(n_pairs, self.i64(1))
        for register in range(4):
            self._tile("tilezero", register)
        self._together([], product(zero, 0))
        self._together(quotients(zero, 0), product(zero, 1))
        with self.b.if_then(self.b.icmp_unsigned(">", n_pairs, self.i64(1))), self._loop(last) as pair:
            following = self.b.add(pair.index, self.i64(1))
            self._together(quotients(pair.index, 1), [*product(following, 0), *sums(pair.index, 0)])
            self._together(quotients(following, 0), [*product(following, 1), *sums(pair.index, 1)])
        self._together(quotients(last, 1), sums(last, 0))
        self._together([], sums(last, 1))
        for register in range(4):
            self._tile("tilestored64", register, self._at(out, register * _TILE))
        self.b.ret_void()
        return f

    def _activations(self, measure: bool) -> Any:
        """Add four panels' `Wᵀ (V/(WH))` to the numerators; their divergence to `total`, if it is to be measured."""
        name = "activations_measured" if measure else "activations"
        f = self._function(name, self.void, [self.pointer] * 7 + [self.i64] * 2)
        V, packs, H_rows, products, ratios, numerators, total, n_blocks, panel_size = f.args
        h, product_tile, r = (2, 3), 4, (5, 6)

        def product(block: Any, panel: int) -> Steps:
            place = self._at(H_rows, self._times(block, 2 * _TILE))
            steps = [] if panel else self._loaded(h, place)
            for half in range(2):
                steps += self._cleared(product_tile)
                steps += self._multiply(product_tile, self._at(packs, panel * _PER_PANEL + half * 2 * _TILE), h)
                steps += self._stored(product_tile, self._at(products, (panel % 2 * 2 + half) * _TILE))
            return steps

        def quotients(block: Any, panel: int) -> Steps:
            v = self._at(V, self.b.mul(panel_size, self.i64(panel)), self._times(block, 2 * _TILE))
            wh, ratio = (self._at(x, panel % 2 * 2 * _TILE) for x in (products, ratios))
            return self._quotients(v, self._at(v, _TILE), wh, ratio, total if measure else None)

        def sums(block: Any, panel: int) -> Steps:
            w, ratio = self._at(packs, panel * _PER_PANEL + 4 * _TILE), self._at(ratios, panel % 2 * 2 * _TILE)
            place = self._at(numerators, self._times(block, 2 * _TILE))
            steps = [*([] if panel else self._loaded((0, 1), place)), *self._loaded(r, ratio)]
            for bases in range(2):
                steps += self._multiply(bases, self._at(w, bases * 2 * _TILE), r)
            if panel == 3:
                steps += [*self._stored(0, place), *self._stored(1, self._at(place, _TILE))]
            return steps

        zero, last = self.i64(0), self.b.sub(n_blocks, self.i64(1))
        self._together([], product(zero, 0))
        self._together(quotients(zero, 0), product(zero, 1))
        with self.b.if_then(self.b.icmp_unsigned(">", n_blocks, self.i64(1))), self._loop(last) as block:
            now, following = block.index, self.b.add(block.index, self.i64(1))
            self._together(quotients(now, 1), [*product(now, 2), *sums(now, 0)])
            self._together(quotients(now, 2), [*product(now, 3), *sums(now, 1)])
            self._together(quotients(now, 3), [*product(following, 0), *sums(now, 2)])
            self._together(quotients(following, 0), [*product(following, 1), *sums(now, 3)])
        self._together(quotients(last, 1), [*product(last, 2), *sums(last, 0)])
        self._together(quotients(last, 2), [*product(last, 3), *sums(last, 1)])
        self._together(quotients(last, 3), sums(last, 2))
        self._together([], sums(last, 3))
        self.b.ret_void()
        return f

    # ------------------------------------------------------------------ the updates

    def _update_bases(self) -> Any:
        """`W ← W ∘ out / (1 Hᵀ)` for a panel."""
        f = self._function("update_bases", self.void, [self.pointer] * 3)
        W, out, inverse_h = f.args
        inverse = [self._load(inverse_h, 16 * half) for half in range(2)]
        with self._loop(self.i64(16)) as j:
            for half in range(2):
                row = self._at(W, self._times(j.index, 32), half * 512)
                for bases in range(2):
                    factor = self._load(self._at(out, self._times(j.index, 16)), (2 * half + bases) * _TILE)
                    old = self._load(row, 16 * bases)
                    self._store(self.b.fmul(old, self.b.fmul(factor, inverse[bases])), row, 16 * bases)
        self.b.ret_void()
        return f

    def _update_activations(self) -> Any:
        """`H ← H ∘ numerators / (Wᵀ 1)`."""
        f = self._function("update_activations", self.void, [self.pointer] * 3 + [self.i64] * 2)
        H, numerators, sums, n_blocks, frames = f.args
        with self._loop(self.i64(2)) as half, self._loop(self.i64(16)) as j:
            basis = self.b.add(self._times(half.index, 16), j.index)
            inverse = self._splat(self._inverse(self.b.load(self._at(sums, basis), align=4, typ=self.float)))
            row = self._at(H, self.b.mul(basis, frames))
            numerator = self._at(numerators, self._times(half.index, _TILE), self._times(j.index, 16))
            with self._loop(n_blocks) as block:
                place = self._at(row, self._times(block.index, 16))
                factor = self._load(self._at(numerator, self._times(block.index, 2 * _TILE)))
                self._store(self.b.fmul(self._load(place), self.b.fmul(factor, inverse)), place)
        self.b.ret_void()
        return f

    def _run(self) -> None:
        """`run`: whole iterations, the last one's divergence measured between its two halves."""
        f = self._function("run", self.double, [self.pointer] * 5 + [self.i64] * 6, public=True)
        V, W, H, scratch, config, n_panels, n_pairs, n_blocks, n_iter, update_bases, measure = f.args
        b, zero, functions = self.b, self.ir.Constant(self.vector, None), self.functions
        mode = self._flush()
        self._tile("ldtilecfg", config)

        products, ratios, out, packed, vectors = (self._at(scratch, 4 * _TILE * part) for part in range(5))
        sums, inverse_h, total = (self._at(vectors, offset) for offset in (0, 32, 64))
        H_rows = self._at(vectors, _TILE)
        H_columns, numerators = (self._at(H_rows, self.b.mul(n_pairs, self.i64(4 * k * _TILE))) for k in (1, 2))
        packs = self._at(numerators, self._times(n_pairs, 4 * _TILE))
        updating = b.icmp_unsigned("!=", update_bases, self.i64(0))
        super_size = b.select(updating, self.i64(0), self.i64(_PANELS * _PER_PANEL))  # one place for all, or one each
        panel_size = self._times(n_pairs, 4 * _TILE)

        def clear_sums() -> None:
            for half in range(2):
                self._store(zero, sums, 16 * half)

        def pack(w: Any, place: Any) -> None:
            b.call(functions["rows"], [w, place])
            b.call(functions["columns"], [w, self._at(place, 4 * _TILE), sums, packed])

        clear_sums()
        with b.if_then(b.not_(updating)), self._loop(n_panels) as panel:
            pack(
                self._at(W, self._times(panel.index, _PANEL * _BASES)),
                self._at(packs, self._times(panel.index, _PER_PANEL)),
            )
        with self._loop(n_iter, [self.double(0.0)]) as turn:
            last = b.icmp_unsigned("==", turn.index, b.sub(n_iter, self.i64(1)))
            watched = b.and_(last, b.icmp_unsigned("!=", measure, self.i64(0)))
            b.call(functions["h"], [H, H_rows, H_columns, inverse_h, packed, n_pairs])
            with self._loop(self._times(n_pairs, 4 * _TILE // 16)) as vector:
                self._store(zero, self._at(numerators, self._times(vector.index, 16)))
            with b.if_then(updating):
                clear_sums()
            with self._loop(b.udiv(n_panels, self.i64(_PANELS)), [self.double(0.0)]) as group:
                v = self._at(V, self._times(b.mul(group.index, panel_size), _PANELS))
                place = self._at(packs, b.mul(group.index, super_size))
                with b.if_then(updating), self._loop(self.i64(_PANELS)) as panel:
                    number = b.add(self._times(group.index, _PANELS), panel.index)
                    w = self._at(W, self._times(number, _PANEL * _BASES))
                    rows = self._at(place, self._times(panel.index, _PER_PANEL))
                    b.call(functions["rows"], [w, rows])
                    v_panel = self._at(v, b.mul(panel.index, panel_size))
                    b.call(functions["bases"], [v_panel, rows, H_rows, H_columns, products, ratios, out, n_pairs])
                    b.call(functions["update_w"], [w, out, inverse_h])
                    pack(w, rows)
                self._store(zero, total)
                operands = [v, place, H_rows, products, ratios, numerators, total, n_blocks, panel_size]
                with b.if_else(watched) as (then, otherwise):
                    with then:
                        b.call(functions["measured"], operands)
                    with otherwise:
                        b.call(functions["plain"], operands)
                group.next = [b.fadd(group.values[0], b.fpext(self._sum(self._load(total)), self.double))]
            b.call(functions["update_h"], [H, numerators, sums, self._times(n_pairs, 2), self._times(n_pairs, 32)])
            turn.next = [group.next[0]]
        self._tile("tilerelease")
        self._restore(mode)
        b.ret(turn.next[0])
