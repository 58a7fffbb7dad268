"""Bytes that the kernels load and store for a token and channel, beside those that every implementation has to.

The kernels are interpreted and each of their accesses to memory is counted. PyTorch's work between them is not: sums
over the chunks, numbers of packed sequences. "k 3.00 (1.5 times)" is read 1.5 times. Written to traffic.json as well.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

try:
    from common.command_line import COMPLEX_DTYPES, DTYPES, Parser, names, positive
    from common.program import Program
    from machine_code.bytes_counter import Access, TrafficCounter, merged
    from peers.operator import Shape
    from peers.operators import OPERATORS
except ImportError as error:
    sys.exit(f"traffic.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

from fastwkv.kernels.config import Launch, scan_launch, wkv_launch
from fastwkv.kernels.linear_scan import linear_scan_fwd
from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

ALL_DTYPES = DTYPES | COMPLEX_DTYPES
DEFAULT_DTYPES = ["bfloat16", "float32", "complex64"]
CHANNELS = 64
COLUMNS = "{:<17} {:<15} {:<10} {:>6} {:>6} {:>10} {:>6}  {}"
MULTIPLE = 128  # of every number of tokens that a kernel treats at once


def counted(operator: str, dtype: str, shape: Shape, chunk: int | None = None) -> dict[str, TrafficCounter]:
    """Run the passes of an operator and count what each loads and stores."""
    inputs = OPERATORS[operator].draw("ordinary", shape, ALL_DTYPES[dtype], 0)
    if operator == "wkv":
        return dict(_wkv_passes(inputs, _launch(wkv_launch, shape, max(4, inputs.dtype.itemsize), chunk)))
    return dict(_scan_passes(inputs, _launch(scan_launch, shape, inputs.dtype.itemsize, chunk)))


def _launch(choose: Callable[..., Launch], shape: Shape, itemsize: int, chunk: int | None) -> Launch:
    return replace(choose(*shape, 1, itemsize), chunk=-(-(chunk or shape[1]) // MULTIPLE) * MULTIPLE)


def _wkv_passes(inputs: Any, launch: Launch) -> Iterator[tuple[str, TrafficCounter]]:
    tensors = inputs.w, inputs.u, inputs.k, inputs.v
    for name, save in (("forward", False), ("forward, saving", True)):
        with TrafficCounter() as counter:
            *_, checkpoints = wkv_fwd(*tensors, None, None, save, launch=launch)
        yield name, counter
    with TrafficCounter() as counter:
        wkv_bwd(*tensors, None, None, checkpoints, inputs.gy, None, launch=launch)
    yield "backward", counter


def _scan_passes(inputs: Any, launch: Launch) -> Iterator[tuple[str, TrafficCounter]]:
    with TrafficCounter() as counter:
        h, _ = linear_scan_fwd(inputs.a, inputs.x, None, None, False, False, launch=launch)
    yield "forward", counter
    with TrafficCounter() as counter:
        linear_scan_bwd(inputs.a, h, None, None, False, False, inputs.gh, None, inputs.dtype, launch=launch)
    yield "backward", counter


def compulsory(operator: str, which: str, dtype: str) -> int:
    """Return the bytes a token and channel that every implementation has to load and store in a pass."""
    return OPERATORS[operator].traffic[which.partition(",")[0]].elements * ALL_DTYPES[dtype].itemsize


def case_rows(operator: str, dtype: str, shape: Shape, chunk: int | None = None) -> Iterator[dict[str, Any]]:
    """Return a row for every pass of an operator: bytes a token and channel, and how often each one was touched."""
    elements = math.prod(shape)
    where = {"dtype": dtype, **dict(zip("BTC", shape, strict=True)), "chunk": chunk}
    for which, counter in counted(operator, dtype, shape, chunk).items():
        found, least = counter.total / elements, compulsory(operator, which, dtype)
        yield {
            "op": operator,
            "pass": which,
            **where,
            "bytes": found,
            "compulsory": least,
            "ratio": found / least,
            "loaded": _tensors(counter.loads, elements),
            "stored": _tensors(counter.stores, elements),
        }


def _tensors(accesses: dict[tuple[str, str], Access], elements: int) -> dict[str, dict[str, float]]:
    return {
        name.removesuffix("_ptr"): {"bytes": access.total / elements, "times": access.total / access.distinct}
        for name, access in merged(accesses).items()
    }


def _line(row: dict[str, Any]) -> str:
    parts = "; ".join(", ".join(_shown(row[way])) for way in ("loaded", "stored"))
    numbers = row["chunk"] or "-", f"{row['bytes']:.2f}", row["compulsory"], f"{row['ratio']:.2f}"
    return COLUMNS.format(row["op"], row["pass"], row["dtype"], *numbers, parts)


def _shown(tensors: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, one in tensors.items():
        if one["bytes"] >= 0.005:
            again = f" ({one['times']:.3g} times)" if one["times"] > 1.01 else ""
            yield f"{name} {one['bytes']:.2f}{again}"


class Traffic(Program):
    """The program."""

    name = "traffic"
    computes = True

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        known = list(OPERATORS)
        option("--ops", type=names("operator", known), default=known, metavar="LIST", help=", ".join(known))
        known = list(ALL_DTYPES)
        option("--dtypes", type=names("dtype", known), default=DEFAULT_DTYPES, metavar="LIST", help=", ".join(known))
        option("--tokens", type=positive, default=512, metavar="N", help="of the one sequence (%(default)s)")
        text = "tokens a chunk, where time is split (%(default)s)"
        option("--chunk", type=positive, default=128, metavar="N", help=text)

    def settings(self) -> dict[str, Any]:
        return {"channels": CHANNELS, "tokens": self.args.tokens, "chunk": self.args.chunk}

    def run(self) -> None:
        args = self.args
        for operator, dtype, chunk in itertools.product(args.ops, args.dtypes, (None, args.chunk)):
            if dtype in OPERATORS[operator].dtypes:
                self.add(*case_rows(operator, dtype, (1, args.tokens, CHANNELS), chunk))

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        head = COLUMNS.format("operator", "pass", "dtype", "chunk", "bytes", "compulsory", "ratio", "loaded; stored")
        return "\n".join((head, *map(_line, record["rows"])))


main = Traffic.main

if __name__ == "__main__":
    sys.exit(main())
