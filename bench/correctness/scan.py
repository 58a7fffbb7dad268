"""The linear scan against float64: which forms, dtypes and lengths, with inputs, launches and bounds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from correctness import reference
from correctness.checks import BATCH, ROUNDING, Case, Check, Form, Results, cases_of, draws, wide
from torch import Tensor

import fastwkv
from fastwkv.kernels.launch import scan_dtypes, scan_launch_for
from fastwkv.kernels.linear_scan import linear_scan_fwd
from fastwkv.kernels.linear_scan_bwd import linear_scan_bwd, linear_scan_bwd_

# Of a and of x; of bfloat16x2 x holds pairs, beside a complex a.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "complex64": (torch.complex64, torch.complex64),
    "complex128": (torch.complex128, torch.complex128),
    "bfloat16x2": (torch.complex64, torch.bfloat16),
}
PUBLIC = ("float32", "bfloat16", "complex64", "bfloat16x2")


def forms(dtype: str) -> list[Form]:
    """Return the forms of a dtype. Every one compiles two kernels, six if time is cut.

    An orthogonal array: of the eight, any two of the seven properties, C among them, have all four combinations, twice
    each. All pairs of properties that a kernel is compiled for stand in one then, where all combinations would be 128.
    Complex multipliers have no logarithm here. Dtypes that share the code with another get half of the array.
    """
    full, few = ("float32", "bfloat16", "complex64"), ("float16", "float64", "complex128")
    every = [(s, p, c) for c, p, s in product((False, True), repeat=3)]
    if dtype in few:
        every = [(False, True, False), (True, False, True)]
    elif dtype not in full:
        every = [one for one in every if sum(one) % 2 == 0]
    is_complex = DTYPES[dtype][0].is_complex
    found = [
        Form(65 if s ^ p ^ c else 64, s, p, c, log=(s ^ p) and not is_complex, fixed=s ^ c, reverse=p ^ c)
        for s, p, c in every
    ]
    return [*found, Form(3, True, log=not is_complex)] if dtype in full else found


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of a dtype; one strains the arithmetic with multipliers that forget nothing."""
    chosen = [Form(3, True, True, True, reverse=True)] if rehearse else forms(dtype)
    kinds = partial(launched, dtype), partial(public, dtype) if dtype in PUBLIC else None
    exact = dtype not in ("bfloat16", "float16", "bfloat16x2")
    return cases_of(chosen, rehearse, *kinds, "|a|=1", lambda form: exact and not form.log)


@dataclass
class Inputs:
    """One call."""

    form: Form
    a: Tensor
    x: Tensor
    gh: Tensor
    initial: Tensor | None
    gfinal: Tensor | None
    offsets: list[int] | None
    cu_seqlens: Tensor | None


def draw(dtype: str, form: Form, T: int, offsets: list[int], device: torch.device, keeps: bool = False) -> Inputs:
    """Draw multipliers like a model's, |a| about 0.95, or with ``keeps`` of |a| = 1, which forgets nothing."""
    normal, (of_a, of_x) = draws(device), DTYPES[dtype]
    pairs = of_a.is_complex and not of_x.is_complex
    B, N = (1, len(offsets) - 1) if form.packed else (BATCH, BATCH)

    def random(*shape: int) -> Tensor:
        return torch.complex(normal(*shape), normal(*shape)) if of_a.is_complex else normal(*shape)

    def streamed() -> Tensor:
        one = random(B, T, form.C)
        return torch.view_as_real(one).to(of_x) if pairs else one.to(of_x)

    shape = (form.C,) if form.fixed else (B, T, form.C)
    a = torch.ones(shape, dtype=torch.float64, device=device) if keeps else torch.sigmoid(3 + normal(*shape))
    if of_a.is_complex:
        a = torch.polar(a, 3 * normal(*shape))
    a = (a.log() if form.log else a).to(of_a)
    state = torch.promote_types(torch.promote_types(of_a, of_x), torch.float32)
    initial, gfinal = (random(N, form.C).to(state) if form.state else None for _ in range(2))
    cut = (offsets, torch.tensor(offsets, device=device)) if form.packed else (None, None)
    return Inputs(form, a, streamed(), streamed(), initial, gfinal, *cut)


