"""How much memory an LRU takes, whose states nobody else sees, and that nothing of anybody's is overwritten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing.live_bytes import LiveBytes
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn import LRU, lru
from fastwkv.ops.linear_scan import linear_scan

H, T = 8, 500
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LRU": lambda: LRU(H, 64, 0.5, 0.99),
    "LRU, bidirectional": lambda: LRU(H, 64, 0.5, 0.99, bidirectional=True),
}
# Two orders of adding up 9 tokens of 128 numbers of size 1 in float64: about a thousand roundings of 1e-16 each.
SAME = {"rtol": 1e-12, "atol": 1e-12}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def setting(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype), torch.randn(2, T, H).to(dtype).requires_grad_(), torch.randn(2, T, H).to(dtype)


def gradients(layer: nn.Module, u: Tensor, goal: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(layer(u), [u, *layer.parameters()], goal))


def apart(
    u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same as three operators of autograd."""
    x = F.linear(u, into).unflatten(-1, (-1, 2))
    h, final = linear_scan(a, x, initial, return_state=True, cu_seqlens=cu_seqlens)
    return F.linear(h.flatten(-2), out), final


@every_layer
@every_dtype
def test_gradients_are_those_of_a_scan_that_keeps_all_apart(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    layer, u, goal = setting(name, dtype)
    before = goal.clone()
    found = gradients(layer, u, goal)
    torch.testing.assert_close(goal, before, rtol=0, atol=0)
    monkeypatch.setattr(lru, "scan_between_products", apart)
    torch.testing.assert_close(found, gradients(layer, u, goal), rtol=0, atol=0)


def carried(
    layer: nn.Module, u: Tensor, goal: Tensor, lengths: list[int] | None, which: tuple[str, ...], frozen: str
) -> dict[str, Tensor | None]:
    """Gradients of some of the results, from a state on, to all that is not frozen."""
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    u = u.detach()[:1, : sum(lengths)] if lengths else u.detach()
    generator = torch.Generator().manual_seed(2)
    rows, wide = len(lengths) if lengths else 2, torch.complex128 if u.dtype == torch.float64 else torch.complex64
    state, goal_of_final = (torch.randn(rows, 64, dtype=wide, generator=generator) for _ in range(2))
    leaves = {"u": u, "state": state, **dict(layer.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    leaves.pop(frozen, None)
    y, final = layer(u, state, return_state=True, cu_seqlens=offsets)
    results = {"y": (y, goal[:1, : y.shape[1]] if lengths else goal), "final": (final, goal_of_final)}
    outputs, goals = zip(*(results[name] for name in which), strict=True)
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), goals, allow_unused=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [7, 1, 30]])
@pytest.mark.parametrize("which", [("y",), ("final",), ("y", "final")])
@pytest.mark.parametrize("frozen", ["", "u", "state", "B_re", "C_re", "nu_log"])
def test_states_and_packed_texts_have_the_gradients_of_operators_apart(
    monkeypatch: pytest.MonkeyPatch, frozen: str, which: tuple[str, ...], lengths: list[int] | None, dtype: torch.dtype
) -> None:
    layer, u, goal = setting("LRU", dtype)
    u, goal = u[:, :40], goal[:, :40]
    found = carried(layer, u, goal, lengths, which, frozen)
    monkeypatch.setattr(lru, "scan_between_products", apart)
    for name, wanted in carried(layer, u, goal, lengths, which, frozen).items():
        gradient = found[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None and wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)
            assert gradient.any(), name


