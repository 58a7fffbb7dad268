"""Speed of RWKV-4 when it generates, as a fraction of the speed that reading its weights allows, and on a long prompt.

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
    from common.command_line import DTYPES, Parser, add_list, positive
    from common.program import Program
    from common.result_file import cell, markdown, not_ok
    from generation import models
    from generation.decode import EMPTY, decode_rows, parameters_read, prefill_row
    from timing import by_turns, on_gpu
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"decode.py: {error}; pip install -e '.[bench]' installs what it needs")

USUAL = {"tokens": 128, "prefill": 16384, "rounds": 5}
QUICK = {"tokens": 8, "prefill": 64, "rounds": 2}
GRAPH = {True: ", graph", False: ", no graph", None: ""}
Row = dict[str, Any]


class Decode(Program):
    """The program; how it measures stands in generation/decode.py."""

    name = "decode"

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        add_list(parser, "--sizes", "size", models.SIZES, said="on a GPU 169m,3b, on a CPU 169m")
        add_list(parser, "--dtypes", "dtype", DTYPES, said="on a GPU float32,bfloat16, on a CPU float32")
        option("--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
        for name, text in (("tokens", "to be timed "), ("prefill", "tokens of the long prompt "), ("rounds", "")):
            text += f"(default: {USUAL[name]}, with --quick {QUICK[name]})"
            option(f"--{name}", type=positive, metavar="N", help=text)
        option("--temperature", type=temperature, default=1.0, metavar="X", help="0 takes the most likely (default: 1)")
        text = "a tiny model and short sequences: seconds, and no measure of anything"
        option("--quick", action="store_true", help=text)
        option("--seed", type=int, default=0, metavar="N", help="of weights, prompt and draws (default: 0)")

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        gpu = args.device.type == "cuda"
        args.sizes = args.sizes or (["tiny"] if args.quick else ["169m", "3b"] if gpu else ["169m"])
        args.dtypes = args.dtypes or (["float32", "bfloat16"] if gpu else ["float32"])
        for name, number in (QUICK if args.quick else USUAL).items():
            setattr(args, name, getattr(args, name) or number)

    def settings(self) -> Row:
        shown = ("batch", "tokens", "rounds", "temperature", "seed", "quick")
        return {name: getattr(self.args, name) for name in shown} | {"prefill_tokens": self.args.prefill}

    def run(self) -> None:
        place = self.args.device
        gpu = place.type == "cuda"
        self.about["limit"] = "weight_bytes / copy_gbps, which counts bytes read and bytes written"
        self.about["copy_gbps"] = on_gpu.copy_bandwidth(on_gpu.Cuda(place)) if gpu else by_turns.copy_bandwidth(place)
        cases = [(size, dtype) for size in self.args.sizes for dtype in self.args.dtypes]
        for size, dtype in tqdm(cases, disable=None):
            common = {"size": size, "dtype": dtype, "batch": self.args.batch}
            try:
                self._measure(size, dtype, common)
            except Exception as error:
                if not models.is_out_of_memory(error):
                    raise
                self.add({"pass": "decode", **common, **EMPTY, "status": "failed", "reason": "out of memory"})

    def _measure(self, size: str, dtype: str, common: Row) -> None:
        args = self.args
        model = models.build("rwkv4", models.SIZES[size], 0, args.device, DTYPES[dtype], args.seed)
        common = {**common, "weight_bytes": parameters_read(model, args.batch)}
        for row in decode_rows(model, args, self.about["copy_gbps"]):
            self.add({"pass": "decode", **common, **row})
        self.add({"pass": "prefill", **common, **prefill_row(model, args)})

    @classmethod
    def table(cls, record: Row) -> str:
        head = ["", "", "ms", "tokens/s", "of the limit", "peak MB"]
        lines = [
            [
                _case(row),
                row["pass"] + GRAPH[row["graph"]],
                *(cell(row[key], ".4g") for key in ("ms", "tokens_per_second")),
                cell(row["fraction"], ".2f"),
                cell(row["peak_bytes"] and row["peak_bytes"] / 1e6, ",.0f"),
            ]
            for row in record["rows"]
            if row["status"] == "ok"
        ]

        def what(row: Row) -> str:
            return f"{_case(row)}, {row['pass']}{GRAPH[row['graph']]}"

        return "\n".join([markdown(head, lines, texts=2), *not_ok(record["rows"], what, what)])

    @classmethod
    def complaint(cls, row: Row) -> str | None:
        return f"{row['size']} {row['dtype']}: {row['reason']}" if row["status"] == "wrong" else None


def _case(row: Row) -> str:
    return f"{row['size']} {row['dtype']}, batch {row['batch']}"


def temperature(text: str) -> float:
    """Read a temperature."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


main = Decode.main

if __name__ == "__main__":
    sys.exit(main())
