"""Parts of programs for which seconds count: rows, errors, tools, a parser. Nothing here imports PyTorch."""

import argparse
import json
import shutil
from typing import Any, NoReturn

NOT_AVAILABLE = 77  # the exit status of a program that lacks a tool or a device


class Parser(argparse.ArgumentParser):
    """A parser of one-line complaints."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage and end the program."""
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message}\n")


def emit(**row: Any) -> None:
    """Print a row of figures the moment that it exists: one JSON object, one line."""
    print(json.dumps(row), flush=True)


def reason(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def tool(name: str) -> str | None:
    """Return where a tool of CUDA is, None where there is none."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
