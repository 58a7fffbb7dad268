"""Slow, obvious definitions in plain PyTorch: what every kernel is checked against."""

from .linear_scan import linear_scan, linear_scan_step
from .wkv import wkv, wkv_loop

__all__ = ["linear_scan", "linear_scan_step", "wkv", "wkv_loop"]
