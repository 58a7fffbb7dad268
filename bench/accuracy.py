"""How far WKV and its gradients are from the float64 reference: this package beside its peers.

Error: ‖result - reference‖₂ / ‖reference‖₂, for y and for the gradients of k, v, u, w and the initial state (its three
fields as one vector) of the loss Σ gy·y. The reference is a float64 loop under autograd, on the same rounded inputs.

Inputs: "ordinary" are normal keys and values with the decays of a freshly initialised RWKV-4; "adversarial" have k
uniform within ±60 and w log-uniform from 1e-6 to 20. In bfloat16 k, v and gy are; w, u and the state are float32.

Without a GPU the Triton kernels are interpreted on the CPU. That takes long, so only the others get long sequences.
"""

import argparse
import os
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    import result_file
    import wkv_inputs
    from about import about_device, about_software
    from command_line import DTYPES, Parser, check_writable, names, positive
    from providers import (
        FastWKV,
        Fla,
        FlaInterpreted,
        HuggingFace,
        Loop,
        Provider,
        interpreted_kernels,
        not_installed,
        rounding_interpreter,
    )
    from torch import Tensor
    from tqdm import tqdm

    from fastwkv import WKVState
except ImportError as error:
    sys.exit(f"accuracy.py: {error}; pip install -e '.[bench]' installs what it needs")

INPUTS = {"ordinary": wkv_inputs.ordinary, "adversarial": wkv_inputs.adversarial}
RESULTS = ("y", "gk", "gv", "gu", "gw", "gstate")
WIDE = ("gu", "gw", "gstate")  # float32 beside 16-bit k and v
BOUNDS = {  # what this package promises, of y, of gradients and of gw
    ("ordinary", "float32"): (5e-7, 2e-6, 2e-6),
    ("adversarial", "float32"): (2e-6, 5e-6, 2e-5),
    ("ordinary", "float64"): (1e-12, 1e-12, 1e-12),
    ("adversarial", "float64"): (1e-12, 1e-12, 1e-12),
}
ROUNDING = {"bfloat16": 4e-3, "float16": 5e-4}  # of what is stored in 16 bits


@dataclass(frozen=True)
class Subject:
    """An implementation, how it is named and run here."""

    label: str
    provider: Provider
    device: torch.device
    interpreted: bool = False
    kernels: bool = False  # ours, in Triton

    def missing(self) -> str | None:
        """Return why it cannot run, None if it can."""
        if self.kernels:
            return not_installed("triton")
        return self.provider.missing(self.device)


def subjects() -> dict[str, Subject]:
    """Return who can be measured, by the name that --providers takes."""
    cpu, accelerator = torch.device("cpu"), torch.device("cuda" if GPU else "cpu")
    how = "Triton" if GPU else "Triton, interpreted"
    return {
        "fastwkv-cpu": Subject("fastwkv (CPU)", FastWKV(), cpu),
        "fastwkv-triton": Subject(f"fastwkv ({how})", FastWKV(), accelerator, not GPU, kernels=True),
        "loop": Subject("PyTorch loop (CPU)", Loop(), cpu),
        "hf": Subject("Hugging Face loop (CPU)", HuggingFace(), cpu),
        "fla": Subject(f"fla ({how})", Fla() if GPU else FlaInterpreted(), accelerator, not GPU),
    }


