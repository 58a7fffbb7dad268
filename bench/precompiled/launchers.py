"""The modules in C that Triton 3.6 compiles to launch kernels, one for each signature, and to reach the driver.

Each takes gcc a second or less where the kernels run, once the same in every process that comes first. Here their
sources are recorded and compiled for the Python of that machine, which needs its headers and of CUDA nothing:
``libcuda.so.1`` is named, and found where the module is loaded. From Triton 3.7 on there is one launcher for all
signatures, which is not worth it.
"""

import glob
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine_code.stand_in import Launcher

HEADERS = """
import json, sys, sysconfig
scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
paths = sysconfig.get_paths(scheme=scheme)
print(json.dumps(["%d.%d" % sys.version_info[:2], paths["include"], sysconfig.get_config_var("EXT_SUFFIX")]))
"""
FLAGS = ("-O3", "-shared", "-fPIC", "-Wno-psabi")  # Triton's own


class Sources:
    """Sources that Triton would have compiled, and the names of their modules."""

    def __init__(self) -> None:
        """Record none yet."""
        self.names: dict[str, str] = {}
        self.nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")

    def launcher(self, source: Any, metadata: Any) -> Launcher:
        """Record the launcher of a compiled kernel, in the place of a driver's ``launcher_cls``."""
        if hasattr(self.nvidia, "make_launcher"):
            with self._recorded():
                self.nvidia.CudaLauncher(source, metadata)
        return Launcher()

    def driver(self) -> None:
        """Record the module through which Triton reaches the driver."""
        if hasattr(self.nvidia, "make_launcher"):
            with self._recorded():
                self.nvidia.CudaUtils()
            del self.nvidia.CudaUtils.instance

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        before = self.nvidia.compile_module_from_src, self.nvidia.library_dirs

        def record(src: str, name: str, **_: Any) -> _Module:
            self.names[src] = name
            return _Module()

        self.nvidia.compile_module_from_src, self.nvidia.library_dirs = record, list
        try:
            yield
        finally:
            self.nvidia.compile_module_from_src, self.nvidia.library_dirs = before


class _Module:
    """A module in which everything is there."""

    def __getattr__(self, name: str) -> None: ...


def headers(release: str) -> tuple[str, str] | None:
    """Return where the headers are of a Python of such a release, "3.12" say, and how its modules' names end."""
    managed = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    others = sorted(glob.glob(f"{managed}/versions/{release}.*/bin/python{release}"))
    for python in filter(None, (sys.executable, shutil.which(f"python{release}"), *others)):
        done = subprocess.run([python, "-c", HEADERS], capture_output=True, text=True)
        found, include, suffix = json.loads(done.stdout) if done.returncode == 0 else ("", "", "")
        if found == release and Path(include, "Python.h").exists():
            return include, suffix
    return None


def build(names: dict[str, str], release: str, folder: Path, jobs: int) -> tuple[str, dict[str, bytes]]:
    """Compile modules for a release of Python; return how the names of their files end, and the files by their sources.

    Raises ValueError where there are no headers of it, or no C compiler.
    """
    python = headers(release)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if python is None or compiler is None:
        raise ValueError(f"no Python {release} with headers here" if compiler else "no C compiler here")
    (folder / "stub").mkdir(parents=True, exist_ok=True)
    stub = folder / "stub" / "libcuda.so.1"
    _compile([compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(stub), "-x", "c", os.devnull])
    cuda = Path(importlib.import_module("triton.backends.nvidia.driver").__file__ or "").parent / "include"

    def one(number: int, source: str) -> bytes:
        path = folder / f"{number}.c"
        path.write_text(source)
        link = ("-Wl,--no-as-needed", f"-L{stub.parent}", "-l:libcuda.so.1")
        out = path.with_suffix(".so")
        _compile([compiler, str(path), *FLAGS, "-o", str(out), *link, f"-I{cuda}", f"-I{python[0]}"])
        return out.read_bytes()

    with ThreadPoolExecutor(jobs) as pool:
        return python[1], dict(zip(names, pool.map(one, itertools.count(), names), strict=True))


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the C compiler fails: {done.stderr.strip()[:500]}")
