"""Paths that lead to no file, and files that are no checkpoint: one error of one line that names them, at once."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import blinkdl, refused, write_hugging_face, write_pth
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv4_models import text, trained

from fastwkv.nn import RWKV4, CheckpointError, RWKV4State
from fastwkv.nn.tensor_files import replace_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the path of a socket may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


KINDS = {
    fifo: "a FIFO",
    listening_socket: "a FIFO, a socket",
    device: "a FIFO, a socket or a device",
    folder: "a folder",
}
posix = pytest.mark.skipif(os.name != "posix", reason="the kinds of files of POSIX")


@posix
@pytest.mark.parametrize("make", KINDS)
def test_state_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"x: expected a file, got {KINDS[make]}"):
        RWKV4State.load(tmp_path / "x")


@posix
@pytest.mark.parametrize("make", [fifo, listening_socket, device])
def test_checkpoint_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    refused(tmp_path / "x", f"expected a file, got {KINDS[make]}")


@posix
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("safetensors", "model.safetensors"),
        ("safetensors", "config.json"),
        ("bin", "pytorch_model.bin"),
        ("bin-sharded", "pytorch_model.bin.index.json"),
        ("safetensors-sharded", "model-00002-of-00002.safetensors"),
    ],
)
def test_part_of_a_folder_that_is_no_file_is_refused(tmp_path: Path, kind: str, name: str, make) -> None:
    (write_hugging_face(tmp_path, kind) / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: expected a file, got {KINDS[make]}"):
        RWKV4.from_pretrained(tmp_path)


NAMES = {"a\0b": r"a\\x00b", "a\udbffb": r"a\\udbffb"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("load", [RWKV4.from_pretrained, RWKV4State.load])
@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors"])
def test_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str, load, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{NAMES[name]}{suffix}: not the name of a file \(.*\)$"):
        load(tmp_path / (name + suffix))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_under_such_a_name(tmp_path: Path, name: str) -> None:
    for format in ("fastwkv", "hf", "blinkdl"):
        with pytest.raises(ValueError, match="not the name of a file"):
            trained().save_pretrained(tmp_path / name, format)
    with pytest.raises(ValueError, match="not the name of a file"):
        trained().empty_state(1).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.parametrize("make", [fifo, device])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    before = (tmp_path / "x").lstat()
    with pytest.raises(FileExistsError, match=r"Not a file: '.*x'"):
        replace_file(tmp_path / "x", lambda part: Path(part).write_bytes(b"new"))
    assert (tmp_path / "x").lstat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_shard_of_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    index = write_hugging_face(tmp_path, "safetensors-sharded") / "model.safetensors.index.json"
    for name, message in {"a\0b": "not the name", "": "expected a file, got a folder", "..": "got a folder"}.items():
        index.write_text(json.dumps({"weight_map": {"head.weight": name}}))
        refused(tmp_path, message)


CONTENTS = {
    "is empty, neither": b"",
    "holds neither safetensors nor what torch.save writes$": b"root:x:0:0:root:/root:/bin/bash\n",
    "holds neither": b"#!/bin/sh",
    "holds neither safetensors": "größer".encode("utf-16"),
    "holds neither safetensors nor": b"GGUF" + bytes(64),
    "an archive without data.pkl": b"PK\5\6" + bytes(18),
    "not a whole file of torch.save": b"PK\3\4",
}


@pytest.mark.parametrize("message", CONTENTS)
def test_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, message: str) -> None:
    (tmp_path / "x").write_bytes(CONTENTS[message])
    refused(tmp_path / "x", message)


@settings(max_examples=50)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_short_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", "(neither|not a whole|damaged)")


SMALL: dict[str, Callable[[], torch.Tensor]] = {
    "emb.weight is nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "emb.weight is nested, on cpu, torch.jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
    ),
    "emb.weight is quantised": lambda: torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8),
    r"emb.weight \[8589934592, 8\] would take 274,877,906,944 bytes": lambda: torch.zeros(1).expand(2**33, 8),
    r"emb.weight \[16777216, 8\] would take 268,435,456 bytes": lambda: torch.zeros(8).bfloat16().expand(2**24, 8),
    r"emb.weight \[1048576, 1048576\] would": lambda: torch.zeros(2**21).as_strided((2**20, 2**20), (1, 1)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz")
@pytest.mark.parametrize(
    ("message", "old"),
    [(message, old) for message in SMALL for old in (False, True) if not (old and "nested" in message)],
)
def test_small_file_that_declares_large_or_odd_tensors_is_refused(tmp_path: Path, message: str, old: bool) -> None:
    weights = {**blinkdl(), "emb.weight": SMALL[message]()}
    refused(write_pth(tmp_path / "x.pth", weights, _use_new_zipfile_serialization=not old), message)


def test_vectors_that_repeat_one_number_are_read(tmp_path: Path) -> None:
    weights = blinkdl()
    weights["blocks.0.att.time_mix_k"] = torch.full((1,), 0.5).expand(1, 1, 20)
    weights["blocks.1.att.key.weight"] = torch.zeros(1).expand(20, 20)
    model = RWKV4.from_pretrained(write_pth(tmp_path / "x.pth", weights))
    assert model.blocks[0].attention.time_mix_key.tolist() == [0.5] * 20
    assert model.blocks[1].attention.key.weight.is_contiguous()


def test_message_is_one_line_whatever_names_hold(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "a\nb\x1b[31m.pth", {"c\nd": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        RWKV4.from_pretrained(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(
        r"a\nb\x1b[31m.pth: not an RWKV-4 checkpoint: expected names like emb.weight, got c\nd"
    )


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400)


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_in_a_config_is_used_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "model_type", "layer_norm_epsilon", "rescale_every")
    values = JSON | st.lists(JSON, max_size=2) | st.dictionaries(st.text(max_size=2), JSON, max_size=2)
    changed: dict[str, Any] = {data.draw(st.sampled_from(names)): data.draw(values)}
    path = write_hugging_face(tmp_path, **changed)
    with contextlib.suppress(CheckpointError):
        RWKV4.from_pretrained(path)(text(1, 2))
