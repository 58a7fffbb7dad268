"""Generation: the right tokens, reproducibly, without touching what surrounds it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, generate
from fastwkv.nn.generation import sample

V = 23
few = settings(max_examples=25, deadline=None)


def trained() -> RWKV4:
    model = RWKV4(RWKV4Config(layers=2, width=12, vocab_size=V))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(2 * noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else parameter + 0.1 * noise)
    return model


def text(batch: int, length: int) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(length))


def run(*args: Any, **options: Any) -> Tensor:
    return torch.stack(list(generate(*args, **options)), 1)


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_greedy_equals_recomputation_of_the_whole_text(batch: int, length: int, count: int) -> None:
    model, tokens = trained().double(), text(batch, length)  # the two best logits are 1e-3 apart at the least
    for new in generate(model, tokens, count):
        with torch.no_grad():
            assert torch.equal(new, model(tokens)[0][:, -1].argmax(-1))
        tokens = torch.cat((tokens, new[:, None]), 1)


def test_greedy_continues_from_a_carried_state() -> None:
    model, tokens = trained().double(), text(2, 9)
    with torch.no_grad():
        _, state = model(tokens[:, :4])
    assert torch.equal(run(model, tokens[:, 4:], 6, state=state), run(model, tokens, 6))


def test_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model, tokens = trained(), text(3, 5)
    first = run(model, tokens, 20, temperature=1.0, seed=7)
    torch.manual_seed(99)
    assert torch.equal(run(model, tokens, 20, temperature=1.0, seed=7), first)
    assert not torch.equal(run(model, tokens, 20, temperature=1.0, seed=8), first)
    assert not torch.equal(run(model, tokens, 20, temperature=1.0), run(model, tokens, 20, temperature=1.0))


def test_sampling_leaves_the_global_generator_alone() -> None:
    model, before = trained(), torch.get_rng_state()
    run(model, text(2, 3), 5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-4}, {"temperature": 1e-42}, {"temperature": 1.0, "top_p": 1e-6}]
)
def test_sampling_at_its_limits_is_greedy(options: dict[str, float]) -> None:
    model, tokens = trained(), text(3, 5)
    assert torch.equal(run(model, tokens, 15, seed=0, **options), run(model, tokens, 15))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    count = 100_000
    drawn = sample(logits.expand(count, 4), temperature, 1.0, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / count
    expected = torch.softmax(logits / temperature, 0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


@few
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(values: list[float], top_p: float) -> None:
    logits = torch.tensor(values)
    drawn = set(sample(logits.expand(4000, -1), 1.0, top_p, torch.Generator().manual_seed(0)).tolist())
    probability = torch.softmax(logits, 0)
    for token in drawn:
        likelier = probability[probability > probability[token]].sum()
        assert likelier < top_p + 1e-5  # the set was not yet sufficient without this token
    assert int(probability.argmax()) in drawn


def test_top_p_renormalises_what_it_keeps() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    count = 100_000
    drawn = sample(logits.expand(count, 4), 1.0, 0.7, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / count
    torch.testing.assert_close(frequency, torch.tensor([0.625, 0.375, 0.0, 0.0]), rtol=0, atol=0.01)


def test_inference_mode_does_not_leak_between_tokens() -> None:
    model, tokens = trained(), text(2, 4)
    for token in generate(model, tokens, 3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not token.is_inference()
        model(token[:, None])[0].sum().backward()  # an inference tensor could not be saved for this
    assert model.head.weight.grad is not None


def test_callers_no_grad_survives_between_tokens() -> None:
    with torch.no_grad():
        for _ in generate(trained(), text(1, 2), 2):
            assert not torch.is_grad_enabled()


def test_tokens_are_streamed() -> None:
    model, calls = trained(), []
    model.ln_out.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, text(1, 5), 10)
    assert len(calls) == 0
    next(stream)
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2


def test_zero_tokens_yield_nothing() -> None:
    assert list(generate(trained(), text(1, 2), 0)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_generate(dtype: torch.dtype) -> None:
    tokens = run(trained().to(dtype), text(2, 3), 4, temperature=0.8, top_p=0.9, seed=1)
    assert tokens.shape == (2, 4)
    assert tokens.dtype == torch.int64


BAD: dict[str, dict[str, Any]] = {
    "max_new_tokens must be an int, got float": {"max_new_tokens": 2.0},
    "max_new_tokens must be at least 0, got -1": {"max_new_tokens": -1},
    "temperature must be finite and at least 0, got -0.5": {"temperature": -0.5},
    "temperature must be finite and at least 0, got nan": {"temperature": float("nan")},
    "top_p must be above 0 and at most 1, got 0": {"top_p": 0},
    "top_p must be above 0 and at most 1, got 1.5": {"top_p": 1.5},
    "seed must be an int or None, got str": {"seed": "7"},
    "tokens must be int64 or int32, got torch.float32": {"tokens": torch.ones(1, 2)},
    r"tokens must be \[B, T\].*got shape \[1, 0\]": {"tokens": torch.zeros(1, 0, dtype=torch.int64)},
    "model must be an RWKV4, got Linear": {"model": torch.nn.Linear(1, 1)},
    "state must be an RWKV4State, got str": {"state": "none"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_raise_at_the_call(message: str) -> None:
    arguments: dict[str, Any] = {"model": trained(), "tokens": text(1, 2), "max_new_tokens": 2, **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        generate(**arguments)


def test_state_of_a_generation_continues_it_and_is_fit_for_training() -> None:
    model, tokens = trained().double(), text(2, 4)
    generation = generate(model, tokens, 3)
    assert generation.state is None
    new = list(generation)
    state = generation.state
    assert state is not None
    assert not any(tensor.is_inference() for tensor in state.tensors().values())
    with torch.no_grad():
        expected, _ = model(torch.cat((tokens, torch.stack(new, 1)), 1))
    logits, _ = model(new[-1][:, None], state)
    # Libraries add up in orders of their own: in float32 that changes these logits by up to 3e-5, in float64 by
    # 2⁻²⁹ times that, 5e-14.
    torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-12)
    logits.sum().backward()


def test_top_p_that_is_reached_exactly_needs_no_more_tokens() -> None:
    drawn = sample(torch.zeros(1000, 2), 1.0, 0.5, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 1
