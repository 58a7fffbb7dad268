"""Cumulative time to generate a sequence token by token: RWKV-4 against transformers of the same size.

RWKV-4 carries a state of fixed size. Writes gen_time.png and gen_time.json and prints a table. Without options it takes
about a minute on two CPU cores.

The measurement of figure 7 of "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), batch 1. RWKV-4
carries its state (protocol "recurrent"), by fastwkv.nn.generate; "graph" tells whether its tokens were launches of a
CUDA graph, which that records with the second token. Transformers are Hugging Face's classes with random weights, under
two protocols: "recompute" reads the whole sequence again for every token, as the paper measured, and "kv-cache" carries
keys and values, as people run them.

Each time is from handing over the prompt to having the new token, with the device synchronised after each; the first
token includes reading the prompt. Some tokens are generated beforehand and not counted. A series of few seconds runs
several times, and a token's time is the median of its times over these passes, so that other work of the machine shows
less. Python's garbage collector waits meanwhile, as in timeit.

The exponent is the slope of log(cumulative seconds) against log(tokens), both counted from the first token, which also
had the prompt to read; by least squares over the tokens from an eighth of the way on, each weighted by 1/token, so that
every octave counts the same. Fewer than 16 tokens have none.

Examples, whose weights are random, since time does not depend on them:

  python bench/gen_time.py
  python bench/gen_time.py --size 169m --tokens 256 --models rwkv4,opt,bloom
  python bench/gen_time.py --device cuda --size 3b --dtype bfloat16 --protocols kv-cache --out results
  python bench/gen_time.py --tokens 16384 --protocols kv-cache --minutes 8
"""

import gc
import importlib.util
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import torch
    from common import program
    from common.command_line import DTYPES, Parser, add_list, positive
    from generation import figure, models
    from generation.series import DIGITS, FIT, PASSES, Series, measure, table
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"gen_time.py: {error}; pip install -e '.[bench]' installs what it needs")

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank"
PROTOCOLS = ("recompute", "kv-cache")
LARGE_GPU = 40e9  # bytes: room for the 3b models of the paper in float32, 12 GB each, their cache and their logits
WARM_UP = 64  # tokens
SAVE_EVERY = 2.0  # seconds


class OutOfTimeError(Exception):
    """The minutes that were given are over."""


