"""--save-state and --load-state: a text that was read once, continued as if it had never been put down."""

from pathlib import Path

import pytest
import torch
from rwkv4_models import SAME, distance, fields
from safetensors.torch import load_file, save_file

from fastwkv.nn import RWKV4State

PROMPT = "It was the best of times, it was the worst of times"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "text"  # any name will do


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_continued_text_is_exactly_that_of_one_run(dtype, state, write) -> None:
    whole = write("--prompt", PROMPT, "--tokens", 12, "--dtype", dtype)
    for cut in (0, 1, 7, 12):
        first = write("--prompt", PROMPT, "--tokens", cut, "--dtype", dtype, "--save-state", state)
        assert first == whole[:cut]
        assert write("--load-state", state, "--tokens", 12 - cut, "--dtype", dtype) == whole[cut:]


def test_state_is_that_of_the_model_after_all_but_the_last_token(state, write, model) -> None:
    text = PROMPT + write("--prompt", PROMPT, "--tokens", 5, "--save-state", state)
    tensors = load_file(state)
    assert tensors.pop("last_token").tolist() == [ord(text[-1])]
    with torch.no_grad():
        _, expected = model(torch.tensor([list(text[:-1].encode())]))
    assert tensors.keys() == expected.tensors().keys()
    for name, field in fields(RWKV4State.from_tensors(tensors)).items():
        assert distance(field, fields(expected)[name]) < SAME, name


@pytest.mark.parametrize("cut", [1, 20, len(PROMPT) - 1, len(PROMPT)])
def test_prompt_in_two_parts_is_one_prompt(cut, state, write) -> None:
    write("--prompt", PROMPT[:cut], "--tokens", 0, "--save-state", state)
    continued = write("--load-state", state, "--prompt", PROMPT[cut:], "--tokens", 10)
    assert continued == write("--prompt", PROMPT, "--tokens", 10)


def test_one_file_is_continued_many_times(state, write) -> None:
    write("--prompt", PROMPT, "--tokens", 0, "--save-state", state)
    before = state.read_bytes()
    draw = ("--load-state", state, "--tokens", 20, "--temperature", 1, "--seed")
    first, second = write(*draw, 1), write(*draw, 2)
    assert first == write(*draw, 1) != second
    assert state.read_bytes() == before


def test_file_is_replaced_by_its_continuation(state, write) -> None:
    text = write("--prompt", PROMPT, "--tokens", 3, "--save-state", state)
    for _ in range(3):
        text += write("--load-state", state, "--tokens", 3, "--save-state", state)
    assert text == write("--prompt", PROMPT, "--tokens", 12)


def test_text_after_the_stop_token_begins_with_it(state, write) -> None:
    whole = write("--prompt", PROMPT, "--tokens", 20)
    stop = whole[4]
    cut = whole.index(stop) + 1
    write("--prompt", PROMPT, "--stop-token", ord(stop), "--save-state", state)
    assert write("--load-state", state, "--tokens", 20 - cut) == whole[cut:]


def test_size_does_not_depend_on_the_text(state, write) -> None:
    sizes = set()
    for length in (1, 10, 1000):
        write("--prompt", "x" * length, "--tokens", 0, "--save-state", state)
        sizes.add(state.stat().st_size)
    assert len(sizes) == 1


def _without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGE = {
    "it has no 'last_token'": _without("last_token"),
    "it has no 'wkv.den'": _without("wkv.den"),
    "last_token must be torch.int64 [1], got torch.int64 [2]": lambda t: {**t, "last_token": torch.zeros(2).long()},
    "last_token must be torch.int64 [1], got torch.int32 [1]": lambda t: {**t, "last_token": torch.zeros(1).int()},
    "last_token 256 is outside the vocabulary of 256": lambda t: {**t, "last_token": torch.tensor([256])},
    "last_token -1 is outside the vocabulary of 256": lambda t: {**t, "last_token": torch.tensor([-1])},
    "state.att_x must be [L, B, D] = [2, 1, 16]": lambda t: {**t, "att_x": torch.zeros(3, 1, 16)},
    "state.ffn_x must be torch.float32, got torch.bfloat16": lambda t: {**t, "ffn_x": t["ffn_x"].bfloat16()},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_state_of_something_else_is_refused(message, folder, state, write, run) -> None:
    write("--prompt", PROMPT, "--tokens", 0, "--save-state", state)
    save_file(DAMAGE[message](load_file(state)), state)
    done = run("generate", "--model", folder, "--load-state", state)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"fastwkv generate: {state}: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_failure_to_save_is_said_in_one_line(folder, state, run, monkeypatch) -> None:
    def full(tensors, path, metadata):
        save_file(tensors, Path(path).with_name("no such folder") / "x", metadata)

    monkeypatch.setattr("fastwkv.nn.tensor_files.save_file", full)
    done = run("generate", "--model", folder, "--prompt", PROMPT, "--tokens", 2, "--save-state", state)
    assert done.status == 2
    assert done.err.startswith(f"fastwkv generate: {state}: ")
    assert done.err.count("\n") == 1
