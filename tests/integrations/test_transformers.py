"""Hugging Face's RWKV under the patch: the numbers it had where it was right, and right ones where it was not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")
from hf_rwkv import SAME, assert_same_state, build, distance, generate, gradients, recomputed, same, step_by_step, text
from transformers import RwkvForCausalLM
from transformers.models.rwkv import modeling_rwkv

from fastwkv.integrations.transformers import patch

few = settings(max_examples=25, deadline=None)


def logits_and_gradients(model: RwkvForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    model.train()
    logits = model(tokens).logits
    return logits, gradients(model, logits.logsumexp(-1).sum())


@pytest.mark.parametrize("layers", [2, 3, 13])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 40), (3, 17)])
def test_logits_and_gradients_equal_the_unpatched_model(layers: int, batch: int, length: int) -> None:
    model, tokens = build(layers), text(batch, length)
    expected = logits_and_gradients(model, tokens)
    with patch():
        actual = logits_and_gradients(model, tokens)
    for one, other in zip(actual, expected, strict=True):
        assert distance(one, other) < same(layers)


@pytest.mark.parametrize("attribute", ["hidden_states", "attentions"])
def test_other_outputs_and_the_state_equal_the_unpatched_model(attribute: str) -> None:
    model, tokens = build(), text(2, 9)
    options = {"use_cache": True, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(tokens, **options)
        with patch():
            actual = model(tokens, **options)
    assert_same_state(actual.state, expected.state)
    for one, other in zip(getattr(actual, attribute), getattr(expected, attribute), strict=True):
        assert distance(one, other) < SAME


def test_mix_of_another_dtype_than_its_input_is_accepted() -> None:
    model, tokens = build(), text(2, 9)
    for block in model.rwkv.blocks:
        for layer in (block.attention, block.feed_forward):
            layer.time_mix_key.data = layer.time_mix_key.data.bfloat16()
    with torch.no_grad():
        expected = model(tokens).logits
        with patch():
            actual = model(tokens).logits
    assert actual.dtype == torch.float32
    assert distance(actual, expected) < torch.finfo(torch.bfloat16).eps  # to which theirs rounds 1 - mix; measured 0.1


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("return_state", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_operator_equals_the_one_it_replaces(length: int, return_state: bool, carried: bool) -> None:
    decay, first, key, value = torch.randn(8), torch.randn(8), torch.randn(2, length, 8), torch.randn(2, length, 8)
    state = [torch.randn(2, 8), torch.rand(2, 8) + 0.5, torch.randn(2, 8)] if carried else None
    expected, wanted = modeling_rwkv.rwkv_linear_attention(decay, first, key, value, state, return_state)
    with patch():
        actual, found = modeling_rwkv.rwkv_linear_attention(decay, first, key, value, state, return_state)
        low, _ = modeling_rwkv.rwkv_linear_attention(decay, first, key.bfloat16(), value, state, return_state)
    assert distance(actual, expected) < SAME
    assert low.dtype == torch.bfloat16
    assert (found is None) == (wanted is None)
    if found is not None:
        assert_same_state([key[:, 0], value[:, 0], *found], [key[:, 0], value[:, 0], *wanted])


@pytest.mark.parametrize("length", [1, 6])
def test_state_of_the_unpatched_model_is_carried_on_and_back(length: int) -> None:
    model, tokens = build(), text(1, 9 + 2 * length)
    first, second, third = tokens.split([9, length, length], 1)
    with torch.no_grad():
        expected = model(tokens)
        state = model(first).state
        with patch():
            state = model(second, state=state).state
        actual = model(third, state=state)
    assert distance(actual.logits, expected.logits[:, -length:]) < SAME
    assert_same_state(actual.state, expected.state)


@few
@given(st.data(), st.integers(1, 4), st.integers(1, 24))
def test_any_split_of_a_batch_gives_the_same_logits(data: st.DataObject, batch: int, length: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
    model, tokens = build(), text(batch, length)
    with patch(), torch.no_grad():
        whole = model(tokens)
        state, pieces = None, []
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            output = model(tokens[:, start:stop], state=state)
            pieces.append(output.logits)
            state = output.state
    assert distance(torch.cat(pieces, 1), whole.logits) < SAME
    assert_same_state(state, whole.state)


@torch.no_grad()
def test_one_token_of_each_text_meets_its_own_state() -> None:
    model, tokens = build(), text(3, 12)
    expected = model(tokens).logits
    assert model(tokens[:, :1], state=model(tokens).state).logits.shape == (3, 3, 31)  # the defect: with every row
    with patch():
        assert distance(step_by_step(model, tokens), expected) < SAME


def test_gradients_flow_through_a_carried_state() -> None:
    model, tokens = build().double().train(), text(2, 9)
    goal = torch.randn(2, 9, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with patch():
        expected = gradients(model, (model(tokens).logits * goal).sum())
        for cut in (1, 5, 8):
            first = model(tokens[:, :cut], use_cache=True)
            second = model(tokens[:, cut:], state=first.state)
            loss = (torch.cat((first.logits, second.logits), 1) * goal).sum()
            assert distance(gradients(model, loss), expected) < 1e-12
        assert distance(gradients(model, (step_by_step(model, tokens) * goal).sum()), expected) < 1e-12


def test_cache_in_training_does_not_break_the_backward_pass() -> None:
    model, tokens = build().train(), text(2, 7)
    expected = gradients(model, model(tokens, labels=tokens).loss)
    with pytest.raises(RuntimeError, match="inplace"):  # the defect
        gradients(model, model(tokens, labels=tokens, use_cache=True).loss)
    with patch():
        assert distance(gradients(model, model(tokens, labels=tokens, use_cache=True).loss), expected) < SAME


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_gradient_checkpointing_equals_plain(reentrant: bool, state: bool) -> None:
    model, tokens = build().train(), text(2, 7)
    with patch():
        before = [s.detach() for s in model(tokens, use_cache=True).state] if state else None
        expected = gradients(model, model(tokens, labels=tokens, state=before).loss)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens, state=before).loss.backward()  # re-entrant allows no autograd.grad
    actual = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert distance(actual, expected) < SAME


@pytest.mark.parametrize("return_dict", [True, False])
def test_state_is_returned_where_it_was_asked_for_and_never_written_to(return_dict: bool) -> None:
    model, tokens = build(), text(2, 5)
    with patch(), torch.no_grad():
        state = list(model(tokens).state)
        before = [field.clone() for field in state]
        output = model(tokens, state=tuple(state), use_cache=False, return_dict=return_dict)
        without = model(tokens, use_cache=False, return_dict=return_dict)
        training = model.train()(tokens, return_dict=return_dict)
        model.config.use_cache = False
        by_default = model.eval()(tokens, return_dict=return_dict)
    after = output[1]
    assert [field.shape for field in after] == [(2, 16, 3)] * 5
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))
    assert len(without) == len(training) == len(by_default) == 1


@pytest.mark.parametrize("layers", [1, 3, 13])
@pytest.mark.parametrize("width", [8, 24])
def test_width_of_the_attention_may_differ(layers: int, width: int) -> None:
    model, tokens = build(layers, attention_hidden_size=width), text(2, 9)
    with patch(), torch.no_grad():
        whole = model(tokens)
        assert distance(step_by_step(model, tokens), whole.logits) < same(layers, max(16, width))
        assert torch.equal(generate(model, tokens, 9), recomputed(model, tokens, 9))
    assert [tuple(field.shape) for field in whole.state] == [(2, size, layers) for size in (16, 16, *[width] * 3)]
    with pytest.raises(RuntimeError):  # the defect
        model(tokens, use_cache=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rate_of_a_half_precision_decay_is_computed_in_float32(dtype: torch.dtype) -> None:
    decay, first = torch.linspace(-5, 3, 8).to(dtype), torch.zeros(8, dtype=dtype)
    key, value = torch.zeros(1, 9, 8, dtype=dtype), torch.randn(1, 9, 8).to(dtype)
    with patch():
        low, exact = (
            modeling_rwkv.rwkv_linear_attention(decay.to(wide), first, key, value, return_state=True)
            for wide in (dtype, torch.float32)
        )
    assert all(torch.equal(one, other) for one, other in zip([low[0], *low[1]], [exact[0], *exact[1]], strict=True))


def test_state_of_another_batch_is_refused() -> None:
    model = build()
    with patch(), torch.no_grad():
        state = model(text(2, 3)).state
        with pytest.raises(ValueError, match=r"state must be \[B, D\] = \[3, 16\], got shape \[2, 16\]"):
            model(text(3, 1), state=state)


def test_double_model_computes_in_float64() -> None:
    model, tokens = build(), text(2, 30)
    with patch(), torch.no_grad():
        single, double = model(tokens), model.double()(tokens)
        assert {field.dtype for field in double.state} == {torch.float64}
        assert distance(single.logits, double.logits) < SAME
        assert distance(step_by_step(model, tokens), double.logits) < 1e-13
        rounded = model(tokens[:, :1], state=single.state)  # a state that a float32 model left
    assert rounded.state[2].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", [torch.float32, None])
def test_half_precision_keeps_a_float32_state(dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    model, tokens = build().to(dtype), text(2, 30)
    for block in model.rwkv.blocks:  # from_pretrained keeps these two in float32
        for name in ("time_decay", "time_first"):
            parameter = getattr(block.attention, name)
            parameter.data = parameter.data.to(vectors or dtype)
    with patch():
        with torch.no_grad():
            output, steps = model(tokens), step_by_step(model, tokens)
        loss = model.train()(tokens, labels=tokens).loss
        gradient = gradients(model, loss)
        exact_gradient = gradients(model.double(), model(tokens, labels=tokens).loss)
        with torch.no_grad():
            exact = model(tokens).logits
    assert [field.dtype for field in output.state] == [dtype] * 2 + [torch.float32] * 3
    assert output.logits.dtype == steps.dtype == dtype
    bound = 3 * torch.finfo(dtype).eps  # measured: 1.0 for the logits, 1.5 for the gradients
    assert distance(output.logits, exact) < bound
    assert distance(steps, exact) < bound
    assert distance(gradient, exact_gradient) < bound


def test_autocast_equals_float32_to_the_rounding_of_its_products() -> None:
    model, tokens = build(), text(2, 9)
    with patch(), torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            output, steps = model(tokens), step_by_step(model, tokens)
    assert output.logits.dtype == torch.bfloat16
    assert output.state[2].dtype == torch.float32
    for logits in (output.logits, steps):
        assert distance(logits, exact.logits) < 2 * torch.finfo(torch.bfloat16).eps  # measured 0.7
