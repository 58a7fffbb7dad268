"""Slow, obvious definitions in plain PyTorch: what every kernel is checked against."""

from .wkv import wkv, wkv_loop

__all__ = ["wkv", "wkv_loop"]
