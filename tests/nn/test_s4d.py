"""S4D: its formula, initial values and stability."""

import math

import pytest
import torch
from torch import Tensor

from fastwkv.nn import S4D


def continuous(layer: S4D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Δ, A, B and C as they are written, in float64."""
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    A = torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    return p["log_dt"].exp()[:, None], A, torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])


def textbook(layer: S4D, u: Tensor) -> Tensor:
    """The formulas of the paper in float64, a token at a time."""
    dt, A, B, C = continuous(layer)
    A_bar = torch.exp(dt * A)
    B_bar = (A_bar - 1) / A * B
    h, outputs = torch.zeros(u.shape[0], *A.shape, dtype=torch.complex128), []
    for u_t in u.detach().double().unbind(1):
        h = A_bar * h + B_bar * u_t[..., None]
        outputs.append(2 * (C * h).sum(-1).real + layer.D.detach().double() * u_t)
    return torch.stack(outputs, 1)


def distance(actual: Tensor, expected: Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    return float((actual - expected).norm() / expected.norm())


def perturbed(init: str, state: int = 8) -> S4D:
    torch.manual_seed(0)
    layer = S4D(5, state, init=init)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize("init", ["lin", "inv"])
def test_output_equals_the_formula_of_the_paper(init: str) -> None:
    layer, u = perturbed(init), torch.randn(2, 50, 5)
    assert distance(layer(u), textbook(layer, u)) < 2e-6
    assert distance(layer.double()(u.double()), textbook(layer, u)) < 1e-12


@pytest.mark.parametrize("init", ["lin", "inv"])
def test_output_equals_the_convolution_of_the_paper(init: str) -> None:
    layer, T = perturbed(init).double(), 40
    dt, A, B, C = continuous(layer)
    powers = torch.exp((dt * A)[..., None] * torch.arange(T))
    kernel = 2 * ((C * B * (torch.exp(dt * A) - 1) / A)[..., None] * powers).sum(1).real
    impulse = torch.zeros(1, T, 5, dtype=torch.float64)
    impulse[:, 0] = 1
    kernel[:, 0] += layer.D.detach()
    assert distance(layer(impulse)[0].T, kernel) < 1e-12


@pytest.mark.parametrize("state", [2, 8, 64])
def test_initial_values_are_those_of_the_paper(state: int) -> None:
    torch.manual_seed(0)
    for n in range(state // 2):
        for init, imaginary in (("lin", math.pi * n), ("inv", state / math.pi * (state / (2 * n + 1) - 1))):
            _, A, B, _ = continuous(S4D(3, state, init=init))
            expected = torch.full((3,), complex(-0.5, imaginary), dtype=torch.complex128)
            torch.testing.assert_close(A[:, n], expected, rtol=1e-6, atol=1e-6)
            assert (B == 1).all()


def test_initial_steps_are_log_uniform() -> None:
    torch.manual_seed(0)
    layer = S4D(4000, 2)
    position = ((layer.log_dt.detach().double() / math.log(10)).sort().values + 3) / 2
    grid = (torch.arange(4000) + 0.5).double() / 4000
    assert (position - grid).abs().max().item() < 0.03
    assert position.min().item() > -1e-6
    assert position.max().item() < 1 + 1e-6
    for part in (layer.C_re, layer.C_im):
        assert part.std().item() == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert layer.D.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("log_dt", [math.log(1e-3), -10.0, -20.0, -40.0])
def test_input_matrix_keeps_its_digits_for_a_small_step(log_dt: float) -> None:
    layer = S4D(1, 8)
    with torch.no_grad():
        layer.log_dt.fill_(log_dt)
        layer.A_imag[0, 3] = -1e-4
    _, final = layer(torch.ones(1, 1, 1), return_state=True)
    dt, A, _, _ = continuous(layer)
    z = dt * A
    exact = dt * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5))))  # (exp(z) - 1) / z by its series
    assert distance(final, exact) < 1e-6


@pytest.mark.parametrize("log_A_real", [-math.inf, -200.0, -17.0, -12.0, 0.0, 10.0, 100.0])
@pytest.mark.parametrize("log_dt", [-200.0, -7.0, 3.0, 100.0])
def test_layer_is_stable_for_any_parameters(log_A_real: float, log_dt: float) -> None:
    torch.manual_seed(0)
    layer = S4D(2, 200)
    with torch.no_grad():
        layer.log_A_real.fill_(log_A_real)
        layer.log_dt.fill_(log_dt)
        a, _ = layer._discretised(torch.zeros(1, 1, 2))
        assert ((torch.view_as_real(a).double() ** 2).sum(-1) < 1).all()
    y = layer(torch.randn(1, 20, 2))
    y.sum().backward()
    assert y.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": 7}, "state must be even, for conjugate pairs, got 7"),
        ({"init": "legs"}, 'init must be "lin" or "inv", got \'legs\''),
        ({"dt_min": 0.0}, r"0 < dt_min <= dt_max, got \[0.0, 0.1\]"),
        ({"dt_min": 0.2}, r"got \[0.2, 0.1\]"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(**{"hidden": 3, **arguments})
