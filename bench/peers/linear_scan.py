"""The linear scan for ops.py and accuracy.py: its shapes, passes, bytes, targets and bounds.

With ``a`` of its own at every token and with one that is the same at all are two operators here: they move different
amounts, and most peers have only the first.
"""

from typing import ClassVar

import torch
from peers import linear_scan_inputs
from peers.linear_scan_inputs import Inputs
from peers.linear_scan_providers import PROVIDERS
from peers.operator import CPU, ROUNDING, Operator, Shape, Traffic
from torch import Tensor


class LinearScan(Operator):
    """The diagonal linear recurrence with ``a`` ``[B, T, C]``."""

    name = "linear_scan"
    title = "Linear scan, a multiplier for every token"
    dtypes = ("complex64", "complex128", "float32", "bfloat16", "float16", "float64")
    default_dtype = "complex64"
    gpu_dtypes = ("bfloat16", "float32", "complex64")
    accuracy_dtypes = ("float32", "complex64", "bfloat16")
    shapes = ((4, 4096, 256), (1, 1024, 256), (8, 784, 128), (32, 64, 128))
    quick_shapes = ((1, 256, 256),)
    output = "h"
    gradients = ("ga", "gx")
    results = ("h", "ga", "gx", "gh0")
    traffic: ClassVar = {
        "forward": Traffic(3),  # a, x -> h
        "backward": Traffic(5),  # a, h, gh -> ga, gx
        "forward+backward": Traffic(8),
        "step": Traffic(2, states=2),  # a, x, h -> h
    }
    targets: ClassVar = {
        ("forward", (4, 4096, 256), "loop"): 10,
        ("forward+backward", (4, 4096, 256), "loop"): 12,
    }
    providers = PROVIDERS
    fixed: ClassVar[bool] = False

    def draw(self, kind: str, shape: Shape, dtype: torch.dtype, seed: int, device: torch.device = CPU) -> Inputs:
        draw = {"ordinary": linear_scan_inputs.ordinary, "adversarial": linear_scan_inputs.adversarial}[kind]
        return draw(*shape, dtype, seed, device, fixed=self.fixed)

    def expected(self, inputs: Inputs, *, state: bool, own: bool = False) -> dict[str, Tensor]:
        return linear_scan_inputs.expected(inputs, state=state, own=own)

    def expected_step(self, inputs: Inputs) -> dict[str, Tensor]:
        return linear_scan_inputs.expected_step(inputs)

    def allowed(self, kind: str, dtype: str, tokens: int) -> dict[str, float]:
        h = 1e-6 if tokens <= 1024 else 3e-6
        h, gradient = (1e-12, 1e-12) if dtype in ("float64", "complex128") else (h, 2 * h)
        bounds = {"h": h, "ga": gradient, "gx": gradient, "gh0": gradient}
        return bounds | (dict.fromkeys(("h", "ga", "gx"), ROUNDING[dtype]) if dtype in ROUNDING else {})


class FixedScan(LinearScan):
    """The same with ``a`` ``[C]``."""

    name = "linear_scan_fixed"
    title = "Linear scan, one multiplier for all tokens"
    shapes = ((4, 4096, 256),)
    traffic: ClassVar = {
        "forward": Traffic(2),  # x -> h
        "backward": Traffic(3),  # h, gh -> gx
        "forward+backward": Traffic(5),
        "step": Traffic(1, states=2),  # x, h -> h
    }
    targets: ClassVar = {}
    fixed = True
