"""The looks of the figures of the papers: two panels below a title, and names in the margins."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import figures
from common.figures import FAINT, INK, STYLE
from matplotlib.axes import Axes

# The palette of Okabe and Ito, and a grey.
BLUE, GREEN, ORANGE, PINK, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#6a6a6a"
SMALL = 11.5  # print


@contextlib.contextmanager
def two_panels(path: Path, title: str, line: str, **margins: float) -> Iterator[tuple[Axes, Axes]]:
    """Give two panels to draw into, then write the figure as a PNG, whole or not at all."""
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(18, 7.2))
        figure.subplots_adjust(right=0.815, top=0.79, bottom=0.105, **margins)
        figures.title(figure, title, line)
        yield left, right
        figures.save(figure, path, dpi=130)


def panel(axes: Axes, title: str, grid: str, **settings: Any) -> None:
    """Give a panel its title, its labels and a grid of "x", "y" or "both"."""
    axes.set_title(title, loc="left", fontsize=14.5, pad=12)
    axes.set(**settings)
    figures.panel(axes, grid)


def beside(axes: Axes, y: float, points: float, name: str, note: str, note_colour: str = INK, **style: Any) -> None:
    """Write a name into the margin, so many points from the right edge (from the left if negative), above a note."""
    place = (float(points > 0), y)
    common: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    common |= {"annotation_clip": False, "ha": "left" if points > 0 else "right"}
    axes.annotate(name, place, (points, 1), va="bottom", **common, **style)
    axes.annotate(note, place, (points, -2), va="top", fontsize=SMALL, color=note_colour, **common)


def not_run(axes: Axes) -> None:
    """Say that a panel has nothing to show."""
    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=FAINT)
