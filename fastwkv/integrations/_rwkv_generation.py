"""``generate`` of transformers carries the state of Hugging Face's RWKV from token to token.

The state is carried as ``past_key_values``, the only name whose value versions 4 and 5 of transformers reorder when a
beam search drops a beam. That also tells it from a state of the caller's, named ``state``: all of ``input_ids`` comes
after the caller's state, only its last token after a carried one.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def prepare_inputs(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap ``RwkvForCausalLM.prepare_inputs_for_generation``, which cuts off too much or ignores the state."""

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        state: list[Tensor] | None = None,
        past_key_values: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None:
            input_ids, inputs_embeds, state = input_ids[:, -1:], None, past_key_values
        inputs = original(self, input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "state": state}

    return prepare_inputs_for_generation


def update_model_kwargs(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap ``RwkvForCausalLM._update_model_kwargs_for_generation``, which renames nothing."""

    @functools.wraps(original)
    def update(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        of_caller = model_kwargs.pop("state", None)
        updated = original(self, outputs, model_kwargs, *args, **kwargs)
        state = updated.pop("state", None)
        # Without a cache the whole text is read again, after the caller's state.
        name, carried = ("past_key_values", state) if updated.get("use_cache", True) else ("state", of_caller)
        return updated if carried is None else updated | {name: carried}

    return update


def reorder_cache(self: Any, past_key_values: list[Tensor], beam_idx: Tensor) -> list[Tensor]:
    """Return the state with the rows of the beams that go on: ``_reorder_cache``."""
    return [field.index_select(0, beam_idx.to(field.device)) for field in past_key_values]
