"""Time of the operators, forward, backward and one token at a time: this package beside its peers.

Every provider's result is first compared with the float64 reference; a wrong one is reported as wrong and not timed.
The others are then timed by turns in one run, the device synchronised, the first runs not counted (only what takes
longer than ten seconds is measured once, by the run whose result was compared). Let the machine do nothing else: how
many cores other processes used meanwhile is recorded as "other_cores", and more than a tenth is complained about.

Times of Hugging Face's backward pass, which makes and adds tensors of full size at every token, depend on whether the
process already has that memory: here it does, from the comparison with the reference. By itself, in a fresh process,
it takes several times as long. What the first run of each took is recorded as "ms_first".

GB/s counts compulsory bytes: what has to be read and written if all else stays on the chip. With e bytes an element,
wkv: forward 3e (k, v -> y), backward 5e (k, v, gy -> gk, gv), both 8e, one step 3e and the state read and written;
linear_scan, a multiplier at every token: forward 3e (a, x -> h), backward 5e (a, h, gh -> ga, gx), both 8e, one step 2e
and the state read and written; linear_scan_fixed, one multiplier for all: 2e (x -> h), 3e (h, gh -> gx), 5e, and 1e.
"""

import argparse
import math
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import ops_timing
    import result_file
    import torch
    from about import about_device, about_software
    from command_line import COMPLEX_DTYPES, DTYPES, Parser, check_writable, device, names
    from operator_base import Inputs, Operator, Shape
    from operators import OPERATORS
    from ops_passes import PASSES, checked_channels, errors, task
    from ops_table import OURS, tables
    from ops_timing import Task
    from torch import Tensor
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"ops.py: {error}; pip install -e '.[bench]' installs what it needs")

ALL_DTYPES = DTYPES | COMPLEX_DTYPES
PROVIDERS = tuple(dict.fromkeys(name for operator in OPERATORS.values() for name in operator.providers))
WARM_UP = 32  # tokens of a first call, which compiles
BUSY = 0.1  # cores of other processes
# ‖error‖/‖reference‖ beyond which a result is wrong: far above rounding, far below any mistake.
WRONG = {
    "float64": 1e-9,
    "complex128": 1e-9,
    "float32": 1e-4,
    "complex64": 1e-4,
    "float16": 5e-3,
    "bfloat16": 3e-2,
}
DEFAULT_PASSES = ("forward", "forward+backward", "step")


