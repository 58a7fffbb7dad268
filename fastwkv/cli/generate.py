"""``fastwkv generate``: continue a text, token by token."""

import argparse
import os
import sys
from pathlib import Path

import torch

from fastwkv.cli import arguments
from fastwkv.cli.arguments import UsageError
from fastwkv.cli.position import Position, check_writable
from fastwkv.cli.session import Session
from fastwkv.cli.tokenizer import Tokenizer, open_tokenizer
from fastwkv.cli.world import FILE_NAME
from fastwkv.nn import RWKV4, RWKV4Config
from fastwkv.nn.checkpoint import open_checkpoint

_FIRST_TOKEN = 0  # a text begins after the end of text, which is this token in the tokenizer of the Pile

DESCRIPTION = """\
Continue a text with an RWKV-4 model. The new text goes to standard output as it comes; how much was read and generated,
and how fast, to standard error. The first speed includes what starts up with the first token.
"""
EPILOG = """\
A prompt is encoded without special tokens. An empty one starts a text after token 0, the end of text of the tokenizer
of the Pile models and of World. Where a model has 256 tokens and no tokenizer, they are the bytes of UTF-8.

A long prompt needs to be read only once:

  fastwkv generate --model M --prompt-file book.txt --tokens 0 --save-state book.safetensors
  fastwkv generate --model M --load-state book.safetensors --temperature 1 --seed 1
  fastwkv generate --model M --load-state book.safetensors --prompt "The moral:"

The file has one size, however long the text was: the state of the model, and the last token, which is still to be read.
Greedily continued it gives the tokens that one run would have given. Ctrl-C saves it too, as far as the text has come.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastwkv generate``."""
    _add_texts(parser)
    option = parser.add_argument
    option("--tokens", type=arguments.whole, default=256, metavar="N", help="to generate (default: 256); 0 only reads")
    heat = "of the sampling; 0 takes the most likely token (default: 0)"
    option("--temperature", type=arguments.temperature, default=0.0, metavar="X", help=heat)
    top_p = "sample from the fewest tokens that together have this probability (default: 1)"
    option("--top-p", type=arguments.probability, default=1.0, metavar="P", help=top_p)
    option("--seed", type=arguments.whole, metavar="N", help="of the sampling (default: another one every time)")
    option("--stop-token", type=arguments.whole, metavar="ID", help="end at this token, which is not printed")
    dtypes = f"of the computation: {', '.join(arguments.DTYPES)} (default: that of the checkpoint)"
    option("--dtype", type=arguments.dtype, metavar="NAME", help=dtypes)
    device = "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    option("--device", type=arguments.device, metavar="NAME", help=device)
    option("--threads", type=arguments.threads, metavar="N", help="of the CPU (default: as PyTorch chooses)")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name the files, prompts and tokenizers to read, and the file to write."""
    option = parser.add_argument
    model = "a .pth file of BlinkDL's, or a folder of Hugging Face's or of save_pretrained"
    option("--model", type=Path, required=True, metavar="PATH", help=model)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="where it is, in UTF-8; - is standard input")
    tokens = parser.add_mutually_exclusive_group()
    tokenizer = f"a tokenizer.json, or RWKV-4 World's {FILE_NAME} (default: the one beside the model)"
    tokens.add_argument("--tokenizer", type=Path, metavar="FILE", help=tokenizer)
    tokens.add_argument("--bytes", action="store_true", help="tokens 0 to 255 are the bytes of UTF-8")
    save = "where to write the state after prompt and new text (safetensors), in a folder that is there"
    option("--save-state", type=Path, metavar="FILE", help=save)
    load = "what to continue; a prompt is read after it"
    option("--load-state", type=Path, metavar="FILE", help=load)


def run(args: argparse.Namespace) -> int:
    """Generate; return the exit status."""
    # All errors are found from the headers, before a large model is loaded.
    config, dtype = _sizes(args)
    loaded = Position.load(args.load_state, config, dtype) if args.load_state else None
    if args.save_state:
        check_writable(args.save_state)
    tokenizer = open_tokenizer(args.tokenizer, args.model, config.vocab_size, args.bytes)
    tokens = _tokens(args, tokenizer, config.vocab_size)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or arguments.default_device()
    model = RWKV4.from_pretrained(args.model, dtype=dtype, device=device)
    if loaded:
        session = Session(model, tokenizer, loaded.to(device), tokens)
    else:
        first, *rest = tokens or [_FIRST_TOKEN]
        session = Session(model, tokenizer, Position(model.empty_state(1), first), rest, read=1)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    return session.run(args.tokens, args.stop_token, args.save_state, sampling)


def _sizes(args: argparse.Namespace) -> tuple[RWKV4Config, torch.dtype]:
    """Return the sizes of the model and the one dtype to compute in, even if the checkpoint has several."""
    checkpoint = open_checkpoint(args.model)
    return checkpoint.config, args.dtype or checkpoint.tensors["embeddings.weight"].dtype


def _tokens(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the tokens of the prompt, if the model has them all."""
    tokens = tokenizer.encode(_prompt(args))
    if (highest := max(tokens, default=0)) >= vocab_size:
        raise UsageError(f"token {highest} of the prompt is outside the model's vocabulary of {vocab_size} tokens")
    if args.stop_token is not None and args.stop_token >= vocab_size:
        raise UsageError(f"--stop-token {args.stop_token} is outside the model's vocabulary of {vocab_size} tokens")
    return tokens


def _prompt(args: argparse.Namespace) -> bytes:
    if args.prompt is not None:
        return os.fsencode(args.prompt)
    if args.prompt_file == "-":
        return sys.stdin.buffer.read()
    if args.prompt_file is not None:
        return Path(args.prompt_file).read_bytes()
    if args.load_state is None:
        raise UsageError("give a --prompt, a --prompt-file or a --load-state")
    return b""
