"""What gen_time.py times: models of one size, and ways to generate that give the same tokens."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from generation import models


@pytest.mark.parametrize("name", ["rwkv4", "gpt-neox", "opt", "bloom", "gpt-neo"])
def test_protocols_generate_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = models.RWKV4Config(layers=3, width=64, vocab_size=256)
    model = models.build(name, size, 40, torch.device("cpu"), torch.float64, seed=0)
    prompt = torch.tensor([list(b"hello")])
    drawn: list[int] = []
    argmax = torch.Tensor.argmax

    def spy(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        token = argmax(tensor, *args, **options)
        drawn.append(int(token))
        return token

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    texts = []
    for protocol in ["recurrent"] if name == "rwkv4" else ["kv-cache", "recompute"]:
        drawn.clear()
        steps = models.PROTOCOLS[protocol](model, prompt)
        with torch.inference_mode():
            for _ in range(12):
                next(steps)
        texts.append(list(drawn))
    if name == "rwkv4":  # the whole text again for every token
        tokens = prompt
        drawn.clear()
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), 1)
        texts.append(list(drawn))
    assert len(texts[0]) == 12
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["rwkv4", "gpt-neox", "opt", "bloom", "gpt-neo"])
def test_models_of_one_size_have_its_layers_width_and_vocabulary(name: str) -> None:
    size = models.SIZES["169m"]
    model = models.build(name, size, 40, torch.device("meta"), torch.float32, seed=0)
    embedding = next(p for p in model.parameters() if p.shape[0] == size.vocab_size)
    assert tuple(embedding.shape) == (50277, 768)
    weights = sum(p.numel() for p in model.parameters())
    blocks = (13 if name == "rwkv4" else 12) * 768**2 * 12
    ends = (2 if name in ("rwkv4", "gpt-neox") else 1) * 50277 * 768  # the others tie embedding and head
    assert weights == pytest.approx(blocks + ends, rel=0.005)


def test_random_rwkv_has_no_zero_matrix() -> None:
    model = models.build("rwkv4", models.SIZES["tiny"], 8, torch.device("cpu"), torch.float32, seed=0)
    assert all(parameter.any() for parameter in model.parameters() if parameter.dim() == 2)


def test_same_seed_builds_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = models.build("gpt-neox", models.SIZES["tiny"], 8, torch.device("cpu"), torch.float32, seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_graph_is_asked_for_by_rwkv_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    size = models.RWKV4Config(layers=1, width=64, vocab_size=256)
    for name, protocol, used in (("rwkv4", "recurrent", False), ("opt", "kv-cache", None), ("opt", "recompute", None)):
        model = models.build(name, size, 40, torch.device("cpu"), torch.float32, seed=0)
        steps = models.PROTOCOLS[protocol](model, torch.tensor([[1, 2]]))
        carried = next(steps)
        assert models.uses_graph(carried) is used
        if name == "rwkv4":
            monkeypatch.setattr(type(carried), "uses_graph", True)
            assert models.uses_graph(carried) is True
