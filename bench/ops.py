"""Time of the operators, forward, backward and one token at a time: this package beside its peers.

Every provider's result is first compared with the float64 reference; a wrong one is reported as wrong and not timed.
The others are then timed by turns in one run, the first runs not counted (only what takes longer than ten seconds, on a
GPU a quarter of one, is measured once, by the run whose result was compared). Let the machine do nothing else: how many
cores other processes used meanwhile is recorded as "other_cores", and on a CPU more than a tenth is complained about.

The reference is a loop in float64. Of more than 8192 tokens it would take minutes; there it is this package's CPU path
in float64, which the tests hold to 1e-12 of that loop. Of large inputs some channels are compared.

On a GPU "ms" is the time of the device, between events, with the calls queued before the device reaches them; where a
call queues too much for that, "head_start" is false and the time includes what the device waited for. "ms_host" is how
long a call keeps the host, which is what small shapes feel. Inputs and results are rotated so that the cache holds none
of them, but for those of one token, which are small. "ms_graph" is what one step of this package takes inside a CUDA
graph of a hundred, each from the state after the last one, where no launch is waited for. "peak_bytes" is the most
memory that a call had allocated beyond what was there before it, and "saved_bytes" what a graph keeps for its backward
pass beyond inputs and output. Loops and torch.compile get no long sequences; a peer whose first calls have taken 30
seconds is not asked for more unless named by --providers.

On a CPU the time is that of a call. That of Hugging Face's backward pass, which makes and adds tensors of full size at
every token, depends on whether the process already has that memory: here it does, from the comparison with the
reference. By itself, in a fresh process, it takes several times as long. The time of each first run is recorded as
"ms_first".

GB/s counts compulsory bytes: what has to be read and written if all else stays on the chip. With e bytes an element,
wkv: forward 3e (k, v -> y), backward 5e (k, v, gy -> gk, gv), both 8e, one step 3e and the state read and written;
linear_scan, a multiplier at every token: forward 3e (a, x -> h), backward 5e (a, h, gh -> ga, gx), both 8e, one step 2e
and the state read and written; linear_scan_fixed, one multiplier for all: 2e (x -> h), 3e (h, gh -> gx), 5e, and 1e.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

try:
    from common.command_line import Parser, add_list, positive
    from peers.operators import OPERATORS
    from peers.provider import OURS
    from peers.wkv_cuda_providers import RWKV_CUDA, SOURCES
    from throughput import figure, table
    from throughput.passes import PASSES
    from throughput.plan import ALL_DTYPES, CPU_PASSES, PROVIDERS, cases, default_shapes, layouts
    from throughput.run import Run
except ImportError as error:
    sys.exit(f"ops.py: {error}; pip install -e '.[bench]' installs what it needs")


class Ops(Run):
    """The program; how it measures stands in throughput/run.py."""

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        text = f"BxTxC, BxTxCp for packed documents, comma-separated (default: {default_shapes()})"
        option("--shapes", type=layouts, metavar="LIST", help=text)
        dtypes = "; ".join(f"{name}: {','.join(op.gpu_dtypes)} or {op.default_dtype}" for name, op in OPERATORS.items())
        add_list(parser, "--ops", "operator", OPERATORS, OPERATORS)
        add_list(parser, "--dtypes", "dtype", ALL_DTYPES, said=f"on a GPU or CPU, {dtypes}")
        add_list(parser, "--passes", "pass", PASSES, said=f"on a GPU all, on a CPU {','.join(CPU_PASSES)}")
        add_list(parser, "--providers", "provider", PROVIDERS, said="all")
        option("--rwkv-cuda", type=Path, metavar="DIR", help="transformers/kernels/rwkv, if it is not installed")
        text = "what is not measured by then is left out (default: no limit)"
        option("--minutes", type=positive, metavar="N", help=text)
        option("--quick", action="store_true", help="fewer repetitions, and one small shape an operator")
        option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")

    @classmethod
    def complete(cls, args: Namespace, parser: Parser) -> None:
        args.cases = cases(args, parser)
        if args.rwkv_cuda and (absent := [name for name in SOURCES if not (args.rwkv_cuda / name).is_file()]):
            parser.error(f"there is no {absent[0]} in {str(args.rwkv_cuda)!r}")
        RWKV_CUDA.folder = args.rwkv_cuda
        RWKV_CUDA.lengths = tuple(case.shape[1] for case in args.cases)

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        rows = record["rows"]
        return f"{table.tables(rows, record['device']['type'])}\n\n{table.in_short(rows)}"

    @classmethod
    def draw(cls, record: dict[str, Any], folder: Path) -> list[Path]:
        return figure.draw(record, folder)

    @classmethod
    def complaint(cls, row: dict[str, Any]) -> str | None:
        if row["provider"] != OURS or row["status"] not in ("wrong", "failed"):
            return None
        return f"{OURS}, {row['op']}, {row['pass']}, {row['dtype']}: {row['status']} ({row['reason']})"


main = Ops.main

if __name__ == "__main__":
    sys.exit(main())
