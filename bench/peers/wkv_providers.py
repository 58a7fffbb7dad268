"""The providers of WKV, this package and its peers, each behind one face. No other file knows how they are called."""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peers import wkv_inputs
from peers.provider import Provider
from peers.wkv_inputs import Inputs
from torch import Tensor

import fastwkv
from fastwkv import WKVState, reference


class WKVProvider(Provider):
    """One implementation of WKV. Decay and state are in its own form, which :meth:`decay` and :meth:`state` give."""

    log_decay = False
    """Whether it takes log w, the ``time_decay`` of RWKV's checkpoints, in place of the rate w."""

    def leaves(self, inputs: Inputs, *, token: bool = False) -> Sequence[Tensor]:
        k, v = (inputs.k[:, 0], inputs.v[:, 0]) if token else (inputs.k, inputs.v)
        return self.decay(inputs), inputs.u, k, v

    def initial(self, states: Sequence[Tensor] | None, leaves: Sequence[Tensor]) -> Any:
        return self.state(None if states is None else WKVState(*states), leaves[2])

    def gradient_of_output(self, inputs: Inputs) -> Tensor:
        return inputs.gy

    def forward(self, leaves: Sequence[Tensor], initial: Any, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.wkv(*leaves, initial, **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}))

    def one_token(self, leaves: Sequence[Tensor], initial: Any) -> Any:
        return self.step(*leaves, initial)

    def after_token(self, result: Any) -> dict[str, Tensor]:
        y, state = result
        return {"y": y, **wkv_inputs.invariants(self.unpacked(state))}

    def in_our_form(self, name: str, result: Tensor, inputs: Inputs) -> Tensor:
        return self.gradient_of_w(result.to(inputs.w.device), inputs.w) if name == "gw" else result

    def decay(self, inputs: Inputs) -> Tensor:
        """Return what it takes as decay."""
        return inputs.log_w if self.log_decay else inputs.w

    def gradient_of_w(self, gradient: Tensor, w: Tensor) -> Tensor:
        """Return the gradient of w, in float64, from that of its own decay."""
        return gradient.double() / w.double() if self.log_decay else gradient.double()

    def state(self, state: WKVState | None, k: Tensor) -> Any:
        """Return what it takes in place of a state, or of none."""
        return state

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        """Return y ``[B, T, C]``."""
        raise NotImplementedError

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return y ``[B, C]`` of one token and the state after it, in its own form."""
        raise NotImplementedError

    def unpacked(self, state: Any) -> WKVState:
        """Return a state in our form."""
        return WKVState(*state)


class FastWKV(WKVProvider):
    """The public functions of this package."""

    name = label = "fastwkv"
    about = "fastwkv.wkv, fastwkv.wkv_step"
    packs = True

    def wkv(self, decay, u, k, v, state, cu_seqlens: Tensor | None = None) -> Tensor:
        return fastwkv.wkv(decay, u, k, v, state, cu_seqlens=cu_seqlens)

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        return fastwkv.wkv_step(decay, u, k_t, v_t, state)


class HuggingFace(WKVProvider):
    """The Python loop of transformers' RWKV-4, which its models run without its CUDA kernel."""

    name = "hf"
    label = "Hugging Face's loop"
    about = "transformers.models.rwkv.modeling_rwkv.rwkv_linear_attention_cpu"
    packages = ("transformers",)
    log_decay = loops = True
    longest = 4096

    def too_long(self, device: torch.device, which: str, tokens: int) -> str | None:
        if device.type != "cpu" and "backward" in which and tokens > 1024:
            return "its backward pass makes tensors of full size at every token"
        return super().too_long(device, which, tokens)

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        return self._call(decay, u, k, v, state)[0]

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self._call(decay, u, k_t[:, None], v_t[:, None], state)
        return y[:, 0], state

    @staticmethod
    def _call(*arguments: Any) -> tuple[Tensor, Any]:
        return importlib.import_module("transformers.models.rwkv.modeling_rwkv").rwkv_linear_attention_cpu(*arguments)


class Loop(WKVProvider):
    """A loop over slices taken by ``unbind``, so that its backward pass is linear in T. With float32 sums."""

    name = "loop"
    label = "PyTorch loop, unbound"
    about = "a plain PyTorch loop over unbind slices"
    loops = True
    longest = 4096

    def state(self, state: WKVState | None, k: Tensor) -> Any:
        if state is not None:
            return state
        zero = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
        return zero, zero, zero - 1e38

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        outputs = []
        for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
            y_t, state = self.step(decay, u, k_t, v_t, state)
            outputs.append(y_t)
        return torch.stack(outputs, 1)

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        num, den, top = state
        bonus, decayed = u + k_t, top - decay
        highest = torch.maximum(top, bonus)
        past, now = torch.exp(top - highest), torch.exp(bonus - highest)
        y_t = (past * num + now * v_t) / (past * den + now)
        highest = torch.maximum(decayed, k_t)
        past, now = torch.exp(decayed - highest), torch.exp(k_t - highest)
        return y_t.to(v_t.dtype), (past * num + now * v_t, past * den + now, highest)


class Reference(WKVProvider):
    """The stable loop of this package's reference."""

    name, label = "reference", "fastwkv.reference"
    about = "fastwkv.reference.wkv_loop"
    packs = loops = True
    longest = 4096

    def wkv(self, decay, u, k, v, state, cu_seqlens: Tensor | None = None) -> Tensor:
        return reference.wkv_loop(decay, u, k, v, state, cu_seqlens=cu_seqlens)

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = reference.wkv_loop(decay, u, k_t[:, None], v_t[:, None], state, return_state=True)
        return y[:, 0], state


class Fla(WKVProvider):
    """The Triton kernels of flash-linear-attention.

    ``fused_recurrent_rwkv4(w, u, k, v, state)`` takes log w: it computes -exp(w) itself, and its gradient is that of
    log w. The state is one tensor ``[B, 3, 1, C]`` and required.
    """

    name, label = "fla", "flash-linear-attention"
    about = "fla.ops.rwkv4.fused_recurrent_rwkv4"
    packages = ("triton", "fla")
    distribution = "fla-core"
    language = "Triton"
    log_decay = True

    def state(self, state: WKVState | None, k: Tensor) -> Any:
        if state is None:
            zero = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
            state = WKVState(zero, zero, zero - 1e38)
        return torch.stack(state, 1)[:, :, None]

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        return self._call(decay, u, k, v, state)[0]

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self._call(decay, u, k_t[:, None], v_t[:, None], state)
        return y[:, 0], state

    def unpacked(self, state: Any) -> WKVState:
        return WKVState(*state[:, :, 0].unbind(1))

    @staticmethod
    def _call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
            return importlib.import_module("fla.ops.rwkv4").fused_recurrent_rwkv4(*arguments)


PROVIDERS: dict[str, WKVProvider] = {one.name: one for one in (FastWKV(), HuggingFace(), Loop(), Reference(), Fla())}
