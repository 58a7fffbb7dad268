"""The vocabulary of RWKV-4 World, in a file as its authors wrote it: token, Python's literal, length in bytes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastwkv.cli.arguments import UsageError
from fastwkv.cli.tokenizer import open_tokenizer
from fastwkv.cli.world import FILE_NAME, WorldTokenizer, read_vocabulary
from fastwkv.nn import RWKV4, RWKV4Config

LONGER = [
    "\t\t",
    "\n\n",
    "'\"",
    " the",
    " there",
    "the",
    "ab",
    "abc",
    "abcd",
    "größe",
    "日本",
    "🙂",
    b"\xe6\x97",
    b"\xf0\x9f",
]


def line(token: int, string: str | bytes) -> str:
    return f"{token} {string!r} {len(string.encode() if isinstance(string, str) else string)}\n"


def vocabulary(longer: list[str | bytes] = LONGER) -> bytes:
    """Bytes come first, the upper half as literals of bytes; token 0 is not in the file."""
    single = [chr(n) if n < 128 else bytes([n]) for n in range(256)]
    return "".join(line(token, string) for token, string in enumerate([*single, *longer], 1)).encode()


TEXT = WorldTokenizer(read_vocabulary("v", vocabulary()))


@given(st.binary() | st.text("abcdthe r größ日本🙂\t\n").map(str.encode))
def test_tokens_are_the_longest_from_the_start_and_give_the_bytes_back(text: bytes) -> None:
    strings = read_vocabulary("v", vocabulary())
    rest = text
    for token in TEXT.encode(text):
        longest = max((s for s in strings.values() if rest.startswith(s)), key=len)
        assert strings[token] == longest
        rest = rest[len(longest) :]
    assert rest == b""


@given(st.text("abcdthe r größ日本🙂\t\n"))
def test_text_decoded_token_by_token_is_the_text(text: str) -> None:
    new = WorldTokenizer(read_vocabulary("v", vocabulary()))
    assert "".join(map(new.decode, new.encode(text.encode()))) + new.finish() == text


def test_token_that_stands_for_nothing_is_a_replacement() -> None:
    first_half = TEXT.encode("日".encode())[0]
    assert [TEXT.decode(token) for token in (first_half, 0, 98, 99999)] == ["", "\ufffd\ufffd", "a", "\ufffd"]


DAMAGE = {
    "line 2 is no token, its string and its length": b"1 'a' 1\n2 'b'\n",
    "line 1 is no token, its string and its length": b"\x89PNG\r\n",
    "v: neither a file of the tokenizers library nor the vocabulary": b"[1, 2]",
    f"the vocabulary of RWKV-4 World, {FILE_NAME}: line 257 is no": vocabulary([]) + b"257 'ab' 3\n",
    "line 258 is no": vocabulary(["ab"]) + b"258 open('x') 1\n",
    "line 3 is no": b"1 'a' 1\n2 'b' 1\n2 'c' 1\n",
    "line 4 is no": b"1 'a' 1\n2 'b' 1\n3 'c' 1\n4 '' 0\n",
    "line 5 is no": b"1 'a' 1\n2 'b' 1\n3 'c' 1\n4 'd' 1\n5 (((((( 1\n",
    "it has no token for the byte b'\\x01'": line(1, "\0").encode(),
    "it has no token for the byte b'\\x00'": b"",
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_vocabulary_is_refused(message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_vocabulary("v", DAMAGE[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_is_that_asked_for_or_that_beside_the_model(tmp_path: Path, run) -> None:
    strings = read_vocabulary("v", vocabulary())
    the, there = (next(t for t, s in strings.items() if s == string) for string in (b" the", b" there"))
    model = RWKV4(RWKV4Config(layers=1, width=300, vocab_size=300))
    with torch.no_grad():
        for parameter in (model.blocks[0].attention.output.weight, model.blocks[0].feed_forward.value.weight):
            parameter.zero_()
        model.embeddings.weight.copy_(torch.eye(300))
        model.head.weight.zero_()
        model.head.weight[there, the] = model.head.weight[the, there] = 1  # one after the other
    model.save_pretrained(tmp_path / "model")
    generate = ("generate", "--model", tmp_path / "model", "--prompt", " the", "--tokens", 3)
    (tmp_path / "asked for").write_bytes(vocabulary())
    assert run(*generate, "--tokenizer", tmp_path / "asked for").out == " there the there"
    (tmp_path / "model" / FILE_NAME).write_bytes(vocabulary())
    assert run(*generate).out == " there the there"
    assert isinstance(open_tokenizer(None, tmp_path / "model", 300), WorldTokenizer)
