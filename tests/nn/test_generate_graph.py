"""Generation from a graph: the same tokens and states as without, whatever happens between tokens."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from implementations import Implementation
from recorded_graph import RecordedGraph
from rwkv4_models import CONFIG, text, trained
from torch import Tensor, nn

from fastwkv.nn import RWKV4, RWKV4State, generate, generation, rwkv4_step

DRAWS = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "top_p": 0.6, "seed": 4},
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """All that are made; what is known against a graph is that there is no GPU here, which is passed over."""
    made: list[RecordedGraph] = []

    def make(*arguments: Any) -> RecordedGraph:
        made.append(RecordedGraph(*arguments))
        return made[-1]

    reasons = generation.why_no_graph
    monkeypatch.setattr(generation, "Graph", make)
    monkeypatch.setattr(generation, "why_no_graph", lambda model, device: reasons(model, torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def run(model: RWKV4, tokens: Tensor, count: int, **options: Any) -> list[Tensor]:
    """Return each token and the state that came with it."""
    found = []
    stream = generate(model, tokens, count, **options)
    for token in stream:
        assert stream.state is not None
        found += [token, *stream.state.tensors().values()]
    return found


def assert_same(model: RWKV4, tokens: Tensor, count: int, **options: Any) -> None:
    wanted = run(model, tokens, count, graph=False, **options)
    for result, want in zip(run(model, tokens, count, **options), wanted, strict=True):
        assert torch.equal(result, want)
        assert result.dtype == want.dtype


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("batch", "carried"), [(1, False), (3, True)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 14])
def test_tokens_and_states_are_those_without(draw, batch, carried, count, graphs) -> None:
    model, tokens = trained(), text(batch, 5)
    state = None
    if carried:
        with torch.no_grad():
            _, state = model(text(batch, 7, seed=1))
    kept = state.clone() if state else None
    assert_same(model, tokens, count, state=state, **draw)
    (graph,) = graphs
    assert (graph.captures, graph.replays) == (int(count > 2), max(0, count - 2))
    if state and kept:
        assert all(map(torch.equal, state.tensors().values(), kept.tensors().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_scales_give_the_same(dtype, graphs) -> None:
    model = trained(replace(CONFIG, rescale_every=2)).to(dtype).eval()
    assert_same(model, text(2, 3), 8, temperature=1.0, seed=0)
    assert graphs[0].replays == 6


@pytest.mark.parametrize("draw", DRAWS[:2])
def test_tokens_of_few_kernels_give_the_same(draw, graphs, monkeypatch) -> None:
    monkeypatch.setattr(rwkv4_step, "stands_for", lambda *_: True)  # as on a GPU
    with Implementation("triton") as context:
        assert_same(trained().to(context.device), text(2, 3).to(context.device), 7, **draw)
    assert graphs[0].replays == 5


def test_another_seed_gives_other_tokens(graphs) -> None:
    model, tokens = trained(), text(2, 3)
    texts = [torch.stack(list(generate(model, tokens, 30, temperature=1.5, seed=seed))) for seed in (0, 0, 1)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert all(len(text.unique()) > 5 for text in texts)


def test_token_and_state_that_were_handed_out_stay_what_they_are(graphs) -> None:
    model = trained()
    stream = generate(model, text(1, 3), 12, temperature=1.0, seed=0)
    seen: list[tuple[Tensor, Tensor, RWKV4State, RWKV4State]] = []
    for token in stream:
        assert stream.state is not None
        seen.append((token, token.clone(), stream.state, stream.state.clone()))
        assert not token.is_inference()
    assert stream.uses_graph
    for token, kept_token, state, kept in seen:
        assert torch.equal(token, kept_token)
        assert all(map(torch.equal, state.tensors().values(), kept.tensors().values()))


def test_generations_at_once_do_not_disturb_each_other(graphs) -> None:
    model = trained()
    calls = [(text(1, 4), {}), (text(1, 4), DRAWS[1]), (text(3, 2), DRAWS[2])]
    wanted = [[*generate(model, tokens, 9, graph=False, **draw)] for tokens, draw in calls]
    streams = [generate(model, tokens, 9, **draw) for tokens, draw in calls]
    for n in range(9):
        for stream, tokens in zip(streams, wanted, strict=True):
            assert torch.equal(next(stream), tokens[n])
    assert [graph.replays for graph in graphs] == [7] * 3


def test_weights_may_change_in_place_between_tokens(graphs) -> None:
    def tokens(**options: Any) -> Iterator[Tensor]:
        model = trained()
        for n, token in enumerate(generate(model, text(2, 4), 16, **options)):
            yield token
            if n == 6:
                model.load_state_dict(trained(seed=5).state_dict())

    changed, kept = list(tokens()), list(generate(trained(), text(2, 4), 16))
    assert all(map(torch.equal, changed, tokens(graph=False)))
    assert not all(map(torch.equal, changed, kept))


def test_callers_inference_mode_changes_nothing(graphs) -> None:
    model, tokens = trained(), text(2, 4)
    wanted = list(generate(model, tokens, 6, graph=False))
    stream = generate(model, tokens, 6)
    with torch.inference_mode():
        found = [next(stream) for _ in range(2)]
    found += list(stream)
    assert all(map(torch.equal, found, wanted))
    assert graphs[0].replays == 4


def test_memory_is_given_back_without_a_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        stream = generate(trained(), text(1, 3), 9)
        next(stream)
        next(stream)
        step = weakref.ref(stream._step)
        del stream
        assert step() is None
    finally:
        gc.enable()


def test_step_in_place_is_a_step() -> None:
    model = trained()
    tokens, new = text(3, 6), torch.tensor([3, 0, 30])
    with torch.no_grad():
        _, state = model.features(tokens)
        x, wanted = model.features(new[:, None], state)
    places = [tensor.data_ptr() for tensor in state.tensors().values()]
    assert torch.equal(model.step_(new, state), x[:, 0])
    assert all(map(torch.equal, state.tensors().values(), wanted.tensors().values()))
    assert [tensor.data_ptr() for tensor in state.tensors().values()] == places


class Looking(nn.Module):
    """A layer that waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def test_what_cannot_be_recorded_goes_on_without(graphs) -> None:
    model, tokens = trained(), text(2, 4)
    model.ln_out = Looking()
    with pytest.warns(UserWarning, match="without a CUDA graph: aten::_local_scalar_dense waits for the device"):
        assert_same(model, tokens, 8, temperature=1.0, seed=0)
    assert graphs[0].replays == 0
    stream = generate(model, tokens, 8, graph=True)
    next(stream)
    with pytest.raises(ValueError, match="graph=True cannot be: aten::_local_scalar_dense waits"):
        next(stream)
    assert list(stream) == []
    model.ln_out = nn.Identity()
    assert_same(model, tokens, 8)


def test_errors_of_the_model_are_its_own(graphs) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = trained()
    stream = generate(model, text(1, 4), 8)
    next(stream)
    model.ln_out = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        next(stream)


@pytest.mark.parametrize("must", [None, True])
def test_reason_that_comes_before_the_second_token_counts(must, graphs) -> None:
    model, tokens, calls = trained(), text(1, 4), []
    stream = generate(model, tokens, 6, graph=must)
    next(stream)
    model.ln_out.register_forward_hook(lambda *_: calls.append(1))
    if must:
        with pytest.raises(ValueError, match="ln_out has forward hooks"):
            next(stream)
    else:
        assert len(list(stream)) == len(calls) == 5
    assert not stream.uses_graph


def test_graph_that_is_asked_for_needs_a_gpu() -> None:
    model, tokens = trained(), text(1, 4)
    with pytest.raises(ValueError, match="graph=True cannot be: the model is on cpu, and only a GPU has CUDA graphs"):
        generate(model, tokens, 5, graph=True)
    with pytest.raises(TypeError, match="graph must be a bool or None, got str"):
        generate(model, tokens, 5, graph="yes")
    stream = generate(model, tokens, 5)
    list(stream)
    assert not stream.uses_graph
