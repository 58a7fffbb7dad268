"""Starts kernels for a fraction of the time that Triton asks of the host: compiled ones are held here, by our own key.

Triton finds a compiled kernel by the types, alignments and constants of all arguments, and writes these down as a
string at every launch. Here the constants of a launch are one object, made once (:func:`constants`). Of tensors and
numbers the key has the properties that Triton's has, and the kernel that is found is started as Triton would start it.
Triton itself starts kernels where that is not known to be right: in another version, on another backend, for
interpreted kernels, and where hooks want to see launches.

Two launches of one key are launches of one of Triton's keys: tests/kernels/test_held.py draws arguments and compares.
One of Triton's checks is not made, that nobody changed a global value after a kernel that reads it was compiled. One
setting is not in the key, that of the floating-point sanitizer, under which Triton starts all kernels.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ((3, 5), (3, 9))
"""The first and the last version of Triton whose launches were read. Earlier ones read modes from the environment."""

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_KNOWN = VERSIONS[0] <= _VERSION <= VERSIONS[1] and torch.version.hip is None

_settings = attrgetter(
    "runtime.debug",
    "runtime.launch_enter_hook.calls",
    "runtime.launch_exit_hook.calls",
    *(["compilation.instrumentation_mode", "runtime.add_stages_inspection_hook"] if _VERSION >= (3, 6) else []),
)


class Constants(dict[str, Any]):
    """Constants and options of a launch by name. Nobody changes them, and each is equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@lru_cache(maxsize=None, typed=True)
def constants(**named: Any) -> Constants:
    """Return one object for names and values given again. True, 1 and 1.0 are three values."""
    return Constants(named)


class _Held(NamedTuple):
    kernel: Any  # kept, so that no other kernel gets its id
    compiled: Any  # kept, so that nobody unloads it
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


# Threads need no lock: one reads or writes a dictionary at a time, and whoever compiles a kernel holds the same one.
_held: dict[tuple[Any, ...], _Held] = {}


def start(
    kernel: Any,
    grid: tuple[int, int] | tuple[int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: Constants,
) -> None:
    """Start a kernel on the device of its tensors, in the current stream there.

    ``tensors`` and ``numbers`` are its first arguments; ``constants`` are those that are left, and options.
    """
    index = -1  # of a CPU's tensors, which interpreted kernels take
    for tensor in tensors:
        if tensor is not None:
            index = tensor.get_device()
            break
    if _left_to_triton(kernel):
        with torch.cuda.device(index):
            kernel[grid](*tensors, *numbers, **constants)
        return

    active = driver.active
    device = active.get_current_device()
    if index >= 0 and index != device:
        with torch.cuda.device(index):
            start(kernel, grid, tensors, numbers, constants)
        return
    key = _key(kernel, device, tensors, numbers, constants)
    held = _held.get(key)
    if held is None:
        compiled = kernel[grid](*tensors, *numbers, **constants)
        _hold(key, kernel, compiled, len(tensors) + len(numbers), constants)
        return
    x, y = grid if len(grid) == 2 else (*grid, 1)
    stream = active.get_current_stream(device)
    held.run(x, y, 1, stream, held.function, held.metadata, None, None, None, *tensors, *numbers, *held.constants)


def _left_to_triton(kernel: Any) -> bool:
    """Return whether somebody wants to see launches, or to compile kernels in another way than usual."""
    if not _KNOWN or type(kernel) is not JITFunction:
        return True
    try:
        return any(_settings(triton.knobs)) or bool(kernel.pre_run_hooks)
    except AttributeError:  # hooks in place of the chains of hooks
        return True


def _key(
    kernel: Any,
    device: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: Constants,
) -> tuple[Any, ...]:
    dtypes: list[Any] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            dtypes.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    aligned = None  # all are, as what PyTorch allocates always is
    if addresses % 16:
        aligned = tuple([tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in tensors])
    return id(kernel), kernel.debug, device, constants, aligned, _kinds(*numbers), *dtypes


@lru_cache(maxsize=4096, typed=True)
def _kinds(*numbers: int | float) -> tuple[Any, ...]:
    """Return what Triton may compile for of each number: its type, whether it is 1, and whether 16 divides it."""
    return tuple(
        (n == 1, n % 16 == 0, -(2**31) <= n < 2**31, n < 2**63) if type(n) is int else type(n) for n in numbers
    )


def _hold(key: tuple[Any, ...], kernel: Any, compiled: Any, given: int, constants: Constants) -> None:
    """Hold what Triton launched; nothing where it refused, or where this is no NVIDIA GPU."""
    if compiled is None or driver.active.get_current_target().backend != "cuda":
        return
    values = tuple(constants.get(parameter.name, parameter.default) for parameter in kernel.params[given:])
    _held[key] = _Held(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata, values)
