"""The checks of the arguments of every operator, which all run before anything is launched."""

import builtins
import os
from itertools import pairwise

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn import Parameter, UninitializedParameter
from torch.nn.parameter import UninitializedBuffer
from torch.sparse import SparseSemiStructuredTensor

from fastwkv.ops.derivatives import batched

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATING_OR_COMPLEX = (*FLOATING, torch.complex64, torch.complex128)


def offsets_are_asserted() -> bool:
    """Return whether the environment asks for a check of the offsets that lie on a GPU, on that GPU."""
    return os.environ.get("FASTWKV_CHECK_OFFSETS", "0") not in ("", "0")


# This is for debugging: it costs a few launches a call, and after a failure the process has lost the device.
CHECK_OFFSETS_ON_DEVICE = offsets_are_asserted()

# The checks run at every call, beside kernels of a few microseconds: they make nothing that only a message needs.

_STRIDED = torch.strided
# These are not dense, although their layout says so.
_NOT_DENSE = (MaskedTensor, SparseSemiStructuredTensor, UninitializedBuffer, UninitializedParameter)
_OF_CHANNELS = {"w", "u", "time_decay", "a", "a_t", "log_a"}  # often written as one number for all channels


def check_floating(**tensors: Tensor) -> None:
    """Check that each argument is a dense tensor of a real floating-point dtype, and all are on one device."""
    _check_dtype_among(FLOATING, tensors)


def check_floating_or_complex(**tensors: Tensor) -> None:
    """Check that each argument is a dense tensor of a real or complex dtype, and all are on one device."""
    _check_dtype_among(FLOATING_OR_COMPLEX, tensors)


def _check_dtype_among(dtypes: tuple[torch.dtype, ...], tensors: dict[str, Tensor]) -> None:
    device = None
    for name, tensor in tensors.items():
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            _check_kind(name, tensor)
        if tensor.layout is not _STRIDED:
            raise _not_dense(name, tensor)
        if tensor.dtype not in dtypes:
            *most, last = map(_short, dtypes)
            raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {_short(tensor.dtype)}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            check_device(**tensors)


def check_dense(**tensors: Tensor) -> None:
    """Check that each argument is a dense tensor: not sparse, nested, masked, quantised or MKL-DNN's."""
    for name, tensor in tensors.items():
        _check_kind(name, tensor)
        if tensor.layout is not _STRIDED or tensor.is_nested or tensor.is_quantized:
            raise _not_dense(name, tensor)


def _check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{_instead(name, tensor)}")
    if isinstance(tensor, _NOT_DENSE):
        raise _not_dense(name, tensor)


def _instead(name: str, value: object) -> str:
    """Return a hint that says how to make a tensor of this value, empty if there is no plain way."""
    if isinstance(value, (int, float, complex)) and name in _OF_CHANNELS:
        return f"; torch.full((C,), {value}) is one for all C channels"
    return "; torch.from_numpy makes one" if type(value).__name__ == "ndarray" else ""


def _not_dense(name: str, tensor: Tensor) -> TypeError:
    what = type(tensor).__name__ if tensor.layout is _STRIDED else f"one of layout {tensor.layout}"
    what = "a nested one" if tensor.is_nested else "a quantised one" if tensor.is_quantized else what
    return TypeError(f"{name} must be a dense tensor (of layout torch.strided), got {what}")


def check_bool(**flags: bool) -> None:
    """Check that each argument is True or False, and not a value that merely counts as one of them."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise TypeError(f"{name} must be a bool, got {type_name(flag)}")


def type_name(value: object) -> str:
    """Return the name of a value's type for a message, with its module where Python has a type of that name too."""
    kind = type(value)
    foreign = kind.__module__ != "builtins" and hasattr(builtins, kind.__name__)
    return f"{kind.__module__}.{kind.__name__}" if foreign else kind.__name__


def check_device(**tensors: Tensor) -> None:
    """Check that all arguments are on one device."""
    reference = None
    for name, tensor in tensors.items():
        device = tensor.device
        if reference is None:
            first, reference = name, device
        elif device != reference:
            raise ValueError(f"{name} is on {device}, but {first} is on {reference}")


