"""Which machine this is, which versions, and whether the kernels that were compiled beforehand fit. No PyTorch yet."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_minutes.journal import emit
from gpu_minutes.runner import CACHE

PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "hypothesis", "pytest", "pytest-xdist", "ninja")
TOOLS = ("gcc", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
)


def versions() -> dict[str, str | None]:
    """Return what is installed, without importing it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def tools() -> dict[str, str | None]:
    """Return where the tools are that steps ask for."""
    return {name: shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") for name in TOOLS}


def devices() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    fields = QUERY.split(",")
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in done.stdout.splitlines()]


def unpacked(cache: Path, folder: Path, rehearse: bool = False) -> dict[str, Any]:
    """Unpack the kernels that were compiled beforehand into Triton's cache; return what of them is of use.

    In a rehearsal none needs to be: they are for the Triton of the machine with the GPU, and here none is started.
    """
    began = time.monotonic()
    try:
        from precompiled import kernel_cache
    except ImportError:
        return {"kernels": 0, "reason": "nothing here was compiled beforehand"}
    if not cache.exists():
        return {"kernels": 0, "reason": f"there is no {cache.name}: kernels are compiled when they are needed"}
    fit = kernel_cache.unpack(cache, folder)
    row = {"kernels": fit.kernels, "launchers": fit.launchers, "notes": list(fit.notes)}
    row["unpacking"] = time.monotonic() - began
    if rehearse:
        return row | {"notes": [*fit.notes, *fit.reasons]}
    return row | ({"error": "; ".join(fit.reasons)} if fit.reasons else {})


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="machine.py", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="do without a GPU")
    args = parser.parse_args(arguments)
    if folder := os.environ.get("TRITON_CACHE_DIR"):  # first what others need
        emit(what="cache", **unpacked(CACHE, Path(folder), args.rehearse))
    emit(what="software", versions=versions(), tools=tools())
    found = devices()
    emit(what="device", devices=found, cores=os.cpu_count())
    if not found and not args.rehearse:
        emit(what="device", error="there is no GPU here")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
