"""Ctrl-C while the command starts: its own code runs only after the import of PyTorch, which takes seconds."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def end_when_interrupted() -> None:
    """If this process is the command ``fastwkv``, let Ctrl-C end it at once, with status 130 and without output.

    An exception would print a traceback, and C code that imports Python modules may take it for another error.
    """
    in_charge = _is_the_command() and threading.current_thread() is threading.main_thread()
    if in_charge and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is ignored
        signal.signal(signal.SIGINT, _end)


def interrupt_as_usual() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _is_the_command() -> bool:
    """Return whether Python was started as ``python -m fastwkv`` or by the script of this name."""
    if sys.argv[:1] == ["-m"]:  # argv while Python looks for the module, which imports its package
        return sys.orig_argv[-len(sys.argv) :][:1] in (["fastwkv"], ["-mfastwkv"])
    return Path(*sys.argv[:1]).stem == "fastwkv"
