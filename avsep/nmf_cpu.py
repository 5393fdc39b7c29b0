"""KL-NMF's updates as machine code for this CPU, emitted by LLVM when first needed and then cached.

One half of an iteration is one pass over V: with Y held, `X ← X ∘ (Y (V/(XᵀY))ᵀ) / (Y 1)`. It serves
both factors: for the bases `X = Wᵀ` and `Y = H`; for the activations `X = H` and `Y = Wᵀ`, on
V transposed. A tile of `V/(XᵀY)` is made in registers and used up there, so nothing of V's
size is ever written, and every lane of every multiplication counts whatever M is.

Layout: X `(M, n)` lies in panels `[n / S][M][S]`, S floats wide, padded with zeros, and V in
`[n_x / S][n_y][S]`, in the order in which the pass reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLOOR = 1e-20  # of WH, as in avsep.nmf
_TINY = float(torch.finfo(torch.float32).tiny)
_FLUSH = 0x8040  # MXCSR bits: values below 1e-38 are zero, in and out; else each costs 100 cycles


@dataclass(frozen=True)
class Tile:
    """How many registers' worth of V/(WH) are in flight, by instruction set: `vectors × rows` of `lanes`."""

    lanes: int
    vectors: int
    rows: int
    reciprocal: str  # an approximation of 12 bits or more

    @property
    def width(self) -> int:
        """S, a panel's width in floats."""
        return self.lanes * self.vectors


AVX512 = Tile(16, 3, 8, "llvm.x86.avx512.rcp14.ps.512")  # 24 of 32 registers
AVX2 = Tile(8, 3, 4, "llvm.x86.avx.rcp.ps.256")  # 12 of 16


class Kernel:
    """The compiled updates, for one CPU.

    Args:
        tile: the instruction set's.
        machine_code: the object file that `build` made.
    """

    def __init__(self, tile: Tile, machine_code: bytes) -> None:
        import llvmlite.binding as llvm

        self.tile = tile
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(tile))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()
        prototype = ctypes.CFUNCTYPE(ctypes.c_double, *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 8)
        self._run = prototype(self._engine.get_function_address("run"))  # ctypes lets other threads run meanwhile
        pointers = [ctypes.c_void_p] * 3
        prototype = ctypes.CFUNCTYPE(None, *pointers, ctypes.c_int64, ctypes.c_void_p)
        self._bend = prototype(self._engine.get_function_address("bend"))
        prototype = ctypes.CFUNCTYPE(None, *pointers, ctypes.c_int64, ctypes.c_float, ctypes.c_float)
        self._extrapolate = prototype(self._engine.get_function_address("extrapolate"))

    def problem(self, V: Tensor, W: Tensor, H: Tensor) -> Problem:
        """Lay one clip out: V `(F, N)`, W `(F, M)`, H `(M, N)`, float32 on the CPU."""
        return Problem(self, V, W, H)


