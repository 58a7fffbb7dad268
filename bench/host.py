"""Cost of a call to the host: the time of Python and PyTorch around kernels that do nothing, in microseconds.

A call of torch.ops of an empty operator with the same arguments is PyTorch's own share, with results made beforehand or
allocated at the call; what an operator takes beyond that is this package's. Each figure is the processor time of this
process, the least of several rounds in which all are timed in turn. A machine without a GPU has a driver that runs
nothing take its place; on a GPU the launches are real, and the GPU waits for the host. Written to host.json as well.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

try:
    import torch
    import triton
    from common.command_line import Parser, positive
    from common.program import Program, no_garbage_collection
    from common.result_file import cell, markdown
    from machine_code.stand_in import stand_in
except ImportError as error:
    sys.exit(f"host.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

import fastwkv
from fastwkv.kernels import held, linear_scan, linear_scan_bwd, wkv, wkv_bwd, wkv_step
from fastwkv.kernels.config import FORWARD_REGISTERS, MIN_CHUNK, Launch
from fastwkv.kernels.wkv_state import row_constants

Call = Callable[[], object]
Row = dict[str, Any]
Timed = tuple[str, str, Call]  # the name of a call, the way of it, and the call

# Shapes [B, T, C], so small that sums and memory of a CPU take no time. Any GPU takes the second in two chunks.
SHAPES = {"one chunk": (1, MIN_CHUNK, 64), "two chunks": (1, 2 * MIN_CHUNK, 64)}
LAUNCHERS = {
    "wkv_fwd": wkv.wkv_fwd,
    "wkv_bwd": wkv_bwd.wkv_bwd,
    "wkv_step": wkv_step.wkv_step,
    "linear_scan_fwd": linear_scan.linear_scan_fwd,
    "linear_scan_bwd": linear_scan_bwd.linear_scan_bwd,
    "linear_scan_step": linear_scan.linear_scan_step,
}
RESULTS = "(Tensor, Tensor, Tensor"
FORWARD = f"(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? i, Tensor? c, bool s, Tensor? e) -> {RESULTS})"
BACKWARD = f"(Tensor w, Tensor u, Tensor k, Tensor v, Tensor f, Tensor g) -> {RESULTS}, Tensor)"


class Inputs:
    """Arguments of the calls of one shape, on a device; bfloat16 but for those of shape [C]."""

    def __init__(self, shape: tuple[int, int, int], on: torch.device) -> None:
        B, T, C = shape
        self.shape = shape
        self.w, self.u, self.a = torch.rand(3, C, device=on)
        self.k, self.v, self.g = torch.randn(3, B, T, C, device=on).bfloat16()
        self.k_grad, self.v_grad = (t.clone().requires_grad_() for t in (self.k, self.v))
        self.state = fastwkv.WKVState(*torch.rand(3, B, C, device=on))
        self.h = torch.rand(B, C, device=on)


class Empty:
    """Operators of PyTorch like WKV's that do nothing, under autograd too."""

    def __init__(self, inputs: Inputs) -> None:
        self.library = torch.library.Library("fastwkv_host", "DEF")
        B, _, C = inputs.shape
        k, v, w = inputs.k, inputs.v, inputs.w
        made = torch.empty_like(v), k.new_empty(3, B, C, dtype=w.dtype), k.new_empty(0, dtype=w.dtype)
        gradients = torch.empty_like(w), torch.empty_like(w), torch.empty_like(k), torch.empty_like(v)

        def allocating(w: Any, u: Any, k: Any, v: Any, *_: Any) -> tuple[Any, ...]:
            return torch.empty_like(v), k.new_empty(3, B, C, dtype=w.dtype), k.new_empty(0, dtype=w.dtype)

        for name, schema, function in (
            ("forward", FORWARD, lambda *_: made),
            ("allocating", FORWARD, allocating),
            ("backward", BACKWARD, lambda *_: gradients),
        ):
            self.library.define(name + schema)
            for key in ("CPU", "CUDA"):
                self.library.impl(name, function, key)
        self.functions = {"with setup_context": SeparateContext.apply, "without": OneContext.apply}

    def calls(self, inputs: Inputs) -> Iterator[Timed]:
        """Return PyTorch's own calls."""
        operators, given = torch.ops.fastwkv_host, (inputs.w, inputs.u, inputs.k, inputs.v, None, None, False, None)
        yield "torch.ops", "forward", lambda: operators.forward(*given)
        yield "torch.ops, allocating its results", "forward", lambda: operators.allocating(*given)
        backward = (*given[:4], inputs.w, inputs.g)
        yield "torch.ops", "backward", lambda: operators.backward(*backward)
        leaves = (inputs.w, inputs.u, inputs.k_grad, inputs.v_grad)
        for name, apply in self.functions.items():
            yield from _differentiated(f"autograd.Function {name}", lambda a=apply: a(*leaves)[0], inputs)


