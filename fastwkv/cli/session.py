"""One text of the command line, which is read, continued, and saved however the command ends."""

import sys
import time
from pathlib import Path
from typing import Any

from fastwkv.cli.output import progress, write
from fastwkv.cli.position import Position, advance
from fastwkv.cli.tokenizer import Tokenizer
from fastwkv.nn import RWKV4, generate, prefill

# The number of tokens before the new text on which its decoding may depend: parts of a character, or the space after a
# word.
_CONTEXT = 8


class Session:
    """A text that is being read or written.

    Args:
        model: the model that reads and writes.
        tokenizer: the tokenizer of the model.
        position: the position to begin at.
        tokens: the rest of the prompt.
        read: the number of tokens of the prompt that ``position`` holds already.

    """

    def __init__(
        self, model: RWKV4, tokenizer: Tokenizer, position: Position, tokens: list[int], read: int = 0
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._position = position  # replaced as a whole, so that it is right after an interruption
        self._context = [position.last_token, *tokens[-_CONTEXT:]]
        self._tokens = tokens
        self._read = read
        self._generated = 0
        self._started = self._read_until = self._written_until = time.perf_counter()

    def run(self, count: int, stop_token: int | None, save_state: Path | None, sampling: dict[str, Any]) -> int:
        """Read the prompt and print ``count`` new tokens; return the exit status.

        Args:
            count: the number of tokens; fewer come if ``stop_token`` does.
            stop_token: the token that ends the text.
            save_state: the file to write the position to, even if the text is cut short.
            sampling: options of :func:`fastwkv.nn.generate`.

        Raises:
            OSError: the text or the state cannot be written.

        """
        status = 0
        try:
            self._read_prompt()
            self._write_text(count, stop_token, sampling)
        except KeyboardInterrupt:
            status = 130
        finally:
            if save_state:
                self._position.save(save_state)
        self._report()
        return status

    def _read_prompt(self) -> None:
        total = self._read + len(self._tokens)
        step = prefill.piece_length(batch=1)
        for start in range(0, len(self._tokens), step):
            piece = self._tokens[start : start + step]
            self._position = advance(self._model, self._position, piece)
            self._read += len(piece)
            self._read_until = time.perf_counter()
            progress(f"read {self._read:,} of {total:,} tokens")
        progress("")

    def _write_text(self, count: int, stop_token: int | None, sampling: dict[str, Any]) -> None:
        for token in self._context:
            self._tokenizer.decode(token)
        generation = generate(self._model, self._position.unread(), count, state=self._position.state, **sampling)
        for tensor in generation:
            token = int(tensor)
            self._written_until = time.perf_counter()
            if not self._generated:
                self._read_until = self._written_until
            self._generated += 1
            stopped = token == stop_token
            if not stopped:
                write(self._tokenizer.decode(token))
            assert generation.state is not None
            self._position = Position(generation.state, token)
            if stopped:
                break
        if self._generated:
            write(self._tokenizer.finish())

    def _report(self) -> None:
        """Print the speeds. The first prediction counts as reading: its logits are those of the prompt."""
        read = _speed(self._read, self._read, self._read_until - self._started)
        generated = _speed(self._generated, self._generated - 1, self._written_until - self._read_until)
        new_line = "\n" if sys.stderr.isatty() else ""  # after a text that may end anywhere
        print(f"{new_line}fastwkv: read {read}, generated {generated}", file=sys.stderr)


def _speed(tokens: int, timed: int, seconds: float) -> str:
    count = f"{tokens:,} token{'s' * (tokens != 1)}"
    return f"{count} ({timed / seconds:,.1f} tokens/s)" if timed > 0 and seconds > 0 else count
