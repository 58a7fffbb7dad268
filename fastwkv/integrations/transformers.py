"""Hugging Face's RWKV-4 with this package's WKV operator, on the CPU and on GPUs, in training and in inference.

::

    from fastwkv.integrations.transformers import patch

    patch()
    model = RwkvForCausalLM.from_pretrained("RWKV/rwkv-4-169m-pile")
"""

import functools
import importlib
import operator
import warnings
from collections.abc import Callable
from typing import Any

from fastwkv.integrations import _rwkv_forward, _rwkv_generation, _rwkv_weights

MODELING = "transformers.models.rwkv.modeling_rwkv"
TESTED = (4, 57), (6, 0)  # the first version, and the first one after the last

# The functions of that module that are replaced, wrapped and added, each with its replacement or wrapper.
REPLACED: dict[str, Callable[..., Any]] = {
    "rwkv_linear_attention": _rwkv_forward.linear_attention,
    "load_wkv_cuda_kernel": lambda context_length: None,
    "RwkvSelfAttention.forward": _rwkv_forward.attention_forward,
    "RwkvFeedForward.forward": _rwkv_forward.feed_forward_forward,
}
WRAPPED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "RwkvModel.forward": _rwkv_forward.model_forward,
    "RwkvModel.state_dict": _rwkv_weights.with_true_weights,
    "RwkvModel._load_from_state_dict": _rwkv_weights.with_true_weights,
    "RwkvPreTrainedModel._init_weights": _rwkv_weights.init_weights,
    "RwkvForCausalLM.prepare_inputs_for_generation": _rwkv_generation.prepare_inputs,
    "RwkvForCausalLM._update_model_kwargs_for_generation": _rwkv_generation.update_model_kwargs,
}
ADDED: dict[str, Callable[..., Any]] = {"RwkvForCausalLM._reorder_cache": _rwkv_generation.reorder_cache}

_undo: list[Callable[[], None]] = []  # functions that take the patch back, none without a patch


class Patch:
    """The result of :func:`patch`: at the end of its ``with`` block all is as it was before the call."""

    def __init__(self, patched_before: bool) -> None:
        self._patched_before = patched_before

    def __enter__(self) -> None:
        """Do nothing: the patch is in place."""

    def __exit__(self, *_: object) -> None:
        """Restore the state before the call of :func:`patch`."""
        patch() if self._patched_before else unpatch()


def patch() -> Patch:
    """Let Hugging Face's RWKV compute with this package, in the whole process, until :func:`unpatch`.

    It works on models built before and after, and can be called again without effect. ``with patch():`` patches for a
    block; within a patched block or program, all stays patched. In ``transformers.models.rwkv.modeling_rwkv`` it
    replaces:

    - ``rwkv_linear_attention`` by :func:`fastwkv.wkv` and :func:`fastwkv.wkv_step` with ``w = exp(time_decay)``:
      parallel over time, without a limit on the length, and with the gradient of the state.
    - ``load_wkv_cuda_kernel`` by a function that does nothing, so that no CUDA kernel is downloaded or compiled. That
      kernel refuses sequences longer than ``context_length`` and writes past its gradients for a batch of more than
      one.
    - ``RwkvSelfAttention.forward``, ``RwkvFeedForward.forward`` and ``RwkvModel.forward`` by passes that never write
      into a state. So ``use_cache=True`` works in training, gradients flow through a carried state (but not out of
      blocks that are checkpointed with ``use_reentrant=True``), the caller's state does not change, one token of a
      batch meets its own row of the state, and ``attention_hidden_size`` may differ from ``hidden_size``: fields 2 to 4
      of the state are then ``[B, attention_hidden_size, L]``. They are float32, float64 in a float64 model.
    - ``RwkvModel.state_dict``, which ``save_pretrained`` calls, and ``RwkvModel._load_from_state_dict`` by methods that
      first take back the division of weights by powers of two, which the first forward pass in eval mode does; the next
      forward pass divides again. So the true weights are saved, bit for bit but for float16 values that the division
      made subnormal, and loaded weights are divided too. The tensors of a ``state_dict`` are the weights themselves, as
      without the patch: clone them to run the model before saving them. Quantised weights do not change.
    - ``RwkvPreTrainedModel._init_weights`` by a method that gives ``time_first`` the value
      ``log 0.3 + 0.5 (((i + 1) mod 3) - 1)`` instead of 1, and works for a model of one layer.
    - ``RwkvForCausalLM.prepare_inputs_for_generation``, ``._update_model_kwargs_for_generation`` and
      ``._reorder_cache`` by methods that continue from a ``state`` with all of ``input_ids``, and in a beam search
      carry the state of each beam. ``generate`` then returns the state as ``past_key_values``.

    Returns:
        A context manager, which need not be used.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this version of transformers lacks a function that would be replaced.

    Warns:
        UserWarning: this version of transformers is outside the tested range, from 4.57 up to 5.x.

    """
    if _undo:
        return Patch(patched_before=True)
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError as error:
        raise ImportError("patch() needs transformers: pip install 'transformers>=4.57'") from error
    modeling = _modeling(version)
    low, high = TESTED
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        warnings.warn(f"fastwkv is tested with transformers 4.57 to 5.x, this is {version}", stacklevel=2)
    for path, function in (REPLACED | ADDED).items():
        _replace(modeling, path, function)
    for path, wrap in WRAPPED.items():
        _replace(modeling, path, wrap(operator.attrgetter(path)(modeling)))
    return Patch(patched_before=False)


def unpatch() -> None:
    """Restore everything that :func:`patch` replaced; without a patch nothing happens."""
    while _undo:
        _undo.pop()()


def _modeling(version: str) -> Any:
    """Import the module of the model and check that it has everything that is replaced."""
    try:
        modeling = importlib.import_module(MODELING)
    except ImportError as error:
        raise RuntimeError(f"transformers {version} has no {MODELING}, which patch() replaces parts of") from error
    for path in (*REPLACED, *WRAPPED):
        try:
            operator.attrgetter(path)(modeling)
        except AttributeError:
            raise RuntimeError(f"transformers {version} has no {path} in {MODELING}, which patch() replaces") from None
    return modeling


def _replace(modeling: Any, path: str, value: Callable[..., Any]) -> None:
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, modeling)
    if name in vars(owner):
        _undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
    else:  # inherited, or not there
        _undo.append(functools.partial(delattr, owner, name))
    setattr(owner, name, value)
