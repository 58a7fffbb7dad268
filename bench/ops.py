"""Time of WKV, forward, backward and one token at a time: this package beside its peers.

Every provider's result is first compared with the float64 reference; a wrong one is reported as wrong and not timed.
The others are then timed by turns in one run, the device synchronised, the first runs not counted (only what takes
longer than ten seconds is measured once, by the run whose result was compared). Let the machine do nothing else: how
many cores other processes used meanwhile is recorded as "other_cores", and more than a tenth is complained about.

Times of Hugging Face's backward pass, which makes and adds tensors of full size at every token, depend on whether the
process already has that memory: here it does, from the comparison with the reference. By itself, in a fresh process,
it takes several times as long. What the first run of each took is recorded as "ms_first".

GB/s counts compulsory bytes: what has to be read and written if all else stays on the chip. With e bytes an element,
forward 3e (k, v -> y), backward 5e (k, v, gy -> gk, gv), both 8e, one step 3e and the state read and written.
"""

import argparse
import itertools
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

try:
    import ops_timing
    import result_file
    import torch
    import wkv_inputs
    from about import about_device, about_software
    from command_line import DTYPES, Parser, check_writable, device, names
    from ops_passes import PASSES, checked_channels, compulsory_bytes, errors, task
    from ops_table import OURS, table
    from ops_timing import Task
    from providers import WKV
    from torch import Tensor
    from tqdm import tqdm
    from wkv_inputs import Inputs
except ImportError as error:
    sys.exit(f"ops.py: {error}; pip install -e '.[bench]' installs what it needs")

