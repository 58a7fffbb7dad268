"""A program of the benchmarks, from its command line to its exit status, however it ends."""

import argparse
import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import result_file
from common.about import about_device, about_run
from common.command_line import Parser, add_device, add_out, check_writable, device, parser_of

BUSY = 0.1  # cores of other processes
Json = dict[str, Any]


class Program:
    """One run of a program, and the files that it writes.

    A subclass has a name and says in its own words
    - which options it takes: :meth:`options`, and what follows from them: :meth:`complete`
    - what it measures: :meth:`run`, which hands rows to :meth:`add` as they come
    - how its record is shown: :meth:`table`, :meth:`draw`, and which rows are mistakes: :meth:`complaint`

    :meth:`main` does all else: it refuses bad options and results of other hardware, writes NAME.json after every row,
    also when it is interrupted, prints the table, draws, complains of other work on the machine, and returns the exit
    status: 1 if a row is a mistake, 130 after an interrupt. With --redraw FILE nothing is measured.
    """

    name: ClassVar[str]
    """The file of the program is NAME.py, that of its record NAME.json."""
    rows_key: ClassVar[str] = "rows"
    """The entry of the record that has the rows."""
    digits: ClassVar[int] = 5
    """Of the numbers in the record."""
    chooses_device: ClassVar[bool] = True
    """Whether there is --device; without it a GPU is taken where there is one."""
    computes: ClassVar[bool] = False
    """Whether all is computed and nothing measured: then there is no device, and the record says so."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is measured yet."""
        self.args = args
        self.rows: list[Json] = []
        self.about: Json = about_run(self.name, args.device, self.settings(), self.packages())

    @classmethod
    def options(cls, parser: Parser) -> None:
        """Add the options that this program has besides --device, --out and --redraw."""

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        """Check the options, and replace those that were not given and depend on others."""

    def settings(self) -> Json:
        """Return the settings that the record names."""
        return {}

    def packages(self) -> Iterable[str]:
        """Return the peers whose versions the record names."""
        return ()

    def run(self) -> int | None:
        """Measure; return an exit status if it is not 0."""
        raise NotImplementedError

    @classmethod
    def table(cls, record: Json) -> str:
        """Lay the record out in markdown."""
        raise NotImplementedError

    @classmethod
    def draw(cls, record: Json, folder: Path) -> list[Path]:
        """Draw the figures of the record into the folder; return their files."""
        return []

    @classmethod
    def complaint(cls, row: Json) -> str | None:
        """Return a line about a row that is a mistake, None for all others."""
        return None

    def record(self) -> Json:
        """Return the record of the run so far, its rows last."""
        return {**self.about, self.rows_key: self.rows}

    def add(self, *rows: Json) -> None:
        """Take rows into the record, and write it."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        """Write the record."""
        result_file.write(self.path(self.args), self.record(), self.digits)

    @classmethod
    def path(cls, args: argparse.Namespace) -> Path:
        """Return the file of the record."""
        return args.out / f"{cls.name}.json"

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> argparse.Namespace:
        """Read and check the command line; whatever is wrong ends the program with one line and status 2."""
        parser = parser_of(f"{cls.name}.py", sys.modules[cls.__module__].__doc__ or "")
        cls.options(parser)
        if cls.chooses_device and not cls.computes:
            add_device(parser)
        add_out(parser)
        text = "measure nothing: show the results in this file again, with figures beside it or in --out"
        parser.add_argument("--redraw", type=Path, metavar="FILE", help=text)
        parser.set_defaults(out=None)
        args = parser.parse_args(arguments)
        if args.redraw:
            args.record = result_file.read(args.redraw, parser, cls.name, cls.rows_key)
            args.out = args.out or args.redraw.parent
            if cls._draws():
                check_writable(args.out, parser)
            return args
        args.out = args.out or Path()
        args.device = None if cls.computes else device(getattr(args, "device", None), parser)
        cls.complete(args, parser)
        result_file.check(cls.path(args), about_device(args.device), parser)
        return args

    @classmethod
    def main(cls, arguments: list[str] | None = None) -> int:
        """Run the program; return its exit status."""
        args = cls.parse(arguments)
        if args.redraw:
            cls._show(args.record, args.out, [])
            return 0
        run = cls(args)
        status = run_and_save(run.run, run.save)
        cls._show(run.record(), args.out, [cls.path(args)])
        complain_of_other_work(f"{cls.name}.py", run.rows, args.device)
        mistakes = [line for row in run.rows if (line := cls.complaint(row))]
        for line in mistakes:
            print(f"{cls.name}.py: {line}", file=sys.stderr)
        return status or int(bool(mistakes))

    @classmethod
    def _draws(cls) -> bool:
        return cls.draw.__func__ is not Program.draw.__func__

    @classmethod
    def _show(cls, record: Json, folder: Path, written: list[Path]) -> None:
        written = [*written, *cls.draw(record, folder)]
        print(f"\n{cls.table(record)}")
        if written:
            print(f"\nwrote {', '.join(map(str, written))}")


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt meanwhile, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_and_save(run: Callable[[], int | None], save: Callable[[], None]) -> int:
    """Run to the end or until an interrupt, and save however it ends; return the exit status: of ``run``, or 130."""
    try:
        with sigterm_as_interrupt():
            return run() or 0
    except KeyboardInterrupt:
        print("\ninterrupted: writing what was measured", file=sys.stderr)
        return 130
    finally:
        save()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python's garbage collector wait meanwhile, as timeit does."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def complain_of_other_work(program: str, rows: Iterable[Json], device: torch.device | None) -> None:
    """Say so if other processes kept the CPU that was measured busy."""
    busy = max((row.get("other_cores") or 0 for row in rows), default=0)
    if busy > BUSY and device and device.type == "cpu":
        print(f"{program}: other processes kept up to {busy:.1f} cores busy: these times say little", file=sys.stderr)


def bar_options() -> dict[str, float]:
    """Return options of a tqdm bar that moves at every step: into a log file it writes few lines."""
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 10}
