"""Bytes that a call keeps for its backward pass, counted by walking through the graph that it leaves behind."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def kept_bytes(output: Tensor, inputs: Iterable[Any]) -> int:
    """Return the bytes of all storages that the graph of ``output`` keeps, but for its own and those of the inputs."""
    known = {_where(tensor) for tensor in _tensors([output, *inputs])}
    sizes = {_where(one): one.untyped_storage().nbytes() for node in _nodes(output) for one in _tensors(_kept(node))}
    return sum(size for where, size in sizes.items() if where not in known)


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _nodes(output: Tensor) -> Iterator[Any]:
    waiting, seen = [output.grad_fn], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _kept(node: Any) -> Iterator[Any]:
    """Yield all that a node keeps: by ``save_for_backward`` or as an attribute of ctx; PyTorch's own, by name."""
    if hasattr(node, "saved_tensors"):
        yield node.saved_tensors
        yield list(vars(node).values())
    else:
        yield from (getattr(node, name) for name in _names(node))


_NAMES: dict[type, list[str]] = {}


def _names(node: Any) -> list[str]:
    kind = type(node)
    if kind not in _NAMES:
        _NAMES[kind] = [name for name in dir(node) if name.startswith("_saved_")]
    return _NAMES[kind]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
