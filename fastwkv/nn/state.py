"""What an RWKV-4 model remembers between calls."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastwkv.nn.config import RWKV4Config
from fastwkv.reference.wkv import WKVState


class RWKV4State(NamedTuple):
    """All that RWKV-4 keeps of the text so far: a fixed size, however long the text was.

    For a model every field is ``[L, B, D]``; for a single block ``[B, D]``. ``att_x`` and ``ffn_x`` are the last
    inputs of time mix and channel mix, in the dtype of the model. The fields of ``wkv`` are float32 (float64 in a
    float64 model), also in a 16-bit model.
    """

    att_x: Tensor
    ffn_x: Tensor
    wkv: WKVState

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in (self.att_x, self.ffn_x, *self.wkv))

    def detach(self) -> "RWKV4State":
        """Return the same values, cut from the autograd graph: what truncated backpropagation carries on."""
        return RWKV4State(self.att_x.detach(), self.ffn_x.detach(), WKVState(*(t.detach() for t in self.wkv)))

    def unbind(self) -> list["RWKV4State"]:
        """Return the state of every block, as views."""
        att, ffn, num, den, top = (t.unbind(0) for t in (self.att_x, self.ffn_x, *self.wkv))
        return [RWKV4State(a, f, WKVState(*s)) for a, f, *s in zip(att, ffn, num, den, top, strict=True)]

    @staticmethod
    def stack(states: list["RWKV4State"]) -> "RWKV4State":
        """Join the states of all blocks: the inverse of :meth:`unbind`."""
        att_x, ffn_x, wkv = zip(*states, strict=True)
        return RWKV4State(torch.stack(att_x), torch.stack(ffn_x), WKVState(*map(torch.stack, zip(*wkv, strict=True))))


def empty_wkv_state(shape: tuple[int, ...], like: Tensor) -> WKVState:
    """Return a WKV state that has seen nothing, for values of the dtype and device of ``like``."""
    zeros = torch.zeros(shape, dtype=wkv_dtype(like), device=like.device)
    return WKVState(zeros, zeros.clone(), torch.full_like(zeros, -torch.inf))


def wkv_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of rates and states beside this tensor: float32, or float64 beside float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_state(state: RWKV4State, config: RWKV4Config, batch: int, weight: Tensor) -> None:
    """Check that the state fits a model of these sizes, this batch, and the dtype and device of ``weight``."""
    if not isinstance(state, RWKV4State):
        raise TypeError(f"state must be an RWKV4State, got {type(state).__name__}")
    shape = (config.layers, batch, config.width)
    fields = {"att_x": state.att_x, "ffn_x": state.ffn_x}
    wkv_fields = {f"wkv.{name}": tensor for name, tensor in zip(WKVState._fields, state.wkv, strict=True)}
    for name, tensor in {**fields, **wkv_fields}.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state.{name} must be [L, B, D] = {list(shape)}, got shape {list(tensor.shape)}")
        dtype = weight.dtype if name in fields else wkv_dtype(weight)
        if tensor.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"state.{name} is on {tensor.device}, but the model is on {weight.device}")