def launched(
    dtype: str, form: Form, T: int, chunk: int, offsets: list[int], device: torch.device, strained: bool = False
) -> Check:
    """Return the check of the launchers."""
    i = draw(dtype, form, T, offsets, device, strained)
    return Check(partial(_launch, i, chunk), partial(_wanted, i, True), bounds(dtype, form))


def public(dtype: str, form: Form, T: int, chunk: int, offsets: list[int], device: torch.device) -> Check:
    """Return the check of the public function and of its gradients by autograd."""
    i = replace(draw(dtype, form, T, offsets, device), gfinal=None)
    return Check(partial(_call, i), partial(_wanted, i), bounds(dtype, form), recorded=False)


def _launch(i: Inputs, chunk: int) -> Results:
    chunk = chunk if i.form.chunks else -(-i.x.shape[1] // 16) * 16
    forward, backward = (replace(scan_launch_for(i.x, backward=which), chunk=chunk) for which in (False, True))
    given = i.initial, i.cu_seqlens, i.form.log, i.form.reverse
    h, final = linear_scan_fwd(i.a, i.x, *given, launch=forward)
    gh = i.gh.to(scan_dtypes(i.a, i.x)[0])
    ga, gx, gh0 = linear_scan_bwd(i.a, h, *given, gh, i.gfinal, i.x.dtype, launch=backward)
    found = {"h": h, "final": final, "ga": ga, "gx": gx}
    if not i.form.reverse:  # the same kernel with two pointers alike
        again = gh.clone()
        linear_scan_bwd_(i.a, h, *given, again, i.gfinal, launch=backward)
        found["gx in place"] = again
    return found | ({"gh0": gh0} if i.form.state else {})


def _call(i: Inputs) -> Results:
    leaves = [t.detach().requires_grad_() for t in (i.a, i.x, i.initial) if t is not None]
    a, x, *initial = leaves
    given = {"log_a": a} if i.form.log else {"a": a}
    options = {"reverse": i.form.reverse, "return_state": True, "cu_seqlens": i.cu_seqlens}
    h, final = fastwkv.linear_scan(given.get("a"), x, *initial, log_a=given.get("log_a"), **options)
    gradients = torch.autograd.grad(h, leaves, i.gh.to(h.dtype))
    found = {"h": h.detach(), "final": final.detach()}
    return found | dict(zip(("ga", "gx", "gh0"), gradients, strict=False))


def forward(i: Inputs, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return h, in pairs where x has them, and the final states in float64, of the float64 (a, x[, initial])."""
    a, x, initial = (*leaves, None)[:3]
    numbers = torch.view_as_complex(x) if i.x.dim() == 4 else x
    h, final = reference.linear_scan(a.exp() if i.form.log else a, numbers, initial, i.offsets, i.form.reverse)
    return (torch.view_as_real(h) if i.x.dim() == 4 else h), final


def _wanted(i: Inputs, of_launch: bool = False) -> Results:
    leaves = [wide(t).requires_grad_() for t in (i.a, i.x, i.initial) if t is not None]
    h, final = forward(i, leaves)
    outputs, cotangents = [h], [wide(i.gh)]
    if i.gfinal is not None:
        outputs, cotangents = [h, final], [*cotangents, wide(i.gfinal)]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    found = {"h": h, "final": final, **dict(zip(("ga", "gx", "gh0"), gradients, strict=False))}
    return found | ({"gx in place": found["gx"]} if of_launch and not i.form.reverse else {})


def bounds(dtype: str, form: Form) -> dict[str, float]:
    """Return the largest error of each result, of 1024 tokens at most.

    What is stored in 16 bits is rounded once; states beside it are sums in float32, and a multiplier e^{log a} is then
    one instruction, two units of 2^-22 off: over the twenty tokens that such gates remember on average, 5e-6.
    """
    _, of_x = DTYPES[dtype]
    if of_x in (torch.float64, torch.complex128):
        return dict.fromkeys(("h", "final", "ga", "gx", "gx in place", "gh0"), 1e-12)
    found = {"h": 1e-6, "final": 1e-6} | dict.fromkeys(("ga", "gx", "gx in place", "gh0"), 2e-6)
    if of_x in ROUNDING:
        found |= dict.fromkeys(("h", "gx", "gx in place", "ga"), ROUNDING[of_x])
        if form.log:
            found |= dict.fromkeys(("final", "gh0"), 5e-6)
    return found
