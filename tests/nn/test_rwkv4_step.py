"""The token that is made of few kernels: the numbers of the blocks, where it may stand for them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from implementations import Implementation
from operations import Operations
from rwkv4_models import CONFIG, SAME, distance, fields, text, trained
from torch import Tensor, nn

from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State, rwkv4_step

BOUNDS = {torch.float32: SAME, torch.float64: 1e-14, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture
def there() -> Iterator[torch.device]:
    with Implementation("triton") as context:
        yield context.device


def of_modules(model: RWKV4, token: Tensor, state: RWKV4State) -> tuple[Tensor, RWKV4State]:
    with torch.no_grad():
        x, state = model.features(token[:, None], state)
    return x[:, 0], state


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("config", "batch"), [(CONFIG, 1), (replace(CONFIG, width=36, rescale_every=2), 3)])
def test_tokens_are_those_of_the_blocks(config: RWKV4Config, batch: int, dtype: torch.dtype, there: Any) -> None:
    model = trained(config).to(there, dtype).eval()
    state = model.empty_state(batch)
    mine = state.clone()
    places = [t.data_ptr() for t in mine.tensors().values()]
    for token in text(batch, 4).to(there).unbind(1):
        wanted, state = of_modules(model, token, state)
        with torch.no_grad():
            found = rwkv4_step.run(model, token, mine)
        assert found.dtype == wanted.dtype
        assert distance(found, wanted) <= BOUNDS[dtype]
    for name, field in fields(mine).items():
        assert distance(field, fields(state)[name]) <= 2 * BOUNDS[dtype], name
    assert [t.data_ptr() for t in mine.tensors().values()] == places


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_is_not_rescaled(training: bool, there: Any) -> None:
    model = trained(replace(CONFIG, rescale_every=1)).to(there).train(training)
    state, token = model.empty_state(2), torch.tensor([3, 30]).to(there)
    wanted, _ = of_modules(model, token, state)
    with torch.no_grad():
        assert distance(rwkv4_step.run(model, token, state), wanted) <= SAME


def test_parameters_of_16_bits_that_are_float32_in_checkpoints(there: Any) -> None:
    model = trained().to(there, torch.bfloat16).eval()
    for block in model.blocks:
        block.attention.time_decay.data = block.attention.time_decay.data.float()
        block.attention.time_first.data = block.attention.time_first.data.float()
    state, token = model.empty_state(1), torch.tensor([7]).to(there)
    wanted, _ = of_modules(model, token, state)
    with torch.no_grad():
        assert distance(rwkv4_step.run(model, token, state), wanted) <= BOUNDS[torch.bfloat16]


def test_block_is_twelve_kernels(there: Any) -> None:
    counts = {}
    for layers in (2, 3):
        model = trained(replace(CONFIG, layers=layers)).to(there).eval()
        state, token = model.empty_state(1), torch.tensor([7]).to(there)
        with Operations() as operations, torch.no_grad():
            rwkv4_step.run(model, token, state)
        counts[layers] = len(operations.calls)
    assert counts[3] - counts[2] == 12
    assert counts[2] == 2 * 12 + 5  # embedding, its norm, rates (two), the last norm


def test_replaced_parameters_and_modules_are_read_at_the_next_token(there: Any) -> None:
    model = trained().to(there).eval()
    mine = model.empty_state(1)
    state = mine.clone()
    for token in text(1, 4).to(there).unbind(1):
        wanted, state = of_modules(model, token, state)
        with torch.no_grad():
            assert distance(rwkv4_step.run(model, token, mine), wanted) <= SAME
        model.blocks[1] = trained(seed=7).to(there).eval().blocks[1]
        model.blocks[2].ln2.bias = nn.Parameter(0.5 * model.blocks[2].ln2.bias.detach())
        model.blocks[0].feed_forward.key.weight = nn.Parameter(2 * model.blocks[0].feed_forward.key.weight.detach())
        model.blocks[0].pre_ln = None


def test_a_model_takes_it_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(RWKV4):
        pass

    calls: list[RWKV4] = []
    monkeypatch.setattr(rwkv4_step, "run", lambda model, tokens, state: calls.append(model))
    model, other, token = trained(), Mine(CONFIG), torch.tensor([1])
    for allowed in (False, True):
        monkeypatch.setattr(rwkv4_step, "stands_for", lambda *_, allowed=allowed: allowed)
        for one in (model, other):
            one.step_(token, one.empty_state(1))
    assert calls == [model]
