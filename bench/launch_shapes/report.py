"""The end of tune.py: the plans that should change, and a table for a person."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch_shapes import table
from launch_shapes.candidates import CONFIG, PLANS, Case, all_variants, plan_in_use
from launch_shapes.choice import Cell, Comparison, config_diff, plan_text, propose
from launch_shapes.turns import Trial

from fastwkv.kernels.config import Launch, Plan

MOST = 20  # lines of what went wrong


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


def text(record: Mapping[str, Any]) -> str:
    """Lay out what was measured, below 10 kB."""
    rows, settings = record["rows"], record["settings"]
    head = record["device"]["name"] + ", a rehearsal: times mean nothing" * settings["rehearsal"]
    bad = [row for row in rows if "error" in row or "skipped" in row]
    lines = [head, *table.lines(rows), *map(_problem, bad[:MOST])]
    if len(bad) > MOST:
        lines.append(f"and {len(bad) - MOST} more")
    if "candidates" in settings["parts"]:
        lines.append(record["diff"] or "No other plan wins by more than the spread: kernels/config.py stays as it is.")
    return "\n".join(lines)


def _problem(row: Mapping[str, Any]) -> str:
    kept = [str(row[key]) for key in table.KEYS if key in row]
    return f"{' '.join(kept)}: {row.get('error') or row.get('skipped')}"[:160]
