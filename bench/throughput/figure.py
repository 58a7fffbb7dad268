"""The figure of ops.py: an operator's speed as a fraction of the copy bandwidth, shape by shape, peers beside it."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures, result_file
from common.command_line import Parser, check_writable
from common.figures import FAINT, INK, STYLE, Json
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from throughput.table import OURS, target

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
    "reference": ("#aaaaaa", ">"),
}
TITLES = {"wkv": "WKV", "linear_scan": "Linear scan, a of every token", "linear_scan_fixed": "Linear scan, a fixed"}
SPREAD = 0.72  # of the room of a shape, for its marks
INCHES = 5.4  # of a row of panels


def draw_all(record: Json, folder: Path) -> list[Path]:
    """Draw ``ops_<operator>.png`` for every operator that has a time; return the files."""
    drawn = []
    for operator in dict.fromkeys(row["op"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["op"] == operator and row["status"] == "ok" and row["T"] > 1]
        if rows:
            drawn.append(folder / f"ops_{operator}.png")
            _draw(operator, rows, record, drawn[-1])
    return drawn


def columns(rows: list[Json]) -> list[str]:
    """Return the passes to be drawn: forward, and backward or else what has it in it."""
    measured = {row["pass"] for row in rows}
    backward = "backward" if "backward" in measured else "forward+backward"
    return [which for which in ("forward", backward) if which in measured]


def _draw(operator: str, rows: list[Json], record: Json, path: Path) -> None:
    dtypes, passes = list(dict.fromkeys(row["dtype"] for row in rows)), columns(rows)
    height = INCHES * len(dtypes) + 2.1
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(len(dtypes), len(passes), figsize=(18, height), squeeze=False, sharey="row")
        figure.subplots_adjust(
            left=0.06, right=0.985, top=1 - 2.0 / height, bottom=1.1 / height, wspace=0.05, hspace=0.5
        )
        for dtype, line in zip(dtypes, panels, strict=True):
            for which, axes in zip(passes, line, strict=True):
                _panel(axes, [row for row in rows if (row["dtype"], row["pass"]) == (dtype, which)], record)
                axes.set_title(f"{which.replace('+', ' and ')}, {dtype}", loc="left", fontsize=14.5, pad=10)
            drawn = [row["fraction"] for row in rows if row["dtype"] == dtype and row["pass"] in passes]
            line[0].set(ylabel="fraction of copy bandwidth", ylim=(0.6 * min(drawn, default=1), 2 * max(1, *drawn, 1)))
        _title(figure, operator, rows, record, height)
        figures.save(figure, path, dpi=100)


def _panel(axes: Axes, rows: list[Json], record: Json) -> None:
    """One column a shape, one mark a provider, side by side."""
    places = list(dict.fromkeys(_place(row) for row in rows))
    providers = _providers(rows)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figures.panel(axes, grid="y")
    axes.axhline(1, color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    for x in range(1, len(places)):
        axes.axvline(x - 0.5, color="#eeeeee", linewidth=1, zorder=0)
    for n, name in enumerate(providers):
        colour, mark = LOOKS.get(name, (INK, "."))
        shift = SPREAD * ((n + 0.5) / len(providers) - 0.5)
        for row in (row for row in rows if row["provider"] == name):
            x, y = places.index(_place(row)) + shift, row["fraction"]
            size = 11 if name == OURS else 8
            axes.plot(x, y, mark, color=colour, markersize=size, markeredgecolor="white", zorder=4)
            if name == OURS:
                _label(axes, x, y, target(row, record["device"]["type"]), colour)
    axes.set(xlim=(-0.5, max(len(places), 1) - 0.5), xticks=range(len(places)))
    axes.set_xticklabels(places, fontsize=11)
    axes.set_xlabel("B × T × C", fontsize=12, labelpad=6)


def _label(axes: Axes, x: float, y: float, aim: float | None, colour: str) -> None:
    """Write the number of our mark, above what was aimed at if that is higher."""
    if aim:
        axes.plot([x - 0.12, x + 0.12], [aim, aim], color=INK, linewidth=2, zorder=5)
    text: Json = {"textcoords": "offset points", "ha": "center", "fontsize": 11, "color": colour, "weight": "bold"}
    paper = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    axes.annotate(f"{y:.2f}", (x, max(y, aim or y)), (0, 10), bbox=paper, zorder=3, **text)


def _place(row: Json) -> str:
    packed = f"\n{row['packed']} packed" if row.get("packed") else ""
    return f"{row['B']} × {row['T']}\n× {row['C']}{packed}"


def _providers(rows: list[Json]) -> list[str]:
    found = {row["provider"] for row in rows}
    return [name for name in LOOKS if name in found] + sorted(found - set(LOOKS))


def _title(figure: Figure, operator: str, rows: list[Json], record: Json, height: float) -> None:
    device = record["device"]
    line = f"Bytes that have to be moved over the time taken, as a fraction of a copy's {record['copy_gbps']:.0f} GB/s"
    heights = 1 - 0.48 / height, 1 - 0.86 / height
    figures.title(figure, TITLES.get(operator, operator), f"{line}  ·  {figures.device_name(device)}", heights)
    handles = [
        plt.Line2D([], [], linestyle="", marker=LOOKS.get(name, (INK, "."))[1], color=LOOKS.get(name, (INK, "."))[0],
                   markersize=9, label=name)
        for name in _providers(rows)
    ]  # fmt: skip
    if any(target(row, device["type"]) for row in rows if row["provider"] == OURS):
        handles.append(plt.Line2D([], [], color=INK, linewidth=2, label="target"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.013, 1 - 0.98 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=13,
        handletextpad=0.2,
        columnspacing=1.4,
    )


def main(arguments: list[str] | None = None) -> int:
    """Draw the results of a run again."""
    parser = Parser(prog="ops_figure.py", description=__doc__)
    parser.add_argument("results", type=Path, metavar="ops.json", help="what ops.py wrote")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="where to draw (default: beside it)")
    args = parser.parse_args(arguments)
    record = result_file.read(args.results, parser)
    folder = args.folder or args.results.parent
    check_writable(folder, parser)
    print(f"wrote {', '.join(map(str, draw_all(record, folder)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
