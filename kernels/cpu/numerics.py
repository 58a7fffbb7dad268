"""Vectors from and to memory, and the exponential of a vector.

Sums are float32 or float64; memory is float32, float64, bfloat16 or float16 and is converted on the way. ``load`` and
``store`` take the address of a tensor and a tag, an empty array whose dtype says what lies there. numba has no 16-bit
floats: uint16 stands for bfloat16, int16 for float16.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastwkv.kernels import notation
from fastwkv.kernels.cpu.cache import KernelCache
from fastwkv.kernels.cpu.vectors import Vector, broadcast, emit_fma

TAGS = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}

inlined = njit(forceinline=True, error_model="numpy", boundscheck=False)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that runs without the interpreter lock, and keep the result on disk."""
    compiled = njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    with suppress(RuntimeError):  # there is no folder to write to
        # numba compiles anew when the file of the function changes, but other files have what is inlined into it.
        compiled._cache = KernelCache(function, _sources())
    return compiled


@cache
def _sources() -> str:
    here = Path(__file__).parent
    files = (here.parent / "config.py", here.parent / "notation.py", *sorted(here.glob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def _vector_in_memory(storage: types.Array) -> tuple[Vector, ir.VectorType]:
    """Return the vector for sums over what a tag describes, and as many elements as they lie in memory."""
    vector = Vector(types.float64 if storage.dtype == types.float64 else types.float32)
    raw = {
        types.uint16: ir.VectorType(ir.IntType(16), vector.lanes),
        types.int16: ir.VectorType(ir.HalfType(), vector.lanes),
    }
    return vector, raw.get(storage.dtype, vector.llvm())


def _pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, storage: Any, pointee: ir.Type) -> ir.Value:
    size = ir.Constant(ir.IntType(64), storage.dtype.bitwidth // 8)
    return builder.inttoptr(builder.add(address, builder.mul(index, size)), pointee.as_pointer())


@intrinsic
def splat(typing: Any, value: Any, storage: Any) -> Any:
    """Return a vector of one number, of the dtype of sums over what the tag describes."""
    vector, _ = _vector_in_memory(storage)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return broadcast(builder, args[0], vector.llvm())

    return vector(types.float64, storage), generate


@intrinsic
def load(typing: Any, address: Any, index: Any, storage: Any) -> Any:
    """Return the vector that begins ``index`` elements after ``address``."""
    vector, raw = _vector_in_memory(storage)
    size = storage.dtype.bitwidth // 8
    integers = ir.VectorType(ir.IntType(32), vector.lanes)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        value = builder.load(_pointer(builder, args[0], args[1], storage, raw), align=size)
        if storage.dtype == types.uint16:
            high = builder.shl(builder.zext(value, integers), ir.Constant(integers, [16] * vector.lanes))
            return builder.bitcast(high, vector.llvm())
        return builder.fpext(value, vector.llvm()) if storage.dtype == types.int16 else value

    return vector(types.int64, types.int64, storage), generate


@intrinsic
def store(typing: Any, address: Any, index: Any, value: Any, storage: Any) -> Any:
    """Write a vector ``index`` elements after ``address``, rounded to nearest even."""
    vector, raw = _vector_in_memory(storage)
    size = storage.dtype.bitwidth // 8
    if value != vector:
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        result = args[2]
        if storage.dtype == types.uint16:
            result = _to_bfloat16(builder, result)
        elif storage.dtype == types.int16:
            result = builder.fptrunc(result, raw)
        builder.store(result, _pointer(builder, args[0], args[1], storage, raw), align=size)
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
    return builder.trunc(builder.lshr(rounded, number(16)), ir.VectorType(ir.IntType(16), value.type.count))


@intrinsic
def prefetch(typing: Any, address: Any, index: Any, storage: Any) -> Any:
    """Ask for what lies ``index`` elements after ``address``. Nothing is read: outside of a tensor it has no effect."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = _pointer(builder, args[0], args[1], storage, ir.IntType(8))
        integer = ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer.type, integer, integer, integer])
        callee = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        builder.call(callee, [pointer, integer(0), integer(3), integer(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, storage), generate


# Of exp, for each dtype: the bias and the width of the mantissa, the smallest x whose exponential is not returned as 0,
# ln 2 in two parts, and the polynomial. notation.py says how they serve.
_EXP_CONSTANTS = {
    types.float32: (127, 23, notation.EXP_LEAST_FLOAT32, notation.LN2_HIGH_FLOAT32, notation.LN2_LOW_FLOAT32),
    types.float64: (1023, 52, notation.EXP_LEAST_FLOAT64, notation.LN2_HIGH_FLOAT64, notation.LN2_LOW_FLOAT64),
}
_EXP_POLYNOMIALS = {types.float32: notation.EXP_FLOAT32, types.float64: notation.EXP_FLOAT64}


def _number(x: Vector, value: float) -> ir.Constant:
    return ir.Constant(x.llvm(), [value] * x.lanes)


def _emit_exp(builder: ir.IRBuilder, value: ir.Value, x: Vector) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Return p, r, 2^n such that e^x = (1 + p r) 2^n, and a mask of lanes where e^x is to be 0 all the same.

    n is x / ln 2 rounded: adding 1.5 * 2^23 leaves n in the lowest bits of the sum, and moving those bits up (the bias
    is in the sum already) makes 2^n.
    """
    bias, mantissa, least, ln2_high, ln2_low = _EXP_CONSTANTS[x.element]
    polynomial = _EXP_POLYNOMIALS[x.element]
    integers = ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)
    rounder = _number(x, 1.5 * 2.0**mantissa + bias)
    shifted = emit_fma(builder, value, _number(x, notation.LOG2_E), rounder)
    n = builder.fsub(shifted, rounder)
    r = emit_fma(builder, n, _number(x, -ln2_high), value)
    r = emit_fma(builder, n, _number(x, -ln2_low), r)
    p = _number(x, polynomial[-1])
    for coefficient in polynomial[-2::-1]:
        p = emit_fma(builder, p, r, _number(x, coefficient))
    bits = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * x.lanes))
    return p, r, builder.bitcast(bits, x.llvm()), builder.fcmp_ordered("<", value, _number(x, least))


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """Return e^x to about one unit in the last place, for x up to 80 (float64: 700); exactly 0 below -87 (-708).

    A NaN stays NaN.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        p, r, power, zero = _emit_exp(builder, args[0], x)
        result = builder.fmul(emit_fma(builder, p, r, _number(x, 1.0)), power)
        return builder.select(zero, _number(x, 0.0), result)

    return x(x), generate


@intrinsic
def exp_sum(typing: Any, x: Any) -> Any:
    """Return e^x as a sum of two numbers, for the x of ``exp``: the rounded one, and what its rounding cut off.

    Close to 1, e^x - 1 is known far better than e^x can be written as one number.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        p, r, power, zero = _emit_exp(builder, args[0], x)
        rest = builder.fmul(p, r)
        rounded = builder.fadd(rest, _number(x, 1.0))
        low = builder.fsub(rest, builder.fsub(rounded, _number(x, 1.0)))
        pair = (builder.select(zero, _number(x, 0.0), builder.fmul(part, power)) for part in (rounded, low))
        return context.make_tuple(builder, sig.return_type, pair)

    return types.UniTuple(x, 2)(x), generate
