"""Where the token of few kernels may stand for the blocks: as long as they are as they were built, token by token."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rwkv4_models import CONFIG, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastwkv import WKVState
from fastwkv.nn import RWKV4, RWKV4Config, RWKV4State, rwkv4_step


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


def of_another_shape(model: RWKV4) -> None:
    model.blocks[1].attention.time_first.data = torch.ones(1)


def without_a_parameter(model: RWKV4) -> None:
    weight = model.blocks[1].ln1.weight.detach()
    del model.blocks[1].ln1.weight
    model.blocks[1].ln1.weight = weight


def of_a_plain_attribute(model: RWKV4) -> None:
    weight = model.blocks[1].attention.key.weight.detach()
    del model.blocks[1].attention.key.weight
    model.blocks[1].attention.key.weight = weight


def with_a_part_below(model: RWKV4) -> None:
    model.blocks[0].feed_forward.value.adapter = nn.Linear(CONFIG.width, CONFIG.width, bias=False)


def with_a_part_beside(model: RWKV4) -> None:
    model.blocks[0].adapter = nn.Linear(CONFIG.width, CONFIG.width, bias=False)


def hooked_in_a_new_dictionary(model: RWKV4) -> None:
    norm = model.blocks[1].ln2
    norm._forward_hooks = OrderedDict()  # what removes all hooks, and makes a dictionary that nobody has seen
    norm.register_forward_hook(lambda *_: None)


def hooked_head(model: RWKV4) -> None:
    model.head.register_forward_hook(lambda *_: None)


def hooked_embeddings(model: RWKV4) -> None:
    model.embeddings.register_forward_pre_hook(lambda *_: None)


def patched_end(model: RWKV4) -> None:
    model.ln_out.forward = lambda x: x


class Quantised(Tensor):
    pass


def quantised(model: RWKV4) -> None:
    linear = model.blocks[0].attention.output
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)


def swapped(model: RWKV4) -> None:
    weight = model.blocks[2].feed_forward.key.weight
    torch.utils.swap_tensors(weight, weight.detach().clone().as_subclass(Quantised))


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
    of_another_shape,
    without_a_parameter,
    of_a_plain_attribute,
    with_a_part_below,
    with_a_part_beside,
    hooked_in_a_new_dictionary,
    hooked_head,
    hooked_embeddings,
    patched_end,
    swapped,
]
TOKENS = torch.tensor([3, 30])


def on_a_gpu(config: RWKV4Config) -> RWKV4State:
    """Return a state on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        shape = (config.layers, 2, config.width)
        x, y, *wkv = (torch.empty(shape) for _ in range(5))
    return RWKV4State(x, y, WKVState(*wkv))


@pytest.fixture
def on_gpu() -> RWKV4State:
    return on_a_gpu(CONFIG)


@pytest.mark.parametrize("change", CHANGES)
def test_it_stands_for_blocks_as_they_were_built_alone(change: Callable[[RWKV4], None], on_gpu: RWKV4State) -> None:
    model = trained()
    assert rwkv4_step.stands_for(model, TOKENS, on_gpu)
    change(model)
    assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)


def test_what_comes_and_goes_between_tokens_is_seen_at_each(on_gpu: RWKV4State) -> None:
    model = trained()
    norm, linear = model.blocks[1].ln1, model.blocks[2].attention.output
    for _ in range(2):
        assert rwkv4_step.stands_for(model, TOKENS, on_gpu)
        hook = linear.register_forward_hook(lambda *_: None)
        assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)
        hook.remove()
        assert rwkv4_step.stands_for(model, TOKENS, on_gpu)
        model.blocks[1].ln1 = nn.Identity()
        assert not rwkv4_step.stands_for(model, TOKENS, on_gpu)
        model.blocks[1].ln1 = norm
    linear.weight = nn.Parameter(torch.zeros_like(linear.weight))  # which is read anew as well
    assert rwkv4_step.stands_for(model, TOKENS, on_gpu)


def calls_of(function: Callable[[], Any]) -> int:
    """Return how many functions of Python are called in this one."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return events.count("call")


def test_no_line_of_python_runs_for_each_module() -> None:
    counts = set()
    for layers in (2, 9):
        config = replace(CONFIG, layers=layers)
        model, state = trained(config), on_a_gpu(config)
        assert rwkv4_step.stands_for(model, TOKENS, state)
        counts.add(calls_of(lambda model=model, state=state: rwkv4_step.stands_for(model, TOKENS, state)))
    assert len(counts) == 1


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
