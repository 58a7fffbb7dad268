"""Compiles this package's kernels for a run on a GPU, several at a time: Triton compiles one at a time in a process."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch
from peers.provider import OURS
from throughput.passes import task
from throughput.plan import Case, Layout

PROCESSES = 8  # each with a CUDA context of its own
ELEMENTS = 2**25  # of a tensor there; what is compiled depends on B and C, on T only where it is short


def compile_ours(cases: Sequence[Case], device: torch.device) -> None:
    """Run this package once on what the cases need compiled, so that Triton's cache on disk has it.

    A process that fails is no matter: the kernel is then compiled when it is measured, or fails there.
    """
    mine = list(dict.fromkeys(shortened(case) for case in cases if OURS in case.providers))
    processes = min(PROCESSES, len(mine), os.cpu_count() or 1)
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with suppress(BrokenExecutor), ProcessPoolExecutor(processes, spawn) as pool:
            for running in [pool.submit(run_once, case, device) for case in mine]:
                running.exception()


def shortened(case: Case) -> Case:
    """Return a case with so few tokens that several fit into the memory of a GPU."""
    B, T, C = case.shape
    return replace(case, layout=Layout((B, min(T, max(1, ELEMENTS // (B * C))), C), case.layout.packed))


def run_once(case: Case, device: torch.device) -> None:
    """Run every pass of a case by this package."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    inputs = case.draw(0, device)
    for which in case.passes:
        task(case.operator.providers[OURS], which, inputs, device).run()
