"""What ops.py prints: a table an operator, with the ratio to each peer and the ratio that was aimed at.

Also the short tables of the README: python bench/ops_table.py ops.json
"""

import sys
from pathlib import Path
from typing import Any

from common import result_file
from common.command_line import Parser
from common.result_file import markdown, unavailable
from peers.operators import OPERATORS

OURS = "fastwkv"
NO_PEERS = (OURS, "reference")

HEAD = ["pass", "B, T, C", "dtype", "provider", "ms", "least", "10 to 90 %", "host ms", "ms in a graph"]
HEAD += ["GB/s", "of copy", "error", "times ours", "target"]
# On a GPU: milliseconds of one token inside a CUDA graph, and the B C up to which that is meant.
GRAPH_TARGET, GRAPH_CHANNELS = 3e-3, 65536
NAMES = {"forward+backward": "forward and backward", "step": "one token"}  # of passes, in the README


def tables(rows: list[dict[str, Any]], device: str) -> str:
    """Lay out what was measured in markdown; below it whose result is wrong, who failed and who is not available."""
    operators = dict.fromkeys(row["op"] for row in rows)
    return "\n\n".join(_table(name, [row for row in rows if row["op"] == name], device) for name in operators)


def _table(name: str, rows: list[dict[str, Any]], device: str) -> str:
    rows = sorted(rows, key=lambda row: row["dtype"])  # the order is that of the run otherwise
    ours = {case(row): row["ms"] for row in rows if row["provider"] == OURS and row["status"] == "ok"}
    lines = [_line(row, ours.get(case(row)), device) for row in rows if row["status"] != "unavailable"]
    notes = [
        f"{row['provider']}, {row['pass']}, {layout(row)}, {row['dtype']}: {row['status']}, {row['reason']}"
        for row in rows
        if row["status"] in ("wrong", "failed")
    ]
    notes += unavailable(rows, "provider")
    return "\n\n".join([name] + ([markdown(HEAD, lines, texts=4)] if lines else []) + notes)


def case(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows that are compared have in common."""
    return tuple(row.get(key) for key in ("op", "pass", "dtype", "B", "T", "C", "packed"))


def target(row: dict[str, Any], device: str) -> float | None:
    """Return the ratio to us that is aimed at for a peer's row, for one of ours the fraction of the copy bandwidth."""
    operator, where = OPERATORS[row["op"]], (row["B"], row["T"], row["C"])
    if row.get("packed"):
        return None
    if device == "cpu":
        return operator.targets.get((row["pass"], where, row["provider"])) if _default(row) else None
    if row["provider"] == OURS:
        return operator.gpu_fraction(row["pass"], row["dtype"], where)
    return operator.gpu_ratio(where)


def _default(row: dict[str, Any]) -> bool:
    return row["dtype"] == OPERATORS[row["op"]].default_dtype


def _line(row: dict[str, Any], ours: float | None, device: str) -> list[str]:
    line = [row["pass"], layout(row), row["dtype"], row["provider"]]
    if row["status"] != "ok":
        return [*line, row["status"].upper(), "", "", "", "", "", "", _error(row["error"]), "", ""]
    low, high = (_short(row["quantiles"][q]) for q in ("0.1", "0.9"))
    line += [_short(row["ms"]), _short(row["ms_min"]), f"{low} - {high}" if row["repeats"] > 1 else "once"]
    line += ["" if row.get(key) is None else _short(row[key]) for key in ("ms_host", "ms_graph")]
    line += [f"{row['gbps']:.3g}", f"{row['fraction']:.3g}", _error(row["error"])]
    mine = row["provider"] == OURS
    found = row["fraction"] if mine else None if ours is None else row["ms"] / ours
    aim = target(row, device)
    verdict = "" if aim is None or found is None else f"{aim:g}, {'reached' if found >= aim else 'MISSED'}"
    if row.get("ms_graph") is not None and row["B"] * row["C"] <= GRAPH_CHANNELS:
        verdict = f"{GRAPH_TARGET:g} ms in a graph, {'reached' if row['ms_graph'] <= GRAPH_TARGET else 'MISSED'}"
    return [*line, "" if mine or found is None else _short(found), verdict]


def readme(record: dict[str, Any]) -> str:
    """Lay out a table an operator and dtype: our time, its fraction of the copy bandwidth, the best peer."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    texts = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        lines = []
        passes = list(OPERATORS[op].traffic)
        for mine in sorted((row for row in here if row["provider"] == OURS), key=lambda row: passes.index(row["pass"])):
            line = [_what(mine), _short(mine["ms"]), f"{100 * mine['fraction']:.0f} %"]
            peers = [row for row in here if case(row) == case(mine) and row["provider"] not in NO_PEERS]
            best = min(peers, key=lambda row: row["ms"], default=None)
            ratio = best and best["ms"] / mine["ms"]
            lines.append(line + ([_short(best["ms"]), best["provider"], f"{_short(ratio)}×"] if best else [""] * 3))
        head = [f"milliseconds, {dtype}", OURS, "of copy bandwidth", "best peer", "", ""]
        texts += [op, markdown(head, lines)] if lines else []
    return "\n\n".join(texts)


def _what(row: dict[str, Any]) -> str:
    documents = f", {row['packed']} documents" if row.get("packed") else ""
    return f"{NAMES.get(row['pass'], row['pass'])}, ({shape(row)}){documents}"


def shape(row: dict[str, Any]) -> str:
    """Return B, T, C in words."""
    return f"{row['B']}, {row['T']}, {row['C']}"


def layout(row: dict[str, Any]) -> str:
    """Return B, T, C and whether the tokens are packed documents."""
    return shape(row) + " packed" * bool(row.get("packed"))


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """Print the short tables of a run."""
    parser = Parser(prog="ops_table.py", description=__doc__)
    parser.add_argument("results", type=Path, metavar="ops.json", help="what ops.py wrote")
    print(readme(result_file.read(parser.parse_args(arguments).results, parser)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
