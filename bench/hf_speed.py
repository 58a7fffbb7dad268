"""Speed of Hugging Face's RWKV-4 with this package's operator inside: patched against unpatched, by turns.

The model is of the 169M class (12 layers of 768, vocabulary 50277), in float32, with random weights. "train" is a
forward and backward pass of its loss over a text of 1024 tokens, "prefill" what generate does first: the same text
without gradients, the logits of its last token and the state after it.

A third row tells where the rest goes: the patched model with an operator that does no more than add keys and values.
Nothing that is done to the operator can make the model faster than that.

Each round runs every model once, and a ratio is the median over the rounds, so that whatever else the machine does
falls on all alike. The first run of each does not count; its logits are compared, and its gradients.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

try:
    import torch
    from common import program, result_file
    from common.about import about_device, about_run
    from common.command_line import add_device, add_out, device, names, parser_of, positive
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
WRONG = 1e-4  # ‖error‖/‖result‖ against the unpatched model: far above rounding, far below any mistake
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
    """What is timed, and how many times faster than unpatched it is meant to be on a CPU."""

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


class Run:
    """One call of the program and the file that it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model and the text; nothing is timed yet."""
        self.args = args
        self.sizes, length = (QUICK_SIZES, QUICK_LENGTH) if args.quick else (SIZES, LENGTH)
        self.rows: list[dict[str, Any]] = []
        torch.manual_seed(args.seed)
        with patch():
            self.model = RwkvForCausalLM(RwkvConfig(**self.sizes, context_length=length)).to(args.device)
        self.tokens = torch.randint(0, self.sizes["vocab_size"], (1, length), device=args.device)
        settings = {**self.sizes, "B": 1, "T": length, "dtype": "float32", "seed": args.seed}
        self.about = about_run("hf_speed", args.device, settings)

    def save(self) -> None:
        """Write hf_speed.json."""
        result_file.write(self.args.out / "hf_speed.json", {**self.about, "rows": self.rows})

    def run(self) -> None:
        """Time every pass."""
        total = len(self.args.passes) * len(PROVIDERS) * (1 + self.args.rounds)
        with tqdm(total=total, disable=None) as bar:
            for name in self.args.passes:
                bar.set_description(name)
                self.rows += self._pass(name, bar)
                self.save()

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
                errors[provider] = max(map(relative_error, results, wanted))
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
                "times_faster": median(map(ratio, tasks[THEIRS].seconds, task.seconds)),
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


def ratio(numerator: float, denominator: float) -> float:
    """Divide."""
    return numerator / denominator


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm())


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out what was measured in markdown."""
    head = ["pass", "model", "goal", "ms", "least", "times faster", "error"]
    lines = []
    for row in rows:
        reached = "" if row["goal"] is None else "reached" if row["times_faster"] >= row["goal"] else "MISSED"
        goal = "" if row["goal"] is None else f"{row['goal']}, {reached}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        figures = [f"{row['ms']:.0f}", f"{row['ms_min']:.0f}", f"{row['times_faster']:.2f}", error]
        lines.append([row["pass"], row["provider"], goal, *figures])
    return result_file.markdown(head, lines, texts=3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = parser_of("hf_speed.py", __doc__)
    option = parser.add_argument
    add_device(parser)
    known = ",".join(PASSES)
    option("--passes", type=names("pass", PASSES), default=list(PASSES), metavar="LIST", help=f"(default: {known})")
    option("--rounds", type=positive, metavar="N", help=f"(default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
    option("--quick", action="store_true", help="a small model and a short text: seconds, and no measure of anything")
    option("--seed", type=int, default=0, metavar="N", help="of weights and text (default: 0)")
    add_out(parser)
    args = parser.parse_args(arguments)
    args.device = device(args.device, parser)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    result_file.check(args.out / "hf_speed.json", about_device(args.device), parser)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if the patched model gave another result."""
    args = parse(arguments)
    run = Run(args)
    status = program.run_and_save(run.run, run.save)
    print(f"\n{table(run.rows)}\n\nwrote {args.out / 'hf_speed.json'}")
    program.complain_of_other_work("hf_speed.py", run.rows, args.device)
    bad = [row for row in run.rows if row["error"] is not None and not row["error"] <= WRONG]
    for row in bad:
        print(f"hf_speed.py: {row['pass']}: wrong, error {row['error']:.1e} > {WRONG:.0e}", file=sys.stderr)
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
