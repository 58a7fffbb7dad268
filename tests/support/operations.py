"""What PyTorch is asked to do, below autograd and autocast."""

from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that start no kernel, beside those that look at memory in another way.
_ONLY_MEMORY = ("aten::promote_types", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view")


class Call(NamedTuple):
    """One operation, by the name of its schema."""

    name: str
    arguments: tuple[Any, ...]
    result: Any


class Operations(TorchDispatchMode):
    """Context that collects all operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not function.is_view and name not in _ONLY_MEMORY:
            self.calls.append(Call(name, args, result))
        return result

    @property
    def names(self) -> list[str]:
        """Names of the operations, in order."""
        return [call.name for call in self.calls]
