"""Tokens of a small RWKV-4: those of a CUDA graph are those without, and few kernels give what the layers give."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from correctness.checks import Case, Check, Results
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config, generate

CONFIG = RWKV4Config(layers=3, width=64, vocab_size=97)
REHEARSED = RWKV4Config(layers=1, width=8, vocab_size=11)
BATCH, PROMPT, TOKENS = 2, 6, 40
DRAWS: dict[str, dict[str, Any]] = {"likeliest": {}, "drawn": {"temperature": 0.8, "top_p": 0.6, "seed": 3}}
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of features: three blocks, each rounded several times


def model(config: RWKV4Config, dtype: torch.dtype, device: torch.device, seed: int = 0) -> RWKV4:
    """Return a model whose every parameter matters; a fresh one has zero matrices, and takes its time to make them."""
    with torch.device("meta"):
        made = RWKV4(config)
    made = made.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            scale = "ln" in name and name.endswith("weight")
            parameter.normal_(mean=float(scale), std=0.1, generator=generator)
            if "time_mix" in name:
                parameter.uniform_(generator=generator)
    return made


def cases(dtype: str, rehearse: bool = False) -> Iterator[Case]:
    """Return the cases of two dtypes and two ways to draw."""
    config, count, few = (REHEARSED, 4, 2) if rehearse else (CONFIG, TOKENS, 12)
    for of_model in (torch.float32,) if rehearse else BOUNDS:
        name = str(of_model).removeprefix("torch.")
        for draw in DRAWS:
            prepare = partial(_tokens, config, of_model, draw, count)
            yield Case(f"{name}, {draw}", prepare, short=draw == "likeliest")
        yield Case(f"{name}, features", partial(_features, config, of_model, few))


def _prompt(config: RWKV4Config, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (BATCH, length), generator=generator).to(device)


def _tokens(config: RWKV4Config, dtype: torch.dtype, draw: str, count: int, device: torch.device) -> Check:
    one, prompt = model(config, dtype, device), _prompt(config, PROMPT, device)

    def run(graph: bool | None) -> Results:
        stream = generate(one, prompt, count, graph=graph, **DRAWS[draw])
        tokens = torch.stack(list(stream))
        assert stream.state is not None
        return {"tokens": tokens.double(), **{name: t.double() for name, t in stream.state.tensors().items()}}

    def launch() -> Results:
        return run(True if device.type == "cuda" else None)

    names = ("tokens", *one.features(prompt)[1].tensors())
    return Check(launch, lambda: run(False), dict.fromkeys(names, 0.0), recorded=False)


def _features(config: RWKV4Config, dtype: torch.dtype, count: int, device: torch.device) -> Check:
    one, prompt = model(config, dtype, device), _prompt(config, PROMPT, device)
    text = _prompt(config, PROMPT + count, device)[:, PROMPT:]

    def wanted() -> Results:
        with torch.no_grad():
            _, state = one.features(prompt)
            return {"x": one.features(text, state)[0]}

    def launch() -> Results:
        with torch.no_grad():
            _, state = one.features(prompt)
            state = state.clone()
            return {"x": torch.stack([one.step_(token, state) for token in text.unbind(1)], 1)}

    return Check(launch, wanted, {"x": BOUNDS[dtype]}, recorded=False)
