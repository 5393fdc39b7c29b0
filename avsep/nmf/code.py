"""What the machine code of KL-NMF's updates shares: LLVM emits it when it is first needed, and it is then cached.

`Emitter` has the pieces that functions are written with, and the extrapolation of the accelerated mode, which
takes the factors in any layout.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-18  # of WH, where V's maximum is about one, inaudible: V/(WH) stays finite, and WH · WH above TINY
TINY = float(torch.finfo(torch.float32).tiny)  # keeps 0/0 at 0
_FLUSH = 0x8040  # MXCSR bits: values below 1e-38 are zero, in and out; else each costs 100 cycles


@dataclass(frozen=True)
class Instructions:
    """What a processor must have."""

    lanes: int  # floats in a register
    reciprocal: str  # an approximation of 12 bits or more

    @property
    def features(self) -> str:
        """LLVM's names of what may be used: all of this processor's with AVX-512, else no more than AVX2."""
        import llvmlite.binding as llvm

        return llvm.get_host_cpu_features().flatten() if self.lanes == 16 else "+avx2,+fma,+avx"

    def target_machine(self) -> Any:
        """Return LLVM's code generator."""
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        cpu = llvm.get_host_cpu_name() if self.lanes == 16 else ""
        return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=self.features, opt=3)


def zeros(n: int) -> Tensor:
    """Float32 zeros that start on a cache line."""
    x = torch.zeros(n + 16)
    return x[-x.data_ptr() % 64 // 4 :][:n]


def cached(source: str, instructions: Instructions, build: Callable[[], bytes]) -> bytes:
    """Take an object file from the user's cache, or build it and leave it there.

    Its name holds everything that it depends on: `source` is the file that writes it. A file that is
    damaged, or not this user's, isn't used; a cache that can't be written is done without.
    """
    import llvmlite
    import llvmlite.binding as llvm

    parts = (llvmlite.__version__, llvm.get_host_cpu_name(), instructions.features, repr(instructions))
    texts = [Path(file).read_bytes() for file in (__file__, source)]
    name = hashlib.sha256(b"\n".join([*texts, *(p.encode() for p in parts)])).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "avsep")
    except RuntimeError:  # no home folder
        return build()
    path = folder / f"nmf-{name[:32]}.o"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if path.stat().st_uid == os.getuid() and hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept[32:]
    code = build()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            written = Path(unfinished, "code")
            written.touch(mode=0o600)
            written.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(written, path)
    return code


class Code:
    """An object file's functions, ready to be called.

    Args:
        machine_code: what `Emitter.compile` made.
        instructions: those that it was made for.
    """

    def __init__(self, machine_code: bytes, instructions: Instructions) -> None:
        import llvmlite.binding as llvm

        self.lanes = instructions.lanes
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), instructions.target_machine())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()
        pointers = [ctypes.c_void_p] * 3
        self.bend = self.function("bend", None, *pointers, ctypes.c_int64, ctypes.c_void_p)
        self.extrapolate = self.function("extrapolate", None, *pointers, ctypes.c_int64, *[ctypes.c_float] * 2)

    def function(self, name: str, returned: Any, *arguments: Any) -> Callable[..., Any]:
        """Return a function; while it runs other threads do, too."""
        return ctypes.CFUNCTYPE(returned, *arguments)(self._engine.get_function_address(name))


