"""What needs a memory: digits read pixel by pixel, and symbols to repeat.

Both are answered in the last steps of a sequence, one class a step, when a network has most or all of what it is asked
about in its state only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import one_hot

SYMBOLS, LENGTH = 8, 10  # to repeat
BLANK, GO = SYMBOLS, SYMBOLS + 1
TOGETHER = 64  # sequences of a test in one call
DIGITS_TEST = 0.2  # of the images
SPLIT = 0  # the seed that parts training from test, whatever the seed of a run


class Examples(NamedTuple):
    """Sequences ``[B, T, features]`` and the classes that answer them, ``[B, answers]``, drawn on the CPU."""

    x: Tensor
    y: Tensor


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


@torch.no_grad()
def accuracy(network: nn.Module, test: Examples, device: torch.device) -> float:
    """Return the share of right answers; the network is in evaluation mode from then on."""
    network.eval()
    right = 0
    for x, y in zip(test.x.split(TOGETHER), test.y.split(TOGETHER), strict=True):
        right += int((network(x.to(device)).argmax(-1) == y.to(device)).sum())
    return right / test.y.numel()
