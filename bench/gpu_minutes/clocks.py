"""The clock of the GPU while something runs: a figure of speed says little without it."""

import shutil
import statistics
import subprocess
import threading
import time
from typing import Any

EVERY = 100  # milliseconds
QUERY = "clocks.sm,power.draw,temperature.gpu"


class Clocks:
    """Samples of clock, power and temperature, taken in the background while the context lasts."""

    def __init__(self) -> None:
        """Take nothing yet."""
        self.samples: list[tuple[float, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Clocks":
        if tool := shutil.which("nvidia-smi"):
            command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", f"--loop-ms={EVERY}", "--id=0"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.samples.append((time.monotonic(), [float(field) for field in line.split(",")]))
            except ValueError:  # "[N/A]"
                continue

    def since(self, begin: float) -> dict[str, Any]:
        """Return the medians since a time of the monotonic clock, nothing where nothing is known."""
        found = [values for at, values in list(self.samples) if at >= begin]
        if not found:
            return {}
        names = ("mhz", "watts", "celsius")
        return {name: statistics.median(column) for name, column in zip(names, zip(*found, strict=True), strict=True)}
