"""Tokenizers: one of Hugging Face's ``tokenizers``, RWKV-4 World's, or the bytes of UTF-8."""

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastwkv.cli.arguments import UsageError
from fastwkv.cli.world import FILE_NAME, WorldTokenizer, read_vocabulary

if TYPE_CHECKING:
    import tokenizers

_BESIDE = ("tokenizer.json", FILE_NAME)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """A tokenizer that encodes a text at once and decodes one token by token."""

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of a text in UTF-8, without special ones."""

    def decode(self, token: int) -> str:
        """Return the text that one more token makes certain, which is empty within a character."""

    def finish(self) -> str:
        """Return a replacement for the rest of the tokens if they end within a character."""


class ByteTokenizer:
    """A tokenizer whose tokens 0 to 255 are bytes; other tokens and invalid UTF-8 are decoded as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: bytes) -> list[int]:
        """See :class:`Tokenizer`; any bytes will do."""
        return list(text)

    def decode(self, token: int) -> str:
        """See :class:`Tokenizer`."""
        return self._decoder.decode(bytes([token])) if token < 256 else self.finish() + _REPLACEMENT

    def finish(self) -> str:
        """See :class:`Tokenizer`."""
        return self._decoder.decode(b"", final=True)


class LibraryTokenizer:
    """The tokenizer of a ``tokenizer.json``."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        from tokenizers.decoders import DecodeStream  # here, since it is an optional dependency

        self._tokenizer = tokenizer
        self._new_stream = DecodeStream
        self._stream = DecodeStream()
        self._held: list[int] = []  # tokens since the last text

    def encode(self, text: bytes) -> list[int]:
        """See :class:`Tokenizer`.

        Raises:
            UsageError: the text is not UTF-8.

        """
        try:
            return list(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids)
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None

    def decode(self, token: int) -> str:
        """See :class:`Tokenizer`."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library raises nothing narrower when invalid UTF-8 changes text that is out already
            self._stream = self._new_stream()
            text = _REPLACEMENT
        self._held = [*self._held, token] if text is None else []
        return text or ""

    def finish(self) -> str:
        """See :class:`Tokenizer`."""
        return self._tokenizer.decode(self._held, skip_special_tokens=False)


def open_tokenizer(tokenizer: Path | None, model: Path, vocab_size: int, as_bytes: bool = False) -> Tokenizer:
    """Return the tokenizer of a model.

    Args:
        tokenizer: the file of the tokenizer; if None, a file beside the model, in its folder.
        model: the path of the model.
        vocab_size: the number of tokens of the model. Without a file, a model of 256 tokens has bytes for tokens.
        as_bytes: whether the first 256 tokens of the model are bytes, whatever files are beside it.

    Raises:
        OSError: the file cannot be opened.
        UsageError: the file is not of a tokenizer, the library is not installed, or there is no file and no bytes.

    """
    if as_bytes:
        return ByteTokenizer()
    folder = model if model.is_dir() else model.parent
    for path in (tokenizer,) if tokenizer is not None else (folder / name for name in _BESIDE):
        if tokenizer is not None or path.exists():
            return _read_tokenizer(path)
    if vocab_size != 256:
        raise UsageError(
            f"give a --tokenizer, or --bytes if the first tokens are the bytes of UTF-8: the model has {vocab_size}"
            f" tokens, and {folder} holds neither {' nor '.join(_BESIDE)}"
        )
    return ByteTokenizer()


def _read_tokenizer(path: Path) -> Tokenizer:
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return WorldTokenizer(read_vocabulary(str(path), content))
    try:
        import tokenizers  # here, since it is an optional dependency
    except ImportError:
        raise UsageError(f"{path} needs the package tokenizers: pip install 'fastwkv[cli]'") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"{path}: not a file of the tokenizers library ({error})") from None
    tokenizer.no_truncation()  # truncation and padding may have been on for training
    tokenizer.no_padding()
    return LibraryTokenizer(tokenizer)
