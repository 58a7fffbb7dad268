"""The definition against what is known of it without any recurrence."""

import torch

from fastwkv import reference


def test_equals_the_sum_over_all_paths():
    # h_t = Σ_i (a_{i+1} ... a_t) x_i + (a_0 ... a_t) h_0
    generator = torch.Generator().manual_seed(0)
    a, x = torch.randn(2, 2, 9, 3, generator=generator, dtype=torch.complex128).unbind(0)
    initial = torch.randn(2, 3, generator=generator, dtype=torch.complex128)
    h = reference.linear_scan(a, x, initial)
    for t in range(9):
        wanted = a[:, : t + 1].prod(1) * initial
        for i in range(t + 1):
            wanted = wanted + a[:, i + 1 : t + 1].prod(1) * x[:, i]
        torch.testing.assert_close(h[:, t], wanted, rtol=1e-12, atol=1e-12)


def test_constant_multiplier_is_a_geometric_series():
    a = torch.tensor([0.5, 0.9, -0.99, 1.0], dtype=torch.float64)
    h, final = reference.linear_scan(a, torch.ones(1, 50, 4, dtype=torch.float64), return_state=True)
    steps = torch.arange(1, 51, dtype=torch.float64)[:, None]
    wanted = torch.where(a == 1, steps, (1 - a**steps) / torch.where(a == 1, 1, 1 - a))
    torch.testing.assert_close(h[0], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, h[:, -1], rtol=0, atol=0)


def test_reverse_and_packed_sequences_and_steps_mean_what_they_say():
    generator = torch.Generator().manual_seed(0)
    log_a, x = torch.randn(2, 1, 9, 3, generator=generator, dtype=torch.float64).unbind(0)
    cut = torch.tensor([0, 4, 9])
    h, final = reference.linear_scan(None, x, log_a=log_a, reverse=True, cu_seqlens=cut, return_state=True)
    state = torch.zeros(1, 3, dtype=torch.float64)
    for t in range(3, -1, -1):
        state = reference.linear_scan_step(None, x[:, t], state, log_a=log_a[:, t])
        torch.testing.assert_close(h[:, t], state, rtol=1e-14, atol=0)
    torch.testing.assert_close(final[:1], state, rtol=1e-14, atol=0)


def test_sixteen_bits_accumulate_in_float32():
    x = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    h, final = reference.linear_scan(torch.ones(1, dtype=torch.bfloat16), x, return_state=True)
    assert h.dtype == torch.bfloat16
    assert final.item() == 3000
