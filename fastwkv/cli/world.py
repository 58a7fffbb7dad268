"""The tokens of RWKV-4 World, from the file of its authors: ``rwkv_vocab_v20230424.txt``."""

import ast
import codecs
from collections.abc import Mapping

from fastwkv.cli.arguments import UsageError

FILE_NAME = "rwkv_vocab_v20230424.txt"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class WorldTokenizer:
    """A tokenizer whose tokens are strings of bytes, one for each byte too; a text is cut into the longest, in order.

    Token 0, the end of a text, has no bytes. It, tokens that the file lacks, and invalid UTF-8 are decoded as U+FFFD.
    """

    def __init__(self, vocabulary: Mapping[int, bytes]) -> None:
        self._bytes = vocabulary
        self._tokens = {string: token for token, string in vocabulary.items()}
        lengths: dict[bytes, set[int]] = {}  # of the strings that begin with these two bytes
        for string in self._tokens:
            lengths.setdefault(string[:2], set()).add(len(string))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of a text; any bytes will do."""
        tokens, start = [], 0
        while start < len(text):
            for length in (*self._lengths.get(text[start : start + 2], ()), 1):
                string = text[start : start + length]
                if string in self._tokens:
                    break
            tokens.append(self._tokens[string])
            start += len(string)
        return tokens

    def decode(self, token: int) -> str:
        """Return the text that one more token makes certain."""
        string = self._bytes.get(token)
        return self.finish() + _REPLACEMENT if string is None else self._decoder.decode(string)

    def finish(self) -> str:
        """Return a replacement for the rest of the tokens if they end within a character."""
        return self._decoder.decode(b"", final=True)


def read_vocabulary(name: str, content: bytes) -> dict[int, bytes]:
    """Return the strings of the tokens: a line holds a token, its string as Python writes it, and its length in bytes.

    Args:
        name: the name of the file, for messages.
        content: the content of the file.

    Raises:
        UsageError: the file is another, or damaged.

    """
    vocabulary: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rest = line.decode().split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            string = ast.literal_eval(literal)
            string = string.encode() if isinstance(string, str) else string
            if not isinstance(string, bytes) or not len(string) == int(length) > 0 or int(token) in vocabulary:
                raise ValueError
            vocabulary[int(token)] = string
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the errors of literal_eval
            raise UsageError(
                f"{name}: neither a file of the tokenizers library nor the vocabulary of RWKV-4 World, {FILE_NAME}:"
                f" line {number} is no token, its string and its length"
            ) from None
    if missing := {bytes([n]) for n in range(256)}.difference(vocabulary.values()):
        raise UsageError(f"{name}: not the vocabulary of RWKV-4 World: it has no token for the byte {min(missing)!r}")
    return vocabulary
