"""RWKV-4: the two mixing layers, the block and the language model.

Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, section 3. Initialisation follows the
code that trained the published models; where the paper's appendix differs from it (W_o, W_v), the code is right.

Every layer takes either a text, ``[B, T, D]``, and works on all its tokens in parallel, or one token, ``[B, D]``, and
takes a step. Both give the same numbers and carry the same state.
"""

import math

import torch
from torch import Tensor, nn

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.state import RWKV4State, check_state, empty_wkv_state, wkv_dtype
from fastwkv.ops.wkv import wkv, wkv_step
from fastwkv.reference.wkv import WKVState


class RWKV4TimeMix(nn.Module):
    """The layer that mixes along time.

    With x'_t the mean ``μ x_t + (1 - μ) x_{t-1}``, μ of its own for each of r, k and v::

        r_t = W_r x'_t    k_t = W_k x'_t    v_t = W_v x'_t
        y_t = W_o (σ(r_t) ⊙ wkv_t),   where wkv = fastwkv.wkv(exp(time_decay), time_first, k, v)

    The rate exp(time_decay) is computed in float32 (float64 in a float64 model).

    Args:
        config: the sizes.
        layer: which of the L layers this is; the initial values depend on it.

    """

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
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
        _orthogonal_(self.value.weight, 1.0)

    def forward(
        self, x: Tensor, state: tuple[Tensor, WKVState] | None = None
    ) -> tuple[Tensor, tuple[Tensor, WKVState]]:
        """Mix ``x`` along time.

        Args:
            x: ``[B, T, D]``, or ``[B, D]`` for one token.
            state: the last x ``[B, D]`` and the WKV state, fields ``[B, D]``, of the text before; empty if None.

        Returns:
            y of the shape of x, and the state after the last token.

        """
        if state is None:
            first = x if x.dim() == 2 else x[:, 0]
            state = torch.zeros_like(first), empty_wkv_state(tuple(first.shape), first)
        x_before, wkv_state = state
        previous = _shift(x, x_before)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_receptance))
        k = self.key(torch.lerp(previous, x, self.time_mix_key))
        v = self.value(torch.lerp(previous, x, self.time_mix_value))
        dtype = wkv_dtype(self.time_decay)
        w, u = self.time_decay.to(dtype).exp(), self.time_first.to(dtype)
        inputs = w, u, k, v, wkv_state
        y, wkv_state = wkv_step(*inputs) if x.dim() == 2 else wkv(*inputs, return_state=True)
        return self.output(torch.sigmoid(r) * y), (_last(x), wkv_state)


