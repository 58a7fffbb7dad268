"""The diagonal linear recurrence by definition: a loop, differentiated by PyTorch's autograd.

Source: "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349, equation 1 with a diagonal A.
"""

import torch
from torch import Tensor

from .wkv import required


def linear_scan(
    a: Tensor | None = None,
    x: Tensor = required,
    initial_state: Tensor | None = None,
    *,
    log_a: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h_t = a_t h_{t-1} + x_t``, token after token.

    Shapes, dtypes and results are those of :func:`fastwkv.linear_scan`.
    """
    given = log_a if a is None else a
    assert given is not None, "give a or log_a"
    dtype = torch.promote_types(given.dtype, x.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gate = given.to(wide) if log_a is None else given.to(wide).exp()
    pairs = x.dim() == 4
    inputs = torch.view_as_complex(x.to(wide.to_real())) if pairs else x.to(wide)
    gates = gate.expand(inputs.shape)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n in range(len(bounds) - 1):
        piece = slice(bounds[n], bounds[n + 1])
        steps = list(zip(gates[:, piece].unbind(1), inputs[:, piece].unbind(1), strict=True))
        h = torch.zeros_like(inputs[:, 0]) if initial_state is None else initial_state
        if cu_seqlens is not None:
            h = h[:1] if initial_state is None else h[n : n + 1]
        results = []
        for a_t, x_t in reversed(steps) if reverse else steps:
            h = a_t * h + x_t
            results.append(h)
        if results:
            outputs.append(torch.stack(results[::-1] if reverse else results, 1))
        states.append(h)
    h = torch.cat(outputs, 1)
    h = torch.view_as_real(h).to(x.dtype) if pairs else h.to(dtype)
    return (h, torch.cat(states)) if return_state else h


def linear_scan_step(
    a_t: Tensor | None = None, x_t: Tensor = required, state: Tensor = required, *, log_a: Tensor | None = None
) -> Tensor:
    """Return ``a_t state + x_t`` in the dtype of the state."""
    gate = a_t if log_a is None else log_a.to(state.dtype).exp()
    assert gate is not None, "give a_t or log_a"
    if x_t.dim() == 3:
        x_t = torch.view_as_complex(x_t.to(state.dtype.to_real()))
    return gate.to(state.dtype) * state + x_t.to(state.dtype)
