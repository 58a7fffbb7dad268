"""Bandwidth of the operators, forward and backward, as a fraction of what this device copies.

Kernels are started by their launchers: what is timed is the device, not PyTorch's autograd. Bytes are the compulsory
ones: what has to be read and written if all else stays on the chip. Rows come in an order in which the first ones say
most, so that whatever ends this early leaves those out that say least.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common.light import emit, reason
from correctness.checks import the_device
from gpu_minutes.machine import Clocks
from launch_shapes.device import Rehearsal
from peers.operator import documents
from timing import on_gpu
from timing.by_turns import Effort
from timing.on_gpu import CudaTask
from torch import Tensor

from fastwkv.kernels.linear_scan import linear_scan_fwd
from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

SHAPES = ((8, 4096, 2048), (32, 1024, 1024), (8, 1024, 768), (1, 65536, 1024), (8, 4096, 4096), (1, 131072, 2560))
KINDS = (
    ("wkv", "bfloat16"),
    ("scan", "bfloat16"),
    ("wkv", "float32"),
    ("scan", "float32"),
    ("scan", "complex64"),
)
PACKED = (1, 65536, 1024)
REHEARSED = ((1, 17, 3),)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "complex64": torch.complex64}
ELEMENTS = {"forward": 3, "backward": 5}  # numbers a token and channel: k, v -> y; k, v, gy -> gk, gv; and the scan's
EFFORT = Effort(repeats=7, seconds=0.02, turn=0.01, once=0.25, most=60)
SHORT = Effort(repeats=1, seconds=0.0, turn=1e-3, once=60.0, most=1)
LARGEST = 2**25  # elements of a tensor of which kernels are compiled beforehand


@dataclass(frozen=True)
class Case:
    """An operator, a dtype and a shape."""

    operator: str
    dtype: str
    shape: tuple[int, int, int]
    packed: bool = False

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return what the forward pass takes: (w, u, k, v) or (a, x), like a model's."""
        B, T, C = self.shape
        dtype = DTYPES[self.dtype]
        one, other = (torch.randn(B, T, C, device=device, dtype=dtype) for _ in range(2))
        if self.operator == "wkv":
            w, u = torch.randn(2, C, device=device)
            return w.exp(), u, one, other
        if dtype.is_complex:
            return one / one.abs().clamp(min=1.02), other
        return torch.sigmoid(3 + one), other

    def offsets(self, device: torch.device) -> Tensor | None:
        """Return where sequences start and end, if they are packed."""
        return documents(self.shape[1], 0).to(device) if self.packed else None

    def bytes(self, which: str) -> int:
        """Return the compulsory bytes of a pass."""
        B, T, C = self.shape
        return ELEMENTS[which] * B * T * C * DTYPES[self.dtype].itemsize


def cases(rehearse: bool = False) -> list[Case]:
    """Return all cases, in the order in which they are measured."""
    shapes = REHEARSED if rehearse else SHAPES
    found = [Case(operator, dtype, shape) for shape in shapes for operator, dtype in KINDS]
    packed = [Case("wkv", "bfloat16", PACKED, True), Case("scan", "bfloat16", PACKED, True)]
    return found[:2] if rehearse else found[:20] + packed + found[20:]


def forward(inputs: tuple[Tensor, ...], cut: Tensor | None, save: bool) -> tuple[Tensor, ...]:
    """Launch a forward pass, with ``save`` that of training."""
    if len(inputs) == 4:
        w, u, k, v = inputs
        return wkv_fwd(w, u, k, v, None, cut, save)
    a, x = inputs
    return linear_scan_fwd(a, x, None, cut, False, False)


