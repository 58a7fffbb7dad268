"""One group of kernels against float64 on the device, a row a case: what a process of the step "correctness" runs."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from common.interpreted import interpreted_kernels, rounding_interpreter
from piece import checking, generation_cases, scan_cases, step_cases, wkv_cases
from piece.checking import Case
from piece.plan import GROUPS


def cases(group: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of a group."""
    kind, _, dtype = group.partition("-")
    if kind == "wkv":
        return wkv_cases.cases(dtype, rehearse)
    if kind == "scan":
        return scan_cases.cases(dtype, rehearse)
    return {"steps": step_cases.steps, "rwkv4_step": step_cases.rwkv4_step, "generation": generation_cases.cases}[
        group
    ](rehearse)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Return the launches of all groups, for precompile.py."""
    for group in GROUPS:
        for name, call in checking.launched(cases(group)):
            yield f"{group} {name}", partial(_on_kernels, call)


def _on_kernels(call: Callable[[], object]) -> object:
    with interpreted_kernels():  # which are compiled there, behind the public functions and in models
        return call()


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="correctness.py", description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rehearse", action="store_true", help="interpreted, on a CPU, a few tiny cases")
    args = parser.parse_args(arguments)
    device = checking.the_device(args.rehearse)
    with ExitStack() as stack:
        if args.rehearse:
            stack.enter_context(rounding_interpreter())
            stack.enter_context(interpreted_kernels())
        return checking.run(args.group, cases(args.group, args.rehearse), device)


if __name__ == "__main__":
    sys.exit(main())