class RWKV4ChannelMix(nn.Module):
    """The layer that mixes channels, and only the last two tokens.

    With x'_t the mean ``μ x_t + (1 - μ) x_{t-1}``, μ of its own for each of r and k::

        r_t = W_r x'_t    k_t = W_k x'_t    y_t = σ(r_t) ⊙ W_v max(k_t, 0)²

    W_k maps D channels to 4 D, W_v maps them back.

    Args:
        config: the sizes.
        layer: which of the L layers this is; the initial values depend on it.

    """

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
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
        _orthogonal_(self.key.weight, 2.0)  # the square root of rows / columns

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix the channels of ``x``.

        Args:
            x: ``[B, T, D]``, or ``[B, D]`` for one token.
            state: ``[B, D]``, the last x of the text before; zeros if None.

        Returns:
            y of the shape of x, and the state after the last token.

        """
        if state is None:
            state = torch.zeros_like(x if x.dim() == 2 else x[:, 0])
        previous = _shift(x, state)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_receptance))
        k = self.key(torch.lerp(previous, x, self.time_mix_key))
        return torch.sigmoid(r) * self.value(torch.relu(k).square()), _last(x)


class RWKV4Block(nn.Module):
    """One layer of the model: ``x += TimeMix(LN(x)); x += ChannelMix(LN(x))``.

    The block of layer 0 starts with one more LayerNorm, ``pre_ln``, which belongs to the embedding.
    """

    def __init__(self, config: RWKV4Config, layer: int = 0) -> None:
        super().__init__()
        D, eps = config.width, config.layer_norm_eps
        self.pre_ln = nn.LayerNorm(D, eps) if layer == 0 else None
        self.ln1 = nn.LayerNorm(D, eps)
        self.ln2 = nn.LayerNorm(D, eps)
        self.attention = RWKV4TimeMix(config, layer)
        self.feed_forward = RWKV4ChannelMix(config, layer)

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        for layer_norm in (self.pre_ln, self.ln1, self.ln2):
            if layer_norm is not None:
                layer_norm.reset_parameters()
        self.attention.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(self, x: Tensor, state: RWKV4State | None = None) -> tuple[Tensor, RWKV4State]:
        """Map x, ``[B, T, D]`` or ``[B, D]`` for one token; fields of the states are ``[B, D]``, empty if None."""
        att_state, ffn_x = (None, None) if state is None else ((state.att_x, state.wkv), state.ffn_x)
        if self.pre_ln is not None:
            x = self.pre_ln(x)
        y, (att_x, wkv_state) = self.attention(self.ln1(x), att_state)
        x = x + y
        y, ffn_x = self.feed_forward(self.ln2(x), ffn_x)
        return x + y, RWKV4State(att_x, ffn_x, wkv_state)


class RWKV4(nn.Module):
    """The RWKV-4 language model: embedding, L blocks, LayerNorm, head.

    It costs O(T D²) time for a text of T tokens and O(D) memory for its state. A text of more than one token is read
    in parallel, a single token takes a recurrent step; the numbers are the same, and so are they for any split of a
    text whose state is carried::

        logits, state = model(text)
        logits, state = model(next_token, state)

    Gradients also flow through a carried state; ``state.detach()`` cuts them. Built under ``torch.device("meta")`` it
    allocates nothing; follow ``model.to_empty(device=...)`` by :meth:`reset_parameters` or by loading weights.

    Args:
        config: the sizes, for example ``RWKV4Config.preset("169m")``.

    """

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(RWKV4Block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._reset_ends()

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        self._reset_ends()
        self.ln_out.reset_parameters()
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def _reset_ends(self) -> None:
        self.embeddings.weight.uniform_(-1e-4, 1e-4)
        V, D = self.head.weight.shape
        _orthogonal_(self.head.weight, 0.5 * math.sqrt(max(V / D, 1)))

    def empty_state(self, batch: int) -> RWKV4State:
        """Return the state before any text, for a batch of this size, on the device of the model."""
        shape = (self.config.layers, batch, self.config.width)
        x = torch.zeros(shape, dtype=self.embeddings.weight.dtype, device=self.embeddings.weight.device)
        return RWKV4State(x, x.clone(), empty_wkv_state(shape, x))

    def forward(self, tokens: Tensor, state: RWKV4State | None = None) -> tuple[Tensor, RWKV4State]:
        """Predict the token after each of ``tokens``.

        Args:
            tokens: int64 or int32 ``[B, T]``, each below V.
            state: what :meth:`forward` returned for the text before; empty if None.

        Returns:
            logits ``[B, T, V]`` in the dtype of the model, and the state after the last token.

        Raises:
            TypeError: ``tokens`` or ``state`` is of another type or dtype.
            ValueError: a shape or device does not fit.

        """
        x, state = self.features(tokens, state)
        return self.head(x), state

    def features(self, tokens: Tensor, state: RWKV4State | None = None) -> tuple[Tensor, RWKV4State]:
        """:meth:`forward` without the head: ``[B, T, D]``, where few of the T logits are needed."""
        self.check_inputs(tokens, state)
        if state is None:
            state = self.empty_state(tokens.shape[0])
        one_token = tokens.shape[1] == 1
        x = self.embeddings(tokens[:, 0] if one_token else tokens)
        states = []
        for block, block_state in zip(self.blocks, state.unbind(), strict=True):
            x, block_state = block(x, block_state)
            states.append(block_state)
        x = self.ln_out(x)
        return x[:, None] if one_token else x, RWKV4State.stack(states)

    def check_inputs(self, tokens: Tensor, state: RWKV4State | None = None) -> None:
        """Raise what :meth:`forward` raises, without running it."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be [B, T] with B and T at least 1, got shape {list(tokens.shape)}")
        if tokens.device != self.embeddings.weight.device:
            raise ValueError(f"tokens are on {tokens.device}, but the model is on {self.embeddings.weight.device}")
        if state is not None:
            check_state(state, self.config, tokens.shape[0], self.embeddings.weight)


class _Depth:
    """Where a layer stands: ``ratio`` runs from 0 in the first layer to 1 in the last, ``remaining`` from 1 to 1/L."""

    def __init__(self, layers: int, layer: int) -> None:
        if not 0 <= layer < layers:
            raise ValueError(f"layer must be at least 0 and below {layers}, got {layer}")
        self.ratio = layer / max(layers - 1, 1)
        self.remaining = 1 - layer / layers


def _shift(x: Tensor, x_before: Tensor) -> Tensor:
    """Return the input one token earlier."""
    return x_before if x.dim() == 2 else torch.cat((x_before[:, None], x[:, :-1]), 1)


def _last(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x[:, -1]


def _orthogonal_(weight: Tensor, gain: float) -> None:
    if not weight.is_meta:  # the decomposition knows neither meta nor 16-bit tensors
        wide = torch.empty_like(weight, dtype=wkv_dtype(weight))
        weight.copy_(nn.init.orthogonal_(wide, gain))
