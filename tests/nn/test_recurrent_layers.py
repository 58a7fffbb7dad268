"""What every layer over the linear scan promises: one result however the text is cut, packed or rounded."""

import pytest
import torch
from torch import Tensor, nn

from fastwkv.nn import LRU, RGLRU, S4D, LRUBlock, MinGRU

H = 6
LAYERS = {
    "LRU": lambda: LRU(H, 5),
    "LRUBlock, batch": lambda: LRUBlock(H, 5),
    "LRUBlock, layer": lambda: LRUBlock(H, 5, norm="layer"),
    "S4D, lin": lambda: S4D(H, 4),
    "S4D, inv": lambda: S4D(H, 4, init="inv"),
    "RGLRU": lambda: RGLRU(H),
    "RGLRU, heads": lambda: RGLRU(H, heads=3),
    "MinGRU": lambda: MinGRU(H, 5),
    "MinGRU, positive": lambda: MinGRU(H, positive=True),
}
SAME = 2e-6  # relative L2 distance of two float32 computations of one thing
every_layer = pytest.mark.parametrize("name", LAYERS)


def trained(name: str, seed: int = 0) -> nn.Module:
    """A layer in which no parameter has a value that hides an error, such as zero; batch norms have statistics."""
    torch.manual_seed(seed)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape))
    return layer.eval()


def text(batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(actual: Tensor, expected: Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    return float((actual - expected).norm() / expected.norm())


def steps(layer: nn.Module, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


@every_layer
def test_token_by_token_equals_all_at_once(name: str) -> None:
    layer, x = trained(name), text(2, 40)
    whole, final = layer(x, return_state=True)
    assert distance(layer(x), whole) == 0
    y, state = steps(layer, x)
    assert distance(y, whole) < SAME
    assert distance(state, final) < SAME
    y, _ = steps(layer, x[:, 20:], layer(x[:, :20], return_state=True)[1])
    assert distance(y, whole[:, 20:]) < SAME


@every_layer
@pytest.mark.parametrize("cuts", [[1], [19], [3, 4, 11]])
def test_any_split_with_carried_state_equals_the_whole(name: str, cuts: list[int]) -> None:
    layer, x = trained(name), text(2, 20)
    whole, final = layer(x, return_state=True)
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 20], strict=True):
        y, state = layer(x[:, start:stop], state, return_state=True)
        pieces.append(y)
    assert distance(torch.cat(pieces, 1), whole) < SAME
    assert distance(state, final) < SAME


@every_layer
@pytest.mark.parametrize("carried", [False, True])
def test_packed_sequences_equal_each_on_its_own(name: str, carried: bool) -> None:
    layer, offsets = trained(name), [0, 0, 4, 5, 5, 17, 17]
    x = text(1, 17)
    initial = layer(text(6, 5, seed=2), return_state=True)[1] if carried else None
    y, final = layer(x, initial, return_state=True, cu_seqlens=torch.tensor(offsets))
    for n in range(6):
        state = None if initial is None else initial[n : n + 1]
        if offsets[n] == offsets[n + 1]:
            assert torch.equal(final[n : n + 1], torch.zeros_like(final[:1]) if state is None else state)
            continue
        alone, state = layer(x[:, offsets[n] : offsets[n + 1]], state, return_state=True)
        assert distance(y[:, offsets[n] : offsets[n + 1]], alone) < SAME
        assert distance(final[n : n + 1], state) < SAME


@every_layer
def test_gradients_equal_finite_differences(name: str) -> None:
    layer = trained(name).double()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x = text(1, 4, dtype=torch.float64).requires_grad_()
    state = layer(text(1, 3, seed=2, dtype=torch.float64), return_state=True)[1].detach().requires_grad_()

    def run(x: Tensor, state: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x, state), {"return_state": True})

    assert torch.autograd.gradcheck(run, (x, state, *parameters.values()), fast_mode=True)


@every_layer
@pytest.mark.parametrize("stepwise", [False, True])
def test_gradients_flow_through_a_carried_state(name: str, stepwise: bool) -> None:
    layer, x = trained(name).double(), text(2, 9, dtype=torch.float64)
    parameters, whole = list(layer.parameters()), layer(x)
    goal = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * goal).sum(), parameters)
    if stepwise:
        y, _ = steps(layer, x)
    else:
        y, state = layer(x[:, :4], return_state=True)
        y = torch.cat((y, layer(x[:, 4:], state)), 1)
    for gradient, wanted in zip(torch.autograd.grad((y * goal).sum(), parameters), expected, strict=True):
        assert distance(gradient, wanted) < 1e-12


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer_keeps_a_wide_state(name: str, dtype: torch.dtype) -> None:
    layer, x = trained(name).to(dtype), text(2, 50, dtype=dtype)
    with torch.no_grad():
        y, final = layer(x, return_state=True)
        y_steps, state = steps(layer, x)
        exact, exact_final = layer.double()(x.double(), return_state=True)
    assert y.dtype == y_steps.dtype == dtype
    assert final.dtype == state.dtype == (torch.complex64 if exact_final.is_complex() else torch.float32)
    bound = 2 * torch.finfo(dtype).eps
    assert max(distance(y, exact), distance(y_steps, exact), distance(final, exact_final)) < bound


