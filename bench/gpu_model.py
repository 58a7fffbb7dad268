"""What WKV should take on a GPU: a model's predictions from the machine code, nothing measured.

A kernel takes the longest of
- memory: the bytes that it loads and stores, over the copy bandwidth
- units: clocks of a multiprocessor an element, times the elements of the busiest multiprocessor
- latency: the time of one warp from its first token to its last, its loads waited for as its code does, times the
  rounds of programs on the busiest multiprocessor; "chain" is the same with loads that answer at once
A pass is the sum of its kernels, of what carries the state from chunk to chunk and of what every launch costs. The
fraction is that of the copy bandwidth, on the bytes that every implementation has to move. A real kernel overlaps the
terms less well than this; a memory that is not busy answers sooner.
"""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass

try:
    from command_line import Parser, names
    from compiled_gpu import LOAD_CYCLES, Figures
except ImportError as error:
    sys.exit(f"gpu_model.py: {error}; pip install -e '.[bench]' installs what it needs")

from fastwkv.kernels.config import CARRY_GROUP, Launch, wkv_launch

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (8, 1024, 768),
    (8, 4096, 2048),
    (8, 4096, 4096),
    (32, 1024, 1024),
    (1, 16384, 1024),
    (1, 65536, 1024),
    (1, 131072, 2560),
)
ITEMSIZE = {"bfloat16": 2, "float32": 4}
ACCUMULATOR = 4  # bytes of a state's number
LAUNCH_SECONDS = 3e-6  # assumed of every launch
CARRY_CLOCKS = 205  # of a chunk's summary, "wkv forward, carry" of compiled.py; a group of them waits once for memory


@dataclass(frozen=True)
class Device:
    """A GPU. Bandwidths are what a copy is expected to reach, clocks those that are held under load."""

    multiprocessors: int
    clock: float
    copy_bandwidth: float
    latency: float
    """Seconds until a load is answered on a busy memory."""


DEVICES = {
    "h200": Device(132, 1.755e9, 4.3e12, 0.8e-6),
    "h100": Device(132, 1.755e9, 3.0e12, 0.8e-6),
}


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


PASSES = {
    "forward": Pass(3, "wkv forward, nothing kept", "wkv forward, summary", 12, (1, 3)),
    "forward, saving": Pass(3, "wkv forward", "wkv forward, summary", 12, (1, 3)),
    "backward": Pass(5, "wkv backward", "wkv backward, summary", 16, (3, 5)),
}


@dataclass(frozen=True)
class Terms:
    """Seconds that a kernel takes at least, by what limits it."""

    memory: float
    units: float
    chain: float
    latency: float
    """At least :attr:`chain`."""

    @property
    def total(self) -> float:
        """The longest."""
        return max(self.memory, self.units, self.latency)


@dataclass(frozen=True)
class Prediction:
    """What the model says of a pass on a shape."""

    chunks: int
    warps: float
    """A multiprocessor, if all programs could be there at once."""
    moved: float
    """Bytes."""
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
    which: Pass, shape: Shape, itemsize: int, launch: Launch, kernels: Mapping[str, Figures], device: Device
) -> Prediction:
    """Return what a pass takes, with this launch shape and these figures of its kernels."""
    B, T, C = shape
    chunks = -(-T // launch.chunk)
    programs = B * chunks * -(-C // launch.block_c)
    used = [kernels[which.summary]] * (chunks > 1) + [kernels[which.finish]]
    # Nobody asks for the summary of the chunk at the end.
    shares = [1 - 1 / chunks] * (chunks > 1) + [1.0]
    moved = [share * (kernel.loaded + kernel.stored) * B * T * C for kernel, share in zip(used, shares, strict=True)]
    summaries = which.summary_numbers * ACCUMULATOR * B * chunks * C if chunks > 1 else 0
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
        launches=which.launches[chunks > 1] * LAUNCH_SECONDS,
        compulsory=which.elements * itemsize * B * T * C / device.copy_bandwidth,
    )


def compiled(dtype: str) -> dict[str, Figures]:
    """Compile the kernels of all passes for sm_90 and return their figures by name."""
    # Here, since kernels that are interpreted elsewhere in the process cannot be compiled.
    from compiled_variants import MODELLED, figures

    wanted = {name for one in PASSES.values() for name in (one.finish, one.summary)}
    return {one.name: figures(one, dtype, "sm_90") for one in MODELLED if one.name in wanted}


def main() -> None:
    parser = Parser(prog="gpu_model.py", description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--devices", type=names("device", DEVICES), default=["h200"], metavar="LIST", help=", ".join(DEVICES))
    option("--dtypes", type=names("dtype", ITEMSIZE), default=list(ITEMSIZE), metavar="LIST", help=", ".join(ITEMSIZE))
    args = parser.parse_args()

    try:
        kernels = {dtype: compiled(dtype) for dtype in args.dtypes}
    except ImportError as error:
        sys.exit(f"gpu_model.py: {error}; it needs Triton, which exists on Linux only")
    print("Predictions of a model, microseconds. Nothing here has been measured.")
    columns = "{:<6} {:<9} {:<16} {:<18} {:>6} {:>6} {:>8}" + " {:>8}" * 7 + " {:>8}  {}"
    terms = ("memory", "units", "chain", "latency", "carry", "launches", "total")
    print(columns.format("device", "dtype", "pass", "shape", "chunks", "warps", "GB", *terms, "fraction", "limit"))
    for name, dtype, shape in itertools.product(args.devices, args.dtypes, SHAPES):
        device = DEVICES[name]
        launch = wkv_launch(*shape, device.multiprocessors, ITEMSIZE[dtype])
        for which, one in PASSES.items():
            found = predict(one, shape, ITEMSIZE[dtype], launch, kernels[dtype], device)
            seconds = [*map(found.term, terms[:4]), found.carry, found.launches, found.total]
            figures_shown = f"{found.warps:.1f}", f"{found.moved / 1e9:.3f}", *(f"{1e6 * s:.1f}" for s in seconds)
            text = "x".join(map(str, shape))
            print(
                columns.format(
                    name, dtype, which, text, found.chunks, *figures_shown, f"{found.fraction:.2f}", found.limit
                )
            )


if __name__ == "__main__":
    main()
