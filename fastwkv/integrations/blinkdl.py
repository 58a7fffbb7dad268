"""WKV for the code that RWKV-4 was trained with: BlinkDL's RWKV-LM, ``RWKV-v4neo/src/model.py``.

That code compiles a CUDA extension for one longest sequence, T_MAX, and calls it from an ``autograd.Function`` of its
own. There are two ways around the compiler, on GPU and CPU, for any T:

- :func:`RUN_CUDA` takes the place of its function of that name;
- the code stays as it is, with one import in front of it, ``import fastwkv.integrations.blinkdl_extension``, which
  calls :func:`install`: the code then gets :data:`wkv_cuda` as its extension.

The first is the faster: it keeps tensors for the backward pass that do not fit the calling convention of the extension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from fastwkv.nn.state import wkv_dtype
from fastwkv.ops import checks
from fastwkv.ops.wkv import wkv
from fastwkv.ops.wkv_registration import wkv_bwd, wkv_fwd

# The source files of the extension, in its two versions. Kernels of later operators, kernels of WKV that carry a state,
# and kernels for other frameworks have similar names.
_SOURCES = ({"wkv_op.cpp", "wkv_cuda.cu"}, {"wkv_op_bf16.cpp", "wkv_cuda_bf16.cu"})


def RUN_CUDA(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute :func:`fastwkv.wkv` by the signature of the training code: ``time_decay`` for w, and sizes in front.

    The rate exp(w) is computed in float32, or float64 if any input is float64. Gradients reach w, u, k and v, in
    their dtypes.

    Args:
        B: the batch size of k.
        T: the number of tokens of k.
        C: the channels of k.
        w: time_decay, the logarithm of the decay rate, ``[C]``.
        u: time_first, the bonus of the current token, ``[C]``.
        k: the keys, ``[B, T, C]``.
        v: the values, ``[B, T, C]``, of the dtype of k.

    Each of w, u and k with v may be float32, float64, bfloat16 or float16.

    Returns:
        y ``[B, T, C]`` of the dtype of v, on the device of the inputs.

    Raises:
        TypeError: an argument is not a dense tensor of a dtype that is listed here.
        ValueError: a shape or device does not fit the others, or B, T and C.

    """
    checks.check_floating(w=w, u=u, k=k, v=v)
    checks.check_shape("B T C", (B, T, C), k=k, v=v)
    checks.check_shape("C", (C,), w=w, u=u)
    return wkv(None, u, k, v, time_decay=w)


