"""WKV for ops.py and accuracy.py: its shapes, passes, bytes, targets and bounds."""

from typing import ClassVar

import torch
from peers import wkv_inputs
from peers.operator import CPU, ROUNDING, Goal, Operator, Shape, Traffic
from peers.wkv_cuda_providers import STATELESS
from peers.wkv_inputs import Inputs
from peers.wkv_providers import PROVIDERS
from torch import Tensor

BOUNDS = {  # of y, of gradients and of gw
    "ordinary": (5e-7, 2e-6, 2e-6),
    "adversarial": (2e-6, 5e-6, 2e-5),
}
IN_16_BITS = ("y", "gk", "gv")  # where k and v are; all else is float32 then


class WKV(Operator):
    """The operator of RWKV-4."""

    name = "wkv"
    title = "WKV"
    dtypes = ("float32", "bfloat16", "float16", "float64")
    default_dtype = "float32"
    gpu_dtypes = ("bfloat16", "float32")
    accuracy_dtypes = ("float32", "bfloat16")
    shapes = ((1, 1024, 768), (4, 1024, 768))
    quick_shapes = ((1, 256, 768),)
    output = "y"
    gradients = ("gw", "gu", "gk", "gv")
    results = ("y", "gk", "gv", "gu", "gw", "gstate")
    traffic: ClassVar = {
        "forward": Traffic(3),  # k, v -> y
        "backward": Traffic(5),  # k, v, gy -> gk, gv
        "forward+backward": Traffic(8),
        "step": Traffic(3, states=6),  # k, v -> y, three numbers of state read and written
    }
    targets: ClassVar = {
        ("forward", (1, 1024, 768), "hf"): 60,
        ("forward+backward", (1, 1024, 768), "hf"): 400,
        ("forward+backward", (1, 1024, 768), "loop"): 50,
        ("forward", (4, 1024, 768), "hf"): 18,
        ("forward+backward", (4, 1024, 768), "hf"): 800,
    }
    goals: ClassVar = (
        Goal(
            lambda B, T, C: B * C >= 16384 and T >= 1024,
            {
                ("forward", "bfloat16"): 0.85,
                ("forward", "float32"): 0.90,
                ("backward", "bfloat16"): 0.75,
                ("backward", "float32"): 0.85,
            },
        ),
        Goal(
            lambda B, T, C: B == 1 and 1024 <= C <= 2560 and T >= 65536,
            {
                ("forward", "bfloat16"): 0.60,
                ("forward", "float32"): 0.60,
                ("backward", "bfloat16"): 0.50,
                ("backward", "float32"): 0.50,
            },
        ),
    )
    gpu_ratios: ClassVar = (
        (lambda B, T, C: B == 1 and T >= 65536, 10),
        (lambda B, T, C: B > 1 and T >= 1024, 3),
        (lambda B, T, C: True, 1),
    )
    providers = PROVIDERS
    stateless: ClassVar = STATELESS

    def draw(self, kind: str, shape: Shape, dtype: torch.dtype, seed: int, device: torch.device = CPU) -> Inputs:
        draw = {"ordinary": wkv_inputs.ordinary, "adversarial": wkv_inputs.adversarial}[kind]
        return draw(*shape, dtype, seed, device)

    def expected(self, inputs: Inputs, *, state: bool, own: bool = False) -> dict[str, Tensor]:
        return wkv_inputs.expected(inputs, state=state, own=own)

    def expected_step(self, inputs: Inputs) -> dict[str, Tensor]:
        return wkv_inputs.expected_step(inputs)

    def allowed(self, kind: str, dtype: str, tokens: int) -> dict[str, float]:
        y, gradient, gw = (1e-12,) * 3 if dtype == "float64" else BOUNDS[kind]
        bounds = dict.fromkeys(self.results, gradient) | {"y": y, "gw": gw}
        return bounds | (dict.fromkeys(IN_16_BITS, ROUNDING[dtype]) if dtype in ROUNDING else {})
