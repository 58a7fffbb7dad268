"""Time and memory of a whole LRU layer, forward, and forward and backward, in three forms.

"fastwkv" is fastwkv.nn.LRU: B u and h are pairs of real and imaginary part in the dtype of the model. "complex64" has
them as complex64, whatever that dtype (in float32 the two are the same). "fft" convolves B u with λ^t by Fourier
transforms, in complex64. All have the same parameters and products.

Output and gradients are first compared with the layer in float64, which has the same parameters; a form whose result is
wrong is reported as wrong and not timed. The others are timed by turns in one run, the first runs not counted. Let the
machine do nothing else: how many cores other processes used meanwhile is recorded as "other_cores".

On a GPU "ms" is the time of the device, and "ms_host" how long a call keeps the host. "peak_bytes" is the most memory
that a call takes beyond what was there before, its results counted: on a GPU the allocator's, on a CPU that of all
tensors that operations return, counted in a run of its own. "saved_bytes" is what a graph keeps for its backward pass
beyond tokens, parameters and output, each storage counted once.
"""

import argparse
import re
import sys
from typing import Any

try:
    from common import program, result_file
    from common.about import about_device, about_run
    from common.command_line import DTYPES, add_device, add_out, device, names, parser_of
    from layer.forms import ABOUT, FORMS
    from layer.run import PASSES, REFERENCE, RING, Case, Measurement, Shape, draw
    from timing import by_turns, on_gpu
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"lru_layer.py: {error}; pip install -e '.[bench]' installs what it needs")

OURS = "fastwkv"
KNOWN_DTYPES = [name for name in DTYPES if name != "float64"]  # of "fft" and "complex64" nothing is left there
DEFAULT_DTYPES = ["bfloat16", "float32"]
GPU_SHAPES: list[Shape] = [(8, 4096, 1024, 1024), (1, 65536, 1024, 1024)]
CPU_SHAPES: list[Shape] = [(4, 2048, 256, 256), (1, 8192, 256, 256)]
QUICK_SHAPES: list[Shape] = [(2, 64, 16, 24)]
# On a GPU: how many times the time and the memory of this package every other form should take.
TARGET, TARGET_ROW = 2.0, ("forward+backward", "bfloat16", GPU_SHAPES[0])

HEAD = ["pass", "B, T, H, N", "dtype", "form", "ms", "least", "10 to 90 %", "peak MB", "kept MB", "error"]
HEAD += ["time, times ours", "peak, times ours", "target"]


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is measured yet."""
        self.args = args
        self.cuda = on_gpu.Cuda(args.device) if args.device.type == "cuda" else None
        self.effort = by_turns.effort(args.device, quick=args.quick)
        self.rows: list[dict[str, Any]] = []
        settings = {
            "seed": args.seed,
            "quick": args.quick,
            "ring": RING,
            "reference": REFERENCE,
            "providers": {name: ABOUT[name] for name in args.providers},
        }
        self.about = about_run("lru_layer", args.device, settings)

    def save(self) -> None:
        """Write lru_layer.json."""
        result_file.write(self.args.out / "lru_layer.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Measure every case, one at a time in memory."""
        args = self.args
        cases = [Case(shape, dtype) for shape in args.shapes for dtype in args.dtypes]
        with tqdm(total=len(cases) * len(PASSES) * len(args.providers), disable=None) as bar:
            for case in cases:
                bar.set_description(f"{list(case.shape)} {case.dtype}")
                inputs = draw(case, args.seed)
                one = Measurement(case, args.providers, self.effort, self.cuda, bar.update)
                self.rows += one.rows(inputs)
                self.save()


def table(rows: list[dict[str, Any]], device_type: str) -> str:
    """Lay out what was measured in markdown; below it whose result is wrong and who failed."""
    ours = {_case(row): row for row in rows if row["provider"] == OURS and row["status"] == "ok"}
    lines = [_line(row, ours.get(_case(row)), device_type) for row in rows if row["status"] == "ok"]
    notes = [
        f"{row['provider']}, {row['pass']}, {_shape(row)}, {row['dtype']}: {row['status']}, {row['reason']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return "\n".join([result_file.markdown(HEAD, lines, texts=4), *notes])


def _line(row: dict[str, Any], ours: dict[str, Any] | None, device_type: str) -> list[str]:
    low, high = (f"{row['quantiles'][q]:.4g}" for q in ("0.1", "0.9"))
    line = [row["pass"], _shape(row), row["dtype"], row["provider"], f"{row['ms']:.4g}", f"{row['ms_min']:.4g}"]
    line += [f"{low} - {high}" if row["repeats"] > 1 else "once", _megabytes(row["peak_bytes"])]
    line += [_megabytes(row["saved_bytes"]), f"{row['error']:.1e}"]
    if ours is None or row["provider"] == OURS:
        return [*line, "", "", ""]
    ratios = [row[key] / ours[key] for key in ("ms", "peak_bytes")]
    verdict = "reached" if min(ratios) >= TARGET else "MISSED"
    aimed_at = device_type == "cuda" and _case(row) == TARGET_ROW
    return [*line, *(f"{ratio:.2f}" for ratio in ratios), f"{TARGET:g}, {verdict}" if aimed_at else ""]


def _case(row: dict[str, Any]) -> tuple[str, str, Shape]:
    return row["pass"], row["dtype"], (row["B"], row["T"], row["H"], row["N"])


def _shape(row: dict[str, Any]) -> str:
    return ", ".join(str(row[key]) for key in "BTHN")


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


def shapes(text: str) -> list[Shape]:
    """Read shapes such as 8x4096x1024x1024: B, T, H and N."""
    found: list[Shape] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", part.strip())):
            raise argparse.ArgumentTypeError(f"expected shapes like 8x4096x1024x1024 (B, T, H, N), got {part!r}")
        B, T, H, N = map(int, match.groups())
        found.append((B, T, H, N))
    return list(dict.fromkeys(found))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("lru_layer.py", __doc__)
    option = parser.add_argument
    add_device(parser)
    gpu, cpu = (",".join("x".join(map(str, one)) for one in group) for group in (GPU_SHAPES, CPU_SHAPES))
    option("--shapes", type=shapes, metavar="LIST", help=f"BxTxHxN, comma-separated (default: GPU {gpu}; CPU {cpu})")
    for name, kind, known, default in (
        ("--dtypes", "dtype", KNOWN_DTYPES, DEFAULT_DTYPES),
        ("--providers", "provider", FORMS, list(FORMS)),
    ):
        text = f"comma-separated, of {', '.join(known)} (default: {','.join(default)})"
        option(name, type=names(kind, known), default=default, metavar="LIST", help=text)
    option("--quick", action="store_true", help="a tiny shape and few repetitions: seconds, and no measure of anything")
    option("--seed", type=int, default=0, metavar="N", help="of parameters and tokens (default: 0)")
    add_out(parser)
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.shapes = args.shapes or (
        QUICK_SHAPES if args.quick else GPU_SHAPES if args.device.type == "cuda" else CPU_SHAPES
    )
    result_file.check(args.out / "lru_layer.json", about_device(args.device), parser)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if this package gave a wrong result or none."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(run.run, run.save)
    print(f"\n{table(run.rows, args.device.type)}\n\nwrote {args.out / 'lru_layer.json'}")
    program.complain_of_other_work("lru_layer.py", run.rows, args.device)
    bad = [row for row in run.rows if row["provider"] == OURS and row["status"] != "ok"]
    for row in bad:
        print(
            f"lru_layer.py: {OURS}, {row['pass']}, {row['dtype']}: {row['status']} ({row['reason']})", file=sys.stderr
        )
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
