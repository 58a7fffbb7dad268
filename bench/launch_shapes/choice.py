"""Conclusions from measured launch shapes: the best of each case, the spread, and the plans for kernels/config.py.

Two launch shapes are compared turn by turn, so that a clock that changes from turn to turn falls on both. Of a case and
a launch shape the ratio is the median, over the turns, of its time over that of the shape in use; the spread is the
distance of the quantiles 0.1 and 0.9 of these ratios.

A pass has one plan for all shapes and dtypes. Another plan is better by 1 - the geometric mean of its ratios, over the
cases that it launches differently. It is proposed where that exceeds the mean of their spreads, and where in no case it
is slower by more than the spread of that case.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from fastwkv.kernels.config import Launch, Plan

MIN_TURNS = 3  # below which no spread is known
QUANTILES = (0.1, 0.9)
SHAPE = ("block_c", "num_warps", "stages")  # fields of a plan that are chosen together
GROUPS = (SHAPE, ("warps",), ("row_bytes",))


class Cell(NamedTuple):
    """A case that is measured: an operator, the dtype of its inputs, their ``[B, T, C]``, and a pass."""

    op: str
    dtype: str
    shape: tuple[int, int, int]
    which: str

    def __str__(self) -> str:
        """As tables name it."""
        return f"{self.op} {self.which} {self.dtype} {'x'.join(map(str, self.shape))}"


Times = dict[Launch, dict[int, float]]
"""Of a case: for each launch shape the seconds of its turns, by their number."""
LaunchOf = Callable[[Cell, Plan], Launch]


class Ratio(NamedTuple):
    """A time over another: the median over the turns, and the spread."""

    median: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """A plan beside that in use."""

    plan: Plan
    ratios: dict[Cell, Ratio]
    """Of the cases that it launches differently and that were measured in enough turns."""

    @property
    def win(self) -> float:
        """1 - the geometric mean of the ratios."""
        return 1 - math.exp(sum(math.log(one.median) for one in self.ratios.values()) / len(self.ratios))

    @property
    def spread(self) -> float:
        """The mean of the spreads."""
        return sum(one.spread for one in self.ratios.values()) / len(self.ratios)

    @property
    def losing(self) -> list[Cell]:
        """Cases in which it is slower by more than their spread."""
        return [cell for cell, one in self.ratios.items() if one.median - 1 > one.spread]

    @property
    def better(self) -> bool:
        """Whether it should take the place of the plan in use."""
        return self.win > self.spread and not self.losing


def ratio(times: Times, launch: Launch, base: Launch) -> Ratio | None:
    """Return the time of a launch shape over that of another; None of fewer than MIN_TURNS turns in common."""
    one, other = times.get(launch, {}), times.get(base, {})
    ratios = [one[turn] / other[turn] for turn in sorted(one.keys() & other.keys())]
    if len(ratios) < MIN_TURNS:
        return None
    low, high = np.quantile(ratios, QUANTILES)
    return Ratio(float(np.median(ratios)), float(high - low))


def ranked(times: Times, base: Launch) -> list[tuple[Launch, Ratio]]:
    """Return the launch shapes that can be compared with ``base``, itself among them, the fastest first."""
    found = [(launch, one) for launch in times if (one := ratio(times, launch, base))]
    return sorted(found, key=lambda pair: pair[1].median)


def undecided(times: Times, base: Launch) -> list[Launch]:
    """Return the launch shapes that may still be the fastest; none where it is sure."""
    order = ranked(times, base)
    if not order:
        return list(times)
    best = order[0][1]
    close = [launch for launch, one in order if one.median - best.median <= max(one.spread, best.spread)]
    return close if len(close) > 1 else []


def compare(cells: Mapping[Cell, Times], now: Plan, plan: Plan, launch_of: LaunchOf) -> Comparison | None:
    """Set a plan beside that in use; None where nothing that was measured tells them apart."""
    ratios = {}
    for cell, times in cells.items():
        mine, base = launch_of(cell, plan), launch_of(cell, now)
        if mine != base and (one := ratio(times, mine, base)):
            ratios[cell] = one
    return Comparison(plan, ratios) if ratios else None


def propose(
    cells: Mapping[Cell, Times], now: Plan, plans: Iterable[Plan], launch_of: LaunchOf
) -> tuple[Plan, list[Comparison]]:
    """Return the plan that a pass should have, and the comparisons that it rests on, none if it should stay.

    Of each group of fields the best plan that differs from that in use in this group alone is taken.
    Changes of several groups together have not been measured.
    """
    found = [one for plan in plans if (one := compare(cells, now, plan, launch_of)) and one.better]
    chosen, reasons = now, []
    for group in GROUPS:
        others = [name for name in _names(now) if name not in group]
        alone = [one for one in found if all(getattr(one.plan, name) == getattr(now, name) for name in others)]
        if alone:
            best = max(alone, key=lambda one: one.win)
            chosen = replace(chosen, **{name: getattr(best.plan, name) for name in group})
            reasons.append(best)
    return chosen, reasons


def plan_text(plan: Plan) -> str:
    """Return the expression that makes a plan, without fields that have their default."""
    given = [one for one in fields(plan) if one.default is MISSING or getattr(plan, one.name) != one.default]
    return f"Plan({', '.join(f'{one.name}={getattr(plan, one.name)}' for one in given)})"


def config_diff(text: str, plans: Mapping[str, Plan], path: str = "kernels/config.py") -> str:
    """Return what changes in this text of kernels/config.py where these plans, by their names, take their places."""
    changed = text
    for name, plan in plans.items():
        line = re.compile(rf"^{name} = Plan\([^)]*\)", re.MULTILINE)
        changed, count = line.subn(f"{name} = {plan_text(plan)}", changed)
        if count != 1:
            raise ValueError(f"{path}: expected one line '{name} = Plan(...)', found {count}")
    lines = (one.splitlines(keepends=True) for one in (text, changed))
    return "".join(difflib.unified_diff(*lines, f"a/{path}", f"b/{path}", n=1))


def _names(plan: Any) -> list[str]:
    return [one.name for one in fields(plan)]
