"""The token that is made of few kernels: the numbers of the blocks, where it may stand for them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from implementations import Implementation
from operations import Operations
from rwkv4_models import CONFIG, SAME, distance, fields, text, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastwkv import WKVState
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


def hooked(model: RWKV4) -> None:
    model.blocks[1].feed_forward.key.register_forward_hook(lambda *_: None)


def hooked_before(model: RWKV4) -> None:
    model.blocks[0].register_forward_pre_hook(lambda *_: None)


def replaced(model: RWKV4) -> None:
    model.blocks[2].attention.output = nn.Sequential(model.blocks[2].attention.output)


def parametrised(model: RWKV4) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attention.key)


def compiled(model: RWKV4) -> None:
    model.blocks[0].compile()


def patched(model: RWKV4) -> None:
    model.blocks[0].attention.forward = lambda x, *_: x


def derived(model: RWKV4) -> None:
    model.blocks[1].attention.__class__ = type("Mine", (type(model.blocks[1].attention),), {})


def biased(model: RWKV4) -> None:
    model.blocks[1].attention.output = nn.Linear(CONFIG.width, CONFIG.width)


def without_weight(model: RWKV4) -> None:
    model.blocks[1].ln2 = nn.LayerNorm(CONFIG.width, elementwise_affine=False)


def without_bias(model: RWKV4) -> None:
    model.blocks[1].ln2 = nn.LayerNorm(CONFIG.width, bias=False)


def norm_of_two_axes(model: RWKV4) -> None:
    model.blocks[0].ln1 = nn.LayerNorm((2, CONFIG.width))


def broadcast(model: RWKV4) -> None:
    model.blocks[0].feed_forward.time_mix_key = nn.Parameter(torch.ones(1))


class Quantised(Tensor):
    pass


def quantised(model: RWKV4) -> None:
    linear = model.blocks[0].attention.output
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)


CHANGES = [
    hooked,
    hooked_before,
    replaced,
    parametrised,
    compiled,
    patched,
    derived,
    biased,
    without_weight,
    without_bias,
    norm_of_two_axes,
    broadcast,
    quantised,
]
TOKENS = torch.tensor([3, 30])


@pytest.fixture
def on_gpu() -> RWKV4State:
    """Return a state on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        shape = (CONFIG.layers, 2, CONFIG.width)
        x, y, *wkv = (torch.empty(shape) for _ in range(5))
    return RWKV4State(x, y, WKVState(*wkv))


@pytest.mark.parametrize("change", CHANGES)
def test_it_stands_for_blocks_as_they_were_built_alone(change: Callable[[RWKV4], None], on_gpu: RWKV4State) -> None:
    model = trained()
    assert rwkv4_step.stands_for(model, TOKENS, on_gpu)
    change(model)
    assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)


def test_it_stands_for_nothing_under_autocast_or_hooks_of_all_modules(on_gpu: RWKV4State) -> None:
    model = trained()
    torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a GPU
    try:
        assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)
    finally:
        torch.set_autocast_enabled("cuda", False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)
    finally:
        handle.remove()
    turned = on_gpu._replace(att_x=on_gpu.att_x.mT)
    assert not rwkv4_step.stands_for(model, TOKENS, turned)
    assert not rwkv4_step.stands_for(model, TOKENS, model.empty_state(2))  # on a CPU
    assert not rwkv4_step.stands_for(model, TOKENS[:1], on_gpu)  # of another number of texts: the blocks say so
    assert rwkv4_step.stands_for(model, TOKENS, on_gpu)


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
