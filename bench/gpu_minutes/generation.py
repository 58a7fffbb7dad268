"""A token of a large RWKV-4 in bfloat16, with and without a CUDA graph, and which kernels its time goes into.

Weights are random and made on the device: time does not depend on them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from common.interpreted import interpreted_kernels
from common.light import emit, reason
from common.program import no_garbage_collection
from correctness.checks import the_device
from correctness.generation import REHEARSED, model
from generation.decode import parameters_read
from gpu_minutes.machine import Clocks
from torch.profiler import ProfilerActivity, profile

from fastwkv.nn import RWKV4, RWKV4Config, generate

PROMPT, BEFORE, TOKENS, TRACED, TOP = 16, 4, 128, 4, 15
SIZE, DTYPE = "3b", torch.bfloat16


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Return the launches, for precompile.py: of one layer. The kernels between products are those of correctness."""
    yield f"prompt of the {SIZE} model", _prompt_of_one_layer


def _prompt_of_one_layer() -> None:
    config = RWKV4Config(layers=1, width=RWKV4Config.preset(SIZE).width, vocab_size=8)
    one = model(config, DTYPE, torch.device("cpu"))
    with interpreted_kernels():  # which are compiled there
        next(generate(one, torch.zeros(1, PROMPT, dtype=torch.int64), 1))


def begun(one: RWKV4, tokens: torch.Tensor, graph: bool | None, count: int) -> tuple[Any, list[torch.Tensor]]:
    """Return a stream whose prompt is read and whose graph is recorded and was launched, and its tokens so far."""
    stream = generate(one, tokens, BEFORE + count, graph=graph)
    found = [next(stream) for _ in range(BEFORE)]
    _wait(tokens)
    return stream, found


def timed(one: RWKV4, tokens: torch.Tensor, graph: bool | None, count: int) -> tuple[list[float], torch.Tensor]:
    """Return the milliseconds of each token, the device waited for after each, and the tokens."""
    stream, found = begun(one, tokens, graph, count)
    ms = []
    with no_garbage_collection():
        for _ in range(count):
            begin = time.perf_counter()
            found.append(next(stream))
            _wait(tokens)
            ms.append(1e3 * (time.perf_counter() - begin))
    return ms, torch.stack(found)


def together(one: RWKV4, tokens: torch.Tensor, graph: bool | None, count: int) -> float:
    """Return the milliseconds of a token where nothing waits for the device before the last one."""
    stream, _ = begun(one, tokens, graph, count)
    with no_garbage_collection():
        begin = time.perf_counter()
        for _ in range(count):
            next(stream)
        _wait(tokens)
    return 1e3 * (time.perf_counter() - begin) / count


def traced(one: RWKV4, tokens: torch.Tensor, graph: bool | None) -> Iterator[dict[str, Any]]:
    """Return the kernels that most of a token's time goes into, and the sum of all."""
    gpu = tokens.is_cuda
    stream, _ = begun(one, tokens, graph, TRACED)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        for _ in range(TRACED):
            next(stream)
        _wait(tokens)
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == gpu:
            kernels.setdefault(event.name, []).append(event.device_time if gpu else event.self_cpu_time_total)
    total, count = sum(map(sum, kernels.values())), sum(map(len, kernels.values()))
    yield {"what": "trace", "kernels": count / TRACED, "us": total / TRACED}
    for name, times in sorted(kernels.items(), key=lambda one: -sum(one[1]))[:TOP]:
        yield {"what": "kernel", "name": name[:80], "count": len(times) / TRACED, "us": sum(times) / TRACED}


def _wait(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()


def measure(one: RWKV4, tokens: torch.Tensor, count: int, until: float, clocks: Clocks) -> int:
    """Print the rows; return the exit status."""
    status, texts = 0, {}
    bytes_read = parameters_read(one, 1)
    for graph in (True, False):
        begin = time.monotonic()
        if begin > until:
            emit(what="left out", reason="time is over", graph=graph)
            continue
        wanted = graph if tokens.is_cuda else None
        try:
            ms, texts[graph] = timed(one, tokens, wanted, count)
            row = {"ms": median(ms), "ms_min": min(ms), "ms_together": together(one, tokens, wanted, count)}
            gbps = bytes_read / row["ms_together"] / 1e6
            emit(what="token", graph=graph, tokens=count, **row, weight_gbps=gbps, **clocks.since(begin))
        except Exception as error:
            emit(what="token", graph=graph, error=reason(error))
            status = 1
    if len(texts) == 2 and not torch.equal(texts[True], texts[False]):
        emit(what="token", error="other tokens with a graph than without")
        status = 1
    try:
        for row in traced(one, tokens, True if tokens.is_cuda else None):
            emit(**row)
    except Exception as error:
        emit(what="trace", error=reason(error))
        status = 1
    return status


def run(args: argparse.Namespace) -> int:
    """Run the step."""
    began, device = time.monotonic(), the_device(args.rehearse)
    config = REHEARSED if args.rehearse else RWKV4Config.preset(SIZE)
    with Clocks() as clocks:
        one = model(config, torch.float32 if args.rehearse else DTYPE, device)
        emit(what="model", size=SIZE, parameters=sum(p.numel() for p in one.parameters()))
        tokens = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
        return measure(one, tokens, 2 if args.rehearse else TOKENS, began + args.seconds, clocks)
