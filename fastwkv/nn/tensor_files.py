"""Files of named tensors: read without running code from them and without a copy, written whole or not at all."""

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A file is not what it should be: damaged, of another model, or of another version of this one."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or one of ``torch.save`` that holds a dictionary of tensors and nothing that runs.

    The tensors stand in the mapped file: they cost no memory of their own, and writing to the file changes them. Only
    files of PyTorch before 1.6 are read into memory.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is damaged or holds something else.

    """
    with path.open("rb") as file:
        head = file.read(9)
    is_safetensors = path.suffix == ".safetensors" or head[8:] == b"{"  # after the length of a header of JSON
    tensors = _read_safetensors(path) if is_safetensors else _read_torch(path, mapped=head.startswith(b"PK"))
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: expected tensors by name, but {name!r} is of type {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path}: expected dense tensors, but {name} is on {tensor.device}, {tensor.layout}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({_first_line(error)})") from None


def _read_torch(path: Path, mapped: bool) -> dict[str, Tensor]:  # older files are no archives, and cannot be mapped
    try:
        found = torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):  # PyTorch advises to run it
            message = f"{path}: damaged, or not a file of tensors alone, and nothing else is loaded"
            raise CheckpointError(message) from None
        raise CheckpointError(f"{path}: not a whole file of torch.save ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got a {type(found).__name__}")
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    seen: set[int] = set()
    contiguous = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        # The format knows no tensors that share memory, as those of tied embeddings do.
        contiguous[name] = (tensor.clone() if memory in seen else tensor).detach().contiguous()
        seen.add(memory)
    replace_file(path, lambda part: save_file(contiguous, part, {"format": "pt"}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it holds something else.

    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    replace_file(path, lambda part: Path(part).write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


def replace_file(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` make a file beside ``path`` and put it in its place; what was there stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder, path.name)
        part.touch()
        usual = part.stat().st_mode  # safetensors writes files that nobody else can read
        write(str(part))
        part.chmod(usual)
        os.replace(part, path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
