"""Checkpoints of learning_curve.py: tensors, and the settings that they are the outcome of."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class WrongCheckpoint(Exception):
    """A file that this training cannot go on from."""


def write(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Replace the checkpoint; until the new one is written in full the old one stands."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), part, {"settings": json.dumps(settings)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint; raise :class:`WrongCheckpoint` if it is of other settings."""
    try:
        with safe_open(path, "pt") as file:
            before = json.loads((file.metadata() or {})["settings"])
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise WrongCheckpoint(f"{str(path)!r} is not a checkpoint of this program") from error
    now = json.loads(json.dumps(settings))  # as it would be read: tuples are lists
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        changed = ", ".join(f"{name} {before.get(name)!r} and not {now[name]!r}" for name in other)
        raise WrongCheckpoint(f"{str(path)!r} is of a run with {changed}")
    return tensors
