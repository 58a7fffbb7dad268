"""One line of the figure of gen_time.py: how it is timed, fitted and tabulated."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from common.program import no_garbage_collection
from generation.models import carried_bytes

FIT = (
    "slope of log(seconds after the first token) on log(tokens after the first), by least squares"
    " over the tokens from 1/8 of the way on, with weights 1/token"
)
PASSES = {"recurrent": 9, "kv-cache": 5, "recompute": 1}  # at most
REPEAT_FOR = 8.0  # seconds of a series after which no further pass begins


@dataclass
class Series:
    """One line of the figure: a model under a protocol."""

    name: str
    protocol: str
    status: str = "not run"
    parameters: int | None = None
    seconds: list[list[float]] = field(default_factory=list)  # of each token, one list a pass
    carried: list[int] = field(default_factory=list)  # bytes after each token
    graph: bool | None = None  # whether tokens were launches of one

    @property
    def cumulative(self) -> list[float]:
        """Seconds from the prompt to each token."""
        reached = max(map(len, self.seconds), default=0)
        times = [median(run[n] for run in self.seconds if n < len(run)) for n in range(reached)]
        return [float(total) for total in np.cumsum(times)]

    def record(self) -> dict[str, Any]:
        """Return what gen_time.json holds of this series."""
        cumulative = [float(f"{total:.7g}") for total in self.cumulative]
        return {
            "name": self.name,
            "protocol": self.protocol,
            "status": self.status,
            "parameters": self.parameters,
            "graph": self.graph,
            "passes": len(self.seconds),
            "tokens": len(cumulative),
            "exponent": exponent(cumulative),
            "state_or_cache_bytes": self.carried[: len(cumulative)],
            "cumulative_seconds": cumulative,
        }


def exponent(cumulative: list[float]) -> float | None:
    """Return p of cumulative time ~ tokens**p, fitted as FIT says; None for fewer than 16 tokens."""
    if len(cumulative) < 16:
        return None
    n = np.arange(len(cumulative) // 8, len(cumulative))
    seconds = np.array(cumulative)[n] - cumulative[0]
    slope, _ = np.polyfit(np.log(n), np.log(seconds), 1, w=n**-0.5)
    return round(float(slope), 4)


def measure(
    series: Series, start: Callable[[], Iterator[Any]], tokens: int, synchronize: Callable[[], None], tick: Any
) -> None:
    """Time every token of every pass; what is measured stands in ``series`` at any moment."""
    began = time.monotonic()
    while len(series.seconds) < PASSES[series.protocol] and (
        not series.seconds or time.monotonic() - began < REPEAT_FOR
    ):
        gc.collect()
        with no_garbage_collection():
            steps = start()
            times: list[float] = []
            series.seconds.append(times)
            for n in range(tokens):
                begin = time.perf_counter()
                carried = next(steps)
                synchronize()
                times.append(time.perf_counter() - begin)
                if n >= len(series.carried):
                    series.carried.append(carried_bytes(carried))
                tick()


def table(series: list[Series], tokens: int) -> str:
    """Return the summary that the program prints."""
    marks = [max(tokens // 4, 1), max(tokens // 2, 1), tokens]
    head = ["", *(f"s at {mark:,}" for mark in marks), "exponent", "ms/token, start", "ms/token, end", "memory", ""]
    rows = [head]
    for one in series:
        cumulative, power = one.cumulative, exponent(one.cumulative)
        times = np.diff(cumulative) * 1e3 if len(cumulative) > 1 else np.array(cumulative) * 1e3
        window = max(len(times) // 16, 1)
        rows.append(
            [
                f"{one.name} {one.protocol}",
                *(f"{cumulative[mark - 1]:.3f}" if len(cumulative) >= mark else "-" for mark in marks),
                "-" if power is None else f"{power:.3f}",
                *(f"{np.median(part):.2f}" if len(part) else "-" for part in (times[:window], times[-window:])),
                in_bytes(one.carried[-1]) if one.carried else "-",
                "" if one.status == "complete" else f"{one.status} at token {len(cumulative):,}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def in_bytes(count: float) -> str:
    """Write a number of bytes with its unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
