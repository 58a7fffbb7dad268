"""``fastwkv info``: what is in a checkpoint."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from rwkv4_models import trained

from fastwkv.nn import RWKV4Config, RWKV4State

CONFIG = RWKV4Config(layers=3, width=20, vocab_size=31)
PARAMETERS = 2 * 31 * 20 + 13 * 20 * 20 * 3 + 20 * (11 * 3 + 4)


def saved(path: Path, format: str, dtype: torch.dtype) -> Path:
    path = path / ("x.pth" if format == "blinkdl" else "x")
    trained(CONFIG).to(dtype).save_pretrained(path, format)
    return path


@pytest.mark.parametrize("format", ["fastwkv", "hf", "blinkdl"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)])
def test_json_says_what_was_saved(format, dtype, size, tmp_path, run) -> None:
    path = saved(tmp_path, format, getattr(torch, dtype))
    done = run("info", path, "--json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == {
        "version": "RWKV-4",
        "format": format,
        "layers": 3,
        "width": 20,
        "vocab_size": 31,
        "parameters": PARAMETERS,
        "dtypes": [dtype],
        "bytes": size * PARAMETERS,
        "state_bytes": 3 * 20 * (2 * size + 3 * max(size, 4)),
    }


def test_table_says_the_same(tmp_path, run) -> None:
    done = run("info", saved(tmp_path, "hf", torch.float32))
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert rows.pop("state") == "of a text 1,200 bytes"
    assert rows == {
        "version": "RWKV-4",
        "format": "hf",
        "layers": "3",
        "width": "20",
        "vocabulary": "31",
        "parameters": f"{PARAMETERS:,}",
        "dtype": "float32",
        "size": f"{4 * PARAMETERS:,} bytes",
    }


def test_dtypes_and_bytes_of_a_mixed_checkpoint_are_all_counted(tmp_path, run) -> None:
    model = trained(CONFIG).bfloat16()
    model.head.float()
    model.save_pretrained(tmp_path / "x")
    found = json.loads(run("info", tmp_path / "x", "--json").out)
    assert found["dtypes"] == ["bfloat16", "float32"]
    assert found["bytes"] == 2 * PARAMETERS + 2 * 31 * 20


def test_size_of_the_state_is_that_of_its_tensors(tmp_path, run) -> None:
    path = saved(tmp_path, "fastwkv", torch.bfloat16)
    state = tmp_path / "s.safetensors"
    # 31 tokens are too few for bytes; a tokenizer of three words will do.
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    (path / "tokenizer.json").write_text(json.dumps({**words, "added_tokens": []}))
    pytest.importorskip("tokenizers")
    assert run("generate", "--model", path, "--prompt", "b", "--tokens", 1, "--save-state", state).status == 0
    assert json.loads(run("info", path, "--json").out)["state_bytes"] == RWKV4State.load(state).nbytes


NO_CHECKPOINTS: dict[str, bytes] = {
    "holds neither safetensors nor what torch.save writes": b"root:x:0:0:root:/root:/bin/bash\n",
    "is empty, neither safetensors nor what torch.save writes": b"",
    "not a whole file of torch.save (an archive without data.pkl)": b"PK\5\6" + bytes(18),
    "damaged, or not a file of tensors alone, and nothing else is loaded": pickle.dumps({"emb.weight": 3}),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("message", NO_CHECKPOINTS)
def test_file_that_is_no_checkpoint_is_said_to_be_none(message, tmp_path, run) -> None:
    (tmp_path / "file").write_bytes(NO_CHECKPOINTS[message])
    assert run("info", tmp_path / "file") == (2, "", f"fastwkv info: {tmp_path / 'file'}: {message}\n")


@pytest.mark.parametrize("format", ["fastwkv", "hf"])
def test_folder_without_its_config_is_named(format, tmp_path, run) -> None:
    (saved(tmp_path, format, torch.float32) / "config.json").unlink()
    config = tmp_path / "x" / "config.json"
    assert run("info", tmp_path / "x") == (2, "", f"fastwkv info: {config}: No such file or directory\n")


@pytest.mark.skipif(os.name != "posix", reason="a device of POSIX")
def test_device_is_not_read(run) -> None:
    message = "expected a file, got a FIFO, a socket or a device"
    assert run("info", "/dev/zero") == (2, "", f"fastwkv info: /dev/zero: {message}\n")
