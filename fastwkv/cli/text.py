"""Between text and tokens: a tokenizer of Hugging Face's ``tokenizers``, RWKV-4 World's, or the bytes of UTF-8."""

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastwkv.cli.arguments import UsageError
from fastwkv.cli.world import FILE_NAME, WorldText, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BESIDE = ("tokenizer.json", FILE_NAME)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text(Protocol):
    """Encodes a text at once and decodes one token by token."""

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of a text in UTF-8, without special ones."""

    def decode(self, token: int) -> str:
        """Return the text that is certain now, after one more token: empty within a character."""

    def finish(self) -> str:
        """Return what stands for the rest, where the tokens end within a character."""


class ByteText:
    """Tokens 0 to 255 are bytes; what is no UTF-8, and any other token, is decoded as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: bytes) -> list[int]:
        """See :class:`Text`; any bytes will do."""
        return list(text)

    def decode(self, token: int) -> str:
        """See :class:`Text`."""
        return self._decoder.decode(bytes([token])) if token < 256 else self.finish() + _REPLACEMENT

    def finish(self) -> str:
        """See :class:`Text`."""
        return self._decoder.decode(b"", final=True)


class TokenizerText:
    """Tokens of a ``tokenizer.json``."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._new_stream = DecodeStream
        self._stream = DecodeStream()
        self._held: list[int] = []  # tokens since the last text

    def encode(self, text: bytes) -> list[int]:
        """See :class:`Text`.

        Raises:
            UsageError: the text is not UTF-8.

        """
        try:
            return list(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids)
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None

    def decode(self, token: int) -> str:
        """See :class:`Text`."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # nothing narrower; bytes that are no UTF-8 turned text that is out into U+FFFD
            self._stream = self._new_stream()
            text = _REPLACEMENT
        self._held = [*self._held, token] if text is None else []
        return text or ""

    def finish(self) -> str:
        """See :class:`Text`."""
        return self._tokenizer.decode(self._held, skip_special_tokens=False)


def open_text(tokenizer: Path | None, model: Path, vocab_size: int, as_bytes: bool = False) -> Text:
    """Return what encodes and decodes.

    Args:
        tokenizer: the file to use; if None the one beside the model, in its folder, if there is one.
        model: the path of the model.
        vocab_size: tokens of the model. Those of 256 are the bytes, where there is no file.
        as_bytes: they are the first 256 of this model too, whatever is beside it.

    Raises:
        OSError: the file cannot be opened.
        UsageError: it is no tokenizer, the library is not installed, or there is none for such a model.

    """
    if as_bytes:
        return ByteText()
    folder = model if model.is_dir() else model.parent
    for path in (tokenizer,) if tokenizer is not None else (folder / name for name in _BESIDE):
        if tokenizer is not None or path.exists():
            return _read_tokenizer(path)
    if vocab_size != 256:
        raise UsageError(
            f"give a --tokenizer, or --bytes if the first tokens are the bytes of UTF-8: the model has {vocab_size}"
            f" tokens, and {folder} holds neither {' nor '.join(_BESIDE)}"
        )
    return ByteText()


def _read_tokenizer(path: Path) -> Text:
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return WorldText(read_vocabulary(str(path), content))
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(f"{path} needs the package tokenizers: pip install 'fastwkv[cli]'") from None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"{path}: not a file of the tokenizers library ({error})") from None
    tokenizer.no_truncation()  # for training they may have been on
    tokenizer.no_padding()
    return TokenizerText(tokenizer)
