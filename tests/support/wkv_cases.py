"""Inputs of WKV, drawn by hypothesis; its results and gradients, from any function with the signature of wkv."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from comparison import Results, relative_error
from hypothesis import strategies as st
from implementations import CHANNELS, packed_lengths
from torch import Tensor

from fastwkv import WKVState, reference, wkv

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# ‖error‖/‖reference‖ allowed, of outputs and of gradients. 16 bits: one rounding.
ORDINARY = {
    torch.float32: (5e-7, 2e-6),
    torch.float64: (1e-12, 1e-12),
    torch.bfloat16: (4e-3, 4e-3),
    torch.float16: (5e-4, 5e-4),
}


@dataclass(frozen=True)
class Case:
    """One call. ``initial`` is packed, ``[3, N, C]``; everything is float64 and rounded to what ``dtype`` can hold."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    initial: Tensor | None
    cu_seqlens: Tensor | None
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.k.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def bounds(self) -> list[int]:
        """Offsets of the sequences along time."""
        return [0, self.k.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.tolist()

    @property
    def acc(self) -> torch.dtype:
        """Dtype of the states."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def arguments(self, device: torch.device | str = "cpu", *, exact: bool = False) -> tuple:
        """Return (w, u, k, v, initial state, cu_seqlens), new leaves that ask for gradients.

        w, u and the state have the accumulation dtype, k and v ``dtype``; with ``exact`` all are float64.
        """
        wide, narrow = (torch.float64, torch.float64) if exact else (self.acc, self.dtype)

        def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
            return t.to(device, dtype, copy=True).requires_grad_()

        state = None if self.initial is None else WKVState(*(leaf(field, wide) for field in self.initial))
        cut = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return leaf(self.w, wide), leaf(self.u, wide), leaf(self.k, narrow), leaf(self.v, narrow), state, cut


def make_case(
    seed: int,
    B: int,
    T: int,
    C: int,
    *,
    dtype: torch.dtype = torch.float32,
    key_range: float | None = None,
    rates: tuple[float, float] = (1e-2, 5.0),
    state: bool = True,
    lengths: list[int] | None = None,
) -> Case:
    """Build a case from a seed: keys are normal, or uniform within ±``key_range``; rates are log-uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if lengths is not None:
        B, T = 1, sum(lengths)
    low, high = torch.tensor(rates, dtype=torch.float64).log()
    w, u = torch.exp(low + (high - low) * uniform(C)), normal(C)
    k = normal(B, T, C) if key_range is None else key_range * (2 * uniform(B, T, C) - 1)
    v = normal(B, T, C)
    rows = B if lengths is None else len(lengths)
    initial = torch.stack((normal(rows, C), 0.1 + uniform(rows, C), normal(rows, C))) if state else None
    cut = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    w, u, k, v = w.to(acc).double(), u.to(acc).double(), k.to(dtype).double(), v.to(dtype).double()
    return Case(w, u, k, v, None if initial is None else initial.to(acc).double(), cut, dtype)


@st.composite
def cases(draw, max_tokens: int = 40, dtypes: tuple = DTYPES, packed: bool | None = None) -> Case:
    """Draw shapes, dtype, packing, state, the spread of keys and rates, and absent tokens."""
    seed = draw(st.integers(0, 2**32 - 1))
    C = draw(st.sampled_from(CHANNELS))
    options = {
        "dtype": draw(st.sampled_from(dtypes)),
        "state": draw(st.booleans()),
        "rates": draw(st.sampled_from(((1e-2, 5.0), (1e-6, 1e-3), (1.0, 20.0)))),
        "key_range": draw(st.sampled_from((None, None, 20.0))),
    }
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(packed_lengths(max_tokens // 2))
        case = make_case(seed, 1, 0, C, lengths=lengths, **options)
    else:
        B, T = draw(st.integers(1, 3)), draw(st.integers(1, max_tokens))
        case = make_case(seed, B, T, C, **options)
    if draw(st.booleans()):
        absent = torch.rand(case.k.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
        case = replace(case, k=case.k.masked_fill(absent, -torch.inf))
    return case


def run(function, case: Case, device: torch.device | str = "cpu", *, exact: bool = False, backward: bool = True):
    """Call ``function`` and differentiate a random loss on y and on both invariants of the final state."""
    w, u, k, v, initial, cut = case.arguments(device, exact=exact)
    y, final = function(w, u, k, v, initial, return_state=True, cu_seqlens=cut)
    states = state_invariants(final)
    if not backward:
        return Results(y.detach(), {n: s.detach() for n, s in states.items()}, {})
    generator = torch.Generator().manual_seed(0)

    def weights(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(case.dtype).to(device, t.dtype)

    loss = (y * weights(y)).sum() + sum((s * weights(s).to(case.acc).to(s.dtype)).sum() for s in states.values())
    leaves = {"w": w, "u": u, "k": k, "v": v}
    if initial is not None:
        leaves |= {"num": initial.num, "den": initial.den, "max": initial.max}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Results(y.detach(), {n: s.detach() for n, s in states.items()}, dict(zip(leaves, gradients, strict=True)))


def state_invariants(state: WKVState) -> dict[str, Tensor]:
    """Return mean of the past values and logarithm of their total weight; 0 where there is no past."""
    empty = state.den == 0
    den = torch.where(empty, 1, state.den)
    return {
        "mean": torch.where(empty, 0, state.num / den),
        "log_weight": torch.where(empty, 0, torch.where(empty, 0, state.max) + den.log()),
    }


def expected(case: Case, **options) -> Results:
    """Run the float64 reference."""
    return run(reference.wkv_loop, case, exact=True, **options)


def term_sizes(case: Case) -> dict[str, Tensor]:
    """Return the sum, over tokens and batch, of the sizes of what gw and gu add up: they may cancel, ``[C]`` each."""
    sizes = {}

    def token_by_token(w, u, k, v, initial, *, return_state, cu_seqlens):
        w, u = w.expand_as(k), u.expand_as(k)
        w.register_hook(lambda terms: sizes.update(w=terms.abs().sum((0, 1))))
        u.register_hook(lambda terms: sizes.update(u=terms.abs().sum((0, 1))))
        outputs, finals = [], []
        for n, (begin, end) in enumerate(pairwise(case.bounds)):
            rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
            state = None if initial is None else WKVState(*(field[rows] for field in initial))
            for t in range(begin, end):
                token = (w[:, t], u[:, t], k[:, t : t + 1], v[:, t : t + 1])
                y, state = reference.wkv_loop(*token, state, return_state=return_state)
                outputs.append(y)
            if state is None:  # an empty sequence
                nothing = torch.zeros_like(k[:, 0])
                state = WKVState(nothing, nothing, nothing - torch.inf)
            finals.append(state)
        return torch.cat(outputs, 1), WKVState(*(torch.cat(field) for field in zip(*finals, strict=True)))

    run(token_by_token, case, exact=True)
    return sizes


def values(case: Case, implementation, **changes):
    """y and final state of a case, some of whose arguments are changed."""
    arguments = dict(zip(("w", "u", "k", "v", "state", "cu"), case.arguments(implementation.device), strict=True))
    w, u, k, v, state, cu = (arguments | changes).values()
    with torch.no_grad():
        return wkv(w, u, k, v, state, return_state=True, cu_seqlens=cu)


def assert_states_close(state: WKVState, wanted: WKVState, bound: float) -> None:
    actual, wanted = state_invariants(state), state_invariants(wanted)
    for name in wanted:
        assert relative_error(actual[name], wanted[name], floor=1.0) <= bound, name
