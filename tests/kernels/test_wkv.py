"""What is particular to the kernels: memory, chunks along time, launch shapes, compile keys."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison import relative_error
from guarded import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation
from wkv_cases import ORDINARY, cases, expected, make_case

from fastwkv.kernels.config import WARPS_WANTED, Launch, checkpoint_rows, wkv_launch

REPOSITORY = Path(__file__).parents[2]
ROWS = checkpoint_rows(4)  # a multiple of those of float64


def launch(context, case, place=lambda t: t, final=True, **options):
    """Run forward and backward through the launchers; gradients are those of y, of random cotangent."""
    w, u, k, v, state, cu = case.arguments(context.device)
    inputs = [place(t.detach()) for t in (w, u, k, v)]
    packed = None if state is None else place(torch.stack(tuple(state)).detach())
    gy = place(torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(k))
    y, state_after, checkpoints = context.launcher("wkv_fwd")(*inputs, packed, cu, True, **options)
    gfinal = place(torch.zeros_like(state_after[:2]) + 1) if final else None
    gradients = context.launcher("wkv_bwd")(*inputs, packed, cu, checkpoints, gy, gfinal, **options)
    return [y, state_after, checkpoints, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (2, 17, 16), (1, 33, 65), (3, 16, 7), (1, 40, 128)])
def test_memory_beside_tensors_is_neither_read_nor_written(implementation, shape, state, dtype):
    case = make_case(0, *shape, dtype=dtype, state=state)
    plain = launch(implementation, case)
    with GuardedMemory() as memory:
        guarded = launch(implementation, case, place=memory.guarded)
        memory.check()
    for result, wanted in zip(guarded, plain, strict=True):
        assert not result.isnan().any()
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16, 16], [5, 11, 16, 1, 31]])
def test_memory_beside_packed_tensors_is_neither_read_nor_written(implementation, lengths, state):
    case = make_case(0, 1, 0, 5, lengths=lengths, state=state)
    plain = launch(implementation, case)
    with GuardedMemory() as memory:
        guarded = launch(implementation, case, place=memory.guarded)
        memory.check()
    for result, wanted in zip(guarded, plain, strict=True):
        assert not result.isnan().any()
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_step_keeps_to_its_memory(implementation):
    case = make_case(0, 3, 1, 43)
    w, u, k, v, state, _ = case.arguments(implementation.device)
    inputs = [t.detach() for t in (w, u, k[:, 0], v[:, 0], *state)]
    step = implementation.launcher("wkv_step")
    with GuardedMemory() as memory:
        results = step(*(memory.guarded(t) for t in inputs))
        memory.check()
    for result, wanted in zip(results, step(*(t.contiguous() for t in inputs)), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@settings(max_examples=12)
@given(
    case=cases(max_tokens=60, dtypes=(torch.float32, torch.float64)),
    blocks=st.integers(1, 2),
    block_c=st.sampled_from((4, 32)),
)
def test_chunks_along_time_change_nothing(case, blocks, block_c):
    with Implementation("triton") as context:
        whole = launch(context, case, launch=Launch(32, 1, 16 * ROWS))
        chunked = launch(context, case, launch=Launch(block_c, 1, blocks * ROWS))
    output, gradient = ORDINARY[case.dtype]
    for index, (result, wanted) in enumerate(zip(chunked, whole, strict=True)):
        if index in (1, 2):  # states: their scale is free
            continue
        assert relative_error(result, wanted, floor=1.0) <= (output if index == 0 else gradient), index


@pytest.mark.parametrize("lengths", [[40, 40], [16, 16, 32, 20], [100, 60]])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_sequences_that_begin_and_end_anywhere_in_chunks(lengths, state, final):
    case = make_case(5, 1, 0, 3, dtype=torch.float64, lengths=lengths, state=state, rates=(1e-6, 1e-3))
    with Implementation("triton") as context:
        results = []
        for chunk in (ROWS, 16 * ROWS):
            results.append(launch(context, case, final=final, launch=Launch(4, 1, chunk)))
    for index, (result, wanted) in enumerate(zip(*results, strict=True)):
        if index not in (1, 2):
            assert relative_error(result, wanted, floor=1.0) <= 1e-12, index


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_hard_inputs_meet_the_bounds_in_chunks(chunk):
    with Implementation("triton") as context:
        case = make_case(1, 1, 512, 32, key_range=60.0, rates=(1e-6, 20.0), state=False)
        y, *_, gw, gu, gk, gv, _ = launch(context, case, launch=Launch(32, 1, chunk * ROWS))
        exact = launch(
            context, replace(case, dtype=torch.float64), launch=Launch(32, 1, 512)
        )  # itself held to the reference to 1e-12
    for result, wanted, bound in zip(
        (y, gw, gu, gk, gv), (exact[0], *exact[3:7]), (2e-6, 2e-5, 5e-6, 5e-6, 5e-6), strict=True
    ):
        assert relative_error(result, wanted) <= bound


def test_final_state_of_chunks_is_that_of_the_reference():
    with Implementation("triton") as context:
        case = make_case(3, 2, 100, 5, dtype=torch.float64)
        final = launch(context, case, launch=Launch(4, 1, ROWS))[1]
    reference = expected(case, backward=False).state
    assert relative_error(final[0] / final[1], reference["mean"]) <= 1e-12
    assert relative_error(final[2] + final[1].log(), reference["log_weight"]) <= 1e-12


def test_bad_offsets_touch_no_foreign_memory(implementation):
    # On a GPU the values of cu_seqlens are not looked at; the launchers must stay in bounds whatever they are.
    if implementation.name == "cpu":
        pytest.skip("the CPU path checks the values")
    case = make_case(0, 1, 0, 5, lengths=[7, 9, 16])
    for offsets in ([3, 16, 20, 24], [0, 40, 50, 60], [-5, 0, 0, 32], [32, 16, 8, 0]):
        with GuardedMemory() as memory:
            launch(implementation, replace(case, cu_seqlens=torch.tensor(offsets)), place=memory.guarded)
            memory.check()


@settings(max_examples=200)
@given(
    B=st.integers(1, 512),
    T=st.integers(1, 2**20),
    C=st.integers(1, 8192),
    multiprocessors=st.sampled_from((1, 16, 108, 132, 304)),
    itemsize=st.sampled_from((2, 4, 8)),
)
def test_launch_shape_is_legal_for_every_shape(B, T, C, multiprocessors, itemsize):
    shape = wkv_launch(B, T, C, multiprocessors, itemsize)
    chunks = -(-T // shape.chunk)
    assert shape.chunk % ROWS == 0
    assert shape.block_c & (shape.block_c - 1) == 0
    assert -(-C // shape.block_c) <= 65535
    assert B * chunks < 2**31
    assert chunks == 1 or B * -(-C // shape.block_c) < WARPS_WANTED * multiprocessors


def test_one_chunk_where_batch_and_channels_fill_the_device():
    for itemsize in (2, 4):
        assert wkv_launch(8, 4096, 2048, 132, itemsize).chunk == 4096
        assert wkv_launch(1, 65536, 1024, 132, itemsize).chunk < 65536 / 32
    assert wkv_launch(16, 1024, 768, 132, 2).chunk < 1024 == wkv_launch(16, 1024, 768, 132, 4).chunk


def test_length_is_in_no_compile_key():
    # Read in a process of its own: interpreted kernels have no compile key.
    script = (
        "from fastwkv.kernels import wkv, wkv_bwd, wkv_carry, wkv_step\n"
        "for kernel in (wkv._wkv_fwd_kernel, wkv_carry._wkv_carry_kernel, wkv_bwd._wkv_bwd_kernel,\n"
        "               wkv_carry._wkv_bwd_carry_kernel, wkv_step._wkv_step_kernel):\n"
        "    print(*[p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    specialised = done.stdout.split()
    assert specialised
    assert all(name.endswith("_ptr") for name in specialised)
