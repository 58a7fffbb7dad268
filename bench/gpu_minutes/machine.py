"""The machine: its versions and tools, whether the kernels compiled beforehand fit, and its clock while it works.

Nothing here imports PyTorch.
"""

import argparse
import os
import platform
import statistics
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from common.light import emit, tool
from gpu_minutes.runner import CACHE
from precompiled import kernel_cache

PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "hypothesis", "pytest", "pytest-xdist", "ninja")
TOOLS = ("gcc", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
DEVICE = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,"
DEVICE += "mig.mode.current"
CLOCKS = {"mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
EVERY = 100  # milliseconds


def version(package: str) -> str | None:
    """Return which version is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU."""
    command = [tool("nvidia-smi") or "nvidia-smi", f"--query-gpu={DEVICE}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.splitlines()
    return [dict(zip(DEVICE.split(","), map(str.strip, line.split(",")), strict=False)) for line in lines]


class Clocks:
    """Samples of clock, power and temperature, taken in the background while the context lasts."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Clocks":
        if found := tool("nvidia-smi"):
            query = f"--query-gpu={','.join(CLOCKS.values())}"
            command = [found, query, "--format=csv,noheader,nounits", f"--loop-ms={EVERY}", "--id=0"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, lines: Any) -> None:
        for line in lines:
            try:
                self.samples.append((time.monotonic(), [float(field) for field in line.split(",")]))
            except ValueError:  # "[N/A]"
                continue

    def since(self, begin: float) -> dict[str, Any]:
        """Return the medians since a time of the monotonic clock, nothing where nothing is known."""
        found = [values for at, values in list(self.samples) if at >= begin]
        columns = zip(*found, strict=True)
        return {name: statistics.median(column) for name, column in zip(CLOCKS, columns, strict=False)}


def unpacked(cache: Path, folder: Path, rehearse: bool = False) -> dict[str, Any]:
    """Unpack the kernels that were compiled beforehand into Triton's cache; return what of them is of use.

    In a rehearsal none needs to be: they are for the Triton of the machine with the GPU, and here none is started.
    """
    began = time.monotonic()
    if not cache.exists():
        return {"kernels": 0, "reason": f"there is no {cache.name}: kernels are compiled when they are needed"}
    fit = kernel_cache.unpack(cache, folder)
    row = {"kernels": fit.kernels, "launchers": fit.launchers, "notes": list(fit.notes)}
    row["unpacking"] = time.monotonic() - began
    if rehearse:
        return row | {"notes": [*fit.notes, *fit.reasons]}
    return row | ({"error": "; ".join(fit.reasons)} if fit.reasons else {})


def run(args: argparse.Namespace) -> int:
    """Run the step."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):  # first what others need
        emit(what="cache", **unpacked(CACHE, Path(folder), args.rehearse))
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    emit(what="software", versions=versions, tools={name: tool(name) for name in TOOLS})
    found = devices()
    emit(what="device", devices=found, cores=os.cpu_count())
    if not found and not args.rehearse:
        emit(what="device", error="there is no GPU here")
        return 1
    return 0
