"""Vectors of floats for numba: one value of this type is one SIMD register, and each operation is one instruction.

A kernel that carries its state in such vectors keeps it in registers for as long as it likes. Loops over scalars would
leave that to LLVM's loop vectoriser, which gives up on loops that carry state or write several arrays.

Arithmetic is float32 or float64. Memory is float32, float64, bfloat16 or float16, and is converted on the way:
``load`` and ``store`` take the address of a tensor and a tag, an empty array whose dtype says what lies there. numba
has no 16-bit floats, so that uint16 stands for bfloat16 and int16 for float16.

Nothing here is compiled with fast-math flags: every fused multiply-add is written as ``fma``, so that sums are exactly
the sums that are written, infinities and NaN mean what IEEE 754 says, and two builds give the same bits.
"""

import operator
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# One AVX-512 register where there is one, else one of AVX2, or two of SSE or NEON.
VECTOR_BYTES = 64 if llvm.get_host_cpu_features().get("avx512f") else 32

TAGS = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}

kernel = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
inlined = njit(forceinline=True, error_model="numpy", boundscheck=False)


class Vector(types.Type):  # type: ignore[misc]
    """``VECTOR_BYTES`` of float32 or float64."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES * 8 // element.bitwidth
        super().__init__(f"Vector({element} x {self.lanes})")

    def llvm(self) -> ir.VectorType:
        """The same in LLVM."""
        return ir.VectorType(
            ir.FloatType() if self.element == types.float32 else ir.DoubleType(),
            self.lanes,
        )


class Mask(types.Type):  # type: ignore[misc]
    """One truth value for each lane of a vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Mask({lanes})")

    def llvm(self) -> ir.VectorType:
        """The same in LLVM."""
        return ir.VectorType(ir.IntType(1), self.lanes)


@register_model(Vector)
@register_model(Mask)
class _RegisterModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector | Mask) -> None:
        super().__init__(manager, kind, kind.llvm())


def _vector_of(args: tuple[types.Type, ...]) -> Vector | None:
    """The vector type of an operation between vectors, or between a vector and a number."""
    vectors = {arg for arg in args if isinstance(arg, Vector)}
    rest = [arg for arg in args if not isinstance(arg, Vector | types.Float)]
    return vectors.pop() if len(vectors) == 1 and not rest else None


def _splat(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
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
    class _Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
            vector = _vector_of(args)
            if vector is not None:
                return signature(Mask(vector.lanes) if comparison else vector, *args)

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        vector = _vector_of(sig.args)
        assert vector is not None
        return emit(builder, *(_splat(builder, value, vector.llvm()) for value in args))

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


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic on vectors."""
    kind = args[0].type
    bits = "f32" if kind.element == ir.FloatType() else "f64"
    function = ir.FunctionType(kind, [kind] * len(args))
    callee = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{kind.count}{bits}")
    return builder.call(callee, args)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    # fmuladd fuses wherever the machine can; fma would call a slow library function where it cannot.
    return _call(builder, "fmuladd", a, b, c)


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing: Any, value: Any, storage: Any) -> Any:
    """Return a vector of one number, of the dtype of sums over what the tag describes."""
    _, vector, _ = _vector_in_memory(storage)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return _splat(builder, args[0], vector.llvm())

    return vector(types.float64, storage), generate


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    vector = _vector_of((a, b, c))

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return _fma(builder, *(_splat(builder, value, vector.llvm()) for value in args))

    return vector(a, b, c), generate


@intrinsic  # type: ignore[untyped-decorator]
def absolute(typing: Any, a: Any) -> Any:
    """Return |a|."""
    return a(a), lambda context, builder, sig, args: _call(builder, "fabs", *args)


@intrinsic  # type: ignore[untyped-decorator]
def select(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """Return a where the mask is true, else b."""
    vector = _vector_of((a, b))

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return builder.select(args[0], *(_splat(builder, value, vector.llvm()) for value in args[1:]))

    return vector(mask, a, b), generate


@intrinsic  # type: ignore[untyped-decorator]
def any_true(typing: Any, mask: Any) -> Any:
    """Whether the mask is true in any lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        bits = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(mask), generate


# Of exp, for each dtype: the bias and the width of the mantissa, the largest x whose exponential is returned as 0
# (below it, 2^n would be subnormal), ln 2 in two parts whose first times n is exact, and the polynomial in r after 1
# with the least relative error on |r| <= ln(2) / 2 (2.6e-9 and 1.8e-17).
_EXP_CONSTANTS = {
    types.float32: (
        (127, 23, -87.0, 0.693145751953125, 1.4286068203094173e-06),
        (
            1.000000049796864,
            0.5000000435746266,
            0.16666364808738957,
            0.041664773315148215,
            0.008379059035691179,
            0.0014061422676135337,
        ),
    ),
    types.float64: (
        (1023, 52, -708.0, 0.6931471805592082, 7.371002565167799e-13),
        (
            1.0000000000000007,
            0.5000000000000006,
            0.16666666666657265,
            0.04166666666657327,
            0.008333333337728652,
            0.0013888888932471243,
            0.0001984126147461493,
            2.480150434536771e-05,
            2.756426190540047e-06,
            2.762636556852593e-07,
            2.2981328866020198e-08,
        ),
    ),
}


@intrinsic  # type: ignore[untyped-decorator]
def exp(typing: Any, x: Any) -> Any:
    """Return e^x to about one unit in the last place, for x up to 80; exactly 0 below -87 (float64: -708).

    e^x = 2^n e^r, where n is x / ln 2 rounded: adding 1.5 * 2^23 leaves n in the lowest bits of the sum, and moving
    those bits up (the bias is in the sum already) makes 2^n. NaN stays NaN.
    """
    (bias, mantissa, smallest, ln2, ln2_rest), polynomial = _EXP_CONSTANTS[x.element]
    kind, integers = x.llvm(), ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)

    def number(value: float) -> ir.Constant:
        return ir.Constant(kind, [value] * x.lanes)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        (value,) = args
        rounder = number(1.5 * 2.0**mantissa + bias)
        shifted = _fma(builder, value, number(1.4426950408889634), rounder)
        n = builder.fsub(shifted, rounder)
        r = _fma(builder, n, number(-ln2), value)
        r = _fma(builder, n, number(-ln2_rest), r)
        result = number(polynomial[-1])
        for coefficient in (*polynomial[-2::-1], 1.0):
            result = _fma(builder, result, r, number(coefficient))
        bits = builder.shl(
            builder.bitcast(shifted, integers),
            ir.Constant(integers, [mantissa] * x.lanes),
        )
        result = builder.fmul(result, builder.bitcast(bits, kind))
        return builder.select(builder.fcmp_ordered("<", value, number(smallest)), number(0.0), result)

    return x(x), generate


