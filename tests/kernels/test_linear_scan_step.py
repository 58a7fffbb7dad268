"""One token of the linear scan: what a step loses, thousands would add up."""

import numpy as np
import pytest
import torch
from guarded import GuardedMemory
from implementations import Implementation
from scan_cases import DTYPES, make_case


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(a, x, state, log=False):
    """Return the state after one token."""
    with Implementation("triton") as context:
        return context.launcher("linear_scan_step")(*(t.to(context.device) for t in (a, x, state)), log).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_step_is_rounded_once(dtype, fixed):
    a = normal(0, 500, dtype=dtype) if fixed else normal(0, 4, 500, dtype=dtype)
    x, state = normal(1, 4, 500, dtype=dtype), normal(2, 4, 500, dtype=dtype)
    h = step(a, x, state)
    wide = torch.promote_types(dtype, torch.float64)
    error = h.to(wide) - (a.to(wide) * state.to(wide) + x.to(wide))
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (error, h)]
    assert (np.abs(parts[0].numpy()) <= 0.501 * np.spacing(np.abs(parts[1].numpy()))).all()


def test_rounding_of_a_log_multiplier_is_not_that_of_every_step():
    # Of a state to which nothing is added: what e^a as a float32 is off by would be the same at every token.
    log_a = torch.linspace(-1e-2, -1e-4, 16)
    state = 1 + normal(0, 512, 16).abs()
    h = step(log_a, torch.zeros_like(state), state, log=True)
    error = h.double() / (log_a.double().exp() * state.double()) - 1
    assert error.mean(0).abs().max() <= 6e-9  # of 512 errors of 3e-8 and less


@pytest.mark.parametrize("part", [0, 1])
def test_part_that_overflows_is_infinite_and_the_other_as_ever(part):
    large = 0.9 * torch.finfo(torch.float32).max
    x = torch.ones(1, 3, 2)
    x[..., part] = large
    x = torch.view_as_complex(x)
    h = torch.view_as_real(step(torch.ones(3, dtype=torch.complex64), x, x))
    assert (h[..., part] == torch.inf).all()
    assert (h[..., 1 - part] == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_keeps_to_its_memory(implementation, dtype):
    case = make_case(0, 3, 1, 43, dtype=dtype)
    a, x, state, _ = (t if t is None else t.detach() for t in case.arguments(implementation.device))
    inputs = [t.contiguous() for t in (a[:, 0], x[:, 0], state)]
    step = implementation.launcher("linear_scan_step")
    with GuardedMemory() as memory:
        result = step(*(memory.guarded(t) for t in inputs), False)
        memory.check()
    torch.testing.assert_close(result, step(*inputs, False), rtol=0, atol=0)
