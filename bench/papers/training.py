"""One training: its loop, and what was measured of it so far."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Training(ABC):
    """A training of so many steps; what was measured of it until now is a row of a record, at any moment."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.losses: list[float] = []  # of each step, in nats, before it was learned from
        self.seconds: list[float] = []  # of each step

    @abstractmethod
    def run(self, tick: Callable[[], Any]) -> None:
        """Train to the end, then test; call ``tick`` after every step."""

    @abstractmethod
    def row(self) -> dict[str, Any]:
        """Return what the record says of it, once a step is done."""

    @property
    def steps_per_second(self) -> float:
        """Steps in a second, by the median step."""
        return 1 / median(self.seconds)

    def steps(
        self,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        batches: Iterable[Any],
        predict: Callable[[Any], tuple[Tensor, Tensor]],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Learn from a batch a step, and yield what was predicted of it while the clock stands.

        ``predict`` maps a batch to scores ``[N, classes]`` and the right classes ``[N]``; ``rate`` says the learning
        rate of a step, of which each group of ``fastwkv.nn.param_groups`` has its multiple.
        """
        for step, batch in zip(range(self.total), batches, strict=False):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * rate(step)
            scores, classes = predict(batch)
            loss = F.cross_entropy(scores.float(), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.item()  # waits for the device
            self.seconds.append(time.perf_counter() - begin)
            self.losses.append(value)
            yield scores.detach(), classes


def cosine(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the learning rate: it rises linearly in a share of the steps, then falls to 0 as a cosine."""
    rise = max(round(warm_up * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def curve(values: list[float], every: int) -> list[float]:
    """Return the means of so many values each, the last one of what is left."""
    return [fmean(values[first : first + every]) for first in range(0, len(values), every)]


def parameters(model: torch.nn.Module) -> int:
    """Return how many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
