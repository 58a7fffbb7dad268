"""A stand-in for fastwkv.nn.cuda_graph.Graph that works on a CPU, and is as blind as a CUDA graph.

What is recorded are operations on tensors. A replay runs them again, in the same memory, and no line of Python: a
number that Python computed while it was recorded stays what it was, and memory that was replaced is not looked at.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastwkv.nn.cuda_graph import RecordingError

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class RecordedGraph:
    """Runs a function once and records it, then replays it; counts both."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.captures = self.replays = 0

    def capture(self, body: Callable[[], None]) -> None:
        assert not self._calls
        with torch.inference_mode(False), torch.no_grad():
            body()
            self.captures += 1
            drawn = self._generator.get_state()
            recording = _Recording(self._calls)
            try:
                with recording:
                    body()
            except RuntimeError as error:
                raise RecordingError(str(error)) from error
            finally:  # to record is to run nothing
                self._generator.set_state(drawn)
                for tensor, value in recording.before.values():
                    tensor.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode(False), torch.no_grad():
            for function, arguments, options, results in self._calls:
                for old, new in zip(results, _tensors(function(*arguments, **options)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recording(TorchDispatchMode):
    """Writes down every operation, and what a tensor held before it was first written to."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls, self.before = calls, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function._schema.name} waits for the device")
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs[argument.name]
                self.before.setdefault(written.data_ptr(), (written, written.clone()))
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, _tensors(results)))
        return results


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
