"""Standard output that is read while it is written, and a line of progress for a terminal."""

import io
import os
import sys
from contextlib import suppress


def write(text: str) -> None:
    """Print at once.

    Raises:
        OSError: the reader is gone (BrokenPipeError), or the disk is full. No output is kept for later then.

    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with suppress(io.UnsupportedOperation):  # a stand-in for standard output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
        error.filename = "standard output"
        raise


def replace_unencodable() -> None:
    """Print "?" for characters that the encoding of standard output lacks, in place of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def progress(line: str) -> None:
    """Show a line in place of the last one, if there is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)  # ESC [ K clears the line
