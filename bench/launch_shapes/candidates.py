"""The launch shapes that tune.py tries, and how each is called."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from launch_shapes.choice import Cell
from torch import Tensor

from fastwkv.kernels import config
from fastwkv.kernels.config import Launch, Plan, checkpoint_rows
from fastwkv.kernels.launch import checkpoint_shape
from fastwkv.kernels.linear_scan import linear_scan_fwd
from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

CONFIG = Path(config.__file__)
H100 = 132  # multiprocessors, of an H200 too: kernels are compiled beforehand for the chunks that it needs
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PLANS = {  # by operator and pass, their names in kernels/config.py
    ("wkv", "forward"): "WKV_FORWARD",
    ("wkv", "backward"): "WKV_BACKWARD",
    ("linear_scan", "forward"): "SCAN_FORWARD",
    ("linear_scan", "backward"): "SCAN_BACKWARD",
}
ROWS = {"wkv": checkpoint_rows(4), "linear_scan": config.SCAN_ROWS}  # tokens that a chunk is a multiple of
STREAMS = {("wkv", "forward"): 3, ("wkv", "backward"): 5, ("linear_scan", "forward"): 3, ("linear_scan", "backward"): 5}

PROGRAMS = ((32, 1), (64, 2), (128, 4))  # channels and warps: rows of 64, 128 and 256 bytes in 16 bits
STAGES = (4, 5, 6)  # tiles
ALL = tuple((*program, stages) for stages in STAGES for program in PROGRAMS)
LIKELY = ((64, 2, 4), (128, 4, 4), (32, 1, 6), (64, 2, 6))
# The first shape is the one with most channels, every kernel of its own. The chunks of the others need three each.
SHAPES: dict[tuple[int, int, int], tuple[tuple[int, int, int], ...]] = {
    (8, 4096, 2048): ALL,
    (1, 65536, 1024): ((64, 2, 4),),
    (32, 1024, 1024): LIKELY,
    (8, 1024, 768): ((64, 2, 4),),
}
CHUNKED = ((1, 65536, 1024), (8, 1024, 768))  # shapes whose number of chunks is in question
REHEARSED = {"bfloat16": (8, 4096, 2048), "float32": (1, 65536, 1024)}
WARPS = (4, 6, 8, 12, 16, 24)  # a multiprocessor, that time is split for
ROW_BYTES = (90, 130, 200)  # of a row, a multiprocessor: (8, 1024, 768) has 93 in bfloat16 and 186 in float32


@dataclass(frozen=True)
class Case:
    """A cell, and the plans that are tried on it."""

    cell: Cell
    now: Plan
    plans: tuple[Plan, ...]
    """Others than that in use."""
    multiprocessors: int = H100
    rehearsal: bool = False
    """Whether tensors are tiny: a tile and a token, a chunk each where a plan splits time."""

    @property
    def run_shape(self) -> tuple[int, int, int]:
        """B, T, C of the tensors."""
        return (1, ROWS[self.cell.op] + 1, 32) if self.rehearsal else self.cell.shape

    def launch(self, plan: Plan) -> Launch:
        """Return the shape of a launch that a plan makes of this case."""
        launch = launch_of(self.cell, plan, self.multiprocessors)
        if not self.rehearsal:
            return launch
        split = launch.chunk < self.cell.shape[1]
        return replace(launch, chunk=ROWS[self.cell.op] * (1 if split else 2))

    def launches(self) -> list[Launch]:
        """Return the launch shapes to measure, that in use first, each once."""
        return list(dict.fromkeys(map(self.launch, (self.now, *self.plans))))

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that every implementation has to move."""
        B, T, C = self.run_shape
        return STREAMS[self.cell.op, self.cell.which] * B * T * C * DTYPES[self.cell.dtype].itemsize


def plan_in_use(op: str, which: str) -> Plan:
    """Return the plan of a pass."""
    plan = getattr(config, PLANS[op, which])
    assert isinstance(plan, Plan)
    return plan


def launch_of(cell: Cell, plan: Plan, multiprocessors: int = H100) -> Launch:
    """Return the shape of a launch that a plan makes of a cell."""
    return plan.launch(*cell.shape, multiprocessors, DTYPES[cell.dtype].itemsize, ROWS[cell.op])


