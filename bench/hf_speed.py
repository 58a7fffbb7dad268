"""Speed of Hugging Face's RWKV-4 with this package's operator inside: patched against unpatched, by turns.

The model is of the 169M class (12 layers of 768, vocabulary 50277), in float32, with random weights. "train" is a
forward and backward pass of its loss over a sequence of 1024 tokens, "prefill" the first step of generate: the same
tokens without gradients, the logits of the last one and the state after it.

A third row tells where the rest goes: the patched model with an operator that does no more than add keys and values.
Nothing that is done to the operator can make the model faster than that.

Each round runs every model once, and a ratio is the median over the rounds, so that other work of the machine
falls on all alike. The first run of each does not count; its logits are compared, and its gradients.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import truediv
from statistics import median
from typing import Any
from unittest import mock

try:
    import torch
    from common.command_line import Parser, add_list, positive
    from common.program import Program
    from common.result_file import cell, markdown
    from peers.operator import WRONG, judged, relative_error
    from timing.by_turns import OtherWork, Task
    from torch import Tensor
    from tqdm import tqdm
    from transformers import RwkvConfig, RwkvForCausalLM

    from fastwkv.integrations import _rwkv_forward
    from fastwkv.integrations.transformers import patch
except ImportError as error:
    sys.exit(f"hf_speed.py: {error}; pip install -e '.[bench]' installs what it needs")

SIZES = {"num_hidden_layers": 12, "hidden_size": 768, "vocab_size": 50277}
QUICK_SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256}
LENGTH, QUICK_LENGTH = 1024, 64
ROUNDS, QUICK_ROUNDS = 5, 2
DTYPE = "float32"
THEIRS, OURS, LIMIT = "unpatched", "patched", "patched, free operator"


def train(model: Any, tokens: Tensor) -> list[Tensor]:
    """Forward and backward; return the logits and all gradients."""
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return [output.logits, *(parameter.grad for parameter in model.parameters())]


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> list[Tensor]:
    """Forward as generate does it first; return the logits of the last token."""
    return [model(tokens, use_cache=True, logits_to_keep=1).logits]


@dataclass(frozen=True)
class Pass:
    """A call that is timed, and how many times faster than unpatched it is meant to be on a CPU."""

    call: Callable[[Any, Tensor], list[Tensor]]
    goal: float


PASSES = {"train": Pass(train, 2.8), "prefill": Pass(prefill, 2.2)}


@contextlib.contextmanager
def free_operator() -> Any:
    """Patch, but with an operator that costs next to nothing and still has keys and values take part."""

    def added(decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: Any, return_state: bool) -> Any:
        return key + value, [key[:, -1]] * 3 if return_state else None

    with patch(), mock.patch.object(_rwkv_forward, "linear_attention", added):
        yield


PROVIDERS: dict[str, Callable[[], Any]] = {THEIRS: contextlib.nullcontext, OURS: patch, LIMIT: free_operator}


class HFSpeed(Program):
    """The program."""

    name = "hf_speed"

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model and the tokens; nothing is timed yet."""
        self.sizes, self.length = (QUICK_SIZES, QUICK_LENGTH) if args.quick else (SIZES, LENGTH)
        super().__init__(args)
        torch.manual_seed(args.seed)
        with patch():
            self.model = RwkvForCausalLM(RwkvConfig(**self.sizes, context_length=self.length)).to(args.device)
        self.tokens = torch.randint(0, self.sizes["vocab_size"], (1, self.length), device=args.device)

    @classmethod
    def options(cls, parser: Parser) -> None:
        option = parser.add_argument
        add_list(parser, "--passes", "pass", PASSES, PASSES)
        option("--rounds", type=positive, metavar="N", help=f"(default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
        text = "a small model and a short sequence: seconds, and no measure of anything"
        option("--quick", action="store_true", help=text)
        option("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")

    @classmethod
    def complete(cls, args: argparse.Namespace, parser: Parser) -> None:
        args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)

    def settings(self) -> dict[str, Any]:
        return {**self.sizes, "B": 1, "T": self.length, "dtype": DTYPE, "seed": self.args.seed}

    def run(self) -> None:
        total = len(self.args.passes) * len(PROVIDERS) * (1 + self.args.rounds)
        with tqdm(total=total, disable=None) as bar:
            for name in self.args.passes:
                bar.set_description(name)
                self.add(*self._pass(name, bar))

    def _pass(self, name: str, bar: tqdm) -> list[dict[str, Any]]:
        """Run once to compare, then time in rounds; return the rows."""
        self.model.train(name == "train")
        others = OtherWork()
        tasks = {provider: self._task(name) for provider in PROVIDERS}
        errors: dict[str, float | None] = dict.fromkeys(PROVIDERS)
        for provider, task in tasks.items():
            with PROVIDERS[provider]():
                results, task.first = task.run()
            if provider == THEIRS:
                wanted = [result.detach().clone() for result in results]  # gradients live where the next ones go
            elif provider == OURS:
                errors[provider] = judged(dict(enumerate(map(relative_error, results, wanted))), DTYPE)["error"]
            bar.update()
        del results, wanted
        for _ in range(self.args.rounds):
            for provider, task in tasks.items():
                with PROVIDERS[provider]():
                    task.seconds.append(task.run()[1])
                bar.update()
        cores = others.cores()
        goal = PASSES[name].goal if self.args.device.type == "cpu" and not self.args.quick else None
        return [
            {
                "pass": name,
                "provider": provider,
                **task.figures(),
                "times_faster": median(map(truediv, tasks[THEIRS].seconds, task.seconds)),
                "goal": goal if provider == OURS else None,
                "error": errors[provider],
                "other_cores": cores,
            }
            for provider, task in tasks.items()
        ]

    def _task(self, name: str) -> Task:
        return Task(
            lambda _: PASSES[name].call(self.model, self.tokens),
            self.args.device,
            prepare=lambda: self.model.zero_grad(set_to_none=True),
        )

    @classmethod
    def table(cls, record: dict[str, Any]) -> str:
        head = ["pass", "model", "goal", "ms", "least", "times faster", "error"]
        lines = []
        for row in record["rows"]:
            goal = row["goal"]
            met = "" if goal is None else f"{goal}, {'reached' if row['times_faster'] >= goal else 'MISSED'}"
            figures = [f"{row['ms']:.0f}", f"{row['ms_min']:.0f}", f"{row['times_faster']:.2f}"]
            lines.append([row["pass"], row["provider"], met, *figures, cell(row["error"], ".1e")])
        return markdown(head, lines, texts=3)

    @classmethod
    def complaint(cls, row: dict[str, Any]) -> str | None:
        if row["error"] is None or row["error"] <= WRONG[DTYPE]:  # NaN is not
            return None
        return f"{row['pass']}: wrong, error {row['error']:.1e} > {WRONG[DTYPE]:.0e}"


main = HFSpeed.main

if __name__ == "__main__":
    sys.exit(main())
