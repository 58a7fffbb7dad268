# ruff: noqa: D102 (Provider says what the methods of the others do)
"""Who computes WKV: this package and its peers, each behind one face. The only file that knows how a peer is called.

A peer that is not there says so and why (:meth:`Provider.missing`); it is imported when it is first asked for.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from wkv_inputs import Inputs

import fastwkv
from fastwkv import WKVState, reference


class Provider:
    """One implementation of WKV. Decay and state are in its own form, which :meth:`decay` and :meth:`state` give."""

    name: str
    about: str
    log_decay = False
    """Whether it takes log w, the ``time_decay`` of RWKV's checkpoints, in place of the rate w."""

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run on this device, None if it can."""
        return None

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


class FastWKV(Provider):
    """The public functions of this package."""

    name = "fastwkv"
    about = "fastwkv.wkv, fastwkv.wkv_step"

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        return fastwkv.wkv(decay, u, k, v, state)

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        return fastwkv.wkv_step(decay, u, k_t, v_t, state)


class HuggingFace(Provider):
    """The Python loop of transformers' RWKV-4; what a model does without its CUDA kernel."""

    name = "hf"
    about = "transformers.models.rwkv.modeling_rwkv.rwkv_linear_attention_cpu"
    log_decay = True

    def missing(self, device: torch.device) -> str | None:
        return not_installed("transformers")

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        return self._call(decay, u, k, v, state)[0]

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self._call(decay, u, k_t[:, None], v_t[:, None], state)
        return y[:, 0], state

    @staticmethod
    def _call(*arguments: Any) -> tuple[Tensor, Any]:
        return importlib.import_module("transformers.models.rwkv.modeling_rwkv").rwkv_linear_attention_cpu(*arguments)


class Loop(Provider):
    """A loop over slices taken by ``unbind``, so that its backward pass is linear in T. With float32 sums."""

    name = "loop"
    about = "a plain PyTorch loop over unbind slices"

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


class Reference(Provider):
    """The stable loop of this package's reference."""

    name = "reference"
    about = "fastwkv.reference.wkv_loop"

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        return reference.wkv_loop(decay, u, k, v, state)

    def step(self, decay: Tensor, u: Tensor, k_t: Tensor, v_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = reference.wkv_loop(decay, u, k_t[:, None], v_t[:, None], state, return_state=True)
        return y[:, 0], state


class Fla(Provider):
    """The Triton kernels of flash-linear-attention.

    ``fused_recurrent_rwkv4(w, u, k, v, state)`` takes log w: it computes -exp(w) itself, and its gradient is that of
    log w. The state is one tensor ``[B, 3, 1, C]`` and required.
    """

    name = "fla"
    about = "fla.ops.rwkv4.fused_recurrent_rwkv4"
    log_decay = True

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "runs on a GPU only"
        return not_installed("fla")

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


class FlaInterpreted(Fla):
    """The same on CPU tensors; TRITON_INTERPRET=1 must have been set before triton was imported."""

    def missing(self, device: torch.device) -> str | None:
        return not_installed("fla") or not_installed("triton")


WKV: dict[str, Provider] = {one.name: one for one in (FastWKV(), HuggingFace(), Loop(), Reference(), Fla())}


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Put the Triton kernels behind the public functions for CPU tensors too, where they are interpreted."""
    override = torch.library.Library("fastwkv", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for operator, module in {"wkv_fwd": "wkv", "wkv_bwd": "wkv_bwd", "wkv_step": "wkv_step"}.items():
            launcher = getattr(importlib.import_module(f"fastwkv.kernels.{module}"), operator)
            override.impl(operator, launcher, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


@contextmanager
def rounding_interpreter() -> Iterator[None]:
    """Have Triton's interpreter round float32 to bfloat16 as every GPU does. By itself it cuts the digits off."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        bits = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, target.scalar)

    builder.cast_impl = rounded
    try:
        yield
    finally:
        builder.cast_impl = cast


def not_installed(package: str) -> str | None:
    """Return why a package cannot be used, None if it is there."""
    return None if importlib.util.find_spec(package) else "not installed"
