"""The position in a text: the state of the model and the last token, in memory and in a file."""

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastwkv.cli.arguments import UsageError
from fastwkv.nn import RWKV4, CheckpointError, RWKV4Config, RWKV4State
from fastwkv.nn.state import check_state
from fastwkv.nn.tensor_files import read_tensors, write_tensors

_LAST_TOKEN = "last_token"


class Position(NamedTuple):
    """The state after all tokens but the last, and the last token, which has not been read yet.

    Generation begins by reading that token, so nothing else is needed to continue.
    """

    state: RWKV4State
    last_token: int

    def unread(self, more: Sequence[int] = ()) -> Tensor:
        """Return the last token, and more after it, as int64 ``[1, T]`` on the device of the state."""
        return torch.tensor([[self.last_token, *more]], device=self.state.att_x.device)

    def to(self, device: torch.device) -> "Position":
        """Return the same with the state on this device."""
        return Position(self.state.to(device), self.last_token)

    def save(self, path: Path) -> None:
        """Write a safetensors file: the tensors of the state, and int64 ``[1]`` "last_token".

        Raises:
            OSError: the file cannot be written.

        """
        try:
            write_tensors(path, {**self.state.tensors(), _LAST_TOKEN: torch.tensor([self.last_token])})
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{path}: {error}") from None

    @staticmethod
    def load(path: Path, config: RWKV4Config, dtype: torch.dtype) -> "Position":
        """Read a file that :meth:`save` has written for a model of these sizes and this dtype.

        Raises:
            OSError: the file cannot be opened.
            CheckpointError: the file is damaged, or not of such a model.

        """
        tensors = read_tensors(path)
        try:
            state, last_token = RWKV4State.from_tensors(tensors).clone(), tensors[_LAST_TOKEN]
        except KeyError as error:
            raise CheckpointError(f"{path}: not a file of --save-state: it has no {error}") from None
        try:
            check_state(state, config, 1, torch.empty(0, dtype=dtype))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit this model: {error}") from None
        if last_token.shape != (1,) or last_token.dtype != torch.int64:
            found = f"{last_token.dtype} {list(last_token.shape)}"
            raise CheckpointError(f"{path}: {_LAST_TOKEN} must be torch.int64 [1], got {found}")
        token = int(last_token)
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{path}: {_LAST_TOKEN} {token} is outside the vocabulary of {config.vocab_size}")
        return Position(state, token)


def advance(model: RWKV4, position: Position, tokens: Sequence[int]) -> Position:
    """Add these tokens, at least one, to the text: read all unread tokens but the last of these."""
    with torch.inference_mode():
        _, state = model.features(position.unread(tokens[:-1]), position.state)
    return Position(state, tokens[-1])


def check_writable(path: Path) -> None:
    """Check that :meth:`Position.save` can write a file of this name, into an existing folder.

    Raises:
        UsageError: it cannot.

    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryDirectory(dir=path.parent):
            pass
    except FileNotFoundError:
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
