"""Kernels, forward and backward, for WKV (RWKV-4) and the diagonal linear recurrence, on GPU and CPU."""

from fastwkv import nn, reference
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step
from fastwkv.ops.wkv import wkv, wkv_step
from fastwkv.reference.wkv import WKVState

__version__ = "0.1.0"
__all__ = ["WKVState", "linear_scan", "linear_scan_step", "nn", "reference", "wkv", "wkv_step"]
