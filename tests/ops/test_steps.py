"""A step is one launch: whoever generates waits for launches more than for anything else."""

from contextlib import contextmanager

import pytest
import torch
from implementations import Implementation
from operations import Operations

from fastwkv import WKVState, linear_scan_step, wkv_step
from fastwkv.kernels import linear_scan_step as scan_kernels
from fastwkv.kernels import wkv_step as wkv_kernels


@contextmanager
def counted(monkeypatch, module, kernel):
    """Count the launches of a kernel."""
    launches, real = [], getattr(module, kernel)

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return real[grid]

    monkeypatch.setattr(module, kernel, Counting())
    with Implementation("triton") as context, Operations() as operations:
        yield context.device, launches, operations


def random(device, *shape, dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_of_wkv_is_one_launch(monkeypatch, dtype):
    with counted(monkeypatch, wkv_kernels, "_wkv_step_kernel") as (device, launches, operations):
        w, u, k, v = (random(device, *shape).to(dtype) for shape in ((20,), (20,), (3, 20), (3, 20)))
        state = WKVState(*(random(device, 3, 20).abs() for _ in range(3)))
        operations.calls.clear()
        wkv_step(w, u, k, v, state)
    assert len(launches) == 1
    assert operations.names == ["fastwkv::wkv_step"]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.complex64])
def test_step_of_the_scan_is_one_launch(monkeypatch, a_dtype, x_dtype):
    with counted(monkeypatch, scan_kernels, "_linear_scan_step_kernel") as (device, launches, operations):
        a, state = random(device, 20, dtype=a_dtype), random(device, 3, 20, dtype=a_dtype)
        pairs = (2,) if a_dtype.is_complex else ()
        x = random(device, 3, 20, *pairs).to(x_dtype)
        operations.calls.clear()
        linear_scan_step(a, x, state)
    of_torch = x_dtype == torch.float32  # which has this product and sum as one kernel
    assert len(launches) == (0 if of_torch else 1)
    wanted = "aten::addcmul" if of_torch else "fastwkv::linear_scan_step"
    assert operations.names == [wanted]
