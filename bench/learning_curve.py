"""How RWKV-4 learns from text, beside a transformer of the same size, and how well it predicts text it never saw.

Both models read bytes, are equally large and see the same windows in the same order. By default the text is that of the
machine's own Python: the sources of its standard library (but for tests and idlelib), in windows of which none comes
twice before all did. One file in twenty is held out, by a hash of its name. The curves show the loss on each batch
before it is learned from.

RWKV-4 is trained as in its paper (arXiv 2305.13048) and the code of its authors: their initial values, Adam with betas
0.9 and 0.99 and epsilon 1e-8, no weight decay, no warm-up, a learning rate that falls exponentially to a sixtieth, for
time_decay twice and for time_first three times that of the others. Their auxiliary loss is left out. The transformer is
a GPT-NeoX, as Pythia is, with Pythia's betas, 0.9 and 0.95. It needs a warm-up: of a tenth of the steps, where Pythia
had a hundredth; then its rate falls as RWKV-4's does. Its positions turn whole heads, not a quarter of each as Pythia's
do, and so it learns faster.

The first rates were chosen by the lowest loss in the last tenth of 220 steps, with another seed than the one reported
and without a look at what is held out: for RWKV-4 among 0.004, 0.008 (2.53 bits a byte) and 0.016, for the transformer
among 0.004, 0.006, 0.01 and 0.014 (2.62). The paper's 6e-4 is for far larger models. So small a RWKV-4 would gain from
a warm-up too (0.016 with one of a tenth: 2.28), but the paper has none.

What is reported, in bits a byte of the held-out files: what both models need for windows as long as those of training,
one after another, each without what came before it; and RWKV-4 with its state carried from the first byte of a file to
the last. Beside them stand a unigram and a trigram model of bytes (Witten-Bell, interpolated), made from all of the
training text or from what the models saw of it, and gzip -9, each file by itself.

RWKV-4 should end below the trigrams and not more than 3 % above the transformer; "MISSED" is printed if it does not.
With --quick it learns too little for that.

An interrupted run goes on when it is started again, from a checkpoint at most 50 steps old, and ends with the same
curve. With --truncated both models see consecutive windows, each row going on where it ended.
"""

import argparse
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

try:
    import learning_curve_figure as figure
    import learning_curve_yardsticks as yardsticks
    import torch
    from common import program, result_file
    from common.about import about_device, about_run
    from common.command_line import Parser, add_device, add_out, device, names, parser_of, positive
    from learning_curve_checkpoint import WrongCheckpoint
    from learning_curve_data import Batches, from_file, standard_library
    from learning_curve_models import HEAD, NAMES, RECIPES
    from learning_curve_results import EVERY, missed, row, table
    from learning_curve_training import Options, Settings, Training
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"learning_curve.py: {error}; pip install -e '.[bench]' installs what it needs")

SIZES = {
    "layers": "of a model",
    "width": "of a model",
    "length": "bytes of a window",
    "batch": "windows a step",
    "steps": "of a training",
}
FULL = {"layers": 4, "width": 128, "length": 256, "batch": 16, "steps": 800}
QUICK = {"layers": 2, "width": 64, "length": 128, "batch": 16, "steps": 200}


