"""Kernels, forward and backward, for WKV (RWKV-4) and the diagonal linear recurrence, on GPU and CPU."""

from fastwkv import _startup

_startup.end_when_interrupted()

# The imports below take a second, in which Ctrl-C has to end the command without a traceback: so they come after that.
from fastwkv import nn, reference  # noqa: E402
from fastwkv.ops.linear_scan import linear_scan, linear_scan_step  # noqa: E402
from fastwkv.ops.wkv import wkv, wkv_step  # noqa: E402
from fastwkv.reference.wkv import WKVState  # noqa: E402

__version__ = "0.1.0"
__all__ = ["WKVState", "linear_scan", "linear_scan_step", "nn", "reference", "wkv", "wkv_step"]
