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
training steps, by the median one. The largest eigenvalue is the one after training.
"""

import argparse
import sys
from itertools import groupby
from statistics import mean
from typing import Any

try:
    import lru_steps_figure as figure
    import torch
    from common import program, result_file
    from common.about import about_device, about_run
    from common.command_line import add_device, add_out, device, names, parser_of, positive
    from lru_steps_models import NAMES
    from lru_steps_tasks import TASKS, Task
    from lru_steps_training import EVERY, Training
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"lru_steps.py: {error}; pip install -e '.[bench]' installs what it needs")

SEEDS, QUICK_SEEDS = 3, 1
QUICK_TASKS = ["digits", "copy-100"]


class Run:
    """All trainings of one call of the program, and the files they are written to."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the settings; nothing is trained yet."""
        self.args = args
        self.trainings = [
            Training(task, model, seed) for task in args.tasks for model in task.models for seed in range(args.seeds)
        ]
        chosen = {
            "seeds": args.seeds,
            "steps_a_point": EVERY,  # of the curves
            "tasks": {task.name: settings(task, self._steps(task)) for task in args.tasks},
        }
        self.about = about_run("lru_steps", args.device, chosen, ["scikit-learn"])

    def record(self) -> dict[str, Any]:
        """Return what lru_steps.json holds."""
        return {**self.about, "rows": [training.record() for training in self.trainings]}

    def run(self) -> None:
        """Train everything, seed after seed within a model."""
        self.save()
        total = sum(self._steps(training.task) for training in self.trainings)
        with tqdm(total=total, unit=" steps", **program.bar_options()) as bar:
            for training in self.trainings:
                bar.set_description(f"{training.task.name} {training.model} {training.seed}")
                training.run(self.args.device, self._steps(training.task), bar.update)
                self.save()

    def save(self) -> None:
        """Write lru_steps.json."""
        result_file.write(self.args.out / "lru_steps.json", self.record())

    def draw(self) -> None:
        """Write lru_steps.png."""
        figure.draw(self.record(), self.args.out / "lru_steps.png")

    def _steps(self, task: Task) -> int:
        return self.args.steps or (task.quick_steps if self.args.quick else task.steps)


def settings(task: Task, steps: int) -> dict[str, Any]:
    """Return what the record says of a task."""
    shown = ("title", "blocks", "hidden", "state", "real_state", "ring", "short", "dropout", "batch")
    return {name: getattr(task, name) for name in shown} | {"steps": steps}


def table(trainings: list[Training]) -> str:
    """Return the summary that the program prints."""
    head = ["task", "network", "parameters", "accuracy %", "lowest", "highest", "steps/s", "largest eigenvalue"]
    rows = []
    for (task, model), group in groupby(trainings, lambda one: (one.task.name, one.model)):
        done = [one for one in group if one.accuracy is not None]
        scores = [100 * one.accuracy for one in done]
        radii = [one.radius for one in done if one.radius is not None]
        rows.append(
            [
                task,
                NAMES[model],
                f"{done[0].parameters:,}" if done else "-",
                *(f"{of(scores):.1f}" if done else "-" for of in (mean, min, max)),
                f"{mean(one.steps_per_second for one in done):.1f}" if done else "-",
                f"{max(radii):.4f}" if radii else "-",
            ]
        )
    return result_file.markdown(head, rows, texts=2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("lru_steps.py", __doc__)
    option = parser.add_argument
    known = f"comma-separated, of {', '.join(TASKS)} (default: all; with --quick {','.join(QUICK_TASKS)})"
    option("--tasks", type=names("task", TASKS), metavar="LIST", help=known)
    option("--seeds", type=positive, metavar="N", help=f"trainings of each network (default: {SEEDS})")
    option("--steps", type=positive, metavar="N", help="of a training (default: as many as the task needs)")
    option("--quick", action="store_true", help=f"fewer steps and tasks and {QUICK_SEEDS} seed: less than a minute")
    add_device(parser)
    option(
        "--threads",
        type=positive,
        metavar="N",
        help="of the CPU (default: 1, since these networks are small and one thread is slowed down least by others)",
    )
    add_out(parser)
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.tasks = [TASKS[name] for name in args.tasks or (QUICK_TASKS if args.quick else TASKS)]
    args.seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    torch.set_num_threads(args.threads or 1)
    result_file.check(args.out / "lru_steps.json", about_device(args.device), parser)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(run.run, run.save)
    run.draw()
    print(f"\n{table(run.trainings)}\n")
    print(f"wrote {args.out / 'lru_steps.png'} and {args.out / 'lru_steps.json'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
