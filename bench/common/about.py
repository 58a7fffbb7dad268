"""The machine and the software in a result file: enough to judge the numbers, no names of hosts or paths."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastwkv", "torch", "transformers", "triton", "numba", "numpy")


def about_device(device: torch.device | None) -> dict[str, Any]:
    """Describe the device that is measured; None is none: no row is taken for a measurement then."""
    if device is None:
        return {"type": "none", "name": "computed, nothing measured"}
    threads = torch.get_num_threads()
    if device.type != "cuda":
        return {"type": device.type, "name": _processor(), "threads": threads}
    return {
        "type": "cuda",
        "name": torch.cuda.get_device_name(device),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": threads,
    }


def about_run(
    benchmark: str, device: torch.device | None, settings: dict[str, Any], peers: Iterable[str] = ()
) -> dict[str, Any]:
    """Return how the record of a run begins: what was measured where, with which software and settings."""
    return {
        "benchmark": benchmark,
        "device": about_device(device),
        **about_software(peers),
        "settings": settings,
    }


def about_software(peers: Iterable[str] = ()) -> dict[str, Any]:
    """Describe versions, those of the peers that are installed too, the commit of this checkout and the time."""
    versions = {name: _version(name) for name in PACKAGES}
    versions |= {name: version for name in peers if (version := _version(name))}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "system": platform.system(),
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(name: str) -> str:
    """Return the name of a device as that of a folder: nvidia-h200 of NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    if known := os.environ.get("FASTWKV_COMMIT"):  # of a copy without history, from gpu.py
        return known
    root = str(Path(__file__).resolve().parents[2])
    commit = _first_line("git", "-C", root, "rev-parse", "HEAD")
    code = ("fastwkv", "kernels", "reference", "bench/*.py")
    changed = _first_line("git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{commit}-dirty" if commit and changed else commit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "fastwkv":  # run from the checkout, not installed
            import fastwkv

            return fastwkv.__version__
        return None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
