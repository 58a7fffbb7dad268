"""The sizes of an RWKV-4 model, and the values that its training starts from."""

import math

import pytest
import torch
from rwkv4_models import CONFIG
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Config

PARAMETERS = {
    "169m": 169342464,
    "430m": 430397440,
    "1.5b": 1515106304,
    "3b": 2984627200,
    "7b": 7392649216,
    "14b": 14148597760,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = RWKV4Config.preset(name)
    with torch.device("meta"):
        model = RWKV4(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    L, D, V = config.layers, config.width, config.vocab_size
    assert PARAMETERS[name] == 2 * V * D + 13 * D * D * L + D * (11 * L + 4)


def test_preset_takes_another_vocabulary() -> None:
    assert RWKV4Config.preset("169m", vocab_size=65536) == RWKV4Config(12, 768, 65536)


def test_model_built_on_meta_gets_every_initial_value() -> None:
    with torch.device("meta"):
        model = RWKV4(CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    fresh = RWKV4(CONFIG)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "ln" in name or "time" in name:
            assert torch.equal(parameter, fresh.get_parameter(name)), name


@pytest.mark.parametrize(("L", "d"), [(1, 8), (2, 6), (5, 12), (3, 1)])
def test_initial_vectors_follow_the_training_code(L: int, d: int) -> None:
    model = RWKV4(RWKV4Config(L, d, 11))
    for layer, block in enumerate(model.blocks):
        depth = layer / (L - 1) if L > 1 else 0.0
        att, ffn = block.attention, block.feed_forward
        for i in range(d):
            position = i / (d - 1) if d > 1 else 0.0
            mix = (i / d) ** (1 - layer / L)
            expected = {
                att.time_decay: -5 + 8 * position ** (0.7 + 1.3 * depth),
                att.time_first: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
                att.time_mix_key: mix,
                att.time_mix_value: mix + 0.3 * depth,
                att.time_mix_receptance: (i / d) ** (0.5 * (1 - layer / L)),
                ffn.time_mix_key: mix,
                ffn.time_mix_receptance: mix,
            }
            for parameter, value in expected.items():
                assert parameter[i].item() == pytest.approx(value, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("L", [1, 3])
def test_initial_matrices_follow_the_training_code(L: int, dtype: torch.dtype) -> None:
    model = RWKV4(RWKV4Config(L, 16, 50)).to(dtype)
    model.reset_parameters()
    for block in model.blocks:
        att, ffn = block.attention, block.feed_forward
        for linear in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
            assert not linear.weight.any()
            assert linear.bias is None
        assert_orthogonal_columns(att.value.weight, 1.0)
        assert_orthogonal_columns(ffn.key.weight, 2.0)
    assert_orthogonal_columns(model.head.weight, 0.5 * math.sqrt(50 / 16))
    assert 0.9e-4 < model.embeddings.weight.abs().max() <= 1e-4
    assert model.embeddings.weight.min() < -0.9e-4


def test_head_of_a_small_vocabulary_has_gain_one_half() -> None:
    assert_orthogonal_columns(RWKV4(RWKV4Config(1, 16, 10)).head.weight.T, 0.5)


def assert_orthogonal_columns(weight: Tensor, gain: float) -> None:
    # Q of a QR decomposition by n reflections of m numbers, whoever computes it, is off by at most √n γ in the
    # Frobenius norm, where γ = c m n u, u = ε/2 and c is a small number (Higham, Accuracy and Stability of Numerical
    # Algorithms, theorem 19.4): with c = 2 that is m n √n ε, and twice as much in QᵀQ. The product here adds m u.
    m, n = weight.shape
    bound = gain**2 * (2 * m * n**1.5 + m) * torch.finfo(weight.dtype).eps
    found = weight.detach().double().T @ weight.detach().double()
    torch.testing.assert_close(found, gain**2 * torch.eye(n, dtype=torch.float64), rtol=0, atol=bound)
