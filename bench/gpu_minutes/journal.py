"""The files that a run leaves behind, written the moment something is known: rows.jsonl, log.txt and table.txt."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from common.plain_json import plain

LARGEST = 12 * 2**20  # bytes of a file

Row = dict[str, Any]


class Journal:
    """Rows and log of a run. Several threads may write."""

    def __init__(self, folder: Path, began: float) -> None:
        """Begin new files; ``began`` is when the clock of the run started."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began = folder, began
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        self._rows = (folder / "rows.jsonl").open("w")
        self._log = (folder / "log.txt").open("wb")
        self._logged = self._written = 0
        self._tails: dict[str, bytes] = {}

    def add(self, step: str, row: Row) -> None:
        """Write a row of a step."""
        row = {"step": step, "at": round(time.monotonic() - self.began, 2), **row}
        line = json.dumps(plain(row, str)) + "\n"
        with self._lock:
            self.rows.append(row)
            if self._written + len(line) <= LARGEST:
                self._rows.write(line)
                self._rows.flush()
                self._written += len(line)

    def line(self, step: str, name: str, text: str) -> None:
        """Take a line that a command has printed: a row, or something for the log."""
        try:
            row = json.loads(text) if text.startswith("{") else None
        except ValueError:
            row = None
        if row is None:
            self.noise(name, text.encode() + b"\n")
        else:
            self.add(step, row if name == step else {"command": name, **row})

    def noise(self, name: str, block: bytes) -> None:
        """Take what a command has written that is no row."""
        with self._lock:
            self._tails[name] = (self._tails.get(name, b"") + block)[-2000:]
            if self._logged > LARGEST:
                return
            text = b"".join(b"%s: %s\n" % (name.encode(), line) for line in block.splitlines() if line.strip())
            self._log.write(text)
            self._log.flush()
            self._logged += len(text)
            if self._logged > LARGEST:
                self._log.write(b"the log is full\n")
                self._log.flush()

    def tail(self, name: str) -> str:
        """Return the last line that says something of what a command has written beside its rows."""
        with self._lock:
            lines = [line for line in self._tails.get(name, b"").decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else ""

    def table(self, text: str) -> None:
        """Write what a person reads; whole or not at all."""
        part = self.folder / ".table.txt.part"
        part.write_text(text)
        part.replace(self.folder / "table.txt")


def read(folder: Path) -> list[Row]:
    """Return the rows in a folder; a last line that was cut off is no row."""
    rows = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
