"""Parts of the figures of the benchmarks: saving, titles and panels, labels in the right margin."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files alone, no window
import matplotlib.pyplot as plt
from common import result_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = dict[str, Any]

INK, FAINT = "#333333", "#8a8a8a"
STYLE: Json = {
    "font.family": "DejaVu Sans",
    "font.size": 14,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
LABEL_GAP = 40.0  # points from one label to the next


class Label(NamedTuple):
    """A label in the right margin, beside the end of a line."""

    end: tuple[float, float]
    """In the coordinates of the data."""
    name: str
    text: str
    """Below the name, in smaller print."""
    colour: str
    weight: str = "bold"


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure as a PNG, whole or not at all, and close it."""
    try:
        result_file.replace(path, lambda part: figure.savefig(part, dpi=dpi, format="png"))
    finally:
        plt.close(figure)


def title(figure: Figure, text: str, line: str, heights: tuple[float, float] = (0.935, 0.885)) -> None:
    """Write the title and the line below it."""
    figure.text(0.02, heights[0], text, fontsize=23, weight="bold")
    figure.text(0.02, heights[1], line, fontsize=14, color="#5a5a5a")


def device_name(device: Json) -> str:
    """Return the name of a device, of a CPU with its threads."""
    if device["type"] != "cpu":
        return device["name"]
    return f"{device['name']} CPU, {device['threads']} thread{'s' * (device['threads'] > 1)}"


def panel(axes: Axes, grid: str) -> None:
    """Give a panel the looks of all: no frame above and on the right, a faint grid of "x", "y" or "both" below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color=FAINT)
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def label(axes: Axes, labels: Sequence[Label], gap: float, low: float, below_top: float = 0) -> None:
    """Write the labels level with the ends of their lines, or as near as neighbours ``gap`` points apart allow."""
    axes.figure.canvas.draw()
    scale = axes.figure.dpi / 72  # pixels a point; labels are placed in points from the lower left of the axes
    width, top = axes.bbox.width / scale, axes.bbox.height / scale
    pixels = [axes.transData.transform(one.end) for one in labels]
    ends = [((x - axes.bbox.x0) / scale, (y - axes.bbox.y0) / scale) for x, y in pixels]
    heights = spread([y for _, y in ends], gap, low, top - below_top)
    for one, (x, y), height in zip(labels, ends, heights, strict=True):
        common: Json = {"xycoords": "axes points", "textcoords": "offset points", "annotation_clip": False}
        place = (width + 26, height)
        axes.annotate(one.name, place, (0, 1), va="bottom", weight=one.weight, color=one.colour, **common)
        axes.annotate(one.text, place, (0, -2), va="top", fontsize=11.5, color=INK, **common)
        link = {"arrowstyle": "-", "color": one.colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 0, "alpha": 0.6}
        axes.annotate("", (x + 6, y), place, "axes points", "axes points", link, annotation_clip=False)


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions as little as needed to stand ``gap`` apart within [low, high] (squeezed if they cannot fit)."""
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=positions.__getitem__)
    groups: list[list[float]] = []  # of neighbours that touch: the sum of their ideal starts, and their number
    for rank, index in enumerate(order):
        limit = high - gap * (len(positions) - 1)
        groups.append([min(max(positions[index] - gap * rank, low), limit), 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    starts = [total / count for total, count in groups for _ in range(int(count))]
    moved = [0.0] * len(positions)
    for rank, index in enumerate(order):
        moved[index] = starts[rank] + gap * rank
    return moved
