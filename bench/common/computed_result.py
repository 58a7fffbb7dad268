"""Result files of programs that compute something for GPUs and measure none: compiled.py, traffic.py, gpu_model.py."""

from pathlib import Path
from typing import Any

from common import result_file
from common.about import about_device, about_software
from common.command_line import Parser

DEVICE = about_device(None)


def check(folder: Path, name: str, parser: Parser) -> None:
    """End the program if its results cannot be written into the folder, or would replace what is none of its own."""
    result_file.check(folder / f"{name}.json", DEVICE, parser)


def record(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run that begins, without rows yet."""
    return {"benchmark": benchmark, "device": DEVICE, **about_software(), "settings": settings, "rows": []}


def write(folder: Path, record: dict[str, Any], name: str | None = None) -> None:
    """Write the record, under the name of its benchmark unless it has another one, and say where."""
    path = folder / f"{name or record['benchmark']}.json"
    result_file.write(path, record)
    print(f"\nwrote {path}")