class GenTime(program.Program):
    """The program; how a series is timed stands in generation/series.py."""

    name = "gen_time"
    rows_key = "series"
    digits = DIGITS

    def __init__(self, args: Namespace) -> None:
        """Read the settings; nothing is built yet."""
        self.size = models.SIZES[args.size]
        self.series = [
            Series(name, protocol)
            for name in args.models
            for protocol in (["recurrent"] if name == models.RWKV else args.protocols)
        ]
        self.saved = time.monotonic()
        self.deadline = math.inf if args.minutes is None else self.saved + 60 * args.minutes
        super().__init__(args)
        self.about["fit"] = FIT

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        sizes = ", ".join(f"{name} ({size.layers} layers, width {size.width})" for name, size in models.SIZES.items())
        text = f"{sizes} (default: tiny on a CPU; on a GPU 3b or, below 40 GB, 430m)"
        option("--size", choices=models.SIZES, metavar="NAME", help=text)
        option("--tokens", type=positive, default=1024, metavar="N", help="how many to generate (default: 1024)")
        text = f"{', '.join(DTYPES)} (default: float32)"
        option("--dtype", choices=DTYPES, default="float32", metavar="NAME", help=text)
        # gpt-neox is the architecture of Pythia
        add_list(parser, "--models", "model", models.MODELS, ["rwkv4", "gpt-neox"])
        add_list(parser, "--protocols", "protocol", PROTOCOLS, ["kv-cache", "recompute"], said="both")
        text = "file to continue, its bytes as tokens (default: half a sentence)"
        option("--prompt", type=Path, metavar="FILE", help=text)
        text = "what is not measured by then is left out (default: no limit)"
        option("--minutes", type=positive, metavar="N", help=text)
        option("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")

    @classmethod
    def complete(cls, args: Namespace, parser: Parser) -> None:
        args.size = args.size or _default_size(args.device)
        try:
            args.text = PROMPT.encode() if args.prompt is None else args.prompt.read_bytes()
        except OSError as error:
            parser.error(f"cannot read the prompt {str(args.prompt)!r}: {error.strerror}")
        if not args.text:
            parser.error(f"the prompt {str(args.prompt)!r} is empty")
        if set(args.models) & set(models.TRANSFORMERS) and not importlib.util.find_spec("transformers"):
            parser.error("transformers is not installed; pip install -e '.[bench]', or run with --models rwkv4")

    def settings(self) -> dict[str, Any]:
        args = self.args
        return {
            "size": args.size,
            "layers": self.size.layers,
            "width": self.size.width,
            "vocabulary": self.size.vocab_size,
            "batch": 1,
            "tokens": args.tokens,
            "dtype": args.dtype,
            "seed": args.seed,
            "prompt": args.text[:80].decode(errors="replace"),
            "prompt_tokens": len(args.text),
            "warm_up_tokens": WARM_UP,
        }

    def record(self) -> dict[str, Any]:
        return {**self.about, "series": [series.record() for series in self.series]}

    def save(self) -> None:
        super().save()
        self.saved = time.monotonic()

    def run(self) -> None:
        self.save()
        for name in self.args.models:
            mine = [series for series in self.series if series.name == name]
            model = None
            for series in mine:
                series.status = "interrupted"  # until it ends in another way
                failure = None
                try:
                    self._look_at_the_clock()
                    if model is None:
                        model = self._build(name)
                    self._run_series(series, model)
                    series.status = "complete"
                except OutOfTimeError:
                    series.status = "out of time"
                except Exception as error:
                    if not models.is_out_of_memory(error):
                        raise
                    failure = error.with_traceback(None)  # the traceback holds tensors
                if failure is not None:
                    series.status = "out of memory"
                    _free()
                self.save()
            del model
            _free()

    def _build(self, name: str) -> Any:
        positions = len(self.args.text) + self.args.tokens
        dtype = getattr(torch, self.args.dtype)
        return models.build(name, self.size, positions, self.args.device, dtype, self.args.seed)

    def _run_series(self, series: Series, model: Any) -> None:
        series.parameters = sum(parameter.numel() for parameter in model.parameters())
        prompt = torch.tensor([list(self.args.text)], device=self.args.device)
        synchronize = torch.cuda.synchronize if self.args.device.type == "cuda" else _nothing

        def start() -> Iterator[Any]:
            return models.PROTOCOLS[series.protocol](model, prompt)

        total, bar_options = self.args.tokens * PASSES[series.protocol], program.bar_options()
        with (
            torch.inference_mode(),
            tqdm(total=total, desc=f"{series.name + ' ' + series.protocol:<20}", unit=" tokens", **bar_options) as bar,
        ):
            warm_up = start()
            for _ in range(min(WARM_UP, self.args.tokens)):
                carried = next(warm_up)
            series.graph = models.uses_graph(carried)
            del warm_up, carried

            def tick() -> None:
                bar.update()
                self._look_at_the_clock()
                if time.monotonic() - self.saved > SAVE_EVERY:
                    self.save()

            measure(series, start, self.args.tokens, synchronize, tick)
            bar.total = bar.n  # a slow series makes fewer passes than it may

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        return table(record["series"], record["settings"]["tokens"])

    @classmethod
    def draw(cls, record: dict[str, Any], folder: Path) -> list[Path]:
        return [figure.draw(record, folder / "gen_time.png")]


def _default_size(device: torch.device) -> str:
    if device.type == "cpu":
        return "tiny"
    return "3b" if torch.cuda.get_device_properties(device).total_memory > LARGE_GPU else "430m"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nothing() -> None:
    pass


main = GenTime.main

if __name__ == "__main__":
    sys.exit(main())
