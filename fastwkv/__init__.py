"""Kernels, forward and backward, for WKV (RWKV-4) and the diagonal linear recurrence, on GPU and CPU."""

from fastwkv import reference
from fastwkv.ops.wkv import WKVState, wkv, wkv_step

__version__ = "0.1.0"
__all__ = ["WKVState", "reference", "wkv", "wkv_step"]