class WKVExtension:
    """The interface of the compiled extension: forward and backward of WKV, into tensors that the caller has made.

    Its w is ``-exp(time_decay)``. All tensors are contiguous and on one device; k, v, y and their gradients have one
    dtype, w, u, gw and gu any floating one: the original has float32, and bfloat16 for all but w in its second version.
    Sums and states are float32, or float64 if any input is float64.

    Both methods raise ValueError or TypeError, before anything is written, where the original would write past the
    end of a tensor.
    """

    @staticmethod
    @torch.no_grad()
    def forward(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        """Write WKV of w, u ``[C]`` and k, v ``[B, T, C]`` into y ``[B, T, C]``."""
        _check(B, T, C, {"C": {"w": w, "u": u}, "B T C": {"k": k, "v": v, "y": y}})
        y.copy_(wkv(-w, u, k, v))

    @staticmethod
    @torch.no_grad()
    def backward(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, *gradients: Tensor) -> None:
        """Write the gradients of a loss into gw, gu ``[B, C]``, one row a sequence, and gk, gv ``[B, T, C]``.

        gw is the gradient of time_decay. The caller sums gw and gu over B; if they are 16-bit tensors, every row is
        rounded before that. The arguments up to v are those of :meth:`forward`.

        Args:
            gradients: ``gy, gw, gu, gk, gv``, of which gy is read and the others are written. Later versions of the
                training code hand in y too, before gy; it is not needed.

        """
        if len(gradients) not in (5, 6):
            raise TypeError(f"after v come [y,] gy, gw, gu, gk, gv: 5 or 6 tensors, got {len(gradients)}")
        gy, gw, gu, gk, gv = gradients[-5:]
        sequences = {"k": k, "v": v, "gy": gy, "gk": gk, "gv": gv}
        _check(B, T, C, {"C": {"w": w, "u": u}, "B C": {"gw": gw, "gu": gu}, "B T C": sequences})
        wide = -_wide(w)
        # The rate is finite, since it is multiplied by its gradient, which is 0 that far out.
        rate = wide.clamp(max=torch.finfo(wide.dtype).max).repeat(B)
        inputs = rate, _wide(u).repeat(B), _rows_as_channels(k), _rows_as_channels(v), None, None
        _, _, checkpoints = wkv_fwd(*inputs, True)
        results = wkv_bwd(*inputs, checkpoints, _rows_as_channels(gy), None)
        g_rate, g_bonus, g_keys, g_values, _ = results
        gw.copy_((g_rate * rate).view(B, C))
        gu.copy_(g_bonus.view(B, C))
        gk.copy_(g_keys.view(T, B, C).transpose(0, 1))
        gv.copy_(g_values.view(T, B, C).transpose(0, 1))


wkv_cuda = WKVExtension()


def install() -> None:
    """Let ``torch.utils.cpp_extension.load`` return :data:`wkv_cuda` in place of the WKV extension.

    It recognises the extension by a name that begins with "wkv" and by the two source files, which need not exist.
    Everything else is compiled as before. A second call changes nothing.

    Code that says ``from torch.utils.cpp_extension import load`` must do so after this call.

    Raises:
        ImportError: ``torch.utils.cpp_extension`` cannot be imported; it needs setuptools.

    """
    cpp_extension = _cpp_extension()
    if not isinstance(cpp_extension.load, _Load):
        cpp_extension.load = _Load(cpp_extension.load)


def uninstall() -> None:
    """Undo :func:`install`. Code that already has its extension keeps it."""
    cpp_extension = _cpp_extension()
    if isinstance(cpp_extension.load, _Load):
        cpp_extension.load = cpp_extension.load.compiled


@dataclass(frozen=True)
class _Load:
    """The function ``torch.utils.cpp_extension.load``, which compiles everything but the WKV extension."""

    compiled: Callable[..., Any]

    def __call__(self, name: str, sources: str | list[str], *args: Any, **kwargs: Any) -> Any:
        files = {PurePath(source).name for source in sources}  # the letters of a str, none of which matches
        # Without a Python module the caller would use operators of the compiled library.
        if name.startswith("wkv") and files in _SOURCES and kwargs.get("is_python_module", True):
            return wkv_cuda
        return self.compiled(name, sources, *args, **kwargs)


def _cpp_extension() -> Any:
    try:  # the import is here since it needs setuptools, which few installations have
        from torch.utils import cpp_extension
    except ImportError as error:
        raise ImportError(f"torch.utils.cpp_extension needs setuptools and cannot be imported: {error}") from error
    return cpp_extension


def _check(B: int, T: int, C: int, by_shape: dict[str, dict[str, Tensor]]) -> None:
    sizes = {"B": B, "T": T, "C": C}
    tensors = {name: tensor for group in by_shape.values() for name, tensor in group.items()}
    checks.check_floating(**tensors)
    for dims, group in by_shape.items():
        checks.check_shape(dims, tuple(sizes[dim] for dim in dims.split()), **group)
    sequences = by_shape["B T C"]
    checks.check_rank("B T C", **sequences)
    checks.check_dtype(sequences["k"].dtype, "like k", **sequences)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def _wide(vector: Tensor) -> Tensor:
    return vector.to(wkv_dtype(vector))


def _rows_as_channels(x: Tensor) -> Tensor:
    """Lay the rows of ``[B, T, C]`` side by side, ``[1, T, B C]``: so gradients are not summed over B."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1).contiguous()  # for one channel, reshape makes a strided view
