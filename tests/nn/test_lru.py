"""The linear recurrent unit: its formula, initial values, stability, both directions, and its training groups."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastwkv import linear_scan
from fastwkv.nn import LRU, LRUBlock

RINGS = [(0.0, 1.0), (0.4, 0.9), (0.9, 0.999), (0.999, 0.9999), (0.9999, 0.99999)]


def weights(lru: LRU) -> dict[str, Tensor]:
    """Parameters in float64, and λ and γ as they are written."""
    p = {name: parameter.detach().double() for name, parameter in lru.named_parameters()}
    p["lambda"] = torch.exp(torch.complex(-p["nu_log"].exp(), p["theta_log"].exp()))
    p["B"], p["C"] = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    return p


def textbook(lru: LRU, u: Tensor) -> Tensor:
    """The formulas of the paper in float64, a token at a time."""
    p, u = weights(lru), u.detach().double()
    h, outputs = torch.zeros(u.shape[0], lru.state, dtype=torch.complex128), []
    for u_t in u.unbind(1):
        h = p["lambda"] * h + p["gamma_log"].exp() * (u_t.to(h.dtype) @ p["B"].T)
        outputs.append((h @ p["C"].T).real + p["D"] * u_t)
    return torch.stack(outputs, 1)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("ring", RINGS)
def test_output_equals_the_formula_of_the_paper(ring: tuple[float, float]) -> None:
    torch.manual_seed(0)
    lru, u = LRU(5, 7, *ring), torch.randn(2, 50, 5)
    assert distance(lru(u), textbook(lru, u)) < 2e-6
    assert distance(lru.double()(u.double()), textbook(lru, u)) < 1e-13


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("max_phase", [2 * math.pi, math.pi / 10])
def test_initial_multipliers_are_uniform_on_the_ring(ring: tuple[float, float], max_phase: float) -> None:
    torch.manual_seed(0)
    r_min, r_max = ring
    lru = LRU(1, 4000, r_min, r_max, max_phase)
    modulus = torch.exp(-lru.nu_log.detach().double().exp())
    # Uniform over the area: |λ|² is uniform. Of 4000 draws the distribution is within 2 % with certainty 0.998.
    grid = (torch.arange(4000) + 0.5).double() / 4000
    area = ((modulus**2 - r_min**2) / (r_max**2 - r_min**2)).sort().values
    assert float((area - grid).abs().max()) < 0.03
    phase = lru.theta_log.detach().double().exp() / max_phase
    assert float((phase.sort().values - grid).abs().max()) < 0.03
    assert float(phase.max()) <= 1 + 1e-6
    assert abs(float(torch.corrcoef(torch.stack((modulus, phase)))[0, 1])) < 0.05


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_gamma_keeps_its_digits_near_the_unit_circle(ring: tuple[float, float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lru = LRU(1, 1000, *ring).to(dtype)
    lru.reset_parameters()
    exact = [0.5 * math.log(-math.expm1(-2 * math.exp(nu))) for nu in lru.nu_log.tolist()]
    gamma_log = torch.tensor(exact, dtype=torch.float64)
    # A library's exp, expm1 and log are off by one unit in the last place, at most ε of themselves. The first two
    # change the argument of the logarithm by no more than 2 ε of itself, and so γ_log by ε, whatever its size; the last
    # by ε of itself. What it is compared with is off as well, by its own ε.
    size = float(gamma_log.square().mean().sqrt())
    eps = torch.finfo(dtype).eps + torch.finfo(torch.float64).eps
    assert distance(lru.gamma_log, gamma_log) < eps * (1 / size + 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_initial_matrices_have_the_scale_of_the_paper(bidirectional: bool) -> None:
    torch.manual_seed(0)
    H, N = 100, 150
    lru = LRU(H, N, bidirectional=bidirectional)
    read = 2 * N if bidirectional else N
    for name, shape, std in [
        ("B_re", (N, H), 1 / math.sqrt(2 * H)),
        ("B_im", (N, H), 1 / math.sqrt(2 * H)),
        ("C_re", (H, read), 1 / math.sqrt(read)),
        ("C_im", (H, read), 1 / math.sqrt(read)),
        ("D", (H,), 1.0),
    ]:
        matrix = lru.get_parameter(name).detach()
        assert matrix.shape == shape
        assert float(matrix.std()) == pytest.approx(std, rel=0.25 if name == "D" else 0.03)
        assert abs(float(matrix.mean())) < 4 * std / math.sqrt(matrix.numel())


def test_state_keeps_the_variance_of_its_input() -> None:
    torch.manual_seed(0)
    lru = LRU(32, 200, 0.9, 0.99)
    with torch.no_grad():
        _, h = lru(torch.randn(64, 600, 32), return_state=True)
    assert float(h.abs().square().mean()) == pytest.approx(1.0, rel=0.1)  # B u has variance 1/2 in each part


EXTREMES = [-math.inf, -200.0, -20.0, -17.0, -16.6, -16.0, -15.0, -14.5, -8.0, 0.0, 3.0, 5.0, 100.0, 3e38, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiplier_is_below_one_for_any_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lru = LRU(1, 10_000).to(dtype)
    for nu_log in (*EXTREMES, -36.0, -40.0):
        with torch.no_grad():
            lru.nu_log.fill_(nu_log)
            lru.theta_log.uniform_(-30, 30)
            lru.theta_log[: len(EXTREMES)] = torch.tensor(EXTREMES)
            parts = torch.view_as_real(lru._decay(lru.D.dtype)).numpy().astype("longdouble")
        largest = (parts**2).sum(-1).max()
        assert largest < 1, nu_log


def test_state_without_input_never_grows() -> None:
    torch.manual_seed(0)
    lru = LRU(1, 64)
    with torch.no_grad():
        lru.nu_log.fill_(-100.0)
        start = torch.polar(torch.rand(1, 64) + 1e-3, 7 * torch.rand(1, 64))
        a, nothing = lru._decay(lru.D.dtype), torch.zeros(1, 20_000, 64, dtype=torch.complex64)
        state = start
        for _ in range(5):
            _, state = linear_scan(a, nothing, state, return_state=True)
    ratio = state.abs() / start.abs()
    assert float(ratio.max()) < 1
    assert float(ratio.min()) > 0.9  # it is stable, not forgetful


@pytest.mark.parametrize("nu_log", EXTREMES)
def test_gradients_are_finite_for_any_parameters(nu_log: float) -> None:
    torch.manual_seed(0)
    lru = LRU(3, len(EXTREMES))
    with torch.no_grad():
        lru.nu_log.fill_(nu_log)
        lru.theta_log.copy_(torch.tensor(EXTREMES))
    y = lru(torch.randn(1, 30, 3))
    y.sum().backward()
    assert y.isfinite().all()
    for name, parameter in lru.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_multiplier_is_float32_in_a_half_precision_model() -> None:
    lru = LRU(2, 64, 0.99, 0.9999).bfloat16()
    ones = torch.ones(1, 64, dtype=torch.complex64)
    _, state = lru.step(torch.zeros(1, 2, dtype=torch.bfloat16), ones)
    error = torch.view_as_real(state[0] - weights(lru)["lambda"]).abs().max()
    assert error.item() < 1e-6  # in bfloat16 it would be 4e-3
    with torch.autocast("cpu", torch.bfloat16):
        _, state = lru.float().step(torch.zeros(1, 2), ones)
    assert torch.view_as_real(state[0] - weights(lru)["lambda"]).abs().max().item() < 1e-6


@pytest.mark.parametrize("offsets", [None, [0, 3, 4, 12]])
def test_bidirectional_reads_the_text_from_both_ends(offsets: list[int] | None) -> None:
    torch.manual_seed(0)
    both, u = LRU(4, 3, bidirectional=True), torch.randn(1, 12, 4)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    forth, back = LRU(4, 3), LRU(4, 3)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            halves = parameter.chunk(2, 1) if name.startswith("C") else (parameter, parameter)
            for one, half in zip((forth, back), halves, strict=True):
                one.get_parameter(name).copy_(half)
        back.D.zero_()
        pieces = [u] if offsets is None else u.split([b - a for a, b in pairwise(offsets)], 1)
        expected = torch.cat([forth(piece) + back(piece.flip(1)).flip(1) for piece in pieces], 1)
        assert distance(both(u, cu_seqlens=cu_seqlens), expected) < 2e-6


def test_bidirectional_with_exchanged_ends_gives_the_flipped_result() -> None:
    torch.manual_seed(0)
    lru, u = LRU(4, 3, bidirectional=True), torch.randn(2, 12, 4)
    with torch.no_grad():
        y = lru(u)
        for C in (lru.C_re, lru.C_im):
            C.copy_(C.roll(3, 1))
        assert distance(lru(u.flip(1)).flip(1), y) < 1e-6


def test_bidirectional_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    block, u = LRUBlock(3, 2, bidirectional=True).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    parameters = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}

    def run(u: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (u,))

    assert torch.autograd.gradcheck(run, (u.requires_grad_(), *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("module", [LRU, LRUBlock])
def test_bidirectional_has_no_state(module: type[nn.Module]) -> None:
    layer, u = module(4, 3, bidirectional=True), torch.randn(2, 5, 4)
    state = torch.zeros(2, 3, dtype=torch.complex64)
    for call in (
        lambda: layer(u, state),
        lambda: layer(u, return_state=True),
        lambda: layer.step(u[:, 0], state),
    ):
        with pytest.raises(ValueError, match=r"bidirectional layer .* has no state and no step"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ({"state": 2.0}, TypeError, "state must be an int, got float"),
        ({"r_min": -0.1}, ValueError, r"0 <= r_min <= r_max <= 1 .* got \[-0.1, 1.0\]"),
        ({"r_min": 0.5, "r_max": 0.4}, ValueError, r"got \[0.5, 0.4\]"),
        ({"r_max": 1.1}, ValueError, r"got \[0.0, 1.1\]"),
        ({"r_max": 0.0}, ValueError, r"within \(0, 1\), got \[0.0, 0.0\]"),
        ({"r_min": 1.0}, ValueError, r"within \(0, 1\), got \[1.0, 1.0\]"),
        ({"max_phase": math.inf}, ValueError, "above 0 and finite, got inf"),
        ({"max_phase": 0.0}, ValueError, "max_phase must be above 0 and finite, got 0.0"),
    ],
)
def test_bad_sizes_and_rings_are_named(arguments: dict[str, float], error: type[Exception], message: str) -> None:
    for module in (LRU, LRUBlock):
        with pytest.raises(error, match=message):
            module(**{"hidden": 4, "state": 3, **arguments})
    with pytest.raises(ValueError, match='norm must be "batch" or "layer", got \'none\''):
        LRUBlock(4, 3, norm="none")


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("training", [False, True])
def test_block_equals_its_formula(norm: str, training: bool) -> None:
    torch.manual_seed(0)
    block, x = LRUBlock(5, 7, norm=norm).double().train(training), torch.randn(2, 9, 5, dtype=torch.float64) + 3
    with torch.no_grad():
        y = block(x)
        if norm == "layer":
            normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        elif training:
            normed = (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + 1e-5).sqrt()
        else:
            normed = x / math.sqrt(1 + 1e-5)  # of fresh statistics
        z = textbook(block.lru, normed)
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        a, b = (z @ block.gate.weight.T + block.gate.bias).chunk(2, -1)
        assert distance(y, x + a * b.sigmoid()) < 1e-13


def test_block_drops_in_training_only() -> None:
    torch.manual_seed(0)
    block, x = LRUBlock(16, 8, dropout=0.5, norm="layer"), torch.randn(2, 30, 16)
    with torch.no_grad():
        untouched = float((block(x) == x).float().mean())
        assert torch.equal(block.eval()(x), block(x))
    assert untouched == pytest.approx(0.5, abs=0.06)
