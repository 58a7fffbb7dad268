"""The figure of gen_time.py: cumulative time against tokens, and the memory that is carried from token to token."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures
from common.figures import STYLE, Json
from generation.series import in_bytes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

NAMES = {"rwkv4": "RWKV-4", "gpt-neox": "GPT-NeoX", "opt": "OPT", "bloom": "BLOOM", "gpt-neo": "GPT-Neo"}
# The palette of Okabe and Ito: told apart under every common form of colour blindness.
COLOURS = {"rwkv4": "#D55E00", "gpt-neox": "#0072B2", "opt": "#009E73", "bloom": "#CC79A7", "gpt-neo": "#E69F00"}
WIDTH, HEIGHT, ABOVE_AND_BELOW = 14.0, 6.5, 2.6  # inches
GAP = 43.0  # points from one label to the next
LINES: dict[str, Json] = {
    "recurrent": {"linestyle": "-", "linewidth": 4.5, "zorder": 3},
    "kv-cache": {"linestyle": (0, (1, 1)), "linewidth": 2.4, "zorder": 4},
    "recompute": {"linestyle": (0, (5, 1.5)), "linewidth": 2.0, "zorder": 3},
}


def draw(record: Json, path: Path) -> Path:
    """Draw the series of a gen_time.json as ``path``, a PNG, whole or not at all; return it."""
    series = [s for s in record["series"] if s["tokens"] > 0]
    # "recompute" carries nothing but the tokens.
    carrying = [s for s in series if s["protocol"] != "recompute" and s["state_or_cache_bytes"]]
    height = max(HEIGHT, ABOVE_AND_BELOW + GAP / 72 * len(series))
    with plt.style.context(STYLE):
        figure, (time, memory) = plt.subplots(1, 2, figsize=(WIDTH, height))
        edges = {"left": 0.06, "right": 0.805, "top": 1 - 1.4 / height, "bottom": 0.75 / height}
        figure.subplots_adjust(**edges, wspace=1.12)
        _title(figure, record, height)
        for axes, shown, key in ((time, series, "cumulative_seconds"), (memory, carrying, "state_or_cache_bytes")):
            for one in shown:
                _line(axes, one, one[key])
            axes.set_xlabel("tokens generated", labelpad=8)
            figures.panel(axes, grid="both")
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
            axes.xaxis.set_major_formatter(_thousands)
            axes.set_xlim(0, max((s["tokens"] for s in series), default=1))
        fitted = any(s["exponent"] is not None for s in series)
        growth = ", times RWKV-4, and growth" if fitted else " and times RWKV-4 (too few tokens to fit)"
        time.set_title(f"Seconds{growth}", loc="left", fontsize=14.5, pad=12)
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
        figures.save(figure, path, dpi=150)
    return path


def _thousands(value: float, _: int) -> str:
    return f"{value:,.6g}"


def _title(figure: Figure, record: Json, height: float) -> None:
    settings = record["settings"]
    what = f"{settings['layers']} layers, width {settings['width']}, random weights"
    how = f"batch 1, {settings['dtype']}, prompt of {settings['prompt_tokens']:,} tokens"
    line = f"Same size ({what})  ·  {how}  ·  {figures.device_name(record['device'])}"
    heights = 1 - 0.48 / height, 1 - 0.82 / height
    figures.title(figure, "Time to generate a sequence, token by token", line, heights)


def _line(axes: Axes, series: Json, values: list[float]) -> None:
    tokens, colour = range(1, len(values) + 1), COLOURS[series["name"]]
    axes.plot(tokens, values, color=colour, **LINES[series["protocol"]])
    if len(values) == 1:  # a line of one point does not show
        axes.plot(tokens, values, "o", color=colour, markersize=9, zorder=5, clip_on=False)
    if series["status"] == "out of memory":
        axes.plot(tokens[-1], values[-1], "X", color=colour, markersize=11, zorder=5, clip_on=False)


def _total(series: Json, rwkv: list[Json]) -> str:
    total, power = series["cumulative_seconds"][-1], series["exponent"]
    text = f"{_short(total)} s"
    if rwkv and series is not rwkv[0] and rwkv[0]["tokens"] == series["tokens"]:
        text += f", {_short(total / rwkv[0]['cumulative_seconds'][-1], 2)}×"
    return text if power is None else f"{text}, ∝ tokens$^{{\\,{power:.2f}}}$"


def _carried(series: Json) -> str:
    sizes = series["state_or_cache_bytes"]
    if len(sizes) == 1:
        return in_bytes(sizes[0])
    return in_bytes(sizes[-1]) + (", at any length" if len(set(sizes)) == 1 else f", from {in_bytes(sizes[0])}")


def _labels(axes: Axes, series: list[Json], key: str, detail: Callable[[Json], str]) -> None:
    """Name each line in the right margin."""
    labels = []
    for one in series:
        text = detail(one) if one["status"] == "complete" else f"{one['status']} at {one['tokens']:,}"
        name, weight = one["name"], "bold" if one["name"] == "rwkv4" else "normal"
        end = len(one[key]), one[key][-1]
        labels.append(figures.Label(end, f"{NAMES[name]}, {one['protocol']}", text, COLOURS[name], weight))
    figures.label(axes, labels, GAP, low=14, below_top=10)


def _short(value: float, digits: int = 3) -> str:
    """Write a positive number with this many digits, or with all before its point."""
    decimals = max(digits - 1 - math.floor(math.log10(value)), 0)
    return f"{value:,.{decimals}f}"
