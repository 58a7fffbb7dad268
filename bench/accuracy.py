"""How far the operators and their gradients are from the float64 reference: this package beside its peers.

Error: ‖result - reference‖₂ / ‖reference‖₂, for the output and for the gradients of the inputs and the initial state
(of WKV's, the three fields as one vector) of the loss Σ gy·y. The reference is a float64 loop under autograd, on the
same rounded inputs.

Inputs of wkv: "ordinary" are normal keys and values with the decays of a freshly initialised RWKV-4; "adversarial" have
k uniform within ±60 and w log-uniform from 1e-6 to 20. In bfloat16 k, v and gy are; w, u and the state are float32.

Inputs of linear_scan, and of linear_scan_fixed, whose multiplier is the same at every token: "ordinary" have |a| from
0.9 to 0.999 and any phase, or real gates, sigmoids of normal numbers about 3; "adversarial" have |a| = 1 and any phase,
or a = 1 and positive x. In bfloat16 all but the state are; fla takes log a, in the same dtype.

Without a GPU the Triton kernels are interpreted on the CPU. That takes long, so only the others get long sequences.
"""

import argparse
import os
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    from common import result_file
    from common.about import about_device, about_run
    from common.command_line import COMPLEX_DTYPES, DTYPES, add_out, names, parser_of, positive
    from common.interpreted import interpreted_kernels, rounding_interpreter, untuned
    from peers.operator import Inputs, Operator, Shape, relative_error
    from peers.operators import OPERATORS
    from peers.provider import Provider, not_installed
    from torch import Tensor
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"accuracy.py: {error}; pip install -e '.[bench]' installs what it needs")

ALL_DTYPES = DTYPES | COMPLEX_DTYPES
INPUTS = ("ordinary", "adversarial")
DEVICE = torch.device("cuda" if GPU else "cpu")
NO_PEERS = ("fastwkv", "reference")  # the first is here twice, the second is what the others are compared with


@dataclass(frozen=True)
class Subject:
    """An implementation, how it is named and run here."""

    label: str
    provider: Provider
    device: torch.device
    interpreted: bool = False
    kernels: bool = False  # ours, in Triton

    def missing(self, inputs: Inputs) -> str | None:
        """Return why it cannot run on these inputs, None if it can."""
        if self.kernels:
            return not_installed("triton")
        missing = self.provider.missing(self.device, interpreted=self.interpreted)
        return missing or self.provider.refuses("forward+backward", inputs)


@dataclass(frozen=True)
class Case:
    """An operator, its inputs and who is measured on them."""

    operator: Operator
    kind: str
    dtype: str
    shape: Shape
    subjects: dict[str, Subject]


def subjects(operator: Operator) -> dict[str, Subject]:
    """Return who can be measured, by the name that --providers takes."""
    cpu = torch.device("cpu")
    interpreted = "" if GPU else ", interpreted"
    ours = operator.providers["fastwkv"]
    found = {
        "fastwkv-cpu": Subject("fastwkv (CPU)", ours, cpu),
        "fastwkv-triton": Subject(f"fastwkv (Triton{interpreted})", ours, DEVICE, not GPU, kernels=True),
    }
    for name, peer in operator.providers.items():
        if peer.language:
            how = peer.language + interpreted * (peer.language == "Triton")
            found[name] = Subject(f"{peer.label} ({how})", peer, DEVICE, not GPU)
        elif name not in NO_PEERS:
            found[name] = Subject(f"{peer.label} (CPU)", peer, cpu)
    return found


