"""Dtypes, shapes and launch shapes, which the launchers of every device and the operators ask for."""

from functools import lru_cache

import torch
from torch import Tensor

from fastwkv.kernels.config import Launch, checkpoint_rows, scan_launch, wkv_launch

# The host has a few microseconds for all of a launch. A launch shape follows from sizes alone, and is computed once.
_wkv_launch, _scan_launch = lru_cache(wkv_launch), lru_cache(scan_launch)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums, states and their gradients: float64 if any argument is float64, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def scan_dtypes(a: Tensor, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the output h and of the states of a linear scan; 16 bits accumulate in float32.

    Where x holds pairs, ``[B, T, C, 2]``, so does h, and states are complex.
    """
    h = x.dtype if a.dtype == x.dtype else torch.promote_types(a.dtype, x.dtype)
    return x.dtype if x.dim() == 4 else h, torch.promote_types(h, torch.float32)


def checkpoint_shape(B: int, T: int, C: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the shape of WKV's checkpoints: num, den, max before every ``checkpoint_rows``-th token.

    Three axes and not ``[B, blocks, 3, C]``: blocks may be 1 and 3 blocks may not, and where T is symbolic PyTorch
    would make two cases of that.
    """
    rows = checkpoint_rows(dtype.itemsize)
    return B, 3 * ((T + rows - 1) // rows), C


def launch_for(k: Tensor, backward: bool = False) -> Launch:
    """Choose the launch shape for a pass of WKV on the device of k."""
    B, T, C = k.shape
    return _wkv_launch(B, T, C, _multiprocessors(k), k.dtype.itemsize, backward)


def scan_launch_for(x: Tensor, backward: bool = False) -> Launch:
    """Choose the launch shape for a pass of the linear scan on the device of x."""
    B, T, C = x.shape[:3]
    parts = 2 if x.dim() == 4 else 1
    return _scan_launch(B, T, C, _multiprocessors(x), x.dtype.itemsize * parts, backward)


def _multiprocessors(t: Tensor) -> int:
    return _multiprocessors_of(t.device) if t.is_cuda else 1


@lru_cache
def _multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
