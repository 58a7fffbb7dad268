"""Files of named tensors: read without running code from them and without a copy, written whole or not at all."""

import errno
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastwkv.nn.torch_archive import check_archive

_SPARE = 2**24  # bytes of tensors beyond those of the file, for vectors that repeat one number


class CheckpointError(ValueError):
    """A file is damaged, of another model, or of another version of this model.

    The message is one line, in which characters that cannot be printed are written with a backslash.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))


def check_name(path: Path) -> None:
    """Raise CheckpointError if no file can have this name: it holds a NUL, or the system cannot encode it."""
    try:
        with suppress(OSError):
            path.stat()
    except ValueError as error:
        raise CheckpointError(f"{path}: not the name of a file ({error})") from None


def open_file(path: Path) -> BinaryIO:
    """Open a regular file. A FIFO or a device might have no end, and cannot be mapped.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: the path is of something else than a regular file.

    """
    check_name(path)
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a FIFO, a socket or a device"
        raise CheckpointError(f"{path}: expected a file, got {found}")
    return path.open("rb")


def read_tensors(path: Path, checksums: bool = True) -> dict[str, Tensor]:
    """Read a safetensors file, or one of ``torch.save`` that holds a dictionary of tensors and nothing that runs.

    The tensors stand in the mapped file: they cost no memory of their own, and writing to the file changes them. Only
    compressed archives, and files of PyTorch before 1.6, are read into memory.

    Args:
        path: the file.
        checksums: whether to read an archive of ``torch.save`` through, to compare it with its checksums. The other
            files have none.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: the file is damaged or holds something else.

    """
    with open_file(path) as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":  # JSON, after eight bytes of its length
        tensors = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):  # an archive, a pickle
        tensors = _read_torch(path, head.startswith(b"PK"), checksums)
    else:
        found = "holds" if head else "is empty,"
        raise CheckpointError(f"{path}: {found} neither safetensors nor what torch.save writes")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: expected tensors by name, but {name!r} is of type {type(tensor).__name__}")
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            kind = "nested, " if tensor.is_nested else "quantised, " if tensor.is_quantized else ""
            found = f"{name} is {kind}on {tensor.device}, {tensor.layout}"
            raise CheckpointError(f"{path}: expected dense tensors, but {found}")
    _refuse_more_than_is_stored(path, tensors)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is not a dictionary
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({_first_line(error)})") from None


def _read_torch(path: Path, is_archive: bool, checksums: bool) -> dict[str, Tensor]:
    try:
        mapped = is_archive and check_archive(path, checksums)
        found = torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(
            error
        ):  # PyTorch's own message advises to run it
            message = f"{path}: damaged, or not a file of tensors alone, and nothing else is loaded"
            raise CheckpointError(message) from None
        raise CheckpointError(f"{path}: not a whole file of torch.save ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got a {type(found).__name__}")
    return found


def _refuse_more_than_is_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if copies of the tensors would take far more memory than the file.

    A stride of 0 makes any number of elements of one. Two tensors may share their elements, as tied embeddings do.
    """
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * stored + _SPARE:
        name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
        found = f"{name} {list(largest.shape)} would take {largest.nbytes:,} bytes"
        raise CheckpointError(f"{path}: {found}, but all that is stored are {stored:,}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    seen: set[int] = set()
    contiguous = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        # The format has no tensors that share memory, as tied embeddings do.
        contiguous[name] = (tensor.clone() if memory in seen else tensor).detach().contiguous()
        seen.add(memory)
    replace_file(path, lambda part: save_file(contiguous, part, {"format": "pt"}))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: the file holds something else.

    """
    try:
        with open_file(path) as file:
            found = json.loads(file.read().decode("utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    replace_file(path, lambda part: Path(part).write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


def replace_file(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then put it there; a file of this path stays until then.

    Raises:
        OSError: the file cannot be made, or the path is of a FIFO or a device, which is not replaced.
        ValueError: no file can have this name.

    """
    check_name(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # the system refuses a folder
        raise FileExistsError(errno.EEXIST, "Not a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder, path.name)
        part.touch()
        usual = part.stat().st_mode  # safetensors writes files that other users cannot read
        write(str(part))
        part.chmod(usual)
        os.replace(part, path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