def nodes(y: Tensor) -> list[Any]:
    """All functions of a graph."""
    found: dict[Any, None] = {}
    left = [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = None
            left += [after for after, _ in node.next_functions]
    return list(found)


@every_layer
@every_dtype
def test_gradients_that_somebody_keeps_on_their_way_stay_what_they_are(name: str, dtype: torch.dtype) -> None:
    # As schedules of pipelines do, which come back to them for the gradients of parameters.
    layer, u, goal = setting(name, dtype)
    y = layer(u)
    seen: list[tuple[Tensor, Tensor]] = []
    for node in nodes(y):
        node.register_prehook(lambda gradients: seen.extend((g, g.clone()) for g in gradients if g is not None))
    torch.autograd.grad(y, [u, *layer.parameters()], goal)
    assert len(seen) > 8
    for kept, was in seen:
        torch.testing.assert_close(kept, was, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap takes them one after the other
@every_layer
def test_many_gradients_at_once_are_those_of_one_after_the_other(name: str) -> None:
    layer, u, _ = setting(name, torch.float64)
    u = u.detach()[:, :9].requires_grad_()
    y, goals = layer(u), torch.randn(3, 2, 9, H, dtype=u.dtype)
    wanted = torch.stack([torch.autograd.grad(y, u, goal, retain_graph=True)[0] for goal in goals])

    def of(goal: Tensor) -> Tensor:
        return torch.autograd.grad(y, u, goal, retain_graph=True)[0]

    batched = torch.autograd.grad(y, u, goals, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, wanted, **SAME)
    torch.testing.assert_close(torch.func.vmap(of)(goals), wanted, **SAME)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_of_the_state_beside_one_of_the_output() -> None:
    layer, u, _ = setting("LRU", torch.float64)
    u = u.detach()[:, :9].requires_grad_()
    y, final = layer(u, return_state=True)
    goal, goals = torch.randn_like(y), torch.randn(3, *final.shape, dtype=final.dtype)

    def of(goal_of_final: Tensor) -> Tensor:
        return torch.autograd.grad((y, final), u, (goal, goal_of_final), retain_graph=True)[0]

    torch.testing.assert_close(torch.func.vmap(of)(goals), torch.stack(list(map(of, goals))), **SAME)


def test_first_and_second_derivatives_add_up_and_stay_what_they_are() -> None:
    # Then the scan is asked for the gradients of y and of h at once, or of h alone, which is not its own.
    layer, u, goal = setting("LRU", torch.float64)
    u, goal = u.detach()[:, :9].requires_grad_(), goal[:, :9]
    y = layer(u)
    (slope,) = torch.autograd.grad(y, layer.nu_log, goal, create_graph=True)  # which h is a factor of
    seen: list[tuple[Tensor, Tensor]] = []
    for node in nodes(slope):
        node.register_prehook(lambda gradients: seen.extend((g, g.clone()) for g in gradients if g is not None))
    goals = goal, torch.randn_like(slope)
    first, second = (torch.autograd.grad(t, u, g, retain_graph=True)[0] for t, g in zip((y, slope), goals, strict=True))
    (both,) = torch.autograd.grad((y, slope), u, goals)
    assert second.any()
    torch.testing.assert_close(both, first + second, rtol=1e-12, atol=1e-12)
    for kept, was in seen:
        torch.testing.assert_close(kept, was, rtol=0, atol=0)


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
    return float(memory.peak / (u.shape[0] * u.shape[1] * 64 * 2 * u.dtype.itemsize))


@every_dtype
def test_two_tensors_as_large_as_h_are_enough(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # h and its gradient, which that of its input takes the place of; beside them tokens, outputs and parameters.
    layer, u, goal = setting("LRU", dtype)
    assert peak(layer, u, goal) < 2.3
    monkeypatch.setattr(lru, "scan_between_products", apart)
    assert peak(layer, u, goal) > 3


def test_h_is_gone_before_the_gradient_of_the_tokens_is_there() -> None:
    layer, u = LRU(64, 64), torch.randn(2, 4000, 64).requires_grad_()
    goal = torch.randn_like(u)
    assert peak(layer, u, goal) < 2.75  # two of h and its gradient, and y, of half the size; 3 with the gradient of u


@every_dtype
def test_forward_pass_alone_holds_what_is_scanned_and_h(dtype: torch.dtype) -> None:
    layer, u, _ = setting("LRU", dtype)
    with torch.no_grad(), LiveBytes() as memory:
        y = layer(u)
    del y
    assert memory.peak < 2.05 * u.numel() / H * 64 * 2 * dtype.itemsize
