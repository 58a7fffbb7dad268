"""Questions of tests about launches to a process in which kernels are not interpreted; as a program, it prints JSON.

Triton's own answer is taken from Triton: it returns the kernel that it started, one for each of its keys.
"""

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from machine_code import stand_in
from triton.runtime.jit import JITFunction

import fastwkv
from fastwkv.kernels import held
from fastwkv.kernels.linear_scan import linear_scan_fwd
from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

GRID = (3, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
NUMBERS = (0, 1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 16, 2**63 - 1, 2**63, -1, -16, -(2**31), -(2**31) - 1)
NUMBERS += (1.0, 0.5, True, False)
CONSTANTS = {"C": (1, 1.0, True, 16, 17), "FLAG": (None, True, False)}
OPTIONS = {
    "num_warps": (1, 4),
    "num_stages": (2, 3),
    "maxnreg": (128, 255),
    "enable_fp_fusion": (True, False),
    "debug": (True, False),
}


@triton.jit(do_not_specialize=["m"])
def probe(a_ptr, b_ptr, c_ptr, n, m, C: tl.constexpr, FLAG: tl.constexpr = None):
    pass


@triton.jit(do_not_specialize=["m"])
def other_probe(a_ptr, b_ptr, c_ptr, n, m, C: tl.constexpr, FLAG: tl.constexpr = None):
    pass


class Ran:
    """The last launch, whoever started it: (kernel, grid and stream, arguments)."""

    def __init__(self) -> None:
        self.last: Any = None
        stand_in.NotCompiled.run = lambda kernel, *given: setattr(self, "last", (kernel, given[:4], given[9:]))


def triton_runs() -> list[str]:
    """Return a list that grows by the name of a kernel whenever Triton's own launch is entered."""
    entered, run = [], JITFunction.run

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        entered.append(kernel.__name__)
        return run(kernel, *args, **options)

    JITFunction.run = counted
    return entered


def draw_tensor(draw: random.Random) -> torch.Tensor | None:
    """Return a tensor of one of few dtypes, aligned or not."""
    memory = torch.empty(64, dtype=draw.choice(DTYPES))
    return memory[draw.choice((0, 0, 1, 16)) :]


def draw_call(draw: random.Random) -> tuple[Any, ...]:
    """Return kernel, tensors, numbers and constants of a launch."""
    tensors = [draw_tensor(draw), *(draw.choice((draw_tensor(draw), None)) for _ in range(2))]
    draw.shuffle(tensors)
    numbers = draw.choice(NUMBERS), draw.choice(NUMBERS)
    named = {name: draw.choice(values) for name, values in CONSTANTS.items() if name == "C" or draw.random() < 0.5}
    named |= {name: draw.choice(values) for name, values in OPTIONS.items() if draw.random() < 0.3}
    return draw.choice((probe, other_probe)), tensors, numbers, held.constants(**named)


def varied(call: tuple[Any, ...], draw: random.Random) -> tuple[Any, ...]:
    """Return the call with one thing changed."""
    kernel, tensors, numbers, constants = call
    other = draw_call(draw)
    part = draw.randrange(4)
    if part == 1:
        at = draw.randrange(3)
        changed = [draw_tensor(draw) if i == at else tensor for i, tensor in enumerate(tensors)]
        return kernel, changed, numbers, constants
    return tuple(theirs if i == part else ours for i, (ours, theirs) in enumerate(zip(call, other, strict=True)))


def keys() -> dict[str, Any]:
    """Start random launches, each twice, on two devices, and let Triton start them too."""
    draw, ran, entered = random.Random(0), Ran(), triton_runs()
    calls = [draw_call(draw)]
    for _ in range(400):
        calls.append(varied(calls[-1], draw) if draw.random() < 0.8 else draw_call(draw))
    of_key: dict[Any, set[int]] = {}
    wrong, kernels, fast = [], [], 0
    for _ in range(2):
        with stand_in.stand_in(compiles=False) as device:
            for kernel, *given in calls:
                held.start(kernel, GRID, *given)
                before = len(entered)
                held.start(kernel, GRID, *given)
                ours, fast = ran.last, fast + (len(entered) == before)
                tensors, numbers, constants = given
                compiled = kernel[GRID](*tensors, *numbers, **constants)
                if not (ours[0] is ran.last[0] is compiled and _same(ours[1:], ran.last[1:])):
                    wrong.append(repr((kernel.__name__, numbers, dict(constants))))
                kernels.append(compiled)  # kept, so that none gets the id of another
                of_key.setdefault(held._key(kernel, device.index, *given), set()).add(id(compiled))
    return {
        "wrong": wrong[:5],
        "kernels of a key": max(map(len, of_key.values())),
        "keys": len(of_key),
        "kernels": len(set(map(id, kernels))),
        "calls": len(kernels),
        "past Triton": fast,
    }


def _same(ours: Any, theirs: Any) -> bool:
    """Whether grid and stream are equal, and arguments: tensors are the same, numbers and constants equal."""
    (where, arguments), (there, wanted) = ours, theirs
    same = all(a is b for a, b in zip(arguments[:3], wanted[:3], strict=True))
    return same and where == there and arguments[3:] == wanted[3:]


def lengths() -> dict[str, list[str]]:
    """Return which kernels a new length asks for, at widths of every residue, once short and long ones were seen."""
    new: dict[str, list[str]] = {}
    for C in (*range(1, 18), 50, 96):
        with stand_in.stand_in(compiles=False) as device:
            for T in (16, 5000, 17, 1, 2, 3, 255, 256, 384, 512, 1000, 1024, 4096):
                before = len(device.kernels)
                for dtype in (torch.bfloat16, torch.float32, torch.complex64):
                    _passes(C, T, dtype)
                if T not in (16, 5000):
                    new[f"C = {C}, T = {T}"] = [kernel.name for kernel in device.kernels[before:]]
    return {case: names for case, names in new.items() if names}


def _passes(C: int, T: int, dtype: torch.dtype) -> None:
    x, a = torch.empty(1, T, C, dtype=dtype), torch.empty(C, dtype=dtype)
    for given in (a, x):
        h, _ = linear_scan_fwd(given, x, None, None, False, False)
        linear_scan_bwd(given, h, None, None, False, False, x, None, dtype)
    if not dtype.is_complex:
        w, u = torch.empty(C), torch.empty(C)
        saved = wkv_fwd(w, u, x, x, None, None, True)[2]
        wkv_bwd(w, u, x, x, None, None, saved, x, None)


def left_to_triton() -> dict[str, int]:
    """Return how often Triton's own launch is entered by a launch that is held, in every mode that is not usual."""
    entered, counts = triton_runs(), {}
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    call = [torch.empty(4)] * 3, (5, 5), held.constants(C=1)

    def count(mode: str) -> None:
        before = len(entered)
        held.start(probe, GRID, *call)
        counts[mode] = len(entered) - before

    with stand_in.stand_in(compiles=False):
        count("new")
        count("held")
        for mode, hooks in (("enter", runtime.launch_enter_hook), ("exit", runtime.launch_exit_hook)):
            hooks.add(print_nothing)
            count(f"hook at {mode}")
            hooks.remove(print_nothing)
        probe.add_pre_run_hook(print_nothing)
        count("hook before")
        probe.pre_run_hooks.clear()
        runtime.debug = True
        count("debug")
        runtime.debug = False
        compilation.instrumentation_mode, usual = "iisan", compilation.instrumentation_mode
        count("instrumentation")
        compilation.instrumentation_mode = usual
        known, held._KNOWN = held._KNOWN, False
        count("unknown version")
        held._KNOWN = known
        count("held again")
    return counts


def print_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a hook."""


def devices() -> list[Any]:
    """Return where a launch is started whose tensors are on another device than the current one."""
    current, seen = [0], []

    class Switched:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    ran = Ran()
    device = stand_in.StandIn()
    device.get_current_device = lambda: current[-1]
    device.get_current_stream = lambda index: 100 + index
    torch.cuda.device = Switched
    tensor = SimpleNamespace(dtype=torch.float32, data_ptr=lambda: 256, get_device=lambda: tensor.index)
    with stand_in.stand_in(device, compiles=False):
        for index in (1, 1, 0, 0, 1):
            tensor.index = index
            held.start(probe, GRID, [tensor, None, None], (5, 5), held.constants(C=1))
            seen.append((ran.last[1][3], current[-1], id(ran.last[0])))
    return [streams for *streams, _ in seen] + [len({kernel for *_, kernel in seen})]


def calls() -> dict[str, list[str]]:
    """Return the kernels for which Triton's own launch is entered at the second call of each public function."""
    library = torch.library.Library("fastwkv", "IMPL")
    for function in (wkv_fwd, wkv_bwd, linear_scan_fwd, linear_scan_bwd):
        library.impl(function.__name__, function, "CPU", allow_override=True)
    entered, found = triton_runs(), {}
    (w, u), (k, v) = torch.rand(2, 8), torch.rand(2, 1, 700, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 300, 700])
    public = {
        "wkv": lambda **packed: fastwkv.wkv(w, u, k, v, **packed),
        "linear_scan": lambda **packed: fastwkv.linear_scan(k, v, **packed),
        "linear_scan, fixed": lambda **packed: fastwkv.linear_scan(w, v, **packed),
    }
    with stand_in.stand_in(compiles=False):
        for name, function in public.items():
            for packed in ({}, {"cu_seqlens": cu_seqlens}):
                for _ in range(2):
                    before = len(entered)
                    function(**packed).sum().backward()
                    found[f"{name} {' '.join(packed)}".strip()] = entered[before:]
    found["first calls"] = entered
    return found


if __name__ == "__main__":
    known = {"keys": keys, "lengths": lengths, "left_to_triton": left_to_triton, "devices": devices, "calls": calls}
    json.dump(known[sys.argv[1]](), sys.stdout)
