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

With --truncated both models see consecutive windows, each row going on where it ended. Ctrl-C ends a run; what was
measured until then is kept and drawn.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from common import figures
    from common.about import about_run
    from common.command_line import names, positive
    from matplotlib.axes import Axes
    from papers import figure
    from papers.language_models import HEAD, build, carried_bits, logits_of, windowed_bits
    from papers.reproduction import Json, Reproduction, table
    from papers.text import SEPARATOR, Text, Windows, from_file, gzip_bits, ngram_bits, standard_library
    from papers.training import Training, curve, parameters
    from torch import Tensor
    from torch.nn import functional as F

    from fastwkv.nn import param_groups
except ImportError as error:
    sys.exit(f"learning_curve.py: {error}; pip install -e '.[bench]' installs what it needs")

SIZES = {"layers": "of a model", "width": "of a model", "length": "bytes of a window", "batch": "windows a step"}
SIZES["steps"] = "of a training"
FULL = {"layers": 4, "width": 128, "length": 256, "batch": 16, "steps": 800}
QUICK = {"layers": 2, "width": 64, "length": 128, "batch": 16, "steps": 200}
OPTIONS = ("truncated", "packed", "gradient_checkpointing", "bfloat16")  # of RWKV-4's training
EVERY = 16  # steps to one point of a curve
BEHIND = 0.03  # how far above the transformer RWKV-4 may end
DRAWN = {"trigram of all training text": "trigram", "gzip -9": "gzip -9"}  # of the yardsticks


