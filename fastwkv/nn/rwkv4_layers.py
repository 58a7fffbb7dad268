"""RWKV-4: the two mixing layers and the block.

Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, section 3. Initialisation follows the
code that trained the published models; where the paper's appendix differs from it (W_o, W_v), the code is right.

Every layer takes either sequences, ``[B, T, D]``, and works on all their tokens in parallel, or one token of each,
``[B, D]``, and takes a step. Both give the same numbers and carry the same state. Several sequences can be packed one
after the other into a batch of one, ``[1, T, D]`` with ``cu_seqlens`` as in :func:`fastwkv.wkv`; a state then has a row
for each.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fastwkv.nn.config import RWKV4Config, check_config
from fastwkv.nn.state import RWKV4State, empty_wkv_state, wkv_dtype
from fastwkv.ops.wkv import wkv, wkv_step
from fastwkv.reference.wkv import WKVState


class RWKV4TimeMix(nn.Module):
    """The layer that mixes along time.

    With x'_t the mean ``μ x_t + (1 - μ) x_{t-1}``, where r, k and v have a μ each::

        r_t = W_r x'_t    k_t = W_k x'_t    v_t = W_v x'_t
        y_t = W_o (σ(r_t) ⊙ wkv_t),   where wkv = fastwkv.wkv(None, time_first, k, v, time_decay=time_decay)

    The rate exp(time_decay) is computed in float32 (float64 in a float64 model).

    Args:
        config: the sizes of the model.
        layer: the index of this layer among the L layers, on which the initial values depend.

    """

    # The published models were trained at these multiples of the learning rate; see param_groups.
    lr_scales: ClassVar = {"time_decay": 2.0, "time_first": 3.0}

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
        check_config(config)
        D = config.width
        self._depth = _Depth(config.layers, layer)
        self.time_decay = nn.Parameter(torch.empty(D))
        self.time_first = nn.Parameter(torch.empty(D))
        self.time_mix_key = nn.Parameter(torch.empty(D))
        self.time_mix_value = nn.Parameter(torch.empty(D))
        self.time_mix_receptance = nn.Parameter(torch.empty(D))
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        depth, D = self._depth, self.time_decay.numel()
        channel = torch.arange(D, dtype=torch.float64, device=self.time_decay.device)
        self.time_decay.copy_(-5 + 8 * (channel / max(D - 1, 1)) ** (0.7 + 1.3 * depth.ratio))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        mix = (channel / D) ** depth.remaining
        self.time_mix_key.copy_(mix)
        self.time_mix_value.copy_(mix + 0.3 * depth.ratio)
        self.time_mix_receptance.copy_((channel / D) ** (0.5 * depth.remaining))
        for linear in (self.key, self.receptance, self.output):
            linear.weight.zero_()
        orthogonal_(self.value.weight, 1.0)

    def forward(
        self, x: Tensor, state: tuple[Tensor, WKVState] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, WKVState]]:
        """Mix ``x`` along time.

        Args:
            x: ``[B, T, D]``, or ``[B, D]`` for one token, of the dtype of the layer.
            state: the last x ``[B, D]`` and the WKV state, fields ``[B, D]``, after the tokens before; empty if None.
            cu_seqlens: the offsets of the sequences packed into x ``[1, T, D]``; fields of states are ``[N, D]``.

        Returns:
            y of the shape of x, and the state after the last token of every sequence.

        """
        if state is None:
            x_before = _empty(x, cu_seqlens)
            state = x_before, empty_wkv_state(tuple(x_before.shape), x_before)
        x_before, wkv_state = state
        previous = _shift(x, x_before, cu_seqlens)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_receptance))
        k = self.key(torch.lerp(previous, x, self.time_mix_key))
        v = self.value(torch.lerp(previous, x, self.time_mix_value))
        u, decay = self.time_first, self.time_decay
        if x.dim() == 2:
            y, wkv_state = wkv_step(None, u, k, v, wkv_state, time_decay=decay)
        else:
            y, wkv_state = wkv(None, u, k, v, wkv_state, time_decay=decay, return_state=True, cu_seqlens=cu_seqlens)
        return self.output(torch.sigmoid(r) * y), (_last(x, x_before, cu_seqlens), wkv_state)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any


class RWKV4ChannelMix(nn.Module):
    """The layer that mixes channels, and only the last two tokens.

    With x'_t the mean ``μ x_t + (1 - μ) x_{t-1}``, where r and k have a μ each::

        r_t = W_r x'_t    k_t = W_k x'_t    y_t = σ(r_t) ⊙ W_v max(k_t, 0)²

    W_k maps D channels to 4 D, W_v maps them back.

    Args:
        config: the sizes of the model.
        layer: the index of this layer among the L layers, on which the initial values depend.

    """

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
        check_config(config)
        D = config.width
        self._depth = _Depth(config.layers, layer)
        self.time_mix_key = nn.Parameter(torch.empty(D))
        self.time_mix_receptance = nn.Parameter(torch.empty(D))
        self.key = nn.Linear(D, 4 * D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(4 * D, D, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        D = self.time_mix_key.numel()
        channel = torch.arange(D, dtype=torch.float64, device=self.time_mix_key.device)
        mix = (channel / D) ** self._depth.remaining
        self.time_mix_key.copy_(mix)
        self.time_mix_receptance.copy_(mix)
        self.receptance.weight.zero_()
        self.value.weight.zero_()
        orthogonal_(self.key.weight, 2.0)  # the square root of rows / columns

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the channels of ``x``.

        Args:
            x: ``[B, T, D]``, or ``[B, D]`` for one token, of the dtype of the layer.
            state: ``[B, D]``, the last x of the tokens before; zeros if None.
            cu_seqlens: the offsets of the sequences packed into x ``[1, T, D]``; states are ``[N, D]``.

        Returns:
            y of the shape of x, and the state after the last token of every sequence.

        """
        x_before = _empty(x, cu_seqlens) if state is None else state
        previous = _shift(x, x_before, cu_seqlens)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_receptance))
        k = self.key(torch.lerp(previous, x, self.time_mix_key))
        return torch.sigmoid(r) * self.value(relu_squared(k)), _last(x, x_before, cu_seqlens)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any


