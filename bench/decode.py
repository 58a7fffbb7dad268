"""How fast RWKV-4 generates, as a fraction of what reading its weights allows, and how fast it reads a long prompt.

"decode" is fastwkv.nn.generate with a state carried. The time of a token is that between the third, after which all are
alike, and the last, for which alone the host waits, over their number; then the median of the rounds, in which a run
with a CUDA graph and one without take turns. Tokens are drawn at temperature 1 unless --temperature says otherwise.
With the same seed both runs must draw the same, else the program ends with status 1.

"weight_bytes" are those of the parameters that every token reads: all but the embedding, of which it is the rows of its
own tokens. The limit, "limit_ms", is weight_bytes / copy_gbps: the time that they take at the bandwidth at which the
device copies, measured in the same run, bytes read and bytes written both counted (a copy of n bytes moves 2 n).
"fraction" is the limit over the time that was measured.

"prefill" is the time from handing over a prompt to having its first new token. "peak_bytes" is the most memory that
this took beyond what was there before: on a GPU the allocator's, on a CPU that of all tensors that operations return,
counted in a run of its own.
"""

import argparse
import sys
from typing import Any

try:
    from common import program, result_file
    from common.about import about_device, about_run
    from common.command_line import DTYPES, add_device, add_out, device, names, parser_of, positive
    from generation import models
    from generation.decode import EMPTY, decode_rows, parameters_read, prefill_row
    from timing import by_turns, on_gpu
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"decode.py: {error}; pip install -e '.[bench]' installs what it needs")

TOKENS, QUICK_TOKENS = 128, 8
PREFILL, QUICK_PREFILL = 16384, 64
ROUNDS, QUICK_ROUNDS = 5, 2


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Take the copy bandwidth; no model is built yet."""
        self.args = args
        gpu = args.device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        shown = ("batch", "tokens", "rounds", "temperature", "seed", "quick")
        settings = {name: getattr(args, name) for name in shown} | {"prefill_tokens": args.prefill}
        self.about = {
            **about_run("decode", args.device, settings),
            "limit": "weight_bytes / copy_gbps, which counts bytes read and bytes written",
            "copy_gbps": (
                on_gpu.copy_bandwidth(on_gpu.Cuda(args.device)) if gpu else by_turns.copy_bandwidth(args.device)
            ),
        }

    def save(self) -> None:
        """Write decode.json."""
        result_file.write(self.args.out / "decode.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Measure every size and dtype, one model in memory at a time."""
        cases = [(size, dtype) for size in self.args.sizes for dtype in self.args.dtypes]
        for size, dtype in tqdm(cases, disable=None):
            common = {"size": size, "dtype": dtype, "batch": self.args.batch}
            try:
                self._measure(size, dtype, common)
            except Exception as error:
                if not models.is_out_of_memory(error):
                    raise
                failed = {"pass": "decode", **common, **EMPTY, "status": "failed", "reason": "out of memory"}
                self.rows.append(failed)
            self.save()

    def _measure(self, size: str, dtype: str, common: dict[str, Any]) -> None:
        args = self.args
        model = models.build("rwkv4", models.SIZES[size], 0, args.device, DTYPES[dtype], args.seed)
        common = {**common, "weight_bytes": parameters_read(model, args.batch)}
        for row in decode_rows(model, args, self.about["copy_gbps"]):
            self.rows.append({"pass": "decode", **common, **row})
            self.save()
        self.rows.append({"pass": "prefill", **common, **prefill_row(model, args)})


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out what was measured in markdown."""
    head = ["", "", "ms", "tokens/s", "of the limit", "peak memory"]
    lines, others = [], []
    for row in rows:
        what = row["pass"] + {True: ", graph", False: ", no graph", None: ""}[row["graph"]]
        case = f"{row['size']} {row['dtype']}, batch {row['batch']}"
        if row["status"] != "ok":
            others.append(f"{case}, {what}: {row['status']}, {row['reason']}")
            continue
        fraction = "" if row["fraction"] is None else f"{row['fraction']:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"
        lines.append([case, what, f"{row['ms']:.4g}", f"{row['tokens_per_second']:.4g}", fraction, peak])
    return "\n".join([result_file.markdown(head, lines, texts=2), *others])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("decode.py", __doc__)
    option = parser.add_argument
    add_device(parser)
    sizes = f"comma-separated, of {', '.join(models.SIZES)} (default: on a GPU 169m,3b, on a CPU 169m)"
    option("--sizes", type=names("size", models.SIZES), metavar="LIST", help=sizes)
    dtypes = f"comma-separated, of {', '.join(DTYPES)} (default: on a GPU float32,bfloat16, on a CPU float32)"
    option("--dtypes", type=names("dtype", DTYPES), metavar="LIST", help=dtypes)
    option("--batch", type=positive, default=1, metavar="N", help="texts at once (default: 1)")
    option("--tokens", type=positive, metavar="N", help=f"to be timed (default: {TOKENS}, with --quick {QUICK_TOKENS})")
    option("--prefill", type=positive, metavar="N", help=f"(default: {PREFILL}, with --quick {QUICK_PREFILL})")
    option("--rounds", type=positive, metavar="N", help=f"(default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
    option("--temperature", type=temperature, default=1.0, metavar="X", help="0 takes the most likely (default: 1)")
    option("--quick", action="store_true", help="a tiny model and short texts: seconds, and no measure of anything")
    option("--seed", type=int, default=0, metavar="N", help="of weights, prompt and draws (default: 0)")
    add_out(parser)
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    gpu = args.device.type == "cuda"
    args.sizes = args.sizes or (["tiny"] if args.quick else ["169m", "3b"] if gpu else ["169m"])
    args.dtypes = args.dtypes or (["float32", "bfloat16"] if gpu else ["float32"])
    args.tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    args.prefill = args.prefill or (QUICK_PREFILL if args.quick else PREFILL)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    result_file.check(args.out / "decode.json", about_device(args.device), parser)
    return args


def temperature(text: str) -> float:
    """Read a temperature."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if a graph gave other tokens."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(run.run, run.save)
    print(f"\n{table(run.rows)}\n\nwrote {args.out / 'decode.json'}")
    program.complain_of_other_work("decode.py", run.rows, args.device)
    wrong = [row for row in run.rows if row["status"] == "wrong"]
    for row in wrong:
        print(f"decode.py: {row['size']} {row['dtype']}: {row['reason']}", file=sys.stderr)
    return status or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
