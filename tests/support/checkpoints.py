"""Checkpoints of small RWKV-4 models, made without the code that reads and writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rwkv4_models import CONFIG
from safetensors.torch import save_file
from torch import Tensor

from fastwkv.nn import RWKV4, CheckpointError, RWKV4Config

LN = ("weight", "bias")
TIME_MIX = ("time_mix_k", "time_mix_v", "time_mix_r")


def blinkdl(config: RWKV4Config = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """What the original code saves: names and shapes written out."""
    V, D, generator = config.vocab_size, config.width, torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, D)}
    for n in range(config.layers):
        norms = ("ln0", "ln1", "ln2") if n == 0 else ("ln1", "ln2")
        shapes |= {f"blocks.{n}.{norm}.{part}": (D,) for norm in norms for part in LN}
        shapes |= {f"blocks.{n}.att.{name}": (D,) for name in ("time_decay", "time_first")}
        shapes |= {f"blocks.{n}.att.{name}": (1, 1, D) for name in TIME_MIX}
        shapes |= {f"blocks.{n}.att.{name}.weight": (D, D) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"blocks.{n}.ffn.{name}": (1, 1, D) for name in ("time_mix_k", "time_mix_r")}
        shapes |= {f"blocks.{n}.ffn.key.weight": (4 * D, D), f"blocks.{n}.ffn.receptance.weight": (D, D)}
        shapes |= {f"blocks.{n}.ffn.value.weight": (D, 4 * D)}
    shapes |= {f"ln_out.{part}": (D,) for part in LN} | {"head.weight": (V, D)}
    return {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of transformers' RwkvForCausalLM."""
    renamed = {}
    for old, tensor in weights.items():
        name = old
        for mine, theirs in (
            ("emb.", "embeddings."),
            (".ln0.", ".pre_ln."),
            (".att.", ".attention."),
            (".ffn.", ".feed_forward."),
        ):
            name = name.replace(mine, theirs)
        for letter, word in (("k", "key"), ("v", "value"), ("r", "receptance")):
            if name.endswith(f"time_mix_{letter}"):
                name = name[:-1] + word
        renamed[name if name == "head.weight" else f"rwkv.{name}"] = tensor
    return renamed


def hugging_face_config(config: RWKV4Config = CONFIG, **changed: Any) -> dict[str, Any]:
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.layers}
    return {"model_type": "rwkv", **sizes, "layer_norm_epsilon": config.layer_norm_eps, **changed}


def write_pth(path: Path, weights: dict[str, Any], **options: Any) -> Path:
    torch.save(weights, path, **options)
    return path


def write_hugging_face(folder: Path, kind: str = "safetensors", **changed: Any) -> Path:
    """A folder as transformers writes it: ``kind`` is safetensors or bin, with "-sharded" behind it in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = hugging_face(blinkdl())
    (folder / "config.json").write_text(json.dumps(hugging_face_config(**changed)))
    kind, sharded, _ = kind.partition("-sharded")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(weights)
    shards = (names[::2], names[1::2]) if sharded else (names,)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}" if sharded else f"{stem}.{suffix}"
        tensors = {name: weights[name] for name in shard}
        if suffix == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if sharded:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def place(folder: Path, format: str) -> Path:
    return folder / "model.pth" if format == "blinkdl" else folder / format


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        RWKV4.from_pretrained(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
