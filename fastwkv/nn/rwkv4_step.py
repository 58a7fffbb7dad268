"""A token of RWKV-4 with as few kernels as it takes beside those of its matrix products: what generation runs.

A block of rwkv4_layers.py is about 25 operations a token, here it is 12: sums, means and gates are written together,
residuals are added by the products, and states change where they are.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fastwkv.nn.rwkv4_layers import RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix
from fastwkv.nn.state import RWKV4State
from fastwkv.ops.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_

if TYPE_CHECKING:
    from fastwkv.nn.rwkv4 import RWKV4

_KNOWN = {RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix, nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList}


def stands_for(model: "RWKV4", state: RWKV4State) -> bool:
    """Whether :func:`run` does on a GPU what the blocks of ``model`` would do: whether they are as they were built.

    Hooks would not be called, and what adapters, quantisation or parametrisations put in the place of a module would
    not either. Autocast would be passed by. On a CPU, where the products take nearly all of the time, blocks are as
    good.
    """
    if not state.att_x.is_cuda or torch.is_autocast_enabled("cuda"):
        return False
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if not all(t.is_contiguous() for t in (state.att_x, state.ffn_x, *state.wkv)):
        return False
    return all(_is_plain(module) for module in model.modules() if module is not model)


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    changed = module._compiled_call_impl is not None or "forward" in module.__dict__
    return type(module) in _KNOWN and not hooked and not changed


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
