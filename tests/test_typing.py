"""A module around the layers passes ``mypy --strict``: what a layer returns is known from ``return_state``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRAPPER = """
from typing_extensions import assert_type

from torch import Tensor, nn

from fastwkv.nn import LRU, RGLRU, RWKV4, S4D, LRUBlock, MinGRU, RWKV4Block, RWKV4ChannelMix, RWKV4State, RWKV4TimeMix


class Around(nn.Module):
    def __init__(self, layer: LAYER) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def carried(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(x, state, return_state=True)

    def asked(self, x: Tensor, offsets: Tensor, wanted: bool) -> Tensor:
        both = self.layer.forward(x, return_state=wanted, cu_seqlens=offsets)
        assert_type(both, Tensor | tuple[Tensor, Tensor])
        assert_type(self.layer(x, return_state=False), Tensor)
        assert_type(self.layer.forward(x, return_state=True), tuple[Tensor, Tensor])
        y, state = self.layer.step(x[:, 0])
        return both[0] if isinstance(both, tuple) else both + y + state
"""
MODEL = """

class Language(nn.Module):
    def __init__(self, model: RWKV4, block: RWKV4Block, time: RWKV4TimeMix, channels: RWKV4ChannelMix) -> None:
        super().__init__()
        self.model, self.block, self.time, self.channels = model, block, time, channels

    def forward(self, tokens: Tensor, state: RWKV4State | None = None) -> tuple[Tensor, RWKV4State]:
        return self.model(tokens, state)

    def apart(self, x: Tensor) -> Tensor:
        x, _ = self.block(x)
        y, (last, wkv_state) = self.time(x)
        return self.channels(y + last + wkv_state.num)[0]
"""
WRONG = """

def wrong(layer: LRU, x: Tensor) -> None:
    y: Tensor = layer(x, return_state=True)
    layer(x, return_state="no")
    layer("text")
"""
LAYERS = ("LRU", "LRUBlock", "S4D", "MinGRU", "RGLRU")


def test_modules_around_the_layers_pass_a_strict_type_check() -> None:
    pytest.importorskip("mypy")
    head, _, around = WRAPPER.partition("\n\nclass")
    classes = ("\n\nclass" + around.replace("Around", f"Around{name}").replace("LAYER", name) for name in LAYERS)
    right = head + "".join(classes) + MODEL
    options = ("--strict", "--config-file=", "--follow-imports=silent", "--no-pretty", "--no-color-output")
    # From the root of the repository: there it finds this package, and keeps what it found out about PyTorch's.
    command = [sys.executable, "-m", "mypy", *options, "-c", right + WRONG]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [int(line) for line in re.findall(r"^<string>:(\d+): error: ", done.stdout, re.MULTILINE)]
    assert lines == [right.count("\n") + n for n in (4, 5, 6)], done.stdout + done.stderr
