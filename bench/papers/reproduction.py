"""What the programs that reproduce papers share: options, and how trainings become a record, a figure and a table."""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import program, result_file
from common.about import about_device
from common.command_line import add_device, add_out, check_writable, device, parser_of, positive
from papers.training import Training
from tqdm import tqdm

Json = dict[str, Any]


class Reproduction:
    """A program of this name and docstring; ``show`` draws a record into a PNG and returns what is printed of it."""

    def __init__(self, name: str, text: str, show: Callable[[Json, Path], str]) -> None:
        self.name, self.show = name, show
        self.parser = parser_of(f"{name}.py", text)

    def parse(self, arguments: list[str] | None, threads: int | None = None) -> argparse.Namespace:
        """Read the command line, with the options that all programs have, and see that results can be written."""
        add_device(self.parser)
        text = f"of the CPU (default: {threads or 'as PyTorch chooses'})"
        self.parser.add_argument("--threads", type=positive, default=threads, metavar="N", help=text)
        add_out(self.parser)
        self.parser.add_argument("--redraw", type=Path, metavar="FILE", help="train nothing, draw what was recorded")
        args = self.parser.parse_args(arguments)
        args.device = device(args.device, self.parser)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.redraw:
            check_writable(args.out, self.parser)
        else:
            result_file.check(args.out / f"{self.name}.json", about_device(args.device), self.parser)
        return args

    def redraw(self, file: Path, out: Path) -> int:
        """Draw a record again; return the exit status."""
        record = result_file.read(file, self.parser)
        if record.get("benchmark") != self.name:
            self.parser.error(f"{str(file)!r} is not a result of this program")
        self._show(record, out)
        return 0

    def carry_out(
        self, trainings: Sequence[Training], about: Json, out: Path, finish: Callable[[], Json] = dict
    ) -> int:
        """Run trainings to the end, or until Ctrl-C, and show what was measured; return the exit status.

        The record holds ``about``, a row for each training that began, and what ``finish`` measures once all ended.
        """
        path = out / f"{self.name}.json"

        def save() -> None:
            if rows := [one.row() for one in trainings if one.losses]:
                result_file.write(path, {**about, "rows": rows})

        def run() -> None:
            with tqdm(total=sum(one.total for one in trainings), unit=" steps", **program.bar_options()) as bar:
                for one in trainings:
                    bar.set_description(one.title)
                    one.run(bar.update)
                    save()
            about.update(finish())

        status = program.run_and_save(run, save)
        if any(one.losses for one in trainings):
            self._show(json.loads(path.read_text()), out)  # so that the figure is of what the file holds
            print(f"wrote {path}")
        return status

    def _show(self, record: Json, out: Path) -> None:
        picture = out / f"{self.name}.png"
        print(f"\n{self.show(record, picture)}\n\nwrote {picture}")


def table(rows: Sequence[Json], texts: list[str], numbers: dict[str, str]) -> str:
    """Lay out a line for all rows that agree in the texts, with the means of the numbers, each in its format."""
    lines = []
    for key, group in groupby(rows, lambda row: [row[name] for name in texts]):
        columns = zip(*([row[name] for name in numbers] for row in group), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        formats = zip(known, numbers.values(), strict=True)
        lines.append([*key, *(format(fmean(values), form) if values else "-" for values, form in formats)])
    return result_file.markdown([name.replace("_", " ") for name in (*texts, *numbers)], lines, len(texts))
