"""The measurements of decode.py: tokens with and without a CUDA graph, and a long prompt."""

import argparse
import gc
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from common.program import no_garbage_collection
from timing.by_turns import OtherWork, Task
from timing.live_bytes import LiveBytes
from torch import Tensor

from fastwkv.nn import RWKV4, generate
from fastwkv.nn.cuda_graph import why_no_graph
from fastwkv.nn.generation import Generation

PROMPT = 16  # tokens before those that are timed
BEFORE = 3  # tokens that are unlike the others: of the prompt, of the recording, and the first launch
EMPTY = dict.fromkeys(
    ("graph", "ms", "ms_min", "tokens_per_second", "limit_ms", "fraction", "peak_bytes", "rounds", "other_cores")
)


def parameters_read(model: RWKV4, batch: int) -> int:
    """Return the bytes of all parameters that a token of ``batch`` sequences reads: of the embedding, its own rows."""
    table = model.embeddings.weight
    everything = sum(parameter.nbytes for parameter in model.parameters())
    return int(everything - table.nbytes + min(batch, table.shape[0]) * table[0].nbytes)


def decode_rows(model: RWKV4, args: argparse.Namespace, copy_gbps: float) -> Iterator[dict[str, Any]]:
    """Time a token without a graph and with one, by turns; yield a row for each."""
    tokens = _tokens(model, args, PROMPT)
    against = why_no_graph(model, args.device)
    ways = [False] if against else [False, True]
    drawn: dict[bool, Tensor] = {}
    others, tasks = OtherWork(), {graph: _task(model, tokens, args, graph) for graph in ways}
    with no_garbage_collection():
        for turn in range(1 + args.rounds):  # the first is not counted, and its tokens are compared
            for graph, task in tasks.items():
                result, seconds = task.run()
                if turn:
                    task.seconds.append(seconds)
                else:
                    drawn[graph] = result
                gc.collect()
    cores = others.cores()
    limit = 1e-6 * parameters_read(model, args.batch) / copy_gbps
    for graph, task in tasks.items():
        row = EMPTY | {"graph": graph, "rounds": args.rounds, "other_cores": cores, "status": "ok", "reason": None}
        if torch.equal(drawn[graph], drawn[False]):
            ms = 1e3 * median(task.seconds) / args.tokens
            row |= {
                "ms": ms,
                "ms_min": 1e3 * min(task.seconds) / args.tokens,
                "limit_ms": limit,
                "fraction": limit / ms,
            }
            row["tokens_per_second"] = 1e3 * args.batch / ms
        else:
            row |= {"status": "wrong", "reason": "other tokens with a graph than without"}
        yield row
    if against:
        yield EMPTY | {"graph": True, "status": "unavailable", "reason": against}


def _task(model: RWKV4, tokens: Tensor, args: argparse.Namespace, graph: bool) -> Task:
    def begin() -> Generation:
        count = BEFORE + args.tokens
        stream = generate(model, tokens, count, temperature=args.temperature, seed=args.seed, graph=graph)
        for _ in range(BEFORE):
            next(stream)
        return stream

    return Task(lambda stream: torch.stack(list(stream)), args.device, prepare=begin)


def prefill_row(model: RWKV4, args: argparse.Namespace) -> dict[str, Any]:
    """Time the reading of a long prompt, and look at the memory that it takes."""
    tokens = _tokens(model, args, args.prefill)
    task = Task(lambda _: next(generate(model, tokens, 1, graph=False)), args.device)
    gpu = args.device.type == "cuda"
    with torch.no_grad():
        peak = _peak_of_gpu(task) if gpu else _peak_of_cpu(task)
        others = OtherWork()
        rounds = args.rounds if gpu else 1  # on a CPU it takes long enough
        seconds = [task.run()[1] for _ in range(rounds)]
    row = {"ms": 1e3 * median(seconds), "ms_min": 1e3 * min(seconds), "peak_bytes": peak, "rounds": rounds}
    row["tokens_per_second"] = tokens.numel() / median(seconds)
    return EMPTY | row | {"other_cores": others.cores(), "status": "ok", "reason": None}


def _peak_of_gpu(task: Task) -> int:
    before = torch.cuda.memory_allocated(task.device)
    torch.cuda.reset_peak_memory_stats(task.device)
    task.run()
    return torch.cuda.max_memory_allocated(task.device) - before


def _peak_of_cpu(task: Task) -> int:
    with LiveBytes() as memory:
        task.run()
    return memory.peak


def _tokens(model: RWKV4, args: argparse.Namespace, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(model.config.vocab_size, (args.batch, length), generator=generator).to(args.device)
