"""``fastwkv info``: describe a checkpoint from its headers alone."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastwkv.cli.output import write
from fastwkv.nn import RWKV4State
from fastwkv.nn.checkpoint import Checkpoint, open_checkpoint
from fastwkv.nn.state import empty_wkv_state

DESCRIPTION = """\
Say what a checkpoint of RWKV-4 holds. Only headers are read, so a large one takes no longer (unless it is compressed),
but names, shapes and sizes of all its tensors are checked.
"""
EPILOG = """\
JSON has the fields version, format ("fastwkv", "hf" or "blinkdl"), layers, width, vocab_size, parameters, dtypes, bytes
(of all parameters) and state_bytes (of the state of one text, of any length, in the dtype of the checkpoint).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastwkv info``."""
    path = "a .pth file of BlinkDL's, or a folder of Hugging Face's or of save_pretrained"
    parser.add_argument("path", type=Path, metavar="PATH", help=path)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print a description of the checkpoint; return the exit status."""
    found = facts(open_checkpoint(args.path))
    write((json.dumps(found, indent=2) if args.json else _table(found)) + "\n")
    return 0


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields that ``--json`` prints."""
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    dtype = checkpoint.tensors["embeddings.weight"].dtype
    x = torch.empty(config.layers, 1, config.width, dtype=dtype)
    return {
        "version": "RWKV-4",
        "format": checkpoint.format,
        "layers": config.layers,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "state_bytes": RWKV4State(x, x, empty_wkv_state(x.shape, x)).nbytes,
    }


def _table(found: dict[str, Any]) -> str:
    rows = {
        "version": found["version"],
        "format": found["format"],
        "layers": found["layers"],
        "width": found["width"],
        "vocabulary": found["vocab_size"],
        "parameters": f"{found['parameters']:,}",
        "dtype": ", ".join(found["dtypes"]),
        "size": f"{found['bytes']:,} bytes",
        "state of a text": f"{found['state_bytes']:,} bytes",
    }
    return "\n".join(f"{name:16}{value}" for name, value in rows.items())
