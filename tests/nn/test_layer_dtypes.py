"""Every layer over the linear scan takes an input of any dtype beside parameters of any: the wider of both computes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastwkv.nn import LRU, RGLRU, S4D, LRUBlock, MinGRU

H = 6
LAYERS = {
    "LRU": lambda: LRU(H, 5),
    "LRU, bidirectional": lambda: LRU(H, 5, bidirectional=True),
    "LRUBlock, batch": lambda: LRUBlock(H, 5),
    "LRUBlock, layer": lambda: LRUBlock(H, 5, norm="layer"),
    "S4D": lambda: S4D(H, 4),
    "RGLRU": lambda: RGLRU(H, heads=3),
    "MinGRU": lambda: MinGRU(H, 5),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layer_of(name: str, dtype: torch.dtype, training: bool) -> nn.Module:
    torch.manual_seed(3)
    return LAYERS[name]().to(dtype).train(training)


def text(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 7, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, rounding: float) -> bool:
    kind = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(kind), expected.detach().to(kind)
    return bool((actual - expected).norm() <= rounding * expected.norm())


@given(st.sampled_from(list(LAYERS)), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_input_of_another_dtype_is_computed_in_the_wider_one(
    name: str, stored: torch.dtype, given: torch.dtype, training: bool
) -> None:
    layer, x = layer_of(name, stored, training), text(given).requires_grad_()
    wide = torch.promote_types(stored, given)
    wide_layer, wide_x = copy.deepcopy(layer).to(wide), x.detach().to(wide).requires_grad_()
    y, expected = layer(x), wide_layer(wide_x)
    assert y.dtype == given
    rounding = 2 * torch.finfo(given).eps  # of one value, twice
    assert close(y, expected, rounding)
    y.double().square().sum().backward()
    expected.to(given).double().square().sum().backward()
    for (which, p), q in zip(layer.named_parameters(), wide_layer.parameters(), strict=True):
        assert p.grad.dtype == stored
        assert close(p.grad, q.grad, rounding + 2 * torch.finfo(stored).eps + 1e-5), which
    assert close(x.grad, wide_x.grad, rounding + 1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if "bidirectional" not in name])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_states_and_steps_of_mixed_dtypes_are_those_of_the_wider_one(
    name: str, stored: torch.dtype, given: torch.dtype
) -> None:
    layer, x = layer_of(name, stored, training=False), text(given)
    wide_layer = copy.deepcopy(layer).to(torch.promote_types(stored, given))
    y, state = layer(x, return_state=True)
    _, wide_state = wide_layer(x.to(torch.promote_types(stored, given)), return_state=True)
    assert state.dtype == wide_state.dtype
    assert close(state, wide_state, 1e-6)
    y_t, state = layer.step(x[:, 0], state)
    again, _ = layer(x[:, :1], wide_state, return_state=True)
    assert y_t.dtype == y.dtype == given
    assert close(y_t, again[:, 0], 2 * torch.finfo(given).eps + 2e-6)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_running_statistics_of_a_16_bit_block_follow_a_wider_input(stored: torch.dtype) -> None:
    block, x = layer_of("LRUBlock, batch", stored, training=True), text(torch.float32) + 3
    wide = copy.deepcopy(block).float()
    block(x), wide(x)
    assert block.norm.running_mean.dtype == stored
    assert torch.equal(block.norm.running_mean, wide.norm.running_mean.to(stored))
    assert torch.equal(block.norm.running_var, wide.norm.running_var.to(stored))
    assert int(block.norm.num_batches_tracked) == 1


def test_hooks_of_a_block_run_beside_another_dtype() -> None:
    block, seen = layer_of("LRUBlock, layer", torch.bfloat16, training=True), []
    for part in (block.norm, block.gate):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    block(text(torch.float32))
    assert seen == [torch.float32, torch.float32]


def test_norm_that_was_replaced_by_one_without_parameters_is_called() -> None:
    block = layer_of("LRUBlock, layer", torch.float32, training=True)
    block.norm = nn.Identity()
    assert block(text(torch.float32)).shape == (2, 7, H)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_block_of_another_dtype_compiles_to_one_graph(given: torch.dtype) -> None:
    torch._dynamo.reset()
    block, x = layer_of("LRUBlock, layer", torch.float16, training=False), text(given)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(x), block(x), 2 * torch.finfo(given).eps)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_autocast_takes_an_input_of_16_bits_too(name: str, given: torch.dtype) -> None:
    layer, x = layer_of(name, torch.float32, training=False), text(given)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == given
    assert close(y, layer(x.float()), 0.05)
