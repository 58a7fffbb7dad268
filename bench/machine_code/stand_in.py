"""A driver that Triton takes for an NVIDIA GPU of capability 9.0, and that runs nothing.

Under it the launchers of ``fastwkv.kernels`` accept CPU tensors. Triton specialises and compiles for sm_90 as it would
on the device, and fills its cache; then nothing is launched, so that outputs keep what ``torch.empty`` gave them. With
``compiles=False`` not even that: what is left is the host's own time, and a count of the kernels that calls ask for.

    with stand_in(compiles=False) as device:
        wkv_fwd(w, u, k, v, None, None, False)
    print([kernel.name for kernel in device.kernels])

Read and tried with Triton 3.3, 3.6 and 3.9.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastwkv.kernels import launch

MULTIPROCESSORS = 132  # of an H100 and an H200, and what else they say of themselves
PROPERTIES = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": MULTIPROCESSORS, "warpSize": 32}
TARGET = GPUTarget("cuda", 90, 32)

# Every stand-in is a device of its own, and none that exists: a function keeps its kernels by device.
_indices = itertools.count(-2, -1)


@dataclass(frozen=True)
class Kernel:
    """A request to compile, and its result."""

    source: Any
    """Triton's ``ASTSource``: the function, the types of its arguments, its constants and alignments."""
    options: dict[str, Any]
    compiled: Any
    """Triton's ``CompiledKernel``, or what takes its place."""

    @property
    def name(self) -> str:
        """That of the function."""
        return self.source.fn.__name__


class Launcher:
    """The object that Triton calls to launch a kernel."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None:
        """Launch nothing."""


class NotCompiled:
    """The object that Triton keeps in place of a compiled kernel."""

    function = packed_metadata = metadata = None

    def launch_metadata(self, *_: Any) -> None:
        """Return none."""

    def run(self, *_: Any) -> None:
        """Launch nothing."""


class StandIn:
    """The driver: of Triton's own interface what a launch needs."""

    launcher_cls: Any = Launcher

    def __init__(self) -> None:
        """Make a device without kernels."""
        self.index = next(_indices)
        self.kernels: list[Kernel] = []
        self.utils = SimpleNamespace(load_binary=_load_binary, get_device_properties=lambda _: PROPERTIES)

    def get_current_device(self) -> int:
        """Return its index."""
        return self.index

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        """Return where its tensors are."""
        return torch.device("cpu")


def _load_binary(*_: Any) -> tuple[Any, ...]:
    """Return module, function, registers, spills and, from Triton 3.4 on, threads. Of no module none is unloaded."""
    loaded = None, 0, 64, 0, 1024
    return loaded[:4] if triton.__version__.startswith("3.3.") else loaded


@contextmanager
def stand_in(
    device: StandIn | None = None, *, compiles: bool | Callable[[Any, dict[str, Any]], bool] = True
) -> Iterator[StandIn]:
    """Have Triton take the stand-in for the GPU meanwhile, and everything as it was afterwards.

    ``device`` may be one that was used before, with its kernels. ``compiles`` may choose by source and options. Raises
    ValueError where kernels are interpreted.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("kernels are interpreted here: unset TRITON_INTERPRET before Triton is imported")
    device = device or StandIn()
    active = "_active" if hasattr(driver, "_active") else "active"  # until Triton 3.3
    compiler, previous, count = triton.compiler.compile, getattr(driver, active), launch._multiprocessors

    def compile_and_record(source: Any, *, options: dict[str, Any], **rest: Any) -> Any:
        # A function keeps what it compiles with, beyond the end of this context.
        if driver.active is not device:
            return compiler(source, options=options, **rest)
        chosen = compiles(source, options) if callable(compiles) else compiles
        compiled = compiler(source, options=options, **rest) if chosen else NotCompiled()
        device.kernels.append(Kernel(source, options, compiled))
        return compiled

    setattr(driver, active, device)
    triton.compiler.compile = compile_and_record
    launch._multiprocessors = lambda _: MULTIPROCESSORS
    try:
        yield device
    finally:
        setattr(driver, active, previous)
        triton.compiler.compile, launch._multiprocessors = compiler, count
