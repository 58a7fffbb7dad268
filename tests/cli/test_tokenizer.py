"""Text to tokens and back: no character is torn, no special token added, whatever the tokenizer file asks for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastwkv.cli.arguments import UsageError
from fastwkv.cli.tokenizer import ByteTokenizer, LibraryTokenizer, Tokenizer, open_tokenizer
from fastwkv.nn import RWKV4, RWKV4Config

tokenizers = pytest.importorskip("tokenizers")
SAMPLE = "größer, 日本語, 🙂 and ſ"


def byte_level() -> "tokenizers.Tokenizer":
    """A small tokenizer of the kind that the Pile models have: 256 bytes and a few merges, after end of text."""
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": pre.alphabet(), "special_tokens": ["<|endoftext|>"], "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, **options)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    return tokenizer


def word_level() -> "tokenizers.Tokenizer":
    """Words that carry the space before them, which the first of a text loses."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return tokenizer


def byte_fallback() -> "tokenizers.Tokenizer":
    """Bytes that are text or not by what follows them: what is out already may turn out to be wrong."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    of = tokenizers.decoders
    tokenizer.decoder = of.Sequence([of.Replace("▁", " "), of.ByteFallback(), of.Fuse(), of.Strip(" ", 1, 0)])
    return tokenizer


def decoded(text: Tokenizer, tokens: list[int]) -> str:
    return "".join(map(text.decode, tokens)) + text.finish()


@given(st.binary(max_size=30))
def test_bytes_are_decoded_as_a_whole_would_be(data: bytes) -> None:
    assert decoded(ByteTokenizer(), ByteTokenizer().encode(data)) == data.decode("utf-8", "replace")


def test_character_of_several_bytes_comes_with_its_last() -> None:
    text = ByteTokenizer()
    assert [text.decode(byte) for byte in "a🙂é".encode()] == ["a", "", "", "", "🙂", "", "é"]


def test_tokens_that_are_no_bytes_are_replaced() -> None:
    text = ByteTokenizer()
    assert [text.decode(token) for token in (97, 256, 0xC3, 50000, 98)] == ["a", "\ufffd", "", "\ufffd\ufffd", "b"]


@given(st.lists(st.integers(0, 269), max_size=30))
def test_tokens_of_a_tokenizer_are_decoded_as_a_whole_would_be(tokens: list[int]) -> None:
    tokenizer = byte_level()
    assert decoded(LibraryTokenizer(tokenizer), tokens) == tokenizer.decode(tokens, skip_special_tokens=False)


def test_character_of_several_tokens_comes_with_its_last() -> None:
    text = LibraryTokenizer(byte_level())
    pieces = [text.decode(token) for token in text.encode("a🙂é".encode())]
    assert pieces == ["a", "", "", "", "🙂", "", "é"]


def test_what_the_library_cannot_stream_is_replaced() -> None:
    text = LibraryTokenizer(byte_fallback())
    # The byte after "A" begins a character that does not come, by which the library then takes both for invalid.
    assert [text.decode(token) for token in (65, 195, 256, 66)] == ["A", "", "\ufffd", "B"]


def test_text_survives_the_round_trip_without_special_tokens() -> None:
    tokenizer = byte_level()
    template = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.post_processor = template
    text = LibraryTokenizer(tokenizer)
    tokens = text.encode(SAMPLE.encode())
    assert 0 not in tokens
    assert decoded(text, tokens) == SAMPLE


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "t.json"))
    text = open_tokenizer(tmp_path / "t.json", tmp_path, 270)
    assert decoded(text, text.encode(SAMPLE.encode())) == SAMPLE


def test_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the prompt is not UTF-8: .* at byte 2"):
        LibraryTokenizer(byte_level()).encode(b"ab\xffc")


def test_tokenizer_is_that_asked_for_or_that_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    word_level().save(str(tmp_path / "model" / "tokenizer.json"))
    byte_level().save(str(tmp_path / "asked for.json"))
    (tmp_path / "model" / "x.pth").touch()
    for model in (tmp_path / "model", tmp_path / "model" / "x.pth"):
        assert open_tokenizer(None, model, 256).encode(b"two one") == [1, 0]
        assert len(open_tokenizer(tmp_path / "asked for.json", model, 270).encode(b"two one")) > 2
    assert isinstance(open_tokenizer(None, tmp_path, 256), ByteTokenizer)


def scripted(width: int, tokens: list[int]) -> RWKV4:
    """A model that follows each of these tokens by the next one, and the last by the first."""
    model = RWKV4(RWKV4Config(layers=1, width=width, vocab_size=width))
    with torch.no_grad():
        for parameter in (model.blocks[0].attention.output.weight, model.blocks[0].feed_forward.value.weight):
            parameter.zero_()
        model.embeddings.weight.copy_(torch.eye(width))
        model.head.weight.zero_()
        for token, following in zip(tokens, tokens[1:] + tokens[:1], strict=True):
            model.head.weight[following, token] = 1
    return model


def test_prompt_cut_within_a_character_is_mended_by_the_next_tokens(tmp_path: Path, run) -> None:
    scripted(256, list("🙂x".encode())).save_pretrained(tmp_path / "model")
    (tmp_path / "prompt").write_bytes("🙂x🙂".encode()[:-2])
    done = run("generate", "--model", tmp_path / "model", "--prompt-file", tmp_path / "prompt", "--tokens", 3)
    assert done.out == "🙂x"


def test_text_cut_within_a_character_ends_with_a_replacement(tmp_path: Path, run) -> None:
    scripted(256, list("x🙂".encode())).save_pretrained(tmp_path / "model")
    done = run("generate", "--model", tmp_path / "model", "--prompt", "x", "--tokens", 7)
    assert done.out == "🙂x\ufffd"


def test_new_text_keeps_the_space_before_its_first_word(tmp_path: Path, run) -> None:
    scripted(3, [0, 1]).save_pretrained(tmp_path / "model")
    word_level().save(str(tmp_path / "model" / "tokenizer.json"))
    done = run("generate", "--model", tmp_path / "model", "--prompt", "one", "--tokens", 3)
    assert done.out == " two one two"


def test_bytes_beside_a_larger_vocabulary_are_taken_if_asked_for(tmp_path: Path, run) -> None:
    scripted(300, [97, 98, 299]).save_pretrained(tmp_path / "model")
    generate = ("generate", "--model", tmp_path / "model", "--prompt", "a", "--tokens", 3)
    assert run(*generate)[:2] == (2, "")
    done = run(*generate, "--bytes")
    assert done.out == "b\ufffda"
    assert done.err.startswith("fastwkv: read 1 token")


def test_bytes_pass_over_the_tokenizer_beside_the_model(tmp_path: Path, run) -> None:
    scripted(256, list(b"abc")).save_pretrained(tmp_path / "model")
    word_level().save(str(tmp_path / "model" / "tokenizer.json"))
    done = run("generate", "--model", tmp_path / "model", "--prompt", "a", "--tokens", 2, "--bytes")
    assert done.out == "bc"


def test_missing_library_is_named(tmp_path: Path, folder: Path, run, monkeypatch) -> None:
    byte_level().save(str(tmp_path / "t.json"))
    for module in [name for name in sys.modules if name.split(".")[0] == "tokenizers"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert run("generate", "--model", folder, "--prompt", "a", "--tokens", 1).status == 0
    done = run("generate", "--model", folder, "--prompt", "a", "--tokenizer", tmp_path / "t.json")
    wanted = f"fastwkv generate: {tmp_path / 't.json'} needs the package tokenizers: pip install 'fastwkv[cli]'\n"
    assert done == (2, "", wanted)


def test_special_tokens_are_printed(tmp_path: Path, run) -> None:
    tokenizer = byte_level()
    a = tokenizer.token_to_id("a")
    scripted(270, [a, 0]).save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["added_tokens"][0]["special"]
    done = run("generate", "--model", tmp_path / "model", "--prompt", "a", "--tokens", 2)
    assert done.out == "<|endoftext|>a"
