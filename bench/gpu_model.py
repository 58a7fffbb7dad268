"""Times that the operators should take on a GPU: a model's predictions from the machine code.

A kernel takes the longest of
- memory: the bytes that it loads and stores, over the copy bandwidth
- units: clocks of a multiprocessor an element, times the elements of the busiest multiprocessor
- latency: the time of one warp from its first token to its last, its loads waited for as its code does, times the
  rounds of programs on the busiest multiprocessor; "chain" is the same with loads that answer at once
A pass is the sum of its kernels, of what carries the state from chunk to chunk and of what every launch costs. The
fraction is that of the copy bandwidth, on the bytes that every implementation has to move. A real kernel overlaps the
terms less well than this; a memory that is not busy answers sooner. Written to gpu_model.json as well.

The figures of a device are assumed, or taken from what tune.py has measured there: from --measured, or from the results
beside this program where they have such a file. The table says which.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

try:
    from common.command_line import Parser, names
    from common.program import Program
    from machine_code.costs import LOAD_CYCLES, Figures
    from machine_code.devices import DEVICES, Device, devices_of, source_lines
    from peers.operator import GPU_SHAPES, Shape, shape_name
except ImportError as error:
    sys.exit(f"gpu_model.py: {error}; pip install -e '.[bench]' installs what it needs")

from fastwkv.kernels.config import CARRY_GROUP, Launch, scan_launch, wkv_launch

TARGET = "sm_90"  # of the GPUs that it knows
ITEMSIZE = {"bfloat16": 2, "float32": 4, "complex64": 8, "bfloat16x2": 4}
ACCUMULATOR = {"bfloat16": 4, "float32": 4, "complex64": 8, "bfloat16x2": 8}  # bytes of a state's number
TERMS = ("memory", "units", "chain", "latency")  # of a kernel
COLUMNS = "{:<6} {:<17} {:<10} {:<16} {:<18} {:>6} {:>6} {:>8}" + " {:>8}" * 7 + " {:>8}  {}"
CARRY_CLOCKS = 205  # of a chunk's summary, "wkv forward, carry" of compiled.py; a group of them waits once for memory


@dataclass(frozen=True)
class Pass:
    """A pass of an operator and the variants of its kernels."""

    elements: int
    """Numbers that every implementation has to load and store for each token and channel."""
    finish: str
    """The kernel that walks along the tokens."""
    summary: str
    """The one that does so before, if time is split."""
    summary_numbers: int
    """Numbers that pass through memory for each chunk and channel, written and read."""
    launches: tuple[int, int]
    """Without chunks and with them, sums over the chunks included."""


@dataclass(frozen=True)
class Operator:
    """An operator as the model knows it."""

    passes: dict[str, Pass]
    launch: Callable[[int, int, int, int, int, bool], Launch]
    dtypes: tuple[str, ...]


def _scan(kind: str, elements: tuple[int, int], launches: tuple[int, int]) -> dict[str, Pass]:
    names = {way: (f"scan {way}{kind}", f"scan {way}, summary{kind}") for way in ("forward", "backward")}
    return {
        "forward": Pass(elements[0], *names["forward"], 6, (1, 3)),
        "backward": Pass(elements[1], *names["backward"], 6, launches),
    }


OPERATORS = {
    "wkv": Operator(
        {
            "forward": Pass(3, "wkv forward, nothing kept", "wkv forward, summary", 12, (1, 3)),
            "forward, saving": Pass(3, "wkv forward", "wkv forward, summary", 12, (1, 3)),
            "backward": Pass(5, "wkv backward", "wkv backward, summary", 16, (2, 4)),
        },
        wkv_launch,
        ("bfloat16", "float32"),
    ),
    "linear_scan": Operator(_scan("", (3, 5), (1, 3)), scan_launch, ("bfloat16", "float32", "complex64")),
    "linear_scan_fixed": Operator(
        _scan(", fixed a", (2, 3), (2, 4)), scan_launch, ("bfloat16", "float32", "complex64", "bfloat16x2")
    ),
}


@dataclass(frozen=True)
class Terms:
    """Seconds that a kernel takes at least, by what limits it."""

    memory: float
    units: float
    chain: float
    latency: float  # at least that of the chain

    @property
    def total(self) -> float:
        """The longest."""
        return max(self.memory, self.units, self.latency)


@dataclass(frozen=True)
class Prediction:
    """The model's figures of a pass on a shape."""

    chunks: int
    warps: float  # a multiprocessor, if all programs could be there at once
    moved: float  # bytes
    kernels: tuple[Terms, ...]
    carry: float
    launches: float
    compulsory: float
    """Seconds for the compulsory bytes at the copy bandwidth."""

    def term(self, name: str) -> float:
        """Return one of the terms of all kernels together."""
        return sum(getattr(kernel, name) for kernel in self.kernels)

    @property
    def total(self) -> float:
        """Seconds."""
        return self.term("total") + self.carry + self.launches

    @property
    def fraction(self) -> float:
        """Of the copy bandwidth, on compulsory bytes."""
        return self.compulsory / self.total

    @property
    def limit(self) -> str:
        """The term that takes longest; the latency of a warp that hardly waits for memory is its chain."""
        terms = {name: self.term(name) for name in ("memory", "units", "latency")}
        terms |= {"carry": self.carry, "launches": self.launches}
        longest = max(terms, key=lambda name: terms[name])
        waits = self.term("latency") > 1.5 * self.term("chain")
        return "chain" if longest == "latency" and not waits else longest


