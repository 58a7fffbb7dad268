"""The figures of ops.py: the speed of an operator as a fraction of the copy bandwidth, shape by shape, peers beside it.

A number at a mark of this package is that fraction; at a mark of a peer it says how many times longer the peer takes.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import figures
from common.figures import FAINT, INK, STYLE, Json
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from peers.operators import OPERATORS
from peers.provider import OURS
from throughput.table import case, short, target

# The palette of Okabe and Ito, as in the other figures, each colour with a mark of its own.
LOOKS = {
    OURS: ("#D55E00", "o"),
    "fla": ("#0072B2", "s"),
    "rwkv-cuda": ("#009E73", "D"),
    "hf": ("#CC79A7", "^"),
    "fla-recurrent": ("#0072B2", "s"),
    "fla-chunk": ("#56B4E9", "P"),
    "accelerated-scan": ("#009E73", "D"),
    "accelerated-scan-warp": ("#CC79A7", "^"),
    "accelerated-scan-ref": ("#E69F00", "<"),
    "associative_scan": ("#8C564B", "X"),
    "loop": ("#6a6a6a", "v"),
    "reference": ("#9a9a9a", ">"),
}
WIDTH, HEIGHT = 13.0, 4.6  # inches, of the figure and of a row of panels
SPREAD = 0.78  # of the room of a shape, for its marks
LEGEND = 4  # names in a line of it
CROWD = 12  # marks that fit side by side into a panel of half the width
NUMBERED = 48  # marks in a panel that have a number each; of more, only ours and the fastest peer's


def draw(record: Json, folder: Path) -> list[Path]:
    """Draw ``ops_<operator>.png`` for every operator that has a time; return the files."""
    drawn = []
    for operator in dict.fromkeys(row["op"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["op"] == operator and row["status"] == "ok" and row["T"] > 1]
        if rows:
            drawn.append(folder / f"ops_{operator}.png")
            _draw(operator, rows, record, drawn[-1])
    return drawn


def panels(rows: list[Json]) -> list[tuple[str, str]]:
    """Return dtype and pass of each panel: forward, and backward or else the pass that has it in it."""
    measured = dict.fromkeys((row["dtype"], row["pass"]) for row in rows)
    found = []
    for dtype in dict.fromkeys(dtype for dtype, _ in measured):
        backward = "backward" if (dtype, "backward") in measured else "forward+backward"
        found += [(dtype, which) for which in ("forward", backward) if (dtype, which) in measured]
    return found


def _draw(operator: str, rows: list[Json], record: Json, path: Path) -> None:
    shown = panels(rows)
    providers = _providers(rows)
    wide = len(shown) == 1 or len(providers) * len({_place(row) for row in rows}) > CROWD
    across = 1 if wide else 2
    down = -(-len(shown) // across)
    top = 1.7 + 0.29 * -(-(len(providers) + _has_target(rows, record)) // LEGEND)
    height = HEIGHT * down + top
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(down, across, figsize=(WIDTH, height), squeeze=False)
        edges = {"left": 0.08, "right": 0.99, "top": 1 - top / height, "bottom": 1.0 / height}
        figure.subplots_adjust(**edges, wspace=0.15, hspace=0.42)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (dtype, which) in zip(grid.flat, shown, strict=False):
            here = [row for row in rows if (row["dtype"], row["pass"]) == (dtype, which)]
            _panel(axes, here, [row["fraction"] for row in rows], record)
            axes.set_title(f"{which.replace('+', ' and ')}, {dtype}", loc="left", fontsize=14.5, pad=10)
        for axes in grid[:, 0]:
            axes.set_ylabel("fraction of copy bandwidth", fontsize=13)
        _title(figure, operator, rows, record, height)
        figures.save(figure, path, dpi=130)


def _panel(axes: Axes, rows: list[Json], fractions: list[float], record: Json) -> None:
    """Draw one column a shape, one mark a provider, side by side."""
    places = list(dict.fromkeys(_place(row) for row in rows))
    providers = _providers(rows)
    ours = {case(row): row["ms"] for row in rows if row["provider"] == OURS}
    best: dict[Any, float] = {}
    for row in rows:
        if row["provider"] != OURS:
            best[case(row)] = min(row["ms"], best.get(case(row), row["ms"]))
    numbered = len(places) * len(providers) <= NUMBERED
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figures.panel(axes, grid="y")
    axes.axhline(1, color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    for x in range(1, len(places)):
        axes.axvline(x - 0.5, color="#e0e0e0", linewidth=1, zorder=0)
    for row in rows:
        name, y = row["provider"], row["fraction"]
        x = places.index(_place(row)) + SPREAD * ((providers.index(name) + 0.5) / len(providers) - 0.5)
        colour, mark = LOOKS.get(name, (INK, "."))
        axes.plot(x, y, mark, color=colour, markersize=11 if name == OURS else 8, markeredgecolor="white", zorder=4)
        if name == OURS:
            aim = target(row, record["device"]["type"])
            if aim:
                axes.plot([x - 0.12, x + 0.12], [aim, aim], color=INK, linewidth=2, zorder=5)
            _number(axes, x, max(y, aim or y), f"{y:.2f}", colour, "bold")
        elif case(row) in ours and (numbered or row["ms"] == best[case(row)]):
            _number(axes, x, y, f"{_times(row['ms'] / ours[case(row)])}×", colour, "normal")
    axes.set(xlim=(-0.5, len(places) - 0.5), xticks=range(len(places)))
    axes.set_ylim(0.5 * min(fractions), 2.5 * max(1, *fractions))
    axes.set_xticklabels(places, fontsize=12)
    axes.set_xlabel("B × T × C", fontsize=12, labelpad=4)


def _number(axes: Axes, x: float, y: float, text: str, colour: str, weight: str) -> None:
    """Write a number above a mark."""
    look: Json = {"ha": "center", "fontsize": 11.5, "color": colour, "weight": weight, "zorder": 5}
    if weight == "bold":  # the line at 1 is near
        look["bbox"] = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"}
        look["zorder"] = 3
    axes.annotate(text, (x, y), (0, 9), textcoords="offset points", **look)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}" if ratio < 1000 else short(ratio)


def _place(row: Json) -> str:
    packed = f"\n{row['packed']} packed" if row.get("packed") else ""
    return f"{row['B']} × {row['T']}\n× {row['C']}{packed}"


def _providers(rows: list[Json]) -> list[str]:
    found = {row["provider"] for row in rows}
    return [name for name in LOOKS if name in found] + sorted(found - set(LOOKS))


def _label(operator: str, name: str) -> str:
    known = OPERATORS[operator].all_providers()
    return known[name].label if name in known else name


def _has_target(rows: list[Json], record: Json) -> bool:
    return any(target(row, record["device"]["type"]) for row in rows if row["provider"] == OURS)


def _title(figure: Figure, operator: str, rows: list[Json], record: Json, height: float) -> None:
    device = record["device"]
    line = f"Bytes that have to be moved over the time taken, as a fraction of a copy's {record['copy_gbps']:.0f} GB/s"
    heights = 1 - 0.48 / height, 1 - 0.83 / height
    figures.title(figure, OPERATORS[operator].title, f"{line}  ·  {figures.device_name(device)}", heights)
    line = "Numbers: that fraction for fastwkv; for the others, how many times as long as fastwkv they take"
    figure.text(0.02, 1 - 1.1 / height, line, fontsize=13, color="#5a5a5a")
    looks: list[Json] = []
    for name in _providers(rows):
        colour, mark = LOOKS.get(name, (INK, "."))
        looks.append({"linestyle": "", "marker": mark, "color": colour, "label": _label(operator, name)})
    if _has_target(rows, record):
        looks.append({"color": INK, "linewidth": 2, "label": "target"})
    handles = [plt.Line2D([], [], markersize=9, **look) for look in looks]
    place: Json = {
        "loc": "upper left",
        "bbox_to_anchor": (0.013, 1 - 1.16 / height),
        "ncols": min(len(handles), LEGEND),
    }
    figure.legend(handles=handles, frameon=False, fontsize=13, handletextpad=0.2, columnspacing=1.4, **place)
