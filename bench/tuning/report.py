"""What tune.py says at the end: the plans that should change, and a table for a person."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common.result_file import markdown
from tuning.candidates import CONFIG, PLANS, Case, all_variants, plan_in_use
from tuning.choice import Cell, Comparison, config_diff, plan_text, propose
from tuning.turns import Trial

from fastwkv.kernels.config import Launch, Plan

KEYS = ("what", "name", "case", "op", "pass", "dtype", "B", "T", "C", "block_c", "num_warps", "stages", "chunk")
KEYS += ("copied_bytes", "beside", "where", "rows", "plan")  # what tells a row from others


def conclude(emit: Callable[[Mapping[str, Any]], None], trials: Sequence[Trial]) -> dict[str, Any]:
    """Emit a row for each plan that should change, and return the diff that changes them."""
    changed: dict[str, Plan] = {}
    for (op, which), name in PLANS.items():
        mine = [trial for trial in trials if (trial.case.cell.op, trial.case.cell.which) == (op, which)]
        now = plan_in_use(op, which)
        cases = {trial.case.cell: trial.case for trial in mine}

        def launch_of(cell: Cell, plan: Plan, cases: Mapping[Cell, Case] = cases) -> Launch:
            return cases[cell].launch(plan)

        chosen, reasons = propose({one.case.cell: one.times for one in mine}, now, all_variants(now), launch_of)
        for one in reasons:
            emit(proposal(name, now, one))
        if reasons:
            changed[name] = chosen
    return {"diff": config_diff(CONFIG.read_text(), changed) if changed else ""}


def proposal(name: str, now: Plan, one: Comparison) -> dict[str, Any]:
    """Return the row of a plan that wins."""
    row = {"what": "proposal", "name": name, "plan": plan_text(one.plan), "in_use": plan_text(now)}
    return row | {"win": one.win, "spread": one.spread, "cases": [str(cell) for cell in one.ratios]}


def latest(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each subject, where the first of it stood."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(row.get(key) for key in KEYS)] = dict(row)
    return list(found.values())


def table(record: Mapping[str, Any]) -> str:
    """Lay out what was measured: below 10 kB, the fastest launch shapes of each case alone."""
    rows = record["rows"]
    parts = [f"{record['device']['name']}" + ", a rehearsal: times mean nothing" * record["settings"]["rehearsal"]]
    parts += [_assumptions(rows), _candidates(rows), _skeleton(rows), _slices(rows), _problems(rows)]
    if record["settings"]["parts"] and "candidates" in record["settings"]["parts"]:
        parts.append(record["diff"] or "No other plan wins by more than the spread: kernels/config.py stays as it is.")
        parts += [_reason(row) for row in rows if row["what"] == "proposal"]
    return "\n\n".join(part for part in parts if part)


def _shape(row: Mapping[str, Any]) -> str:
    text = f"{row['block_c']} channels, {row['num_warps']} warps, {row['stages']} tiles"
    return text + (f", {row['chunks']} chunks" if row.get("chunks", 1) > 1 else "")


def _assumptions(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["what"] == "assumption" and "value" in row:
            where = row.get("beside") or row.get("where") or ""
            where = f"{row['copied_bytes']} bytes" if "copied_bytes" in row else where
            lines.append([row["name"], where, f"{row['value']:.4g}", row.get("unit", "")])
        elif row["what"] == "assumption" and row["name"] == "driver" and "beside" in row:
            told = (f"{key} {value:.0f}" for key, value in row.items() if isinstance(value, float))
            lines.append(["driver", row["beside"], ", ".join(told), ""])
    return markdown(["figure", "where", "value", "unit"], lines, texts=2) if lines else ""


def _candidates(rows: Sequence[Mapping[str, Any]]) -> str:
    cases: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["what"] == "candidate" and "ms" in row:
            cases.setdefault(tuple(row[key] for key in ("op", "pass", "dtype", "B", "T", "C")), []).append(row)
    lines = []
    for (op, which, dtype, *shape), mine in cases.items():
        best = min(mine, key=lambda row: row.get("ratio", row["ms"] / mine[0]["ms"]))
        used = next((row for row in mine if row["in_use"]), None)
        names = [f"{op} {which} {dtype} {'x'.join(map(str, shape))}", _shape(best)]
        numbers = [f"{1e3 * best['ms']:.1f}", f"{1e3 * used['ms']:.1f}" if used else "-"]
        numbers += [f"{best['compulsory_gb_per_s']:.0f}"]
        numbers += [f"{best[key]:.3f}" if key in best else "-" for key in ("ratio", "spread")]
        lines.append([*names, *numbers, str(best["turns"]), str(len(mine))])
    head = ["case", "fastest", "us", "us in use", "GB/s", "ratio", "spread", "turns", "of"]
    return markdown(head, lines, texts=2) if lines else ""


def _skeleton(rows: Sequence[Mapping[str, Any]]) -> str:
    mine = [row for row in rows if row["what"] == "skeleton" and "ms" in row]
    lines = [
        [f"{row['pass']} {row['dtype']}", _shape(row), f"{1e3 * row['ms']:.1f}", f"{row['gb_per_s']:.0f}"]
        for row in mine
    ]
    return markdown(["bare access pattern", "launch shape", "us", "GB/s"], lines, texts=2) if lines else ""


def _slices(rows: Sequence[Mapping[str, Any]]) -> str:
    mine = [row for row in rows if row["what"] == "l2" and "saved" in row]
    names = ("us_summary", "us_finish_swept", "us_finish_right_after")
    lines = [
        [str(row["rows"]), f"{row['mb_read']:.1f}", *(f"{row[name]:.2f}" for name in names), f"{row['saved']:.2f}"]
        for row in mine
    ]
    head = ["rows of a slice", "MB read", "us summary", "us finish, swept", "us finish, right after", "saved"]
    return markdown(head, lines, texts=0) if lines else ""


def _problems(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if reason := row.get("error") or row.get("skipped"):
            kept = [str(row[key]) for key in KEYS if key in row]
            lines.append(f"{' '.join(kept)}: {reason}"[:160])
    return "\n".join(lines[:20]) + (f"\nand {len(lines) - 20} more" if len(lines) > 20 else "")


def _reason(row: Mapping[str, Any]) -> str:
    win, spread, cases = 100 * row["win"], 100 * row["spread"], len(row["cases"])
    return f"{row['name']}: {row['plan']} is {win:.1f} % faster in {cases} cases, spread {spread:.1f} %"