def kernel_terms(kernel: Figures, programs: int, tokens: int, moved: float, device: Device) -> Terms:
    """Return what a kernel takes: ``programs`` of block_c channels that walk through ``tokens`` and move these bytes.

    memory = moved / bandwidth; units = programs on the busiest multiprocessor * tokens * block_c * clocks / clock;
    chain, latency = rounds * tokens * cycles / clock, those of a warp whose loads answer at once, or after the latency.
    """
    busiest = -(-programs // device.multiprocessors)
    rounds = -(-busiest // (kernel.warps // kernel.num_warps))
    waits = (kernel.waiting - kernel.cycles) * device.latency * device.clock / LOAD_CYCLES
    return Terms(
        memory=moved / device.copy_bandwidth,
        units=busiest * tokens * kernel.block_c * kernel.clocks / device.clock,
        chain=rounds * tokens * kernel.cycles / device.clock,
        latency=rounds * tokens * (kernel.cycles + waits) / device.clock,
    )


def predict(
    which: Pass,
    shape: Shape,
    itemsize: int,
    launch: Launch,
    kernels: Mapping[str, Figures],
    device: Device,
    accumulator: int = 4,
) -> Prediction:
    """Return what a pass takes, with this launch shape and these figures of its kernels."""
    B, T, C = shape
    chunks = -(-T // launch.chunk)
    programs = B * chunks * -(-C // launch.block_c)
    used = [kernels[which.summary]] * (chunks > 1) + [kernels[which.finish]]
    # The chunk at the end needs no summary.
    shares = [1 - 1 / chunks] * (chunks > 1) + [1.0]
    moved = [share * kernel.moved * B * T * C for kernel, share in zip(used, shares, strict=True)]
    summaries = which.summary_numbers * accumulator * B * chunks * C if chunks > 1 else 0
    terms = [
        kernel_terms(kernel, round(share * programs), min(T, launch.chunk), bytes_moved, device)
        for kernel, share, bytes_moved in zip(used, shares, moved, strict=True)
    ]
    carry = 0.0
    if chunks > 1:
        waits = -(-chunks // CARRY_GROUP) * device.latency
        carry = waits + chunks * CARRY_CLOCKS / device.clock + summaries / device.copy_bandwidth
    return Prediction(
        chunks=chunks,
        warps=programs * launch.num_warps / device.multiprocessors,
        moved=sum(moved) + summaries,
        kernels=tuple(terms),
        carry=carry,
        launches=which.launches[chunks > 1] * device.launch,
        compulsory=which.elements * itemsize * B * T * C / device.copy_bandwidth,
    )


def compiled(operator: str, dtype: str, program: Launch | None = None) -> dict[str, Figures]:
    """Compile the kernels of all passes of an operator, with another program or the usual; their figures by name."""
    # Here, since kernels that are interpreted elsewhere in the process cannot be compiled.
    from machine_code.variants import MODELLED, figures

    wanted = {name for one in OPERATORS[operator].passes.values() for name in (one.finish, one.summary)}
    return {one.name: figures(one, dtype, TARGET, program) for one in MODELLED if one.name in wanted}


def model_rows(
    gpu: str,
    device: Device,
    operator: str,
    dtype: str,
    kernels: Mapping[str, Figures],
    program: Launch | None = None,
) -> list[dict[str, Any]]:
    """Return what the model says of every shape and pass of an operator on a GPU, chunks being as usual."""
    op, found = OPERATORS[operator], []
    for shape in GPU_SHAPES:
        for which, one in op.passes.items():
            launch = op.launch(*shape, device.multiprocessors, ITEMSIZE[dtype], which == "backward")
            launch = replace(program, chunk=launch.chunk) if program else launch
            predicted = predict(one, shape, ITEMSIZE[dtype], launch, kernels, device, ACCUMULATOR[dtype])
            row: dict[str, Any] = {"gpu": gpu, "op": operator, "dtype": dtype, "pass": which}
            row |= dict(zip("BTC", shape, strict=True))
            row |= {"chunks": predicted.chunks, "warps": predicted.warps, "moved_bytes": predicted.moved}
            seconds = {name: predicted.term(name) for name in TERMS}
            seconds |= {name: getattr(predicted, name) for name in ("carry", "launches", "total")}
            found.append(row | {"seconds": seconds, "fraction": predicted.fraction, "limit": predicted.limit})
    return found


def _line(row: dict[str, Any]) -> str:
    shape = shape_name((row["B"], row["T"], row["C"]))
    microseconds = (f"{1e6 * seconds:.1f}" for seconds in row["seconds"].values())
    numbers = row["chunks"], f"{row['warps']:.1f}", f"{row['moved_bytes'] / 1e9:.3f}", *microseconds
    return COLUMNS.format(
        row["gpu"], row["op"], row["dtype"], row["pass"], shape, *numbers, f"{row['fraction']:.2f}", row["limit"]
    )


def program_of(text: str) -> Launch:
    """Read channels, warps and tiles of a program; a lane has one channel, as the number of chunks is chosen for."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 3 or numbers[0] not in (32, 64, 128, 256) or numbers[0] != 32 * numbers[1] or numbers[2] < 2:
        raise argparse.ArgumentTypeError(f"expected channels, warps and tiles such as 64,2,5, got {text!r}")
    return Launch(numbers[0], numbers[1], 0, numbers[2])


class Model(Program):
    """The program."""

    name = "gpu_model"
    computes = True

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        for kind, known, default in (("device", DEVICES, ["h200"]), ("op", OPERATORS, None), ("dtype", ITEMSIZE, None)):
            text = ", ".join(known)
            option(f"--{kind}s", type=names(kind, known), default=default or list(known), metavar="LIST", help=text)
        option("--measured", type=Path, metavar="FILE", help="of tune.py (default: those of bench/results)")
        option("--program", type=program_of, metavar="C,W,S", help="channels, warps and tiles (default: those in use)")

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        args.known = devices_of(args, parser)

    def settings(self) -> dict[str, Any]:
        every = {name: (asdict(device), known) for name, (device, known) in self.args.known.items()}
        assumed = {name: {key: one[key] for key in one if key not in known} for name, (one, known) in every.items()}
        found = {"target": TARGET, "assumed": assumed, "measured": {name: known for name, (_, known) in every.items()}}
        program = asdict(self.args.program) if self.args.program else None
        return found | {"carry_clocks": CARRY_CLOCKS, "program": program}

    def run(self) -> None:
        args = self.args
        cases = [(op, dtype) for op in args.ops for dtype in args.dtypes if dtype in OPERATORS[op].dtypes]
        try:
            kernels = {case: compiled(*case, args.program) for case in cases}
        except ImportError as error:
            sys.exit(f"gpu_model.py: {error}; it needs Triton, which exists on Linux only")
        for gpu, case in itertools.product(args.known, cases):
            self.add(*model_rows(gpu, args.known[gpu][0], *case, kernels[case], args.program))

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        settings, terms = record["settings"], (*TERMS, "carry", "launches", "total")
        titles = ("device", "op", "dtype", "pass", "shape", "chunks", "warps", "GB", *terms, "fraction", "limit")
        return "\n".join((
            "Predictions of a model, microseconds. Nothing here has been measured but what is said to be of a device.",
            *source_lines(settings["measured"], settings["assumed"]),
            COLUMNS.format(*titles),
            *map(_line, record["rows"]),
        ))  # fmt: skip


main = Model.main

if __name__ == "__main__":
    sys.exit(main())
