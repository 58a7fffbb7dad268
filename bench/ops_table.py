"""What ops.py prints: a table an operator, with the ratio to each peer and the ratio that was aimed at."""

from typing import Any

from operators import OPERATORS
from result_file import markdown, unavailable

OURS = "fastwkv"

HEAD = ["pass", "B, T, C", "dtype", "provider", "ms", "least", "10 to 90 %", "GB/s", "error", "times ours", "target"]


def tables(rows: list[dict[str, Any]], device: str) -> str:
    """Lay out what was measured in markdown; below it whose result is wrong, who failed and who is not available."""
    operators = dict.fromkeys(row["op"] for row in rows)
    return "\n\n".join(_table(name, [row for row in rows if row["op"] == name], device) for name in operators)


def _table(name: str, rows: list[dict[str, Any]], device: str) -> str:
    ours = {case(row): row["ms"] for row in rows if row["provider"] == OURS and row["status"] == "ok"}
    lines = [_line(row, ours.get(case(row)), device) for row in rows if row["status"] != "unavailable"]
    notes = [
        f"{row['provider']}, {row['pass']}, {_shape(row)}, {row['dtype']}: {row['status']}, {row['reason']}"
        for row in rows
        if row["status"] in ("wrong", "failed")
    ]
    notes += unavailable(rows, "provider")
    return "\n\n".join([name] + ([markdown(HEAD, lines, texts=4)] if lines else []) + notes)


def case(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows that are compared have in common."""
    return tuple(row[key] for key in ("op", "pass", "dtype", "B", "T", "C"))


def _line(row: dict[str, Any], ours: float | None, device: str) -> list[str]:
    line = [row["pass"], _shape(row), row["dtype"], row["provider"]]
    if row["status"] != "ok":
        return [*line, row["status"].upper(), "", "", "", _error(row["error"]), "", ""]
    low, high = (_short(row["quantiles"][q]) for q in ("0.1", "0.9"))
    line += [_short(row["ms"]), _short(row["ms_min"]), f"{low} - {high}" if row["repeats"] > 1 else "once"]
    line += [f"{row['gbps']:.3g}", _error(row["error"])]
    if ours is None or row["provider"] == OURS:
        return [*line, "", ""]
    ratio = row["ms"] / ours
    operator = OPERATORS[row["op"]]
    key = row["pass"], (row["B"], row["T"], row["C"]), row["provider"]
    target = operator.targets.get(key) if (device, row["dtype"]) == ("cpu", operator.default_dtype) else None
    reached = "" if target is None else f"{target}, {'reached' if ratio >= target else 'MISSED'}"
    return [*line, _short(ratio), reached]


def _shape(row: dict[str, Any]) -> str:
    return f"{row['B']}, {row['T']}, {row['C']}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
