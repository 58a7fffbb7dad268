"""What every operator asks of its arguments. All of it runs before anything is launched."""

from itertools import pairwise

import torch
from torch import Tensor

from fastwkv.ops.derivatives import batched

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATING_OR_COMPLEX = (*FLOATING, torch.complex64, torch.complex128)

# All of this runs at every call, beside kernels of a few microseconds: nothing is made that only a message needs.


def check_floating(**tensors: Tensor) -> None:
    """Each argument is a real floating-point tensor, all on one device."""
    _check_dtype_among(FLOATING, tensors)


def check_floating_or_complex(**tensors: Tensor) -> None:
    """Each argument is a real or complex floating-point tensor, all on one device."""
    _check_dtype_among(FLOATING_OR_COMPLEX, tensors)


def _check_dtype_among(dtypes: tuple[torch.dtype, ...], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            *most, last = map(_short, dtypes)
            raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {_short(tensor.dtype)}")
    check_device(**tensors)


def check_device(**tensors: Tensor) -> None:
    """All arguments are on one device."""
    reference = None
    for name, tensor in tensors.items():
        device = tensor.device
        if reference is None:
            first, reference = name, device
        elif device != reference:
            raise ValueError(f"{name} is on {device}, but {first} is on {reference}")


def check_rank(dims: str, **tensors: Tensor) -> None:
    """Each argument has one axis for each name in ``dims``, such as "B T C", and no axis is empty."""
    for name, tensor in tensors.items():
        if tensor.dim() != dims.count(" ") + 1:
            raise ValueError(f"{name} must be [{', '.join(dims.split())}], got shape {_shape(tensor)}")
        if 0 in tensor.shape:
            dim = dims.split()[tensor.shape.index(0)]
            raise ValueError(f"{name} is empty: {dim} must be at least 1, got shape {_shape(tensor)}")


def are_pairs(dims: str, name: str, a: Tensor, **tokens: Tensor) -> bool:
    """Check the rank of x and return whether it holds complex numbers as pairs, as it may where a is complex."""
    ((variable, x),) = tokens.items()
    if not a.is_complex() or x.dim() != dims.count(" ") + 2:
        check_rank(dims, **tokens)
        return False
    if x.is_complex() or x.shape[-1] != 2:
        shape, kind = dims.replace(" ", ", "), "complex" if x.is_complex() else "real"
        raise ValueError(
            f"{variable} must be [{shape}], or real pairs [{shape}, 2] beside a complex {name}, got a {kind} tensor of"
            f" shape {list(x.shape)}"
        )
    check_rank(f"{dims} pair", **tokens)
    return True


def check_shape(dims: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Each argument has exactly this shape; ``dims`` names its axes in the message."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be [{', '.join(dims.split())}] = {list(shape)}, got shape {_shape(tensor)}")


def check_dtype(dtype: torch.dtype, why: str, **tensors: Tensor) -> None:
    """Each argument has this dtype; ``why`` ends the message."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {_short(dtype)} {why}, got {_short(tensor.dtype)}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """``cu_seqlens`` is 0 = c_0 < c_1 < ... < c_N = T, for a batch of one.

    The values are looked at on the CPU only: on a GPU that would wait for the device. There, offsets that break the
    rule give wrong numbers, but never touch memory outside the tensors.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {_short(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N at least 1, got shape {_shape(cu_seqlens)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into a batch of one, but B = {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and not batched(cu_seqlens):
        offsets = cu_seqlens.tolist()
        ascending = all(a < b for a, b in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != length or not ascending:
            raise ValueError(f"cu_seqlens must increase from 0 to T = {length}, got {_abbreviated(offsets)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _abbreviated(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"{str(offsets[:4])[:-1]}, ..., {str(offsets[-3:])[1:]}"
