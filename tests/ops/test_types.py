"""What a strict type checker says of code that calls the operators."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WRAPPERS = """
from torch import Tensor, nn

from fastwkv import WKVState, linear_scan, linear_scan_step, wkv, wkv_step


class Wrapper(nn.Module):
    def forward(self, a: Tensor, x: Tensor, return_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        return linear_scan(a, x, return_state=return_state)


def either(w: Tensor, k: Tensor, return_state: bool) -> Tensor | tuple[Tensor, WKVState]:
    return wkv(w, w, k, k, return_state=return_state)


def without_first(w: Tensor, k: Tensor) -> Tensor:
    return wkv(u=w, k=k, v=k, time_decay=w) + wkv(None, w, k, k, time_decay=w) + linear_scan(x=k, log_a=w)


def pairs(w: Tensor, k: Tensor) -> tuple[Tensor, WKVState]:
    h, last = linear_scan(x=k, log_a=w, return_state=True)
    y, state = wkv(u=w, k=k, v=k, time_decay=w, return_state=True)
    y_t, state = wkv_step(u=w, k_t=k[:, 0], v_t=k[:, 0], state=state, time_decay=w)
    return h + y + y_t + linear_scan_step(x_t=k[:, 0], state=last, log_a=w), state
"""


def errors(tmp_path, code: str) -> str:
    path = tmp_path / "wrappers.py"
    path.write_text(code)
    command = [sys.executable, "-m", "mypy", "--config-file", REPOSITORY / "pyproject.toml", path]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout


def test_wrappers_pass_a_strict_type_checker(tmp_path):
    pytest.importorskip("mypy")  # of the extra "dev"; those who only test have none
    assert "Success" in errors(tmp_path, WRAPPERS)
    wrong = "\n\ndef one(a: Tensor, x: Tensor) -> Tensor:\n    return linear_scan(a, x, return_state=True)\n"
    assert "Incompatible return value type" in errors(tmp_path, WRAPPERS + wrong)
