"""Rows of figures as programs print them, the moment they exist. Imports nothing that takes time."""

import json
from typing import Any


def emit(**row: Any) -> None:
    """Print a row: one JSON object, one line."""
    print(json.dumps(row), flush=True)


def reason(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
