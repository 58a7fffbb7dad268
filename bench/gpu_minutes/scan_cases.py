"""The linear scan against float64: which forms, dtypes and lengths, with inputs, launches and bounds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_minutes import reference
from gpu_minutes.checking import ROUNDING, Case, Check, Results, draws
from gpu_minutes.wkv_cases import BATCH, LENGTHS, LENGTHS_REHEARSED
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


@dataclass(frozen=True)
class Form:
    """What decides, beside the dtype, which kernels run."""

    C: int
    state: bool = False
    packed: bool = False
    chunks: bool = False
    log: bool = False
    fixed: bool = False
    reverse: bool = False

    def __str__(self) -> str:
        """As rows name it."""
        kinds = ("state", "packed", "chunks", "log", "fixed", "reverse")
        return f"C={self.C} {' '.join(kind for kind in kinds if getattr(self, kind)) or 'plain'}"


def forms(dtype: str) -> list[Form]:
    """Return the forms of a dtype. Every one compiles two kernels, six if time is cut.

    An orthogonal array: of the eight, any two of the seven properties, C among them, have all four combinations, twice
    each. All pairs of properties that a kernel is compiled for stand in one then, where all combinations would be 128.
    Complex multipliers have no logarithm here. Dtypes that share the code with another get half of the array.
    """
    full, few = ("float32", "bfloat16", "complex64"), ("float16", "float64", "complex128")
    every = [(s, p, c) for c in (False, True) for p in (False, True) for s in (False, True)]
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
    """Return the cases of a dtype: every form at every length, by the launchers and by the public function."""
    lengths = LENGTHS_REHEARSED if rehearse else LENGTHS
    for form in [Form(3, True, True, True, reverse=True)] if rehearse else forms(dtype):
        for T in (T for T, (chunk, _) in lengths.items() if chunk < T or not form.chunks):
            yield Case(f"T={T} {form}", partial(launched, dtype, form, T, False, lengths), short=T < 1000)
        if dtype in PUBLIC and not rehearse:
            T = 1000 if form.chunks else 83  # for which it chooses to cut time, or not to
            yield Case(f"T={T} {form} public", partial(public, dtype, form, T, lengths), short=False, public=True)
        if not (rehearse or form.log or dtype in ("bfloat16", "float16", "bfloat16x2")):
            yield Case(f"T=1000 {form} |a|=1", partial(launched, dtype, form, 1000, True, lengths), short=False)


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


def draw(dtype: str, form: Form, T: int, keeps: bool, offsets: list[int], device: torch.device) -> Inputs:
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
    return Inputs(
        form, a, streamed(), streamed(),
        random(N, form.C).to(state) if form.state else None,
        random(N, form.C).to(state) if form.state else None,
        offsets if form.packed else None,
        torch.tensor(offsets, device=device) if form.packed else None,
    )  # fmt: skip


def launched(
    dtype: str, form: Form, T: int, keeps: bool, lengths: dict[int, tuple[int, list[int]]], device: torch.device
) -> Check:
    """Return the check of the launchers."""
    chunk, offsets = lengths[T]
    inputs = draw(dtype, form, T, keeps, offsets, device)
    chunk = chunk if form.chunks else -(-T // 16) * 16
    name = f"T={T} {form}"
    return Check(name, partial(_launch, inputs, chunk), partial(_wanted_of_launch, inputs), bounds(dtype, form))


def _launch(i: Inputs, chunk: int) -> Results:
    forward, backward = (
        replace(one, chunk=chunk) for one in (scan_launch_for(i.x), scan_launch_for(i.x, backward=True))
    )
    form, (h_dtype, _) = i.form, scan_dtypes(i.a, i.x)
    given = i.cu_seqlens, form.log, form.reverse
    h, final = linear_scan_fwd(i.a, i.x, i.initial, *given, launch=forward)
    gh = i.gh.to(h_dtype)
    gradients = linear_scan_bwd(i.a, h, i.initial, *given, gh, i.gfinal, i.x.dtype, launch=backward)
    ga, gx, ginitial = gradients
    found = {"h": h, "final": final, "ga": ga, "gx": gx}
    if not form.reverse:  # the same kernel with two pointers alike
        again = gh.clone()
        linear_scan_bwd_(i.a, h, i.initial, *given, again, i.gfinal, launch=backward)
        found["gx in place"] = again
    return found | ({"gh0": ginitial} if form.state else {})


def _wanted(i: Inputs) -> Results:
    a, x, gh = (_wide(t) for t in (i.a, i.x, i.gh))
    leaves = [a.requires_grad_(), x.requires_grad_()]
    initial = None
    if i.initial is not None:
        initial = _wide(i.initial).requires_grad_()
        leaves.append(initial)
    pairs = i.x.dim() == 4
    numbers = torch.view_as_complex(x) if pairs else x
    gate = a.exp() if i.form.log else a
    h, final = reference.linear_scan(gate, numbers, initial, i.offsets, i.form.reverse)
    h = torch.view_as_real(h) if pairs else h
    outputs, cotangents = [h], [gh]
    if i.gfinal is not None:
        outputs, cotangents = [h, final], [gh, _wide(i.gfinal)]
    ga, gx, *gh0 = torch.autograd.grad(outputs, leaves, cotangents)
    found = {"h": h, "final": final, "ga": ga, "gx": gx}
    return found | dict(zip(("gh0",), gh0, strict=False))


def _wanted_of_launch(i: Inputs) -> Results:
    found = _wanted(i)
    return found if i.form.reverse else found | {"gx in place": found["gx"]}


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float64), copy=True)


def bounds(dtype: str, form: Form) -> dict[str, float]:
    """Return the largest error of each result, of 1024 tokens at most.

    What is stored in 16 bits is rounded once; states beside it are sums in float32, and a multiplier e^{log a} is then
    one instruction, two units of 2^-22 off: over the twenty tokens that such gates remember on average, 5e-6.
    """
    _of_a, of_x = DTYPES[dtype]
    if of_x in (torch.float64, torch.complex128):
        return dict.fromkeys(("h", "final", "ga", "gx", "gx in place", "gh0"), 1e-12)
    found = {"h": 1e-6, "final": 1e-6} | dict.fromkeys(("ga", "gx", "gx in place", "gh0"), 2e-6)
    if of_x in ROUNDING:
        found |= dict.fromkeys(("h", "gx", "gx in place", "ga"), ROUNDING[of_x])
        if form.log:
            found |= dict.fromkeys(("final", "gh0"), 5e-6)
    return found


def public(dtype: str, form: Form, T: int, lengths: dict[int, tuple[int, list[int]]], device: torch.device) -> Check:
    """Return the check of the public function and of its gradients by autograd."""
    inputs = draw(dtype, form, T, False, lengths[T][1], device)
    inputs.gfinal = None
    name = f"T={T} {form} public"
    return Check(name, partial(_call, inputs), partial(_wanted, inputs), bounds(dtype, form), False)


def _call(i: Inputs) -> Results:
    leaves = [t.detach().requires_grad_() for t in (i.a, i.x, *(() if i.initial is None else (i.initial,)))]
    a, x, *initial = leaves
    given = (None, x) if i.form.log else (a, x)
    options = {"reverse": i.form.reverse, "return_state": True, "cu_seqlens": i.cu_seqlens}
    h, final = fastwkv.linear_scan(*given, *initial, log_a=a if i.form.log else None, **options)
    ga, gx, *gh0 = torch.autograd.grad(h, leaves, i.gh.to(h.dtype))
    found = {"h": h.detach(), "final": final.detach(), "ga": ga, "gx": gx}
    return found | dict(zip(("gh0",), gh0, strict=False))
