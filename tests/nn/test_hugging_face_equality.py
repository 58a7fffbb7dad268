"""The same weights in Hugging Face's RwkvForCausalLM and here: the same logits and states, however the text is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rwkv4_models import distance, text, trained
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State

transformers = pytest.importorskip("transformers")

SAME = 1e-5  # measured up to 6e-7
# In 13 layers the residual stream is halved twice.
SIZES = [RWKV4Config(layers, 20, 31, rescale_every=6) for layers in (1, 3, 13)]
layers = pytest.mark.parametrize("config", SIZES, ids=lambda config: f"{config.layers} layers")


def pair(folder: Path, config: RWKV4Config, **options: Any) -> tuple[Any, RWKV4]:
    """Both models, loaded from one folder that we have written."""
    trained(config).save_pretrained(folder, format="hf")
    with pytest.MonkeyPatch.context() as patched:  # their initial values divide by zero for one layer
        patched.setattr(transformers.models.rwkv.modeling_rwkv.RwkvPreTrainedModel, "_init_weights", lambda *_: None)
        theirs = transformers.RwkvForCausalLM.from_pretrained(folder, **options)
    return theirs.eval(), RWKV4.from_pretrained(folder)


def meaning(state: list[Tensor] | RWKV4State) -> dict[str, Tensor]:
    """The content of either state, [L, B, D]; num, den and max on their own are a choice of scale."""
    if not isinstance(state, RWKV4State):
        ffn_x, att_x, num, den, top = (field.permute(2, 0, 1) for field in state)
    else:
        att_x, ffn_x, (num, den, top) = state
    return {"att_x": att_x, "ffn_x": ffn_x, "mean": num / den, "log weight": top + den.log()}


def assert_equal(theirs: Any, ours: tuple[Tensor, RWKV4State], bound: float = SAME) -> None:
    assert distance(ours[0], theirs.logits) < bound
    expected = meaning(theirs.state)
    for name, field in meaning(ours[1]).items():
        assert distance(field, expected[name]) < bound, name


@layers
@torch.no_grad()
def test_whole_texts_are_equal(tmp_path: Path, config: RWKV4Config) -> None:
    theirs, ours = pair(tmp_path, config)
    assert_equal(theirs(text(3, 40), use_cache=True), ours(text(3, 40)))


@layers
@torch.no_grad()
def test_split_texts_are_equal(tmp_path: Path, config: RWKV4Config) -> None:
    theirs, ours = pair(tmp_path, config)
    their_state = our_state = None
    for window in text(3, 40).split([13, 2, 25], 1):
        found = theirs(window, state=their_state, use_cache=True)
        ours_found = ours(window, our_state)
        assert_equal(found, ours_found)
        their_state, our_state = found.state, ours_found[1]


@layers
@torch.no_grad()
def test_single_steps_are_equal(tmp_path: Path, config: RWKV4Config) -> None:
    theirs, ours = pair(tmp_path, config)
    tokens = text(3, 12)
    found = ours(tokens[:, :4])
    rows = [theirs(row[:, :4], use_cache=True) for row in tokens.split(1)]  # theirs steps a single text only
    for t in range(4, 12):
        found = ours(tokens[:, t : t + 1], found[1])
        rows = [
            theirs(row[:, t : t + 1], state=before.state, use_cache=True)
            for row, before in zip(tokens.split(1), rows, strict=True)
        ]
        for n, row in enumerate(rows):
            assert distance(found[0][n : n + 1], row.logits) < SAME
            expected = meaning(row.state)
            for name, field in meaning(found[1]).items():
                assert distance(field[:, n : n + 1], expected[name]) < SAME, name


@layers
def test_gradients_are_equal(tmp_path: Path, config: RWKV4Config) -> None:
    theirs, ours = pair(tmp_path, config)
    theirs.train()
    ours.train()
    tokens = text(2, 30)
    theirs(tokens, labels=tokens).loss.backward()
    logits, _ = ours(tokens)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name.removeprefix("rwkv."): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, expected[name].reshape(parameter.shape)) < SAME, name


@torch.no_grad()
def test_epsilon_of_the_layer_norms_is_theirs(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, RWKV4Config(3, 20, 31, layer_norm_eps=0.3))
    assert_equal(theirs(text(3, 40), use_cache=True), ours(text(3, 40)))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_of_theirs_is_read_bit_for_bit(tmp_path: Path, layers: int, dtype: torch.dtype) -> None:
    theirs, _ = pair(tmp_path / "first", RWKV4Config(layers, 20, 31), dtype=dtype)
    theirs.train().save_pretrained(tmp_path / "second", max_shard_size="5KB")
    assert len(list((tmp_path / "second").glob("model-*.safetensors"))) > 1
    expected = {name.removeprefix("rwkv."): tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in RWKV4.from_pretrained(tmp_path / "second").state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name].reshape(tensor.shape)), name


def test_folder_of_ours_is_read_bit_for_bit(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, SIZES[1])
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor.flatten(), ours.state_dict()[name.removeprefix("rwkv.")].flatten()), name
    assert theirs.config.layer_norm_epsilon == 1e-5
    assert not theirs.config.tie_word_embeddings


@torch.no_grad()
def test_half_precision_models_are_near(tmp_path: Path) -> None:
    theirs, _ = pair(tmp_path, SIZES[1], dtype=torch.bfloat16)
    ours = RWKV4.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found, exact = ours(text(3, 40))[0], RWKV4.from_pretrained(tmp_path)(text(3, 40))[0]
    assert distance(found, exact) < 2 * distance(theirs(text(3, 40)).logits, exact) < 4e-2
