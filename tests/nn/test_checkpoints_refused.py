"""Checkpoints that are refused: one error of one line that names what is wrong, and nothing half-loaded."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import blinkdl, hugging_face_config, refused, write_hugging_face, write_pth
from rwkv4_models import trained
from safetensors.torch import load_file, save_file

from fastwkv.nn import RWKV4, CheckpointError, RWKV4Config, RWKV4State

Change = Callable[[dict[str, Any]], object]


def with_tensor(*names: str) -> Change:
    return lambda weights: weights.update(dict.fromkeys(names, torch.zeros(2)))


def without(*names: str) -> Change:
    return lambda weights: [weights.pop(name) for name in names]


def without_block(number: int) -> Change:
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(f"blocks.{number}.")]


CHANGES: dict[str, Change] = {
    "3 layers of width 20: missing head.weight$": without("head.weight"),
    "missing blocks.0.ln0.weight, blocks.0.ln0.bias$": without("blocks.0.ln0.weight", "blocks.0.ln0.bias"),
    "expected emb.weight of shape": lambda weights: weights.update({"emb.weight": torch.zeros(3)}),
    "missing blocks.1.ln1.weight, blocks.1.ln1.bias, .* and 15 more; unexpected blocks.2": without_block(1),
    "unexpected blocks.0.att.bias, foo$": with_tensor("blocks.0.att.bias", "foo"),
    r"blocks.1.att.key.weight \[20, 19\] where \[20, 20\] was expected$": lambda weights: weights.update(
        {"blocks.1.att.key.weight": torch.zeros(20, 19)}
    ),
    r"blocks.1.att.time_mix_k \[20\] where \[1, 1, 20\] was expected": lambda weights: weights.update(
        {"blocks.1.att.time_mix_k": torch.zeros(20)}
    ),
    r"head.weight \[30, 20\] where \[31, 20\] was expected": lambda weights: weights.update(
        {"head.weight": torch.zeros(30, 20)}
    ),
    "head.weight torch.int8 where float32, float64, bfloat16 or float16 was expected": lambda weights: weights.update(
        {"head.weight": torch.zeros(31, 20, dtype=torch.int8)}
    ),
    "missing ln_out.bias; unexpected foo; head.weight": lambda weights: (
        weights.pop("ln_out.bias"),
        weights.update({"foo": torch.zeros(1), "head.weight": torch.zeros(1)}),
    ),
    "expected RWKV-4, but blocks.1.att.time_faaaa belongs to RWKV-5": with_tensor("blocks.1.att.time_faaaa"),
    "expected RWKV-4, but blocks.1.att.ln_x.weight belongs to RWKV-5": with_tensor("blocks.1.att.ln_x.weight"),
    "expected RWKV-4, but blocks.0.att.time_maa_w1 belongs to RWKV-6": with_tensor(
        "blocks.0.att.time_maa_w1", "blocks.0.att.ln_x.weight", "blocks.0.att.time_faaaa"
    ),
    "expected RWKV-4, but blocks.0.att.r_k belongs to RWKV-7": with_tensor(
        "blocks.0.att.r_k", "blocks.0.att.x_r", "blocks.0.att.ln_x.weight"
    ),
    "blocks.0.ffnPre.key.weight is a channel mix in place of the first time mix": with_tensor(
        "blocks.0.ffnPre.key.weight"
    ),
    "head_q.weight is a head that copies": with_tensor("head_q.weight", "head_k.weight", "copy_mask"),
    "copy_mask is a head that copies": with_tensor("copy_mask"),
    "blocks.2.tiny_q.weight is tiny attention": with_tensor("blocks.2.tiny_q.weight"),
    "blocks.2.tiny_ln.bias is tiny attention": with_tensor("blocks.2.tiny_ln.bias"),
    "blocks.0.pos_emb_x is an embedding of positions": with_tensor("blocks.0.pos_emb_x"),
    "expected names like emb.weight, got a, b": lambda weights: (
        weights.clear(),
        weights.update(a=torch.zeros(1), b=torch.zeros(1)),
    ),
    "expected names like emb.weight, got nothing": dict.clear,
    "expected tensors by name, but 'step' is of type int": lambda weights: weights.update(step=3),
    "expected tensors by name, but 7 is of type Tensor": lambda weights: weights.update({7: torch.zeros(1)}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_wrong_tensors_are_named(tmp_path: Path, message: str) -> None:
    weights = blinkdl()
    CHANGES[message](weights)
    refused(write_pth(tmp_path / "model.pth", weights), message)


def test_wrong_tensors_of_a_hugging_face_folder_are_named_as_they_stand_there(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["rwkv.blocks.1.attention.time_decay"]
    save_file(weights, folder / "model.safetensors")
    refused(folder, "missing rwkv.blocks.1.attention.time_decay$")


def test_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path)
    weights = load_file(folder / "model.safetensors")
    base = {name.removeprefix("rwkv."): tensor for name, tensor in weights.items() if name != "head.weight"}
    save_file(base, folder / "model.safetensors")
    refused(folder, "missing head.weight;")


CONFIGS: dict[str, dict[str, Any]] = {
    "config.json says num_hidden_layers = 4, the weights say 3": {"num_hidden_layers": 4},
    "config.json says hidden_size = 21, the weights say 20": {"hidden_size": 21},
    "config.json says vocab_size = 50277, the weights say 31": {"vocab_size": 50277},
    "config.json says attention_hidden_size = 40, expected 20": {"attention_hidden_size": 40},
    "config.json says intermediate_size = 40, expected 80": {"intermediate_size": 40},
    "config.json says tie_word_embeddings = True, expected False": {"tie_word_embeddings": True},
    "config.json says model_type = rwkv5, expected rwkv": {"model_type": "rwkv5"},
    "layer_norm_eps must be positive": {"layer_norm_epsilon": 0.0},
    "layer_norm_eps must be a number": {"layer_norm_epsilon": "small"},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_config_that_contradicts_the_weights_is_refused(tmp_path: Path, message: str) -> None:
    refused(write_hugging_face(tmp_path, **CONFIGS[message]), message)


def test_own_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "layers": 2}))
    refused(tmp_path, "config.json says layers = 2, the weights say 3")


def test_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "safetensors-sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors"):
        RWKV4.from_pretrained(folder)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            {"rwkv.foo": "model-00001-of-00002.safetensors"},
            "28 more in the index or in model-00001-of-00002.safetensors, but not in both",
        ),
        ({"rwkv.foo": "../model.safetensors"}, "'../model.safetensors' is not the name of a file beside it"),
        ({"rwkv.foo": "/model.safetensors"}, "'/model.safetensors' is not the name"),
        (None, "has no weight_map"),
    ],
)
def test_wrong_index_is_refused(tmp_path: Path, places: Any, message: str) -> None:
    folder = write_hugging_face(tmp_path, "safetensors-sharded")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        RWKV4.from_pretrained(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder; .* not downloaded"):
        RWKV4.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: none of model.safetensors, pytorch_model.bin"):
        RWKV4.from_pretrained(tmp_path)
    (write_hugging_face(tmp_path) / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        RWKV4.from_pretrained(tmp_path)


def test_file_that_needs_its_folder_is_refused(tmp_path: Path) -> None:
    refused(write_hugging_face(tmp_path) / "model.safetensors", "give the folder that holds it and its config.json")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "int8", "float31"])
def test_dtype_that_is_not_floating_is_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, got"):
        RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", blinkdl()), dtype=dtype)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of fastwkv, hf, blinkdl, got 'gguf'"):
        trained().save_pretrained(tmp_path, format="gguf")


def test_model_that_the_format_cannot_describe_is_not_saved(tmp_path: Path) -> None:
    model = RWKV4(RWKV4Config(1, 8, 5, layer_norm_eps=1e-3))
    with pytest.raises(ValueError, match=r"BlinkDL's format means layer_norm_eps = 1e-5, the model has 0\.001"):
        model.save_pretrained(tmp_path / "model.pth", format="blinkdl")
    assert not (tmp_path / "model.pth").exists()


def test_file_of_a_model_is_no_state(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected the state of an RWKV-4 model, but it has no '"):
        RWKV4State.load(tmp_path / "model.safetensors")


OTHERS = {
    "blocks.1.tiny_mask": "tiny attention",
    "blocks.0.tiny_k.weight": "tiny attention",
    "blocks.0.tiny_v.weight": "tiny attention",
    "blocks.0.pos_emb_y": "an embedding of positions",
    "head_k.weight": "a head that copies",
    "blocks.0.att.time_maa_x": "RWKV-6",
    "model.layers.0.attn.x_bias": "RWKV-6",  # as flash-linear-attention calls it
    "blocks.0.att.r_k": "RWKV-7",
    "model.layers.0.attn.r_k": "RWKV-7",
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_name_of_another_model_is_enough(tmp_path: Path, name: str) -> None:
    path = write_pth(tmp_path / "model.pth", {**blinkdl(), name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} .*{OTHERS[name]}"):
        RWKV4.from_pretrained(path)


def test_first_tensor_of_another_version_is_named(tmp_path: Path) -> None:
    more = {f"blocks.{layer}.att.ln_x.weight": torch.zeros(2) for layer in (2, 0, 1)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.att\.ln_x\.weight belongs to RWKV-5"):
        RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", {**blinkdl(), **more}))


def test_model_without_blocks_is_refused(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in blinkdl().items() if not name.startswith("blocks.")}
    with pytest.raises(CheckpointError, match=r"1 layers of width 20: missing blocks\.0\.ln0\.weight"):
        RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", weights))


def test_tensor_in_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, "safetensors-sharded")
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "head.weight": torch.zeros(31, 20)}, second)
    with pytest.raises(CheckpointError, match=r"head.weight in the index or in model-00002"):
        RWKV4.from_pretrained(folder)


def test_weights_and_config_of_two_formats_are_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config()))
    with pytest.raises(CheckpointError, match=r"config.json says model_type = rwkv, not fastwkv-rwkv4"):
        RWKV4.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [None, "six", 2.5, True])
def test_rescaling_that_is_no_number_is_named(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"config.json: rescale_every must be an int, got"):
        RWKV4.from_pretrained(write_hugging_face(tmp_path, rescale_every=value))


def test_dtypes_that_cannot_be_multiplied_need_one_that_is_given(tmp_path: Path) -> None:
    weights = blinkdl(dtype=torch.bfloat16)
    for name in ("blocks.0.att.time_decay", "blocks.1.att.time_first"):
        weights[name] = weights[name].float()
    logits, _ = RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", weights))(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16
    weights["blocks.0.att.time_mix_k"] = weights["blocks.0.att.time_mix_k"].float()
    path = write_pth(tmp_path / "model.pth", weights)
    refused(path, r"give one: embeddings\.weight is torch\.bfloat16, .*time_mix_key is torch\.float32")
    assert RWKV4.from_pretrained(path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
