"""One training of learning_curve.py: its steps, what was measured of them, and how it goes on after an interrupt."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import learning_curve_checkpoint as checkpoint
import torch
from learning_curve_data import Batch, Batches
from learning_curve_models import Recipe, build, predict
from torch import Tensor
from torch.nn import functional as F

from fastwkv.nn import RWKV4, RWKV4State, param_groups

EVERY = 50  # steps from one checkpoint to the next


@dataclass(frozen=True)
class Options:
    """How RWKV-4 is trained, beyond what both models have in common."""

    truncated: bool = False
    packed: bool = False
    gradient_checkpointing: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Settings:
    """All that a curve depends on."""

    model: str
    text: str  # its digest
    layers: int
    width: int
    length: int  # T
    batch: int
    steps: int
    seed: int
    consecutive: bool  # windows, not in random order
    recipe: Recipe
    options: Options


class Training:
    """A training and what was measured of it so far."""

    def __init__(self, settings: Settings, batches: Batches, device: torch.device) -> None:
        """Build the model; nothing is trained yet."""
        self.settings = settings
        self.losses: list[float] = []  # of each step, in nats, before it was learned from
        self.seconds: list[float] = []
        self._batches, self._device = batches, device
        self.model = build(settings.model, settings.layers, settings.width, settings.length, settings.seed).to(device)
        if isinstance(self.model, RWKV4):
            self.model.gradient_checkpointing = settings.options.gradient_checkpointing
        groups = param_groups(self.model, settings.recipe.rate, weight_decay=0.0)
        self.optimizer = torch.optim.Adam(groups, betas=settings.recipe.betas, fused=True)
        self.state: RWKV4State | None = None  # after the last step, if truncated

    def run(self, path: Path, tick: Callable[[], Any]) -> None:
        """Train to the end, with a checkpoint every ``EVERY`` steps and one at the end."""
        while self.position < self.settings.steps:
            self.step()
            tick()
            if self.position % EVERY == 0 or self.position == self.settings.steps:
                self.save(path)

    @property
    def position(self) -> int:
        """How many steps are done."""
        return len(self.losses)

    @property
    def steps_per_second(self) -> float:
        """Steps in a second, by the median step."""
        return 1 / median(self.seconds)

    def step(self) -> None:
        """Learn from the next batch."""
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * self.settings.recipe.rate_of(self.position, self.settings.steps)
        loss = self.loss(self._batches[self.position])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        value = loss.item()  # waits for the device
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(value)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, in nats a byte."""
        inputs, targets = batch.inputs.to(self._device), batch.targets.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.options.bfloat16):
            logits = self._predict(inputs, batch)
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())

    def _predict(self, inputs: Tensor, batch: Batch) -> Tensor:
        options = self.settings.options
        if options.truncated:
            logits, state = self.model(inputs, None if batch.first else self.state)
            self.state = state.detach()
            return logits
        if options.packed:
            return self.model(inputs.reshape(1, -1), cu_seqlens=batch.cu_seqlens.to(self._device))[0]
        return predict(self.model, inputs)

    def save(self, path: Path) -> None:
        """Write all that the next step depends on, and the curve so far."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        if self.state is not None:
            tensors |= {f"state.{name}": tensor for name, tensor in self.state.tensors().items()}
        for name in ("losses", "seconds"):
            tensors[name] = torch.tensor(getattr(self, name), dtype=torch.float64)
        checkpoint.write(path, tensors, asdict(self.settings))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; raise :class:`checkpoint.WrongCheckpoint` if it is of another training."""
        tensors = checkpoint.read(path, asdict(self.settings))
        self.model.load_state_dict(_part(tensors, "model."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if state := _part(tensors, "state."):
            self.state = RWKV4State.from_tensors(state).to(self._device)
        self.losses, self.seconds = tensors["losses"].tolist(), tensors["seconds"].tolist()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
