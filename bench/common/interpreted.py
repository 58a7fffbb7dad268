"""Triton kernels on CPU tensors, as the tests have them: in a checkout the folder beside this one."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from interpreted import interpreted_kernels, rounding_interpreter, untuned

__all__ = ["interpreted_kernels", "rounding_interpreter", "untuned"]
