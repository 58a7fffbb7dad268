"""What every check of correctness does with a case: compare, run again, replay from a CUDA graph, print a row."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_minutes.journal import emit
from gpu_minutes.reference import relative_errors
from precompiled import triton_keys
from torch import Tensor

Results = dict[str, Tensor]

ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of what is stored in 16 bits


@dataclass(frozen=True)
class Check:
    """A case: what is launched, what it should give, and how far from that it may be."""

    name: str
    launch: Callable[[], Results]
    """Runs the kernels and returns their results; the same inputs each time."""
    wanted: Callable[[], Results]
    bounds: dict[str, float]
    recorded: bool = True
    """Whether it is also replayed from a CUDA graph."""


Prepare = Callable[[torch.device], Check]


@dataclass(frozen=True)
class Case:
    """A case whose tensors are made when its turn comes."""

    name: str
    prepare: Prepare
    short: bool = True
    """Whether it is looked at under compute-sanitizer, too."""
    public: bool = False
    """Whether it calls a public function, which may launch what no short case does."""


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
    wanted = check.wanted()
    if found.keys() != wanted.keys() or not wanted.keys() <= check.bounds.keys():
        raise ValueError(f"results {sorted(found)}, expected {sorted(wanted)}, bounds {sorted(check.bounds)}")
    errors = relative_errors(found, wanted)
    worst = max(errors, key=lambda name: _excess(errors[name], check.bounds[name]))
    complaints = [
        f"{name} {errors[name]:.1e} > {check.bounds[name]:.0e}"
        for name in errors
        if not errors[name] <= check.bounds[name]  # NaN is not
    ]
    if not wrong:
        complaints += _differences("the second time", found, check.launch())
        if check.recorded and device.type == "cuda":
            complaints += _differences("from a CUDA graph", found, replayed(check.launch))
    row = {"worst": worst, "relative_error": errors[worst], "bound": check.bounds[worst]}
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


def reason(error: Exception) -> str:
    """Return the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


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

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    return normal


def launched(cases: Iterable[Case]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return the launches of cases with CPU tensors, as precompile.py makes them.

    No length is compiled for, so short cases stand for the others that call the launchers.
    """
    cpu = torch.device("cpu")
    for case in cases:
        if case.short or case.public:
            yield case.name, lambda case=case: case.prepare(cpu).launch()