class Factorization(ABC):
    """One clip's factorisation under way: W and H in the layout of the code that updates them, padded with zeros."""

    code: Code
    W: Tensor
    H: Tensor

    @abstractmethod
    def run(self, n_iter: int, *, update_bases: bool = True, measure: bool = False) -> Tensor:
        """Do `n_iter` iterations; return the divergence before the last update, if it is to be measured, `(1,)`."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return W `(F, M)` and H `(M, N)`."""

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """W and H, a batch of one; after changing them call `sum_up`."""
        return self.W.unsqueeze(0), self.H.unsqueeze(0)

    def sum_up(self) -> None:  # noqa: B027
        """Sum the factors, in a layout whose next iteration starts from their sums."""

    def extrapolate(self, older: Sequence[Tensor], old: Sequence[Tensor], limit: Tensor) -> Tensor:
        """Go on from two earlier states along the logarithms' parabola; return the step's length, `(1,)`."""
        sizes = torch.zeros(3)
        change = bend = 0.0
        sides = [
            (x.data_ptr(), a.data_ptr(), b.data_ptr(), x.numel() // self.code.lanes)
            for x, a, b in zip(self.state, older, old, strict=True)
        ]
        for side in sides:
            self.code.bend(*side, sizes.data_ptr())
            weight, squared_change, squared_bend = sizes.tolist()
            change += squared_change / max(weight, TINY)
            bend += squared_bend / max(weight, TINY)
        step = min(max((change / max(bend, TINY)) ** 0.5, 1.0), float(limit))
        for side in sides:
            self.code.extrapolate(*side, 2 * (step - 1), step**2 - 1)
        self.sum_up()
        return torch.tensor([step], dtype=limit.dtype)


@dataclass
class _Loop:
    index: Any
    values: list[Any]  # carried from turn to turn
    next: list[Any] = field(default_factory=list)  # what the body made of them; valid after the loop too


class Emitter:
    """Writes functions in LLVM's intermediate representation."""

    def __init__(self, instructions: Instructions) -> None:
        from llvmlite import ir

        self.ir, self.instructions, self.lanes = ir, instructions, instructions.lanes
        self.module = ir.Module("nmf")
        self.pointer, self.float, self.double = ir.PointerType(), ir.FloatType(), ir.DoubleType()
        self.i32, self.i64 = ir.IntType(32), ir.IntType(64)
        self.vector, self.ints = ir.VectorType(self.float, self.lanes), ir.VectorType(self.i32, self.lanes)
        self.suffix = f"v{self.lanes}f32"
        self._declared: dict[str, Any] = {}
        self._extrapolation()

    def compile(self) -> bytes:
        """Compile what was written, without a compiler: an object file."""
        import llvmlite.binding as llvm

        target = self.instructions.target_machine()
        module = llvm.parse_assembly(str(self.module))
        module.verify()
        return target.emit_object(module)

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

    def _flush(self) -> Any:
        """From here on take numbers below float32's normal ones for zero; return the old mode, for `_restore`."""
        mode, saved = (self.b.alloca(self.i32) for _ in range(2))
        self._call("llvm.x86.sse.stmxcsr", self.ir.VoidType(), [saved])
        self.b.store(self.b.or_(self.b.load(saved, typ=self.i32), self.i32(_FLUSH)), mode)
        self._call("llvm.x86.sse.ldmxcsr", self.ir.VoidType(), [mode])
        return saved

    def _restore(self, mode: Any) -> None:
        self._call("llvm.x86.sse.ldmxcsr", self.ir.VoidType(), [mode])

    def _at(self, pointer: Any, *offset: Any) -> Any:
        for o in offset:
            pointer = self.b.gep(pointer, [self.i64(o) if isinstance(o, int) else o], source_etype=self.float)
        return pointer

    def _load(self, pointer: Any, offset: int = 0) -> Any:
        return self.b.load(self._at(pointer, offset), align=4 * self.lanes, typ=self.vector)

    def _store(self, value: Any, pointer: Any, offset: int = 0) -> None:
        self.b.store(value, self._at(pointer, offset), align=4 * self.lanes)

    def _splat(self, value: Any) -> Any:
        if isinstance(value, (int, float)):
            kind = self.ints if isinstance(value, int) else self.vector
            return self.ir.Constant(kind, [value] * self.lanes)
        undefined = self.ir.Constant(self.vector, self.ir.Undefined)
        one = self.b.insert_element(undefined, value, self.i32(0))
        return self.b.shuffle_vector(one, undefined, self.ir.Constant(self.ints, [0] * self.lanes))

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

    def _reciprocal(self, x: Any) -> Any:
        """Approximate `1 / x` to 12 bits or more."""
        rest = [self.ir.Constant(self.vector, None), self.ir.IntType(16)(-1)] if self.lanes == 16 else []
        return self._call(self.instructions.reciprocal, self.vector, [x, *rest])

    def _quotient(self, v: Any, x: Any) -> Any:
        """`v / x` to float32's precision but for a last bit: an approximation and one step of Newton's."""
        y = self._reciprocal(x)
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

    def _changes(self, states: Sequence[Any], index: Any) -> tuple[Any, Any, Any, Any]:
        """Return a place in X, its value, its logarithm's first change and the second difference."""
        place, x0, x1 = (self._at(p, self.b.mul(index, self.i64(self.lanes))) for p in states)
        x = [self._load(p) for p in (x0, x1, place)]
        ratios = (self._quotient(after, self._max(before, TINY)) for before, after in itertools.pairwise(x))
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