def check_rank(dims: str, **tensors: Tensor) -> None:
    """Check that each argument has one axis for each name in ``dims``, such as "B T C", and that none is empty."""
    for name, tensor in tensors.items():
        try:
            shape = tensor.shape
        except RuntimeError:  # a nested tensor whose layout passes for strided has none
            raise _not_dense(name, tensor) from None
        if len(shape) != dims.count(" ") + 1:
            raise ValueError(f"{name} must be {_axes(dims)}, got shape {_shape(tensor)}")
        if 0 in shape:
            dim = dims.split()[shape.index(0)]
            raise ValueError(f"{name} is empty: {dim} must be at least 1, got shape {_shape(tensor)}")


def are_pairs(dims: str, name: str, a: Tensor, **tokens: Tensor) -> bool:
    """Check the rank of x and return whether it holds complex numbers as pairs, which a complex a permits."""
    ((variable, x),) = tokens.items()
    if x.dim() != dims.count(" ") + 2:
        check_rank(dims, **tokens)
        return False
    check_rank(f"{dims} pair", **tokens)
    if not a.is_complex():
        hint = f"; pairs can stand beside a complex {name} only" if x.shape[-1] == 2 else ""
        raise ValueError(f"{variable} must be {_axes(dims)}, got shape {_shape(x)}{hint}")
    if x.is_complex() or x.shape[-1] != 2:
        kind, pairs = "complex" if x.is_complex() else "real", _axes(f"{dims} 2")
        raise ValueError(
            f"{variable} must be {_axes(dims)}, or real pairs {pairs} beside a complex {name}, got a {kind} tensor of"
            f" shape {_shape(x)}"
        )
    return True


def check_shape(dims: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Check that each argument has exactly this shape; ``dims`` names its axes in the message."""
    for name, tensor in tensors.items():
        try:
            fits = tensor.shape == shape
        except RuntimeError:  # a nested tensor whose layout passes for strided has none
            raise _not_dense(name, tensor) from None
        if not fits:
            raise ValueError(f"{name} must be {_axes(dims)} = {list(shape)}, got shape {_shape(tensor)}")


def check_decay(dims: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Check that each argument has exactly this shape, or only its last axis, the channels."""
    for name, tensor in tensors.items():
        try:
            found = tensor.shape
        except RuntimeError:  # a nested tensor whose layout passes for strided has none
            raise _not_dense(name, tensor) from None
        if found != (shape[-1:] if len(found) == 1 else shape):
            ways = [f"[C] = {list(shape[-1:])}", f"{_axes(dims)} = {list(shape)}"]
            wanted = {1: ways[:1], len(shape): ways[1:]}.get(len(found), ways)
            raise ValueError(f"{name} must be {' or '.join(wanted)}, got shape {_shape(tensor)}")


def check_dtype(dtype: torch.dtype, why: str, **tensors: Tensor) -> None:
    """Check that each argument has this dtype; ``why`` ends the message."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {_short(dtype)} {why}, got {_short(tensor.dtype)}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Check that ``cu_seqlens`` is 0 = c_0 <= c_1 <= ... <= c_N = T, for a batch of one.

    The host reads offsets on the CPU only: reading those on a GPU would wait for the device. There, tokens that wrong
    offsets do not cover are NaN (kernels/packing.py), and with ``FASTWKV_CHECK_OFFSETS=1`` in the environment the
    device asserts the rule.
    """
    check_dense(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {_short(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N at least 1, got shape {_shape(cu_seqlens)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into a batch of one, but B = {batch}")
    if CHECK_OFFSETS_ON_DEVICE and cu_seqlens.device.type != "cpu" and not batched(cu_seqlens):
        assert_offsets(cu_seqlens, length)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and not batched(cu_seqlens):
        offsets = cu_seqlens.tolist()
        ascending = all(a <= b for a, b in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != length or not ascending:
            raise ValueError(
                f"cu_seqlens must run from 0 to T = {length} without decreasing, got {_abbreviated(offsets)}"
            )


def _axes(dims: str) -> str:
    return f"[{dims.replace(' ', ', ')}]"


def assert_offsets(cu_seqlens: Tensor, length: int) -> None:
    """Let the device of the offsets end the program if they break the rule, without waiting for it."""
    rule = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(rule, f"cu_seqlens must run from 0 to T = {length} without decreasing")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _abbreviated(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"{str(offsets[:4])[:-1]}, ..., {str(offsets[-3:])[1:]}"
