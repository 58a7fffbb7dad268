"""Which machine this is, which versions, and whether the kernels that were compiled beforehand fit. No PyTorch yet."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from piece.runner import READY

PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "hypothesis", "pytest", "pytest-xdist", "ninja")
TOOLS = ("gcc", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"


def emit(**row: Any) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


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


def triton_key() -> str | None:
    """Return what Triton says of itself in the key of every kernel in its cache; None where it does not say."""
    try:
        from triton.runtime import cache  # of Triton 3.6

        if hasattr(cache, "triton_key"):
            return str(cache.triton_key())
        from triton.compiler import compiler

        return str(compiler.triton_key())
    except (ImportError, AttributeError):
        return None


def cache_fits(prepared: Path = READY / "triton_key", key: str | None = None) -> dict[str, Any]:
    """Return whether kernels that were compiled beforehand are those that this Triton would look for, and why not."""
    if not prepared.is_file():
        return {"fits": None, "reason": "nothing was compiled beforehand: kernels are compiled when they are needed"}
    key = key or triton_key()
    if key is None:
        return {"fits": None, "reason": "Triton does not say which key it has"}
    if prepared.read_text().strip() == key.strip():
        return {"fits": True}
    return {"fits": False, "reason": "compiled by another Triton: all kernels are compiled again, which takes minutes"}


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="machine.py", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="do without a GPU")
    args = parser.parse_args(arguments)
    found = devices()
    emit(what="device", devices=found, cores=os.cpu_count())
    emit(what="software", versions=versions(), tools=tools())
    fits = cache_fits()
    emit(what="cache", **fits, **({"error": fits["reason"]} if fits["fits"] is False else {}))
    if not found and not args.rehearse:
        emit(what="device", error="there is no GPU here")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
