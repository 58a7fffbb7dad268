"""The figure of gen_time.py: cumulative time against tokens, and the memory that is carried from token to token."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from gen_time_series import in_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

Json = dict[str, Any]

NAMES = {"rwkv4": "RWKV-4", "gpt-neox": "GPT-NeoX", "opt": "OPT", "bloom": "BLOOM", "gpt-neo": "GPT-Neo"}
# The palette of Okabe and Ito: told apart under every common form of colour blindness.
COLOURS = {"rwkv4": "#D55E00", "gpt-neox": "#0072B2", "opt": "#009E73", "bloom": "#CC79A7", "gpt-neo": "#E69F00"}
LINES: dict[str, Json] = {
    "recurrent": {"linestyle": "-", "linewidth": 4.5, "zorder": 3},
    "kv-cache": {"linestyle": (0, (1, 1)), "linewidth": 2.4, "zorder": 4},
    "recompute": {"linestyle": (0, (5, 1.5)), "linewidth": 2.0, "zorder": 3},
}
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


def draw(record: Json, path: Path) -> None:
    """Draw the series of a gen_time.json as ``path``, a PNG."""
    series = [s for s in record["series"] if s["tokens"] > 0]
    # "recompute" carries nothing but the text.
    carrying = [s for s in series if s["protocol"] != "recompute" and s["state_or_cache_bytes"]]
    with plt.style.context(STYLE):
        figure, (time, memory) = plt.subplots(1, 2, figsize=(16, 7))
        figure.subplots_adjust(left=0.055, right=0.838, top=0.795, bottom=0.105, wspace=0.76)
        _title(figure, record)
        for axes, shown, key in ((time, series, "cumulative_seconds"), (memory, carrying, "state_or_cache_bytes")):
            for one in shown:
                _line(axes, one, one[key])
            axes.set_xlabel("tokens generated", labelpad=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(which="both", color=FAINT)
            axes.grid(True, color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
            axes.xaxis.set_major_formatter(_thousands)
            if shown:
                axes.set_xlim(0, max(s["tokens"] for s in series))
        time.set_title("Cumulative seconds, times RWKV-4, and their growth", loc="left", fontsize=14.5, pad=12)
        memory.set_title("Memory of the state, or of the cache", loc="left", fontsize=14.5, pad=12)
        memory.set_yscale("log")
        memory.yaxis.set_major_formatter(lambda value, _: in_bytes(value).replace(".0 ", " "))
        memory.yaxis.set_minor_formatter(NullFormatter())
        if series:
            rwkv = [s for s in series if s["name"] == "rwkv4"]
            time.set_ylim(0, 1.04 * max(s["cumulative_seconds"][-1] for s in series))
            time.yaxis.set_major_formatter(_thousands)
            _labels(time, series, "cumulative_seconds", lambda s: _total(s, rwkv))
        if carrying:
            sizes = [s["state_or_cache_bytes"] for s in carrying]
            memory.set_ylim(min(map(min, sizes)) / 2, 2 * max(map(max, sizes)))
            _labels(memory, carrying, "state_or_cache_bytes", _carried)
        figure.savefig(path, dpi=150, format="png")
        plt.close(figure)


def _thousands(value: float, _: int) -> str:
    return f"{value:,.6g}"


def _title(figure: Figure, record: Json) -> None:
    settings, device = record["settings"], record["device"]
    where = device["name"] if device["type"] != "cpu" else f"{device['name']} CPU, {device['threads']} threads"
    what = f"{settings['layers']} layers, width {settings['width']}, random weights"
    figure.text(0.055, 0.93, "Time to generate a text, token by token", fontsize=23, weight="bold")
    how = f"batch 1, {settings['dtype']}, prompt of {settings['prompt_tokens']:,} tokens"
    line = f"Models of the same size ({what})  ·  {how}  ·  {where}"
    figure.text(0.055, 0.88, line, fontsize=14, color="#5a5a5a")


def _line(axes: Axes, series: Json, values: list[float]) -> None:
    tokens, colour = range(1, len(values) + 1), COLOURS[series["name"]]
    axes.plot(tokens, values, color=colour, **LINES[series["protocol"]])
    if series["status"] == "out of memory":
        axes.plot(tokens[-1], values[-1], "X", color=colour, markersize=11, zorder=5, clip_on=False)


def _total(series: Json, rwkv: list[Json]) -> str:
    total, power = series["cumulative_seconds"][-1], series["exponent"]
    text = f"{_short(total)} s"
    if rwkv and series is not rwkv[0] and rwkv[0]["tokens"] == series["tokens"]:
        text += f", {_short(total / rwkv[0]['cumulative_seconds'][-1], 2)}×"
    return text if power is None else f"{text}, ∝ tokens$^{{\\,{power:.2f}}}$"


def _carried(series: Json) -> str:
    first, *_, last = sizes = series["state_or_cache_bytes"] * 2
    return in_bytes(last) + (", at any length" if len(set(sizes)) == 1 else f", from {in_bytes(first)}")


def _labels(axes: Axes, series: list[Json], key: str, detail: Callable[[Json], str]) -> None:
    """Write the name of each line in the right margin, level with its end, and move labels apart that would touch."""
    axes.figure.canvas.draw()
    scale = axes.figure.dpi / 72  # pixels a point; labels are placed in points from the lower left of the axes
    pixels = [axes.transData.transform((len(s[key]), s[key][-1])) for s in series]
    ends = [((x - axes.bbox.x0) / scale, (y - axes.bbox.y0) / scale) for x, y in pixels]
    width, top = axes.bbox.width / scale, axes.bbox.height / scale
    heights = spread([y for _, y in ends], LABEL_GAP, 14, top)
    for one, (x, y), height in zip(series, ends, heights, strict=True):
        below = detail(one) if one["status"] == "complete" else f"{one['status']} at {one['tokens']:,}"
        weight = "bold" if one["name"] == "rwkv4" else "normal"
        common: Json = {"xycoords": "axes points", "textcoords": "offset points", "annotation_clip": False}
        common |= {"color": COLOURS[one["name"]], "zorder": 6}
        place = (width + 24, height)
        axes.annotate(f"{NAMES[one['name']]}, {one['protocol']}", place, (0, 1), va="bottom", weight=weight, **common)
        axes.annotate(below, place, (0, -1), va="top", fontsize=12.5, **common)
        link = {"arrowstyle": "-", "color": COLOURS[one["name"]], "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x + 4, y), place, "axes points", "axes points", link | {"alpha": 0.6}, annotation_clip=False)


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


def _short(value: float, digits: int = 3) -> str:
    """Write a positive number with this many digits, or with all before its point."""
    decimals = max(digits - 1 - math.floor(math.log10(value)), 0)
    return f"{value:,.{decimals}f}"


if __name__ == "__main__":  # redraw: gen_time_figure.py gen_time.json gen_time.png
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
