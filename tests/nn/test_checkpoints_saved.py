"""Writing checkpoints: whole or not at all, and so that they can be read again."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_bits, place
from rwkv4_models import CONFIG, trained
from safetensors.torch import load_file

from fastwkv.nn import RWKV4
from fastwkv.nn.checkpoint_names import FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_model_is_saved_over_the_file_it_came_from(tmp_path: Path, format: str) -> None:
    path = place(tmp_path, format)
    trained().save_pretrained(path, format=format)
    model = RWKV4.from_pretrained(path)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.save_pretrained(path, format=format)
    assert_same_bits(RWKV4.from_pretrained(path).state_dict(), model.state_dict())


@pytest.mark.parametrize("format", FORMATS)
def test_interrupted_save_leaves_the_old_file(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(tmp_path, format)
    trained().save_pretrained(path, format=format)
    before = RWKV4.from_pretrained(path).state_dict()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained(seed=1).save_pretrained(path, format=format)
    assert_same_bits(RWKV4.from_pretrained(path).state_dict(), before)
    files = sorted(file.name for file in (tmp_path if format == "blinkdl" else path).iterdir())
    assert files == (["model.pth"] if format == "blinkdl" else ["config.json", "model.safetensors"])


def test_saved_view_is_of_its_own_size(tmp_path: Path) -> None:
    model = trained()
    model.head.weight = torch.nn.Parameter(torch.randn(5000, CONFIG.width)[: CONFIG.vocab_size])
    model.save_pretrained(tmp_path / "model.pth", format="blinkdl")
    assert (tmp_path / "model.pth").stat().st_size < 5000 * CONFIG.width * 4


def test_settings_of_the_hugging_face_folder_are_those_of_the_model(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path, format="hf")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["RwkvForCausalLM"]
    assert (written["num_hidden_layers"], written["hidden_size"], written["vocab_size"]) == (3, 20, 31)
    assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_written_beside_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    trained().to(dtype).save_pretrained(tmp_path, format="hf")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_settings_that_are_no_sizes_are_the_defaults_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained().save_pretrained(tmp_path, format="hf")
    written = json.loads((tmp_path / "config.json").read_text())
    defaults = transformers.RwkvConfig()
    for name in ("context_length", "use_cache", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        assert written[name] == getattr(defaults, name), name


@pytest.mark.parametrize("format", FORMATS)
def test_transposed_parameter_is_written_contiguous(tmp_path: Path, format: str) -> None:
    model = trained()
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().T.contiguous().T)
    path = tmp_path / "model.pth"
    model.save_pretrained(path, format=format)
    written = torch.load(path) if format == "blinkdl" else load_file(path / "model.safetensors")
    assert written["head.weight"].is_contiguous()
    assert torch.equal(written["head.weight"], model.head.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_tied_embeddings_are_written_twice(tmp_path: Path, format: str) -> None:
    model = trained()
    model.head.weight = model.embeddings.weight
    path = tmp_path / "model.pth"
    model.save_pretrained(path, format=format)
    loaded = RWKV4.from_pretrained(path)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert torch.equal(loaded.embeddings.weight, model.head.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_model_that_could_not_be_read_back_is_not_saved(tmp_path: Path, format: str) -> None:
    model = trained()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match=r"these differ: head.parametrizations.weight.original0"):
        model.save_pretrained(tmp_path / "model.pth", format=format)
    assert not (tmp_path / "model.pth").exists()


@pytest.mark.skipif(os.name != "posix", reason="the permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_written_files_have_the_permissions_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for format in FORMATS:
            trained().save_pretrained(tmp_path / "model.pth" if format == "blinkdl" else tmp_path / format, format)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