def backward(inputs: tuple[Tensor, ...], cut: Tensor | None, kept: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Launch a backward pass. The forward pass of WKV kept checkpoints, that of the scan its result."""
    if len(inputs) == 4:
        w, u, k, v = inputs
        return wkv_bwd(w, u, k, v, None, cut, kept, gradient, None)
    a, _ = inputs
    return linear_scan_bwd(a, kept, None, cut, False, False, gradient, None, gradient.dtype)


def passes(case: Case, cuda: Any) -> Iterator[tuple[str, CudaTask]]:
    """Return the calls that are timed, with as many copies of their inputs as the cache cannot hold."""
    device, cut = cuda.device, case.offsets(cuda.device)
    copies = max(1, min(8, -(-4 * cuda.cache // case.bytes("forward"))))

    def task(call: Callable[[Any], Any], make: Callable[[], Any]) -> CudaTask:
        return CudaTask(call, device, cuda=cuda, make=make, copies=copies)

    def with_kept() -> tuple[Any, ...]:
        inputs = case.draw(device)
        result, _, *kept = forward(inputs, cut, True)
        return inputs, cut, kept[0] if kept else result, torch.randn_like(result)

    yield "forward", task(lambda inputs: forward(inputs, cut, False), lambda: case.draw(device))
    yield "backward", task(lambda made: backward(*made), with_kept)
    if case.operator == "wkv":
        yield "forward, saving", task(lambda inputs: forward(inputs, cut, True), lambda: case.draw(device))


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Return the launches, of fewer tokens where that compiles the same, for precompile.py."""
    for case in cases():
        yield f"{case.operator} {case.dtype} {case.shape}{' packed' * case.packed}", partial(_launch, case)


def _launch(case: Case) -> None:
    B, T, C = case.shape
    if case.packed:
        inputs = [torch.empty(*case.shape, dtype=DTYPES[case.dtype]) for _ in range(2)]
    else:  # time is cut or not by B and C, but not below some tokens
        T = min(T, max(1024, LARGEST // (B * C)))
        inputs = [torch.empty(B, T, C, dtype=DTYPES[case.dtype]) for _ in range(2)]
    rates = [torch.empty(C) for _ in range(2)] if case.operator == "wkv" else []
    given, cut = (*rates, *inputs), torch.tensor([0, T]) if case.packed else None
    forward(given, cut, False)
    result, _, *kept = forward(given, cut, True)
    backward(given, cut, kept[0] if kept else result, torch.empty_like(result))


def measure(case: Case, cuda: Any, copy_gbps: float, effort: Effort, clocks: Clocks) -> bool:
    """Measure the passes of a case, a row each; return whether all went well."""
    row = {"what": "bandwidth", "op": case.operator, "dtype": case.dtype, "shape": list(case.shape)}
    good = True
    for which, task in passes(case, cuda):
        row |= {"packed": case.packed, "pass": which}
        begin = time.monotonic()
        try:
            task.run()  # which loads the kernels, or compiles them: its time is no measure of the next
            task.first = task.run()[1]
            while not (task.seconds and task.enough(effort)):
                task.take_turn(effort)
            seconds = float(np.median(task.seconds))
            gbps = case.bytes(which.partition(",")[0]) / seconds / 1e9
            figures = {"ms": 1e3 * seconds, "ms_min": 1e3 * min(task.seconds), "times": len(task.seconds)}
            figures |= {"gbps": gbps, "fraction": gbps / copy_gbps, "head_start": task.head_start and task.busy > 0}
            figures |= {"ms_host": 1e3 * float(np.median(task.host))} if task.host else {}
            emit(**row, **figures, **clocks.since(begin))
        except Exception as error:
            emit(**row, error=reason(error))
            good = False
        del task
        gc.collect()
    return good


def run(args: argparse.Namespace) -> int:
    """Run the step."""
    began, device = time.monotonic(), the_device(args.rehearse)
    cuda = Rehearsal() if args.rehearse else on_gpu.Cuda(device)
    chosen = cases(args.rehearse)
    with Clocks() as clocks, torch.no_grad():
        gbps = 1.0 if args.rehearse else on_gpu.copy_bandwidth(cuda)
        emit(what="copy", gbps=gbps, **clocks.since(began))
        good = True
        for n, case in enumerate(chosen):
            spent = time.monotonic() - began
            if n and spent > args.seconds * 0.95:
                emit(what="left out", reason=f"{spent:.0f} s were over", cases=len(chosen) - n)
                break
            good &= measure(case, cuda, gbps, SHORT if args.rehearse else EFFORT, clocks)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return int(not good)
