"""PyTorch's own gradient check in float64: all inputs, both invariants of the final state."""

import pytest
import torch
from implementations import Implementation
from wkv_cases import make_case, state_invariants

from fastwkv import WKVState, reference, wkv

FUNCTIONS = {
    "definition": (None, reference.wkv),
    "loop": (None, reference.wkv_loop),
    "cpu": ("cpu", wkv),
    "triton": ("triton", wkv),
}


@pytest.mark.parametrize("lengths", [None, [3, 1, 5], [11, 2, 21]])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name, state, lengths):
    implementation, function = FUNCTIONS[name]
    with Implementation(implementation or "cpu") as context:
        case = make_case(2, 2, 9, 2, dtype=torch.float64, state=state, lengths=lengths, rates=(0.1, 2.0))
        w, u, k, v, initial, cu = case.arguments(context.device)

        def outputs(w, u, k, v, *initial):
            state = WKVState(*initial) if initial else None
            y, final = function(w, u, k, v, state, return_state=True, cu_seqlens=cu)
            return y, *state_invariants(final).values()

        # An interpreted call takes milliseconds: there, and for long inputs, along random directions instead of all.
        fast = case.k.shape[1] > 9 or context.interpreted
        inputs = (w, u, k, v, *(initial or ()))
        assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("state", [False, True])
def test_every_entry_of_the_jacobian_is_right_for_interpreted_kernels(state):
    with Implementation("triton") as context:
        case = make_case(2, 1, 4, 1, dtype=torch.float64, state=state, rates=(0.1, 2.0))
        w, u, k, v, initial, _ = case.arguments(context.device)

        def outputs(w, u, k, v, *initial):
            y, final = wkv(w, u, k, v, WKVState(*initial) if initial else None, return_state=True)
            return y, *state_invariants(final).values()

        assert torch.autograd.gradcheck(outputs, (w, u, k, v, *(initial or ())), eps=1e-6, atol=1e-7, rtol=1e-6)
