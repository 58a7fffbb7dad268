"""The implementations of the operators, each put behind the public functions in turn."""

import importlib

import torch

import fastwkv  # noqa: F401 (registers the operators that are overridden here)

IMPLEMENTATIONS = ("cpu", "triton")
OPERATORS = {  # and the file of its launchers
    "wkv_fwd": "wkv",
    "wkv_bwd": "wkv_bwd",
    "wkv_step": "wkv_step",
    "linear_scan_fwd": "linear_scan",
    "linear_scan_bwd": "linear_scan",
    "linear_scan_step": "linear_scan",
}


class Implementation:
    """Context in which the public functions run one implementation.

    ``device`` is where its tensors live. Without a GPU the Triton kernels are interpreted: they take the place of the
    CPU path, for CPU tensors, and everything above them stays as it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.interpreted = name == "triton" and not torch.cuda.is_available()
        self.device = torch.device("cuda" if name == "triton" and not self.interpreted else "cpu")

    def launcher(self, operator: str):
        """Return the function that launches an operator."""
        folder = "fastwkv.kernels.cpu" if self.name == "cpu" else "fastwkv.kernels"
        return getattr(importlib.import_module(f"{folder}.{OPERATORS[operator]}"), operator)

    def __enter__(self) -> "Implementation":
        self._override = torch.library.Library("fastwkv", "IMPL")
        if self.interpreted:
            for operator in OPERATORS:
                self._override.impl(operator, self.launcher(operator), "CPU", allow_override=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._override._destroy()
