"""The implementations of the operators, each put behind the public functions in turn."""

import importlib
from contextlib import ExitStack

import torch
from hypothesis import strategies as st
from interpreted import interpreted_kernels, rounding_interpreter

from fastwkv.ops.library import OPERATORS

IMPLEMENTATIONS = ("cpu", "triton")
# Numbers of channels that tests draw from. On a GPU each is compiled for: there, fewer than a block has, and more.
CHANNELS = (3, 65) if torch.cuda.is_available() else (1, 2, 3, 5, 17, 33)


def packed_lengths(longest: int, sequences: int = 5) -> st.SearchStrategy[list[int]]:
    """Draw the lengths of sequences that are packed into one, some of them empty but not all."""
    lengths = st.one_of(st.integers(1, longest), st.integers(0, 1))
    return st.lists(lengths, min_size=1, max_size=sequences).filter(any)


class Implementation:
    """Context in which the public functions run one implementation.

    ``device`` is where its tensors live. Without a GPU the Triton kernels are interpreted: they take the place of the
    CPU path, for CPU tensors, and everything above them stays as it is. The interpreter rounds as every GPU does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.interpreted = name == "triton" and not torch.cuda.is_available()
        self.device = torch.device("cuda" if name == "triton" and not self.interpreted else "cpu")

    def launcher(self, operator: str):
        """Return the function that launches an operator."""
        folder = "fastwkv.kernels.cpu" if self.name == "cpu" else "fastwkv.kernels"
        return getattr(importlib.import_module(f"{folder}.{OPERATORS[operator]}"), operator)

    def __enter__(self) -> "Implementation":
        self._contexts = ExitStack()
        if self.interpreted:
            self._contexts.enter_context(rounding_interpreter())
            self._contexts.enter_context(interpreted_kernels())
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()
