"""WKV under autograd."""

from typing import Any

import torch
from torch import Tensor

from fastwkv.ops.derivatives import apply, differentiated_again, forward_alone
from fastwkv.ops.vmap import CHANNELS, STATES, TOKENS, WHOLE, takes_batched_gradients, vectorised
from fastwkv.ops.wkv_registration import wkv_bwd, wkv_fwd

# The axes of the arguments and results of WKV that vmap may lengthen.
AXES = CHANNELS, CHANNELS, TOKENS, TOKENS, STATES, WHOLE, WHOLE
RESULTS = TOKENS, STATES, TOKENS


class WKV(torch.autograd.Function):
    """WKV under autograd; kernels/wkv.py has the formulas of its adjoint.

    States are packed as ``[3, N, C]``, the adjoints (gm, gl) of their means and log weights as ``[2, N, C]``.
    """

    @staticmethod
    def forward(
        w: Tensor,
        u: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        edges: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute y, the final state and the checkpoints that the backward pass starts from."""
        return wkv_fwd(w, u, k, v, initial, cu_seqlens, True, edges)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the inputs, the final state and the checkpoints, nothing else."""
        _, final, checkpoints = output
        ctx.mark_non_differentiable(checkpoints)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, final, checkpoints)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once."""
        return vectorised(WKV, info.batch_size, in_dims, inputs, AXES, RESULTS, cu_seqlens=5)

    @staticmethod
    @takes_batched_gradients
    def backward(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Run the adjoint recurrence over the saved inputs."""
        w, u, k, v, initial, cu_seqlens, edges, final, checkpoints = ctx.saved_tensors
        gy = torch.zeros_like(v) if gy is None else gy.contiguous()
        if gfinal is not None:
            gfinal = _adjoint_of_final(final, gfinal)
        arguments = w, u, k, v, initial, cu_seqlens, checkpoints, gy, gfinal, edges
        if differentiated_again():
            gw, gu, gk, gv, ginitial = apply(_Adjoint, *arguments)
        else:
            gw, gu, gk, gv, ginitial = forward_alone(_Adjoint, *arguments)
        return gw, gu, gk, gv, None if initial is None else _gradient_of_initial(initial, ginitial), None, None


class DualWKV(WKV):
    """WKV in forward mode, which it refuses; a class of its own since torch.compile refuses one with tangents."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Take all indices of a mapped axis at once, as itself."""
        return vectorised(DualWKV, info.batch_size, in_dims, inputs, AXES, RESULTS, cu_seqlens=5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        """Refuse."""
        raise RuntimeError("fastwkv.wkv has no forward mode: it can be differentiated in reverse mode, once")


class _Adjoint(torch.autograd.Function):
    """The backward pass as an autograd function, which refuses to be differentiated again."""

    @staticmethod
    def forward(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        return wkv_bwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        axes = CHANNELS, CHANNELS, TOKENS, TOKENS, STATES, WHOLE, TOKENS, TOKENS, STATES, WHOLE
        results = CHANNELS, CHANNELS, TOKENS, TOKENS, STATES
        return vectorised(_Adjoint, info.batch_size, in_dims, inputs, axes, results, cu_seqlens=5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError("fastwkv.wkv can be differentiated once; its second derivative is not supported")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError("fastwkv.wkv can be differentiated once; its second derivative is not supported")


# The kernels differentiate with respect to the mean m = num/den and ℓ = max + log den; initial and final states are
# (num, den, max). The chain rule between the two is in the next two functions and nowhere else.


def _adjoint_of_final(final: Tensor, gfinal: Tensor) -> Tensor:
    num, den, _ = final
    gnum, gden, _ = gfinal  # max is a constant on the way out
    return torch.stack((_or_one(den) * gnum, num * gnum + _or_one(den) * gden))


def _gradient_of_initial(initial: Tensor, adjoint: Tensor) -> Tensor:
    num, den, _ = initial
    gm, gl = adjoint
    gnum = gm / _or_one(den)
    # gnum is infinite where the state is empty and its max lies far above the first key: 0 times it would be NaN.
    moment = torch.where(num == 0, 0, gnum * num)
    return torch.stack((gnum, (gl - moment) / _or_one(den), torch.where(den == 0, moment, gl)))


def _or_one(den: Tensor) -> Tensor:
    return torch.where(den == 0, 1, den)  # as the kernels count an empty state
