"""The figure of lru_steps.py: accuracy on the digits step by step of the paper, and copying as it is learned."""

import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from common import figures
from common.figures import FAINT, LABEL_GAP, STYLE, Json
from lru_steps_models import NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, as in gen_time_figure.py; what the paper argues for stands out.
COLOURS = {
    "tanh": "#0072B2",
    "linear": "#009E73",
    "diagonal": "#E69F00",
    "ring": "#CC79A7",
    "lru": "#D55E00",
    "short": "#6a6a6a",
}
NOTES = {
    "tanh": "where the paper begins",
    "linear": "no tanh inside",
    "diagonal": "in parallel over time",
    "ring": "stable, long memory from the start",
    "lru": "what enters is normalised",
    "short": "control: the LRU off its ring",
}
DASHES = {100: "-", 400: (0, (4, 1.5))}
GUESS: Json = {"text": "guessing", "textcoords": "offset points", "fontsize": 11.5, "color": "#6a6a6a", "va": "top"}
CHANCE = {"digits": 10.0, "copy": 12.5}  # percent


def draw(record: Json, path: Path) -> None:
    """Draw the rows of an lru_steps.json as ``path``, a PNG, whole or not at all."""
    with plt.style.context(STYLE):
        figure, (bars, curves) = plt.subplots(1, 2, figsize=(18, 7.2), width_ratios=(1, 1))
        figure.subplots_adjust(left=0.175, right=0.815, top=0.79, bottom=0.105, wspace=0.42)
        _title(figure, record)
        _digits(bars, record)
        _copy(curves, record)
        figures.save(figure, path, dpi=130)


def _title(figure: Figure, record: Json) -> None:
    seeds = record["settings"]["seeds"]
    trained = f"{seeds} trainings each (points, bands)" if seeds > 1 else "one training each"
    where = figures.device_name(record["device"])
    line = f"Networks alike but for the recurrence, with equally many parameters  ·  {trained}  ·  {where}"
    figures.title(figure, "From a tanh RNN to the LRU: what makes a recurrence remember", line)


def _digits(axes: Axes, record: Json) -> None:
    """One bar a model: the mean of the seeds, with a point for each."""
    rows = [row for row in record["rows"] if row["task"] == "digits" and row["accuracy"] is not None]
    models = [name for name in NAMES if any(row["model"] == name for row in rows)]
    axes.set_title("Digits as 64 pixels, told from the last state", loc="left", fontsize=14.5, pad=12)
    axes.set(xlim=(0, 100), xlabel="test accuracy (%)", ylim=(max(len(models), 1) - 0.5, -0.65), yticks=[])
    figures.panel(axes, grid="x")
    axes.axvline(CHANCE["digits"], color=FAINT, linewidth=1.2, linestyle=(0, (2, 2)), zorder=4)
    axes.annotate(xy=(CHANCE["digits"], -0.65), xytext=(4, -3), **GUESS)
    if not models:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=FAINT)
    for height, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        scores = [100 * row["accuracy"] for row in mine]
        colour = COLOURS[model]
        axes.barh(height, mean(scores), height=0.56, color=colour, alpha=0.3)
        axes.plot(scores, [height] * len(scores), "o", color=colour, markersize=8, markeredgecolor="white", zorder=5)
        weight = "bold" if model == "lru" else "normal"
        label: Json = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        name = label | {"color": colour, "weight": weight, "va": "bottom"}
        axes.annotate(NAMES[model], (0, height), (-12, 1), ha="right", **name)
        axes.annotate(NOTES[model], (0, height), (-12, -2), ha="right", va="top", fontsize=11.5, **label)
        speed = mean(row["steps_per_second"] for row in mine)
        axes.annotate(f"{mean(scores):.1f} %", (1, height), (14, 1), **name)
        axes.annotate(f"{speed:.0f} steps/s", (1, height), (14, -2), va="top", fontsize=11.5, **label)


def _copy(axes: Axes, record: Json) -> None:
    """One line a model and delay: the mean of the seeds, in a band from the lowest to the highest."""
    axes.set_title("Copy memory: ten symbols, after a delay", loc="left", fontsize=14.5, pad=12)
    axes.set(xlabel="training steps", ylabel="symbols right (%)", ylim=(0, 103))
    figures.panel(axes, grid="both")
    axes.axhline(CHANCE["copy"], color=FAINT, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(xy=(0, CHANCE["copy"]), xytext=(6, -5), **GUESS)
    every = record["settings"]["steps_a_point"]
    lines: dict[tuple[str, int], list[list[float]]] = {}
    for row in record["rows"]:
        if row["task"].startswith("copy-") and row["accuracy_curve"]:
            key = row["model"], int(row["task"].removeprefix("copy-"))
            lines.setdefault(key, []).append([100 * value for value in row["accuracy_curve"]])
    ends = {}
    for (model, delay), runs in lines.items():
        columns = list(zip(*runs, strict=False))  # of an interrupted run there are fewer points
        steps = [every * (n + 0.5) for n in range(len(columns))]
        middle = [mean(column) for column in columns]
        style = {"color": COLOURS[model], "linestyle": DASHES.get(delay, ":"), "zorder": 4 if model == "lru" else 3}
        axes.plot(steps, middle, linewidth=3.4 if model == "lru" else 2.2, **style)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(steps, low, high, color=COLOURS[model], alpha=0.15, linewidth=0, zorder=2)
        ends[model, delay] = steps[-1], middle[-1]
    if not ends:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=FAINT)
    else:
        axes.set_xlim(0, max(x for x, _ in ends.values()) + every / 2)
        _labels(axes, ends)


def _labels(axes: Axes, ends: dict[tuple[str, int], tuple[float, float]]) -> None:
    """Name each line in the right margin."""
    labels = []
    for (model, delay), end in sorted(ends.items(), key=lambda item: -item[1][1]):
        text, weight = f"delay {delay}: {end[1]:.0f} %", "bold" if model == "lru" else "normal"
        labels.append(figures.Label(end, NAMES[model], text, COLOURS[model], weight))
    figures.label(axes, labels, LABEL_GAP, low=14)


if __name__ == "__main__":  # redraw: lru_steps_figure.py lru_steps.json lru_steps.png
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
