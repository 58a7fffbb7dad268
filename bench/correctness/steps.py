"""One token at a time against float64: wkv_step and linear_scan_step, each from the state after the last one."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from correctness import reference, scan, wkv
from correctness.checks import LONG, Case, Check, Form, Results, wide

from fastwkv.kernels.linear_scan_step import linear_scan_step
from fastwkv.kernels.wkv_step import wkv_step

C, SHORT = 65, 16
BOTH = (False, True)
SCANS = (  # dtype, whether log a is given, whether a is one for all tokens
    ("float32", BOTH, BOTH),
    ("bfloat16", BOTH, (False,)),
    ("float64", (False,), (False,)),
    ("complex64", (False,), BOTH),
    ("complex128", (False,), (False,)),
    ("bfloat16x2", (False,), (False,)),
)


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of all dtypes: many tokens, and few."""
    lengths = (3,) if rehearse else (SHORT, LONG)
    for name, T in product(("bfloat16",) if rehearse else wkv.DTYPES, lengths):
        yield Case(f"wkv_step {name} T={T}", partial(_wkv, name, T), short=T < LONG)
    for name, logs, gates in SCANS[:1] if rehearse else SCANS:
        for log, fixed, T in product(logs, gates, lengths):
            prepare = partial(_scan, name, Form(C, True, log=log, fixed=fixed), T)
            kinds = " log" * log + " fixed" * fixed
            yield Case(f"linear_scan_step {name}{kinds} T={T}", prepare, short=T < LONG)


def _wkv(dtype: str, T: int, device: torch.device) -> Check:
    i = wkv.draw(dtype, Form(C, True), T, [], device)
    assert i.initial is not None
    start = i.initial
    tokens = [tuple(t[:, n].contiguous() for t in (i.k, i.v)) for n in range(T)]

    def launch() -> Results:
        state, outputs = start.unbind(), []
        for k, v in tokens:
            y, packed = wkv_step(i.w, i.u, k, v, *state)
            state = packed.unbind()
            outputs.append(y)
        return {"y": torch.stack(outputs, 1), **wkv.meaning(state)}

    def wanted() -> Results:
        initial = reference.State(*wkv.meaning(start).values())
        y, final = reference.wkv(*(wide(t) for t in (i.w, i.u, i.k, i.v)), initial, None)
        return {"y": y, "mean": final.mean, "log weight": final.log_weight}

    return Check(launch, wanted, wkv.bounds(dtype), recorded=T < LONG)


def _scan(dtype: str, form: Form, T: int, device: torch.device) -> Check:
    i = scan.draw(dtype, form, T, [], device)
    assert i.initial is not None
    start = i.initial.to(torch.promote_types(i.a.dtype, torch.float32))
    gates = [i.a if form.fixed else i.a[:, n].contiguous() for n in range(T)]
    tokens = [i.x[:, n].contiguous() for n in range(T)]

    def launch() -> Results:
        h, outputs = start, []
        for gate, token in zip(gates, tokens, strict=True):
            h = linear_scan_step(gate, token, h, form.log)
            outputs.append(h)
        return {"h": torch.stack(outputs, 1)}

    def wanted() -> Results:
        h, _ = scan.forward(i, [wide(i.a), wide(i.x), wide(start)])
        return {"h": torch.view_as_complex(h) if i.x.dim() == 4 else h}

    double = start.dtype in (torch.float64, torch.complex128)  # the state does not round to 16 bits
    return Check(launch, wanted, {"h": 1e-12 if double else 1e-6}, recorded=T < LONG)
