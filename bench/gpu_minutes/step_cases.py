"""Kernels of one token against float64: the steps over many tokens, and what stands between RWKV-4's products."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from gpu_minutes import reference, wkv_cases
from gpu_minutes.checking import ROUNDING, Case, Check, Results, draws
from gpu_minutes.scan_cases import DTYPES as SCAN_DTYPES
from gpu_minutes.wkv_cases import BATCH, DTYPES, meaning
from torch import Tensor
from torch.nn import functional as F

from fastwkv.kernels.linear_scan_step import linear_scan_step
from fastwkv.kernels.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_
from fastwkv.kernels.wkv_step import wkv_step

TOKENS, TOKENS_SHORT = 1000, 16
# Of the norm: one rounding of each result, and some of sums.
ROUNDED = {torch.float32: 6e-7, torch.float64: 1e-12, **ROUNDING}
EPS, FACTOR = 1e-5, 0.25
BOTH = (False, True)
SCANS = (  # dtype, whether log a is given, whether a is one for all tokens
    ("float32", BOTH, BOTH),
    ("bfloat16", BOTH, (False,)),
    ("float64", (False,), (False,)),
    ("complex64", (False,), BOTH),
    ("complex128", (False,), (False,)),
    ("bfloat16x2", (False,), (False,)),
)


def steps(rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of wkv_step and linear_scan_step: many tokens, each from the state after the last one."""
    lengths = (3,) if rehearse else (TOKENS_SHORT, TOKENS)
    for dtype in ("bfloat16",) if rehearse else DTYPES:
        for T in lengths:
            yield Case(f"wkv_step {dtype} T={T}", partial(_wkv_steps, dtype, T), short=T < TOKENS)
    for dtype, logs, gates in SCANS[:1] if rehearse else SCANS:
        for log, fixed in product(logs, gates):
            for T in lengths:
                name = f"linear_scan_step {dtype}{' log' * log}{' fixed' * fixed} T={T}"
                yield Case(name, partial(_scan_steps, dtype, log, fixed, T), short=T < TOKENS)


def _wkv_steps(dtype: str, T: int, device: torch.device) -> Check:
    C, normal, narrow = 65, draws(device), DTYPES[dtype]
    wide = torch.promote_types(narrow, torch.float32)
    w, u = (-2 + normal(C)).exp().to(wide), normal(C).to(wide)
    k, v = (normal(BATCH, T, C).to(narrow) for _ in range(2))
    keys, values = ([t[:, i].contiguous() for i in range(T)] for t in (k, v))
    start = torch.stack((normal(BATCH, C), 0.1 + normal(BATCH, C).abs(), normal(BATCH, C))).to(wide)

    def launch() -> Results:
        state, outputs = start.unbind(), []
        for key, value in zip(keys, values, strict=True):
            y, packed = wkv_step(w, u, key, value, *state)
            state = packed.unbind()
            outputs.append(y)
        return {"y": torch.stack(outputs, 1), **meaning(state)}

    def wanted() -> Results:
        initial = reference.State(*meaning(start).values())
        y, final = reference.wkv(*(t.double() for t in (w, u, k, v)), initial, None)
        return {"y": y, "mean": final.mean, "log weight": final.log_weight}

    return Check("", launch, wanted, wkv_cases.bounds(dtype, "ordinary"), recorded=T < TOKENS)


