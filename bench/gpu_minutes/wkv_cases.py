"""WKV against float64: which forms, dtypes and lengths, with inputs, launches and bounds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_minutes import reference
from gpu_minutes.checking import ROUNDING, Case, Check, Results, draws
from torch import Tensor

import fastwkv
from fastwkv import WKVState
from fastwkv.kernels.launch import launch_for
from fastwkv.kernels.wkv import wkv_fwd
from fastwkv.kernels.wkv_bwd import wkv_bwd

# Tokens, those of a chunk where time is cut, and offsets where sequences are packed: chunks of one block of rows and of
# several, sequences of one token, and such as start and end inside, at the edge of and across chunks.
LENGTHS: dict[int, tuple[int, list[int]]] = {
    1: (16, [0, 1]),
    16: (16, [0, 5, 16]),
    83: (16, [0, 5, 32, 33, 83]),
    1000: (112, [0, 5, 112, 113, 300, 301, 1000]),
}
LENGTHS_REHEARSED: dict[int, tuple[int, list[int]]] = {19: (16, [0, 5, 19])}
BATCH = 2
BOUNDS = {"ordinary": (5e-7, 2e-6, 2e-6), "adversarial": (2e-6, 5e-6, 2e-5)}  # of y, of gradients, of gw
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Form:
    """What decides, beside the dtype, which kernels run."""

    C: int
    state: bool = False
    packed: bool = False
    chunks: bool = False

    def __str__(self) -> str:
        """As rows name it."""
        names = [name for name in ("state", "packed", "chunks") if getattr(self, name)]
        return f"C={self.C} {' '.join(names) or 'plain'}"


def forms(dtype: str) -> list[Form]:
    """Return the forms of a dtype. Every one compiles two kernels, seven if time is cut.

    All eight in float32 and bfloat16, with C that is a multiple of a program's channels in four of them and in the
    other four where the other dtype has it. The other dtypes share the code and differ in the types of loads, so a few
    forms will do.
    """
    every = [(s, p, c) for c in (False, True) for p in (False, True) for s in (False, True)]
    if dtype in ("float32", "bfloat16"):
        odd = dtype == "float32"
        found = [Form(65 if (sum(form) % 2 == 1) == odd else 64, *form) for form in every]
        return [*found, Form(3, True) if odd else Form(35, True, False, True)]
    return [Form(65, False, True), Form(64, True, False, True)]


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of a dtype: every form at every length, by the launchers and by the public function."""
    lengths = LENGTHS_REHEARSED if rehearse else LENGTHS
    for form in [Form(3, True, True, True)] if rehearse else forms(dtype):
        for T in (T for T, (chunk, _) in lengths.items() if chunk < T or not form.chunks):
            prepare = partial(launched, dtype, form, T, "ordinary", lengths)
            yield Case(f"T={T} {form}", prepare, short=T < 1000)
        if not rehearse:
            T = 1000 if form.chunks else 83  # for which it chooses to cut time, or not to
            yield Case(f"T={T} {form} public", partial(public, dtype, form, T, lengths), short=False, public=True)
        if not (rehearse or form.state or form.packed):
            T = 1000
            prepare = partial(launched, dtype, form, T, "adversarial", lengths)
            yield Case(f"T={T} {form} adversarial", prepare, short=False)


@dataclass
class Inputs:
    """One call. The state, in float64, by what it means, and by (num, den, max) as the kernels take it."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    gy: Tensor
    initial: Tensor | None
    gfinal: Tensor | None
    offsets: list[int] | None
    cu_seqlens: Tensor | None


def draw(dtype: str, form: Form, T: int, kind: str, offsets: list[int], device: torch.device) -> Inputs:
    """Draw inputs like a model's, or such as strain the arithmetic: k within ±60, w from 1e-6 to 20."""
    normal, narrow = draws(device), DTYPES[dtype]
    wide = torch.promote_types(narrow, torch.float32)
    B, N = (1, len(offsets) - 1) if form.packed else (BATCH, BATCH)
    log_w, k = -2 + normal(form.C), normal(B, T, form.C)
    if kind == "adversarial":
        log_w, k = -5.4 + 8.4 * torch.erf(log_w + 2), 60 * torch.erf(k)
    gfinal = normal(2, N, form.C).to(wide) if form.state else None
    num, scale = normal(2, N, form.C)
    initial = torch.stack((num, 0.1 + normal(N, form.C).abs(), scale)).to(wide) if form.state else None
    return Inputs(
        log_w.exp().to(wide),
        normal(form.C).to(wide),
        k.to(narrow),
        normal(B, T, form.C).to(narrow),
        normal(B, T, form.C).to(narrow),
        initial,
        gfinal,
        offsets if form.packed else None,
        torch.tensor(offsets, device=device) if form.packed else None,
    )