def errors(subject: Subject, operator: Operator, inputs: Inputs, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Run a subject forward and backward and compare."""
    provider, device = subject.provider, subject.device

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True).requires_grad_()

    leaves, states = [leaf(one) for one in provider.leaves(inputs)], [leaf(one) for one in inputs.states]
    with ExitStack() as stack:
        if subject.interpreted:
            stack.enter_context(rounding_interpreter())
            stack.enter_context(interpreted_kernels() if subject.kernels else untuned())
        output = provider.forward(leaves, provider.initial(states, leaves))
        gradient = provider.gradient_of_output(inputs).to(output)
        gradients = torch.autograd.grad(output, (*leaves, *states), gradient)
    results = dict(zip((operator.output, *operator.gradients), (output, *gradients), strict=False))
    results = {name: provider.in_our_form(name, result, inputs) for name, result in results.items()}
    results[operator.results[-1]] = torch.stack(gradients[len(leaves) :])
    return {name: relative_error(results[name], wanted[name]) for name in operator.results}


def measure(name: str, case: Case, inputs: Inputs, wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Return the row of one subject."""
    operator, subject = case.operator, case.subjects[name]
    B, T, C = case.shape
    row: dict[str, Any] = {"op": operator.name, "inputs": case.kind, "dtype": case.dtype, "B": B, "T": T, "C": C}
    row |= {"provider": name, "label": subject.label, "status": "ok", "reason": None, "errors": None, "bounds": None}
    if reason := subject.missing(inputs):
        return row | {"status": "unavailable", "reason": reason}
    try:
        row["errors"] = errors(subject, operator, inputs, wanted)
    except Exception as error:
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    if name.startswith("fastwkv"):
        row["bounds"] = operator.allowed(case.kind, case.dtype, T)
        beyond = [one for one in operator.results if not row["errors"][one] <= row["bounds"][one]]  # NaN is beyond
        if beyond:
            row |= {"status": "beyond its bounds", "reason": ", ".join(beyond)}
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out in markdown, one table an operator and dtype; below it who is not available."""
    texts = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        operator = OPERATORS[op]
        here = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        lines = []
        for row in (row for row in here if row["status"] != "unavailable"):
            measured = row["errors"] is not None
            label = row["label"] if measured else f"{row['label']}: {row['reason']}"
            numbers = [f"{row['errors'][name]:.1e}" if measured else "" for name in operator.results]
            lines.append([f"{row['inputs']}, T = {row['T']}", label, *numbers])
        head = ["inputs", "implementation", *operator.results[:-1], "initial state"]
        texts += [f"{op}, {dtype}"] + ([result_file.markdown(head, lines, texts=2)] if lines else [])
        texts += result_file.unavailable(here, "label")
    return "\n\n".join(texts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("accuracy.py", __doc__)
    option = parser.add_argument
    everyone = list(dict.fromkeys(name for operator in OPERATORS.values() for name in subjects(operator)))
    listed = {"metavar": "LIST", "help": "comma-separated, of %(default)s (default: all)"}
    option("--ops", type=names("operator", OPERATORS), default=",".join(OPERATORS), **listed)
    option("--providers", type=names("provider", everyone), default=",".join(everyone), **listed)
    option("--inputs", type=names("kind of inputs", INPUTS), default=",".join(INPUTS), **listed)
    dtypes = "; ".join(f"{name}: {','.join(operator.accuracy_dtypes)}" for name, operator in OPERATORS.items())
    text = f"comma-separated, of {', '.join(ALL_DTYPES)} (default: {dtypes})"
    option("--dtypes", type=names("dtype", ALL_DTYPES), metavar="LIST", help=text)
    option("--tokens", type=positive, default=1024, metavar="N", help="T for everyone (default: 1024)")
    option(
        "--long",
        type=positive,
        default=8192,
        metavar="N",
        help="T of the adversarial inputs for all that are not interpreted (default: 8192)",
    )
    option("--channels", type=positive, default=32, metavar="N", help="C (default: 32); B is 1")
    option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")
    add_out(parser)
    args = parser.parse_args(arguments)
    args.cases = [case for name in args.ops for case in _cases(OPERATORS[name], args)]
    if not args.cases:
        parser.error("nothing to measure: no operator of --ops has one of --dtypes and one of --providers")
    result_file.check(args.out / "accuracy.json", about_device(DEVICE), parser)
    return args


def _cases(operator: Operator, args: argparse.Namespace) -> list[Case]:
    """Return what is asked for and exists: an operator leaves out the dtypes and providers that it has not."""
    everyone = {name: subject for name, subject in subjects(operator).items() if name in args.providers}
    quick = {name: subject for name, subject in everyone.items() if not subject.interpreted}
    dtypes = [dtype for dtype in args.dtypes or operator.accuracy_dtypes if dtype in operator.dtypes]
    plan = [(kind, dtype, args.tokens, everyone) for kind in args.inputs for dtype in dtypes]
    if args.long > args.tokens and "adversarial" in args.inputs:
        plan += [("adversarial", dtype, args.long, quick) for dtype in dtypes]
    return [Case(operator, kind, dtype, (1, T, args.channels), found) for kind, dtype, T, found in plan if found]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = parse(arguments)
    packages = {subject.provider.distribution for case in args.cases for subject in case.subjects.values()} - {None}
    record = {**about_run("accuracy", DEVICE, {"seed": args.seed}, sorted(packages)), "rows": []}
    rows = record["rows"]
    total = sum(len(case.subjects) for case in args.cases)
    with tqdm(total=total, unit=" rows", disable=None) as bar, warnings.catch_warnings():
        # The interpreter computes with NumPy, which warns of what a GPU does in silence.
        warnings.filterwarnings("ignore", message="divide by zero|invalid value|overflow", module="triton")
        for case in args.cases:
            inputs = case.operator.draw(case.kind, case.shape, ALL_DTYPES[case.dtype], args.seed)
            wanted = case.operator.expected(inputs, state=True)
            for name, subject in case.subjects.items():
                bar.set_description(f"{case.operator.name}, {subject.label}, T = {case.shape[1]}")
                rows.append(measure(name, case, inputs, wanted))
                bar.update()
    result_file.write(args.out / "accuracy.json", record)
    print(f"\n{tables(rows)}\n\nwrote {args.out / 'accuracy.json'}")
    wrong = [
        row for row in rows if row["provider"].startswith("fastwkv") and row["status"] not in ("ok", "unavailable")
    ]
    for row in wrong:
        case = f"{row['label']}, {row['op']}, {row['inputs']}, {row['dtype']}, T = {row['T']}"
        print(f"accuracy.py: {case}: {row['status']} ({row['reason']})", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing written", file=sys.stderr)
        sys.exit(130)