class Run:
    """One call of the program: the trainings, and the files they are written to."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the models, as far trained as their checkpoints are."""
        self.args = args
        self.trainings = {name: Training(settings(args, name), args.batches, args.device) for name in args.models}
        if not args.fresh:
            for name, training in self.trainings.items():
                if self.checkpoint(name).exists():
                    training.load(self.checkpoint(name))
                    print(f"{NAMES[name]} goes on from step {training.position:,}", file=sys.stderr)

    def checkpoint(self, name: str) -> Path:
        """Return where the training of this model is kept until the run is complete."""
        return self.args.out / f"learning_curve.{name}.safetensors"

    def train(self) -> None:
        """Train every model to the end."""
        done = sum(training.position for training in self.trainings.values())
        total = self.args.steps * len(self.trainings)
        with tqdm(total=total, initial=done, unit=" steps", **program.bar_options()) as bar:
            for name, training in self.trainings.items():
                bar.set_description(NAMES[name])
                training.run(self.checkpoint(name), bar.update)

    def record(self) -> dict[str, Any]:
        """Measure on the held-out text, and return what learning_curve.json holds."""
        args, text = self.args, self.args.text
        rows = [row(training, text.held_out, args.device) for training in self.trainings.values()]
        shown = ("layers", "width", "length", "batch", "steps", "seed", "quick")
        chosen = {name: getattr(args, name) for name in shown} | {"steps_a_point": EVERY}
        about = {"title": text.title, "training_bytes": sum(map(len, text.training))}
        about |= {"held_out_bytes": sum(map(len, text.held_out)), "held_out_documents": len(text.held_out)}
        return {
            **about_run("learning_curve", args.device, chosen, ["safetensors"]),
            "text": about,
            "yardsticks": yardsticks.measure(text, args.batches.seen(args.steps)),
            "rows": rows,
        }

    def finish(self) -> list[str]:
        """Write the results, drop the checkpoints and return what is to be printed."""
        record, out = self.record(), self.args.out
        result_file.write(out / "learning_curve.json", record)
        figure.draw(record, out / "learning_curve.png")
        for name in self.trainings:
            self.checkpoint(name).unlink(missing_ok=True)
        wrote = f"wrote {out / 'learning_curve.png'} and {out / 'learning_curve.json'}"
        return [table(record), "", *(f"MISSED: {line}" for line in missed(record)), wrote]


def settings(args: argparse.Namespace, name: str) -> Settings:
    """Return what the training of this model depends on."""
    recipe = replace(RECIPES[name], **({"rate": args.rate} if args.rate else {}))
    options = Options(*(getattr(args, one.name) for one in fields(Options))) if name == "rwkv4" else Options()
    shape = args.layers, args.width, args.length, args.batch
    return Settings(name, args.text.digest, *shape, args.steps, args.seed, args.truncated, recipe, options)


def command_line() -> Parser:
    """Return the parser of the options."""
    parser = parser_of("learning_curve.py", __doc__)
    option = parser.add_argument
    option("--models", type=names("model", NAMES), default=list(NAMES), metavar="LIST", help="of " + ", ".join(NAMES))
    option("--text", type=Path, metavar="FILE", help="another text, whose last twentieth is held out")
    option("--quick", action="store_true", help="small models and few steps: less than a minute, too little to learn")
    for name, what in SIZES.items():
        option(f"--{name}", type=positive, metavar="N", help=f"{what} (default: {FULL[name]}, quick {QUICK[name]})")
    option("--rate", type=rate, metavar="R", help="the first learning rate (default: as chosen for each model)")
    option("--seed", type=int, default=0, metavar="N", help="of the weights and the order of documents (default: 0)")
    rwkv = parser.add_argument_group("how RWKV-4 is trained")
    windows = rwkv.add_mutually_exclusive_group()
    windows.add_argument("--truncated", action="store_true", help="carry the state from window to window, detached")
    windows.add_argument("--packed", action="store_true", help="pack the documents, so that none knows of another")
    rwkv.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again, not keep them")
    rwkv.add_argument("--bfloat16", action="store_true", help="with autocast")
    option("--fresh", action="store_true", help="start again, whatever checkpoints there are")
    add_device(parser)
    option("--threads", type=positive, metavar="N", help="of the CPU (default: PyTorch's choice)")
    add_out(parser)
    return parser


def parse(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line, and the text."""
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, size in (QUICK if args.quick else FULL).items():
        setattr(args, name, getattr(args, name) or size)
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {args.width}")
    result_file.check(args.out / "learning_curve.json", about_device(args.device), parser)
    try:
        args.text = from_file(args.text) if args.text else standard_library()
        args.batches = Batches(args.text, args.batch, args.length, args.seed, consecutive=args.truncated)
    except OSError as error:
        parser.error(f"cannot read {str(args.text)!r}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return args


def rate(text: str) -> float:
    """Read a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = command_line()
    args = parse(parser, arguments)
    try:
        run = Run(args)
    except WrongCheckpoint as error:
        parser.error(f"{error}; --fresh starts again")
    try:
        with program.sigterm_as_interrupt():
            run.train()
            lines = run.finish()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print("", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
