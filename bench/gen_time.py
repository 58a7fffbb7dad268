"""Cumulative time to generate a text, token by token: RWKV-4 against transformers of the same size.

The measurement of figure 7 of "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), batch 1. RWKV-4
carries its state (protocol "recurrent"), by fastwkv.nn.generate; "graph" tells whether its tokens were launches of a
CUDA graph, which that records with the second token. Transformers are Hugging Face's classes with random weights, under
two protocols: "recompute" reads the whole text again for every token, which is what the paper measured, and "kv-cache"
carries keys and values, which is what people run.

What is timed. From handing over the prompt to having each new token, with the device synchronised after each; the
first token includes reading the prompt. Some tokens are generated beforehand and not counted. A series of few seconds
runs several times, and a token's time is the median of its times over these passes, so that what else the machine does
shows less. Python's garbage collector waits meanwhile, as in timeit.

What is fitted. The exponent is the slope of log(cumulative seconds) against log(tokens), both counted from the first
token, which also had the prompt to read; by least squares over the tokens from an eighth of the way on, each weighted
by 1/token, so that every octave counts the same.
"""

import argparse
import gc
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

try:
    import torch
    from common import program
    from common.about import about_run
    from common.result_file import replace
    from generation import figure, models
    from generation.options import parse
    from generation.series import FIT, PASSES, Series, measure, table
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"gen_time.py: {error}; pip install -e '.[bench]' installs what it needs")

WARM_UP = 64  # tokens
SAVE_EVERY = 2.0  # seconds


class OutOfTimeError(Exception):
    """The minutes that were given are over."""


class Run:
    """All series of one call of the program, and the files they are written to."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is built yet."""
        self.args = args
        self.size = models.SIZES[args.size]
        self.series = [
            Series(name, protocol)
            for name in args.models
            for protocol in (["recurrent"] if name == models.RWKV else args.protocols)
        ]
        self.saved = time.monotonic()
        self.deadline = math.inf if args.minutes is None else self.saved + 60 * args.minutes
        settings = {
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
        self.about = {**about_run("gen_time", args.device, settings), "fit": FIT}

    def record(self) -> dict[str, Any]:
        """Return what gen_time.json holds."""
        return {**self.about, "series": [series.record() for series in self.series]}

    def run(self) -> None:
        """Measure every series, one model in memory at a time."""
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

    def save(self) -> None:
        """Write gen_time.json, whole or not at all."""
        text = json.dumps(self.record(), indent=2, ensure_ascii=False)
        text = re.sub(r"\[[-+\d.,e\s]+\]", lambda match: " ".join(match[0].split()), text)  # a list of numbers: a line
        replace(self.args.out / "gen_time.json", lambda path: path.write_text(text + "\n"))
        self.saved = time.monotonic()

    def draw(self) -> None:
        """Write gen_time.png, whole or not at all."""
        figure.draw(self.record(), self.args.out / "gen_time.png")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nothing() -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(run.run, run.save)
    run.draw()
    print(f"\n{table(run.series, args.tokens)}\n")
    print(f"wrote {args.out / 'gen_time.png'} and {args.out / 'gen_time.json'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
