"""Inputs of the linear scan, drawn by hypothesis; its results and gradients, from any function of its signature."""

from dataclasses import dataclass, replace

import torch
from comparison import Results
from hypothesis import strategies as st
from implementations import CHANNELS, packed_lengths
from torch import Tensor

from fastwkv import reference

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = REAL + COMPLEX
# ‖error‖/‖reference‖ allowed, of outputs and of gradients. 16 bits: one rounding.
ORDINARY = {
    torch.float32: (3e-7, 6e-7),
    torch.float64: (1e-14, 1e-14),
    torch.bfloat16: (4e-3, 4e-3),
    torch.float16: (5e-4, 5e-4),
    torch.complex64: (3e-7, 6e-7),
    torch.complex128: (1e-14, 1e-14),
}
# Where log a is given, a itself is rounded, and where it is the same at every token, always the same way.
LOGARITHMIC = ORDINARY | {
    torch.float32: (1e-6, 2e-6),
    torch.float64: (1e-13, 1e-13),
    torch.complex64: (1e-6, 2e-6),
    torch.complex128: (1e-13, 1e-13),
}


@dataclass(frozen=True)
class Case:
    """One call. Everything is float64 or complex128, and rounded to what ``dtype`` can hold; ``a`` has log a if log."""

    a: Tensor
    x: Tensor
    initial: Tensor | None
    cu_seqlens: Tensor | None
    dtype: torch.dtype
    log: bool = False
    reverse: bool = False

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.x.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def bounds(self) -> list[int]:
        """Offsets of the sequences along time."""
        return [0, self.x.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.tolist()

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def allowed(self) -> dict[torch.dtype, tuple[float, float]]:
        """Error allowed of outputs and of gradients, for each dtype."""
        return LOGARITHMIC if self.log else ORDINARY

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of the reference."""
        return torch.complex128 if self.dtype.is_complex else torch.float64

    def arguments(self, device: torch.device | str = "cpu", *, exact: bool = False) -> tuple:
        """Return (a or log a, x, initial state, cu_seqlens), new leaves that ask for gradients."""
        wide, narrow = (self.exact_dtype,) * 2 if exact else (self.state_dtype, self.dtype)

        def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
            return t.to(device, dtype, copy=True).requires_grad_()

        initial = None if self.initial is None else leaf(self.initial, wide)
        cut = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return leaf(self.a, narrow), leaf(self.x, narrow), initial, cut

    def options(self, given: Tensor) -> dict:
        """Return the keyword arguments that say what ``given`` is and where time runs."""
        return {"log_a": given if self.log else None, "reverse": self.reverse}


def make_case(
    seed: int,
    B: int,
    T: int,
    C: int,
    *,
    dtype: torch.dtype = torch.float32,
    fixed: bool = False,
    log: bool = False,
    reverse: bool = False,
    radius: tuple[float, float] = (0.3, 1.0),
    state: bool = True,
    lengths: list[int] | None = None,
) -> Case:
    """Build a case from a seed: |a| uniform in ``radius``, of any sign or phase; x and the states normal."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=exact)

    if lengths is not None:
        B, T = 1, sum(lengths)
    rows = B if lengths is None else len(lengths)
    direction = normal(*((C,) if fixed else (B, T, C)))
    low, high = radius
    size = low + (high - low) * torch.rand(direction.shape, generator=generator, dtype=torch.float64)
    a = direction.sgn() * size
    if log:
        a = (a if dtype.is_complex else a.abs()).log()
    x, initial = normal(B, T, C), normal(rows, C) if state else None
    cut = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    wide = torch.promote_types(dtype, torch.float32)
    a, x = a.to(dtype).to(exact), x.to(dtype).to(exact)
    return Case(a, x, None if initial is None else initial.to(wide).to(exact), cut, dtype, log, reverse)


@st.composite
def cases(draw, max_tokens: int = 40, dtypes: tuple = DTYPES, packed: bool | None = None, **fixed_options) -> Case:
    """Draw shapes, dtype, what a is, direction, packing, state."""
    seed = draw(st.integers(0, 2**32 - 1))
    C = draw(st.sampled_from(CHANNELS))
    options = {
        "dtype": draw(st.sampled_from(dtypes)),
        "fixed": draw(st.booleans()),
        "log": draw(st.booleans()),
        "reverse": draw(st.booleans()),
        "state": draw(st.booleans()),
        "radius": draw(st.sampled_from(((0.3, 1.0), (0.9, 0.999), (1.0, 1.0), (1e-3, 1.1)))),
        **fixed_options,
    }
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(packed_lengths(max_tokens // 2))
        return make_case(seed, 1, 0, C, lengths=lengths, **options)
    return make_case(seed, draw(st.integers(1, 3)), draw(st.integers(1, max_tokens)), C, **options)


def values(function, case: Case, device: torch.device | str = "cpu", **changes) -> tuple[Tensor, Tensor]:
    """Return h and the final state of a case, some of whose fields are changed."""
    case = replace(case, **changes)
    given, x, initial, cut = case.arguments(device)
    with torch.no_grad():
        options = case.options(given)
        return function(None if case.log else given, x, initial, return_state=True, cu_seqlens=cut, **options)


def run(function, case: Case, device: torch.device | str = "cpu", *, exact: bool = False) -> Results:
    """Call ``function`` and differentiate a random loss on h and on the final state."""
    given, x, initial, cut = case.arguments(device, exact=exact)
    options = case.options(given)
    h, final = function(None if case.log else given, x, initial, return_state=True, cu_seqlens=cut, **options)
    generator = torch.Generator().manual_seed(0)

    def weights(t: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=case.exact_dtype).to(dtype).to(device, t.dtype)

    outputs = (h, final)
    cotangents = [weights(h, case.dtype), weights(final, case.state_dtype)]
    leaves = {"a": given, "x": x} | ({} if initial is None else {"initial": initial})
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return Results(h.detach(), {"final": final.detach()}, dict(zip(leaves, gradients, strict=True)))


def expected(case: Case) -> Results:
    """Run the reference in float64 or complex128."""
    return run(reference.linear_scan, case, exact=True)
