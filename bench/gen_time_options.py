"""The command line of gen_time.py. Whatever is wrong with it ends the program with one line and status 2."""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import gen_time_models as models
import torch

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank"
PROTOCOLS = ("recompute", "kv-cache")
DTYPES = ("float32", "float64", "bfloat16", "float16")
LARGE_GPU = 40e9  # bytes: room for the 3b models of the paper in float32, 12 GB each, their cache and their logits

DESCRIPTION = """\
Cumulative time to generate a text token by token: RWKV-4, which carries a state of fixed size, against transformers
of the same size. Writes gen_time.png and gen_time.json and prints a table. Without options it takes about a minute
on two CPU cores."""

EXAMPLES = """\
examples:
  python bench/gen_time.py
  python bench/gen_time.py --size 169m --tokens 256 --models rwkv4,opt,bloom
  python bench/gen_time.py --device cuda --size 3b --dtype bfloat16 --protocols kv-cache --out results

Weights are random: time does not depend on them. Interrupt at any moment: what was measured is written."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; adds ``text``, the bytes of the prompt."""
    parser = _Parser(
        prog="gen_time.py", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    option = parser.add_argument
    sizes = [f"{name} ({size.layers} layers, width {size.width})" for name, size in models.SIZES.items()]
    option(
        "--size",
        choices=models.SIZES,
        metavar="NAME",
        help=f"{', '.join(sizes[:3])},\n{', '.join(sizes[3:])}\n"
        "(default: tiny on a CPU; on a GPU 3b or, below 40 GB, 430m)",
    )
    option("--tokens", type=int, default=1024, metavar="N", help="how many tokens to generate (default: 1024)")
    option("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    option("--dtype", choices=DTYPES, default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float32)")
    option(
        "--models",
        type=_names("model", models.MODELS),
        default=["rwkv4", "gpt-neox"],
        metavar="LIST",
        help=f"comma-separated, of {', '.join(models.MODELS)}\n"
        "(default: rwkv4,gpt-neox; gpt-neox is the architecture of Pythia)",
    )
    option(
        "--protocols",
        type=_names("protocol", PROTOCOLS),
        default=["kv-cache", "recompute"],
        metavar="LIST",
        help="how transformers generate, comma-separated (default: both):\n"
        "recompute: the whole text again for every token, as the RWKV paper measured\n"
        "kv-cache:  keys and values are carried, as in practice",
    )
    option(
        "--prompt", type=Path, metavar="FILE", help="text to continue, its bytes as tokens (default: half a sentence)"
    )
    option("--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: the current folder)")
    option("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")
    args = parser.parse_args(arguments)

    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    args.device = _device(args.device, parser)
    args.size = args.size or _default_size(args.device)
    args.text = _prompt(args.prompt, parser)
    if set(args.models) & set(models.TRANSFORMERS) and not importlib.util.find_spec("transformers"):
        parser.error("transformers is not installed; pip install -e '.[bench]', or run with --models rwkv4")
    _check_writable(args.out, parser)
    return args


def _names(kind: str, known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r} (choose from {', '.join(known)})")
        return names

    return split


def _device(name: str | None, parser: _Parser) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"unknown device {name!r} (choose from cpu, cuda, cuda:N)")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"unknown device {name!r} (choose from cpu, cuda, cuda:N)")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            parser.error(f"there is no device {name!r}: PyTorch finds {count} CUDA devices")
        torch.cuda.set_device(device)
    return device


def _default_size(device: torch.device) -> str:
    if device.type == "cpu":
        return "tiny"
    return "3b" if torch.cuda.get_device_properties(device).total_memory > LARGE_GPU else "430m"


def _prompt(path: Path | None, parser: _Parser) -> bytes:
    if path is None:
        return PROMPT.encode()
    try:
        text = path.read_bytes()
    except OSError as error:
        parser.error(f"cannot read the prompt {str(path)!r}: {error.strerror}")
    if not text:
        parser.error(f"the prompt {str(path)!r} is empty")
    return text


def _check_writable(folder: Path, parser: _Parser) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"cannot write into {str(folder)!r}: {error.strerror}")