def errors(subject: Subject, inputs: wkv_inputs.Inputs, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Run a subject forward and backward and compare."""
    provider, device = subject.provider, subject.device
    tensors = (provider.decay(inputs), inputs.u, inputs.k, inputs.v, *inputs.state)
    decay, u, k, v, *state = (t.detach().to(device, copy=True).requires_grad_() for t in tensors)
    with ExitStack() as stack:
        if subject.interpreted:
            stack.enter_context(rounding_interpreter())
            if subject.kernels:
                stack.enter_context(interpreted_kernels())
        y = provider.wkv(decay, u, k, v, provider.state(WKVState(*state), k))
        gw, gu, gk, gv, *gstate = torch.autograd.grad(y, (decay, u, k, v, *state), inputs.gy.to(y))
    gw = provider.gradient_of_w(gw.cpu(), inputs.w)
    results = {"y": y, "gk": gk, "gv": gv, "gu": gu, "gw": gw, "gstate": torch.stack(gstate)}
    return {name: wkv_inputs.relative_error(results[name], wanted[name]) for name in RESULTS}


def allowed(kind: str, dtype: str) -> dict[str, float]:
    """Return the largest error of each result that this package promises."""
    y, gradient, gw = BOUNDS[kind, dtype if dtype == "float64" else "float32"]
    bounds = {"y": y} | dict.fromkeys(RESULTS[1:], gradient) | {"gw": gw}
    return {name: bound if name in WIDE else ROUNDING.get(dtype, bound) for name, bound in bounds.items()}


def measure(name: str, subject: Subject, case: tuple, inputs: wkv_inputs.Inputs, wanted: dict) -> dict[str, Any]:
    """Return the row of one subject."""
    kind, dtype, B, T, C = case
    row: dict[str, Any] = {"inputs": kind, "dtype": dtype, "B": B, "T": T, "C": C, "provider": name}
    row |= {"label": subject.label, "status": "ok", "reason": None, "errors": None, "bounds": None}
    if reason := subject.missing():
        return row | {"status": "unavailable", "reason": reason}
    try:
        row["errors"] = errors(subject, inputs, wanted)
    except Exception as error:
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    if name.startswith("fastwkv"):
        row["bounds"] = allowed(kind, dtype)
        beyond = [one for one in RESULTS if not row["errors"][one] <= row["bounds"][one]]  # NaN is beyond
        if beyond:
            row |= {"status": "beyond its bounds", "reason": ", ".join(beyond)}
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out in markdown, one table a dtype."""
    head = ["inputs", "implementation", "y", "gk", "gv", "gu", "gw", "initial state"]
    texts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines = []
        for row in (row for row in rows if row["dtype"] == dtype):
            measured = row["errors"] is not None
            label = row["label"] if measured else f"{row['label']}: {row['reason']}"
            numbers = [f"{row['errors'][name]:.1e}" if measured else "" for name in RESULTS]
            lines.append([f"{row['inputs']}, T = {row['T']}", label, *numbers])
        texts.append(f"{dtype}\n\n{result_file.markdown(head, lines, texts=2)}")
    return "\n\n".join(texts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    head, *rest = __doc__.split("\n\n")
    parser = Parser(
        prog="accuracy.py",
        description=head,
        epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, everyone = parser.add_argument, list(subjects())
    listed = {"metavar": "LIST", "help": "comma-separated, of %(default)s (default: all)"}
    option("--providers", type=names("provider", everyone), default=",".join(everyone), **listed)
    option("--inputs", type=names("kind of inputs", INPUTS), default=",".join(INPUTS), **listed)
    option(
        "--dtypes",
        type=names("dtype", DTYPES),
        default="float32,bfloat16",
        metavar="LIST",
        help=f"comma-separated, of {', '.join(DTYPES)} (default: float32,bfloat16)",
    )
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
    option("--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: the current folder)")
    args = parser.parse_args(arguments)
    check_writable(args.out, parser)
    result_file.keep_other_hardware(args.out / "accuracy.json", _device(), parser)
    return args


def _device() -> dict[str, Any]:
    return about_device(torch.device("cuda" if GPU else "cpu"))


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = parse(arguments)
    everyone = subjects()
    cases = [(kind, dtype, 1, args.tokens, args.channels) for kind in args.inputs for dtype in args.dtypes]
    if args.long > args.tokens and "adversarial" in args.inputs:
        cases += [("adversarial", dtype, 1, args.long, args.channels) for dtype in args.dtypes]
    plan = {
        case: [name for name in args.providers if case[3] == args.tokens or not everyone[name].interpreted]
        for case in cases
    }
    about = about_software()
    if not everyone["fla"].missing():
        about["versions"]["fla-core"] = metadata.version("fla-core")
    record = {"benchmark": "accuracy", "device": _device(), **about, "settings": {"seed": args.seed}, "rows": []}
    rows = record["rows"]
    with tqdm(total=sum(map(len, plan.values())), unit=" rows", disable=None) as bar, warnings.catch_warnings():
        # The interpreter computes with NumPy, which warns of what a GPU does in silence.
        warnings.filterwarnings("ignore", message="divide by zero|invalid value|overflow", module="triton")
        for case, providers in plan.items():
            kind, dtype, *shape = case
            inputs = INPUTS[kind](*shape, DTYPES[dtype], args.seed)
            wanted = wkv_inputs.expected(inputs, state=True)
            wanted["gstate"] = torch.stack([wanted[field] for field in wkv_inputs.STATE])
            for name in providers:
                bar.set_description(f"{everyone[name].label}, T = {case[3]}")
                rows.append(measure(name, everyone[name], case, inputs, wanted))
                bar.update()
    result_file.write(args.out / "accuracy.json", record)
    print(f"\n{tables(rows)}\n\nwrote {args.out / 'accuracy.json'}")
    wrong = [
        row for row in rows if row["provider"].startswith("fastwkv") and row["status"] not in ("ok", "unavailable")
    ]
    for row in wrong:
        case = f"{row['label']}, {row['inputs']}, {row['dtype']}, T = {row['T']}"
        print(f"accuracy.py: {case}: {row['status']} ({row['reason']})", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing written", file=sys.stderr)
        sys.exit(130)