class Recipe(NamedTuple):
    """Adam without weight decay, at a rate that falls exponentially to a sixtieth: in the paper 6e-4 to 1e-5.

    The paper's RWKV-4 starts at the full rate; ``fastwkv.nn.param_groups`` says what has a multiple of it.
    """

    rate: float
    betas: tuple[float, float]
    warm_up: float = 0.0  # share of the steps in which the rate rises linearly

    def rate_of(self, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        rise = min((step + 1) / max(round(self.warm_up * steps), 1), 1)
        return self.rate * rise * 60 ** -((step + 1) / steps)


# Of each model its name, its colour, the width of its line, and how it is trained.
MODELS = {
    "rwkv4": ("RWKV-4", figure.RED, 3.4, Recipe(8e-3, (0.9, 0.99))),
    "transformer": ("Transformer", figure.BLUE, 2.2, Recipe(14e-3, (0.9, 0.95), warm_up=0.1)),
}


class Learner(Training):
    """A model that learns from windows, and what it then needs for the text that was held out."""

    def __init__(self, name: str, windows: Windows, text: Text, args: argparse.Namespace) -> None:
        title, _, _, recipe = MODELS[name]
        super().__init__(title, args.steps)
        self.name, self.windows, self.held_out, self.args = name, windows, text.held_out, args
        self.recipe = recipe._replace(rate=args.rate or recipe.rate)
        self.options = [option for option in OPTIONS if getattr(args, option) and name == "rwkv4"]
        self.model = build(name, args.layers, args.width, args.length, args.seed).to(args.device)
        self.bits: float | None = None  # a byte of what was held out
        self.carried_bits: float | None = None
        self._state: Any = None  # after the last window, if truncated

    def run(self, tick: Callable[[], Any]) -> None:
        """Train to the end, then test."""
        if "gradient_checkpointing" in self.options:
            self.model.gradient_checkpointing = True
        groups = param_groups(self.model, self.recipe.rate, weight_decay=0.0)
        optimizer = torch.optim.Adam(groups, betas=self.recipe.betas, fused=True)
        batches = (self.windows[step] for step in range(self.total))
        for _ in self.steps(optimizer, partial(self.recipe.rate_of, steps=self.total), batches, self.predict):
            tick()
        self.bits = windowed_bits(self.model, self.held_out, self.args.length, self.args.device)
        if self.name == "rwkv4":
            self.carried_bits = carried_bits(self.model, self.held_out, self.args.device)

    def predict(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of all bytes of a batch, and the bytes that come after them."""
        window = window.to(self.args.device)
        inputs, targets = window[:, :-1], window[:, 1:]
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled="bfloat16" in self.options):
            if "truncated" in self.options:
                new = len(self.losses) % self.windows.count == 0
                logits, state = self.model(inputs, None if new else self._state)
                self._state = state.detach()
            elif "packed" in self.options:
                starts = inputs == SEPARATOR[0]
                starts[:, 0] = True
                cu_seqlens = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
                logits = self.model(inputs.reshape(1, -1), cu_seqlens=cu_seqlens)[0]
            else:
                logits = logits_of(self.model, inputs)
        return logits.flatten(0, -2), targets.flatten()

    def row(self) -> Json:
        """Return a row of learning_curve.json."""
        return {
            "model": self.name,
            "parameters": parameters(self.model),
            "recipe": self.recipe._asdict(),
            "options": self.options,
            "bytes": len(self.losses) * self.args.batch * self.args.length,
            "bits": self.bits,
            "carried_bits": self.carried_bits,
            "steps_per_second": self.steps_per_second,
            "seconds": sum(self.seconds),
            "curve": [loss / math.log(2) for loss in curve(self.losses, EVERY)],  # bits a byte
        }


def yardsticks(text: Text, windows: Windows, steps: int) -> Json:
    """Return the bits a byte that simple predictors need for what is held out."""
    trigram, unigram = (ngram_bits(text.training, text.held_out, order) for order in (3, 1))
    return {
        "yardsticks": {
            "trigram of all training text": trigram,
            "trigram of what the models saw": ngram_bits(windows.seen(steps), text.held_out, 3),
            "unigram of all training text": unigram,
            "gzip -9": gzip_bits(text.held_out),
        }
    }


def remarks(record: Json) -> list[str]:
    """Return what the yardsticks need, and what RWKV-4 should have reached and has not."""
    lines = [f"{name}: {bits:.3f} bits a byte" for name, bits in record["yardsticks"].items()]
    bits = {row["model"]: number(row["bits"]) for row in record["rows"]}
    if "rwkv4" in bits and lines:  # which a run that was interrupted has not
        own = f"MISSED: RWKV-4 needs {bits['rwkv4']:.3f} bits a byte"
        trigram, name = min((value, name) for name, value in record["yardsticks"].items() if "trigram" in name)
        if not bits["rwkv4"] < trigram:
            lines.append(f"{own}, not fewer than the {name} with {trigram:.3f}")
        if "transformer" in bits and not bits["rwkv4"] <= (1 + BEHIND) * bits["transformer"]:
            more = 100 * (bits["rwkv4"] / bits["transformer"] - 1)
            lines.append(f"{own}, {more:.1f} % more than the transformer with {bits['transformer']:.3f}")
    return lines


def number(value: float | None) -> float:
    """Return a number of a record, which has none where a loss was NaN, or an interrupt came before."""
    return math.nan if value is None else value


def show(record: Json, path: Path) -> str:
    """Draw loss against bytes learned from and against time, with the yardsticks; return the summary."""
    settings, rows, device = record["settings"], record["rows"], figures.device_name(record["device"])
    what = f"{max(row['parameters'] for row in rows) / 1e6:.2g} million parameters, {settings['layers']} layers"
    what = f"{what}, width {settings['width']}, windows of {settings['length']} bytes"
    line = f"Bytes of {record['text']['title']}  ·  {what}  ·  points: held-out text  ·  {device}"
    title = "Learning from text: RWKV-4 beside a transformer of its size"
    million = settings["batch"] * settings["length"] / 1e6
    with figure.two_panels(path, title, line, left=0.055, wspace=0.4) as (seen, time):
        figure.panel(seen, "As many bytes learned from", "both", xlabel="million bytes", ylabel="loss (bits a byte)")
        draw_losses(seen, record, [million for _ in rows])
        figure.panel(time, "As much time spent", "both", xlabel="seconds of training")
        labels = draw_losses(time, record, [1 / row["steps_per_second"] for row in rows])
        for yardstick, name in DRAWN.items():
            if value := record["yardsticks"].get(yardstick):
                seen.axhline(value, color=figures.FAINT, linewidth=1.4, linestyle=(0, (4, 2)), zorder=2)
                figure.beside(seen, value, 8, name, f"held out: {value:.3f}", figure.GREY, fontsize=figure.SMALL)
        figures.label(time, labels, 2.4 * figures.LABEL_GAP, low=60, below_top=20)
    columns = {"bits": ".3f", "carried_bits": ".3f", "bytes": ",.0f", "parameters": ",.0f", "steps_per_second": ".2f"}
    return "\n".join([table(rows, ["model"], columns), "", *remarks(record)])


def draw_losses(axes: Axes, record: Json, widths: list[float]) -> list[figures.Label]:
    """Draw a line a model, and a point for what was held out, with steps of these widths; return the labels."""
    settings, rows, labels = record["settings"], record["rows"], []
    losses = [loss for row in rows for loss in (row["bits"], *row["curve"][1:]) if loss is not None]
    losses += [record["yardsticks"][name] for name in DRAWN if name in record["yardsticks"]]
    low, high = min(losses, default=0), max(losses, default=5)
    axes.set(xlim=(0, settings["steps"] * max(widths)), ylim=(low - 0.15, min(high, max(low, 5))))
    for row, width in zip(rows, widths, strict=True):
        name, colour, linewidth, _ = MODELS[row["model"]]
        style: Json = {"color": colour, "zorder": 3 if row["model"] == "rwkv4" else 4}
        x = [width * settings["steps_a_point"] * (n + 0.5) for n in range(len(row["curve"]))]
        axes.plot(x, [number(loss) for loss in row["curve"]], linewidth=linewidth, **style)
        notes = [option.replace("_", " ") for option in row["options"]]
        if row["bits"] is None:  # interrupted, or not a number
            end = x[-1], next((loss for loss in row["curve"][::-1] if loss is not None), axes.get_ylim()[1])
        else:
            end = width * settings["steps"], row["bits"]
            axes.plot(*end, "o", markersize=9, clip_on=False, **style)
            notes.append(f"held out: {row['bits']:.3f}")
        if row["carried_bits"] is not None:
            notes.append(f"{row['carried_bits']:.3f} with its state carried")
        notes.append(f"{row['steps_per_second']:.1f} steps/s")
        labels.append(figures.Label(end, name, "\n".join(notes), colour))
    return labels


def parse(program: Reproduction, arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser, option = program.parser, program.parser.add_argument
    option(
        "--models", type=names("model", MODELS), default=list(MODELS), metavar="LIST", help=f"of {', '.join(MODELS)}"
    )
    option("--text", type=Path, metavar="FILE", help="another text, whose last twentieth is held out")
    option("--quick", action="store_true", help="small models and few steps: less than a minute, too little to learn")
    for name, what in SIZES.items():
        option(f"--{name}", type=positive, metavar="N", help=f"{what} (default: {FULL[name]}, quick {QUICK[name]})")
    option("--rate", type=float, metavar="R", help="the first learning rate (default: as chosen for each model)")
    option("--seed", type=int, default=0, metavar="N", help="of the weights and the order of documents (default: 0)")
    rwkv = parser.add_argument_group("how RWKV-4 is trained")
    windows = rwkv.add_mutually_exclusive_group()
    windows.add_argument("--truncated", action="store_true", help="carry the state from window to window, detached")
    windows.add_argument("--packed", action="store_true", help="pack the documents, so that none knows of another")
    rwkv.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again, not keep them")
    rwkv.add_argument("--bfloat16", action="store_true", help="with autocast")
    args = program.parse(arguments)
    for name, size in (QUICK if args.quick else FULL).items():
        setattr(args, name, getattr(args, name) or size)
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {args.width}")
    if args.rate is not None and not 0 < args.rate < math.inf:
        parser.error(f"--rate must be positive and finite, got {args.rate}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    program = Reproduction("learning_curve", __doc__, show)
    args = parse(program, arguments)
    if args.redraw:
        return program.redraw(args.redraw, args.out)
    try:
        text = from_file(args.text) if args.text else standard_library()
        windows = Windows(text.training, args.batch, args.length, args.seed, args.truncated)
    except OSError as error:
        program.parser.error(f"cannot read {str(args.text)!r}: {error.strerror}")
    except ValueError as error:
        program.parser.error(str(error))
    learners = [Learner(model, windows, text, args) for model in args.models]
    chosen = {name: getattr(args, name) for name in (*SIZES, "seed", "quick")} | {"steps_a_point": EVERY}
    sizes = {"training_bytes": sum(map(len, text.training)), "held_out_bytes": sum(map(len, text.held_out))}
    about = about_run("learning_curve", args.device, chosen)
    about |= {"text": {"title": text.title, **sizes, "held_out_documents": len(text.held_out)}, "yardsticks": {}}
    measured_last = partial(yardsticks, text, windows, args.steps)
    return program.carry_out(learners, about, args.out, measured_last)


if __name__ == "__main__":
    sys.exit(main())
