"""What both passes know of packed sequences: each token's sequence, and whether it starts or ends it."""

from itertools import pairwise

import pytest
import torch
from guarded import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, Implementation, packed_lengths

from fastwkv.kernels.config import Launch

CPU = Implementation("cpu")  # itself held to the reference


def edges(offsets, T, reverse):
    """Return, token by token in the order of the scan, 4 n + 2 (ends) + (starts) of its sequence, or -1."""
    found = [-1] * T
    for n, (begin, end) in enumerate(pairwise(offsets)):
        if begin >= 0 and end <= T:
            for t in range(begin, end):
                first, last = t == begin, t == end - 1
                starts, ends = (last, first) if reverse else (first, last)
                found[t] = 4 * n + 2 * ends + starts
    return found[::-1] if reverse else found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=50)
@given(
    lengths=packed_lengths(700, sequences=20),
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
    offsets=st.lists(st.integers(-5, 40), min_size=2, max_size=9).map(sorted),
    T=st.integers(1, 30),
    reverse=st.booleans(),
)
def test_what_no_sequence_covers_belongs_to_none(implementation, offsets, T, reverse):
    with Implementation(implementation) as context, GuardedMemory() as memory:
        found = context.launcher("packed_edges")(
            memory.guarded(torch.tensor(offsets, device=context.device)), T, reverse
        )
        memory.check()
    assert found.tolist() == edges(offsets, T, reverse)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=200)
@given(
    offsets=st.lists(st.integers(-5, 40), min_size=2, max_size=9),
    T=st.integers(1, 30),
    reverse=st.booleans(),
)
def test_where_offsets_decrease_sequences_are_whole_or_have_no_token(implementation, offsets, T, reverse):
    with Implementation(implementation) as context, GuardedMemory() as memory:
        found = context.launcher("packed_edges")(
            memory.guarded(torch.tensor(offsets, device=context.device)), T, reverse
        )
        memory.check()
    found = found.tolist()[::-1] if reverse else found.tolist()
    for n, (begin, end) in enumerate(pairwise(offsets)):
        tokens = [t for t in range(T) if found[t] >> 2 == n]
        assert tokens in ([], list(range(begin, end)))
        first, last = (2, 1) if reverse else (1, 2)
        assert [t for t in tokens if found[t] & first] == tokens[:1]
        assert [t for t in tokens if found[t] & last] == tokens[-1:]
    assert max(found) >> 2 < len(offsets) - 1
    assert min(found) >= -1


@pytest.mark.parametrize("operator", ["wkv", "linear_scan", "linear_scan complex"])
@settings(max_examples=25)
@given(
    offsets=st.lists(st.integers(-3, 24), min_size=2, max_size=6),
    in_order=st.booleans(),
    T=st.integers(1, 20),
    chunk=st.sampled_from((8, 16, 32)),
    state=st.booleans(),
    reverse=st.booleans(),
    fixed=st.booleans(),
)
def test_nan_for_what_no_sequence_covers_and_nothing_else(operator, offsets, in_order, T, chunk, state, reverse, fixed):
    offsets = sorted(offsets) if in_order else offsets
    N, C = len(offsets) - 1, 3
    wkv = operator == "wkv"
    dtype = {"wkv": torch.float64, "linear_scan": torch.float64}.get(operator, torch.complex128)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    with Implementation("triton") as context, GuardedMemory() as memory:

        def run(context, cut, piece, rows, **options):
            forward, backward = (context.launcher(f"{operator.split()[0]}_{way}") for way in ("fwd", "bwd"))
            x, g, gates = (t[:, piece].to(context.device) for t in (xs, gs, all_gates))
            a, bonus = rates.to(context.device), bonuses.to(context.device)
            states = (None if t is None else t[..., rows, :].to(context.device) for t in (initials, gfinals))
            initial, gfinal = (None if t is None else memory.guarded(t) for t in states)
            if wkv:
                given = (a, bonus, x, g.flip(-1))
                y, final, kept = forward(*given, initial, cut, True, **options)
                _, _, gx, ga, ginitial = backward(*given, initial, cut, kept, g, gfinal, **options)
                return y, final, gx, ga, ginitial
            a = a if fixed else gates
            y, final = forward(a, x, initial, cut, False, reverse, **options)
            ga, gx, ginitial = backward(a, y, initial, cut, False, reverse, g, gfinal, dtype, **options)
            return y, final, gx, None if fixed else ga, ginitial

        rates, bonuses = 0.3 + 0.1 * normal(C), normal(C)
        xs, gs, all_gates = normal(1, T, C), normal(1, T, C), 0.5 * normal(1, T, C)
        initials = normal(*([3] if wkv else []), N, C).abs().to(dtype) if state else None
        gfinals = normal(*([2] if wkv else []), N, C)
        cut = torch.tensor(offsets, device=context.device)
        whole = run(context, cut, slice(None), slice(None), launch=Launch(32, 1, chunk))
        found = context.launcher("packed_edges")(cut, T, False).tolist()

        y, final, gx, ga, ginitial = whole
        for t in range(T):
            if found[t] < 0:
                for tokens in (y, gx, *([] if ga is None else [ga])):
                    assert tokens[:, t].isnan().all()
        for n, (begin, end) in enumerate(pairwise(offsets)):
            rows = [final, ginitial] if state else [final]
            if begin < end and [t for t in range(T) if found[t] >> 2 == n]:
                piece = slice(begin, end)
                single = run(CPU, torch.tensor([0, end - begin]), piece, slice(n, n + 1))
                for tokens, wanted in zip((y, gx, ga), (single[0], single[2], single[3]), strict=True):
                    if tokens is not None:
                        torch.testing.assert_close(tokens[:, piece].cpu(), wanted, rtol=1e-12, atol=1e-12)
                for row, wanted in zip(rows, (single[1], single[4]), strict=False):
                    torch.testing.assert_close(row[..., n, :].cpu(), wanted[..., 0, :], rtol=1e-12, atol=1e-12)
            elif begin == end and 0 <= begin <= T:
                for row, source in zip(rows, (initials, gfinals), strict=False):
                    if source is not None:
                        assert row[..., n, :].cpu().equal(source[..., n, :])
                    else:
                        assert not row[:2, n].any() if wkv else not row[n].any()
            else:
                assert all(row[..., n, :].isnan().all() for row in rows)
        memory.check()
