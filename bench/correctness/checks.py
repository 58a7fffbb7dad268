"""The check of a case: compare with float64, run again, replay from a CUDA graph, print a row."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common.light import emit, reason
from correctness.reference import relative_errors
from precompiled import triton_keys
from torch import Tensor

Results = dict[str, Tensor]

ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of what is stored in 16 bits
BATCH = 2
# Tokens, those of a chunk where time is cut, and offsets where sequences are packed: chunks of one block of rows and of
# several, sequences of one token, and such as start and end inside, at the edge of and across chunks.
LENGTHS: dict[int, tuple[int, list[int]]] = {
    1: (16, [0, 1]),
    16: (16, [0, 5, 16]),
    83: (16, [0, 5, 32, 33, 83]),
    1000: (112, [0, 5, 112, 113, 300, 301, 1000]),
}
REHEARSED = {19: (16, [0, 5, 19])}
LONG = 1000


@dataclass(frozen=True)
class Check:
    """A launch, the results that it should give, and how far from them each may be."""

    launch: Callable[[], Results]
    """Runs the kernels and returns their results; the same inputs each time."""
    wanted: Callable[[], Results]
    bounds: dict[str, float]
    recorded: bool = True
    """Whether it is also replayed from a CUDA graph."""


@dataclass(frozen=True)
class Case:
    """A check whose tensors are made when its turn comes."""

    name: str
    prepare: Callable[[torch.device], Check]
    short: bool = True
    """Whether it is looked at under compute-sanitizer, too."""
    public: bool = False
    """Whether it calls a public function, which may launch what no short case does."""


@dataclass(frozen=True)
class Form:
    """The properties that decide, beside the dtype, which kernels of an operator run."""

    C: int
    state: bool = False
    packed: bool = False
    chunks: bool = False
    log: bool = False
    fixed: bool = False
    reverse: bool = False

    def __str__(self) -> str:
        """As rows name it."""
        kinds = [name for name, value in vars(self).items() if value is True]
        return f"C={self.C} {' '.join(kinds) or 'plain'}"


def cases_of(
    forms: Iterable[Form],
    rehearse: bool,
    launched: Callable[..., Check],
    public: Callable[..., Check] | None,
    strained: str,
    strains: Callable[[Form], bool],
) -> Iterator[Case]:
    """Yield the cases of an operator: every form at every length, by the launchers and by the public function.

    Both take a form, the tokens, those of a chunk and offsets, and the device. Of forms of which ``strains`` is true
    there is a case that strains the arithmetic, called ``strained``.
    """
    lengths = REHEARSED if rehearse else LENGTHS
    for form in forms:
        for T, given in lengths.items():
            if given[0] < T or not form.chunks:
                yield Case(f"T={T} {form}", partial(launched, form, T, *given), short=T < LONG)
        if rehearse:
            continue
        if public:
            T = LONG if form.chunks else 83  # for which it chooses to cut time, or not to
            yield Case(f"T={T} {form} public", partial(public, form, T, *LENGTHS[T]), short=False, public=True)
        if strains(form):
            prepare = partial(launched, form, LONG, *LENGTHS[LONG], strained=True)
            yield Case(f"T={LONG} {form} {strained}", prepare, short=False)


def run(group: str, cases: Iterable[Case], device: torch.device) -> int:
    """Check all cases, a row each; return the exit status. A device that is lost ends it."""
    failed = False
    for case in cases:
        row: dict[str, Any] = {"what": "case", "group": group, "case": case.name}
        try:
            row |= compared(case.prepare(device), device, wrong=os.environ.get("FASTWKV_WRONG") == group)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            row["error"] = reason(error)
        failed |= "error" in row
        emit(**row)
        if "error" in row and (lost := lost_device(device)):
            emit(what="lost", group=group, error=f"after this case the device answers nothing more: {lost}")
            return 1
    return int(failed)


def compared(check: Check, device: torch.device, *, wrong: bool = False) -> dict[str, Any]:
    """Return the largest error beside its bound, of all results, and what else is not as it should be."""
    found = check.launch()
    if wrong:
        first = next(iter(found))
        found[first] = found[first] * 1.5
    wanted, bounds = check.wanted(), check.bounds
    if found.keys() != wanted.keys() or not wanted.keys() <= bounds.keys():
        raise ValueError(f"results {sorted(found)}, expected {sorted(wanted)}, bounds {sorted(bounds)}")
    errors = relative_errors(found, wanted)
    worst = max(errors, key=lambda name: _excess(errors[name], bounds[name]))
    beyond = [name for name in errors if not errors[name] <= bounds[name]]  # NaN is not
    complaints = [f"{name} {errors[name]:.1e} > {bounds[name]:.0e}" for name in beyond]
    if not wrong:
        complaints += _differences("the second time", found, check.launch())
        if check.recorded and device.type == "cuda":
            complaints += _differences("from a CUDA graph", found, replayed(check.launch))
    row = {"worst": worst, "relative_error": errors[worst], "bound": bounds[worst]}
    return row | ({"error": "; ".join(complaints)} if complaints else {})


def _excess(error: float, bound: float) -> float:
    if error != error:
        return float("inf")
    return error / bound if bound else float(error > 0)


def _differences(when: str, found: Results, again: Results) -> list[str]:
    bits = {name: (_bits(found[name]), _bits(again[name])) for name in found}
    unequal = torch.stack([(one != other).any() for one, other in bits.values()]).tolist()
    other = [name for name, differs in zip(bits, unequal, strict=True) if differs]
    return [f"other bits {when}: {', '.join(other)}"] if other else []


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def replayed(launch: Callable[[], Results]) -> Results:
    """Return the results of a CUDA graph of the launches, replayed once."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = launch()
    graph.replay()
    torch.cuda.synchronize()
    return {name: result.clone() for name, result in results.items()}


def lost_device(device: torch.device) -> str | None:
    """Return what the device says if it does nothing more in this process."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        return reason(error)
    return None


def the_device(rehearse: bool) -> torch.device:
    """Return the GPU, or the CPU for a rehearsal; end the program if there is no GPU."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here; --rehearse runs everything on a CPU")
    triton_keys.settle()  # kernels compiled beforehand are found
    return torch.device("cuda", torch.cuda.current_device())


def draws(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """Return a function that draws normal numbers in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    return partial(torch.randn, generator=generator, dtype=torch.float64, device=device)


def wide(t: Tensor) -> Tensor:
    """Return a copy in float64 or complex128."""
    return t.to(torch.promote_types(t.dtype, torch.float64), copy=True)
