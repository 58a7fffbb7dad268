"""Kernels, forward and backward, for WKV (RWKV-4) and the diagonal linear recurrence, on GPU and CPU."""

from fastwkv import nn, reference
from fastwkv.ops.wkv import wkv, wkv_step
from fastwkv.reference.wkv import WKVState

__version__ = "0.1.0"
__all__ = ["WKVState", "nn", "reference", "wkv", "wkv_step"]