class Problem:
    """One clip's factorisation under way, in the kernel's layout."""

    def __init__(self, kernel: Kernel, V: Tensor, W: Tensor, H: Tensor) -> None:
        self.kernel, (self.n_bins, self.n_frames) = kernel, V.shape
        self.V_rows, self.V_columns = self._blocks(V), self._blocks(V.mT)
        self.W, self.H = self._panels(W.mT), self._panels(H)
        self.n_bases = len(H)
        self._scratch = _zeros(self.n_bases * (kernel.tile.width + kernel.tile.lanes))
        self._inverse_sums = torch.empty(2, self.n_bases)
        self.sum_up()

    def run(self, n_iter: int, *, update_bases: bool = True, measure: bool = False) -> Tensor:
        """Do `n_iter` iterations; return the divergence before the last update, if it is to be measured, `(1,)`."""
        if n_iter < 1:
            return torch.full((1,), torch.nan)
        t = self.kernel.tile
        divergence = self.kernel._run(
            *(x.data_ptr() for x in (self.V_rows, self.V_columns, self.W, self.H, self._scratch, *self._inverse_sums)),
            *(-(-n // size) for n in (self.n_bins, self.n_frames) for size in (t.lanes, t.rows)),
            self.n_bases,
            n_iter,
            int(update_bases),
            int(measure),
        )
        return torch.tensor([divergence])

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """W and H in the kernel's layout, a batch of one; after changing them call `sum_up`."""
        return self.W.unsqueeze(0), self.H.unsqueeze(0)

    def sum_up(self) -> None:
        """Sum the factors that the next iteration starts from."""
        for X, inverse in zip((self.W, self.H), self._inverse_sums, strict=True):
            torch.sum(X, (0, 2), out=inverse).clamp_min_(_TINY).reciprocal_()

    def extrapolate(self, older: Sequence[Tensor], old: Sequence[Tensor], limit: Tensor) -> Tensor:
        """Go on from two earlier states along the logarithms' parabola; return the step's length, `(1,)`."""
        sizes = torch.zeros(3)
        change = bend = 0.0
        sides = [
            (x.data_ptr(), a.data_ptr(), b.data_ptr(), x.numel() // self.kernel.tile.lanes)
            for x, a, b in zip(self.state, older, old, strict=True)
        ]
        for side in sides:
            self.kernel._bend(*side, sizes.data_ptr())
            weight, squared_change, squared_bend = sizes.tolist()
            change += squared_change / max(weight, _TINY)
            bend += squared_bend / max(weight, _TINY)
        step = min(max((change / max(bend, _TINY)) ** 0.5, 1.0), float(limit))
        for side in sides:
            self.kernel._extrapolate(*side, 2 * (step - 1), step**2 - 1)
        self.sum_up()
        return torch.tensor([step], dtype=limit.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return W `(F, M)` and H `(M, N)`."""
        W, H = (x.transpose(0, 1).reshape(self.n_bases, -1) for x in (self.W, self.H))
        return W[:, : self.n_bins].mT, H[:, : self.n_frames]

    def _panels(self, X: Tensor) -> Tensor:
        """`(M, n)` → `[n / S][M][S]`."""
        width, (n_bases, n) = self.kernel.tile.width, X.shape
        padded = torch.zeros(n_bases, -(-n // width) * width)
        padded[:, :n] = X
        return _zeros(padded.numel()).view(-1, n_bases, width).copy_(padded.view(n_bases, -1, width).transpose(0, 1))

    def _blocks(self, V: Tensor) -> Tensor:
        """`(n_x, n_y)` → `[n_x / S][n_y, in whole tiles][S]`."""
        t, (n_x, n_y) = self.kernel.tile, V.shape
        blocks = _zeros(-(-n_x // t.width) * -(-n_y // t.rows) * t.rows * t.width)
        blocks = blocks.view(-1, -(-n_y // t.rows) * t.rows, t.width)
        whole = n_x // t.width
        blocks[:whole, :n_y] = V[: whole * t.width].reshape(whole, t.width, n_y).transpose(1, 2)
        if n_x % t.width:
            blocks[whole, :n_y, : n_x % t.width] = V[whole * t.width :].mT
        return blocks


def _zeros(n: int) -> Tensor:
    """Float32 zeros that start on a cache line."""
    x = torch.zeros(n + 16)
    return x[-x.data_ptr() % 64 // 4 :][:n]


@functools.cache
def load() -> Kernel | None:
    """Return this CPU's kernel; None where there is none (no AVX2, or llvmlite doesn't work here)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        tile = next((t for t, needs in _NEEDS if all(features.get(n) for n in needs)), None)
        return Kernel(tile, _machine_code(tile)) if tile else None
    except (ImportError, OSError, RuntimeError):
        return None


_NEEDS = ((AVX512, ("avx512f", "avx512dq", "avx512vl")), (AVX2, ("avx2", "fma")))


def _machine_code(tile: Tile) -> bytes:
    """Take the object file from the user's cache, or compile it and leave it there.

    Its name holds everything that it depends on. A file that is damaged, or not this user's,
    isn't used; a cache that can't be written is done without.
    """
    import llvmlite
    import llvmlite.binding as llvm

    parts = (Path(__file__).read_text(), llvmlite.__version__, llvm.get_host_cpu_name(), _features(tile), repr(tile))
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "avsep")
    path = folder / f"nmf-{name[:32]}.o"
    with contextlib.suppress(OSError, RuntimeError):
        digest, code = path.read_bytes()[:32], path.read_bytes()[32:]
        if path.stat().st_uid == os.getuid() and hashlib.sha256(code).digest() == digest:
            return code
    code = build(tile)
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as f:
            f.write(hashlib.sha256(code).digest() + code)
        os.replace(f.name, path)
    return code


def _features(tile: Tile) -> str:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_features().flatten() if tile == AVX512 else "+avx2,+fma,+avx"


def _target_machine(tile: Tile) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu = llvm.get_host_cpu_name() if tile == AVX512 else ""
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=_features(tile), opt=3)


def build(tile: Tile) -> bytes:
    """Compile the updates for this machine, without a compiler: an object file."""
    import llvmlite.binding as llvm

    target = _target_machine(tile)
    module = llvm.parse_assembly(str(_Emitter(tile).module))
    module.verify()
    return target.emit_object(module)


@dataclass
class _Loop:
    index: Any
    values: list[Any]  # carried from turn to turn
    next: list[Any] = field(default_factory=list)  # what the body made of them; valid after the loop too


class _Emitter:
    """Writes the updates in LLVM's intermediate representation."""

    def __init__(self, tile: Tile) -> None:
        from llvmlite import ir

        self.ir, self.tile = ir, tile
        self.module = ir.Module("nmf")
        self.pointer, self.float, self.double = ir.PointerType(), ir.FloatType(), ir.DoubleType()
        self.i32, self.i64 = ir.IntType(32), ir.IntType(64)
        self.vector, self.ints = ir.VectorType(self.float, tile.lanes), ir.VectorType(self.i32, tile.lanes)
        self.suffix = f"v{tile.lanes}f32"
        self._declared: dict[str, Any] = {}
        panels = {(v, m): self._panel(v, m) for v in range(1, tile.vectors + 1) for m in (False, True)}
        plain, measured = (self._half([panels[v + 1, m] for v in range(tile.vectors)], m) for m in (False, True))
        self._iterations(plain, measured)
        self._extrapolation()

    # ------------------------------------------------------------------ small pieces

    def _function(self, name: str, returned: Any, arguments: Sequence[Any], *, public: bool = False) -> Any:
        f = self.ir.Function(self.module, self.ir.FunctionType(returned, arguments), name)
        if not public:
            f.linkage = "internal"
        self.b = self.ir.IRBuilder(f.append_basic_block())
        return f

    def _call(self, name: str, returned: Any, arguments: Sequence[Any]) -> Any:
        if name not in self._declared:
            kind = self.ir.FunctionType(returned, [a.type for a in arguments])
            self._declared[name] = self.ir.Function(self.module, kind, name)
        return self.b.call(self._declared[name], arguments)

    @contextlib.contextmanager
    def _loop(self, count: Any, values: Sequence[Any] = ()) -> Iterator[_Loop]:
        """Repeat a body `count` times, at least once."""
        before, body = self.b.block, self.b.append_basic_block()
        self.b.branch(body)
        self.b.position_at_end(body)
        loop = _Loop(self.b.phi(self.i64), [self.b.phi(v.type) for v in values])
        yield loop
        following = self.b.add(loop.index, self.i64(1))
        for phi, first, later in zip(
            [loop.index, *loop.values], [self.i64(0), *values], [following, *loop.next], strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, self.b.block)
        more, after = self.b.icmp_unsigned("<", following, count), self.b.append_basic_block()
        self.b.cbranch(more, body, after)
        self.b.position_at_end(after)

    def _at(self, pointer: Any, *offset: Any) -> Any:
        for o in offset:
            pointer = self.b.gep(pointer, [self.i64(o) if isinstance(o, int) else o], source_etype=self.float)
        return pointer

    def _load(self, pointer: Any, offset: int = 0) -> Any:
        return self.b.load(self._at(pointer, offset), align=4 * self.tile.lanes, typ=self.vector)

    def _store(self, value: Any, pointer: Any, offset: int = 0) -> None:
        self.b.store(value, self._at(pointer, offset), align=4 * self.tile.lanes)

    def _splat(self, value: Any) -> Any:
        if isinstance(value, (int, float)):
            kind = self.ints if isinstance(value, int) else self.vector
            return self.ir.Constant(kind, [value] * self.tile.lanes)
        undefined = self.ir.Constant(self.vector, self.ir.Undefined)
        one = self.b.insert_element(undefined, value, self.i32(0))
        return self.b.shuffle_vector(one, undefined, self.ir.Constant(self.ints, [0] * self.tile.lanes))

    def _scalar(self, pointer: Any, offset: Any = 0) -> Any:
        """Load one float into every lane."""
        return self._splat(self.b.load(self._at(pointer, offset), align=4, typ=self.float))

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._call(f"llvm.fma.{self.suffix}", self.vector, [x, y, z])

    def _polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """Evaluate a polynomial, highest power first."""
        y = self._splat(coefficients[0])
        for c in coefficients[1:]:
            y = self._fma(y, x, self._splat(c))
        return y

    def _max(self, x: Any, least: float) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, self._splat(least)), x, self._splat(least))

    def _min(self, x: Any, most: float) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", x, self._splat(most)), x, self._splat(most))

    def _quotient(self, v: Any, x: Any) -> Any:
        """`v / x` to float32's precision but for a last bit: an approximation and one step of Newton's."""
        rest = [self.ir.Constant(self.vector, None), self.ir.IntType(16)(-1)] if self.tile == AVX512 else []
        y = self._call(self.tile.reciprocal, self.vector, [x, *rest])
        error = self._fma(self.b.fneg(x), y, self._splat(1.0))
        rough = self.b.fmul(v, y)
        return self._fma(rough, error, rough)

    def _log(self, x: Any) -> Any:
        """Natural logarithm of positive normal numbers, to float32's precision (Cephes, logf)."""
        b = self.b
        bits = b.bitcast(x, self.ints)
        shifted = b.sub(bits, self._splat(0x3F3504F3))  # √½
        exponent = b.ashr(shifted, self._splat(23))
        mantissa = b.bitcast(b.sub(bits, b.shl(exponent, self._splat(23))), self.vector)
        x = b.fsub(mantissa, self._splat(1.0))
        square = b.fmul(x, x)
        y = b.fmul(b.fmul(x, square), self._polynomial(x, _LOG))
        y = self._fma(square, self._splat(-0.5), y)
        return self._fma(b.sitofp(exponent, self.vector), self._splat(0.6931471805599453), b.fadd(x, y))

    def _exp(self, x: Any) -> Any:
        """Exponential for |x| < 87, to float32's precision (Cephes, expf)."""
        b = self.b
        whole = self._call(f"llvm.rint.{self.suffix}", self.vector, [b.fmul(x, self._splat(1.4426950408889634))])
        x = self._fma(whole, self._splat(-0.693359375), x)
        x = self._fma(whole, self._splat(2.12194440e-4), x)
        y = self._fma(self._polynomial(x, _EXP), b.fmul(x, x), b.fadd(x, self._splat(1.0)))
        exponent = b.shl(b.add(b.fptosi(whole, self.ints), self._splat(127)), self._splat(23))
        return b.fmul(y, b.bitcast(exponent, self.vector))

    def _sum(self, x: Any) -> Any:
        f = self._declared.get("sum")
        if f is None:
            kind = self.ir.FunctionType(self.float, [self.float, self.vector])
            f = self._declared["sum"] = self.ir.Function(self.module, kind, f"llvm.vector.reduce.fadd.{self.suffix}")
        return self.b.call(f, [self.float(-0.0), x], fastmath=["reassoc"])

    # ------------------------------------------------------------------ the updates

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
                wh, value = self._max(product, _FLOOR), self._load(v, row * width + vector * t.lanes)
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
            least = self.float(_TINY)
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
        mode, saved = (self.b.alloca(self.i32) for _ in range(2))
        self._call("llvm.x86.sse.stmxcsr", self.ir.VoidType(), [saved])
        self.b.store(self.b.or_(self.b.load(saved, typ=self.i32), self.i32(_FLUSH)), mode)
        self._call("llvm.x86.sse.ldmxcsr", self.ir.VoidType(), [mode])
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
        self._call("llvm.x86.sse.ldmxcsr", self.ir.VoidType(), [saved])
        self.b.ret(divergence)

    def _changes(self, states: Sequence[Any], index: Any) -> tuple[Any, Any, Any, Any]:
        """Return a place in X, its value, its logarithm's first change and the second difference."""
        place, x0, x1 = (self._at(p, self.b.mul(index, self.i64(self.tile.lanes))) for p in states)
        x = [self._load(p) for p in (x0, x1, place)]
        ratios = (self._quotient(after, self._max(before, _TINY)) for before, after in itertools.pairwise(x))
        first, second = (self._log(self._min(self._max(r, 1e-8), 1e8)) for r in ratios)
        return place, x[2], first, self.b.fsub(second, first)

    def _extrapolation(self) -> None:
        """`bend`: sums of X and, weighted by X, of the squared change and second difference; `extrapolate`."""
        zero = self.ir.Constant(self.vector, None)
        f = self._function("bend", self.ir.VoidType(), [self.pointer] * 3 + [self.i64, self.pointer], public=True)
        *states, n_vectors, out = f.args
        with self._loop(n_vectors, [zero] * 3) as turn:
            _, x, change, bend = self._changes(states, turn.index)
            weight, changes, bends = turn.values
            turn.next = [
                self.b.fadd(weight, x),
                self._fma(self.b.fmul(x, change), change, changes),
                self._fma(self.b.fmul(x, bend), bend, bends),
            ]
        for i, total in enumerate(turn.next):
            self.b.store(self._sum(total), self._at(out, i), align=4)
        self.b.ret_void()
        arguments = [self.pointer] * 3 + [self.i64] + [self.float] * 2
        f = self._function("extrapolate", self.ir.VoidType(), arguments, public=True)
        *states, n_vectors, by_change, by_bend = f.args
        with self._loop(n_vectors) as turn:
            place, x, change, bend = self._changes(states, turn.index)
            way = self._fma(bend, self._splat(by_bend), self.b.fmul(change, self._splat(by_change)))
            self._store(self.b.fmul(x, self._exp(self._min(self._max(way, -40.0), 40.0))), place)
        self.b.ret_void()


_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_EXP = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