def variants(now: Plan, shape: tuple[int, int, int]) -> Iterator[Plan]:
    """Yield the plans that are tried beside that in use on a shape."""
    for block_c, num_warps, stages in SHAPES[shape]:
        yield replace(now, block_c=block_c, num_warps=num_warps, stages=stages)
    if shape in CHUNKED:
        yield from (replace(now, warps=warps) for warps in WARPS)
        yield from (replace(now, row_bytes=row_bytes) for row_bytes in ROW_BYTES)


def all_variants(now: Plan) -> list[Plan]:
    """Return the plans that are tried on any shape, each once."""
    return [plan for plan in dict.fromkeys(one for shape in SHAPES for one in variants(now, shape)) if plan != now]


def cases(multiprocessors: int = H100, rehearsal: bool = False) -> list[Case]:
    """Return what is measured, what is worth most first: 16 bits, large shapes. A rehearsal has less of all."""
    found = []
    for dtype in DTYPES:
        for shape in SHAPES:
            for op, which in PLANS:
                now = plan_in_use(op, which)
                plans = tuple(plan for plan in dict.fromkeys(variants(now, shape)) if plan != now)
                found.append(Case(Cell(op, dtype, shape, which), now, plans, multiprocessors))
    if not rehearsal:
        return found
    return [
        replace(one, plans=one.plans[:1], rehearsal=True)
        for one in found
        if one.cell.shape == REHEARSED[one.cell.dtype]
    ]


def draw(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Return what :func:`call` takes: of WKV rates and keys as a model has them, of the scan gates from 0.9 to 1."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": DTYPES[case.cell.dtype]}
    B, T, C = case.run_shape
    streams = [torch.randn(B, T, C, **options) for _ in range(2 + (case.cell.which == "backward"))]
    if case.cell.op == "wkv":
        rates = torch.linspace(-5, 3, C, device=device).exp(), torch.zeros(C, device=device)
        inputs = (*rates, *streams)
        if case.cell.which == "forward":
            return inputs
        k, v, gy = streams
        checkpoints = wkv_fwd(*rates, k, v, None, None, True, launch=case.launch(case.now))[2]
        return (*rates, k, v, checkpoints, gy)
    gates = 0.9 + 0.1 * torch.rand(B, T, C, **options)
    return (gates, *streams[1:])


def empty(case: Case) -> tuple[Tensor, ...]:
    """Return tensors like those of :func:`draw`, of nothing, on the CPU."""
    B, T, C = case.run_shape
    dtype = DTYPES[case.cell.dtype]
    stream = torch.empty(B, T, C, dtype=dtype)
    if case.cell.op == "wkv":
        inputs = (torch.empty(C), torch.empty(C), stream, stream)
        if case.cell.which == "forward":
            return inputs
        return (*inputs, torch.empty(checkpoint_shape(B, T, C, torch.float32)), stream)
    return (stream,) * (2 + (case.cell.which == "backward"))


def call(cell: Cell, tensors: Sequence[Tensor], launch: Launch) -> tuple[Tensor, ...]:
    """Run the pass with this launch shape; the forward pass of WKV keeps what its backward pass needs."""
    if cell.op == "wkv" and cell.which == "forward":
        return wkv_fwd(*tensors, None, None, True, launch=launch)
    if cell.op == "wkv":
        w, u, k, v, checkpoints, gy = tensors
        return wkv_bwd(w, u, k, v, None, None, checkpoints, gy, None, launch=launch)
    if cell.which == "forward":
        a, x = tensors
        return linear_scan_fwd(a, x, None, None, False, False, launch=launch)
    a, h, gh = tensors
    return linear_scan_bwd(a, h, None, None, False, False, gh, None, gh.dtype, launch=launch)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of :func:`cases`, by name."""
    for case in cases():
        for launch in case.launches():
            name = f"{case.cell} {launch.block_c},{launch.num_warps},{launch.stages} chunk {launch.chunk}"
            yield name, lambda case=case, launch=launch: call(case.cell, empty(case), launch)