SHAPES = ((1, 1024, 768), (4, 1024, 768))
QUICK_SHAPES = ((1, 256, 768),)
WARM_UP = 32  # tokens of a first call, which compiles
BUSY = 0.1  # cores of other processes
# ‖error‖/‖reference‖ beyond which a result is wrong: far above rounding, far below any mistake.
WRONG = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
DEFAULT_PASSES = ("forward", "forward+backward", "step")


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is measured yet."""
        self.args = args
        self.effort = ops_timing.QUICK if args.quick else ops_timing.FULL
        self.rows: list[dict[str, Any]] = []
        self.cases = list(itertools.product(args.dtypes, args.shapes))
        self.about = {
            "benchmark": "ops",
            "device": about_device(args.device),
            **about_software(),
            "settings": {
                "seed": args.seed,
                "quick": args.quick,
                "providers": {n: WKV[n].about for n in args.providers},
            },
            "copy_gbps": ops_timing.copy_bandwidth(args.device),
        }

    def save(self) -> None:
        """Write ops.json."""
        result_file.write(self.args.out / "ops.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Measure every pass of every case."""
        total = 2 * len(self.cases) * len(self.args.passes) * len(self.args.providers)
        with tqdm(total=total, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            for dtype, shape in self.cases:
                inputs = wkv_inputs.ordinary(*shape, DTYPES[dtype], self.args.seed)
                sample = inputs.part(shape[1], checked_channels(inputs))
                wanted: dict[str, Tensor] = {}
                for which in self.args.passes:
                    if which == "step":
                        reference = wkv_inputs.expected_step(sample)
                    else:
                        reference = wanted = wanted or wkv_inputs.expected(sample, state=False)
                    self._run_pass(which, dtype, inputs, reference, bar)
                    self.save()

    def _run_pass(self, which: str, dtype: str, inputs: Inputs, wanted: dict[str, Tensor], bar: tqdm) -> None:
        case = f"{list(inputs.k.shape)} {dtype}, {which}"
        rows = [self._row(which, dtype, inputs, name) for name in self.args.providers]
        others = ops_timing.OtherWork()
        tasks: dict[str, Task] = {}
        for row in rows:
            bar.set_description(f"{case}: {row['provider']}")
            try:
                self._check(row, inputs, wanted, tasks)
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
            bar.update(1 if row["status"] == "ok" else 2)
        bar.set_description(f"{case}: by turns")
        ops_timing.measure(list(tasks.values()), self.effort, bar.update)
        cores = others.cores()
        for row in rows:
            if row["provider"] in tasks:
                row |= tasks[row["provider"]].figures()
                row["gbps"] = compulsory_bytes(which, inputs) / row["ms"] / 1e6
                row["fraction"] = row["gbps"] / self.about["copy_gbps"]
                row["other_cores"] = cores
        self.rows += rows

    def _check(self, row: dict[str, Any], inputs: Inputs, wanted: dict[str, Tensor], tasks: dict[str, Task]) -> None:
        """Run a provider for the first time; what gives the right result becomes a task."""
        provider, which, place = WKV[row["provider"]], row["pass"], self.args.device
        if reason := provider.missing(place):
            row |= {"status": "unavailable", "reason": reason}
            return
        task(provider, which, inputs.part(WARM_UP), place).run()
        one = task(provider, which, inputs, place, self._copies(inputs))
        results, one.first = one.run()
        found = errors(provider, which, inputs, results, wanted)
        worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        row |= {"error": found[worst], "errors": found}
        allowed = WRONG[row["dtype"]]
        if found[worst] <= allowed:  # NaN is not
            tasks[provider.name] = one
        else:
            row |= {"status": "wrong", "reason": f"error of {worst} {found[worst]:.1e} > {allowed:.0e}"}

    def _row(self, which: str, dtype: str, inputs: Inputs, provider: str) -> dict[str, Any]:
        B, T, C = inputs.k.shape
        T = 1 if which == "step" else T
        row = {"op": "wkv", "pass": which, "dtype": dtype, "B": B, "T": T, "C": C, "provider": provider}
        row |= dict.fromkeys(
            ("ms", "ms_min", "quantiles", "ms_first", "gbps", "fraction", "error", "errors", "repeats", "other_cores")
        )
        return row | {"status": "ok", "reason": None}

    def _copies(self, inputs: Inputs) -> int:
        # On a GPU, as many as its cache cannot hold; a CPU's cache is part of what a model there lives in.
        if self.args.device.type == "cpu":
            return 1
        cache = torch.cuda.get_device_properties(self.args.device).L2_cache_size
        return max(1, min(16, -(-4 * cache // (3 * inputs.k.nbytes))))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    head, *rest = __doc__.split("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="ops.py", description=head, epilog="\n\n".join(rest), formatter_class=formatter)
    option = parser.add_argument
    option("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    option("--shapes", type=_shapes, metavar="LIST", help=f"BxTxC, comma-separated (default: {_text(SHAPES)})")
    for name, kind, known, default in (
        ("--dtypes", "dtype", DTYPES, ["float32"]),
        ("--passes", "pass", PASSES, list(DEFAULT_PASSES)),
        ("--providers", "provider", WKV, list(WKV)),
    ):
        text = f"comma-separated, of {', '.join(known)} (default: {','.join(default)})"
        option(name, type=names(kind, known), default=default, metavar="LIST", help=text)
    option("--quick", action="store_true", help=f"fewer repetitions, and {_text(QUICK_SHAPES)} for a shape")
    option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")
    option("--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: the current folder)")
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    check_writable(args.out, parser)
    result_file.keep_other_hardware(args.out / "ops.json", about_device(args.device), parser)
    return args


def _shapes(text: str) -> list[tuple[int, int, int]]:
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"expected shapes like 4x1024x768, got {part!r}")
        shapes.append(tuple(map(int, match.groups())))
    return list(dict.fromkeys(shapes))


def _text(shapes: tuple[tuple[int, int, int], ...]) -> str:
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
    print(f"\n{table(run.rows, args.device.type)}\n\nwrote {args.out / 'ops.json'}")
    busy = max((row["other_cores"] or 0 for row in run.rows), default=0)
    if busy > BUSY:
        print(f"ops.py: other processes kept up to {busy:.1f} cores busy: these times say little", file=sys.stderr)
    bad = [row for row in run.rows if row["provider"] == OURS and row["status"] in ("wrong", "failed")]
    for row in bad:
        print(f"ops.py: {OURS}, {row['pass']}, {row['dtype']}: {row['status']} ({row['reason']})", file=sys.stderr)
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
