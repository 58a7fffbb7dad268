"""Every kernel, dtype and form against float64 on the device: one group of cases, a row each, in one process.

    python -m correctness.groups wkv-float32

A group is named after a module of this room, and after a dtype where each has a group of its own. Only what checks a
group imports PyTorch: others ask for the names.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

GROUPS = (  # the slowest first: as many processes as run at once
    "wkv-float32",
    "wkv-bfloat16",
    "scan-float32",
    "scan-bfloat16",
    "scan-complex64",
    "scan-bfloat16x2",
    "wkv-float64",
    "wkv-float16",
    "scan-float64",
    "scan-complex128",
    "scan-float16",
    "steps",
    "rwkv4_step",
    "generation",
)


def cases(group: str, rehearse: bool = False) -> Iterator[Any]:
    """Return the cases of a group, for a rehearsal a few tiny ones."""
    module, _, dtype = group.partition("-")
    return importlib.import_module(f"correctness.{module}").cases(dtype, rehearse)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of all groups with CPU tensors, by name, for precompile.py.

    No length is compiled for, so short cases stand for the others that call the launchers.
    """
    import torch

    for group in GROUPS:
        for case in cases(group):
            if case.short or case.public:
                yield f"{group} {case.name}", partial(_launch, case, torch.device("cpu"))


def _launch(case: Any, device: Any) -> object:
    from common.interpreted import interpreted_kernels

    with interpreted_kernels():  # which are compiled there, behind the public functions and in models
        return case.prepare(device).launch()


def main(arguments: list[str] | None = None) -> int:
    """Check a group; return the exit status."""
    parser = argparse.ArgumentParser(prog="groups.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rehearse", action="store_true", help="interpreted, on a CPU, a few tiny cases")
    args = parser.parse_args(arguments)
    from common.interpreted import interpreted_kernels, rounding_interpreter
    from correctness import checks

    device = checks.the_device(args.rehearse)
    with ExitStack() as stack:
        if args.rehearse:
            stack.enter_context(rounding_interpreter())
            stack.enter_context(interpreted_kernels())
        return checks.run(args.group, cases(args.group, args.rehearse), device)


if __name__ == "__main__":
    sys.exit(main())
