"""What is particular to the kernels of the linear scan: memory, chunks along time, launch shapes, compile keys."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparison import relative_error
from far_rows import FarRows
from guarded import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Implementation
from scan_cases import COMPLEX, DTYPES, cases, make_case

from fastwkv.kernels.config import CARRY_GROUP, SCAN_ROWS, Launch, scan_launch

REPOSITORY = Path(__file__).parents[2]
EXACT = (torch.float64, torch.complex128)
CPU = Implementation("cpu")  # itself held to the reference; where chunks are tested, it has none
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="only interpreted kernels can be looked into")


def launch(context, case, place=lambda t: t, pairs=None, **options):
    """Run forward and backward through the launchers, which know log a of real numbers only.

    With ``pairs``, a dtype, x and h are pairs of that dtype.
    """
    if case.log and case.dtype.is_complex:
        case = replace(case, a=case.a.exp(), log=False)
    a, x, initial, cut = (t if t is None else place(t.detach()) for t in case.arguments(context.device))
    x = x if pairs is None else place(torch.view_as_real(x).to(pairs))
    fixed = (cut, case.log, case.reverse)
    h, final = context.launcher("linear_scan_fwd")(a, x, initial, *fixed, **options)
    generator = torch.Generator().manual_seed(0)
    wide = {t: torch.promote_types(t.dtype, torch.float64) for t in (h, final)}
    gh, gfinal = (place(torch.randn(t.shape, generator=generator, dtype=wide[t]).to(t)) for t in wide)
    gradients = (gh, gfinal, x.dtype)
    return [h, final, *context.launcher("linear_scan_bwd")(a, h, initial, *fixed, *gradients, **options)]


def assert_keeps_to_its_memory(implementation, case):
    plain = launch(implementation, case)
    with GuardedMemory() as memory:
        guarded = launch(implementation, case, place=memory.guarded)
        memory.check()
    for result, wanted in zip(guarded, plain, strict=True):
        assert not result.isnan().any()
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (2, 17, 16), (1, 33, 65), (1, 24, 128)])
def test_memory_beside_tensors_is_neither_read_nor_written(implementation, shape, dtype):
    fixed, log, reverse, state = shape[2] % 2 == 0, dtype == torch.bfloat16, shape[1] == 17, shape[0] == 1
    case = make_case(0, *shape, dtype=dtype, fixed=fixed, log=log, reverse=reverse, state=state)
    assert_keeps_to_its_memory(implementation, case)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16, 16], [5, 11, 16, 1, 7], [0, 5, 0, 11, 0, 0, 16, 0]])
def test_memory_beside_packed_tensors_is_neither_read_nor_written(implementation, lengths, dtype, reverse):
    case = make_case(0, 1, 0, 5, dtype=dtype, lengths=lengths, fixed=reverse, reverse=reverse)
    assert_keeps_to_its_memory(implementation, case)


@settings(max_examples=12)
@given(
    case=cases(max_tokens=50, dtypes=EXACT),
    blocks=st.integers(1, 2),
    program=st.sampled_from(((16, 1, 4), (32, 1, 4), (32, 1, 6), (64, 2, 4), (64, 2, 5), (128, 4, 4))),
)
def test_chunks_along_time_and_shapes_of_programs_change_nothing(case, blocks, program):
    block_c, num_warps, stages = program
    with Implementation("triton") as context:
        chunked = launch(context, case, launch=Launch(block_c, num_warps, blocks * SCAN_ROWS, stages))
    for index, (result, wanted) in enumerate(zip(chunked, launch(CPU, case), strict=True)):
        assert relative_error(result, wanted, floor=1.0) <= 1e-13, index


# Sequences of three tokens begin and end in every row of a tile.
@pytest.mark.parametrize("lengths", [[40, 40], [16, 16, 32, 20], [3] * 17])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_sequences_that_begin_and_end_anywhere_in_chunks(lengths, state, reverse):
    case = make_case(5, 1, 0, 3, dtype=torch.float64, lengths=lengths, state=state, reverse=reverse, radius=(0.99, 1.0))
    with Implementation("triton") as context:
        chunked = launch(context, case, launch=Launch(4, 1, (1 + state) * SCAN_ROWS))
    for index, (result, wanted) in enumerate(zip(chunked, launch(CPU, case), strict=True)):
        assert relative_error(result, wanted, floor=1.0) <= 1e-14, index


# The second of three sequences reaches from the first chunk into the last, between groups in either direction.
@pytest.mark.parametrize(
    ("lengths", "reverse"),
    [(None, False), *(([SCAN_ROWS - 2, CARRY_GROUP * SCAN_ROWS + 4, 3], reverse) for reverse in (False, True))],
)
def test_more_chunks_than_are_read_at_once(lengths, reverse):
    T = (CARRY_GROUP + 1) * SCAN_ROWS + 1  # of the last chunk the summary is not used
    case = make_case(6, 2, T, 2, dtype=torch.complex64, lengths=lengths, reverse=reverse, radius=(0.99, 1.0))
    with Implementation("triton") as context:
        results = launch(context, case, pairs=torch.float16, launch=Launch(4, 1, SCAN_ROWS))
    for index, (result, wanted) in enumerate(zip(results, launch(CPU, case, pairs=torch.float16), strict=True)):
        assert relative_error(result, wanted) <= (1e-6 if index in (1, 4) else 5e-4), index


@interpreted
@pytest.mark.parametrize(("dtype", "lengths"), [(torch.complex64, None), (torch.float32, [5, 11, 16, 1])])
def test_every_number_is_written_once_and_nothing_else_is_touched(dtype, lengths):
    # Of two chunks that write to one place the later wins where kernels are interpreted, but either may on a GPU. And
    # masks, unlike guard zones, are wrong already where they let numbers be read that nothing uses.
    from machine_code.bytes_counter import TrafficCounter

    case = make_case(0, 2, 33, 5, dtype=dtype, fixed=lengths is None, reverse=lengths is None, lengths=lengths)
    with Implementation("triton") as context, TrafficCounter() as counter:
        results = launch(context, case, launch=Launch(4, 1, SCAN_ROWS))
    assert all(access.total == access.distinct for access in counter.stores.values())
    written = {name: access.distinct for (kernel, name), access in counter.stores.items() if "carry" not in kernel}
    assert written["h_ptr"] == results[0].nbytes
    assert written["gx_ptr"] == results[3].nbytes
    # The first and the last chunk, of 16 tokens and of 1, need no summary of what nothing comes after.
    read = {name: access.total for (_, name), access in counter.loads.items()}
    assert read["x_ptr"] == results[3].nbytes // 33 * (33 + 32)
    assert read["gh_ptr"] == results[3].nbytes // 33 * (33 + 17)


@interpreted
@pytest.mark.parametrize(("pairs", "fixed"), [(None, True), (torch.bfloat16, False)])
def test_offsets_have_64_bits(pairs, fixed):
    dtype = torch.float32 if pairs is None else torch.complex64
    case = make_case(0, 3, 17, 5, dtype=dtype, fixed=fixed, reverse=fixed)
    options = {"pairs": pairs, "launch": Launch(8, 1, SCAN_ROWS)}
    with Implementation("triton") as context:
        wanted = launch(context, case, **options)
        with FarRows(B=3, rows=2**29):  # even of states there are more than 2^31
            results = launch(context, case, **options)
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("poisoned", ["a", "x"])
def test_nan_does_not_cross_into_another_sequence_in_chunks(poisoned, reverse):
    case = make_case(0, 1, 0, 3, lengths=[50, 60], reverse=reverse)
    dirty = {"a": case.a.clone(), "x": case.x.clone()}[poisoned]
    # In a chunk that both sequences have a part in.
    dirty[0, 55 if reverse else 49, 1] = torch.nan
    with Implementation("triton") as context:
        case = replace(case, **{poisoned: dirty})
        h, final, ga, gx, ginitial = launch(context, case, launch=Launch(4, 1, SCAN_ROWS))
    clean = slice(0, 50) if reverse else slice(50, 110)
    assert not any(t[:, clean].isnan().any() for t in (h, ga, gx))
    assert final.isnan().any(1).tolist() == ([False, True] if reverse else [True, False])
    assert not ginitial[1 if not reverse else 0].isnan().any()


def test_what_roundings_cut_off_is_carried_from_chunk_to_chunk():
    with Implementation("triton") as context:
        a, x = torch.ones(3, device=context.device), torch.full((1, 768, 3), 0.1, device=context.device)
        h, _ = context.launcher("linear_scan_fwd")(a, x, None, None, False, False, launch=Launch(4, 1, SCAN_ROWS))
    wanted = torch.arange(1, 769, dtype=torch.float64)[None, :, None] * x[0, 0].double().cpu()
    assert relative_error(h, wanted) <= 4e-8


def test_gradient_of_a_fixed_multiplier_is_a_sum_of_sums():
    # A running sum of these terms, all of one sign, is off by 2e-6.
    with Implementation("triton") as context:
        h = torch.full((1, 256, 1), 0.1, device=context.device)
        arguments = torch.zeros(1).to(h), h, h[0, :1], None, False, False, torch.ones_like(h), None, h.dtype
        ga, _, _ = context.launcher("linear_scan_bwd")(*arguments, launch=Launch(4, 1, 256))
    assert relative_error(ga, 256 * h[0, 0].double()) <= 4e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_growth_of_nothing_is_nothing_in_chunks(dtype):
    # The product of the a of a chunk overflows; what it multiplies is 0.
    case = make_case(0, 1, 160, 3, dtype=dtype, radius=(8.0, 8.0), state=False)
    x = torch.zeros_like(case.x)
    x[:, 150:] = 1
    with Implementation("triton") as context:
        h, *_ = launch(context, replace(case, x=x), launch=Launch(4, 1, 5 * SCAN_ROWS))
    assert (h[:, :150] == 0).all()
    assert h.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("fixed", [False, True])
def test_nothing_is_lost_in_chunks(dtype, fixed):
    case = make_case(1, 1, 256, 8, dtype=dtype, fixed=fixed, radius=(1.0, 1.0))
    with Implementation("triton") as context:
        results = launch(context, case, launch=Launch(8, 1, 2 * SCAN_ROWS))
    for result, wanted in zip(results, launch(CPU, replace(case, dtype=case.exact_dtype)), strict=True):
        assert relative_error(result, wanted) <= 4e-7


def test_bad_offsets_touch_no_foreign_memory(implementation):
    # On a GPU the values of cu_seqlens are not looked at; the launchers must stay in bounds whatever they are.
    if implementation.name == "cpu":
        pytest.skip("the CPU path checks the values")
    for dtype in (torch.float32, torch.complex64):
        case = make_case(0, 1, 0, 5, dtype=dtype, lengths=[7, 9, 16])
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
    itemsize=st.sampled_from((2, 4, 8, 16)),
)
def test_launch_shape_is_legal_for_every_shape(B, T, C, multiprocessors, itemsize):
    shape = scan_launch(B, T, C, multiprocessors, itemsize)
    chunks = -(-T // shape.chunk)
    assert shape.chunk % SCAN_ROWS == 0
    assert shape.block_c & (shape.block_c - 1) == 0
    assert -(-C // shape.block_c) <= 65535
    assert B * chunks < 2**31
    assert chunks == 1 or B * -(-C // shape.block_c) < 8 * multiprocessors


def test_one_chunk_where_batch_and_channels_fill_the_device():
    assert scan_launch(64, 4096, 2048, 132, 4).chunk == 4096
    assert scan_launch(1, 65536, 1024, 132, 4).chunk < 65536


def test_length_is_in_no_compile_key():
    # Read in a process of its own: interpreted kernels have no compile key.
    script = (
        "from fastwkv.kernels import linear_scan as scan, linear_scan_bwd as bwd, linear_scan_carry as carry\n"
        "from fastwkv.kernels import linear_scan_step as step\n"
        "for kernel in (scan._linear_scan_fwd_kernel, bwd._linear_scan_bwd_kernel, carry._linear_scan_carry_kernel,\n"
        "               step._linear_scan_step_kernel):\n"
        "    print(*[p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    specialised = done.stdout.split()
    assert specialised
    assert all(name.endswith("_ptr") for name in specialised)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_numbers_of_a_pair_do_not_mix(dtype):
    # An error in how real and imaginary parts are taken from memory would show in a channel that is all zero.
    case = make_case(0, 2, 20, 5, dtype=dtype)
    x, initial = case.x.clone(), case.initial.clone()
    x[..., 2], initial[:, 2] = 0, 0
    with Implementation("triton") as context:
        h, final, *_ = launch(context, replace(case, x=x, initial=initial))
    assert (h[..., 2] == 0).all()
    assert (final[:, 2] == 0).all()
    assert (h[..., 1] != 0).all()