class SeparateContext(torch.autograd.Function):
    """An operator under autograd whose context is set up apart, as transforms of functions want it."""

    @staticmethod
    def forward(w: Any, u: Any, k: Any, v: Any) -> Any:
        """Call the operator."""
        return torch.ops.fastwkv_host.forward(w, u, k, v, None, None, True, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward pass is given."""
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gy: Any, *_: Any) -> Any:
        """Call the other operator."""
        return torch.ops.fastwkv_host.backward(*ctx.saved_tensors, gy)


class OneContext(SeparateContext):
    """The same, its context set up in the forward pass."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """Call the operator and keep what the backward pass is given."""
        output = SeparateContext.forward(*inputs)
        SeparateContext.setup_context(ctx, inputs, output)
        return output


def _differentiated(name: str, call: Callable[[], Any], inputs: Inputs) -> Iterator[Timed]:
    yield name, "forward, to be differentiated", call
    leaves = inputs.k_grad, inputs.v_grad
    yield name, "forward and backward", lambda: torch.autograd.grad(call(), leaves, inputs.g, allow_unused=True)


def launches(inputs: Inputs) -> Iterator[Timed]:
    """Return launches of one kernel: Triton's and the held one."""
    B, T, C = inputs.shape
    launch = Launch(32, 1, T)
    kind = row_constants(launch, C, torch.float32, FORWARD_REGISTERS)
    final = inputs.k.new_empty(3, B, C, dtype=torch.float32)
    tensors = (inputs.w, inputs.u, inputs.k, inputs.v, *[None] * 3, torch.empty_like(inputs.v), None, final, None)
    grid, numbers, kernel = (B, C // 32), (B, T, T), wkv._wkv_fwd_kernel
    yield "launch of a kernel, Triton's", "", lambda: kernel[grid](*tensors, *numbers, **kind)
    yield "launch of a kernel, held", "", lambda: held.start(kernel, grid, tensors, numbers, kind)


def operators(inputs: Inputs, form: str) -> Iterator[Timed]:
    """Return the calls of this package's operators for sequences of one form."""
    w, u, a, k, v = inputs.w, inputs.u, inputs.a, inputs.k, inputs.v
    yield f"wkv, {form}", "forward", lambda: fastwkv.wkv(w, u, k, v)
    yield from _differentiated(f"wkv, {form}", lambda: fastwkv.wkv(w, u, inputs.k_grad, inputs.v_grad), inputs)
    yield f"linear_scan, {form}", "forward", lambda: fastwkv.linear_scan(k, v)
    yield from _differentiated(
        f"linear_scan, {form}", lambda: fastwkv.linear_scan(inputs.k_grad, inputs.v_grad), inputs
    )
    yield f"linear_scan, a fixed, {form}", "forward", lambda: fastwkv.linear_scan(a, v)
    yield from _differentiated(f"linear_scan, a fixed, {form}", lambda: fastwkv.linear_scan(a, inputs.v_grad), inputs)


def steps(inputs: Inputs) -> Iterator[Timed]:
    """Return the calls for one token."""
    k, v = inputs.k[:, 0].contiguous(), inputs.v[:, 0].contiguous()
    yield "wkv_step", "forward", lambda: fastwkv.wkv_step(inputs.w, inputs.u, k, v, inputs.state)
    yield "linear_scan_step", "forward", lambda: fastwkv.linear_scan_step(None, v, inputs.h, log_a=inputs.a)


def calls(inputs: dict[str, Inputs], empty: Empty) -> list[Timed]:
    """Return all that is timed."""
    one = inputs["one chunk"]
    timed = [*empty.calls(one), *launches(one)]
    for form, given in inputs.items():
        timed += operators(given, form)
    return timed + list(steps(one))


def microseconds(timed: list[Timed], rounds: int, times: int) -> list[float]:
    """Return the least processor time of each call, all of them timed in turn in every round."""
    best = [float("inf")] * len(timed)
    with no_garbage_collection():
        for _ in range(rounds):
            for i, (_, _, call) in enumerate(timed):
                call()
                began = time.process_time()
                for _ in range(times):
                    call()
                best[i] = min(best[i], (time.process_time() - began) / times)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    return [1e6 * seconds for seconds in best]


def rows(timed: list[Timed], taken: list[float]) -> list[Row]:
    """Return a row for each call: its time, and how much of it is not PyTorch's calls of empty operators."""
    of = {(what, how): time for (what, how, _), time in zip(timed, taken, strict=True)}
    forward, backward = (of["torch.ops", how] for how in ("forward", "backward"))
    own = {
        "forward": forward,
        "forward, to be differentiated": forward,
        "forward and backward": forward + backward,
        "backward": backward,
    }
    return [
        {"call": what, "pass": how, "us": time, "beyond_torch_ops_us": time - own[how] if how in own else None}
        for (what, how), time in of.items()
    ]


def _launchers_on_cpu() -> torch.library.Library:
    """Put the launchers of a GPU's kernels in the place of the CPU path, until the library is gone."""
    library = torch.library.Library("fastwkv", "IMPL")
    for name, launcher in LAUNCHERS.items():
        library.impl(name, launcher, "CPU", allow_override=True)
    return library


def measure(on: torch.device, rounds: int, times: int) -> list[Row]:
    """Time all calls on a device; for a CPU under a driver that runs nothing."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if on.type == "cpu":
            stack.enter_context(stand_in(compiles=False))
            stack.callback(_launchers_on_cpu()._destroy)
        inputs = {form: Inputs(shape, on) for form, shape in SHAPES.items()}
        empty = Empty(inputs["one chunk"])
        stack.callback(empty.library._destroy)
        timed = calls(inputs, empty)
        return rows(timed, microseconds(timed, rounds, times))


class Host(Program):
    """The program."""

    name = "host"

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        option("--rounds", type=positive, default=20, metavar="N", help="the least of them counts (default: 20)")
        option("--times", type=positive, default=200, metavar="N", help="calls of each kind in a round (default: 200)")

    @classmethod
    def complete(cls, args: Namespace, parser: Parser) -> None:
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            parser.error("kernels are interpreted here, which is no launch; unset TRITON_INTERPRET")

    def settings(self) -> Row:
        args = self.args
        driver = "none" if args.device.type == "cpu" else "the GPU's"
        versions = {"triton_held": held._KNOWN, "triton": triton.__version__}
        return {"rounds": args.rounds, "times": args.times, "driver": driver} | versions

    def run(self) -> None:
        self.add(*measure(self.args.device, self.args.rounds, self.args.times))

    @classmethod
    def table(cls, record: Row) -> str:
        head = ["call", "pass", "us", "beyond torch.ops"]
        numbers = ("us", "beyond_torch_ops_us")
        lines = [[row["call"], row["pass"], *(cell(row[key], ".1f") for key in numbers)] for row in record["rows"]]
        return markdown(head, lines, texts=2)


main = Host.main

if __name__ == "__main__":
    sys.exit(main())
