"""A pool of threads for kernels that release the interpreter lock.

numba has a pool of its own (``parallel=True``), but its default one may not be entered from two threads at once, and
aborts in a forked child of a process that used it: both happen to any program with data loaders and autograd.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch


class _Job:
    """One call of :func:`parallel`: pieces that whoever is free takes, one after the other."""

    def __init__(self, function: Callable[[int], None], pieces: int) -> None:
        self.function = function
        self.pieces = pieces
        self.taken = 0
        self.unfinished = pieces
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()

    def work(self) -> None:
        """Do pieces until there are none left to take."""
        while True:
            with self.lock:
                piece = self.taken
                if piece == self.pieces:
                    return
                self.taken += 1
                skip = self.error is not None
            try:
                if not skip:
                    self.function(piece)
            except BaseException as error:
                self.error = error
            finally:
                with self.lock:
                    self.unfinished -= 1
                    last = self.unfinished == 0
                if last:
                    self.done.release()


class _Pool:
    """Threads that live as long as the process. They are started when they are first needed."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def submit(self, job: _Job, helpers: int) -> None:
        """Ask this many threads to help with a job."""
        if self.size < helpers:
            with self.lock:
                while self.size < helpers:
                    threading.Thread(target=self._serve, name="fastwkv", daemon=True).start()
                    self.size += 1
        for _ in range(helpers):
            self.jobs.put(job)

    def _serve(self) -> None:
        jobs = self.jobs
        while True:
            # A job that is done already when a thread gets to it costs that thread nothing.
            jobs.get().work()


_pool = _Pool()


def _forget_threads() -> None:
    # A forked child has none of its parent's threads, and its locks may be in any state.
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def parallel(function: Callable[[int], None], pieces: int, threads: int | None = None) -> None:
    """Call ``function(0)`` ... ``function(pieces - 1)``, on up to ``torch.get_num_threads()`` threads.

    The calling thread takes its share. Pieces are handed out one by one, so that a thread which the system delays
    takes fewer of them. Any number of threads may call this at once. The first exception is raised again here, after
    the pieces that had begun are done; pieces that had not begun are dropped.
    """
    threads = min(torch.get_num_threads() if threads is None else threads, pieces)
    if threads <= 1:
        for piece in range(pieces):
            function(piece)
        return
    job = _Job(function, pieces)
    _pool.submit(job, threads - 1)
    try:
        job.work()
    finally:
        _wait(job)
    if job.error is not None:
        raise job.error


def _wait(job: _Job) -> None:
    # Even an interrupt waits for the pieces that have begun: they write to memory that the caller would free.
    interrupt = None
    while True:
        try:
            job.done.acquire()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
