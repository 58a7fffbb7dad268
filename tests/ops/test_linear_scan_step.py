"""What a step of the linear scan takes and refuses: the shortcut for ordinary arguments takes nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastwkv import linear_scan_step
from fastwkv.ops import checks

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.int64)
SHAPES = ((3,), (2, 3), (1, 3), (2,), (2, 3, 2), (0, 3), (2, 0), ())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_ordinary_step_is_looked_at_once(dtype, fixed, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a check that finds words for what is wrong")

    for name in ("check_device", "check_dtype", "check_rank", "check_shape", "are_pairs"):
        monkeypatch.setattr(checks, name, refuse)
    a, x, h = torch.rand((3,) if fixed else (2, 3)).to(dtype), *torch.rand(2, 2, 3).to(dtype)
    torch.testing.assert_close(linear_scan_step(a, x, h), a * h + x)
    torch.testing.assert_close(linear_scan_step(torch.nn.Parameter(a), x, h), a * h + x)


@given(st.tuples(*[st.sampled_from(SHAPES)] * 3), st.tuples(*[st.sampled_from(DTYPES[:2] * 3 + DTYPES)] * 3))
def test_step_takes_what_fits_and_refuses_the_rest(shapes, dtypes):
    a, x, h = (torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    pairs = a.is_complex() and not x.is_complex() and x.dim() == 3
    rows = x.shape[:2] if pairs else x.shape
    fits = (
        torch.int64 not in dtypes
        and len(rows) == 2
        and 0 not in rows
        and a.shape in (rows, rows[1:])
        and h.shape == rows
        and h.dtype == torch.promote_types(torch.promote_types(a.dtype, x.dtype), torch.float32)
    )
    if fits:
        assert linear_scan_step(a, x, h).shape == rows
    else:
        with pytest.raises((TypeError, ValueError)):
            linear_scan_step(a, x, h)


@pytest.mark.parametrize("wrong", range(3))
@pytest.mark.parametrize("value", [0.5, [1.0], torch.ones(2, 3, device="meta")])
def test_step_refuses_what_is_no_tensor_or_elsewhere(wrong, value):
    arguments = [torch.ones(2, 3) for _ in range(3)]
    arguments[wrong] = value
    with pytest.raises((TypeError, ValueError)):
        linear_scan_step(*arguments)
