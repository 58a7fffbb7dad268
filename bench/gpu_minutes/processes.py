"""Processes that may hang or die: each the head of a group of its own, which ends as a whole.

Lines that one prints on stdout are handed over as they come, and its stderr as bytes. Should the process that started
them be killed, the system ends them too.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.light import NOT_AVAILABLE

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0  # seconds for a process that is asked to end
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # not loaded between fork and exec


def environment(**more: str) -> dict[str, str]:
    """Return that of a process which finds the package and bench/, installed or not."""
    paths = [str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # torch.compile then compiles with one process for each of ours.
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ, **fixed, **more}


def _of_its_own() -> None:
    os.setsid()
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Running:
    """A process, when it began, and the threads that read what it writes."""

    name: str
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    readers: list[threading.Thread] = field(default_factory=list)
    asked: float | None = None
    """When it was asked to end."""
    ended: float | None = None

    def status(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        if self.asked is not None:
            return "out of time"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return {0: "passed", NOT_AVAILABLE: "not available"}.get(code, "failed")

    def seconds(self) -> float:
        """Return how long it ran."""
        return (self.ended or time.monotonic()) - self.began


def start(
    name: str,
    command: Sequence[str],
    on_line: Callable[[str, str], None],
    on_noise: Callable[[str, bytes], None],
    surroundings: Mapping[str, str],
    nice: int = 0,
) -> Running:
    """Start a command. Call this in the main thread: when the thread ends that started a process, so does that."""
    process = subprocess.Popen(
        ["nice", "-n", str(nice), *command] if nice else command,
        cwd=ROOT,
        env=surroundings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_of_its_own,
    )
    running = Running(name, process)

    def lines() -> None:
        for line in process.stdout or ():
            on_line(name, line.decode(errors="replace").rstrip("\n"))

    def noise() -> None:
        while process.stderr and (block := os.read(process.stderr.fileno(), 65536)):
            on_noise(name, block)

    for read in (lines, noise):
        running.readers.append(threading.Thread(target=_read, args=(read,), daemon=True))
        running.readers[-1].start()
    return running


def _read(read: Callable[[], None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        read()


def wait(running: Iterable[Running], deadlines: Mapping[str, float], grace: float = GRACE) -> None:
    """Wait until all have ended; one that reaches its deadline is asked to end, and ended ``grace`` seconds later."""
    left = list(running)
    while left:
        now = time.monotonic()
        for one in left:
            if one.process.poll() is not None or (one.asked is not None and now > one.asked + grace):
                finish(one)
            elif one.asked is None and now > deadlines[one.name]:
                ask(one)
        left = [one for one in left if one.ended is None]
        if left:
            time.sleep(0.02)


def ask(one: Running) -> None:
    """Ask a process and its children to end."""
    one.asked = time.monotonic()
    _signal(one, signal.SIGTERM)


def finish(one: Running) -> None:
    """End what is left of a process and its children, and read what it had written."""
    _signal(one, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
        one.process.wait(GRACE)
    one.ended = time.monotonic()
    for reader in one.readers:  # the end of a process that has left the group is not waited for
        reader.join(1.0)


def _signal(one: Running, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process.pid, kind)


@contextlib.contextmanager
def signals(handler: object, *kinds: signal.Signals) -> Iterator[None]:
    """Let signals be handled so meanwhile."""
    before = [signal.signal(kind, handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, previous in zip(kinds, before, strict=True):
            signal.signal(kind, previous)
