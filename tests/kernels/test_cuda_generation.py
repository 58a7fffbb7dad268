"""Generation on a GPU: a launch of one graph a token, the same tokens as without, nothing waits, nothing grows."""

import gc
import warnings

import pytest
import torch
from rwkv4_models import CONFIG, distance, fields, text, trained
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastwkv.nn import RWKV4, RWKV4Config, generate, rwkv4_step

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.unpoisoned,  # as in use
]
DRAWS = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "top_p": 0.6, "seed": 4}]


def model(config: RWKV4Config = CONFIG, seed: int = 0) -> RWKV4:
    return trained(config, seed).to("cuda").eval()


def prompt(batch: int = 2, length: int = 6) -> Tensor:
    return text(batch, length).to("cuda")


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_states_are_those_without_a_graph(draw, dtype, batch) -> None:
    one = model().to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generating without a CUDA graph")
        with_graph, without = (generate(one, prompt(batch), 40, graph=graph, **draw) for graph in (None, False))
        for found, wanted in zip(with_graph, without, strict=True):
            assert torch.equal(found, wanted)
            states = (stream.state.tensors().values() for stream in (with_graph, without))
            assert all(map(torch.equal, *states))
    assert with_graph.uses_graph
    assert not without.uses_graph


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("config", [CONFIG, RWKV4Config(layers=4, width=768, vocab_size=50, rescale_every=2)])
def test_token_of_few_kernels_is_a_token(config, dtype, bound) -> None:
    one = model(config).to(dtype)
    with torch.no_grad():
        _, state = one.features(prompt(2, 9))
        mine = state.clone()
        for token in text(2, 12, seed=1).to("cuda").unbind(1):
            wanted, state = one.features(token[:, None], state)
            assert rwkv4_step.stands_for(one, token, mine)
            assert distance(one.step_(token, mine), wanted[:, 0]) <= bound
    for name, field in fields(mine).items():
        assert distance(field, fields(state)[name]) <= 2 * bound, name


@pytest.mark.parametrize("draw", DRAWS)
def test_large_vocabulary_is_drawn_from_in_the_graph(draw) -> None:
    one = model(RWKV4Config(layers=2, width=64, vocab_size=50277))
    found, wanted = (torch.stack(list(generate(one, prompt(), 30, graph=graph, **draw))) for graph in (True, False))
    assert torch.equal(found, wanted)
    assert len(found.unique()) > 5


@pytest.mark.parametrize("draw", DRAWS)
def test_token_is_one_launch(draw) -> None:
    stream = generate(model(), prompt(), 20, graph=True, **draw)
    for _ in range(4):
        next(stream)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            next(stream)
    calls = {event.key: event.count for event in found.key_averages()}
    assert calls["cudaGraphLaunch"] == 5
    # Besides it: the copy of the token, and where the graph finds seed and offset of its random numbers.
    assert calls.get("cudaLaunchKernel", 0) + calls.get("cudaMemcpyAsync", 0) <= 5 * (1 + 2 * bool(draw))


@pytest.mark.parametrize("draw", DRAWS)
def test_nothing_waits_for_the_device(draw) -> None:
    one, tokens = model(), prompt()
    list(generate(one, tokens, 4, **draw))  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        for graph in (True, False):
            for _ in generate(one, tokens, 6, graph=graph, **draw):
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_and_is_given_back() -> None:
    one, tokens = model(), prompt()
    list(generate(one, tokens, 4))  # cuBLAS has its workspace
    gc.collect()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    stream = generate(one, tokens, 200, graph=True, temperature=1.0)
    for _ in range(4):
        next(stream)
    early = torch.cuda.memory_allocated()
    for _ in range(100):
        next(stream)
    assert torch.cuda.memory_allocated() == early
    del stream
    assert torch.cuda.memory_allocated() == allocated
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == reserved


def test_generations_at_once_do_not_disturb_each_other() -> None:
    one = model()
    wanted = [list(generate(one, prompt(), 12, graph=False, **draw)) for draw in DRAWS]
    streams = [generate(one, prompt(), 12, graph=True, **draw) for draw in DRAWS]
    for n in range(12):
        for stream, tokens in zip(streams, wanted, strict=True):
            assert torch.equal(next(stream), tokens[n])


def test_weights_may_change_in_place_between_tokens() -> None:
    texts = []
    for graph in (True, False):
        one, found = model(), []
        for n, token in enumerate(generate(one, prompt(), 16, graph=graph)):
            found.append(token)
            if n == 6:
                one.load_state_dict(model(seed=5).state_dict())
        texts.append(torch.stack(found))
    assert torch.equal(*texts)


class Looking(torch.nn.Module):
    """A layer that waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("draw", DRAWS)
def test_failed_recording_leaves_model_graphs_and_generators_usable(draw) -> None:
    one, tokens = model(), prompt()
    whole, one.ln_out = one.ln_out, Looking()
    wanted = list(generate(one, tokens, 8, graph=False, **draw))
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        found = list(generate(one, tokens, 8, **draw))
    assert all(map(torch.equal, found, wanted))
    assert torch.rand(9, device="cuda").unique().numel() > 1
    one.ln_out = whole
    found, wanted = (list(generate(one, tokens, 8, graph=graph, **draw)) for graph in (True, False))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_graphs_of_the_caller_are_left_in_working_order(mode) -> None:
    with mode():
        stream = generate(model(), prompt(), 20, temperature=1.0, graph=True)
        tokens = [next(stream) for _ in range(6)]
    # A graph of another user's, outside of inference mode, which draws from the default generator.
    x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += torch.rand_like(x)
    graph.replay()
    assert x.ne(0).all()
    assert len([*tokens, *stream]) == 20


def test_training_goes_on_between_tokens() -> None:
    one = model()
    for token in generate(one, prompt(), 6, graph=True):
        assert not token.is_inference()
        one(token[:, None])[0].sum().backward()
    assert one.head.weight.grad is not None
