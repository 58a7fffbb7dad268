"""WKV against float64: which forms, dtypes and lengths, with inputs, launches and bounds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from correctness import reference
from correctness.checks import BATCH, ROUNDING, Case, Check, Form, Results, cases_of, draws, wide
from torch import Tensor

import fastwkv
from fastwkv import WKVState
from fastwkv.kernels.launch import launch_for
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

BOUNDS = {False: (5e-7, 2e-6, 2e-6), True: (2e-6, 5e-6, 2e-5)}  # of y, of gradients, of gw; of strained ones
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def forms(dtype: str) -> list[Form]:
    """Return the forms of a dtype. Every one compiles two kernels, seven if time is cut.

    All eight in float32 and bfloat16, with C that is a multiple of a program's channels in four of them and in the
    other four where the other dtype has it. The other dtypes share the code and differ in the types of loads, so a few
    forms will do.
    """
    if dtype not in ("float32", "bfloat16"):
        return [Form(65, False, True), Form(64, True, False, True)]
    odd = dtype == "float32"
    every = [(s, p, c) for c, p, s in product((False, True), repeat=3)]
    found = [Form(65 if (sum(form) % 2 == 1) == odd else 64, *form) for form in every]
    return [*found, Form(3, True) if odd else Form(35, True, False, True)]


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of a dtype; one strains the arithmetic with k within ±60 and w from 1e-6 to 20."""
    chosen = [Form(3, True, True, True)] if rehearse else forms(dtype)
    kinds = partial(launched, dtype), partial(public, dtype)
    return cases_of(chosen, rehearse, *kinds, "adversarial", lambda form: not (form.state or form.packed))


@dataclass
class Inputs:
    """One call. The initial state is (num, den, max), as the kernels take it."""

    form: Form
    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    gy: Tensor
    initial: Tensor | None
    gfinal: Tensor | None
    offsets: list[int] | None
    cu_seqlens: Tensor | None


def draw(dtype: str, form: Form, T: int, offsets: list[int], device: torch.device, strained: bool = False) -> Inputs:
    """Draw inputs like a model's, or such as strain the arithmetic."""
    normal, narrow = draws(device), DTYPES[dtype]
    state = torch.promote_types(narrow, torch.float32)
    B, N = (1, len(offsets) - 1) if form.packed else (BATCH, BATCH)
    log_w, k = -2 + normal(form.C), normal(B, T, form.C)
    if strained:
        log_w, k = -5.4 + 8.4 * torch.erf(log_w + 2), 60 * torch.erf(k)
    gfinal, (num, scale) = normal(2, N, form.C), normal(2, N, form.C)
    initial = torch.stack((num, 0.1 + normal(N, form.C).abs(), scale))
    return Inputs(
        form,
        log_w.exp().to(state),
        normal(form.C).to(state),
        k.to(narrow),
        normal(B, T, form.C).to(narrow),
        normal(B, T, form.C).to(narrow),
        initial.to(state) if form.state else None,
        gfinal.to(state) if form.state else None,
        offsets if form.packed else None,
        torch.tensor(offsets, device=device) if form.packed else None,
    )


def launched(
    dtype: str, form: Form, T: int, chunk: int, offsets: list[int], device: torch.device, strained: bool = False
) -> Check:
    """Return the check of the launchers."""
    i = draw(dtype, form, T, offsets, device, strained)
    return Check(partial(_launch, i, chunk), partial(_wanted, i), bounds(dtype, strained))


def public(dtype: str, form: Form, T: int, chunk: int, offsets: list[int], device: torch.device) -> Check:
    """Return the check of the public function and of its gradients by autograd, which end in (num, den, max)."""
    i = draw(dtype, form, T, offsets, device)
    return Check(partial(_call, i), partial(_wanted, i, True), bounds(dtype), recorded=False)


def _launch(i: Inputs, chunk: int) -> Results:
    chunk = chunk if i.form.chunks else -(-i.k.shape[1] // 16) * 16
    forward, backward = (replace(launch_for(i.k, backward=which), chunk=chunk) for which in (False, True))
    inputs, found = (i.w, i.u, i.k, i.v, i.initial, i.cu_seqlens), {}
    if i.initial is None and i.offsets is None:  # without what the backward pass needs: another kernel
        found["y, no gradient"] = wkv_fwd(*inputs, False, launch=forward)[0]
    y, final, kept = wkv_fwd(*inputs, True, launch=forward)
    gw, gu, gk, gv, gstate = wkv_bwd(*inputs, kept, i.gy, i.gfinal, launch=backward)
    found |= {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv, **meaning(final)}
    return found | ({"gstate": gstate} if i.form.state else {})


def meaning(final: Sequence[Tensor]) -> Results:
    """Return what does not depend on the scale of a state."""
    num, den, scale = (field.double() for field in final)
    return {"mean": num / den, "log weight": scale + den.log()}


def _call(i: Inputs) -> Results:
    leaves = [t.detach().requires_grad_() for t in (i.w, i.u, i.k, i.v)]
    state = None
    if i.initial is not None:
        num, den = (t.clone().requires_grad_() for t in i.initial[:2])
        state, leaves = WKVState(num, den, i.initial[2]), [*leaves, num, den]
    y, final = fastwkv.wkv(*leaves[:4], state, return_state=True, cu_seqlens=i.cu_seqlens)
    gradients = torch.autograd.grad(y, leaves, i.gy)
    names = ("gw", "gu", "gk", "gv", "gnum", "gden")
    return {"y": y.detach(), **dict(zip(names, gradients, strict=False)), **meaning([t.detach() for t in final])}


def _wanted(i: Inputs, of_call: bool = False) -> Results:
    leaves, state = [wide(t).requires_grad_() for t in (i.w, i.u, i.k, i.v)], None
    if i.initial is not None and of_call:
        num, den = (wide(t).requires_grad_() for t in i.initial[:2])
        state, leaves = reference.State(num / den, i.initial[2].double() + den.log()), [*leaves, num, den]
    elif i.initial is not None:
        state = reference.State(*(t.requires_grad_() for t in meaning(i.initial).values()))
        leaves += state
    y, final = reference.wkv(*leaves[:4], state, i.offsets)
    outputs, cotangents = [y], [i.gy.double()]
    if i.gfinal is not None and not of_call:
        outputs, cotangents = [y, *final], [*cotangents, *i.gfinal.double()]
    gw, gu, gk, gv, *rest = torch.autograd.grad(outputs, leaves, cotangents)
    found = {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv, "mean": final.mean, "log weight": final.log_weight}
    if of_call:
        return found | dict(zip(("gnum", "gden"), rest, strict=False))
    if i.initial is None and i.offsets is None:
        return {"y, no gradient": y, **found}
    return found | ({"gstate": torch.stack(rest)} if rest else {})


def bounds(dtype: str, strained: bool = False) -> dict[str, float]:
    """Return the largest error of each result: what is stored in 16 bits is rounded once, all else is float32."""
    y, gradient, gw = (1e-12,) * 3 if dtype == "float64" else BOUNDS[strained]
    found = {"y": y, "y, no gradient": y, "gw": gw, "mean": y, "log weight": y}
    found |= dict.fromkeys(("gu", "gk", "gv", "gstate", "gnum", "gden"), gradient)
    rounding = ROUNDING.get(DTYPES[dtype])
    return found | ({} if rounding is None else dict.fromkeys(("y", "y, no gradient", "gk", "gv"), rounding))
