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
from wkv_cases import ORDINARY, cases, make_case, state_invariants

from fastwkv import WKVState, reference
from fastwkv.kernels.config import CARRY_GROUP, WKV_BACKWARD, WKV_FORWARD, Launch, checkpoint_rows, wkv_launch

REPOSITORY = Path(__file__).parents[2]
ROWS = checkpoint_rows(4)  # a multiple of those of float64
TILE = checkpoint_rows(8)
# In chunks of a tile: more of them than a group has, of which one sequence has part in many and one is one of them.
MANY_TOKENS = (CARRY_GROUP + 3) * TILE - 2
MANY_CHUNKS = [0, 2 * TILE - 1, 0, 0, MANY_TOKENS + 3 - 2 * TILE, TILE, 1, 0]


def cotangent(t):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t)


def launch(context, case, place=lambda t: t, final=True, **options):
    """Run forward and backward through the launchers; gradients are those of y, of random cotangent."""
    w, u, k, v, state, cu = case.arguments(context.device)
    inputs = [place(t.detach()) for t in (w, u, k, v)]
    packed = None if state is None else place(torch.stack(tuple(state)).detach())
    gy = place(cotangent(k))
    y, state_after, checkpoints = context.launcher("wkv_fwd")(*inputs, packed, cu, True, **options)
    gfinal = place(cotangent(state_after[:2])) if final else None
    gradients = context.launcher("wkv_bwd")(*inputs, packed, cu, checkpoints, gy, gfinal, **options)
    return [y, state_after, checkpoints, *gradients]


def exact(case, final=True):
    """Return what :func:`launch` should, from the reference: no checkpoints, and of the final state its invariants."""
    w, u, k, v, state, cu = case.arguments(exact=True)
    y, state_after = reference.wkv_loop(w, u, k, v, state, return_state=True, cu_seqlens=cu)
    mean, log_weight = state_invariants(state_after).values()
    ends = torch.stack((mean, log_weight))
    loss = (y * cotangent(k)).sum() + (ends * cotangent(ends)).sum() * final
    if state is None:
        return [y, mean, log_weight, *torch.autograd.grad(loss, (w, u, k, v))]
    *gradients, gnum, gmax = torch.autograd.grad(loss, (w, u, k, v, state.num, state.max))
    return [y, mean, log_weight, *gradients, torch.stack((gnum * state.den, gmax))]


def assert_meets(results, wanted, bounds, **options):
    """Compare what :func:`launch` has returned with what :func:`exact` has."""
    y, final, _, *gradients = results
    results = y, *state_invariants(WKVState(*final)).values(), *gradients[: len(wanted) - 3]
    for index, (result, one, bound) in enumerate(zip(results, wanted, bounds, strict=True)):
        assert relative_error(result, one, **options) <= bound, index


def assert_keeps_to_its_memory(implementation, case, **options):
    plain = launch(implementation, case, **options)
    with GuardedMemory() as memory:
        guarded = launch(implementation, case, place=memory.guarded, **options)
        memory.check()
    for result, wanted in zip(guarded, plain, strict=True):
        assert not result.isnan().any()
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float64, True),
        (torch.bfloat16, False),
        (torch.float16, True),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (2, 17, 16), (1, 33, 65), (3, 16, 7), (1, 40, 128)])
def test_memory_beside_tensors_is_neither_read_nor_written(implementation, shape, state, dtype):
    assert_keeps_to_its_memory(implementation, make_case(0, *shape, dtype=dtype, state=state))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16, 16], [5, 11, 16, 1, 31]])
def test_memory_beside_packed_tensors_is_neither_read_nor_written(implementation, lengths, state):
    assert_keeps_to_its_memory(implementation, make_case(0, 1, 0, 5, lengths=lengths, state=state))


