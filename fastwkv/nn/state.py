"""The state that an RWKV-4 model carries from call to call."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.tensor_files import CheckpointError, read_tensors, write_tensors
from fastwkv.ops.checks import FLOATING, check_dense
from fastwkv.reference.wkv import WKVState


class RWKV4State(NamedTuple):
    """The state of RWKV-4: all that it keeps of the tokens so far, in a fixed size for any number of tokens.

    The fields of a model's state are ``[L, B, D]``, those of a single block's ``[B, D]``. ``att_x`` and ``ffn_x`` are
    the last inputs of time mix and channel mix, in the dtype of the model. The fields of ``wkv`` are float32 (float64
    in a float64 model), in a 16-bit model too.
    """

    att_x: Tensor
    ffn_x: Tensor
    wkv: WKVState

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in (self.att_x, self.ffn_x, *self.wkv))

    def detach(self) -> "RWKV4State":
        """Return the same values, cut from the autograd graph, as truncated backpropagation carries them on."""
        return self._each(Tensor.detach)

    def clone(self) -> "RWKV4State":
        """Return a copy that shares no memory."""
        return self._each(Tensor.clone)

    def to(self, device: torch.device | str) -> "RWKV4State":
        """Return the same values on this device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "RWKV4State":
        return RWKV4State(change(self.att_x), change(self.ffn_x), WKVState(*map(change, self.wkv)))

    def tensors(self) -> dict[str, Tensor]:
        """Return the five tensors by name."""
        return {"att_x": self.att_x, "ffn_x": self.ffn_x} | {f"wkv.{n}": t for n, t in self.wkv._asdict().items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "RWKV4State":
        """Return the state of these tensors: the inverse of :meth:`tensors`.

        Raises:
            KeyError: a tensor is missing.

        """
        wkv = WKVState(*(tensors[f"wkv.{name}"] for name in WKVState._fields))
        return RWKV4State(tensors["att_x"], tensors["ffn_x"], wkv)

    def save(self, path: str | Path) -> None:
        """Write the state into a safetensors file, whole or not at all, of the same size after any number of tokens."""
        write_tensors(Path(path), self.tensors())

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "RWKV4State":
        """Read a file that :meth:`save` or ``fastwkv generate --save-state`` has written, in any process.

        Raises:
            OSError: the file cannot be opened.
            CheckpointError: the file is damaged, or holds other tensors than the state of a model.

        """
        tensors = read_tensors(Path(path))
        tensors.pop("last_token", None)  # --save-state adds it
        try:
            state = RWKV4State.from_tensors(tensors)
        except KeyError as error:
            raise CheckpointError(f"{path}: expected the state of an RWKV-4 model, but it has no {error}") from None
        if other := sorted(tensors.keys() - state.tensors().keys()):
            raise CheckpointError(f"{path}: expected the state of an RWKV-4 model, but it also has {other[0]!r}")
        _check_fields(path, state)
        return state.clone().to(device)

    def unbind(self) -> list["RWKV4State"]:
        """Return the state of every block, as views."""
        att, ffn, num, den, top = (t.unbind(0) for t in (self.att_x, self.ffn_x, *self.wkv))
        return [RWKV4State(a, f, WKVState(*s)) for a, f, *s in zip(att, ffn, num, den, top, strict=True)]

    @staticmethod
    def stack(states: list["RWKV4State"], out: "RWKV4State | None" = None) -> "RWKV4State":
        """Join the states of all blocks, in the memory of ``out`` if it is given: the inverse of :meth:`unbind`."""
        att_x, ffn_x, wkv = zip(*states, strict=True)
        parts = (att_x, ffn_x, *zip(*wkv, strict=True))
        if out is not None:
            for part, whole in zip(parts, (out.att_x, out.ffn_x, *out.wkv), strict=True):
                torch.stack(part, out=whole)
            return out
        att, ffn, *sums = map(torch.stack, parts)
        return RWKV4State(att, ffn, WKVState(*sums))


def empty_wkv_state(shape: tuple[int, ...], like: Tensor) -> WKVState:
    """Return the WKV state before any token, for values of the dtype and device of ``like``."""
    zeros = torch.zeros(shape, dtype=wkv_dtype(like), device=like.device)
    return WKVState(zeros, zeros.clone(), torch.full_like(zeros, -torch.inf))


def wkv_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of rates and states beside this tensor: float32, or float64 beside float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_fields(path: str | Path, state: RWKV4State) -> None:
    """Raise CheckpointError unless the shapes and dtypes of all fields fit one model or block."""
    like = state.att_x
    if like.dim() not in (2, 3):
        raise CheckpointError(f"{path}: att_x must be [L, B, D] or [B, D], got shape {list(like.shape)}")
    if like.dtype not in FLOATING:
        raise CheckpointError(f"{path}: att_x must be float32, float64, bfloat16 or float16, got {like.dtype}")
    for name, tensor in state.tensors().items():
        if tensor.shape != like.shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, but att_x {list(like.shape)}")
        dtype = wkv_dtype(like) if name.startswith("wkv.") else like.dtype
        if tensor.dtype != dtype:
            raise CheckpointError(f"{path}: {name} must be {dtype} beside att_x of {like.dtype}, got {tensor.dtype}")


def check_state(state: RWKV4State, config: RWKV4Config, batch: int, weight: Tensor) -> None:
    """Check that the state fits a model of these sizes, this batch, and the dtype and device of ``weight``.

    Raises:
        TypeError: a field is not a dense tensor, or of another dtype, or the state is not an ``RWKV4State``.
        ValueError: a field has another shape or device.

    """
    if not isinstance(state, RWKV4State):
        raise TypeError(f"state must be an RWKV4State, got {type(state).__name__}")
    shape = (config.layers, batch, config.width)
    fields = {"att_x": state.att_x, "ffn_x": state.ffn_x}
    wkv_fields = {f"wkv.{name}": tensor for name, tensor in zip(WKVState._fields, state.wkv, strict=True)}
    for name, tensor in {**fields, **wkv_fields}.items():
        check_dense(**{f"state.{name}": tensor})
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state.{name} must be [L, B, D] = {list(shape)}, got shape {list(tensor.shape)}")
        dtype = weight.dtype if name in fields else wkv_dtype(weight)
        if tensor.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"state.{name} is on {tensor.device}, but the model is on {weight.device}")
