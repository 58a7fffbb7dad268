"""ops.py for a short time on a GPU: ours beside the peers that are quick to come, a row a figure as it exists.

Peers that loop in Python, or are compiled anew for every shape, are left out. The right results are those of float64 on
the device, not of a loop on the CPU or by numba.
"""

import argparse
import contextlib
import importlib
import time
from typing import Any

import ops
import torch
from common.light import emit, reason
from common.program import run_and_save
from correctness import reference
from correctness.checks import wide
from peers import fetched
from peers.operator import Inputs
from peers.operators import OPERATORS
from peers.wkv_cuda_providers import RWKV_CUDA, compiled, longest
from precompiled import triton_keys
from throughput.passes import checked_channels
from throughput.plan import Case
from torch import Tensor

SHAPES = "8x4096x2048,32x1024x1024,8x1024x768,1x65536x1024"
PROVIDERS = "fastwkv,rwkv-cuda,fla,fla-recurrent,fla-chunk,accelerated-scan,accelerated-scan-warp"
OPTIONS = ("--ops", "wkv,linear_scan", "--shapes", SHAPES, "--passes", "forward,backward")
OPTIONS += ("--dtypes", "bfloat16,float32", "--providers", PROVIDERS)
TOKENS = 4096  # of the longest sequence that rwkv-cuda is compiled for: every thread has memory for each of them
KEPT = ("op", "pass", "dtype", "B", "T", "C", "provider", "ms", "ms_min", "ms_host", "gbps", "fraction", "head_start")


class Rows(ops.Ops):
    """A run of ops.py that prints its rows."""

    def __init__(self, args: argparse.Namespace, seconds: float) -> None:
        """Let no case begin after so many seconds."""
        super().__init__(args)
        self.deadline = self.began + seconds
        self.printed = 0
        emit(what="copy", gbps=self.about["copy_gbps"])

    def save(self) -> None:
        """Write ops.json, and print the rows that are new."""
        super().save()
        for row in self.rows[self.printed :]:
            figures = {key: row[key] for key in KEPT if row.get(key) is not None}
            if row["status"] == "ok":
                emit(what="peer", **figures, wrong_by=row["error"])
            else:
                key = "reason" if row["status"] == "unavailable" else "error"
                emit(what="peer", **figures, **{key: f"{row['status']}: {row['reason']}"})
        self.printed = len(self.rows)

    def _expected(self, case: Case, inputs: Inputs) -> dict[bool, dict[str, Tensor]]:
        """Return what is right, of the channels that are compared."""
        sample = inputs.part(case.shape[1], checked_channels(inputs))
        found = wanted(case.operator.name, sample)
        return {False: {name: result.detach().cpu() for name, result in found.items()}}


def wanted(operator: str, inputs: Any) -> dict[str, Tensor]:
    """Return output and gradients in float64, where the inputs are."""
    offsets = None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    given = (inputs.w, inputs.u, inputs.k, inputs.v) if operator == "wkv" else (inputs.a, inputs.x)
    leaves = [wide(t.detach()).requires_grad_() for t in given]
    function = reference.wkv if operator == "wkv" else reference.linear_scan
    output, _ = function(*leaves, None, offsets)
    gradients = torch.autograd.grad(output, leaves, inputs.gradient.to(output.dtype))
    names = OPERATORS[operator].gradients
    return {OPERATORS[operator].output: output, **dict(zip(names, gradients, strict=True))}


def build() -> int:
    """Compile the CUDA peer, so that it is there when its turn comes; return the exit status."""
    with contextlib.suppress(Exception):
        importlib.import_module("accelerated_scan.warp")  # compiles its kernels
    RWKV_CUDA.folder = fetched.sources()
    if (why := RWKV_CUDA.missing(torch.device("cuda", 0))) is not None or (sources := RWKV_CUDA.sources()) is None:
        emit(what="build", reason=why or "its sources are not here")
        return 0
    begin = time.monotonic()
    try:
        compiled(sources, min(TOKENS, longest(torch.device("cuda", 0))))
    except Exception as error:
        emit(what="build", reason=reason(error))  # a peer's, not ours
        return 0
    emit(what="build", name=RWKV_CUDA.name, seconds=time.monotonic() - begin)
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the step; 1 if this package gave a wrong result or none."""
    began = time.monotonic()
    if args.subjects == ["build"]:
        return 0 if args.rehearse else build()
    options = [*OPTIONS, "--out", str(args.out)]
    if args.rehearse:
        options = ["--ops", "wkv", "--shapes", "1x9x3", "--passes", "forward,backward", "--quick", "--device", "cpu"]
        options += ["--providers", "fastwkv,hf", "--dtypes", "float32", "--out", str(args.out)]
    elif (folder := fetched.sources()) is not None:
        options += ["--rwkv-cuda", str(folder)]
    made = ops.Ops.parse(options)
    made.providers = None  # no peer was named: one whose first calls take too long is not asked again
    RWKV_CUDA.lengths = (TOKENS,)
    if not args.rehearse:
        triton_keys.settle()  # kernels compiled beforehand are found
    rows = Rows(made, args.seconds - (time.monotonic() - began))
    status = run_and_save(rows.run, rows.save)
    return status or int(any(r["provider"] == "fastwkv" and r["status"] in ("wrong", "failed") for r in rows.rows))
