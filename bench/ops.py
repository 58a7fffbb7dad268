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
reference. By itself, in a fresh process, it takes several times as long. What the first run of each took is recorded as
"ms_first".

GB/s counts compulsory bytes: what has to be read and written if all else stays on the chip. With e bytes an element,
wkv: forward 3e (k, v -> y), backward 5e (k, v, gy -> gk, gv), both 8e, one step 3e and the state read and written;
linear_scan, a multiplier at every token: forward 3e (a, x -> h), backward 5e (a, h, gh -> ga, gx), both 8e, one step 2e
and the state read and written; linear_scan_fixed, one multiplier for all: 2e (x -> h), 3e (h, gh -> gx), 5e, and 1e.
"""

import argparse
import sys
from pathlib import Path

try:
    from common import program, result_file
    from common.about import about_device
    from common.command_line import Parser, add_device, add_out, device, names, parser_of, positive
    from peers.operators import OPERATORS
    from peers.wkv_cuda_providers import RWKV_CUDA, SOURCES
    from throughput.figure import draw_all
    from throughput.passes import PASSES
    from throughput.plan import ALL_DTYPES, CPU_PASSES, PROVIDERS, cases, default_shapes, layouts
    from throughput.run import DeviceLostError, Run
    from throughput.table import OURS, tables
except ImportError as error:
    sys.exit(f"ops.py: {error}; pip install -e '.[bench]' installs what it needs")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("ops.py", __doc__)
    option = parser.add_argument
    add_device(parser)
    text = f"BxTxC, BxTxCp for packed documents, comma-separated (default: {default_shapes()})"
    option("--shapes", type=layouts, metavar="LIST", help=text)
    dtypes = (f"{name}: {','.join(op.gpu_dtypes)} or {op.default_dtype}" for name, op in OPERATORS.items())
    for name, kind, known, default, text in (
        ("--ops", "operator", OPERATORS, list(OPERATORS), "all"),
        ("--dtypes", "dtype", ALL_DTYPES, None, f"on a GPU or CPU, {'; '.join(dtypes)}"),
        ("--passes", "pass", PASSES, None, f"on a GPU all, on a CPU {','.join(CPU_PASSES)}"),
        ("--providers", "provider", PROVIDERS, None, "all"),
    ):
        text = f"comma-separated, of {', '.join(known)} (default: {text})"
        option(name, type=names(kind, known), default=default, metavar="LIST", help=text)
    option("--rwkv-cuda", type=Path, metavar="DIR", help="transformers/kernels/rwkv, if it is not installed")
    option("--minutes", type=positive, metavar="N", help="what is not measured by then is left out (default: no limit)")
    option("--quick", action="store_true", help="fewer repetitions, and one small shape an operator")
    option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")
    add_out(parser)
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.cases = cases(args, parser)
    _configure(args, parser)
    result_file.check(args.out / "ops.json", about_device(args.device), parser)
    return args


def _configure(args: argparse.Namespace, parser: Parser) -> None:
    """Tell the peer that is compiled from sources where they are and how long its sequences will be."""
    if args.rwkv_cuda and (absent := [name for name in SOURCES if not (args.rwkv_cuda / name).is_file()]):
        parser.error(f"there is no {absent[0]} in {str(args.rwkv_cuda)!r}")
    RWKV_CUDA.folder = args.rwkv_cuda
    RWKV_CUDA.lengths = tuple(case.shape[1] for case in args.cases)


def measure(run: Run) -> int:
    """Measure; return the exit status: 1 if the device was lost."""
    try:
        run.run()
    except DeviceLostError as error:
        print(f"\nops.py: the device is lost: {error}; writing what was measured", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if this package gave a wrong result or none."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(lambda: measure(run), run.save)
    written = [args.out / "ops.json", *draw_all({**run.about, "rows": run.rows}, args.out)]
    print(f"\n{tables(run.rows, args.device.type)}\n\nwrote {', '.join(map(str, written))}")
    program.complain_of_other_work("ops.py", run.rows, args.device)
    bad = [row for row in run.rows if row["provider"] == OURS and row["status"] in ("wrong", "failed")]
    for row in bad:
        case = f"{row['op']}, {row['pass']}, {row['dtype']}"
        print(f"ops.py: {OURS}, {case}: {row['status']} ({row['reason']})", file=sys.stderr)
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