def launched(
    dtype: str, form: Form, T: int, kind: str, lengths: dict[int, tuple[int, list[int]]], device: torch.device
) -> Check:
    """Return the check of the launchers."""
    chunk, offsets = lengths[T]
    inputs = draw(dtype, form, T, kind, offsets, device)
    name = f"T={T} {form}"
    return Check(name, partial(_launch, inputs, form, chunk), partial(_wanted, inputs), bounds(dtype, kind))


def _launch(i: Inputs, form: Form, chunk: int) -> Results:
    forward, backward = (
        replace(one, chunk=chunk if form.chunks else -(-i.k.shape[1] // 16) * 16)
        for one in (launch_for(i.k), launch_for(i.k, backward=True))
    )
    found = {}
    if not (form.state or form.packed):  # without what the backward pass needs: another kernel
        y, final, _ = wkv_fwd(i.w, i.u, i.k, i.v, i.initial, i.cu_seqlens, False, launch=forward)
        found["y, no gradient"] = y
    y, final, kept = wkv_fwd(i.w, i.u, i.k, i.v, i.initial, i.cu_seqlens, True, launch=forward)
    gradients = wkv_bwd(i.w, i.u, i.k, i.v, i.initial, i.cu_seqlens, kept, i.gy, i.gfinal, launch=backward)
    gw, gu, gk, gv, ginitial = gradients
    found |= {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv, **meaning(final)}
    return found | ({"gstate": ginitial} if form.state else {})


def meaning(final: Sequence[Tensor]) -> Results:
    """Return what does not depend on the scale of a state."""
    num, den, scale = (field.double() for field in final)
    return {"mean": num / den, "log weight": scale + den.log()}


def _wanted(i: Inputs) -> Results:
    w, u, k, v = (t.to(torch.float64, copy=True).requires_grad_() for t in (i.w, i.u, i.k, i.v))
    leaves, initial = [w, u, k, v], None
    if i.initial is not None:
        initial = reference.State(*(t.requires_grad_() for t in meaning(i.initial).values()))
        leaves += initial
    y, final = reference.wkv(w, u, k, v, initial, i.offsets)
    outputs, cotangents = [y], [i.gy.double()]
    if i.gfinal is not None:
        outputs, cotangents = [y, *final], [*cotangents, *i.gfinal.double()]
    gw, gu, gk, gv, *gstate = torch.autograd.grad(outputs, leaves, cotangents)
    found = {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv, "mean": final.mean, "log weight": final.log_weight}
    if i.initial is None and i.offsets is None:
        return {"y, no gradient": y, **found}
    return found | ({"gstate": torch.stack(gstate)} if gstate else {})


def bounds(dtype: str, kind: str) -> dict[str, float]:
    """Return the largest error of each result: what is stored in 16 bits is rounded once, all else is float32."""
    y, gradient, gw = (1e-12,) * 3 if dtype == "float64" else BOUNDS[kind]
    found = {"y": y, "y, no gradient": y, "gw": gw, "mean": y, "log weight": y}
    found |= dict.fromkeys(("gu", "gk", "gv", "gstate", "gnum", "gden"), gradient)
    rounding = ROUNDING.get(DTYPES[dtype])
    return found | ({} if rounding is None else dict.fromkeys(("y", "y, no gradient", "gk", "gv"), rounding))


def public(dtype: str, form: Form, T: int, lengths: dict[int, tuple[int, list[int]]], device: torch.device) -> Check:
    """Return the check of the public function and of its gradients by autograd, which end in (num, den, max)."""
    inputs = draw(dtype, form, T, "ordinary", lengths[T][1], device)
    name = f"T={T} {form} public"
    return Check(name, partial(_call, inputs), partial(_wanted_of_call, inputs), bounds(dtype, "ordinary"), False)


def _call(i: Inputs) -> Results:
    leaves = [t.detach().requires_grad_() for t in (i.w, i.u, i.k, i.v)]
    state = None
    if i.initial is not None:
        num, den = (t.clone().requires_grad_() for t in i.initial[:2])
        state, leaves = WKVState(num, den, i.initial[2]), [*leaves, num, den]
    y, final = fastwkv.wkv(*leaves[:4], state, return_state=True, cu_seqlens=i.cu_seqlens)
    gw, gu, gk, gv, *rest = torch.autograd.grad(y, leaves, i.gy)
    found = {"y": y.detach(), "gw": gw, "gu": gu, "gk": gk, "gv": gv, **meaning([t.detach() for t in final])}
    return found | dict(zip(("gnum", "gden"), rest, strict=False))


def _wanted_of_call(i: Inputs) -> Results:
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (i.w, i.u, i.k, i.v)]
    state = None
    if i.initial is not None:
        num, den = (t.to(torch.float64, copy=True).requires_grad_() for t in i.initial[:2])
        state, leaves = reference.State(num / den, i.initial[2].double() + den.log()), [*leaves, num, den]
    y, final = reference.wkv(*leaves[:4], state, i.offsets)
    gw, gu, gk, gv, *rest = torch.autograd.grad(y, leaves, i.gy.double())
    found = {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv, "mean": final.mean, "log weight": final.log_weight}
    return found | dict(zip(("gnum", "gden"), rest, strict=False))
