"""Errors of the operators and their gradients against the float64 reference: this package beside its peers.

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

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    from common import result_file
    from common.command_line import COMPLEX_DTYPES, DTYPES, Parser, add_list, positive
    from common.interpreted import interpreted_kernels, rounding_interpreter, untuned
    from common.light import reason
    from common.program import Program
    from peers.operator import Inputs, Operator, Shape, relative_error
    from peers.operators import OPERATORS
    from peers.provider import OURS, Provider, not_installed
    from torch import Tensor
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"accuracy.py: {error}; pip install -e '.[bench]' installs what it needs")

ALL_DTYPES = DTYPES | COMPLEX_DTYPES
INPUTS = ("ordinary", "adversarial")
DEVICE = torch.device("cuda" if GPU else "cpu")
NO_PEERS = (OURS, "reference")  # the first is here twice, the second is what the others are compared with


@dataclass(frozen=True)
class Subject:
    """An implementation, its name and the way it runs here."""

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
    """An operator, its inputs and the subjects that are measured on them."""

    operator: Operator
    kind: str
    dtype: str
    shape: Shape
    subjects: dict[str, Subject]


def subjects(operator: Operator) -> dict[str, Subject]:
    """Return all that can be measured, by the name that --providers takes."""
    cpu = torch.device("cpu")
    interpreted = "" if GPU else ", interpreted"
    ours = operator.providers[OURS]
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
    if why := subject.missing(inputs):
        return row | {"status": "unavailable", "reason": why}
    try:
        row["errors"] = errors(subject, operator, inputs, wanted)
    except Exception as error:
        return row | {"status": "failed", "reason": reason(error)}
    if name.startswith(OURS):
        row["bounds"] = operator.allowed(case.kind, case.dtype, T)
        beyond = [one for one in operator.results if not row["errors"][one] <= row["bounds"][one]]  # NaN is beyond
        if beyond:
            row |= {"status": "beyond its bounds", "reason": ", ".join(beyond)}
    return row


def _cases(operator: Operator, args: Namespace) -> list[Case]:
    """Return what is asked for and exists: an operator leaves out the dtypes and providers that it has not."""
    everyone = {name: subject for name, subject in subjects(operator).items() if name in args.providers}
    quick = {name: subject for name, subject in everyone.items() if not subject.interpreted}
    dtypes = [dtype for dtype in args.dtypes or operator.accuracy_dtypes if dtype in operator.dtypes]
    plan = [(kind, dtype, args.tokens, everyone) for kind in args.inputs for dtype in dtypes]
    if args.long > args.tokens and "adversarial" in args.inputs:
        plan += [("adversarial", dtype, args.long, quick) for dtype in dtypes]
    return [Case(operator, kind, dtype, (1, T, args.channels), found) for kind, dtype, T, found in plan if found]


class Accuracy(Program):
    """The program."""

    name = "accuracy"
    chooses_device = False

    @classmethod
    def options(cls, parser: Parser) -> None:
        everyone = list(dict.fromkeys(name for operator in OPERATORS.values() for name in subjects(operator)))
        add_list(parser, "--ops", "operator", OPERATORS, OPERATORS)
        add_list(parser, "--providers", "provider", everyone, everyone)
        add_list(parser, "--inputs", "kind of inputs", INPUTS, INPUTS)
        dtypes = "; ".join(f"{name}: {','.join(operator.accuracy_dtypes)}" for name, operator in OPERATORS.items())
        add_list(parser, "--dtypes", "dtype", ALL_DTYPES, said=dtypes)
        option = parser.add_argument
        option("--tokens", type=positive, default=1024, metavar="N", help="T for everyone (default: 1024)")
        text = "T of the adversarial inputs for all that are not interpreted (default: 8192)"
        option("--long", type=positive, default=8192, metavar="N", help=text)
        option("--channels", type=positive, default=32, metavar="N", help="C (default: 32); B is 1")
        option("--seed", type=int, default=0, metavar="N", help="of the inputs (default: 0)")

    @classmethod
    def complete(cls, args: Namespace, parser: Parser) -> None:
        args.cases = [case for name in args.ops for case in _cases(OPERATORS[name], args)]
        if not args.cases:
            parser.error("nothing to measure: no operator of --ops has one of --dtypes and one of --providers")

    def settings(self) -> dict[str, Any]:
        return {"seed": self.args.seed}

    def packages(self) -> Iterable[str]:
        found = {subject.provider.distribution for case in self.args.cases for subject in case.subjects.values()}
        return sorted(found - {None})

    def run(self) -> None:
        total = sum(len(case.subjects) for case in self.args.cases)
        with tqdm(total=total, unit=" rows", disable=None) as bar, warnings.catch_warnings():
            # The interpreter computes with NumPy, which warns of what a GPU does in silence.
            warnings.filterwarnings("ignore", message="divide by zero|invalid value|overflow", module="triton")
            for case in self.args.cases:
                inputs = case.operator.draw(case.kind, case.shape, ALL_DTYPES[case.dtype], self.args.seed)
                wanted = case.operator.expected(inputs, state=True)
                for name, subject in case.subjects.items():
                    bar.set_description(f"{case.operator.name}, {subject.label}, T = {case.shape[1]}")
                    self.add(measure(name, case, inputs, wanted))
                    bar.update()

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        rows, texts = record["rows"], []
        for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
            names = OPERATORS[op].results
            here = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            lines = []
            for row in (row for row in here if row["status"] != "unavailable"):
                errors = row["errors"] or {}
                title = row["label"] if errors else f"{row['label']}: {row['reason']}"
                numbers = [result_file.cell(errors.get(name), ".1e") for name in names]
                lines.append([f"{row['inputs']}, T = {row['T']}", title, *numbers])
            head = ["inputs", "implementation", *names[:-1], "initial state"]
            texts += [f"{op}, {dtype}"] + ([result_file.markdown(head, lines, texts=2)] if lines else [])
            label = itemgetter("label")
            missing = [row for row in here if row["status"] == "unavailable"]
            texts += result_file.not_ok(missing, label, label)
        return "\n\n".join(texts)

    @classmethod
    def complaint(cls, row: dict[str, Any]) -> str | None:
        if not row["provider"].startswith(OURS) or row["status"] in ("ok", "unavailable"):
            return None
        case = f"{row['label']}, {row['op']}, {row['inputs']}, {row['dtype']}, T = {row['T']}"
        return f"{case}: {row['status']} ({row['reason']})"


main = Accuracy.main

if __name__ == "__main__":
    sys.exit(main())
