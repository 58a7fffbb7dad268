"""The kernels between the products of a token of RWKV-4 against float64."""

from collections.abc import Iterator
from functools import partial

import torch
from correctness import reference
from correctness.checks import ROUNDING, Case, Check, Results, draws, wide
from correctness.wkv import DTYPES, meaning
from torch.nn import functional as F

from fastwkv.kernels.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_

# Of the norm: one rounding of each result, and some of sums.
ROUNDED = {torch.float32: 6e-7, torch.float64: 1e-12, **ROUNDING}
EPS, FACTOR = 1e-5, 0.25
FEW, EVERY = ((3, 65),), ((1, 64), (3, 65), (1, 2560))


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of all dtypes, some of C below a program's lanes."""
    for name in ("bfloat16",) if rehearse else ("float32", "bfloat16", "float16", "float64"):
        for shape in EVERY if name in ("float32", "bfloat16") and not rehearse else FEW:
            for kernel in (_norm_mix, _gated_step, _relu_squared, _add_gated):
                title = f"{kernel.__name__[1:]} {name} {shape[0]}x{shape[1]}"
                yield Case(title, partial(kernel, DTYPES[name], shape))


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

    return Check(launch, wanted, dict.fromkeys(("2 mixed", "2 kept", "3 mixed", "3 kept"), ROUNDED[dtype]))


def _gated_step(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    normal, of_state = draws(device), torch.promote_types(dtype, torch.float32)
    w, u = (-2 + normal(shape[1])).exp().to(of_state), normal(shape[1]).to(dtype)
    k, v, r = (normal(*shape).to(dtype) for _ in range(3))
    start = torch.stack((normal(*shape), 0.1 + normal(*shape).abs(), normal(*shape))).to(of_state)

    def launch() -> Results:
        state = start.clone()
        y = wkv_step_gated_(w, u, k, v, r, *state.unbind())
        return {"y": y, **meaning(state)}

    def wanted() -> Results:
        initial = reference.State(*meaning(start).values())
        y, final = reference.wkv(wide(w), wide(u), wide(k)[:, None], wide(v)[:, None], initial, None)
        return {"y": y[:, 0] * torch.sigmoid(r.double()), "mean": final.mean, "log weight": final.log_weight}

    bound = ROUNDED[of_state]
    return Check(launch, wanted, {"y": ROUNDED[dtype], "mean": bound, "log weight": bound})


def _relu_squared(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    start = draws(device)(*shape).to(dtype)

    def launch() -> Results:
        x = start.clone()
        relu_squared_(x)
        return {"x": x}

    return Check(launch, lambda: {"x": start.double().relu().square()}, {"x": ROUNDED[dtype]})


def _add_gated(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Check:
    normal = draws(device)
    start, r, y = (normal(*shape).to(dtype) for _ in range(3))

    def launch() -> Results:
        x = start.clone()
        add_gated_(x, r, y, FACTOR)
        return {"x": x}

    def wanted() -> Results:
        return {"x": start.double() + FACTOR * torch.sigmoid(r.double()) * y.double()}

    return Check(launch, wanted, {"x": ROUNDED[dtype]})
