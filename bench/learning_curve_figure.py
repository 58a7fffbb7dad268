"""The figure of learning_curve.py: loss against bytes learned from and against time, with the yardsticks."""

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures
from common.figures import FAINT, LABEL_GAP, STYLE, Json
from learning_curve_models import NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, as in gen_time_figure.py.
COLOURS = {"rwkv4": "#D55E00", "transformer": "#0072B2"}
WIDTHS = {"rwkv4": 3.4, "transformer": 2.2}
SHOWN = {"trigram of all training text": "trigram", "gzip -9": "gzip -9"}  # the yardsticks that are drawn


def draw(record: Json, path: Path) -> None:
    """Draw a learning_curve.json as ``path``, a PNG, whole or not at all."""
    with plt.style.context(STYLE):
        figure, (seen, time) = plt.subplots(1, 2, figsize=(18, 7.2), sharey=True)
        figure.subplots_adjust(left=0.055, right=0.815, top=0.79, bottom=0.105, wspace=0.4)
        _title(figure, record)
        settings, rows = record["settings"], record["rows"]
        step = settings["batch"] * settings["length"] / 1e6
        _panel(seen, "As many bytes learned from", "million bytes", record, [step for _ in rows])
        _panel(time, "As much time spent", "seconds of training", record, [1 / row["steps_per_second"] for row in rows])
        seen.set_ylabel("loss (bits a byte)")
        _yardsticks(seen, record)
        _labels(time, rows)
        figures.save(figure, path, dpi=130)


def _title(figure: Figure, record: Json) -> None:
    settings = record["settings"]
    million = max(row["parameters"] for row in record["rows"]) / 1e6
    what = f"{million:.2g} million parameters, {settings['layers']} layers, width {settings['width']}"
    what = f"{what}, windows of {settings['length']} bytes"
    where = figures.device_name(record["device"])
    line = f"Bytes of {record['text']['title']}  ·  {what}  ·  points: held-out text  ·  {where}"
    figures.title(figure, "Learning from text: RWKV-4 beside a transformer of its size", line)


def _panel(axes: Axes, title: str, unit: str, record: Json, steps: list[float]) -> None:
    """A line a model, and a point for what was held out; ``steps`` says how wide a step of each is drawn."""
    axes.set_title(title, loc="left", fontsize=14.5, pad=12)
    axes.tick_params(labelleft=True)
    figures.panel(axes, grid="both")
    settings, rows = record["settings"], record["rows"]
    for row, step in zip(rows, steps, strict=True):
        x = [step * settings["steps_a_point"] * (n + 0.5) for n in range(len(row["curve"]))]
        style: Json = {"color": COLOURS[row["model"]], "zorder": 3 if row["model"] == "rwkv4" else 4}
        axes.plot(x, [_number(loss) for loss in row["curve"]], linewidth=WIDTHS[row["model"]], **style)
        axes.plot(step * settings["steps"], _number(row["bits"]), "o", markersize=9, clip_on=False, **style)
    heights = [loss for row in rows for loss in (row["bits"], *row["curve"][1:]) if math.isfinite(_number(loss))]
    heights += [record["yardsticks"][name] for name in SHOWN]
    axes.set(xlabel=unit, xlim=(0, settings["steps"] * max(steps)), ylim=(min(heights) - 0.15, min(max(heights), 5)))


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss  # JSON has no NaN


def _yardsticks(axes: Axes, record: Json) -> None:
    """Dashed lines at what the yardsticks need for the held-out text."""
    for yardstick, name in SHOWN.items():
        value = record["yardsticks"][yardstick]
        axes.axhline(value, color=FAINT, linewidth=1.4, linestyle=(0, (4, 2)), zorder=2)
        place: Json = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, (1, value), (8, 1), va="bottom", fontsize=11.5, **place)
        axes.annotate(f"held out: {value:.3f}", (1, value), (8, -2), va="top", fontsize=11.5, color="#6a6a6a", **place)


def _labels(axes: Axes, rows: list[Json]) -> None:
    """Name each line in the right margin."""
    ends = [line.get_xydata()[0] for line in axes.get_lines()[1::2]]  # the points of what was held out
    labels = []
    for row, (x, y) in zip(rows, ends, strict=True):
        lines = [option.replace("_", " ") for option in row["options"]]
        lines.append(f"held out: {_number(row['bits']):.3f}")
        if row["model"] == "rwkv4":
            lines.append(f"{_number(row['carried_bits']):.3f} with its state carried")
        lines.append(f"{row['steps_per_second']:.1f} steps/s")
        end = x, y if math.isfinite(y) else axes.get_ylim()[1]
        labels.append(figures.Label(end, NAMES[row["model"]], "\n".join(lines), COLOURS[row["model"]]))
    figures.label(axes, labels, 2.4 * LABEL_GAP, low=60, below_top=20)


if __name__ == "__main__":  # redraw: learning_curve_figure.py learning_curve.json learning_curve.png
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
