"""In one pass the kernels move what every implementation has to, and the saved state once each way."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")
if torch.cuda.is_available():
    pytest.skip("compiled kernels cannot be counted: the interpreter does it", allow_module_level=True)

import triton
import triton.language as tl
from machine_code.bytes_counter import TrafficCounter, merged
from traffic import compulsory, counted

# Tokens that fill the last block, and that do not; as many as make w, u and the final state count for little.
CASES = [("bfloat16", 128), ("bfloat16", 123), ("float32", 123)]
SCANS = [*CASES, ("complex64", 123)]
CHANNELS = 64
SCRIPT = Path(__file__).parents[2] / "bench" / "traffic.py"
counted_once = cache(counted)


def bytes_of(operator, dtype, tokens, chunk=None):
    """Return what each pass moves in bytes a token and channel, what it must, and its counter."""
    shape = (1, tokens, CHANNELS)
    passes = counted_once(operator, dtype, shape, chunk)
    return {
        name: (counter.total / math.prod(shape), compulsory(operator, name, dtype), counter)
        for name, counter in passes.items()
    }


def saved_state(dtype, tokens):
    """Return the bytes a token and channel that the forward pass of WKV stores for the backward pass."""
    counter = bytes_of("wkv", dtype, tokens)["forward, saving"][2]
    return counter.stores["_wkv_fwd_kernel", "checkpoint_ptr"].total / (tokens * CHANNELS)


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_wkv_forward_moves_k_v_and_y_once(dtype, tokens):
    moved, least, _ = bytes_of("wkv", dtype, tokens)["forward"]
    assert least <= moved <= 1.05 * least


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_wkv_forward_that_saves_stores_the_state_besides(dtype, tokens):
    moved, least, _ = bytes_of("wkv", dtype, tokens)["forward, saving"]
    assert least + saved_state(dtype, tokens) <= moved <= 1.05 * least + saved_state(dtype, tokens)


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_wkv_backward_moves_every_tensor_and_the_saved_state_once(dtype, tokens):
    moved, least, _ = bytes_of("wkv", dtype, tokens)["backward"]
    assert least + saved_state(dtype, tokens) <= moved <= 1.05 * least + saved_state(dtype, tokens)


@pytest.mark.parametrize(("dtype", "tokens"), CASES)
def test_wkv_saves_at_most_what_is_promised(dtype, tokens):
    assert 0 < saved_state(dtype, tokens) <= 1.2


@pytest.mark.parametrize(("dtype", "tokens"), SCANS)
@pytest.mark.parametrize("operator", ["linear_scan", "linear_scan_fixed"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_scan_moves_every_tensor_once(operator, which, dtype, tokens):
    moved, least, _ = bytes_of(operator, dtype, tokens)[which]
    # Of h a backward pass needs all rows but the last.
    assert (1 - 1 / tokens) * least <= moved <= 1.05 * least


def test_chunks_but_the_last_are_read_twice_and_written_once():
    _, _, counter = bytes_of("linear_scan", "bfloat16", 256, 128)["forward"]
    a = merged(counter.loads)["a_ptr"]
    assert a.distinct == 256 * CHANNELS * 2
    assert a.total == (256 + 128) * CHANNELS * 2
    assert merged(counter.stores)["h_ptr"].total == 256 * CHANNELS * 2


@triton.jit
def _copy_and_sum(x_ptr, y_ptr, total_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < COLUMNS, other=0.0).to(tl.float32)
    x += tl.load(x_ptr + i, mask=i < 3, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0) * COLUMNS + i, x, mask=i < COLUMNS)
    tl.store(total_ptr, tl.load(total_ptr) + tl.sum(x))


def test_counter_knows_tensors_masks_and_what_is_read_again():
    x, total = torch.ones(8, dtype=torch.bfloat16), torch.zeros(1)
    y = torch.zeros(2, 8)[:, :5].contiguous()
    with TrafficCounter() as counter:
        _copy_and_sum[(2,)](x, y, total, COLUMNS=5, BLOCK=8)
    name = "_copy_and_sum"
    assert {key: (access.total, access.distinct) for key, access in counter.loads.items()} == {
        (name, "x_ptr"): (2 * (5 + 3) * 2, 5 * 2),
        (name, "total_ptr"): (2 * 4, 4),
    }
    assert {key: (access.total, access.distinct) for key, access in counter.stores.items()} == {
        (name, "y_ptr"): (2 * 5 * 4, 2 * 5 * 4),
        (name, "total_ptr"): (2 * 4, 4),
    }
    assert counter.total == counter.loaded + counter.stored == 32 + 8 + 40 + 8
    assert total.item() == 2 * 8


def test_counter_leaves_the_interpreter_as_it_was():
    x, total = torch.ones(8), torch.zeros(1)
    with TrafficCounter() as counter:
        pass
    _copy_and_sum[(1,)](x, torch.zeros(1, 5), total, COLUMNS=5, BLOCK=8)
    assert total.item() == 8
    assert counter.total == 0


def test_counter_finds_what_lies_beside_every_tensor():
    x, total = torch.ones(8), torch.zeros(1)
    y = torch.zeros(9)[:4]
    with TrafficCounter(), pytest.raises(triton.runtime.errors.InterpreterError, match="leaves its tensors"):
        _copy_and_sum[(1,)](x, y, total, COLUMNS=5, BLOCK=8)


def test_command_line_prints_and_writes_what_was_counted(tmp_path):
    command = [sys.executable, SCRIPT, "--ops", "linear_scan_fixed", "--dtypes", "bfloat16", "--tokens", "256"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "traffic.json").read_text())
    assert record["device"] == {"type": "none", "name": "computed, nothing measured"}
    rows = {(row["pass"], row["chunk"]): row for row in record["rows"]}
    assert list(rows) == [(which, chunk) for chunk in (None, 128) for which in ("forward", "backward")]
    assert rows["forward", None]["stored"]["h"] == {"bytes": 2, "times": 1}
    # The last of two chunks is not summarised.
    assert rows["forward", 128]["loaded"]["x"] == {"bytes": 3, "times": 1.5}
    for row in rows.values():
        moved = sum(one["bytes"] for way in ("loaded", "stored") for one in row[way].values())
        assert row["bytes"] == pytest.approx(moved, rel=1e-4)
        assert row["ratio"] == pytest.approx(row["bytes"] / row["compulsory"], rel=1e-4)
        assert f" {row['bytes']:.2f} " in done.stdout
    assert "x 3.00 (1.5 times)" in done.stdout
