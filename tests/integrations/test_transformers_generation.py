"""``generate`` of Hugging Face's RWKV under the patch: what it returns is what reading the whole text again gives."""

import pytest
import torch

pytest.importorskip("transformers")
from hf_rwkv import build, generate, recomputed, text

from fastwkv.integrations.transformers import patch


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (3, 8)])
def test_greedy_generation_equals_recomputation(batch: int, length: int, use_cache: bool) -> None:
    model, tokens = build(), text(batch, length)
    with patch():
        assert torch.equal(generate(model, tokens, 20, use_cache=use_cache), recomputed(model, tokens, 20))


def test_greedy_generation_of_a_batch_is_wrong_without_the_patch() -> None:
    model, tokens = build(), text(3, 8)
    assert not torch.equal(generate(model, tokens, 20, use_cache=True), recomputed(model, tokens, 20))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("new", [1, 4])
def test_generation_continues_from_a_state_with_all_new_tokens(new: int, use_cache: bool) -> None:
    model, tokens = build(), text(2, 6 + new)
    with patch(), torch.no_grad():
        state = model(tokens[:, :6]).state
        continued = generate(model, tokens[:, 6:], 12, state=state, use_cache=use_cache)
        assert torch.equal(continued, recomputed(model, tokens, 12)[:, 6:])


def test_generation_returns_a_state_that_continues_it() -> None:
    model, tokens = build(), text(2, 5)
    with patch():
        first = generate(model, tokens, 6, return_dict_in_generate=True)
        rest = generate(model, first.sequences[:, -1:], 6, state=first.past_key_values)
        assert torch.equal(torch.cat((first.sequences, rest[:, 1:]), 1), recomputed(model, tokens, 12))


def test_generation_starts_from_embeddings() -> None:
    model, tokens = build(), text(2, 5)
    with patch():
        embedded = model.generate(
            inputs_embeds=model.get_input_embeddings()(tokens), max_new_tokens=9, do_sample=False, pad_token_id=0
        )
        assert torch.equal(embedded, recomputed(model, tokens, 9)[:, 5:])


@pytest.mark.parametrize("seed", range(3))
def test_beam_search_with_a_cache_equals_beam_search_without(seed: int) -> None:
    model, tokens = build(seed=seed), text(2, 5, seed)
    with patch():
        expected = generate(model, tokens, 15, num_beams=4, use_cache=False)
        assert torch.equal(generate(model, tokens, 15, num_beams=4, use_cache=True), expected)
