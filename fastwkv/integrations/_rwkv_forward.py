"""The forward pass of Hugging Face's RWKV with this package's operator, which never writes into a state.

Hugging Face stores a state as five tensors, ``[B, D, L]`` or ``[B, A, L]`` for L layers (A is the width of the
attention), and its layers write into them. Here the model takes a state apart into a list, every layer returns a new
list with its own entry replaced, and the model puts the five tensors together again. So autograd and gradient
checkpointing, which runs a block twice, see values that do not change.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastwkv.nn.rwkv4_layers import relu_squared
from fastwkv.ops import checks
from fastwkv.ops.wkv import wkv, wkv_step
from fastwkv.reference.wkv import WKVState


class LayerState(NamedTuple):
    """The state of one layer, None in each field before the first token."""

    ffn_x: Tensor | None = None
    att_x: Tensor | None = None
    wkv: WKVState | None = None


def linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Sequence[Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, list[Tensor] | None]:
    """Compute ``rwkv_linear_attention`` of transformers, by its own signature: ``w = exp(time_decay)``.

    Args:
        time_decay: the logarithm of the decay rate, ``[C]``.
        time_first: the bonus of the current token, ``[C]``.
        key: ``[B, T, C]``.
        value: ``[B, T, C]``.
        state: num, den and max, ``[B, C]`` each; empty if None.
        return_state: whether to return the state after the last token even if ``state`` is None.

    Returns:
        The output ``[B, T, C]`` in the dtype of ``key``, and the new state or None. States are float32, float64 beside
        float64 keys.

    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    decay, u = time_decay.to(dtype), time_first.to(dtype)
    value = value.to(key.dtype)
    before = None if state is None else WKVState(*(field.to(dtype) for field in state))
    if before is None and not return_state:
        return wkv(None, u, key, value, time_decay=decay), None
    if before is not None and key.shape[1] == 1:
        y_t, after = wkv_step(None, u, key[:, 0], value[:, 0], before, time_decay=decay)
        y = y_t[:, None]
    else:
        y, after = wkv(None, u, key, value, before, time_decay=decay, return_state=True)
    return y, list(after)


def attention_forward(
    self: Any, hidden: Tensor, state: list[LayerState] | None = None, use_cache: bool = False
) -> tuple[Tensor, list[LayerState] | None]:
    """Mix along time: ``RwkvSelfAttention.forward``."""
    before = LayerState() if state is None else state[self.layer_id]
    previous = _previous(hidden, before.att_x)
    key = self.key(_mixed(previous, hidden, self.time_mix_key))
    value = self.value(_mixed(previous, hidden, self.time_mix_value))
    receptance = torch.sigmoid(self.receptance(_mixed(previous, hidden, self.time_mix_receptance)))
    y, after = linear_attention(self.time_decay, self.time_first, key, value, before.wkv, state is not None)
    if state is not None and after is not None:
        state = _updated(state, self.layer_id, att_x=hidden[:, -1], wkv=WKVState(*after))
    return self.output(receptance * y), state


def feed_forward_forward(
    self: Any, hidden: Tensor, state: list[LayerState] | None = None
) -> tuple[Tensor, list[LayerState] | None]:
    """Mix channels: ``RwkvFeedForward.forward``."""
    previous = _previous(hidden, None if state is None else state[self.layer_id].ffn_x)
    key = relu_squared(self.key(_mixed(previous, hidden, self.time_mix_key)))
    receptance = torch.sigmoid(self.receptance(_mixed(previous, hidden, self.time_mix_receptance)))
    if state is not None:
        state = _updated(state, self.layer_id, ffn_x=hidden[:, -1])
    return receptance * self.value(key), state


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``RwkvModel.forward``: its layers get a list of :class:`LayerState`, its caller gets five tensors."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        state, use_cache = (bound.arguments.get(name) for name in ("state", "use_cache"))
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if state is not None:
            bound.arguments["state"] = _apart(state)
        elif use_cache:
            bound.arguments["state"] = [LayerState()] * self.config.num_hidden_layers
        else:
            return original(*bound.args, **bound.kwargs)
        output = original(*bound.args, **bound.kwargs)
        if isinstance(output, tuple):
            hidden, state, *others = output
            return hidden, _together(state), *others
        output.state = _together(output.state)
        return output

    return forward


def _apart(state: Sequence[Tensor]) -> list[LayerState]:
    ffn_x, att_x, *sums = (field.unbind(-1) for field in state)
    return [LayerState(f, a, WKVState(*s)) for f, a, *s in zip(ffn_x, att_x, *sums, strict=True)]


def _together(layers: list[LayerState]) -> list[Tensor]:
    ffn_x, att_x, sums = zip(*layers, strict=True)
    # Layers lie outermost in memory, so that each of them is contiguous when the state is taken apart again.
    return [torch.stack(field).permute(1, 2, 0) for field in (ffn_x, att_x, *zip(*sums, strict=True))]


def _updated(state: list[LayerState], layer: int, **fields: Any) -> list[LayerState]:
    return [*state[:layer], state[layer]._replace(**fields), *state[layer + 1 :]]


def _previous(hidden: Tensor, before: Tensor | None) -> Tensor:
    B, T, D = hidden.shape
    if before is None:
        before = hidden.new_zeros(B, D)
    checks.check_shape("B D", (B, D), state=before)
    first = before[:, None].to(hidden.dtype)
    return first if T == 1 else torch.cat((first, hidden[:, :-1]), 1)


def _mixed(previous: Tensor, hidden: Tensor, mix: Tensor) -> Tensor:
    return torch.lerp(previous, hidden, mix.to(hidden.dtype))
