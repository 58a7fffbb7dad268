"""Whatever the user does wrong: one line on standard error, status 2, nothing printed, nothing written."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rwkv4_models import trained

import fastwkv
from fastwkv.cli.main import main
from fastwkv.cli.position import Position
from fastwkv.nn import RWKV4, RWKV4Config

MODEL, PROMPT = ("--model", "model"), ("--prompt", "a")
GENERATE = ("generate", *MODEL, *PROMPT)
USAGE = {
    "the following arguments are required: COMMAND": (),
    "invalid choice: 'train'": ("train",),
    "unrecognized arguments: --prompts a": ("generate", *MODEL, "--prompts", "a"),
    "unrecognized arguments: two lines": ("info", "model", "two\nlines"),
    "the following arguments are required: --model": ("generate", *PROMPT),
    "the following arguments are required: PATH": ("info",),
    "give a --prompt, a --prompt-file or a --load-state": ("generate", *MODEL),
    "argument --prompt-file: not allowed with argument --prompt": (*GENERATE, "--prompt-file", "f"),
    "argument --tokens: expected a whole number, 0 to 2^63 - 1, got '-1'": (*GENERATE, "--tokens", "-1"),
    "argument --tokens: expected a whole number, 0 to 2^63 - 1, got '1.5'": (*GENERATE, "--tokens", "1.5"),
    "argument --seed: expected a whole number, 0 to 2^63 - 1, got '9223372036854775808'": (
        *GENERATE,
        "--seed",
        "9223372036854775808",
    ),
    "argument --temperature: expected a number of at least 0, got '-1'": (*GENERATE, "--temperature", "-1"),
    "argument --temperature: expected a number of at least 0, got 'inf'": (*GENERATE, "--temperature", "inf"),
    "argument --temperature: expected a number of at least 0, got 'hot'": (*GENERATE, "--temperature", "hot"),
    "argument --top-p: expected a number above 0 and at most 1, got '0'": (*GENERATE, "--top-p", "0"),
    "argument --top-p: expected a number above 0 and at most 1, got '1.01'": (*GENERATE, "--top-p", "1.01"),
    "argument --top-p: expected a number above 0 and at most 1, got 'nan'": (*GENERATE, "--top-p", "nan"),
    "argument --dtype: expected one of float32, bfloat16, float16, float64, got 'int8'": (*GENERATE, "--dtype", "int8"),
    "argument --device: expected cpu, cuda or cuda:N, got 'meta'": (*GENERATE, "--device", "meta"),
    "argument --device: expected cpu, cuda or cuda:N, got 'gpu'": (*GENERATE, "--device", "gpu"),
    "argument --device: there is no cuda:99 here": (*GENERATE, "--device", "cuda:99"),
    "argument --threads: expected 1 to": (*GENERATE, "--threads", "0"),
    "the cores of this machine, got '99999'": (*GENERATE, "--threads", "99999"),
    "--stop-token 256 is outside the model's vocabulary of 256 tokens": (*GENERATE, "--stop-token", "256"),
}
FILES = {
    "nothing: no such file or folder": ("generate", "--model", "nothing", *PROMPT),
    "holds no weights": ("generate", "--model", "empty", *PROMPT),
    "generate: damaged.pth: ": ("generate", "--model", "damaged.pth", *PROMPT),
    "expected RWKV-4, but blocks.0.att.r_k belongs to RWKV-7": ("generate", "--model", "v7.pth", *PROMPT),
    "v7.pth: expected RWKV-4": ("info", "v7.pth"),
    "info: empty: holds no weights": ("info", "empty"),
    "nothing.txt: No such file or directory": ("generate", *MODEL, "--prompt-file", "nothing.txt"),
    "empty: Is a directory": ("generate", *MODEL, "--prompt-file", "empty"),
    "nothing.json: No such file or directory": (*GENERATE, "--tokenizer", "nothing.json"),
    "model/config.json: not a file of the tokenizers library": (*GENERATE, "--tokenizer", "model/config.json"),
    "nothing.safetensors: No such file or directory": (*GENERATE, "--load-state", "nothing.safetensors"),
    "generate: damaged.safetensors: ": (*GENERATE, "--load-state", "damaged.safetensors"),
    "model.safetensors: not a file of --save-state: it has no": (
        *GENERATE,
        "--load-state",
        "model/model.safetensors",
    ),
    "file/x.safetensors cannot be written: ": (*GENERATE, "--save-state", "file/x.safetensors"),
    "folder.safetensors cannot be written: Is a directory": (*GENERATE, "--save-state", "folder.safetensors"),
    "token 1 of the prompt is outside the model's vocabulary of 1 tokens": (
        "generate",
        *("--model", "one", "--tokenizer", "words.json", "--prompt", "b"),
    ),
    "model has 1 tokens, and one holds neither tokenizer.json nor rwkv_vocab_v20230424.txt": (
        "generate",
        *("--model", "one", *PROMPT),
    ),
    "model has 300 tokens, and large holds neither tokenizer.json nor": ("generate", "--model", "large", *PROMPT),
    "give a --tokenizer, or --bytes if the first": ("generate", "--model", "large", "--load-state", "state"),
    "token 97 of the prompt is outside the model's vocabulary of 1 tokens": (
        "generate",
        *("--bytes", "--model", "one", *PROMPT),
    ),
    "argument --tokenizer: not allowed with argument --bytes": (*GENERATE, "--bytes", "--tokenizer", "words.json"),
    "missing/deep/x cannot be written: there is no folder missing/deep": (*GENERATE, "--save-state", "missing/deep/x"),
    "file: neither a file of the tokenizers library nor the vocabulary of RWKV-4 World": (
        *GENERATE,
        *("--tokenizer", "file"),
    ),
}


@pytest.fixture(scope="session")
def place(model: RWKV4, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a good model and of much that is wrong."""
    place = tmp_path_factory.mktemp("place")
    model.save_pretrained(place / "model")
    trained(RWKV4Config(layers=1, width=2, vocab_size=1)).save_pretrained(place / "one")
    large = trained(RWKV4Config(layers=1, width=2, vocab_size=300))
    large.save_pretrained(place / "large")
    Position(large.empty_state(1), 7).save(place / "state")
    (place / "empty").mkdir()
    (place / "folder.safetensors").mkdir()
    for name in ("damaged.pth", "damaged.safetensors", "file"):
        (place / name).write_bytes(b"no weights")
    torch.save({"emb.weight": torch.zeros(1, 2), "blocks.0.att.r_k": torch.zeros(1, 2)}, place / "v7.pth")
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (place / "words.json").write_text(json.dumps({"version": "1.0", "model": words, "added_tokens": []}))
    return place