@dataclass(frozen=True)
class Case:
    """An operator, its inputs and who computes it."""

    operator: Operator
    dtype: str
    shape: Shape
    providers: tuple[str, ...]


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is measured yet."""
        self.args = args
        self.effort = ops_timing.QUICK if args.quick else ops_timing.FULL
        self.rows: list[dict[str, Any]] = []
        peers = {case.operator.name: [case.operator.providers[name] for name in case.providers] for case in args.cases}
        packages = {peer.distribution for group in peers.values() for peer in group} - {None}
        self.about = {
            "benchmark": "ops",
            "device": about_device(args.device),
            **about_software(sorted(packages)),
            "settings": {
                "seed": args.seed,
                "quick": args.quick,
                "providers": {name: {peer.name: peer.about for peer in group} for name, group in peers.items()},
            },
            "copy_gbps": ops_timing.copy_bandwidth(args.device),
        }

    def save(self) -> None:
        """Write ops.json."""
        result_file.write(self.args.out / "ops.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Measure every pass of every case."""
        total = 2 * len(self.args.passes) * sum(len(case.providers) for case in self.args.cases)
        with tqdm(total=total, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            for case in self.args.cases:
                operator = case.operator
                inputs = operator.draw("ordinary", case.shape, ALL_DTYPES[case.dtype], self.args.seed)
                sample = inputs.part(case.shape[1], checked_channels(inputs))
                wanted: dict[str, Tensor] = {}
                for which in self.args.passes:
                    if which == "step":
                        reference = operator.expected_step(sample)
                    else:
                        reference = wanted = wanted or operator.expected(sample, state=False)
                    self._run_pass(case, which, inputs, reference, bar)
                    self.save()

    def _run_pass(self, case: Case, which: str, inputs: Inputs, wanted: dict[str, Tensor], bar: tqdm) -> None:
        title = f"{case.operator.name} {list(case.shape)} {case.dtype}, {which}"
        rows = [_row(case, which, name) for name in case.providers]
        others = ops_timing.OtherWork()
        tasks: dict[str, Task] = {}
        for row in rows:
            bar.set_description(f"{title}: {row['provider']}")
            try:
                self._check(case.operator, row, inputs, wanted, tasks)
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
            bar.update(1 if row["status"] == "ok" else 2)
        bar.set_description(f"{title}: by turns")
        ops_timing.measure(list(tasks.values()), self.effort, bar.update)
        cores = others.cores()
        for row in rows:
            if row["provider"] in tasks:
                row |= tasks[row["provider"]].figures()
                row["gbps"] = case.operator.compulsory_bytes(which, inputs) / row["ms"] / 1e6
                row["fraction"] = row["gbps"] / self.about["copy_gbps"]
                row["other_cores"] = cores
        self.rows += rows

    def _check(
        self,
        operator: Operator,
        row: dict[str, Any],
        inputs: Inputs,
        wanted: dict[str, Tensor],
        tasks: dict[str, Task],
    ) -> None:
        """Run a provider for the first time; what gives the right result becomes a task."""
        provider, which, place = operator.providers[row["provider"]], row["pass"], self.args.device
        if reason := provider.missing(place) or provider.refuses(which, inputs):
            row |= {"status": "unavailable", "reason": reason}
            return
        task(provider, which, inputs.part(WARM_UP), place).run()
        one = task(provider, which, inputs, place, self._copies(operator, inputs))
        results, one.first = one.run()
        found = errors(operator, provider, which, inputs, results, wanted)
        worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        row |= {"error": found[worst], "errors": found}
        allowed = WRONG[row["dtype"]]
        if found[worst] <= allowed:  # NaN is not
            tasks[provider.name] = one
        else:
            row |= {"status": "wrong", "reason": f"error of {worst} {found[worst]:.1e} > {allowed:.0e}"}

    def _copies(self, operator: Operator, inputs: Inputs) -> int:
        # On a GPU, as many as its cache cannot hold; a CPU's cache is part of what a model there lives in.
        if self.args.device.type == "cpu":
            return 1
        cache = torch.cuda.get_device_properties(self.args.device).L2_cache_size
        return max(1, min(16, -(-4 * cache // operator.compulsory_bytes("forward", inputs))))


def _row(case: Case, which: str, provider: str) -> dict[str, Any]:
    B, T, C = case.shape
    T = 1 if which == "step" else T
    row = {"op": case.operator.name, "pass": which, "dtype": case.dtype, "B": B, "T": T, "C": C, "provider": provider}
    row |= dict.fromkeys(
        ("ms", "ms_min", "quantiles", "ms_first", "gbps", "fraction", "error", "errors", "repeats", "other_cores")
    )
    return row | {"status": "ok", "reason": None}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    head, *rest = __doc__.split("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="ops.py", description=head, epilog="\n\n".join(rest), formatter_class=formatter)
    option = parser.add_argument
    option("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    shapes = "; ".join(f"{name}: {_text(operator.shapes)}" for name, operator in OPERATORS.items())
    option("--shapes", type=_shapes, metavar="LIST", help=f"BxTxC, comma-separated (default: {shapes})")
    dtypes = "; ".join(f"{name}: {operator.default_dtype}" for name, operator in OPERATORS.items())
    for name, kind, known, default, text in (
        ("--ops", "operator", OPERATORS, list(OPERATORS), "all"),
        ("--dtypes", "dtype", ALL_DTYPES, None, dtypes),
        ("--passes", "pass", PASSES, list(DEFAULT_PASSES), ",".join(DEFAULT_PASSES)),
        ("--providers", "provider", PROVIDERS, PROVIDERS, "all"),
    ):
        text = f"comma-separated, of {', '.join(known)} (default: {text})"
        option(name, type=names(kind, known), default=default, metavar="LIST", help=text)
    option("--quick", action="store_true", help="fewer repetitions, and one small shape an operator")
    option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")
    option("--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: the current folder)")
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.cases = _cases(args, parser)
    check_writable(args.out, parser)
    result_file.keep_other_hardware(args.out / "ops.json", about_device(args.device), parser)
    return args


def _cases(args: argparse.Namespace, parser: Parser) -> list[Case]:
    """Return what is asked for and exists: an operator leaves out the dtypes and providers that it has not."""
    cases = []
    for operator in (OPERATORS[name] for name in args.ops):
        dtypes = [operator.default_dtype] if args.dtypes is None else [d for d in args.dtypes if d in operator.dtypes]
        providers = tuple(name for name in args.providers if name in operator.providers)
        shapes = args.shapes or (operator.quick_shapes if args.quick else operator.shapes)
        cases += [Case(operator, dtype, shape, providers) for dtype in dtypes for shape in shapes if providers]
    if not cases:
        parser.error("nothing to measure: no operator of --ops has one of --dtypes and one of --providers")
    return cases


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"expected shapes like 4x1024x768, got {part!r}")
        shapes.append(tuple(map(int, match.groups())))
    return list(dict.fromkeys(shapes))


def _text(shapes: tuple[Shape, ...]) -> str:
    return ",".join("x".join(map(str, shape)) for shape in shapes)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if this package gave a wrong result or none."""
    args = parse(arguments)
    run = Run(args)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        run.run()
    except KeyboardInterrupt:
        status = 130
        print("\ninterrupted: writing what was measured", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, previous)
        run.save()
    print(f"\n{tables(run.rows, args.device.type)}\n\nwrote {args.out / 'ops.json'}")
    busy = max((row["other_cores"] or 0 for row in run.rows), default=0)
    if busy > BUSY:
        print(f"ops.py: other processes kept up to {busy:.1f} cores busy: these times say little", file=sys.stderr)
    bad = [row for row in run.rows if row["provider"] == OURS and row["status"] in ("wrong", "failed")]
    for row in bad:
        case = f"{row['op']}, {row['pass']}, {row['dtype']}"
        print(f"ops.py: {OURS}, {case}: {row['status']} ({row['reason']})", file=sys.stderr)
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
