"""Peers for a machine without a network: fetched into build/gpu-ready, which git ignores, and found there.

Installed packages come first. Nothing of a peer is part of this repository.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

READY = Path(__file__).resolve().parents[2] / "build" / "gpu-ready"
PACKAGES = READY / "peers"
RWKV_CUDA = READY / "rwkv-cuda"
WHEELS = ("fla-core==0.6.0", "einops==0.8.2", "accelerated-scan==0.3.1")  # fla-core needs einops, and PyTorch
TRANSFORMERS = "transformers==4.57.6"  # of which no more than
SOURCES = ("wkv_op.cpp", "wkv_cuda.cu", "wkv_cuda_bf16.cu")
FETCHED = "fetched.json"  # in either folder, what is in it


def add_to_path() -> None:
    """Have the fetched packages found, after all that are installed."""
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))


def sources() -> Path | None:
    """Return the folder of the peer in CUDA, None if it was not fetched."""
    return RWKV_CUDA if RWKV_CUDA.is_dir() else None


def fetch() -> list[str]:
    """Fetch what is not there yet; return what was."""
    jobs = {PACKAGES: (list(WHEELS), _packages), RWKV_CUDA: ([TRANSFORMERS, *SOURCES], _sources)}
    new = []
    for folder, (what, get) in jobs.items():
        if _fetched(folder) == what:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            partial = Path(temporary) / folder.name
            partial.mkdir()
            get(partial)
            (partial / FETCHED).write_text(json.dumps(what))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(partial, folder)
        new += what
    return new


def _fetched(folder: Path) -> list[str] | None:
    try:
        return json.loads((folder / FETCHED).read_text())
    except (OSError, ValueError):
        return None


def _packages(folder: Path) -> None:
    pip("install", "--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(folder), *WHEELS)


def _sources(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", temporary, TRANSFORMERS)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in SOURCES:
                (folder / name).write_bytes(archive.read(f"transformers/kernels/rwkv/{name}"))


def pip(command: str, *arguments: str) -> None:
    """Run pip; ValueError with its last line if it fails."""
    line = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip {command} {arguments[-1]} fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
