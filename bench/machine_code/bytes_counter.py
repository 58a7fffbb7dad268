"""Count the bytes that interpreted Triton kernels load and store, for every kernel and tensor.

Elements that a mask leaves out do not count. Neither does PyTorch's work between the kernels.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


@dataclass
class Access:
    """The accesses of one kernel, loads or stores, under the name of one of its arguments."""

    total: int = 0
    """Bytes, each as often as it was loaded or stored."""
    touched: dict[int, "np.ndarray[Any, Any]"] = field(default_factory=dict)
    """Which bytes of the tensors that the argument has been, by their addresses."""

    @property
    def distinct(self) -> int:
        """Bytes, each of them once."""
        return sum(int(touched.sum()) for touched in self.touched.values())


def merged(accesses: dict[tuple[str, str], Access]) -> dict[str, Access]:
    """Return what all kernels have loaded, or stored, under the names of their arguments."""
    found: dict[str, Access] = {}
    for (_, name), access in accesses.items():
        into = found.setdefault(name, Access())
        into.total += access.total
        for address, touched in access.touched.items():
            into.touched[address] = into.touched.get(address, False) | touched
    return found


class TrafficCounter:
    """Context in which the loads and stores of every interpreted kernel are counted.

    ``loads`` and ``stores`` have an :class:`Access` by the name of the kernel and of its argument. An access to memory
    beside all of them is an error.
    """

    def __init__(self) -> None:
        self.loads: dict[tuple[str, str], Access] = {}
        self.stores: dict[tuple[str, str], Access] = {}
        self._kernel = ""
        self._tensors: dict[str, torch.Tensor] = {}  # of the kernel that runs
        self._kept: list[torch.Tensor] = []  # so that no memory becomes another tensor's while bytes are counted

    @property
    def loaded(self) -> int:
        """Bytes loaded by all kernels."""
        return sum(access.total for access in self.loads.values())

    @property
    def stored(self) -> int:
        """Bytes stored by all kernels."""
        return sum(access.total for access in self.stores.values())

    @property
    def total(self) -> int:
        """Bytes loaded and stored by all kernels."""
        return self.loaded + self.stored

    def __enter__(self) -> "TrafficCounter":
        # The methods that read and write have the same arguments in Triton 3.6 and 3.9; their callers have not.
        self._memory = interpreter._interpreter
        self._arguments = interpreter.GridExecutor._init_args_hst
        interpreter._interpreter = _Counted(self._memory, self)
        arguments, counter = self._arguments, self

        def with_names(executor: Any, *args: Any) -> Any:
            positional, named = arguments(executor, *args)
            counter._enter_kernel(executor.fn, positional, named)
            return positional, named

        interpreter.GridExecutor._init_args_hst = with_names
        return self

    def __exit__(self, *_: object) -> None:
        interpreter._interpreter = self._memory
        interpreter.GridExecutor._init_args_hst = self._arguments

    def _enter_kernel(self, function: Any, positional: Any, named: Any) -> None:
        self._kernel = function.__name__
        arguments = inspect.getcallargs(function, *positional, **named)
        self._tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        self._kept.extend(self._tensors.values())

    def _count(self, accesses: dict[tuple[str, str], Access], addresses: Any, mask: Any, itemsize: int) -> None:
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        name, first, size = self._argument(int(addresses.min()), int(addresses.max()) + itemsize)
        access = accesses.setdefault((self._kernel, name), Access())
        access.total += addresses.size * itemsize
        touched = access.touched.setdefault(first, np.zeros(size, bool))
        touched[(addresses - first)[:, None] + np.arange(itemsize)] = True

    def _argument(self, begin: int, end: int) -> tuple[str, int, int]:
        """Return the argument that has these addresses: its name, its address and its size."""
        for name, tensor in self._tensors.items():
            first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if first <= begin and end <= first + size:
                return name, first, size
        raise IndexError(f"{self._kernel} leaves its tensors")


class _Counted:
    """The interpreter's memory, with every access counted."""

    def __init__(self, memory: Any, counter: TrafficCounter) -> None:
        self._memory = memory
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._counter._count(self._counter.loads, addresses, mask, np.dtype(dtype).itemsize)
        return self._memory.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._counter._count(self._counter.stores, addresses, mask, value.dtype.itemsize)
        return self._memory.store(addresses, value, mask)

    def atomic_rmw(self, operation: Any, addresses: Any, value: Any, mask: Any, order: Any) -> Any:
        for accesses in (self._counter.loads, self._counter.stores):
            self._counter._count(accesses, addresses, mask, value.dtype.itemsize)
        return self._memory.atomic_rmw(operation, addresses, value, mask, order)

    def atomic_cas(self, addresses: Any, compared: Any, value: Any, order: Any) -> Any:
        for accesses in (self._counter.loads, self._counter.stores):
            self._counter._count(accesses, addresses, np.ones_like(addresses, bool), value.dtype.itemsize)
        return self._memory.atomic_cas(addresses, compared, value, order)
