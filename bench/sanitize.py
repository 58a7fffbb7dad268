"""Every operator and pass on tiny shapes, packed and not, in chunks and not, for compute-sanitizer to look at.

Nothing is compared; the tests do that. With --tool every group runs in a process of its own under the tool, all at
once, since most of the time goes into compiling. Tensors then have allocations of their own, so that the tool sees
where each one ends. The exit status is 77 where the tool is missing or refuses the device.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    from common.command_line import Parser
    from torch import Tensor

    from fastwkv.kernels.config import SCAN_ROWS, checkpoint_rows
    from fastwkv.kernels.launch import launch_for, scan_launch_for
    from fastwkv.kernels.linear_scan import linear_scan_fwd
    from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd, linear_scan_bwd_
    from fastwkv.kernels.linear_scan_step import linear_scan_step
    from fastwkv.kernels.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_
    from fastwkv.kernels.wkv import wkv_fwd
    from fastwkv.kernels.wkv_bwd import wkv_bwd
    from fastwkv.kernels.wkv_step import wkv_step
except ImportError as error:
    sys.exit(f"sanitize.py: {error}; pip install -e . installs what it needs")

TOOLS = ("memcheck", "racecheck")
NOT_AVAILABLE = 77
REFUSED = "Device not supported"  # what the tool says on machines that do not let it in
# Odd ones; two chunks of the fewest tokens that a chunk may have. What a kernel keeps of a few rows at a time in shared
# memory is written over only in longer ones, for which interpretation is too slow.
B, T, C = 2, 83 if torch.cuda.is_available() else 19, 35
OFFSETS = (0, 5, T)
SWITCHES = list(product((False, True), repeat=3))


def run_wkv(dtype: torch.dtype, device: torch.device) -> None:
    """Launch WKV: forward, with and without what backward starts from, backward, and one step."""
    acc = torch.float32
    w, u = torch.rand(2, C, device=device)
    for packed, chunked, state in SWITCHES:
        batch, cut = _batch(packed, device)
        k, v, gy = (torch.randn(batch, T, C, device=device).to(dtype) for _ in range(3))
        initial = torch.rand(3, B, C, device=device, dtype=acc) if state else None
        launch = launch_for(k)
        launch = replace(launch, chunk=checkpoint_rows(acc.itemsize)) if chunked else launch
        wkv_fwd(w, u, k, v, initial, cut, False, launch=launch)
        _, final, kept = wkv_fwd(w, u, k, v, initial, cut, True, launch=launch)
        gfinal = torch.ones_like(final[:2]) if state else None
        wkv_bwd(w, u, k, v, initial, cut, kept, gy, gfinal, launch=launch)
    k_t, v_t = torch.randn(2, B, C, device=device).to(dtype)
    wkv_step(w, u, k_t, v_t, *torch.rand(3, B, C, device=device, dtype=acc))


def run_linear_scan(dtype: torch.dtype, device: torch.device) -> None:
    """Launch the linear scan: forward, backward and one step, every kind of multiplier, both directions."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    for packed, chunked, state in SWITCHES:
        batch, cut = _batch(packed, device)
        fixed, reverse, log = packed == chunked, packed == state, chunked == state and not dtype.is_complex
        x, gh = (torch.randn(batch, T, C, device=device).to(dtype) for _ in range(2))
        a = -torch.rand((C,) if fixed else (batch, T, C), device=device).to(dtype)
        initial = torch.rand(B, C, device=device).to(state_dtype) if state else None
        launch = scan_launch_for(x)
        launch = replace(launch, chunk=SCAN_ROWS) if chunked else launch
        h, final = linear_scan_fwd(a, x, initial, cut, log, reverse, launch=launch)
        gfinal = torch.ones_like(final) if state else None
        linear_scan_bwd(a, h, initial, cut, log, reverse, gh, gfinal, dtype, launch=launch)
        linear_scan_bwd_(a, h, initial, cut, log, reverse, gh.to(h), gfinal, launch=launch)
    x_t, state_t = torch.rand(B, C, device=device).to(dtype), torch.rand(B, C, device=device).to(state_dtype)
    for gate, log in ((x_t[0], False), (x_t, False), *(() if dtype.is_complex else ((x_t, True),))):
        linear_scan_step(gate, x_t, state_t, log)


def run_rwkv4_step(dtype: torch.dtype, device: torch.device) -> None:
    """Launch what stands between the products of a token of RWKV-4."""
    x, before, r, k, v = torch.rand(5, B, C, device=device).to(dtype)
    weight, bias, *mixes = torch.rand(5, C, device=device).to(dtype)
    for count in (2, 3):
        norm_mix_(x, weight, bias, 1e-5, before, mixes[:count])
    wkv_step_gated_(*torch.rand(2, C, device=device), k, v, r, *torch.rand(3, B, C, device=device))
    relu_squared_(k)
    add_gated_(x, r, v, 0.5)


def _batch(packed: bool, device: torch.device) -> tuple[int, Tensor | None]:
    return (1, torch.tensor(OFFSETS, device=device)) if packed else (B, None)


GROUPS: dict[str, Callable[[torch.device], None]] = {
    "wkv-float32": partial(run_wkv, torch.float32),
    "wkv-bfloat16": partial(run_wkv, torch.bfloat16),
    "linear_scan-float32": partial(run_linear_scan, torch.float32),
    "linear_scan-bfloat16": partial(run_linear_scan, torch.bfloat16),
    "linear_scan-complex64": partial(run_linear_scan, torch.complex64),
    "rwkv4_step-float32": partial(run_rwkv4_step, torch.float32),
    "rwkv4_step-bfloat16": partial(run_rwkv4_step, torch.bfloat16),
}


def under(tool: list[str], groups: list[str]) -> int:
    """Run groups under a tool, whose command line begins so; return the exit status."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = [[*tool, sys.executable, str(Path(__file__)), group] for group in groups]
    running = [
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]
    failed = []
    for group, process in zip(groups, running, strict=True):
        printed, _ = process.communicate()
        print(f"{group}: exit status {process.returncode}\n{printed}", flush=True)
        if process.returncode:
            failed.append(REFUSED in printed)
    if not failed:
        return 0
    return NOT_AVAILABLE if all(failed) else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = Parser(prog="sanitize.py", description="Run every kernel once, for compute-sanitizer to look at.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"(default: {', '.join(GROUPS)})")
    parser.add_argument("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    args = parser.parse_args(arguments)
    groups = args.groups or list(GROUPS)
    for group in groups:
        if group not in GROUPS:
            parser.error(f"unknown group {group!r} (choose from {', '.join(GROUPS)})")
    gpu = torch.cuda.is_available()
    if args.tool:
        if not gpu:
            parser.error("there is no GPU here")
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if not found:
            print("compute-sanitizer is not there")
            return NOT_AVAILABLE
        # What PyTorch asks of the driver and may be refused is no error of ours.
        options = ["--report-api-errors", "no"] if args.tool == "memcheck" else []
        return under([found, "--tool", args.tool, "--error-exitcode", "1", *options], groups)
    for group in groups:
        GROUPS[group](torch.device("cuda" if gpu else "cpu"))
    if gpu:
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
