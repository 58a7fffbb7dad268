"""How much memory an LRU takes, whose states nobody else sees, and that nothing of anybody's is overwritten."""

from collections.abc import Callable

import pytest
import torch
from bench_scripts import load
from torch import Tensor, nn

from fastwkv.nn import LRU, lru
from fastwkv.ops.linear_scan import linear_scan

LiveBytes = load("live_bytes").LiveBytes
H, T = 8, 500
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LRU": lambda: LRU(H, 64, 0.5, 0.99),
    "LRU, bidirectional": lambda: LRU(H, 64, 0.5, 0.99, bidirectional=True),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def setting(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype), torch.randn(2, T, H).to(dtype).requires_grad_(), torch.randn(2, T, H).to(dtype)


def gradients(layer: nn.Module, u: Tensor, goal: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(layer(u), [u, *layer.parameters()], goal))


def apart(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Scan as everybody else: the gradient of x has memory of its own."""
    return linear_scan(*args, return_state=True, **options)  # type: ignore[arg-type, return-value, misc]


@every_layer
@every_dtype
def test_gradients_are_those_of_a_scan_that_keeps_all_apart(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    layer, u, goal = setting(name, dtype)
    before = goal.clone()
    found = gradients(layer, u, goal)
    torch.testing.assert_close(goal, before, rtol=0, atol=0)
    monkeypatch.setattr(lru, "linear_scan_within", apart)
    torch.testing.assert_close(found, gradients(layer, u, goal), rtol=0, atol=0)


@every_layer
def test_a_graph_that_is_kept_gives_the_same_twice(name: str) -> None:
    layer, u, goal = setting(name, torch.float32)
    y = layer(u)
    once = torch.autograd.grad(y, [u, *layer.parameters()], goal, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, [u, *layer.parameters()], goal), once, rtol=0, atol=0)


@every_layer
def test_second_derivatives_stay(name: str) -> None:
    layer, u, goal = setting(name, torch.float64)

    def slope(u: Tensor) -> Tensor:
        return torch.autograd.grad(layer(u), u, u * goal, create_graph=True)[0]

    u = u.detach()[:, :6].requires_grad_()
    goal = goal[:, :6]
    (along,) = torch.autograd.grad(slope(u), u, goal)
    step = 1e-6 * goal
    numeric = (slope(u + step) - slope(u - step)) / 2e-6
    torch.testing.assert_close((along * goal).sum(), (numeric * goal).sum(), rtol=1e-6, atol=1e-8)


def peak(layer: nn.Module, u: Tensor, goal: Tensor) -> float:
    """Return the most memory of a forward and backward pass, in tensors of the size of h."""
    with LiveBytes() as memory:
        results = gradients(layer, u, goal)
    del results
    return float(memory.peak / (u.numel() / H * 64 * 2 * u.dtype.itemsize))


@every_dtype
def test_two_tensors_as_large_as_h_are_enough(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # h and its gradient, which that of its input takes the place of; beside them tokens, outputs and parameters.
    layer, u, goal = setting("LRU", dtype)
    assert peak(layer, u, goal) < 2.3
    monkeypatch.setattr(lru, "linear_scan_within", apart)
    assert peak(layer, u, goal) > 3