@pytest.mark.parametrize(("lengths", "state"), [(None, True), (MANY_CHUNKS, False), (MANY_CHUNKS, True)])
def test_memory_beside_tensors_in_chunks_is_neither_read_nor_written(lengths, state):
    case = make_case(5, 2, MANY_TOKENS, 3, dtype=torch.float64, lengths=lengths, state=state)
    with Implementation("triton") as context:
        assert_keeps_to_its_memory(context, case, launch=Launch(4, 1, TILE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes programs in an order of its own")
@pytest.mark.parametrize("lengths", [None, MANY_CHUNKS])
def test_programs_may_run_in_any_order(lengths, monkeypatch):
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    forwards = builder.set_grid_idx
    case = make_case(5, 2, MANY_TOKENS, 3, dtype=torch.float64, lengths=lengths)
    with Implementation("triton") as context:
        wanted = launch(context, case, launch=Launch(4, 1, TILE))
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda self, x, y, z: forwards(self, self.grid_dim[0] - 1 - x, y, z)
        )
        results = launch(context, case, launch=Launch(4, 1, TILE))
    assert all(map(torch.equal, results, wanted))


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
    program=st.sampled_from(((4, 1, 4), (32, 1, 4), (32, 1, 6), (64, 2, 4), (64, 2, 5), (128, 4, 4))),
)
def test_chunks_along_time_and_shapes_of_programs_change_nothing(case, blocks, program):
    block_c, num_warps, stages = program
    with Implementation("triton") as context:
        results = launch(context, case, launch=Launch(block_c, num_warps, blocks * ROWS, stages))
    wanted = exact(case)
    output, gradient = ORDINARY[case.dtype]
    assert_meets(results, wanted, [output] + [gradient] * (len(wanted) - 1), floor=1.0)


@pytest.mark.parametrize(
    ("lengths", "chunk"), [(None, TILE), (MANY_CHUNKS, TILE), ([16, 16, 32, 20], ROWS), ([25, 15], 2 * TILE)]
)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_sequences_that_begin_and_end_anywhere_in_chunks(lengths, chunk, state, final):
    case = make_case(5, 2, MANY_TOKENS, 3, dtype=torch.float64, lengths=lengths, state=state, rates=(1e-6, 1e-3))
    with Implementation("triton") as context:
        results = launch(context, case, final=final, launch=Launch(4, 1, chunk))
    wanted = exact(case, final)
    assert_meets(results, wanted, [1e-12] * len(wanted), floor=1.0)


@pytest.fixture(scope="module")
def hard():
    case = make_case(1, 1, 512, 32, key_range=60.0, rates=(1e-6, 20.0), state=False)
    return case, exact(case)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_hard_inputs_meet_the_bounds_in_chunks(hard, chunk):
    case, wanted = hard
    with Implementation("triton") as context:
        results = launch(context, case, launch=Launch(32, 1, chunk * ROWS))
    assert_meets(results, wanted, (2e-6, 2e-6, 2e-6, 2e-5, 5e-6, 5e-6, 5e-6))


def test_nan_stays_in_its_sequence_in_chunks():
    case = make_case(0, 1, 0, 3, dtype=torch.float64, lengths=[5, 12, 7])
    k = case.k.clone()
    # In the third chunk, whose last token is absent, of a sequence that begins in the second and ends in the fifth.
    k[0, 10, 1], k[0, 11, 1] = torch.nan, -torch.inf
    with Implementation("triton") as context:
        y, final, _, *_, gk, gv, ginitial = launch(context, replace(case, k=k), launch=Launch(4, 1, TILE))
    reached = torch.zeros(case.k.shape, dtype=torch.bool)
    reached[0, 10:17, 1] = True
    assert y.isnan().cpu().equal(reached)
    reached[0, 5:17, 1] = True
    assert not (gk.isnan() | gv.isnan()).cpu()[~reached].any()
    assert final.isnan().any(0).nonzero().tolist() == ginitial.isnan().any(0).nonzero().tolist() == [[1, 1]]


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
    backward=st.booleans(),
)
def test_launch_shape_is_legal_for_every_shape(B, T, C, multiprocessors, itemsize, backward):
    shape = wkv_launch(B, T, C, multiprocessors, itemsize, backward)
    wanted = (WKV_BACKWARD if backward else WKV_FORWARD).warps
    chunks = -(-T // shape.chunk)
    assert shape.chunk % ROWS == 0
    assert shape.block_c & (shape.block_c - 1) == 0
    assert -(-C // shape.block_c) <= 65535
    assert B * chunks < 2**31
    assert chunks == 1 or B * -(-C // shape.block_c) < wanted * multiprocessors


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