class RWKV4Block(nn.Module):
    """One layer of the model: ``x += TimeMix(LN(x)); x += ChannelMix(LN(x))``.

    The block of layer 0 starts with one more LayerNorm, ``pre_ln``, which belongs to the embedding. With
    ``config.rescale_every`` the residual stream x is kept divided by a power of two in inference.

    Args:
        config: the sizes of the model.
        layer: the index of this layer among the L layers, on which the initial values depend.

    """

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
        check_config(config)
        D, eps = config.width, config.layer_norm_eps
        self.pre_ln = nn.LayerNorm(D, eps) if layer == 0 else None
        self.ln1 = nn.LayerNorm(D, eps)
        self.ln2 = nn.LayerNorm(D, eps)
        self.attention = RWKV4TimeMix(config, layer)
        self.feed_forward = RWKV4ChannelMix(config, layer)
        halvings = layer // config.rescale_every if config.rescale_every else 0
        self._scale = 0.5**halvings
        self._halves = config.rescale_every > 0 and (layer + 1) % config.rescale_every == 0

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        for layer_norm in (self.pre_ln, self.ln1, self.ln2):
            if layer_norm is not None:
                layer_norm.reset_parameters()
        self.attention.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(
        self, x: Tensor, state: RWKV4State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State]:
        """Add both layers to the residual stream.

        Args:
            x: ``[B, T, D]``, or ``[B, D]`` for one token.
            state: the state after the tokens before, fields ``[B, D]``; empty if None.
            cu_seqlens: the offsets of the sequences packed into x ``[1, T, D]``; fields of states are ``[N, D]``.

        Returns:
            x with both layers added, and the state after the last token of every sequence.

        """
        att_state, ffn_x = (None, None) if state is None else ((state.att_x, state.wkv), state.ffn_x)
        if self.pre_ln is not None:
            x = self.pre_ln(x)
        scale = self.residual_scale
        y, (att_x, wkv_state) = self.attention(self.ln1(x), att_state, cu_seqlens)
        x = torch.add(x, y, alpha=scale)
        y, ffn_x = self.feed_forward(self.ln2(x), ffn_x, cu_seqlens)
        x = torch.add(x, y, alpha=scale)
        if self.halves:
            x = x / 2
        return x, RWKV4State(att_x, ffn_x, wkv_state)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    @property
    def residual_scale(self) -> float:
        """The factor of the results of both layers where they are added to x."""
        return 1.0 if self.training else self._scale

    @property
    def halves(self) -> bool:
        """Whether x is divided by two at the end."""
        return self._halves and not self.training


class _Depth:
    """The depth of a layer: ``ratio`` runs from 0 in the first to 1 in the last, ``remaining`` from 1 to 1/L."""

    def __init__(self, layers: int, layer: int) -> None:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"layer must be an int, got {type(layer).__name__}")
        if not 0 <= layer < layers:
            raise ValueError(f"layer must be at least 0 and below {layers}, got {layer}")
        self.ratio = layer / max(layers - 1, 1)
        self.remaining = 1 - layer / layers


def relu_squared(x: Tensor) -> Tensor:
    """Return max(x, 0)², the largest tensor of a layer: without gradients it takes new memory only once."""
    positive = torch.relu(x)
    return positive.square() if torch.is_grad_enabled() else positive.square_()


def _empty(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the zeros that stand for the input before the first token of every sequence."""
    return x.new_zeros(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[-1])


def _shift(x: Tensor, x_before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the input one token earlier."""
    if x.dim() == 2:
        return x_before
    if cu_seqlens is None:
        return torch.cat((x_before[:, None], x[:, :-1]), 1)
    T = x.shape[1]
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:]
    # The input before an empty sequence is written behind the last token, which is cut off.
    first = torch.where(begin < end, begin, T).clamp(0, T)
    return torch.cat((x[:, :1], x), 1).index_copy(1, first, x_before[None])[:, :T]


def _last(x: Tensor, x_before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the last input of every sequence; an empty one keeps its last input from before."""
    if x.dim() == 2:
        return x
    if cu_seqlens is None:
        return x[:, -1].clone()  # a view would keep all of x, in every layer, for as long as the state lives
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    last = x[0].index_select(0, (end - 1).clamp(0, x.shape[1] - 1))
    return torch.where((begin < end)[:, None], last, x_before)


def orthogonal_(weight: Tensor, gain: float) -> None:
    """Fill a matrix with orthogonal rows or columns of the length ``gain``."""
    if not weight.is_meta:  # the decomposition knows neither meta nor 16-bit tensors
        wide = torch.empty_like(weight, dtype=wkv_dtype(weight))
        weight.copy_(nn.init.orthogonal_(wide, gain))
