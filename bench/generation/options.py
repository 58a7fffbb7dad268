"""The command line of gen_time.py. Whatever is wrong with it ends the program with one line and status 2."""

import argparse
import importlib.util
from pathlib import Path

import torch
from common import result_file
from common.about import about_device
from common.command_line import DTYPES, Parser, add_device, add_out, device, names, positive
from generation import models

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank"
PROTOCOLS = ("recompute", "kv-cache")
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
  python bench/gen_time.py --tokens 16384 --protocols kv-cache --minutes 8

Weights are random: time does not depend on them. Interrupt at any moment: what was measured is written."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; adds ``text``, the bytes of the prompt."""
    parser = Parser(
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
    add_device(parser)
    option("--dtype", choices=DTYPES, default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float32)")
    option(
        "--models",
        type=names("model", models.MODELS),
        default=["rwkv4", "gpt-neox"],
        metavar="LIST",
        help=f"comma-separated, of {', '.join(models.MODELS)}\n"
        "(default: rwkv4,gpt-neox; gpt-neox is the architecture of Pythia)",
    )
    option(
        "--protocols",
        type=names("protocol", PROTOCOLS),
        default=["kv-cache", "recompute"],
        metavar="LIST",
        help="how transformers generate, comma-separated (default: both):\n"
        "recompute: the whole text again for every token, as the RWKV paper measured\n"
        "kv-cache:  keys and values are carried, as in practice",
    )
    option(
        "--prompt", type=Path, metavar="FILE", help="text to continue, its bytes as tokens (default: half a sentence)"
    )
    limit = "what is not measured by then is left out (default: no limit)"
    option("--minutes", type=positive, metavar="N", help=limit)
    add_out(parser)
    option("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")
    args = parser.parse_args(arguments)

    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    args.device = device(args.device, parser)
    args.size = args.size or _default_size(args.device)
    args.text = _prompt(args.prompt, parser)
    if set(args.models) & set(models.TRANSFORMERS) and not importlib.util.find_spec("transformers"):
        parser.error("transformers is not installed; pip install -e '.[bench]', or run with --models rwkv4")
    result_file.check(args.out / "gen_time.json", about_device(args.device), parser)
    return args


def _default_size(device: torch.device) -> str:
    if device.type == "cpu":
        return "tiny"
    return "3b" if torch.cuda.get_device_properties(device).total_memory > LARGE_GPU else "430m"


def _prompt(path: Path | None, parser: Parser) -> bytes:
    if path is None:
        return PROMPT.encode()
    try:
        text = path.read_bytes()
    except OSError as error:
        parser.error(f"cannot read the prompt {str(path)!r}: {error.strerror}")
    if not text:
        parser.error(f"the prompt {str(path)!r} is empty")
    return text
