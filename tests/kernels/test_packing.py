"""What both passes know of packed sequences: each token's sequence, and whether it starts or ends it."""

import pytest
import torch
from guarded import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, Implementation


def edges(offsets, T, reverse):
    """Return, token by token in the order of the scan, 4 n + 2 (ends) + (starts)."""
    found = []
    for t in range(T):
        n = max(n for n in range(len(offsets) - 1) if offsets[n] <= t)
        first, last = t == offsets[n], t == offsets[n + 1] - 1
        starts, ends = (last, first) if reverse else (first, last)
        found.append(4 * n + 2 * ends + starts)
    return found[::-1] if reverse else found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=50)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 700)), min_size=1, max_size=20),
    reverse=st.booleans(),
    dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_every_token_knows_its_sequence(implementation, lengths, reverse, dtype):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets[-1])
    with Implementation(implementation) as context:
        found = context.launcher("packed_edges")(offsets.to(context.device, dtype), T, reverse)
    assert found.dtype == torch.int32
    assert found.tolist() == edges(offsets.tolist(), T, reverse)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=100)
@given(
    offsets=st.lists(st.integers(-5, 40), min_size=2, max_size=9),
    T=st.integers(1, 30),
    reverse=st.booleans(),
)
def test_offsets_that_break_the_rules_name_no_sequence_that_is_not_there(implementation, offsets, T, reverse):
    with Implementation(implementation) as context, GuardedMemory() as memory:
        offsets = memory.guarded(torch.tensor(offsets, device=context.device))
        found = context.launcher("packed_edges")(offsets, T, reverse)
        memory.check()
    assert found.shape == (T,)
    assert found.min() >> 2 >= 0
    assert found.max() >> 2 < len(offsets) - 1


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_agree_on_offsets_that_break_the_rules_in_order(reverse):
    # What no sequence covers belongs to the nearest one, on every device.
    for offsets in ([5, 12], [0, 5, 10], [0, 5, 20], [2, 5, 20], [-3, 4, 9]):
        results = []
        for implementation in IMPLEMENTATIONS:
            with Implementation(implementation) as context:
                given_offsets = torch.tensor(offsets, device=context.device)
                results.append(context.launcher("packed_edges")(given_offsets, 12, reverse).tolist())
        assert results[0] == results[1]
