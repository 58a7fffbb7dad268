"""Result files of the benchmarks, a record of the run and rows of one line each, and tables of such rows."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.command_line import Parser, check_writable
from common.plain_json import plain

Row = dict[str, Any]


def write(path: Path, record: dict[str, Any], digits: int = 5) -> None:
    """Write the record, its last entry being rows of one line each; whole or not at all."""
    key = list(record)[-1]
    rows = ",\n".join(f"    {json.dumps(plain(row, digits=digits))}" for row in record[key])
    head = json.dumps(plain({**record, key: []}, digits=digits), indent=2)
    assert head.endswith("[]\n}")
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


def read(path: Path, parser: Parser, benchmark: str | None = None, rows: str = "rows") -> dict[str, Any]:
    """Read a record, of one benchmark if it is named; end the program if the file holds none."""
    record: Any = None
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text())
    if not isinstance(record, dict) or not {"device", rows} <= set(record):
        parser.error(f"{str(path)!r} is not a result of a benchmark")
    if benchmark and record.get("benchmark") != benchmark:
        parser.error(f"{str(path)!r} is a result of {record.get('benchmark')}.py")
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


def cell(value: float | None, form: str = ".3g") -> str:
    """Write a number into a cell of a table, nothing for None."""
    return "" if value is None else format(value, form)


def _provider(row: Row) -> str:
    return row["provider"]


def not_ok(rows: Iterable[Row], case: Callable[[Row], str], who: Callable[[Row], str] = _provider) -> list[str]:
    """Return a line for each row that is not "ok", but one for each reason why some are not available."""
    lines: list[str] = []
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "unavailable":
            reasons.setdefault(row["reason"], {})[who(row)] = None
        elif row["status"] != "ok":
            lines.append(f"{case(row)}: {row['status']}, {row['reason']}")
    return lines + [f"{', '.join(names)}: not available, {reason}" for reason, names in reasons.items()]
