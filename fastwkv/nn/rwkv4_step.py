"""One token of RWKV-4, as generation runs it on a GPU: with as few kernels as possible beside the matrix products.

A block of rwkv4_layers.py is about 25 operations a token, here it is 12: one kernel writes sums, means and gates
together, the matrix products add the residuals, and states change in place.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as hooks

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.rwkv4_layers import RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix
from fastwkv.nn.state import RWKV4State
from fastwkv.ops.rwkv4_step import add_gated_, norm_mix_, relu_squared_, wkv_step_gated_
from fastwkv.ops.time_decay import decay_rate

# The types of modules as they are built, level by level below the model: its ends and the list of its blocks, the
# blocks, their layers, and the layers of these.
_VECTORS: set[type] = {nn.LayerNorm, RWKV4TimeMix, RWKV4ChannelMix}  # their own parameters are one number a channel
_LEVELS: list[set[type]] = [
    {nn.Embedding, nn.ModuleList, nn.LayerNorm, nn.Linear},
    {RWKV4Block},
    _VECTORS,
    {nn.Linear},
]
_VECTOR_NAMES = {
    ("weight", "bias"),
    ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"),
    ("time_mix_key", "time_mix_receptance"),
}
_PLAIN: set[type] = {Tensor, nn.Parameter}  # subclasses have matrix products of their own
_NONE = {type(None)}

# The dictionaries in which a module keeps its parts: access by attribute takes ten times as long.
_children, _parameters = itemgetter("_modules"), itemgetter("_parameters")
_hooks, _hooks_before = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_shape = attrgetter("shape")


class Model(Protocol):
    """The parts of an ``fastwkv.nn.RWKV4`` that a token passes through, and their sizes."""

    config: RWKV4Config
    embeddings: nn.Embedding
    blocks: nn.ModuleList
    ln_out: nn.LayerNorm


def stands_for(model: Model, tokens: Tensor, state: RWKV4State) -> bool:
    """Return whether :func:`run` may stand for the blocks of ``model``: on a GPU, and as they were built.

    :func:`run` calls no hooks, and no module or parameter that adapters, quantisation or parametrisations have put in
    the place of another. It ignores autocast. Arguments that the blocks refuse are left to them. On a CPU, where matrix
    products take nearly all of the time, the blocks are as fast.

    It is called before every token and remembers nothing: a module announces no change, so that a change between two
    tokens is found only by looking at each token. A whole level of modules is looked at together, without a line of
    Python for each.
    """
    if not state.att_x.is_cuda or torch.is_autocast_enabled("cuda"):
        return False
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    shape = (model.config.layers, tokens.shape[0], model.config.width)
    if not all(t.shape == shape and t.is_contiguous() for t in (state.att_x, state.ffn_x, *state.wkv)):
        return False
    contents = [vars(model)]  # of the modules of a level, each in its dictionary
    for kinds in _LEVELS:
        modules = [m for m in chain.from_iterable(map(dict.values, map(_children, contents))) if m is not None]
        contents = list(map(vars, modules))
        if not kinds.issuperset(map(type, modules)) or not _are_called_as_built(contents):
            return False
        if not _are_plain(modules, shape[-1:]):
            return False
    return not any(map(_children, contents))


def _are_called_as_built(contents: list[dict[str, Any]]) -> bool:
    hooked = any(map(_hooks, contents)) or any(map(_hooks_before, contents))
    return not hooked and not any(
        any(map(contains, contents, repeat(name))) for name in ("forward", "_compiled_call_impl")
    )


def _are_plain(modules: list[nn.Module], channels: tuple[int, ...]) -> bool:
    """Return whether the parameters of the modules are plain tensors, of the names and shapes they were built with."""
    kinds = set(map(type, modules))
    parameters = list(map(_parameters, map(vars, modules)))
    if kinds == {nn.Linear}:
        weights, biases = map(dict.get, parameters, repeat("weight")), map(dict.get, parameters, repeat("bias"))
        return _PLAIN.issuperset(map(type, weights)) and _NONE.issuperset(map(type, biases))
    values = list(chain.from_iterable(map(dict.values, parameters)))
    if kinds <= _VECTORS:
        shaped = _PLAIN.issuperset(map(type, values)) and list(map(_shape, values)).count(channels) == len(values)
        return shaped and _VECTOR_NAMES.issuperset(map(tuple, parameters))
    if len(kinds) == 1:
        return _PLAIN.issuperset(map(type, values))
    return all(_are_plain([module], channels) for module in modules)  # the ends, few and of every kind


def run(model: Model, tokens: Tensor, state: RWKV4State) -> Tensor:
    """Read one token of every sequence, ``[B]``: return its features ``[B, D]`` and change ``state`` in place.

    The numbers are those of the blocks up to rounding errors, which are smaller here.
    """
    blocks = list(cast("Iterable[RWKV4Block]", model.blocks))
    decays = [cast("Any", block._modules["attention"])._parameters["time_decay"] for block in blocks]
    rates = decay_rate(torch.stack(decays), state.wkv.num.dtype)
    x: Tensor = model.embeddings(tokens)
    for block, w, block_state in zip(blocks, rates, state.unbind(), strict=True):
        x = _block(block, x, w, block_state)
    return model.ln_out(x)


_time_vectors = itemgetter("time_mix_receptance", "time_mix_key", "time_mix_value", "time_first")
_time_matrices = itemgetter("receptance", "key", "value", "output")
_channel_vectors = itemgetter("time_mix_receptance", "time_mix_key")
_channel_matrices = itemgetter("receptance", "key", "value")


def _block(block: RWKV4Block, x: Tensor, w: Tensor, state: RWKV4State) -> Tensor:
    """Return the output of the block, which may be written over x, and change its state in place."""
    layers: dict[str, Any] = block._modules
    if (pre_ln := layers.get("pre_ln")) is not None:
        x = pre_ln(x)
    scale = block.residual_scale
    time, channels = layers["attention"], layers["feed_forward"]
    *mixes, u = _time_vectors(time._parameters)
    receptance, key, value, output = map(_weight, _time_matrices(time._modules))
    r, k, v = norm_mix_(x, *_norm(layers["ln1"]), state.att_x, mixes).unbind()
    y = wkv_step_gated_(w, u, linear(k, key), linear(v, value), linear(r, receptance), *state.wkv)
    x.addmm_(y, output.t(), alpha=scale)
    receptance, key, value = map(_weight, _channel_matrices(channels._modules))
    mixes = list(_channel_vectors(channels._parameters))
    r, k = norm_mix_(x, *_norm(layers["ln2"]), state.ffn_x, mixes).unbind()
    k = linear(k, key)
    relu_squared_(k)
    add_gated_(x, linear(r, receptance), linear(k, value), scale)
    return x.div_(2) if block.halves else x


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def _norm(module: nn.LayerNorm) -> tuple[Any, Any, float]:
    return module._parameters["weight"], module._parameters["bias"], module.eps
