"""What the networks of lru_steps.py learn: digits read pixel by pixel, and symbols to remember.

Both tasks are answered in the last steps of a sequence, one class a step, when a network has most or all of what it is
asked about in its state only: inputs are [B, T, features], answers [B, answers].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import one_hot

SYMBOLS, LENGTH = 8, 10  # of the copy tasks
BLANK, GO = SYMBOLS, SYMBOLS + 1
COPY_TEST = 256  # sequences
DIGITS_TEST = 0.2  # of the images
SPLIT = 0  # the seed that parts training from test, whatever the seed of a run

ALL = ("tanh", "linear", "diagonal", "ring", "lru", "short")  # models; see lru_steps_models.py

Ring = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """A task, the size of its networks and their training."""

    name: str
    title: str
    features: int
    classes: int
    answers: int  # how many of the last steps
    delay: int | None  # None for digits
    models: tuple[str, ...]
    blocks: int
    hidden: int
    state: int  # complex, of the diagonal recurrences
    real_state: int  # of the dense ones: as many parameters
    ring: Ring
    short: Ring  # of the control
    rates: dict[str, float]
    dropout: float
    batch: int
    steps: int
    quick_steps: int


@dataclass(frozen=True)
class Examples:
    """Sequences [B, T, features] and their answers [B, answers]."""

    x: Tensor
    y: Tensor


def _copy(delay: int, models: tuple[str, ...], batch: int, quick_steps: int) -> Task:
    return Task(
        name=f"copy-{delay}",
        title=f"copy memory, delay {delay}",
        features=SYMBOLS + 2,
        classes=SYMBOLS,
        answers=LENGTH,
        delay=delay,
        models=models,
        blocks=1,
        hidden=128,
        state=128,
        real_state=159,
        ring=(0.99, 0.9999),
        short=(0.0, 0.5),
        rates={"tanh": 6e-3, "linear": 2e-3, "diagonal": 6e-3, "ring": 6e-3, "lru": 6e-3, "short": 6e-3},
        dropout=0.0,
        batch=batch,
        steps=150,
        quick_steps=quick_steps,
    )


DIGITS = Task(
    name="digits",
    title="digits, 64 pixels",
    features=1,
    classes=10,
    answers=1,
    delay=None,
    models=ALL,
    blocks=2,
    hidden=64,
    state=64,
    real_state=80,
    ring=(0.9, 0.999),
    short=(0.0, 0.3),
    rates={"tanh": 4e-3, "linear": 4e-3, "diagonal": 8e-3, "ring": 4e-3, "lru": 4e-3, "short": 4e-3},
    dropout=0.1,
    batch=50,
    steps=500,
    quick_steps=120,
)
COPIES = (_copy(100, ALL, 32, 40), _copy(400, ("lru", "short"), 16, 80))
TASKS = {task.name: task for task in (DIGITS, *COPIES)}


def data(task: Task, generator: torch.Generator) -> tuple[Iterator[Examples], Examples]:
    """Return training batches without end, and the test.

    Everything is drawn on the CPU, so that every device sees the same.
    """
    if task.delay is None:
        train, test = digits()
        return shuffled(train, task.batch, generator), test
    test = copy_memory(COPY_TEST, task.delay, generator)
    return iter(lambda: copy_memory(task.batch, task.delay, generator), None), test


def digits() -> tuple[Examples, Examples]:
    """Return scikit-learn's 1797 digits, 8 x 8 pixels in [0, 1] row after row: training and test."""
    images, classes = load_digits(return_X_y=True)
    images = images.astype(np.float32)[..., None] / 16
    parts = train_test_split(images, classes[:, None], test_size=DIGITS_TEST, stratify=classes, random_state=SPLIT)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Examples(train_x, train_y), Examples(test_x, test_y)


def shuffled(examples: Examples, batch: int, generator: torch.Generator) -> Iterator[Examples]:
    """Go through the examples again and again, each time in another order; what does not fill a batch is left out."""
    count = len(examples.x)
    while True:
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % batch].split(batch):
            yield Examples(examples.x[rows], examples.y[rows])


def copy_memory(batch: int, delay: int, generator: torch.Generator) -> Examples:
    """Draw sequences of 10 symbols, ``delay`` blanks of which the last says "go", and 10 blanks to answer in.

    The inputs are one-hot: 8 symbols, blank, go. The answers are the symbols.
    """
    symbols = torch.randint(SYMBOLS, (batch, LENGTH), generator=generator)
    tokens = symbols.new_full((batch, LENGTH + delay + LENGTH), BLANK)
    tokens[:, :LENGTH] = symbols
    tokens[:, LENGTH + delay - 1] = GO
    return Examples(one_hot(tokens, SYMBOLS + 2).float(), symbols)
