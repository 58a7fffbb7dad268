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
import sys
from typing import Any

try:
    from common.command_line import DTYPES, Parser, add_list, sizes
    from common.program import Program
    from common.result_file import cell, markdown, not_ok
    from layer.forms import ABOUT, FORMS
    from layer.run import PASSES, REFERENCE, RING, Case, Measurement, Shape, draw
    from peers.provider import OURS
    from timing import by_turns, on_gpu
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"lru_layer.py: {error}; pip install -e '.[bench]' installs what it needs")

KNOWN_DTYPES = [name for name in DTYPES if name != "float64"]  # of "fft" and "complex64" nothing is left there
DEFAULT_DTYPES = ["bfloat16", "float32"]
GPU_SHAPES: list[Shape] = [(8, 4096, 1024, 1024), (1, 65536, 1024, 1024)]
CPU_SHAPES: list[Shape] = [(4, 2048, 256, 256), (1, 8192, 256, 256)]
QUICK_SHAPES: list[Shape] = [(2, 64, 16, 24)]
# On a GPU: how many times the time and the memory of this package every other form should take.
TARGET, TARGET_ROW = 2.0, ("forward+backward", "bfloat16", GPU_SHAPES[0])

HEAD = ["pass", "B, T, H, N", "dtype", "form", "ms", "least", "10 to 90 %", "peak MB", "kept MB", "error"]
HEAD += ["time, times ours", "peak, times ours", "target"]
Row = dict[str, Any]


class LRULayer(Program):
    """The program; how it measures stands in layer/run.py."""

    name = "lru_layer"

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        gpu, cpu = (",".join("x".join(map(str, one)) for one in group) for group in (GPU_SHAPES, CPU_SHAPES))
        text = f"BxTxHxN, comma-separated (default: GPU {gpu}; CPU {cpu})"
        option("--shapes", type=shapes, metavar="LIST", help=text)
        add_list(parser, "--dtypes", "dtype", KNOWN_DTYPES, DEFAULT_DTYPES)
        add_list(parser, "--providers", "provider", FORMS, FORMS)
        option("--quick", action="store_true", help="a tiny shape and few repetitions: seconds, no measure of anything")
        option("--seed", type=int, default=0, metavar="N", help="of parameters and tokens (default: 0)")

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        usual = GPU_SHAPES if args.device.type == "cuda" else CPU_SHAPES
        args.shapes = args.shapes or (QUICK_SHAPES if args.quick else usual)

    def settings(self) -> Row:
        about = {name: ABOUT[name] for name in self.args.providers}
        chosen = {"seed": self.args.seed, "quick": self.args.quick}
        return {**chosen, "ring": RING, "reference": REFERENCE, "providers": about}

    def run(self) -> None:
        args = self.args
        cuda = on_gpu.Cuda(args.device) if args.device.type == "cuda" else None
        effort = by_turns.effort(args.device, quick=args.quick)
        cases = [Case(shape, dtype) for shape in args.shapes for dtype in args.dtypes]
        with tqdm(total=len(cases) * len(PASSES) * len(args.providers), disable=None) as bar:
            for case in cases:
                bar.set_description(f"{list(case.shape)} {case.dtype}")
                self.add(*Measurement(case, args.providers, effort, cuda, bar.update).rows(draw(case, args.seed)))

    @classmethod
    def table(cls, record: Row) -> str:
        rows = record["rows"]
        ours = {_case(row): row for row in rows if row["provider"] == OURS and row["status"] == "ok"}
        device = record["device"]["type"]
        lines = [_line(row, ours.get(_case(row)), device) for row in rows if row["status"] == "ok"]
        notes = not_ok(rows, lambda row: f"{row['provider']}, {row['pass']}, {_shape(row)}, {row['dtype']}")
        return "\n".join([markdown(HEAD, lines, texts=4), *notes])

    @classmethod
    def complaint(cls, row: Row) -> str | None:
        if row["provider"] != OURS or row["status"] == "ok":
            return None
        return f"{OURS}, {row['pass']}, {row['dtype']}: {row['status']} ({row['reason']})"


def _line(row: Row, ours: Row | None, device_type: str) -> list[str]:
    low, high = (f"{row['quantiles'][q]:.4g}" for q in ("0.1", "0.9"))
    line = [row["pass"], _shape(row), row["dtype"], row["provider"], f"{row['ms']:.4g}", f"{row['ms_min']:.4g}"]
    line.append(f"{low} - {high}" if row["repeats"] > 1 else "once")
    line += [cell(row[key] and row[key] / 1e6, ",.1f") for key in ("peak_bytes", "saved_bytes")]
    line.append(f"{row['error']:.1e}")
    if ours is None or row["provider"] == OURS:
        return [*line, "", "", ""]
    ratios = [row[key] / ours[key] for key in ("ms", "peak_bytes")]
    verdict = "reached" if min(ratios) >= TARGET else "MISSED"
    aimed_at = device_type == "cuda" and _case(row) == TARGET_ROW
    return [*line, *(f"{ratio:.2f}" for ratio in ratios), f"{TARGET:g}, {verdict}" if aimed_at else ""]


def _case(row: Row) -> tuple[str, str, Shape]:
    return row["pass"], row["dtype"], (row["B"], row["T"], row["H"], row["N"])


def _shape(row: Row) -> str:
    return ", ".join(str(row[key]) for key in "BTHN")


def shapes(text: str) -> list[Shape]:
    """Read shapes such as 8x4096x1024x1024: B, T, H and N."""
    found = [sizes(part, "8x4096x1024x1024 (B, T, H, N)") for part in text.split(",")]
    return [(B, T, H, N) for B, T, H, N in dict.fromkeys(found)]


main = LRULayer.main

if __name__ == "__main__":
    sys.exit(main())
