"""The cases of ops.py: operators, dtypes, shapes, passes and providers, by default or as asked for."""

import argparse
from dataclasses import dataclass

import torch
from common.command_line import COMPLEX_DTYPES, DTYPES, Parser, sizes
from peers.operator import GPU_SHAPES, Inputs, Operator, Shape, documents, shape_name
from peers.operators import OPERATORS
from peers.provider import Provider
from throughput.passes import PASSES

ALL_DTYPES = DTYPES | COMPLEX_DTYPES
PROVIDERS = tuple(dict.fromkeys(name for operator in OPERATORS.values() for name in operator.all_providers()))
CPU_PASSES = ("forward", "forward+backward", "step")


@dataclass(frozen=True)
class Layout:
    """A shape, and whether its tokens are packed documents."""

    shape: Shape
    packed: bool = False

    def __str__(self) -> str:
        """As --shapes takes it."""
        return shape_name(self.shape) + "p" * self.packed


GPU_LAYOUTS = [*map(Layout, GPU_SHAPES), Layout((1, 65536, 1024), packed=True)]


@dataclass(frozen=True)
class Case:
    """An operator, its inputs, the passes that are timed and the providers that compute it."""

    operator: Operator
    dtype: str
    layout: Layout
    passes: tuple[str, ...]
    providers: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        """B, T, C."""
        return self.layout.shape

    def callers(self) -> list[Provider]:
        """Return the providers."""
        return [self.operator.all_providers()[name] for name in self.providers]

    def draw(self, seed: int, device: torch.device) -> Inputs:
        """Draw the inputs."""
        inputs = self.operator.draw("ordinary", self.shape, ALL_DTYPES[self.dtype], seed, device)
        return inputs.packed(documents(self.shape[1], seed)) if self.layout.packed else inputs


def layouts(text: str) -> list[Layout]:
    """Read shapes such as 8x1024x768, of packed documents with a p behind them."""
    found = []
    for part in map(str.strip, text.split(",")):
        shape = sizes(part.removesuffix("p"), "4x1024x768")
        packed = part.endswith("p")
        if packed and shape[0] != 1:
            raise argparse.ArgumentTypeError(f"packed documents are a batch of one, got {part!r}")
        found.append(Layout((shape[0], shape[1], shape[2]), packed))
    return list(dict.fromkeys(found))


def cases(args: argparse.Namespace, parser: Parser) -> list[Case]:
    """Return what is asked for and exists: an operator leaves out the dtypes and providers that it has not."""
    gpu = args.device.type == "cuda"
    passes = args.passes or (tuple(PASSES) if gpu else CPU_PASSES)
    found = []
    for operator in (OPERATORS[name] for name in args.ops):
        dtypes = args.dtypes or (operator.gpu_dtypes if gpu else (operator.default_dtype,))
        providers = tuple(name for name in operator.all_providers() if name in (args.providers or PROVIDERS))
        stepped = set()
        for layout in _layouts(operator, args, gpu):
            B, _, C = layout.shape
            # One token is the same at every T, and nothing that could be packed.
            again = layout.packed or (B, C) in stepped
            stepped.add((B, C))
            here = tuple(which for which in passes if which != "step" or not again)
            for dtype in dtypes:
                if dtype in operator.dtypes and providers and here:
                    found.append(Case(operator, dtype, layout, here, providers))
    if not found:
        parser.error("nothing to measure: no operator of --ops has one of --dtypes and one of --providers")
    return found


def _layouts(operator: Operator, args: argparse.Namespace, gpu: bool) -> list[Layout]:
    if args.shapes:
        return args.shapes
    if args.quick:
        return [Layout(shape) for shape in operator.quick_shapes]
    return GPU_LAYOUTS if gpu else [Layout(shape) for shape in operator.shapes]


def default_shapes() -> str:
    """Say which shapes are measured if none are asked for."""
    cpu = (f"{name}: {','.join(map(shape_name, op.shapes))}" for name, op in OPERATORS.items())
    return f"on a GPU {','.join(map(str, GPU_LAYOUTS))}; on a CPU {'; '.join(cpu)}"
