"""The diagonal linear recurrence: the public functions."""

from typing import Any, Literal, TypeGuard, overload

import torch
from torch import Tensor

from fastwkv.kernels.launch import scan_dtypes
from fastwkv.ops import checks
from fastwkv.ops import linear_scan_registration as registered
from fastwkv.ops.derivatives import differentiated
from fastwkv.ops.linear_scan_autograd import as_complex, scan
from fastwkv.ops.vmap import plain
from fastwkv.reference.wkv import required

_ORDINARY = (Tensor, torch.nn.Parameter)
_STATE_DTYPES = torch.float32, torch.float64, torch.complex64, torch.complex128


@overload
def linear_scan(
    a: Tensor | None = None,
    x: Tensor = ...,
    initial_state: Tensor | None = None,
    *,
    log_a: Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...


@overload
def linear_scan(
    a: Tensor | None = None,
    x: Tensor = ...,
    initial_state: Tensor | None = None,
    *,
    log_a: Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_scan(
    a: Tensor | None = None,
    x: Tensor = ...,
    initial_state: Tensor | None = None,
    *,
    log_a: Tensor | None = None,
    reverse: bool = False,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    """The diagonal linear recurrence, real or complex.

    Per channel, for t = 0 ... T-1, with h_{-1} the initial state::

        h_t = a_t h_{t-1} + x_t

    States are float32 for 16-bit and float32 results, of the dtype of the result otherwise. The rounding errors of the
    state are carried along, so that for |a| <= 1 a result of 32 bits or more is rounded about once, whatever T. For
    |a| > 1 the state grows as the formula says. On a GPU, time is cut into chunks if B and C are small: then the
    product of the decays of a chunk must not overflow unless the state before it is 0, and if it underflows, an
    infinite state becomes NaN. Two runs give the same bits.

    Gradients of every order reach a (or log_a), x and the initial state, from h and from the final state, in reverse
    and in forward mode. With a complex a they follow PyTorch's convention (the gradient is that of the conjugate), and
    a real x gets the real part. ``torch.func.vmap`` over any argument is one call over more rows or channels, with all
    of these derivatives; mapped ``cu_seqlens`` are one call each. Within forward mode and transforms of functions
    ``torch.compile`` leaves the call to Python, and refuses it if the graph must be whole.

    Args:
        a: the decay: ``[C]`` if it is the same at every token, or ``[B, T, C]``, a gate. None, or left out, if
            ``log_a`` is given: ``linear_scan(x=x, log_a=log_a)``.
        x: the input, ``[B, T, C]``. T and C need not be multiples of anything. Beside a complex decay x may hold real
            and imaginary parts as pairs, ``[B, T, C, 2]`` of a real dtype: complex numbers in 16 bits a part, at half
            of complex64's memory traffic. On the CPU pairs of 16 bits are converted to complex64 and back.
        initial_state: h before the first token (with ``reverse``: after the last); zero if None. One row a sequence:
            ``[B, C]``, or ``[N, C]`` with ``cu_seqlens``.
        log_a: the logarithm of the decay, ``a = exp(log_a)``, for gates that are computed so: 16 bits tell 0.999 from 1
            in log a but not in a. -inf makes a = 0. The shapes are those of ``a``. Beside a wider x it is converted to
            the wider dtype before it is exponentiated, and if h is real, e^{log a} is not rounded to the dtype of the
            states.
        reverse: whether to run from the last token to the first: ``h_t = a_t h_{t+1} + x_t``.
        return_state: whether to return the state after the last token of every sequence too (with ``reverse``: after
            the first).
        cu_seqlens: int32 or int64 ``[N + 1]``, for N sequences packed into a batch of one: sequence n holds the
            tokens ``cu_seqlens[n] ... cu_seqlens[n + 1] - 1``. A sequence may be empty, and then its final state is its
            initial state. The checks of offsets, and the results at tokens of no sequence, are those of :func:`wkv`.

    a and x may each be float32, float64, bfloat16, float16, complex64 or complex128. An ``a`` near 1 needs float32,
    beside an x of 16 bits too.

    Returns:
        h ``[B, T, C]`` of the dtype ``torch.promote_types(a.dtype, x.dtype)``, or pairs where x is of pairs, in its
        dtype; with ``return_state`` also the final state, which is complex beside pairs.

    Raises:
        TypeError: an argument is not a dense tensor of a dtype that is listed here, or not a bool; or not exactly one
            of a and log_a is given.
        ValueError: a shape, device or offset does not fit the others.

    Source: "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349, section 3.2.

    """
    checks.check_bool(reverse=reverse, return_state=return_state)
    name, a, log = _decay("a", a, log_a)
    checks.check_floating_or_complex(**{name: a}, x=x)
    checks.are_pairs("B T C", name, a, x=x)
    B, T, C = x.shape[:3]
    checks.check_decay("B T C", (B, T, C), **{name: a})
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, B, T)
        checks.check_device(x=x, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        dims, rows = ("B C", B) if cu_seqlens is None else ("N C", cu_seqlens.numel() - 1)
        _check_state("initial_state", initial_state, dims, (rows, C), scan_dtypes(a, x)[1], x)
    h, final = scan(a, x, initial_state, cu_seqlens, log, reverse)
    return (h, final) if return_state else h


def linear_scan_step(
    a_t: Tensor | None = None, x_t: Tensor = required, state: Tensor = required, *, log_a: Tensor | None = None
) -> Tensor:
    """One token of :func:`linear_scan`: ``h_t = a_t h_{t-1} + x_t``.

    Args:
        a_t: the decay at this token, ``[C]`` or ``[B, C]``. None, or left out, if ``log_a`` is given.
        x_t: the input, ``[B, C]``, or pairs ``[B, C, 2]``.
        state: h_{t-1}, ``[B, C]``, of the dtype of :func:`linear_scan`'s states.
        log_a: the logarithm of the decay, ``a_t = exp(log_a)``, ``[C]`` or ``[B, C]``.

    Returns:
        h_t ``[B, C]``, the next state, of the dtype of the state: it does not round to 16 bits.

    Raises:
        TypeError: as for :func:`linear_scan`.
        ValueError: as for :func:`linear_scan`.

    """
    if log_a is None and _are_alike(a_t, x_t, state):
        return torch.addcmul(x_t, a_t, state)  # one launch, and differentiable
    name, a, log = _decay("a_t", a_t, log_a)
    checks.check_floating_or_complex(**{name: a}, x_t=x_t)
    pairs = checks.are_pairs("B C", name, a, x_t=x_t)
    B, C = x_t.shape[:2]
    checks.check_decay("B C", (B, C), **{name: a})
    state_dtype = torch.promote_types(torch.promote_types(a.dtype, x_t.dtype), torch.float32)
    _check_state("state", state, "B C", (B, C), state_dtype, x_t)
    # As one number of float32, e^{log a} would be rounded at every token in the same way. The kernels hold a real one
    # in two numbers, PyTorch's operators in one of float64.
    composite = (log and state_dtype.is_complex) or differentiated([a, x_t, state])
    if pairs and (composite or x_t.dtype.itemsize > 2):
        x_t = as_complex(x_t, state_dtype)
    if not log and a.dtype == x_t.dtype == state.dtype:
        return torch.addcmul(x_t, a, state)  # one launch, and differentiable
    if composite:
        wide = torch.promote_types(state_dtype, torch.float64) if log else state_dtype
        a = a.to(wide)
        return torch.addcmul(x_t.to(wide), a.exp() if log else a, state.to(wide)).to(state_dtype)
    if state_dtype.is_complex:
        a, x_t = a.to(state_dtype), x_t if x_t.dim() == 3 else x_t.to(state_dtype)
    return registered.linear_scan_step(plain(a), plain(x_t), plain(state), log)


def _are_alike(a: Any, x: Any, state: Any) -> TypeGuard[Tensor]:
    """Return whether the arguments of a step are right and of one dtype: the checks of the ordinary case in short.

    The step itself takes a few microseconds, and so would the checks that tell what is wrong.
    """
    if not (type(a) in _ORDINARY and type(x) in _ORDINARY and type(state) in _ORDINARY):
        return False
    dtype, device, strided = x.dtype, x.device, torch.strided
    if (
        dtype not in _STATE_DTYPES
        or a.dtype != dtype
        or state.dtype != dtype
        or a.device != device
        or state.device != device
    ):
        return False
    if x.is_nested or a.is_nested or state.is_nested or x.layout != strided or a.layout != strided:
        return False
    shape = x.shape
    return (
        state.layout == strided
        and len(shape) == 2
        and state.shape == shape
        and (a.shape == shape or a.shape == shape[1:])
        and 0 not in shape
    )


def _decay(name: str, a: Tensor | None, log_a: Tensor | None) -> tuple[str, Tensor, bool]:
    if a is not None and log_a is None:
        return name, a, False
    if a is None and log_a is not None:
        return "log_a", log_a, True
    raise TypeError(f"give one of {name} and log_a, got {'neither' if a is None else 'both'}")


def _check_state(name: str, state: Tensor, dims: str, shape: tuple[int, int], dtype: torch.dtype, x: Tensor) -> None:
    checks.check_floating_or_complex(x=x, **{name: state})
    checks.check_shape(dims, shape, **{name: state})
    checks.check_dtype(dtype, "(as states are: the dtype of a with x, 16 bits as float32)", **{name: state})