def _vector_in_memory(
    storage: types.Array,
) -> tuple[types.Float, Vector, ir.VectorType]:
    """The dtype of sums over what a tag describes, its vector, and as many elements as they lie in memory."""
    element = types.float64 if storage.dtype == types.float64 else types.float32
    vector = Vector(element)
    raw = {
        types.uint16: ir.VectorType(ir.IntType(16), vector.lanes),
        types.int16: ir.VectorType(ir.HalfType(), vector.lanes),
    }
    return element, vector, raw.get(storage.dtype, vector.llvm())


def _element(
    builder: ir.IRBuilder,
    address: ir.Value,
    index: ir.Value,
    raw: ir.VectorType,
    size: int,
) -> ir.Value:
    offset = builder.mul(index, ir.Constant(ir.IntType(64), size))
    return builder.inttoptr(builder.add(address, offset), raw.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, address: Any, index: Any, storage: Any) -> Any:
    """Return the vector that begins ``index`` elements after ``address``."""
    _, vector, raw = _vector_in_memory(storage)
    size = storage.dtype.bitwidth // 8
    integers = ir.VectorType(ir.IntType(32), vector.lanes)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        value = builder.load(_element(builder, args[0], args[1], raw, size), align=size)
        if storage.dtype == types.uint16:
            high = builder.shl(
                builder.zext(value, integers),
                ir.Constant(integers, [16] * vector.lanes),
            )
            return builder.bitcast(high, vector.llvm())
        return builder.fpext(value, vector.llvm()) if storage.dtype == types.int16 else value

    return vector(types.int64, types.int64, storage), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, address: Any, index: Any, value: Any, storage: Any) -> Any:
    """Write a vector ``index`` elements after ``address``, rounded to nearest even."""
    _, vector, raw = _vector_in_memory(storage)
    size = storage.dtype.bitwidth // 8
    if value != vector:
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        result = args[2]
        if storage.dtype == types.uint16:
            result = _to_bfloat16(builder, result)
        elif storage.dtype == types.int16:
            result = builder.fptrunc(result, raw)
        builder.store(result, _element(builder, args[0], args[1], raw, size), align=size)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, value, storage), generate


def _to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    integers = ir.VectorType(ir.IntType(32), value.type.count)

    def number(constant: int) -> ir.Constant:
        return ir.Constant(integers, [constant] * value.type.count)

    bits = builder.bitcast(value, integers)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
    # Rounding may carry a NaN's mantissa into infinity.
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), number(0x7FC00000), rounded)
    return builder.trunc(
        builder.lshr(rounded, number(16)),
        ir.VectorType(ir.IntType(16), value.type.count),
    )
