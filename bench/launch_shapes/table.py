"""Rows of tune.py in lines for a person: of each case the fastest launch shape alone. Imports no PyTorch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

CASE = ("op", "pass", "dtype", "B", "T", "C")
SHAPE = ("block_c", "num_warps", "stages", "chunks")
# These fields tell a row from others; of two that have the same ones, the later is what was found at last.
KEYS = ("what", "name", "case", *CASE, "block_c", "num_warps", "stages", "chunk")
KEYS += ("copied_bytes", "beside", "where", "rows", "plan")


def latest(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the last row of each subject, where the first of it stood."""
    return list({tuple(row.get(key) for key in KEYS): dict(row) for row in rows}.values())


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Return the fastest launch shape of each case beside the one in use, and all else that was measured."""
    found = latest(rows)
    yield from _candidates([row for row in found if row["what"] == "candidate" and "ms" in row])
    for row in found:
        if row["what"] == "proposal":
            spread = f", spread {100 * row['spread']:.1f} %" if "spread" in row else ""
            cases = f" in {len(row['cases'])} cases" if "cases" in row else ""
            yield f"  better: {row['name']} = {row['plan']}, {100 * row['win']:.1f} % faster{cases}{spread}"
    facts = [row for row in found if row["what"] == "assumption" and "value" in row]
    for row in facts:
        where = row.get("beside") or row.get("copied_bytes") or row.get("where")
        yield f"  {row['name']}{f', {where}' if where else ''}: {row['value']:.4g} {row.get('unit', '')}".rstrip()
    yield from _skeletons([row for row in found if row["what"] == "skeleton" and "ms" in row])
    for row in found:
        if row["what"] == "l2" and "saved" in row:
            yield f"  L2: {row['rows']} rows, {row['saved']:.2f} saved by what the pass before has read"


def _candidates(rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        yield "tuning: fastest launch shape (channels, warps, tiles, chunks)"
    for op, which, dtype, *shape in dict.fromkeys(tuple(row[key] for key in CASE) for row in rows):
        mine = [row for row in rows if [row[key] for key in CASE] == [op, which, dtype, *shape]]
        best = min(mine, key=lambda row: row.get("ratio", row["ms"] / mine[0]["ms"]))
        used = next((row for row in mine if row.get("in_use")), None)
        line = f"  {op} {which} {dtype} {'x'.join(map(str, shape))}: {[best.get(name) for name in SHAPE]}"
        line += f", {1e3 * best['ms']:.1f} us of {len(mine)} shapes"
        yield line + (f"; in use {1e3 * used['ms']:.1f} us" if used else "")


def _skeletons(rows: Sequence[Row]) -> Iterator[str]:
    for which, dtype in dict.fromkeys((row["pass"], row["dtype"]) for row in rows):
        mine = sorted((r for r in rows if (r["pass"], r["dtype"]) == (which, dtype)), key=lambda row: row["ms"])
        ends = (f"{r['block_c']},{r['num_warps']},{r['stages']} {r['gb_per_s']:.0f}" for r in (mine[0], mine[-1]))
        yield f"  bare reads and writes, {which} {dtype}: best and worst shape, GB/s: {'; '.join(ends)}"
