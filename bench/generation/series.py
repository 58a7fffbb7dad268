"""The series of gen_time.py, each a model under a protocol: timing, fit and table."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from common.program import no_garbage_collection
from common.result_file import markdown
from generation.models import carried_bytes

FIT = (
    "slope of log(seconds after the first token) on log(tokens after the first), by least squares"
    " over the tokens from 1/8 of the way on, with weights 1/token"
)
FEWEST = 16  # tokens that a fit needs
DIGITS = 7  # of a time: differences of cumulative times are looked at
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
        """Return the entry of gen_time.json."""
        cumulative = [float(f"{total:.{DIGITS}g}") for total in self.cumulative]
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
    """Return p of cumulative time ~ tokens**p, fitted as FIT says; None for fewer than FEWEST tokens."""
    if len(cumulative) < FEWEST:
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


def table(series: list[dict[str, Any]], tokens: int) -> str:
    """Lay out entries of gen_time.json in markdown; ``tokens`` were asked for."""
    marks = sorted({max(tokens // 4, 1), max(tokens // 2, 1), tokens})
    head = [
        "series",
        "",
        *(f"s at {mark:,}" for mark in marks),
        "exponent",
        "ms/token, start",
        "ms/token, end",
        "memory",
    ]
    rows = []
    for one in series:
        cumulative, carried = one["cumulative_seconds"], one["state_or_cache_bytes"]
        times = np.diff(cumulative) * 1e3
        window = max(len(times) // 16, 1)
        ended = "" if one["status"] == "complete" else f"{one['status']} at token {one['tokens']:,}"
        few = f"needs {FEWEST} tokens" if one["tokens"] else "-"
        rows.append(
            [
                f"{one['name']} {one['protocol']}",
                ended,
                *(f"{cumulative[mark - 1]:.3f}" if len(cumulative) >= mark else "-" for mark in marks),
                few if one["exponent"] is None else f"{one['exponent']:.3f}",
                *(f"{np.median(part):.2f}" if len(part) else "-" for part in (times[:window], times[-window:])),
                in_bytes(carried[-1]) if carried else "-",
            ]
        )
    return markdown(head, rows, texts=2)


def in_bytes(count: float) -> str:
    """Write a number of bytes with its unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
