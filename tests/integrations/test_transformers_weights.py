"""Weights of Hugging Face's RWKV under the patch: what is saved, what is loaded, what training starts from."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from hf_rwkv import SAME, build, distance, text
from transformers import RwkvConfig, RwkvForCausalLM

from fastwkv.integrations.transformers import patch


def test_saved_weights_are_the_true_ones_after_evaluation(tmp_path: Path) -> None:
    model, tokens = build(5), text(1, 4)
    true = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path / "without")
        with patch():
            model.save_pretrained(tmp_path / "with")
            assert distance(model(tokens).logits, expected) < SAME
    wrong, right = (RwkvForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("without", "with"))
    assert all(torch.equal(right[name], weight) for name, weight in true.items())
    changed = [name for name, weight in true.items() if not torch.equal(wrong[name], weight)]  # the defect
    parts = "attention.output", "feed_forward.value"
    assert changed == [f"rwkv.blocks.{layer}.{part}.weight" for layer in (2, 3, 4) for part in parts]


@pytest.mark.parametrize("inner", [True, False])
def test_weights_loaded_into_an_evaluated_model_are_the_ones_it_computes_with(inner: bool) -> None:
    model, other, tokens = build(5, seed=1), build(5), text(1, 4)
    with patch(), torch.no_grad():
        expected = model(tokens).logits
        other(tokens)
        if inner:  # as a part of something larger
            nn.ModuleList([other]).load_state_dict(nn.ModuleList([model]).state_dict())
        else:
            other.load_state_dict(model.state_dict())
        assert torch.equal(other(tokens).logits, expected)


@pytest.mark.parametrize("name", ["SCB", "quant_state"])
def test_quantised_weights_are_left_alone(name: str) -> None:
    model = build(5)
    with patch(), torch.no_grad():
        model(text(1, 2))
        divided = copy.deepcopy(model.rwkv.blocks[4].attention.output.weight)
        setattr(model.rwkv.blocks[4].attention.output.weight, name, None)
        assert torch.equal(model.state_dict()["rwkv.blocks.4.attention.output.weight"], divided)
        assert model.rwkv.layers_are_rescaled


@pytest.mark.parametrize(("every", "training"), [(0, False), (2, True)])
def test_weights_that_were_not_divided_are_left_alone(every: int, training: bool) -> None:
    model = build(5, rescale_every=every).train(training)
    true = copy.deepcopy(model.state_dict())
    with patch(), torch.no_grad():
        model(text(1, 4))
        assert all(torch.equal(weight, true[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("layers", [1, 3, 13])
def test_initial_vectors_follow_the_training_code(layers: int) -> None:
    with patch():
        model = RwkvForCausalLM(RwkvConfig(vocab_size=5, hidden_size=8, num_hidden_layers=layers))
    assert model.config.num_hidden_layers == layers
    i = torch.arange(8, dtype=torch.float64)
    for layer, block in enumerate(model.rwkv.blocks):
        attention, depth = block.attention, layer / max(layers - 1, 1)
        assert attention.config is model.config
        mix = (i / 8) ** (1 - layer / layers)
        expected = {
            "time_decay": -5 + 8 * (i / 7) ** (0.7 + 1.3 * depth),
            "time_first": torch.tensor(0.3).log() + 0.5 * ((i + 1) % 3 - 1),
            "time_mix_key": mix,
            "time_mix_value": mix + 0.3 * depth,
            "time_mix_receptance": (i / 8) ** (0.5 * (1 - layer / layers)),
        }
        for name, value in expected.items():
            actual = getattr(attention, name).flatten().double()
            torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6, msg=name)


def test_initial_values_are_wrong_without_the_patch() -> None:
    with pytest.raises(ZeroDivisionError):
        RwkvForCausalLM(RwkvConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1))
    model = RwkvForCausalLM(RwkvConfig(vocab_size=5, hidden_size=8, num_hidden_layers=2))
    assert (model.rwkv.blocks[0].attention.time_first == 1).all()


def test_loaded_values_are_not_initialised_again(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with patch():
        loaded = RwkvForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
