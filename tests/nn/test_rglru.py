"""RG-LRU: its formula, where segments start, initial values, and gates that are all open or all shut."""

import pytest
import torch
from torch import Tensor

from fastwkv.nn import RGLRU

H = 6


def textbook(layer: RGLRU, x: Tensor, starts: set[tuple[int, int]], state: Tensor | None = None) -> Tensor:
    """The equations of the paper in float64, a token at a time; ``starts`` holds (row, token) of segments."""
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    x = x.detach().double()
    W_a, W_x = torch.block_diag(*p["W_a"]), torch.block_diag(*p["W_x"])
    B, T, _ = x.shape
    outputs = torch.empty_like(x)
    for row in range(B):
        h = torch.zeros(layer.hidden, dtype=torch.float64) if state is None else state[row].double()
        for t in range(T):
            x_t = x[row, t]
            r = 1 / (1 + torch.exp(-(x_t @ W_a + p["b_a"])))
            i = 1 / (1 + torch.exp(-(x_t @ W_x + p["b_x"])))
            a = torch.exp(-8 * torch.log(1 + p["Lambda"].exp()) * r)
            h = i * x_t if (row, t) in starts else a * h + (1 - a**2).sqrt() * (i * x_t)
            outputs[row, t] = h
    return outputs


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def perturbed(heads: int = 1) -> RGLRU:
    torch.manual_seed(0)
    layer = RGLRU(H, heads)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_output_equals_the_formula_of_the_paper(heads: int) -> None:
    layer, x = perturbed(heads), torch.randn(2, 30, H)
    exact = textbook(layer, x, {(0, 0), (1, 0)})
    assert distance(layer(x), exact) < 2e-6
    assert distance(layer.double()(x.double()), exact) < 1e-13


def test_carried_state_starts_no_segment() -> None:
    layer, x, state = perturbed(), torch.randn(2, 7, H), torch.randn(2, H)
    assert distance(layer(x, state), textbook(layer, x, set(), state)) < 2e-6
    assert distance(layer(x, torch.zeros_like(state)), textbook(layer, x, set())) < 2e-6  # a state of zeros is one, too
    first, _ = layer.step(x[:, 0], state)
    assert distance(first, textbook(layer, x[:, :1], set(), state)[:, 0]) < 2e-6


@pytest.mark.parametrize("carried", [False, True])
def test_segment_starts_forget_what_was_before(carried: bool) -> None:
    layer, x = perturbed(2), torch.randn(2, 9, H)
    state = torch.randn(2, H) if carried else None
    marked = {(0, 4), (1, 0), (1, 1), (1, 8)}
    mask = torch.zeros(2, 9, dtype=torch.bool)
    for row, t in marked:
        mask[row, t] = True
    exact = textbook(layer, x, marked | (set() if carried else {(0, 0), (1, 0)}), state)
    whole, final = layer(x, state, segment_starts=mask, return_state=True)
    assert distance(whole, exact) < 2e-6
    for t in range(9):
        y, state = layer.step(x[:, t], state, segment_starts=mask[:, t])
        assert distance(y, exact[:, t]) < 2e-6
    assert distance(state, final) < 2e-6


def test_packed_sequences_are_segments_unless_carried() -> None:
    layer, x, state = perturbed(), torch.randn(1, 9, H), torch.randn(2, H)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert distance(layer(x, cu_seqlens=cu_seqlens), textbook(layer, x, {(0, 0), (0, 4)})) < 2e-6
    pieces = [textbook(layer, piece, set(), state[n : n + 1]) for n, piece in enumerate(x.split([4, 5], 1))]
    assert distance(layer(x, state, cu_seqlens=cu_seqlens), torch.cat(pieces, 1)) < 2e-6
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 4] = True
    assert distance(layer(x, segment_starts=mask), layer(x, cu_seqlens=cu_seqlens)) < 1e-6


def test_gradients_at_segment_starts_equal_finite_differences() -> None:
    layer, x = perturbed(2).double(), torch.randn(1, 6, H, dtype=torch.float64)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    mask = torch.tensor([[False, False, True, True, False, False]])

    def run(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x,), {"segment_starts": mask})

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()), fast_mode=True)


def test_initial_multipliers_are_uniform() -> None:
    torch.manual_seed(0)
    layer = RGLRU(4000, heads=400)
    a = torch.exp(-8 * torch.log1p(layer.Lambda.detach().double().exp()))
    grid = (torch.arange(4000) + 0.5).double() / 4000
    assert ((a.sort().values - 0.9) / 0.099 - grid).abs().max().item() < 0.03
    assert layer.W_a.std().item() == pytest.approx(10**-0.5, rel=0.02)
    assert layer.W_x.shape == (400, 10, 10)
    assert not layer.b_a.any()
    assert not layer.b_x.any()


@pytest.mark.parametrize("bias", [-1e4, -100.0, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("Lambda", [-1e4, -100.0, -17.0, 17.0, 1e4])
def test_saturated_gates_give_finite_gradients(bias: float, Lambda: float) -> None:
    layer = perturbed()
    with torch.no_grad():
        layer.b_a.fill_(bias)
        layer.Lambda.fill_(Lambda)
    y = layer(torch.randn(1, 20, H))
    y.sum().backward()
    assert y.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gate_near_one_keeps_its_digits_in_a_half_precision_model() -> None:
    layer = RGLRU(H).bfloat16()
    with torch.no_grad():
        layer.b_a.fill_(-6)
    nothing = torch.zeros(1, H, dtype=torch.bfloat16)
    state = torch.ones(1, H)
    for _ in range(100):
        _, state = layer.step(nothing, state)
    log_a = -8 * torch.log1p(layer.Lambda.detach().double().exp()) / (1 + torch.tensor(6.0).double().exp())
    assert distance(1 - state[0], -torch.expm1(100 * log_a)) < 1e-2  # in bfloat16, a would be 1 and this 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 4}, "heads must divide hidden = 6, got 4"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"a_max": 1.0}, r"0 < a_min <= a_max < 1, got \[0.9, 1.0\]"),
        ({"a_min": 0.0}, r"got \[0.0, 0.999\]"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RGLRU(H, **arguments)


def test_bad_segment_starts_are_named() -> None:
    layer, x = RGLRU(H), torch.randn(2, 5, H)
    with pytest.raises(TypeError, match=r"segment_starts must be bool .*, got int64"):
        layer(x, segment_starts=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="segment_starts must be a tensor, got list"):
        layer(x, segment_starts=[True])
    with pytest.raises(ValueError, match=r"segment_starts must be \[B, T\] = \[2, 5\], got shape \[5\]"):
        layer(x, segment_starts=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"segment_starts must be \[B\] = \[2\], got shape \[1\]"):
        layer.step(x[:, 0], segment_starts=torch.zeros(1, dtype=torch.bool))
