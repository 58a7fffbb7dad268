"""What is peculiar to the CPU path; tests/ops holds the properties that every implementation has."""

import pytest
import torch

from fastwkv.kernels.cpu.wkv import wkv_bwd, wkv_fwd, wkv_step
from fastwkv.ops.wkv import wkv
from fastwkv.reference.wkv import WKVState, wkv_loop


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rates(C, low=-5.0, high=2.0, dtype=torch.float64):
    return torch.linspace(low, high, C, dtype=dtype).exp()


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def results(function, w, u, k, v, state, cu_seqlens=None):
    """Everything that comes out: y, the final state by its invariants, and all gradients."""
    inputs = [t.clone().requires_grad_() for t in (w, u, k, v, *state)]
    y, final = function(*inputs[:4], WKVState(*inputs[4:]), return_state=True, cu_seqlens=cu_seqlens)
    mean, weight = final.num / final.den, final.den.log() + final.max.detach()
    outputs = y, mean, weight
    gradients = torch.autograd.grad(outputs, inputs, [random(*t.shape, seed=9, dtype=t.dtype) for t in outputs])
    return *(t.detach() for t in outputs), *gradients


@pytest.mark.parametrize("C", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("offsets", [None, [0, 1, 16, 17, 40, 48, 50]])
def test_equals_reference_for_odd_widths_and_packed_sequences(C, offsets):
    B, N = (3, 3) if offsets is None else (1, len(offsets) - 1)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    inputs = rates(C), random(C), random(B, 50, C, seed=1), random(B, 50, C, seed=2)
    state = random(N, C, seed=3), random(N, C, seed=4).exp(), random(N, C, seed=5)
    ours = results(wkv, *inputs, state, cu_seqlens)
    for a, b in zip(ours, results(wkv_loop, *inputs, state, cu_seqlens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -1.0, -1e30, -torch.inf])
def test_gradients_of_a_state_without_weight(scale):
    # Zeros with an ordinary max are how a learnable initial state begins: they have a gradient. The first sequence has
    # absent tokens past a checkpoint, so that the state stays empty for long.
    C, T = 9, 40
    k, v = random(2, T, C, seed=1), random(2, T, C, seed=2)
    k[0, :20] = -torch.inf
    state = torch.zeros(2, C), torch.zeros(2, C), torch.full((2, C), scale)
    state = [t.double() for t in state]
    inputs = rates(C), random(C), k, v
    for a, b in zip(results(wkv, *inputs, state), results(wkv_loop, *inputs, state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("which", [2, 3])
def test_nan_stays_in_its_channel_and_sequence(which):
    T, C, cu_seqlens = 60, 20, torch.tensor([0, 25, 60])
    inputs = [rates(C), random(C), random(1, T, C, seed=1), random(1, T, C, seed=2)]
    inputs[which][0, 30, 4] = torch.nan
    y, final, checkpoints = wkv_fwd(*inputs, None, cu_seqlens, True)
    expected = torch.zeros(1, T, C, dtype=torch.bool)
    expected[0, 30:, 4] = True
    assert torch.equal(y.isnan(), expected)
    gk, gv = wkv_bwd(*inputs, None, cu_seqlens, checkpoints, torch.ones_like(y), None)[2:4]
    expected[0, 25:, 4] = True
    assert not (gk.isnan() | gv.isnan())[~expected].any()
    assert torch.equal(final.isnan().any(0).nonzero(), torch.tensor([[1, 4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_for_any_number_of_threads(dtype):
    B, T, C = 3, 300, 200
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = rates(C, dtype=sums), random(C, dtype=sums), random(B, T, C).to(dtype), random(B, T, C, seed=1).to(dtype)
    gy = random(B, T, C, seed=2).to(dtype)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y, final, checkpoints = wkv_fwd(*inputs, None, None, True)
            outputs.append((y, final, checkpoints, *wkv_bwd(*inputs, None, None, checkpoints, gy, None)))
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, outputs[0], strict=True))


@pytest.mark.parametrize("w", [1e-6, 1e-3, 0.1, 5.0])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_steps_do_not_drift_from_the_sequence(w, spread):
    T, C = 8192, 16
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.rand(T, C, generator=generator) * 2 - 1) * spread, torch.randn(T, C, generator=generator)
    w, u = torch.full((C,), w), torch.zeros(C)
    state = torch.zeros(1, C), torch.zeros(1, C), torch.full((1, C), -torch.inf)
    outputs = []
    for t in range(T):
        y_t, state = wkv_step(w, u, k[t : t + 1], v[t : t + 1], *state)
        outputs.append(y_t)
    y, final, _ = wkv_fwd(w, u, k[None], v[None], None, None, False)
    assert error(torch.cat(outputs), y[0]) < 2e-6
    # The mean of thousands of values of size 1 is small: its error is measured against theirs.
    torch.testing.assert_close(state[0] / state[1], final[0] / final[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(state[2] + state[1].log(), final[2] + final[1].log(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("state", [(0, 0, -torch.inf), (0, 0, -1e38), (0, 0, -65500), (1, 2, 0.5), (3, 0.1, 500)])
@pytest.mark.parametrize("k", [-torch.inf, -100.0, 0.0, 400.0])
def test_one_step_equals_a_sequence_of_one(state, k):
    C = 5
    state = torch.tensor(state, dtype=torch.float64)[:, None, None].expand(3, 2, C).contiguous()
    w, u, k, v = rates(C), random(C), torch.full((2, C), k).double(), random(2, C)
    y, final, _ = wkv_fwd(w, u, k[:, None], v[:, None], state, None, False)
    y_t, stepped = wkv_step(w, u, k, v, *state)
    torch.testing.assert_close(y_t, y[:, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stepped[0] * final[1], final[0] * stepped[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(stepped[2] + stepped[1].log(), final[2] + final[1].log(), rtol=1e-13, atol=0)


def test_gradients_are_accurate_where_decay_and_keys_are_extreme():
    T, C = 4096, 16
    generator = torch.Generator().manual_seed(0)
    k, v = torch.rand(1, T, C, generator=generator) * 120 - 60, torch.randn(1, T, C, generator=generator)
    w, u, gy = rates(C, -13.8, 3.0, torch.float32), random(C).float(), random(1, T, C).float()
    y, _, checkpoints = wkv_fwd(w, u, k, v, None, None, True)
    gradients = wkv_bwd(w, u, k, v, None, None, checkpoints, gy, None)[:4]
    exact = [t.double().requires_grad_() for t in (w, u, k, v)]
    y64 = wkv_loop(*exact)
    assert error(y, y64) < 1e-6
    for ours, theirs in zip(gradients, torch.autograd.grad(y64, exact, gy.double()), strict=True):
        assert error(ours, theirs) < 5e-6


@pytest.mark.parametrize("w", [1e30, -1e30, 3e38])
def test_w_beyond_all_bounds_gives_numbers(w):
    inputs = torch.full((16,), w), torch.zeros(16), random(1, 40, 16).float(), random(1, 40, 16, seed=1).float()
    y, final, checkpoints = wkv_fwd(*inputs, None, None, True)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in wkv_bwd(*inputs, None, None, checkpoints, torch.ones_like(y), None))
    assert final.isfinite().all()
