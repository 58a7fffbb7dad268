"""The adjoint of WKV on a GPU where rounding errors would add up, or keys are far from zero."""

import torch
from comparison import relative_error
from implementations import Implementation

from fastwkv.kernels.config import Launch

TOKENS = 256


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(w, u, k, v, initial, gy, gfinal, dtype=torch.float32):
    """Return gw, gu, gk, gv and (gm, gl) before the first token; of one chunk."""
    with Implementation("triton") as context:
        w, u, k, v, initial, gy, gfinal = (t.to(context.device, dtype) for t in (w, u, k, v, initial, gy, gfinal))
        launch = Launch(32, 1, k.shape[1])
        *_, checkpoints = context.launcher("wkv_fwd")(w, u, k, v, initial, None, True, launch=launch)
        return context.launcher("wkv_bwd")(w, u, k, v, initial, None, checkpoints, gy, gfinal, launch=launch)


def test_adjoints_pass_through_absent_tokens_unchanged():
    # A factor 1-r that is 1 but for its rounding would be the same at every token.
    C = 32
    initial = torch.stack((normal(0, 1, C), normal(1, 1, C).abs() + 0.1, torch.zeros(1, C)))
    k, v = torch.full((1, TOKENS, C), -torch.inf), normal(2, 1, TOKENS, C)
    gfinal = normal(3, 2, 1, C)
    *_, ginitial = gradients(torch.zeros(C), torch.zeros(C), k, v, initial, torch.zeros_like(v), gfinal)
    torch.testing.assert_close(ginitial.cpu(), gfinal, rtol=0, atol=0)


def test_gradients_of_rates_are_sums_of_sums():
    # Terms of one sign, nearly the same at every token.
    C = 8
    sign = (1 - 2 * (torch.arange(TOKENS) % 2))[None, :, None].expand(1, TOKENS, C).float()
    scale = torch.linspace(0.5, 1.0, C)
    inputs = torch.ones(C), torch.zeros(C), 0 * sign, sign * scale, torch.zeros(3, 1, C), sign, torch.zeros(2, 1, C)
    for result, wanted in zip(gradients(*inputs)[:2], gradients(*inputs, dtype=torch.float64)[:2], strict=True):
        assert relative_error(result, wanted) <= 8e-7  # one running sum is off by 2e-6


def test_constant_added_to_keys_changes_no_gradient():
    C, T = 32, 32
    k = (normal(0, 1, T, C) * 2**10).round() / 2**10  # so that adding the integer is exact
    w = torch.linspace(0.01, 1, C)
    empty = torch.zeros(3, 1, C)
    empty[2] = -torch.inf
    rest = normal(1, 1, T, C), empty, normal(2, 1, T, C)
    results = [gradients(w, normal(3, C), keys, *rest, normal(4, 2, 1, C)) for keys in (k, k + 64)]
    for result, wanted in zip(results[0][:4], results[1][:4], strict=True):
        assert relative_error(result, wanted) <= 3e-7
