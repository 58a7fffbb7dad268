"""One training of lru_steps.py: a network, a task and a seed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

import torch
from lru_steps_models import Network
from lru_steps_tasks import Examples, Task, data
from torch.nn import functional as F

from fastwkv.nn import param_groups

WARM_UP = 0.1  # of the steps
DECAY = 0.05  # of the weights
EVERY = 5  # steps to one point of a curve
CHUNK = 64  # sequences at once in the test


@dataclass
class Training:
    """A training and what was measured of it so far."""

    task: Task
    model: str
    seed: int
    status: str = "not run"
    parameters: int | None = None
    radius: float | None = None
    accuracy: float | None = None  # of the test
    losses: list[float] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)  # share of each batch, before it was learned from
    seconds: list[float] = field(default_factory=list)  # of each step

    @property
    def steps_per_second(self) -> float | None:
        """Steps in a second, by the median step."""
        return 1 / median(self.seconds) if self.seconds else None

    def record(self) -> dict[str, Any]:
        """Return a row of lru_steps.json."""
        return {
            "task": self.task.name,
            "model": self.model,
            "seed": self.seed,
            "status": self.status,
            "parameters": self.parameters,
            "rate": self.task.rates[self.model],
            "steps": len(self.seconds),
            "accuracy": self.accuracy,
            "radius": self.radius,
            "steps_per_second": self.steps_per_second,
            "loss_curve": curve(self.losses),
            "accuracy_curve": curve(self.correct),
        }

    def run(self, device: torch.device, steps: int, tick: Callable[[], Any]) -> None:
        """Train, then test; the same on one device and number of threads whenever it is called."""
        self.status = "interrupted"  # until it ends
        torch.manual_seed(self.seed)
        batches, test = data(self.task, torch.Generator().manual_seed(self.seed))
        network = Network(self.task, self.model).to(device)
        self.parameters = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        rate = self.task.rates[self.model]
        optimizer = torch.optim.AdamW(groups(network, rate), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: relative_rate(step, steps))
        for batch in islice(batches, steps):
            begin = time.perf_counter()
            x, y = batch.x.to(device), batch.y.to(device)
            scores = network(x).flatten(0, 1)
            loss = F.cross_entropy(scores, y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            value = loss.item()  # waits for the device
            self.seconds.append(time.perf_counter() - begin)
            self.losses.append(value)
            self.correct.append(float((scores.argmax(-1) == y.flatten()).float().mean()))
            tick()
        self.radius = network.radius() if math.isfinite(value) else None
        self.accuracy = accuracy(network, test, device)
        self.status = "complete"


def groups(network: Network, rate: float) -> list[dict[str, Any]]:
    """Divide the parameters as the paper does: weight decay for all that is not of the recurrence, biases too."""
    found = param_groups(network, rate, weight_decay=DECAY)
    for group in found:
        if group["lr_scale"] == 1:
            group["weight_decay"] = DECAY
    return found


@torch.no_grad()
def accuracy(network: Network, test: Examples, device: torch.device) -> float:
    """Return the share of right answers."""
    network.eval()
    right = 0
    for x, y in zip(test.x.split(CHUNK), test.y.split(CHUNK), strict=True):
        right += int((network(x.to(device)).argmax(-1) == y.to(device)).sum())
    return right / test.y.numel()


def relative_rate(step: int, steps: int) -> float:
    """Rise linearly to 1, then fall to 0 along a cosine."""
    rise = max(round(WARM_UP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def curve(values: list[float]) -> list[float]:
    """Return the means of ``EVERY`` values each, the last one of what is left."""
    parts = [values[start : start + EVERY] for start in range(0, len(values), EVERY)]
    return [sum(part) / len(part) for part in parts]
