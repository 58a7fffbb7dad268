"""Vectors of floats for numba: one value of this type is one SIMD register, and each operation is one instruction.

A kernel that carries its state in such vectors keeps it in registers for as long as it likes. Loops over scalars would
leave that to LLVM's loop vectoriser, which gives up on loops that carry state or write several arrays.

Nothing here is compiled with fast-math flags: every fused multiply-add is written as ``fma``, so that sums are exactly
the sums that are written, infinities and NaN mean what IEEE 754 says, and two runs on machines of one kind give the
same bits.
"""

import operator
import platform
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# One AVX-512 register where there is one, else one of AVX2, or two of SSE or NEON.
VECTOR_BYTES = 64 if llvm.get_host_cpu_features().get("avx512f") else 32
# Without instructions for it LLVM would call a library that is not there.
HAS_FLOAT16 = platform.machine() not in ("x86_64", "AMD64") or bool(llvm.get_host_cpu_features().get("f16c"))


class Vector(types.Type):
    """``VECTOR_BYTES`` of float32 or float64."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES * 8 // element.bitwidth
        super().__init__(f"Vector({element} x {self.lanes})")

    def llvm(self) -> ir.VectorType:
        """Return the same type in LLVM."""
        return ir.VectorType(ir.FloatType() if self.element == types.float32 else ir.DoubleType(), self.lanes)


class Mask(types.Type):
    """One truth value for each lane of a vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Mask({lanes})")

    def llvm(self) -> ir.VectorType:
        """Return the same type in LLVM."""
        return ir.VectorType(ir.IntType(1), self.lanes)


@register_model(Vector)
@register_model(Mask)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector | Mask) -> None:
        super().__init__(manager, kind, kind.llvm())


def vector_of(args: tuple[types.Type, ...]) -> Any:
    """Return the vector type of an operation between vectors, or between a vector and a number, else None."""
    vectors = {arg for arg in args if isinstance(arg, Vector)}
    rest = [arg for arg in args if not isinstance(arg, Vector | types.Float)]
    return vectors.pop() if len(vectors) == 1 and not rest else None


def broadcast(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Put a number in every lane of a vector; leave a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    if value.type != vector.element:
        value = builder.fptrunc(value, vector.element)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _define(op: Any, emit: Any, comparison: bool = False) -> None:
    """Let ``op`` work on vectors; ``emit(builder, a, b)`` writes the instruction."""

    @infer_global(op)
    class _Typing(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
            vector = vector_of(args)
            if vector is None:
                return None
            return signature(Mask(vector.lanes) if comparison else vector, *args)

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        vector = vector_of(sig.args)
        return emit(builder, *(broadcast(builder, value, vector.llvm()) for value in args))

    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *kinds)(lower)


_define(operator.add, ir.IRBuilder.fadd)
_define(operator.sub, ir.IRBuilder.fsub)
_define(operator.mul, ir.IRBuilder.fmul)
_define(operator.truediv, ir.IRBuilder.fdiv)
# Ordered comparisons: with NaN they are all false.
_define(operator.gt, lambda builder, a, b: builder.fcmp_ordered(">", a, b), comparison=True)
_define(operator.ge, lambda builder, a, b: builder.fcmp_ordered(">=", a, b), comparison=True)
_define(operator.lt, lambda builder, a, b: builder.fcmp_ordered("<", a, b), comparison=True)
_define(operator.eq, lambda builder, a, b: builder.fcmp_ordered("==", a, b), comparison=True)


@infer_global(operator.neg)
class _Negation(AbstractTemplate):
    def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
        return signature(args[0], *args) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
    return builder.fneg(args[0])


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic on vectors."""
    kind = args[0].type
    bits = "f32" if kind.element == ir.FloatType() else "f64"
    function = ir.FunctionType(kind, [kind] * len(args))
    callee = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{kind.count}{bits}")
    return builder.call(callee, args)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c."""
    # fmuladd fuses wherever the machine can; fma would call a slow library function where it cannot.
    return call(builder, "fmuladd", a, b, c)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    vector = vector_of((a, b, c))

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return emit_fma(builder, *(broadcast(builder, value, vector.llvm()) for value in args))

    return vector(a, b, c), generate


@intrinsic
def absolute(typing: Any, a: Any) -> Any:
    """Return |a|."""
    return a(a), lambda context, builder, sig, args: call(builder, "fabs", *args)


@intrinsic
def select(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """Return a where the mask is true, else b."""
    vector = vector_of((a, b))

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return builder.select(args[0], *(broadcast(builder, value, vector.llvm()) for value in args[1:]))

    return vector(mask, a, b), generate


@intrinsic
def any_true(typing: Any, mask: Any) -> Any:
    """Return whether the mask is true in any lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        bits = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(mask), generate


# A vector of complex numbers holds a real and an imaginary part by turns.


def _permute(a: Vector, source: Any) -> Any:
    """Return a vector that has in lane i what the other has in lane ``source(i)``."""
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), a.lanes), [source(i) for i in range(a.lanes)])

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return builder.shuffle_vector(args[0], ir.Constant(a.llvm(), ir.Undefined), lanes)

    return a(a), generate


@intrinsic
def real_parts(typing: Any, a: Any) -> Any:
    """Return (re, re) for each pair (re, im)."""
    return _permute(a, lambda i: i & ~1)


@intrinsic
def imaginary_parts(typing: Any, a: Any) -> Any:
    """Return (im, im) for each pair (re, im)."""
    return _permute(a, lambda i: i | 1)


@intrinsic
def exchanged(typing: Any, a: Any) -> Any:
    """Return (im, re) for each pair (re, im)."""
    return _permute(a, lambda i: i ^ 1)


@intrinsic
def conjugate(typing: Any, a: Any) -> Any:
    """Return (re, -im) for each pair (re, im)."""
    bits = a.element.bitwidth
    integers = ir.VectorType(ir.IntType(bits), a.lanes)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        signs = ir.Constant(integers, [(i & 1) << (bits - 1) for i in range(a.lanes)])
        return builder.bitcast(builder.xor(builder.bitcast(args[0], integers), signs), a.llvm())

    return a(a), generate