@pytest.mark.parametrize("message", USAGE | FILES)
def test_mistake_is_answered_in_one_line(message, place, run, monkeypatch) -> None:
    monkeypatch.chdir(place)
    if "tokenize" in message or "words.json" in FILES.get(message, ()):
        pytest.importorskip("tokenizers")
    before = sorted(place.rglob("*"))
    done = run(*(USAGE | FILES)[message])
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("fastwkv")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("message", [m for m, line in (USAGE | FILES).items() if line[:1] == ("generate",)])
def test_mistake_is_found_before_the_model_is_loaded(message, place, run, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(RWKV4, "from_pretrained", None)
    assert run(*(USAGE | FILES)[message]).status == 2


def test_folder_without_permission_is_found_before_the_model_is_loaded(place, run, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.chdir(place)
    monkeypatch.setattr(RWKV4, "from_pretrained", None)
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)  # a superuser may write anywhere
    done = run(*GENERATE, "--save-state", "state")
    assert done == (2, "", "fastwkv generate: state cannot be written: Permission denied\n")


MEMORY: dict[str, Callable[[], Exception]] = {
    "not enough memory: the process got no more": MemoryError,
    "not enough memory: CUDA out of memory.": lambda: torch.OutOfMemoryError("CUDA out of memory.\nof which"),
    "not enough memory: can't allocate memory": lambda: RuntimeError("can't allocate memory\nbacktrace"),
}


@pytest.mark.parametrize("message", MEMORY)
def test_lack_of_memory_is_said_in_one_line(message, place, run, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MEMORY[message]()

    monkeypatch.chdir(place)
    monkeypatch.setattr(RWKV4, "from_pretrained", fail)
    assert run(*GENERATE) == (2, "", f"fastwkv generate: {message}\n")


def test_predictions_that_are_not_finite_are_said_in_one_line(model, tmp_path, run) -> None:
    model.save_pretrained(tmp_path / "x")
    broken = RWKV4.from_pretrained(tmp_path / "x")
    torch.nn.init.constant_(broken.ln_out.weight, torch.nan)
    broken.save_pretrained(tmp_path / "x")
    done = run("generate", "--model", tmp_path / "x", *PROMPT, "--temperature", 1)
    message = "the model's predictions are not finite: another --dtype or a larger --temperature may help"
    assert done == (2, "", f"fastwkv generate: {message}\n")


def test_mistakes_of_the_program_are_not_hidden(place, run, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.chdir(place)
    monkeypatch.setattr(RWKV4, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(*GENERATE)


def test_full_disk_is_said_in_one_line(place, capfd, monkeypatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            if self.getvalue():
                self.truncate(self.seek(0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as stopped:
        main(list(GENERATE))
    assert stopped.value.code == 2
    assert capfd.readouterr().err == "fastwkv generate: standard output: No space left on device\n"


def test_version_is_that_of_the_package(run) -> None:
    assert run("--version") == (0, f"fastwkv {fastwkv.__version__}\n", "")


OPTIONS = {
    (): "generate info --version",
    (
        "generate",
    ): """--model --prompt --prompt-file --tokenizer --bytes --tokens --temperature --top-p --seed --stop-token
        --dtype --device --threads --save-state --load-state""",
    ("info",): "PATH --json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_in_lines_of_120(command, run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = run(*command, "--help")
    assert (done.status, done.err) == (0, "")
    for name in OPTIONS[command].split():
        assert f"  {name}" in done.out
    assert max(map(len, done.out.splitlines())) <= 120
