"""minGRU: its formula, with and without g, and gates that are shut."""

import pytest
import torch
from torch import Tensor

from fastwkv.nn import MinGRU


def textbook(layer: MinGRU, x: Tensor) -> Tensor:
    """The formulas of the paper in float64, a token at a time."""
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    h, outputs = torch.zeros(x.shape[0], layer.state, dtype=torch.float64), []
    for x_t in x.detach().double().unbind(1):
        z = 1 / (1 + torch.exp(-(x_t @ p["gate.weight"].T + p["gate.bias"])))
        v = x_t @ p["candidate.weight"].T + p["candidate.bias"]
        if layer.positive:
            v = torch.where(v >= 0, v + 0.5, 1 / (1 + torch.exp(-v)))
        h = (1 - z) * h + z * v
        outputs.append(h)
    return torch.stack(outputs, 1)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("positive", [False, True])
def test_output_equals_the_formula_of_the_paper(positive: bool) -> None:
    torch.manual_seed(0)
    layer, x = MinGRU(5, 7, positive), torch.randn(2, 40, 5)
    assert distance(layer(x), textbook(layer, x)) < 2e-6
    assert distance(layer.double()(x.double()), textbook(layer, x)) < 1e-13
    assert (layer(x.double()) > 0).all() == positive


def test_shut_gate_keeps_its_digits() -> None:
    torch.manual_seed(0)
    layer, T = MinGRU(2, 3), 1000
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(-12)  # z = 6.1e-6, which 1 - z in float32 rounds by up to 1 %
        final = layer(torch.zeros(1, T, 2), torch.ones(1, 3), return_state=True)[1]
        decay = torch.sigmoid(torch.tensor(12.0).double()) ** T
        exact = decay + (1 - decay) * layer.candidate.bias.double()
    assert distance(final[0], exact) < 2e-6


def test_gate_keeps_its_digits_in_a_half_precision_model() -> None:
    layer = MinGRU(2, 3).bfloat16()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(-6)
        layer.candidate.bias.zero_()
        state = layer(torch.zeros(1, 100, 2).bfloat16(), torch.ones(1, 3), return_state=True)[1]
    decay = torch.sigmoid(torch.tensor(6.0).double()) ** 100
    assert distance(state, decay.expand(1, 3)) < 1e-5  # in bfloat16, 1 - z would be 1 or 0.996


@pytest.mark.parametrize("bias", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("positive", [False, True])
def test_saturated_gates_give_finite_gradients(bias: float, positive: bool) -> None:
    torch.manual_seed(0)
    layer = MinGRU(4, positive=positive)
    with torch.no_grad():
        layer.gate.bias.fill_(bias)
        layer.candidate.bias.copy_(torch.tensor([-1e4, -200.0, 0.0, 200.0]))
    y = layer(torch.randn(1, 20, 4))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="state must be at least 1, got 0"):
        MinGRU(4, 0)
    with pytest.raises(TypeError, match="hidden must be an int, got float"):
        MinGRU(4.0)
