"""PyTorch's own gradient check in float64 and complex128: all inputs, both outputs, both modes, both orders."""

import pytest
import torch
from implementations import Implementation
from scan_cases import make_case

from fastwkv import linear_scan, reference

FUNCTIONS = {"reference": (None, reference.linear_scan), "cpu": ("cpu", linear_scan), "triton": ("triton", linear_scan)}
DTYPES = (torch.float64, torch.complex128)


def setting(function, context, T=7, **options):
    """Return a function of leaves only, and the leaves."""
    case = make_case(2, 2, T, 2, radius=(0.4, 1.0), **options)
    given, x, initial, cu = case.arguments(context.device)

    def outputs(given, x, *initial):
        first = None if case.log else given
        state = initial[0] if initial else None
        return function(first, x, state, return_state=True, cu_seqlens=cu, **case.options(given))

    return outputs, (given, x, *(() if initial is None else (initial,)))


@pytest.mark.parametrize("lengths", [None, [3, 1, 5], [11, 2, 21]])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name, dtype, fixed, state, lengths):
    implementation, function = FUNCTIONS[name]
    with Implementation(implementation or "cpu") as context:
        # Variations that have nothing to do with each other are drawn from the others.
        log, reverse = fixed == state, (lengths is None) == state
        outputs, inputs = setting(
            function, context, dtype=dtype, fixed=fixed, state=state, lengths=lengths, log=log, reverse=reverse
        )
        # An interpreted call takes milliseconds: there, and for long inputs, along random directions instead of all.
        fast = lengths == [11, 2, 21] or context.interpreted
        assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("lengths", [None, [3, 1, 5]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_that_can_be_differentiated_is_the_same(dtype, log, fixed, reverse, lengths):
    for state in (False, True):
        outputs, inputs = setting(
            linear_scan, Implementation("cpu"), dtype=dtype, log=log, fixed=fixed, reverse=reverse, lengths=lengths,
            state=state,
        )  # fmt: skip
        results = outputs(*inputs)
        cotangents = [torch.randn_like(result) for result in results]
        wanted = torch.autograd.grad(results, inputs, cotangents, retain_graph=True)
        composed = torch.autograd.grad(results, inputs, cotangents, create_graph=True)
        for result, want in zip(composed, wanted, strict=True):
            torch.testing.assert_close(result, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_of_the_jacobian_is_right_for_interpreted_kernels(dtype):
    with Implementation("triton") as context:
        outputs, inputs = setting(linear_scan, context, T=3, dtype=dtype)
        assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("lengths", [None, [3, 1, 5]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_and_forward_mode_are_those_of_finite_differences(dtype, log, fixed, reverse, lengths):
    with Implementation("cpu") as context:
        for state in (False, True):
            outputs, inputs = setting(
                linear_scan, context, dtype=dtype, log=log, fixed=fixed, reverse=reverse, lengths=lengths, state=state
            )
            assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)
            # By itself, this checks the backward pass too.
            assert torch.autograd.gradcheck(
                outputs, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False
            )
