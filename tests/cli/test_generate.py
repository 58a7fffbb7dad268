"""``fastwkv generate``: the text of generate(), piece by piece, however it is asked for and whatever ends it."""

import io
import itertools
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastwkv.cli import session
from fastwkv.cli.main import main
from fastwkv.nn import RWKV4, RWKV4State, prefill

PROMPT = "Call me Ishmael."


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model is given in each of its passes."""
    found, features, step = [], RWKV4.features, RWKV4.step_

    def recorded(self: RWKV4, tokens: Tensor, state: RWKV4State | None = None) -> Any:
        found.append(tokens.shape[1])
        return features(self, tokens, state)

    def one_recorded(self: RWKV4, tokens: Tensor, state: RWKV4State) -> Tensor:
        found.append(1)
        return step(self, tokens, state)

    monkeypatch.setattr(RWKV4, "features", recorded)
    monkeypatch.setattr(RWKV4, "step_", one_recorded)
    return found


@pytest.mark.parametrize("format", ["fastwkv", "hf", "blinkdl"])
@pytest.mark.parametrize("draw", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}], ids=["greedy", "drawn"])
def test_text_is_that_of_generate(format, draw, model, tmp_path, run, expected) -> None:
    path = tmp_path / ("model.pth" if format == "blinkdl" else "model")
    model.save_pretrained(path, format)
    options = [part for name, value in draw.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run("generate", "--model", path, "--prompt", PROMPT, "--tokens", 30, *options)
    assert done.status == 0
    assert done.out == expected(PROMPT.encode(), 30, **draw)
    assert len(set(done.out)) > 3


def test_options_of_a_draw_change_the_text(write) -> None:
    texts = {
        write("--prompt", PROMPT, "--tokens", 30, *options)
        for options in (
            (),
            ("--temperature", 1, "--seed", 1),
            ("--temperature", 1, "--seed", 2),
            ("--temperature", 2, "--seed", 1),
            ("--temperature", 1, "--seed", 1, "--top-p", 0.5),
        )
    }
    assert len(texts) == 5


def test_dtype_is_that_of_the_checkpoint_unless_another_is_asked_for(folder, tmp_path, write) -> None:
    for options, dtype in ((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16):
        write("--prompt", PROMPT, "--tokens", 1, *options, "--save-state", tmp_path / "s.safetensors")
        assert RWKV4State.load(tmp_path / "s.safetensors").att_x.dtype == dtype


def test_mixed_checkpoint_is_computed_in_one_dtype(model, tmp_path, run) -> None:
    mixed = RWKV4.from_pretrained(save(model, tmp_path / "model"))
    mixed.blocks[1].attention.key.bfloat16()
    done = run("generate", "--model", save(mixed, tmp_path / "mixed"), "--prompt", PROMPT, "--tokens", 3)
    assert done.status == 0
    assert len(done.out) == 3


def save(model: RWKV4, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def test_prompt_comes_from_a_file_or_standard_input(write, tmp_path, monkeypatch, expected) -> None:
    text = f"{PROMPT} \N{WHALE}\n".encode()
    (tmp_path / "prompt").write_bytes(text)
    wanted = expected(text, 9)
    assert write("--prompt", text.decode(), "--tokens", 9) == wanted
    assert write("--prompt-file", tmp_path / "prompt", "--tokens", 9) == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert write("--prompt-file", "-", "--tokens", 9) == wanted


def test_empty_prompt_starts_after_token_0(write, expected) -> None:
    assert write("--prompt", "", "--tokens", 9) == expected(b"\0", 9)


def test_no_tokens_print_nothing(write, tmp_path) -> None:
    (tmp_path / "prompt").write_bytes("\N{WHALE}".encode()[:2])
    assert write("--prompt-file", tmp_path / "prompt", "--tokens", 0) == ""


def test_text_ends_at_the_stop_token(write) -> None:
    draw = ("--prompt", PROMPT, "--tokens", 60, "--temperature", 1, "--seed", 5)
    whole = write(*draw)
    stop = whole[20]
    assert write(*draw, "--stop-token", ord(stop)) == whole[: whole.index(stop)]


def test_threads_are_those_asked_for(write, monkeypatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    write("--prompt", PROMPT, "--tokens", 1, "--threads", 1)
    assert found == [1]


def test_long_prompt_is_read_in_pieces(write, lengths, monkeypatch) -> None:
    whole = write("--prompt", PROMPT, "--tokens", 12)
    assert lengths == [len(PROMPT) - 1, *[1] * 12]
    for piece in (1, 3, 5):  # 5 divides what is read before the first new token
        lengths.clear()
        monkeypatch.setattr(prefill, "PIECE", piece)
        assert write("--prompt", PROMPT, "--tokens", 12) == whole
        assert max(lengths) == piece
        assert sum(lengths) == len(PROMPT) - 1 + 12


def test_logits_are_of_one_position_only(write, model, monkeypatch) -> None:
    shapes, forward = [], torch.nn.Linear.forward

    def recorded(self: torch.nn.Linear, x: Tensor) -> Tensor:
        if self.out_features == 256:
            shapes.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", recorded)
    write("--prompt", PROMPT * 20, "--tokens", 2)
    assert shapes == [(1, 16)] * 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder(io.StringIO):
    """Standard output that remembers what had been flushed after how many passes of the model."""

    def __init__(self, passes: list[int]) -> None:
        super().__init__()
        self.passes = passes
        self.seen: dict[int, str] = {}

    def flush(self) -> None:
        self.seen[len(self.passes)] = self.getvalue()


def test_each_token_is_out_before_the_next(folder, lengths, expected, monkeypatch) -> None:
    recorder = Recorder(lengths)
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, "--tokens", "6"]) == 0
    whole = expected(PROMPT.encode(), 6)
    assert recorder.seen == {n + 1: whole[:n] for n in range(1, 7)}  # the first pass reads


@pytest.mark.parametrize(
    ("options", "report"),
    [
        (("--prompt", PROMPT), "read 16 tokens (8.0 tokens/s), generated 5 tokens (1.0 tokens/s)"),
        (("--prompt", PROMPT, "--tokens", 1), "read 16 tokens (8.0 tokens/s), generated 1 token"),
        (("--prompt", PROMPT, "--tokens", 0), "read 16 tokens (16.0 tokens/s), generated 0 tokens"),
        (("--prompt", "C"), "read 1 token (1.0 tokens/s), generated 5 tokens (1.0 tokens/s)"),
    ],
)
def test_report_says_how_fast_each_part_was(options, report, folder, run, monkeypatch) -> None:
    # Every look at the clock is a second after the last: at the start, after the prompt, and at each new token.
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    done = run("generate", "--model", folder, "--tokens", 5, *options)
    assert done.err == f"fastwkv: {report}\n"


def test_terminal_shows_progress_and_a_file_does_not(folder, run, monkeypatch) -> None:
    monkeypatch.setattr(prefill, "PIECE", 10)
    done = run("generate", "--model", folder, "--prompt", PROMPT, "--tokens", 0, stderr=Terminal())
    assert re.findall(r"read (\d+) of 16 tokens", done.err) == ["11", "16"]
    assert "\x1b[K\nfastwkv: read 16" in done.err  # the line is cleared before the report


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let Ctrl-C come in this pass of the model."""
    passes: list[str] = []

    def stop(name: str) -> None:
        method = getattr(RWKV4, name)

        def stopping(self: RWKV4, *args: Any) -> Any:
            passes.append(name)
            result = method(self, *args)
            if len(passes) == after:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(RWKV4, name, stopping)

    stop("features")
    stop("step_")


