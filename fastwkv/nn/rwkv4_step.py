"""A token of RWKV-4 with as few kernels as it takes beside those of its matrix products: what generation runs.

A block of rwkv4_layers.py is about 25 operations a token, here it is 12: sums, means and gates are written together,
residuals are added by the products, and states change where they are.
"""

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fastwkv.nn.rwkv4_layers import RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix
from fastwkv.nn.state import RWKV4State
from fastwkv.ops.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_

if TYPE_CHECKING:
    from fastwkv.nn.rwkv4 import RWKV4

_KNOWN = {RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix, nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList}


def stands_for(model: "RWKV4", tokens: Tensor, state: RWKV4State) -> bool:
    """Whether :func:`run` does on a GPU what the blocks of ``model`` would do: whether they are as they were built.

    Hooks would not be called, and what adapters, quantisation or parametrisations put in the place of a module or of a
    parameter would not either. Autocast would be passed by. What the blocks refuse is left to them. On a CPU, where the
    products take nearly all of the time, they are as good.
    """
    if not state.att_x.is_cuda or torch.is_autocast_enabled("cuda"):
        return False
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    shape = (model.config.layers, tokens.shape[0], model.config.width)
    if not all(t.shape == shape and t.is_contiguous() for t in (state.att_x, state.ffn_x, *state.wkv)):
        return False
    return all(_is_plain(module, shape[-1:]) for module in model.modules() if module is not model)


def _is_plain(module: nn.Module, channels: tuple[int, ...]) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    changed = module._compiled_call_impl is not None or "forward" in module.__dict__
    if type(module) not in _KNOWN or hooked or changed:
        return False
    parameters = module._parameters.values()
    if isinstance(module, nn.Linear):
        weight, *others = parameters
        return _is_tensor(weight) and others == [None]
    if isinstance(module, (nn.LayerNorm, RWKV4TimeMix, RWKV4ChannelMix)):
        return all(_is_tensor(p) and p.shape == channels for p in parameters)
    return all(map(_is_tensor, parameters))


def _is_tensor(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return type(parameter) in (Tensor, nn.Parameter)  # others have products of their own


def run(model: "RWKV4", tokens: Tensor, state: RWKV4State) -> Tensor:
    """Read one token of every text, ``[B]``: return its features ``[B, D]`` and change ``state`` in place.

    The numbers are those of the blocks up to rounding, of which there is less.
    """
    blocks = cast("list[RWKV4Block]", list(model.blocks))
    rates = torch.stack([block.attention.time_decay for block in blocks]).to(state.wkv.num.dtype).exp()
    x: Tensor = model.embeddings(tokens)
    for block, w, block_state in zip(blocks, rates, state.unbind(), strict=True):
        x = _block(block, x, w, block_state)
    return model.ln_out(x)


def _block(block: RWKV4Block, x: Tensor, w: Tensor, state: RWKV4State) -> Tensor:
    """Map x, which may be overwritten, and change the state of this block."""
    x = x if block.pre_ln is None else block.pre_ln(x)
    scale = block.residual_scale
    time, channels = block.attention, block.feed_forward
    mixes = [time.time_mix_receptance, time.time_mix_key, time.time_mix_value]
    r, k, v = norm_mix_(x, block.ln1.weight, block.ln1.bias, block.ln1.eps, state.att_x, mixes).unbind()
    y = wkv_step_gated_(w, time.time_first, time.key(k), time.value(v), time.receptance(r), *state.wkv)
    x.addmm_(y, time.output.weight.t(), alpha=scale)
    mixes = [channels.time_mix_receptance, channels.time_mix_key]
    r, k = norm_mix_(x, block.ln2.weight, block.ln2.bias, block.ln2.eps, state.ffn_x, mixes).unbind()
    k = channels.key(k)
    relu_squared_(k)
    add_gated_(x, channels.receptance(r), channels.value(k), scale)
    return x.div_(2) if block.halves else x
