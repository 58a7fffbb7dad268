"""What is peculiar to the CPU path; tests/ops holds the properties that every implementation has."""

import itertools
import platform

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from numba import njit

from fastwkv.kernels.cpu import work
from fastwkv.kernels.cpu.linear_scan import _linear_scan_fwd_kernel, linear_scan_bwd, linear_scan_fwd, linear_scan_step
from fastwkv.kernels.cpu.linear_scan_bwd import _linear_scan_bwd_kernel
from fastwkv.kernels.cpu.linear_scan_state import scan_constants
from fastwkv.ops.linear_scan import linear_scan
from fastwkv.reference.linear_scan import linear_scan as reference

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
OFFSETS = [0, 1, 16, 17, 40, 48, 50]
# ‖error‖/‖reference‖ of h and of gradients: about one rounding. In float64 the reference rounds at every step.
ROUNDING = {
    torch.float32: (5e-8, 2e-7),
    torch.complex64: (5e-8, 2e-7),
    torch.float64: (3e-15, 1e-14),
    torch.complex128: (3e-15, 1e-14),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (5e-4, 1e-3),
}
# Without such an instruction the error of a product is not known, and results are those of an ordinary loop.
FUSED = platform.machine() not in ("x86_64", "AMD64") or bool(llvm.get_host_cpu_features().get("fma"))
fused = pytest.mark.skipif(not FUSED, reason="needs fused multiply-adds")


def wide(dtype):
    return torch.complex128 if dtype.is_complex else torch.float64


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide(dtype)).to(dtype)


def multipliers(*shape, log=False, seed=0, dtype=torch.float64):
    """|a| <= 1, or log a <= 0."""
    a = random(*shape, seed=seed, dtype=wide(dtype))
    return (-a.abs() if log else a / a.abs().clamp(min=1)).to(dtype)


def error(a, b):
    b = b.to(wide(b.dtype))
    return ((a.to(b.dtype) - b).norm() / b.norm()).item()


def results(function, a, x, initial, log=False, **settings):
    """Everything that comes out: h, the final state and all gradients."""
    inputs = [t.clone().requires_grad_() for t in (a, x, initial)]
    multiplier = {"a": None, "log_a": inputs[0]} if log else {"a": inputs[0]}
    outputs = function(x=inputs[1], initial_state=inputs[2], return_state=True, **multiplier, **settings)
    gradients = torch.autograd.grad(
        outputs, inputs, [random(*t.shape, seed=9 + i, dtype=x.dtype).to(t.dtype) for i, t in enumerate(outputs)]
    )
    return *(t.detach() for t in outputs), *gradients


def exact(a, x, log=False, reverse=False):
    """h and the gradients of a and x for gh = 1, in float64."""
    inputs = [t.to(wide(x.dtype)).requires_grad_() for t in (a, x)]
    h = reference(None if log else inputs[0], inputs[1], log_a=inputs[0] if log else None, reverse=reverse)
    return h.detach(), *torch.autograd.grad(h, inputs, torch.ones_like(h))


def ours(a, x, log=False, reverse=False):
    h, _ = linear_scan_fwd(a, x, None, None, log, reverse)
    ga, gx, _ = linear_scan_bwd(a, h, None, None, log, reverse, torch.ones_like(h), None, x.dtype)
    return h, ga, gx


