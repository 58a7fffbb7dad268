"""Result files of the benchmarks: a record of the run, and rows of one line each."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.command_line import Parser, check_writable
from common.plain_json import plain


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record, its ``rows`` last and one line each; whole or not at all."""
    rows = ",\n".join(f"    {json.dumps(plain(row))}" for row in record["rows"])
    head = json.dumps(plain({**record, "rows": []}), indent=2)
    assert head.endswith('"rows": []\n}')
    text = head.removesuffix("[]\n}") + (f"[\n{rows}\n  ]\n}}\n" if rows else "[]\n}\n")
    replace(path, lambda part: part.write_text(text))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file under another name and put it there; whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, parser: Parser) -> dict[str, Any]:
    """Read a record; end the program if the file holds none."""
    record: Any = None
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text())
    if not isinstance(record, dict) or not {"device", "rows"} <= set(record):
        parser.error(f"{str(path)!r} is not a result of a benchmark")
    return record


def check(path: Path, device: dict[str, Any], parser: Parser) -> None:
    """End the program if the file cannot be written, or holds what other hardware measured."""
    check_writable(path.parent, parser)
    try:
        before = json.loads(path.read_text())["device"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"{str(path)!r} is not a result of this program; choose another folder with --out")
    if before["name"] != device["name"]:
        parser.error(f"{str(path)!r} was measured on {before['name']!r}; choose another folder with --out")


def markdown(head: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """Lay out a markdown table that reads well as text too: so many columns of text, then numbers."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def joined(cells: list[str]) -> str:
        columns = zip(cells, widths, strict=True)
        aligned = [cell.ljust(width) if n < texts else cell.rjust(width) for n, (cell, width) in enumerate(columns)]
        return f"| {' | '.join(aligned)} |"

    rule = "|".join("-" * (width + 2) if n < texts else "-" * (width + 1) + ":" for n, width in enumerate(widths))
    return "\n".join([joined(head), f"|{rule}|", *map(joined, lines[1:])])


def unavailable(rows: Iterable[dict[str, Any]], key: str) -> list[str]:
    """Return a line for each reason why some are not available, with whom it concerns."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "unavailable":
            reasons.setdefault(row["reason"], {})[row[key]] = None
    return [f"{', '.join(who)}: not available, {reason}" for reason, who in reasons.items()]
