"""The tables of ops.py: one for each operator, with each ratio and its target, and short ones."""

from collections.abc import Callable
from typing import Any

from common.result_file import cell, markdown, not_ok
from peers.operators import OPERATORS
from peers.provider import OURS

NO_PEERS = (OURS, "reference")
HEAD = ["pass", "B, T, C", "dtype", "provider", "ms", "least", "10 to 90 %", "host ms", "ms in a graph"]
HEAD += ["GB/s", "of copy", "error", "times ours", "target"]
# On a GPU: milliseconds of one token inside a CUDA graph, and the B C up to which that is meant.
GRAPH_TARGET, GRAPH_CHANNELS = 3e-3, 65536
NAMES = {"forward+backward": "forward and backward", "step": "one token"}  # of passes, in the short tables

Row = dict[str, Any]


def tables(rows: list[Row], device: str) -> str:
    """Lay out what was measured in markdown; below each table the results that do not count."""
    operators = dict.fromkeys(row["op"] for row in rows)
    return "\n\n".join(_table(name, [row for row in rows if row["op"] == name], device) for name in operators)


def _table(name: str, rows: list[Row], device: str) -> str:
    rows = sorted(rows, key=lambda row: row["dtype"])  # the order is that of the run otherwise
    ours = {case(row): row["ms"] for row in rows if row["provider"] == OURS and row["status"] == "ok"}
    lines = [_line(row, ours.get(case(row)), device) for row in rows if row["status"] != "unavailable"]
    notes = not_ok(rows, lambda row: f"{row['provider']}, {row['pass']}, {layout(row)}, {row['dtype']}")
    return "\n\n".join([name] + ([markdown(HEAD, lines, texts=4)] if lines else []) + notes)


def case(row: Row) -> tuple[Any, ...]:
    """Return what rows that are compared have in common."""
    return tuple(row.get(key) for key in ("op", "pass", "dtype", "B", "T", "C", "packed"))


def target(row: Row, device: str) -> float | None:
    """Return the ratio to us that is aimed at for a peer's row, for one of ours the fraction of the copy bandwidth."""
    operator, where = OPERATORS[row["op"]], (row["B"], row["T"], row["C"])
    if row.get("packed"):
        return None
    if device == "cpu":
        default = row["dtype"] == operator.default_dtype
        return operator.targets.get((row["pass"], where, row["provider"])) if default else None
    if row["provider"] == OURS:
        return operator.gpu_fraction(row["pass"], row["dtype"], where)
    return operator.gpu_ratio(where)


def _line(row: Row, ours: float | None, device: str) -> list[str]:
    line = [row["pass"], layout(row), row["dtype"], row["provider"]]
    if row["status"] != "ok":
        return [*line, row["status"].upper(), *[""] * 6, cell(row["error"], ".1e"), "", ""]
    low, high = (short(row["quantiles"][q]) for q in ("0.1", "0.9"))
    line += [short(row["ms"]), short(row["ms_min"]), f"{low} - {high}" if row["repeats"] > 1 else "once"]
    line += ["" if row.get(key) is None else short(row[key]) for key in ("ms_host", "ms_graph")]
    line += [cell(row["gbps"]), cell(row["fraction"]), cell(row["error"], ".1e")]
    mine = row["provider"] == OURS
    found = row["fraction"] if mine else None if ours is None else row["ms"] / ours
    aim = target(row, device)
    verdict = "" if aim is None or found is None else f"{aim:g}, {'reached' if found >= aim else 'MISSED'}"
    if row.get("ms_graph") is not None and row["B"] * row["C"] <= GRAPH_CHANNELS:
        verdict = f"{GRAPH_TARGET:g} ms in a graph, {'reached' if row['ms_graph'] <= GRAPH_TARGET else 'MISSED'}"
    return [*line, "" if mine or found is None else short(found), verdict]


def in_short(rows: list[Row]) -> str:
    """Lay out a table an operator and dtype: our time, its fraction of the copy bandwidth, the best peer."""
    rows = [row for row in rows if row["status"] == "ok"]
    texts = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        order: Callable[[str], int] = list(OPERATORS[op].traffic).index
        ours = sorted((row for row in here if row["provider"] == OURS), key=lambda row: order(row["pass"]))
        lines = []
        for mine in ours:
            documents = f", {mine['packed']} documents" if mine.get("packed") else ""
            what = f"{NAMES.get(mine['pass'], mine['pass'])}, ({shape(mine)}){documents}"
            peers = [row for row in here if case(row) == case(mine) and row["provider"] not in NO_PEERS]
            best = min(peers, key=lambda row: row["ms"], default=None)
            found = [short(best["ms"]), best["provider"], f"{short(best['ms'] / mine['ms'])}×"] if best else [""] * 3
            lines.append([what, short(mine["ms"]), f"{100 * mine['fraction']:.0f} %", *found])
        head = [f"milliseconds, {dtype}", OURS, "of copy bandwidth", "best peer", "", ""]
        texts += [f"{op}, in short", markdown(head, lines)] if lines else []
    return "\n\n".join(texts)


def shape(row: Row) -> str:
    """Return B, T, C in words."""
    return f"{row['B']}, {row['T']}, {row['C']}"


def layout(row: Row) -> str:
    """Return B, T, C and whether the tokens are packed documents."""
    return shape(row) + " packed" * bool(row.get("packed"))


def short(value: float) -> str:
    """Return a positive number with three digits, or all before its point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
