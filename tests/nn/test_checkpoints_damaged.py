"""Damaged and hostile files: one refusal of one line, and nothing of them is run."""

import contextlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import blinkdl, refused, write_hugging_face, write_pth
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv4_models import trained

from fastwkv.nn import RWKV4, CheckpointError


@pytest.mark.parametrize("kind", ["safetensors", "archive", "pickle"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_file_is_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = whole_file(tmp_path, kind)
    length = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError) as caught:
        RWKV4.from_pretrained(tmp_path if kind == "safetensors" else path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "archive", "pickle"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changed_byte_raises_nothing_but_a_refusal(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    changed = bytearray(whole_file(tmp_path, kind))
    ends = st.integers(0, 9999) | st.integers(len(changed) - 9999, len(changed) - 1)  # what is not a number
    changed[data.draw(ends)] ^= data.draw(st.integers(1, 255))
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    path.write_bytes(changed)
    with contextlib.suppress(CheckpointError):
        RWKV4.from_pretrained(tmp_path if kind == "safetensors" else path)


def whole_file(folder: Path, kind: str) -> bytes:
    if not (path := folder / "whole").exists():
        if kind == "safetensors":
            trained().save_pretrained(folder)
            (folder / "model.safetensors").rename(path)
        else:
            write_pth(path, blinkdl(), _use_new_zipfile_serialization=kind == "archive")
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for kind in ("plain", "archive"):
        path = tmp_path / f"{kind}.pth"
        if kind == "plain":
            path.write_bytes(pickle.dumps({"emb.weight": Attack()}))
        else:
            torch.save({"emb.weight": Attack()}, path)
        refused(path, "not a file of tensors alone")
    assert not (tmp_path / "ran").exists()


def test_short_safetensors_file_is_called_one(tmp_path: Path) -> None:
    (write_hugging_face(tmp_path) / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        RWKV4.from_pretrained(tmp_path)


def test_error_of_several_lines_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("first.\nsecond")

    path = write_pth(tmp_path / "model.pth", blinkdl())
    monkeypatch.setattr("torch.load", load)
    with pytest.raises(CheckpointError, match=r"\(first\)$"):
        RWKV4.from_pretrained(path)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensor_without_plain_values_is_refused(tmp_path: Path, change) -> None:
    weights = blinkdl()
    weights["head.weight"] = change(weights["head.weight"])
    with pytest.raises(CheckpointError, match=r"expected dense tensors, but head.weight"):
        RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", weights))


def test_nested_config_is_refused(tmp_path: Path) -> None:
    (write_hugging_face(tmp_path) / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a JSON file"):
        RWKV4.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_hugging_face(tmp_path)
    (folder / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: (not a JSON file|expected a JSON object)"):
        RWKV4.from_pretrained(folder)


@pytest.mark.parametrize("content", [3, [torch.zeros(2)], torch.zeros(2)])
def test_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    refused(write_pth(tmp_path / "model.pth", content), f"expected tensors by name, got a {type(content).__name__}")


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_program_of_torchscript_is_refused_without_the_advice_to_run_it(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pth"))
    refused(tmp_path / "model.pth", "not a file of tensors alone, and nothing else is loaded$")
