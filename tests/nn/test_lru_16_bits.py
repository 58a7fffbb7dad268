"""The LRU in 16 bits: between its products B u and h are pairs of 16 bits, and nothing but their rounding shows."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from implementations import Implementation
from operations import Operations
from scan_cases import ORDINARY
from torch import Tensor, nn
from torch.nn import functional as F

from fastwkv.nn import LRU, LRUBlock, lru

H, N, T = 6, 24, 40
LAYERS = {
    "LRU": lambda: LRU(H, N, 0.5, 0.99),
    "LRU, bidirectional": lambda: LRU(H, N, 0.5, 0.99, bidirectional=True),
    "LRUBlock": lambda: LRUBlock(H, N, 0.5, 0.99),
    "LRUBlock, bidirectional": lambda: LRUBlock(H, N, 0.5, 0.99, norm="layer", bidirectional=True),
}
HALF = (torch.bfloat16, torch.float16)
every_layer = pytest.mark.parametrize("name", LAYERS)
ONE_WAY = [name for name in LAYERS if "bidirectional" not in name]
# A model of 16 bits, and one of 32 whose products alone autocast rounds.
every_precision = pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]
)


def setting(name: str, dtype: torch.dtype, autocast: bool, length: int = T) -> tuple[nn.Module, Tensor, Any]:
    """Return a layer, a text, and the context to run it in."""
    torch.manual_seed(0)
    held = torch.float32 if autocast else dtype
    layer, x = LAYERS[name]().to(held).eval(), torch.randn(2, length, H).to(held)
    context: AbstractContextManager[Any] = torch.autocast("cpu", dtype) if autocast else nullcontext()
    return layer, x, context


def use_complex64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the LRU scan as it would without pairs: x widened to complex64, h as wide."""
    scan = lru.linear_scan

    def wide(a: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        assert x.dtype.itemsize == 2
        results = scan(a, torch.view_as_complex(x.float()), *args, **options)
        h, *final = results if isinstance(results, tuple) else (results,)
        return (torch.view_as_real(h), *final) if final else torch.view_as_real(h)

    def between(
        u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Any, cu_seqlens: Any
    ) -> tuple[Tensor, Tensor]:
        x = F.linear(u, into).unflatten(-1, (-1, 2))
        h, final = wide(a, x, initial, return_state=True, cu_seqlens=cu_seqlens)
        return F.linear(h.flatten(-2).to(out.dtype), out), final

    def both_ways(
        u: Tensor, into: Tensor, a: Tensor, out: Tensor, initial: Any, cu_seqlens: Any
    ) -> tuple[Tensor, Tensor]:
        x = F.linear(u, into).unflatten(-1, (-1, 2))
        h, final = wide(a, x, return_state=True, cu_seqlens=cu_seqlens)
        both = torch.cat((h, wide(a, x, reverse=True, cu_seqlens=cu_seqlens)), 2)
        return F.linear(both.flatten(-2).to(out.dtype), out), final

    monkeypatch.setattr(lru, "scan_between_products", between)
    monkeypatch.setattr(lru, "_scan_both_ways", both_ways)


def distance(actual: Tensor, expected: Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to("cpu", wide), expected.detach().to("cpu", wide)
    return float((actual - expected).norm() / expected.norm())


def results(layer: nn.Module, x: Tensor, context: Any) -> dict[str, Tensor]:
    """Output and gradients of a random loss."""
    x = x.detach().requires_grad_()
    with context:
        y = layer(x)
    goal = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = {"x": x, **dict(layer.named_parameters())}
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), goal), strict=True))


@every_layer
@every_precision
def test_numbers_are_those_of_a_complex64_scan(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, autocast: bool
) -> None:
    layer, x, context = setting(name, dtype, autocast)
    found = results(layer, x, context)
    use_complex64(monkeypatch)
    for part, wanted in results(layer, x, context).items():
        assert found[part].dtype == wanted.dtype
        assert distance(found[part], wanted) <= ORDINARY[dtype][0], part


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_are_those_of_other_kernels(dtype: torch.dtype) -> None:
    layer, x, context = setting("LRU, bidirectional", dtype, False, length=18)
    wanted = results(layer, x, context)
    with Implementation("triton") as there:
        found = results(layer.to(there.device), x.to(there.device), context)
    for part in wanted:
        assert distance(found[part], wanted[part]) <= ORDINARY[dtype][0], part