def _scan_steps(dtype: str, log: bool, fixed: bool, T: int, device: torch.device) -> Check:
    C, normal, (of_a, of_x) = 65, draws(device), SCAN_DTYPES[dtype]
    state_dtype = torch.promote_types(of_a, torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.complex(normal(*shape), normal(*shape)) if of_a.is_complex else normal(*shape)

    a = torch.sigmoid(3 + normal(*((C,) if fixed else (BATCH, T, C))))
    a = torch.polar(a, 3 * normal(*a.shape)) if of_a.is_complex else a
    a, x = (a.log() if log else a).to(of_a), random(BATCH, T, C)
    x = torch.view_as_real(x).to(of_x) if of_a.is_complex and not of_x.is_complex else x.to(of_x)
    start = random(BATCH, C).to(state_dtype)
    gates = [a if fixed else a[:, i].contiguous() for i in range(T)]
    inputs = [x[:, i].contiguous() for i in range(T)]

    def launch() -> Results:
        h, outputs = start, []
        for gate, token in zip(gates, inputs, strict=True):
            h = linear_scan_step(gate, token, h, log)
            outputs.append(h)
        return {"h": torch.stack(outputs, 1)}

    def wanted() -> Results:
        gate, state = (t.to(torch.promote_types(t.dtype, torch.float64)) for t in (a, start))
        numbers = x.to(torch.promote_types(of_x, torch.float64))
        numbers = torch.view_as_complex(numbers) if x.dim() == 4 else numbers
        return {"h": reference.linear_scan(gate.exp() if log else gate, numbers, state, None)[0]}

    bound = 1e-12 if state_dtype in (torch.float64, torch.complex128) else 1e-6  # the state does not round to 16 bits
    return Check("", launch, wanted, {"h": bound}, recorded=T < TOKENS)


def rwkv4_step(rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of the kernels between the products of a token of RWKV-4, some of C below a program's lanes."""
    few, every = ((3, 65),), ((1, 64), (3, 65), (1, 2560))
    for dtype in ("bfloat16",) if rehearse else ("float32", "bfloat16", "float16", "float64"):
        for shape in every if dtype in ("float32", "bfloat16") and not rehearse else few:
            for kernel in (_norm_mix, _gated_step, _relu_squared, _add_gated):
                name = f"{kernel.__name__[1:]} {dtype} {shape[0]}x{shape[1]}"
                yield Case(name, partial(kernel, DTYPES[dtype], shape))


def _norm_mix(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    normal = draws(device)
    x, old = (normal(*shape).to(dtype) for _ in range(2))
    weight, bias, *mixes = (normal(shape[1]).to(dtype) for _ in range(5))

    def launch() -> Results:
        found = {}
        for count in (2, 3):
            before = old.clone()
            found[f"{count} mixed"] = norm_mix_(x, weight, bias, EPS, before, mixes[:count])
            found[f"{count} kept"] = before
        return found

    def wanted() -> Results:
        y = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), EPS)
        kept = y.to(dtype).double()  # of which the mixtures are
        mixed = torch.stack([torch.lerp(old.double(), kept, mix.double()) for mix in mixes])
        return {"2 mixed": mixed[:2], "2 kept": y, "3 mixed": mixed, "3 kept": y}

    bound = ROUNDED[dtype]
    return Check("", launch, wanted, {f"{n} {what}": bound for n in (2, 3) for what in ("mixed", "kept")})


def _gated_step(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    normal, wide = draws(device), torch.promote_types(dtype, torch.float32)
    w, u = (-2 + normal(shape[1])).exp().to(wide), normal(shape[1]).to(dtype)
    k, v, r = (normal(*shape).to(dtype) for _ in range(3))
    start = torch.stack((normal(*shape), 0.1 + normal(*shape).abs(), normal(*shape))).to(wide)

    def launch() -> Results:
        state = start.clone()
        y = wkv_step_gated_(w, u, k, v, r, *state.unbind())
        return {"y": y, **meaning(state)}

    def wanted() -> Results:
        initial = reference.State(*meaning(start).values())
        y, final = reference.wkv(w.double(), u.double(), k.double()[:, None], v.double()[:, None], initial, None)
        return {"y": y[:, 0] * torch.sigmoid(r.double()), "mean": final.mean, "log weight": final.log_weight}

    bound = ROUNDED[wide]
    return Check("", launch, wanted, {"y": ROUNDED[dtype], "mean": bound, "log weight": bound})


def _relu_squared(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    start = draws(device)(*shape).to(dtype)

    def launch() -> Results:
        x = start.clone()
        relu_squared_(x)
        return {"x": x}

    return Check("", launch, lambda: {"x": start.double().relu().square()}, {"x": ROUNDED[dtype]})


def _add_gated(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    normal = draws(device)
    start, r, y = (normal(*shape).to(dtype) for _ in range(3))

    def launch() -> Results:
        x = start.clone()
        add_gated_(x, r, y, FACTOR)
        return {"x": x}

    def wanted() -> Results:
        return {"x": start.double() + FACTOR * torch.sigmoid(r.double()) * y.double()}

    return Check("", launch, wanted, {"x": ROUNDED[dtype]})
