"""From a tanh RNN to the LRU, one step at a time: what each step of the paper does to accuracy and speed.

"Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349), section 3, as one small experiment. The
networks are alike (residual blocks of batch norm, recurrence, gelu, GLU and dropout; equally many parameters) but for
the recurrence: a tanh RNN, the same without the tanh, a complex diagonal one, the same with the exponential
parameterisation started on a ring, and with the normalisation gamma: the LRU. A sixth, the control, is an LRU started
with a short memory, far from the ring.

The tasks. "digits": scikit-learn's 8x8 images as sequences of 64 pixels. Unlike the paper, which averages over all
steps, they are told from the last step alone, so that what counts is what a state still holds. "copy-100" and
"copy-400": ten symbols of eight, to be repeated after a delay of so many steps; guessing gets 12.5 %.

How they are trained. AdamW, a tenth of the steps of warm-up, then a cosine; eigenvalues, B and gamma at a quarter of
the rate and without weight decay, in every network. Learning rates were chosen for each recurrence, with other seeds
than those reported: of 0.002, 0.004 and 0.008 by the accuracy on a fifth of the training digits, left out for this, and
of 0.002 and 0.006 for copying, the larger where both do as well. The control has the LRU's.

What is reported. Accuracy on what was not trained on: a fifth of the digits, 256 new sequences. "steps/s" counts whole
training steps, by the median one. The radius is the largest |eigenvalue| after training. The table has means over the
seeds. Ctrl-C ends a run; what was measured until then is kept and drawn.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

try:
    import torch
    from common import figures
    from common.about import about_run
    from common.command_line import names, positive
    from matplotlib.axes import Axes
    from papers import figure, tasks
    from papers.recurrences import Dense, Diagonal, Network, Sizes, radius
    from papers.reproduction import Json, Reproduction, table
    from papers.tasks import Examples, accuracy
    from papers.training import Training, cosine, curve, parameters
    from torch import Tensor, nn

    from fastwkv.nn import LRU, param_groups
except ImportError as error:
    sys.exit(f"lru_steps.py: {error}; pip install -e '.[bench]' installs what it needs")

# Of each model its name, its colour, and what is new in it.
MODELS = {
    "tanh": ("tanh RNN", figure.BLUE, "where the paper begins"),
    "linear": ("linear RNN", figure.GREEN, "no tanh inside"),
    "diagonal": ("complex diagonal", figure.ORANGE, "in parallel over time"),
    "ring": ("exponential, ring", figure.PINK, "stable, long memory from the start"),
    "lru": ("LRU (with γ)", figure.RED, "what enters is normalised"),
    "short": ("LRU, short memory", figure.GREY, "control: the LRU off its ring"),
}
SEEDS, QUICK_SEEDS = 3, 1
QUICK_TASKS = ["digits", "copy-100"]
WARM_UP = 0.1  # of the steps
DECAY = 0.05  # of the weights
EVERY = 5  # steps to one point of a curve
COPY_TEST = 256  # sequences


@dataclass(frozen=True)
class Task:
    """A task, the size of its networks and their training."""

    title: str
    delay: int | None  # of copying
    sizes: Sizes
    state: int  # complex, of the diagonal recurrences
    real_state: int  # of the dense ones: as many parameters
    ring: tuple[float, float]
    short: tuple[float, float]  # of the control
    rates: dict[str, float]  # of its models
    batch: int
    steps: int
    quick_steps: int


DIGITS = Task(
    title="digits, 64 pixels",
    delay=None,
    sizes=Sizes(features=1, classes=10, answers=1, blocks=2, hidden=64, dropout=0.1),
    state=64,
    real_state=80,
    ring=(0.9, 0.999),
    short=(0.0, 0.3),
    rates=dict.fromkeys(MODELS, 4e-3) | {"diagonal": 8e-3},
    batch=50,
    steps=500,
    quick_steps=120,
)
COPY = Task(
    title="copy memory, delay 100",
    delay=100,
    sizes=Sizes(tasks.SYMBOLS + 2, tasks.SYMBOLS, tasks.LENGTH, blocks=1, hidden=128, dropout=0.0),
    state=128,
    real_state=159,
    ring=(0.99, 0.9999),
    short=(0.0, 0.5),
    rates=dict.fromkeys(MODELS, 6e-3) | {"linear": 2e-3},
    batch=32,
    steps=150,
    quick_steps=40,
)
RATES = {"lru": 6e-3, "short": 6e-3}
LONG = replace(COPY, title="copy memory, delay 400", delay=400, rates=RATES, batch=16, quick_steps=80)
TASKS = {"digits": DIGITS, "copy-100": COPY, "copy-400": LONG}


def build(task: Task, model: str) -> Network:
    """Build the network of this task around the recurrences of this model."""

    def recurrence() -> nn.Module:
        if model in ("tanh", "linear"):
            return Dense(task.sizes.hidden, task.real_state, model == "tanh")
        if model == "diagonal":
            return Diagonal(task.sizes.hidden, task.state)
        lru = LRU(task.sizes.hidden, task.state, *(task.short if model == "short" else task.ring))
        if model == "ring":  # without the normalisation: gamma is 1 and stays 1
            nn.init.zeros_(lru.gamma_log)
            lru.gamma_log.requires_grad_(False)
        return lru

    return Network(task.sizes, recurrence)


def data(task: Task, generator: torch.Generator) -> tuple[Iterator[Examples], Examples]:
    """Return training batches without end, and the test."""
    if task.delay is None:
        train, test = tasks.digits()
        return tasks.shuffled(train, task.batch, generator), test
    test = tasks.copy_memory(COPY_TEST, task.delay, generator)
    return iter(lambda: tasks.copy_memory(task.batch, task.delay, generator), None), test


def groups(network: Network, rate: float) -> list[Json]:
    """Divide the parameters as the paper does: weight decay for all that is not of the recurrence, biases too."""
    found = param_groups(network, rate, weight_decay=DECAY)
    for group in found:
        if group["lr_scale"] == 1:
            group["weight_decay"] = DECAY
    return found


class Trial(Training):
    """A task, a network and a seed."""

    def __init__(self, task: str, model: str, seed: int, steps: int, device: torch.device) -> None:
        super().__init__(f"{task} {model} {seed}", steps)
        self.about = {"task": task, "model": model, "seed": seed}
        self.device = device
        self.correct: list[float] = []  # share of each batch, before it was learned from
        self.tested: Json = {"status": "interrupted", "accuracy": None, "radius": None}  # until it ends

    def run(self, tick: Callable[[], Any]) -> None:
        """Train, then test; the same on one device and number of threads whenever it is called."""
        task, model = TASKS[self.about["task"]], self.about["model"]
        torch.manual_seed(self.about["seed"])
        batches, test = data(task, torch.Generator().manual_seed(self.about["seed"]))
        network = build(task, model).to(self.device)
        self.about |= {"parameters": parameters(network), "rate": task.rates[model]}
        optimizer = torch.optim.AdamW(groups(network, task.rates[model]), fused=True)

        def predict(batch: Examples) -> tuple[Tensor, Tensor]:
            x, y = batch.x.to(self.device), batch.y.to(self.device)
            return network(x).flatten(0, 1), y.flatten()

        def rate(step: int) -> float:
            return task.rates[model] * cosine(step, self.total, WARM_UP)

        for scores, classes in self.steps(optimizer, rate, batches, predict):
            self.correct.append(float((scores.argmax(-1) == classes).float().mean()))
            tick()
        largest = max(radius(block.recurrence) for block in network.blocks) if math.isfinite(self.losses[-1]) else None
        self.tested = {"status": "complete", "accuracy": accuracy(network, test, self.device), "radius": largest}

    def row(self) -> Json:
        """Return a row of lru_steps.json."""
        speed = {"steps": len(self.losses), "steps_per_second": self.steps_per_second}
        curves = {"loss_curve": curve(self.losses, EVERY), "accuracy_curve": curve(self.correct, EVERY)}
        return {**self.about, **self.tested, **speed, **curves}


def settings(task: Task, steps: int) -> Json:
    """Return what the record says of a task."""
    own = {name: getattr(task, name) for name in ("title", "state", "real_state", "ring", "short", "batch")}
    return own | {name: getattr(task.sizes, name) for name in ("blocks", "hidden", "dropout")} | {"steps": steps}


GUESS: Json = {"text": "guessing", "textcoords": "offset points", "fontsize": figure.SMALL, "color": figure.GREY}
GUESS |= {"va": "top"}
LINE: Json = {"color": figures.FAINT, "linewidth": 1.2, "linestyle": (0, (2, 2))}


def show(record: Json, path: Path) -> str:
    """Draw accuracy on the digits step by step of the paper, and copying as it is learned; return a table."""
    seeds, device = record["settings"]["seeds"], figures.device_name(record["device"])
    trained = f"{seeds} trainings each (points, bands)" if seeds > 1 else "one training each"
    line = f"Networks alike but for the recurrence, with equally many parameters  ·  {trained}  ·  {device}"
    title = "From a tanh RNN to the LRU: what makes a recurrence remember"
    with figure.two_panels(path, title, line, left=0.175, wspace=0.42) as (left, right):
        draw_digits(left, [row for row in record["rows"] if row["task"] == "digits" and row["accuracy"] is not None])
        draw_copying(right, record)
    columns = {"parameters": ",.0f", "accuracy": ".1%", "steps_per_second": ".1f", "radius": ".4f"}
    return table(record["rows"], ["task", "model"], columns)


def draw_digits(axes: Axes, rows: list[Json]) -> None:
    """One bar a model: the mean of the seeds, with a point for each."""
    models = [name for name in MODELS if any(row["model"] == name for row in rows)]
    bottom = max(len(models), 1) - 0.5
    title, where = "Digits as 64 pixels, told from the last state", {"xlim": (0, 100), "ylim": (bottom, -0.65)}
    figure.panel(axes, title, "x", xlabel="test accuracy (%)", yticks=[], **where)
    axes.axvline(10, zorder=4, **LINE)
    axes.annotate(xy=(10, -0.65), xytext=(4, -3), **GUESS)
    if not models:
        figure.not_run(axes)
    for height, model in enumerate(models):
        name, colour, note = MODELS[model]
        mine = [row for row in rows if row["model"] == model]
        scores = [100 * row["accuracy"] for row in mine]
        axes.barh(height, mean(scores), height=0.56, color=colour, alpha=0.3)
        axes.plot(scores, [height] * len(scores), "o", color=colour, markersize=8, markeredgecolor="white", zorder=5)
        style = {"color": colour, "weight": "bold" if model == "lru" else "normal"}
        figure.beside(axes, height, -12, name, note, **style)
        speed = f"{mean(row['steps_per_second'] for row in mine):.0f} steps/s"
        figure.beside(axes, height, 14, f"{mean(scores):.1f} %", speed, **style)


def draw_copying(axes: Axes, record: Json) -> None:
    """One line a model and delay: the mean of the seeds, in a band from the lowest to the highest."""
    title, every = "Copy memory: ten symbols, after a delay", record["settings"]["steps_a_point"]
    figure.panel(axes, title, "both", xlabel="training steps", ylabel="symbols right (%)", ylim=(0, 103))
    axes.axhline(12.5, zorder=1, **LINE)
    axes.annotate(xy=(0, 12.5), xytext=(6, -5), **GUESS)
    labels = []
    rows = [row for row in record["rows"] if row["task"] != "digits" and row["accuracy_curve"]]
    for (task, model), group in groupby(rows, lambda row: (row["task"], row["model"])):
        name, colour, _ = MODELS[model]
        points = [[100 * share for share in row["accuracy_curve"]] for row in group]
        columns = list(zip(*points, strict=False))  # of an interrupted run there are fewer points
        middle = [mean(column) for column in columns]
        steps = [every * (n + 0.5) for n in range(len(columns))]
        order, dashes = (4 if model == "lru" else 3), ("-" if task == "copy-100" else (0, (4, 1.5)))
        wide, weight = (3.4, "bold") if model == "lru" else (2.2, "normal")
        axes.plot(steps, middle, color=colour, linestyle=dashes, linewidth=wide, zorder=order)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
        text = f"delay {task.removeprefix('copy-')}: {middle[-1]:.0f} %"
        labels.append(figures.Label((steps[-1], middle[-1]), name, text, colour, weight))
    if labels:
        axes.set_xlim(0, max(one.end[0] for one in labels) + every / 2)
        figures.label(axes, sorted(labels, key=lambda one: -one.end[1]), figures.LABEL_GAP, low=14)
    else:
        figure.not_run(axes)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    program = Reproduction("lru_steps", __doc__, show)
    option = program.parser.add_argument
    known = f"comma-separated, of {', '.join(TASKS)} (default: all; with --quick {','.join(QUICK_TASKS)})"
    option("--tasks", type=names("task", TASKS), metavar="LIST", help=known)
    option("--seeds", type=positive, metavar="N", help=f"trainings of each network (default: {SEEDS})")
    option("--steps", type=positive, metavar="N", help="of a training (default: as many as the task needs)")
    option("--quick", action="store_true", help=f"fewer steps and tasks and {QUICK_SEEDS} seed: less than a minute")
    args = program.parse(arguments, threads=1)  # since one thread is slowed down least by others
    if args.redraw:
        return program.redraw(args.redraw, args.out)
    chosen = args.tasks or (QUICK_TASKS if args.quick else list(TASKS))
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    steps = {name: args.steps or (TASKS[name].quick_steps if args.quick else TASKS[name].steps) for name in chosen}
    trials = [
        Trial(name, model, seed, steps[name], args.device)
        for name in chosen
        for model in TASKS[name].rates
        for seed in range(seeds)
    ]
    shown = {name: settings(TASKS[name], steps[name]) for name in chosen}
    shown = {"seeds": seeds, "steps_a_point": EVERY, "tasks": shown}
    return program.carry_out(trials, about_run("lru_steps", args.device, shown, ["scikit-learn"]), args.out)


if __name__ == "__main__":
    sys.exit(main())