@pytest.mark.parametrize("C", [1, 3, 4, 7, 9, 16, 37])
@pytest.mark.parametrize("offsets", [None, OFFSETS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_reference_for_odd_widths_and_packed_sequences(C, offsets, dtype):
    B, N = (2, 2) if offsets is None else (1, len(offsets) - 1)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    x, initial = random(B, 50, C, seed=1, dtype=dtype), random(N, C, seed=2, dtype=dtype)
    for shape, log, reverse in itertools.product([(C,), (B, 50, C)], [False, not dtype.is_complex], [False, True]):
        a = multipliers(*shape, log=log, dtype=dtype)
        settings = {"log": log, "reverse": reverse, "cu_seqlens": cu_seqlens}
        expected = results(reference, a, x, initial, **settings)
        for p, q in zip(results(linear_scan, a, x, initial, **settings), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@fused
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_dtype_is_exact_to_a_rounding(dtype, fixed):
    B, T, C = 2, 70, 33
    state_dtype = torch.promote_types(dtype, torch.float32)
    x, initial = random(B, T, C, seed=1, dtype=dtype), random(B, C, seed=2, dtype=state_dtype)
    for log, reverse in itertools.product([False, not dtype.is_complex], [False, True]):
        a = multipliers(*((C,) if fixed else (B, T, C)), log=log, dtype=dtype)
        settings = {"log": log, "reverse": reverse}
        arguments = [t.to(wide(dtype)) for t in (a, x, initial)]
        expected = results(reference, *arguments, **settings)
        for i, (p, q) in enumerate(zip(results(linear_scan, a, x, initial, **settings), expected, strict=True)):
            assert p.dtype == (dtype if i in (0, 2, 3) else state_dtype)
            assert error(p, q) < ROUNDING[dtype][i >= 2]


@pytest.mark.parametrize(("a_dtype", "x_dtype"), [p for p in itertools.product(REAL, REAL) if p[0] != p[1]])
@pytest.mark.parametrize("log", [False, True])
def test_mixed_dtypes_give_the_bits_of_the_wider_one(a_dtype, x_dtype, log):
    B, T, C = 1, 20, 19
    dtype = torch.promote_types(a_dtype, x_dtype)
    for shape in ((C,), (B, T, C)):
        a, x = multipliers(*shape, log=log, dtype=a_dtype), random(B, T, C, seed=1, dtype=x_dtype)
        gradients = linear_scan_bwd(a, random(B, T, C, dtype=dtype), None, None, log, False, x.to(dtype), None, x_dtype)
        expected = linear_scan_bwd(
            a.to(dtype), random(B, T, C, dtype=dtype), None, None, log, False, x.to(dtype), None, dtype
        )
        h, final = linear_scan_fwd(a, x, None, None, log, False)
        assert torch.equal(h, linear_scan_fwd(a.to(dtype), x.to(dtype), None, None, log, False)[0])
        assert (h.dtype, final.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
        for p, q, kept in zip(gradients, expected, (a_dtype, x_dtype, final.dtype), strict=True):
            assert torch.equal(p, q.to(kept))


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX])
def test_same_bits_for_any_number_of_threads(dtype):
    B, T, C = 3, 300, 200
    x, gh = random(B, T, C, seed=1, dtype=dtype), random(B, T, C, seed=2, dtype=dtype)
    gates = [(multipliers(C, dtype=dtype), False), (multipliers(B, T, C, dtype=dtype), False)]
    if not dtype.is_complex:
        gates.append((multipliers(B, T, C, log=True, dtype=dtype), True))
    threads = torch.get_num_threads()
    try:
        for a, log in gates:
            outputs = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                h, final = linear_scan_fwd(a, x, None, None, log, False)
                outputs.append((h, final, *linear_scan_bwd(a, h, None, None, log, False, gh, None, dtype)))
            for other in outputs[1:]:
                assert all(torch.equal(p, q) for p, q in zip(other, outputs[0], strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("which", ["a", "x"])
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_channel_and_sequence(dtype, which, reverse):
    T, C, cu_seqlens = 60, 20, torch.tensor([0, 25, 60])
    a, x = multipliers(1, T, C, dtype=dtype), random(1, T, C, seed=1, dtype=dtype)
    (a if which == "a" else x)[0, 40, 4] = torch.nan
    h, final = linear_scan_fwd(a, x, None, cu_seqlens, False, reverse)
    expected = torch.zeros(1, T, C, dtype=torch.bool)
    expected[0, slice(25, 41) if reverse else slice(40, T), 4] = True
    assert torch.equal(h.isnan(), expected)
    assert torch.equal(final.isnan().nonzero(), torch.tensor([[1, 4]]))
    ga, gx, _ = linear_scan_bwd(a, h, None, cu_seqlens, False, reverse, torch.ones_like(h), None, dtype)
    assert not (ga.isnan() | gx.isnan())[:, :25].any()
    assert not (ga.isnan() | gx.isnan())[..., torch.arange(C) != 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_overflow_is_infinite_as_in_a_plain_loop(dtype):
    C, T = 16, 20
    large = torch.finfo(dtype).max / 2
    a, x = torch.full((C,), 2.0, dtype=dtype), torch.zeros(1, T, C, dtype=dtype)
    x[:, 0] = large
    h = torch.view_as_real(linear_scan_fwd(a, x, None, None, False, False)[0].to(torch.complex128))[..., 0]
    assert torch.equal(h[0, :2, 0], torch.tensor([large, 2 * large], dtype=torch.float64))
    if dtype.is_complex:
        assert not h[0, 2:].isfinite().any()  # (inf + 0i) (2 + 0i) has a NaN
    else:
        assert (h[0, 2:] == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fixed", [False, True])
def test_log_gates_of_any_size(dtype, fixed):
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64).log().item()
    values = [0.0, -0.0, -1e-3, 1.0, -80.0, 80.0, 81.0, largest - 0.1, largest - 1e-3, -1e30, -torch.inf]
    beyond = [largest + 1e-3, 144.0 * (1 if dtype == torch.float32 else 9), 1e30, torch.inf]
    a = torch.tensor([*values, *beyond, torch.nan], dtype=dtype)
    C, n = len(a), len(values)
    x, initial = torch.zeros(1, 1, C, dtype=dtype), torch.ones(1, C, dtype=dtype)
    log_a = a if fixed else a.expand(1, 1, C).contiguous()
    h, final = linear_scan_fwd(log_a, x, initial, None, True, False)
    torch.testing.assert_close(final, h[:, 0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(h[0, 0, :n], a[:n].exp(), rtol=3 * torch.finfo(dtype).eps, atol=0)
    assert (h[0, 0, n:-1] == torch.inf).all()
    assert h[0, 0, -1].isnan()
    ga, gx, ginitial = linear_scan_bwd(log_a, h, initial, None, True, False, torch.ones_like(h), None, dtype)
    assert torch.equal(gx, torch.ones_like(gx))
    for g in (ga.reshape(C), ginitial[0]):
        torch.testing.assert_close(g, final[0], rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_nothing_is_lost_in_8192_steps_that_forget_nothing(dtype, fixed, positive):
    # A plain loop is wrong by 1e-6 to 3e-6 here.
    T, C = 8192, 16
    shape = (C,) if fixed else (1, T, C)
    if dtype.is_complex:
        a = torch.polar(torch.ones(shape), random(*shape, seed=1).float() * (0 if positive else 1))
    else:
        a = torch.ones(shape) if positive else random(*shape, seed=1).sign().float()
    x = random(1, T, C, seed=2, dtype=dtype)
    x = x.abs().to(dtype) if positive else x
    for p, q, bound in zip(ours(a, x), exact(a, x), (5e-8, 1e-7, 5e-8), strict=True):
        assert error(p, q) < bound


@fused
@pytest.mark.parametrize("log_a", [-1e-2, -1e-4])
@pytest.mark.parametrize("fixed", [False, True])
def test_slow_gates_decay_as_they_should(log_a, fixed):
    # e^log_a as one float32 is wrong by 3e-8, and with it h by 5e-5 where log a is -1e-4.
    T, C = 8192, 16
    log_a = torch.full((C,) if fixed else (1, T, C), log_a) * random(C, seed=1).abs().float()
    x = random(1, T, C, seed=2).abs().float()
    for p, q in zip(ours(log_a, x, log=True), exact(log_a, x, log=True), strict=True):
        assert error(p, q) < 1e-7


def test_steps_of_slow_gates_do_not_drift_from_the_sequence():
    T, C = 8192, 16
    log_a, x = -1e-4 * random(C, seed=1).abs().float(), random(1, T, C, seed=2).abs().float()
    state = torch.zeros(1, C)
    for t in range(T):
        state = linear_scan_step(log_a, x[:, t], state, True)
    assert error(state, linear_scan_fwd(log_a, x, None, None, True, False)[1]) < 2e-6


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_accurate_after_many_steps(dtype, reverse):
    T, C = 4096, 8
    gh = random(1, T, C, seed=3, dtype=dtype)
    for fixed in (False, True):
        a = multipliers(*((C,) if fixed else (1, T, C)), seed=1, dtype=torch.complex128)
        a = a / a.abs() * (1 - a.abs() * 1e-4)
        a = (a if dtype.is_complex else a.abs()).to(dtype)
        x, initial = random(1, T, C, seed=2, dtype=dtype), random(1, C, seed=4, dtype=dtype)
        h, _ = linear_scan_fwd(a, x, initial, None, False, reverse)
        gradients = linear_scan_bwd(a, h, initial, None, False, reverse, gh, initial, dtype)
        inputs = [t.to(wide(dtype)).requires_grad_() for t in (a, x, initial)]
        outputs = reference(*inputs, reverse=reverse, return_state=True)
        expected = torch.autograd.grad(outputs, inputs, (gh.to(wide(dtype)), initial.to(wide(dtype))))
        for p, q in zip(gradients, expected, strict=True):
            assert error(p, q) < 2e-7


@pytest.mark.parametrize("huge_pages", [True, False])
def test_large_results_with_and_without_huge_pages(huge_pages, monkeypatch):
    if not huge_pages:
        monkeypatch.setattr(work, "_madvise", None)
    x = random(2, 2048, 300, seed=1, dtype=torch.complex64)  # 5 pages of 2 MiB, and no multiple of one
    a = multipliers(300, dtype=torch.complex64)
    h, final = linear_scan_fwd(a, x, None, None, False, False)
    assert torch.equal(h[:, -1], final)
    assert torch.equal(h[:1, :9], linear_scan_fwd(a, x[:1, :9], None, None, False, False)[0])
    assert torch.equal(h[1:], linear_scan_fwd(a, x[1:], None, None, False, False)[0])


def test_offsets_are_checked_where_memory_is_touched():
    x = torch.zeros(1, 8, 16)
    for offsets in ([0, 9], [0, 5, 4, 8], [1, 8]):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T = 8 without decreasing"):
            linear_scan_fwd(x, x, None, torch.tensor(offsets), False, False)


@pytest.mark.skipif(not llvm.get_host_cpu_features().get("avx2"), reason="looks for the instructions of AVX")
@pytest.mark.parametrize(("kernel", "pointers"), [(_linear_scan_fwd_kernel, 5), (_linear_scan_bwd_kernel, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_loop_over_time_calls_nothing(kernel, pointers, dtype):
    # numba counts references to the tags of functions with branches: five times slower, and the results are the same.
    compiled = njit(nogil=True, error_model="numpy", boundscheck=False)(kernel.py_func)
    tags = scan_constants(torch.empty(0, dtype=dtype), dtype, log=dtype == torch.float32)
    compiled(*[0] * pointers, np.array((0, 1)), (1, 16), (1, 16), (16, 0, 0), *tags)
    (assembly,) = compiled.inspect_asm().values()
    lines = assembly.splitlines()
    arithmetic = [i for i, line in enumerate(lines) if "vfm" in line or "vfnm" in line]
    assert len(arithmetic) >= 5
    assert not [line for line in lines[arithmetic[0] : arithmetic[-1]] if "call" in line]
