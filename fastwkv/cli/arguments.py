"""The types of options that the commands share, and errors of one line."""

import argparse
import math
import os
from typing import NoReturn

import torch

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class UsageError(ValueError):
    """The command cannot do as it was asked; the message is for the user."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage and end the program."""
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}\n")


def whole(text: str) -> int:
    """Read a whole number of at least 0."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 to 2^63 - 1, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """Read a number of threads, at most the cores: PyTorch crashes with many thousands."""
    cores = os.cpu_count() or 1
    if not text.isdecimal() or not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"expected 1 to {cores}, the cores of this machine, got {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """Read a temperature."""
    if not 0 <= (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def probability(text: str) -> float:
    """Read a probability other than 0."""
    if not 0 < (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def dtype(text: str) -> torch.dtype:
    """Read the name of a dtype."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def device(text: str) -> torch.device:
    """Read the name of a device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    if (index := found.index or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"there is no {text} here: PyTorch sees {count} GPUs")
    return torch.device("cuda", index)


def default_device() -> torch.device:
    """Return the first GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # within no bounds