@pytest.mark.parametrize("dtype", HALF)
def test_gamma_and_b_are_rounded_once_together(dtype: torch.dtype) -> None:
    layer = LRU(1, 64, 0.5, 0.99).to(dtype)
    _, state = layer.step(torch.ones(1, 1, dtype=dtype))  # γ B, as it is multiplied with u
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    exact = p["gamma_log"].exp() * torch.complex(p["B_re"], p["B_im"])[:, 0]
    exact, found = torch.view_as_real(exact), torch.view_as_real(state[0].detach())
    info = torch.finfo(dtype)
    assert ((found - exact).abs() <= (exact.abs() * info.eps / 2).clamp(min=info.tiny * info.eps) * 1.001).all()


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")


@every_layer
@every_precision
def test_all_between_products_has_16_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, autocast: bool
) -> None:
    layer, x, context = setting(name, dtype, autocast)
    step, scanned = lru.linear_scan_step, []

    def watched_step(a: Tensor, x_t: Tensor, state: Tensor) -> Tensor:
        scanned.append(x_t)
        return step(a, x_t, state)

    monkeypatch.setattr(lru, "linear_scan_step", watched_step)
    with Operations() as operations:
        results(layer, x, context)
        if name in ONE_WAY:
            with context:
                layer.step(x[:, 0])
    for call in operations.calls:
        if call.name == "fastwkv::linear_scan_fwd":
            assert call.arguments[0].dtype == torch.complex64
            scanned += [call.arguments[1], call.result[0]]
    assert len(scanned) == (3 if name in ONE_WAY else 4)
    assert {(t.dtype, tuple(t.shape[-2:])) for t in scanned} == {(dtype, (N, 2))}
    products = [call.arguments for call in operations.calls if call.name in PRODUCTS]
    assert {t.dtype for arguments in products for t in arguments if isinstance(t, Tensor)} == {dtype}


@pytest.mark.parametrize("name", ONE_WAY)
@pytest.mark.parametrize("gradients", [False, True])
@every_precision
def test_token_by_token_equals_all_at_once(name: str, dtype: torch.dtype, autocast: bool, gradients: bool) -> None:
    layer, x, context = setting(name, dtype, autocast)
    # Powers of two, times weights of 8 or 11 bits: the six terms of a product add up exactly in float32, in whatever
    # order a library adds, and for one token as for many it is rounded to the same 16 bits.
    x = (2.0 ** torch.randint(-1, 2, x.shape) * x.sign()).to(x.dtype).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients), context:
        whole, final = layer(x, return_state=True)
        outputs, state = [], None
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
            outputs.append(y_t)
    y = torch.stack(outputs, 1)
    assert y.dtype == whole.dtype
    assert distance(y, whole) <= ORDINARY[dtype][0]
    assert distance(state, final) <= 1e-6  # of the same products, and never rounded
    if gradients:
        goal = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        wanted, found = (torch.autograd.grad(t, x, goal)[0] for t in (whole, y))
        assert distance(found, wanted) <= ORDINARY[dtype][1]


def kept(layer: nn.Module, x: Tensor, context: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass beside parameters and input, each counted once."""
    storages: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), context:
        y = layer(x)
    held = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in held)


# Of each number 4 bytes of h, in place of 8 and of its 16-bit copy for the product; with both directions besides, in
# either form, the two side by side.
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bidirectional", "parts"), [(False, (4, 12)), (True, (16, 24))])
def test_only_h_in_16_bits_is_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, bidirectional: bool, parts: tuple[int, int], dtype: torch.dtype
) -> None:
    layer, x = LRU(1, 64, bidirectional=bidirectional).to(dtype), torch.randn(2, 500, 1).to(dtype)
    pairs = kept(layer, x, nullcontext())
    use_complex64(monkeypatch)
    complex64 = kept(layer, x, nullcontext())
    for found, wanted in zip((pairs, complex64), parts, strict=True):
        assert wanted <= found / (2 * 500 * 64) <= 1.05 * wanted


def test_h_is_kept_once_under_autocast() -> None:
    layer, x = LRU(1, 64), torch.randn(2, 500, 1)
    assert 4 <= kept(layer, x, torch.autocast("cpu", torch.bfloat16)) / (2 * 500 * 64) <= 4.3
