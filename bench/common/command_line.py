"""Parts of the command lines of the benchmarks. Whatever is wrong with one: one line and status 2."""

import argparse
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from common.light import Parser

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
COMPLEX_DTYPES = {name: getattr(torch, name) for name in ("complex64", "complex128")}


def parser_of(program: str, text: str) -> Parser:
    """Return the parser of a program whose docstring this is; its first paragraph stands above the options."""
    head, _, rest = text.partition("\n\n")
    return Parser(prog=program, description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device(parser: Parser) -> None:
    """Add the option --device, whose value is for :func:`device`."""
    text = "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    parser.add_argument("--device", metavar="NAME", help=text)


def add_out(parser: Parser) -> None:
    """Add the option --out."""
    text = "where to write (default: the current folder)"
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=text)


def add_list(
    parser: Parser, name: str, kind: str, known: Iterable[str], default: Iterable[str] | None = None, said: str = ""
) -> None:
    """Add an option that takes some of the ``known`` names; ``said`` is the default where that depends on others."""
    known, default = list(known), None if default is None else list(default)
    said = said or ("all" if default == known else ",".join(default or ()))
    text = f"comma-separated, of {', '.join(known)} (default: {said})"
    parser.add_argument(name, type=names(kind, known), default=default, metavar="LIST", help=text)


def names(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an option that takes some of the ``known`` names, separated by commas."""
    known = list(known)

    def split(text: str) -> list[str]:
        found = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r} (choose from {', '.join(known)})")
        return found

    return split


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def sizes(text: str, example: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1 that are written like those of the example, 4x1024x768."""
    count = example.split(" ")[0].count("x")
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{count}}}", text.strip()):
        raise argparse.ArgumentTypeError(f"expected shapes like {example}, got {text!r}")
    return tuple(map(int, text.strip().split("x")))


def device(name: str | None, parser: Parser) -> torch.device:
    """Return the device of this name, by default the GPU where there is one."""
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        parser.error(f"unknown device {name!r} (choose from cpu, cuda, cuda:N)")
    if found.type == "cpu":
        return torch.device("cpu")
    if (found.index or 0) >= count:
        parser.error(f"there is no device {name!r} here: PyTorch sees {count} GPUs")
    torch.cuda.set_device(found.index or 0)
    return torch.device("cuda", found.index or 0)


def check_writable(folder: Path, parser: Parser) -> None:
    """Make the folder and see that files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"cannot write into {str(folder)!r}: {error.strerror}")
