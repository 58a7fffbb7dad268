"""Gradients of what is the same at every token are sums over sequences and chunks, in one launch."""

import torch
from guarded import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import CHANNELS, Implementation

REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def summed(terms, *dtypes):
    """Return the sums, of these dtypes, in memory of their own."""
    from fastwkv.kernels.row_sums import row_sums

    with Implementation("triton") as context, GuardedMemory() as memory:
        terms = memory.guarded(terms.to(context.device))
        sums = [torch.empty(terms.shape[2], dtype=dtype, device=context.device) for dtype in dtypes]
        row_sums(terms, *sums)
        memory.check()
    return [one.cpu() for one in sums]


@settings(max_examples=60)
@given(
    rows=st.one_of(st.integers(1, 5), st.integers(60, 200)),
    C=st.sampled_from(CHANNELS),
    dtypes=st.lists(st.sampled_from(REAL), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_sums_are_those_of_float64_rounded_to_their_dtypes(rows, C, dtypes, seed):
    acc = torch.float64 if torch.float64 in dtypes else torch.float32
    terms = torch.randn(len(dtypes), rows, C, dtype=acc, generator=torch.Generator().manual_seed(seed))
    exact = terms.double().sum(1)
    # A sum of n terms in any order is off by at most n - 1 roundings of the sum of their sizes.
    roundings = rows - 1
    size = terms.double().abs().sum(1)
    for found, wanted, terms_size, dtype in zip(summed(terms, *dtypes), exact, size, dtypes, strict=True):
        assert found.dtype == dtype
        # The last one may be of a number below the smallest normal one.
        rounding = torch.finfo(dtype).eps / 2 * wanted.abs().clamp(min=torch.finfo(dtype).tiny)
        bound = roundings * torch.finfo(acc).eps / 2 * terms_size * 1.01 + rounding * 1.01
        assert ((found.double() - wanted).abs() <= bound).all()


def test_many_terms_of_one_sign_lose_no_more_than_few():
    # Multiples of 1/256, of which the sums of blocks are exact: what is left is how blocks are added up.
    terms = 1 + torch.randint(0, 256, (1, 200_000, 1), generator=torch.Generator().manual_seed(0)) / 256
    (found,) = summed(terms, torch.float32)
    assert abs(found.item() / terms.double().sum().item() - 1) <= 1.01 * 2**-24


def test_infinite_terms_have_infinite_sums():
    terms = torch.ones(1, 200, 2)
    terms[0, 3] = torch.tensor([torch.inf, -torch.inf])
    assert summed(terms, torch.float32)[0].tolist() == [torch.inf, -torch.inf]


def test_nan_of_one_channel_stays_in_it():
    terms = torch.ones(2, 70, 5)
    terms[0, 69, 3] = torch.nan
    first, second = summed(terms, torch.float32, torch.float32)
    assert first.isnan().tolist() == [False, False, False, True, False]
    assert second.tolist() == [70] * 5


def test_two_runs_give_the_same_bits():
    terms = torch.randn(1, 300, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(summed(terms, torch.float32)[0], summed(terms, torch.float32)[0])