@every_layer
def test_autocast_rounds_products_only(name: str) -> None:
    layer, x = trained(name), text(2, 50)
    exact, exact_final = layer(x, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, final = layer(x, return_state=True)
        y_step, _ = layer.step(x[:, 0])
    y.sum().backward()
    assert y.dtype == y_step.dtype == torch.float32
    assert final.dtype == exact_final.dtype
    assert max(distance(y, exact), distance(final, exact_final)) < 2 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every_layer
def test_state_dict_restores_a_layer(name: str) -> None:
    layer, other, x = trained(name), trained(name, seed=1), text(1, 6)
    assert distance(other(x), layer(x)) > 0.1
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every_layer
def test_layer_built_on_meta_gets_every_initial_value(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 7)
    layer.reset_parameters()
    for n, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        assert tensor.isfinite().all(), n
    torch.manual_seed(5)
    fresh = LAYERS[name]().eval()
    torch.manual_seed(5)
    layer.reset_parameters()
    assert torch.equal(layer.eval()(text(1, 6)), fresh(text(1, 6)))


@every_layer
def test_every_parameter_has_a_gradient(name: str) -> None:
    layer = trained(name)
    layer(text(2, 6)).square().sum().backward()
    for n, parameter in layer.named_parameters():
        assert parameter.grad is not None, n
        assert parameter.grad.any(), n


@every_layer
def test_meta_tensors_give_shapes(name: str) -> None:
    layer = LAYERS[name]().to("meta").eval()
    y, state = layer(torch.empty(2, 7, H, device="meta"), return_state=True)
    assert (y.shape[:2], y.dtype) == ((2, 7), torch.float32)
    assert state.shape == layer.step(torch.empty(2, H, device="meta"))[1].shape


@pytest.mark.parametrize("name", ["LRUBlock, batch", "S4D, lin", "RGLRU", "MinGRU"])
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    layer, x = trained(name), text(2, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y, state = layer(x, return_state=True)
        y_compiled, state_compiled = compiled(x, return_state=True)
    assert distance(y_compiled, y) < SAME
    assert distance(state_compiled, state) < SAME


@every_layer
def test_bad_arguments_are_named(name: str) -> None:
    layer, x = trained(name), text(2, 5)
    _, state = layer(x, return_state=True)
    rows, width = state.shape
    other = torch.float32 if state.is_complex() else torch.float64
    for arguments, error, message in [
        ((x[0],), ValueError, r"must be \[B, T, H\], got shape \[5, 6\]"),
        ((x[:, :0],), ValueError, "T must be at least 1"),
        ((x[..., :4],), ValueError, r"must be \[B, T, H\] = \[2, 5, 6\], got shape \[2, 5, 4\]"),
        ((x.long(),), TypeError, "must be float32, float64, bfloat16 or float16, got int64"),
        ((x.to(torch.complex64),), TypeError, "got complex64"),
        (("text",), TypeError, "must be a tensor, got str"),
        ((x, state[:1]), ValueError, rf"state must be \[B, N\] = \[{rows}, {width}\], got shape \[1, {width}\]"),
        (
            (x, torch.zeros_like(state, dtype=other)),
            TypeError,
            f"state must be {str(state.dtype)[6:]} .*, got {str(other)[6:]}",
        ),
        ((x, [state]), TypeError, "state must be a tensor, got list"),
        ((x, state.to("meta")), ValueError, "state is on meta, but the input is on cpu"),
    ]:
        with pytest.raises(error, match=message):
            layer(*arguments)
    for arguments, error, message in [
        ((x,), ValueError, r"must be \[B, H\], got shape \[2, 5, 6\]"),
        ((x[:, 0, :4],), ValueError, r"must be \[B, H\] = \[2, 6\], got shape \[2, 4\]"),
        ((x[:, 0], state[:, 1:]), ValueError, "state must be"),
    ]:
        with pytest.raises(error, match=message):
            layer.step(*arguments)
    for flag in ("no", 1, None, torch.tensor(True)):
        with pytest.raises(TypeError, match="return_state must be a bool, got "):
            layer(x, return_state=flag)
    with pytest.raises(ValueError, match="cu_seqlens is on meta, but the input is on cpu"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 5], device="meta"))
    with pytest.raises(ValueError, match="a batch of one, but B = 2"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="must run from 0 to T = 5 without decreasing"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=rf"state must be \[sequences, N\] = \[3, {width}\], got shape \[2, {width}\]"):
        layer(x[:1], state, cu_seqlens=torch.tensor([0, 1, 2, 5]))
