"""The adjoint of the linear scan that writes the gradient of x over that of h: the same bits, in less memory."""

import pytest
import torch
from guarded import GuardedMemory
from implementations import Implementation
from scan_cases import DTYPES, make_case

from fastwkv.kernels.config import SCAN_ROWS, Launch

ODD, WHOLE = 19, 64  # channels: the last vector of a row overlaps with the one before, or all are whole


def arguments(case, device, pairs=False):
    """Return what both launchers take, gh as the last but one."""
    a, x, initial, cut = (t if t is None else t.detach() for t in case.arguments(device))
    x = torch.view_as_real(x).to(torch.bfloat16) if pairs else x
    h, final = torch.randn_like(x), torch.randn(case.rows, x.shape[2]).to(device, case.state_dtype)
    return [a, h, initial, cut, case.log, case.reverse, torch.randn_like(x), final]


def assert_same(implementation, given, **options):
    launcher = implementation.launcher
    *before, gh, gfinal = given
    wanted = launcher("linear_scan_bwd")(*before, gh.clone(), gfinal, gh.dtype, **options)
    with GuardedMemory() as memory:
        gx = memory.guarded(gh)
        address = gx.data_ptr()
        ga, ginitial = launcher("linear_scan_bwd_")(*before, gx, gfinal, **options)
        memory.check()
    assert gx.data_ptr() == address
    for found, expected in zip((ga, gx, ginitial), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(gx, gh)


@pytest.mark.parametrize("channels", [3, ODD, WHOLE])
@pytest.mark.parametrize("lengths", [None, [16, 3, 30]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_over_the_gradient_of_h(implementation, dtype, lengths, channels):
    fixed, reverse, state = channels == ODD, channels != WHOLE, lengths is not None
    log = not dtype.is_complex and not fixed
    T = 0 if lengths else 35
    case = make_case(
        0, 2, T, channels, dtype=dtype, fixed=fixed, log=log, reverse=reverse, state=state, lengths=lengths
    )
    assert_same(implementation, arguments(case, implementation.device))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("channels", [ODD, WHOLE])
def test_same_bits_of_pairs(implementation, channels, fixed):
    case = make_case(0, 2, 35, channels, dtype=torch.complex64, fixed=fixed)
    assert_same(implementation, arguments(case, implementation.device, pairs=True))


@pytest.mark.parametrize("lengths", [None, [40, 56, 9]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_same_bits_in_chunks(dtype, lengths):
    T = 0 if lengths else 70
    case = make_case(0, 2, T, 5, dtype=dtype, fixed=dtype.is_complex, lengths=lengths)
    with Implementation("triton") as context:
        given = arguments(case, context.device, pairs=dtype.is_complex)
        assert_same(context, given, launch=Launch(4, 1, SCAN_ROWS))


def test_a_gradient_with_gaps_is_written_too():
    case = make_case(0, 2, 35, WHOLE)
    with Implementation("cpu") as context:
        *before, gh, gfinal = arguments(case, context.device)
        wide = torch.empty(2, 35, 2 * WHOLE)
        spread = wide[..., ::2].copy_(gh)
        _, gx, _ = context.launcher("linear_scan_bwd")(*before, gh, gfinal, gh.dtype)
        context.launcher("linear_scan_bwd_")(*before, spread, gfinal)
    torch.testing.assert_close(spread, gx, rtol=0, atol=0)