@pytest.mark.parametrize("after", [1, 3, 5, 9])  # of 4 passes that read and 8 that write
def test_interrupted_text_is_continued_exactly(after, folder, tmp_path, write, run, monkeypatch) -> None:
    monkeypatch.setattr(prefill, "PIECE", 4)
    state = tmp_path / "s.safetensors"
    whole = write("--prompt", PROMPT, "--tokens", 8)
    with monkeypatch.context() as patched:
        interrupted(patched, after)
        done = run("generate", "--model", folder, "--prompt", PROMPT, "--tokens", 8, "--save-state", state)
    assert done.status == 130
    assert done.out == whole[: max(after - 5, 0)]
    count = re.match(r"fastwkv: read (\d+) tokens?", done.err)
    assert count
    assert int(count[1]) == min(1 + 4 * (after - 1), len(PROMPT))
    rest = PROMPT[int(count[1]) :]
    assert done.out + write("--load-state", state, "--prompt", rest, "--tokens", 8 - len(done.out)) == whole


def test_interruption_while_the_model_is_loaded_ends_quietly(folder, tmp_path, run, monkeypatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RWKV4, "from_pretrained", stop)
    state = tmp_path / "s.safetensors"
    assert run("generate", "--model", folder, "--prompt", PROMPT, "--save-state", state) == (130, "", "")
    assert not state.exists()


def test_reader_that_is_gone_ends_it_quietly(folder, tmp_path, write, capfd) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    state = tmp_path / "s.safetensors"
    arguments = ["generate", "--model", str(folder), "--prompt", PROMPT, "--save-state", str(state)]
    with pytest.MonkeyPatch.context() as patched, os.fdopen(writer, "w") as pipe:
        patched.setattr(sys, "stdout", pipe)
        assert main(arguments) == 141
    assert capfd.readouterr() == ("", "")
    assert write("--load-state", state, "--tokens", 4) == write("--prompt", PROMPT, "--tokens", 4)


def test_help_that_nobody_reads_ends_quietly(capfd) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.MonkeyPatch.context() as patched, os.fdopen(writer, "w") as pipe:
        patched.setattr(sys, "stdout", pipe)
        assert main(["--help"]) == 141
    assert capfd.readouterr() == ("", "")


def test_characters_that_standard_output_cannot_encode_are_replaced(folder, monkeypatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    monkeypatch.setattr("fastwkv.cli.tokenizer.ByteTokenizer.decode", lambda *_: "\N{WHALE}")
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, "--tokens", "2"]) == 0
    assert out.getvalue() == b"??"
