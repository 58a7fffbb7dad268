"""vmap of the operators against a loop: values, gradients through it and within it, whichever inputs are mapped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from fastwkv import WKVState, linear_scan, linear_scan_step, wkv, wkv_step

SIZE = 3  # of the mapped axis
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")  # where a rule is missing
EXAMPLES = settings(max_examples=12)  # each calls the operators about twenty times


def scan_of(**options):
    def call(a, x, state, cut):
        given = {"log_a": -a} if options.get("log") else {}
        reverse = options.get("reverse", False)
        return linear_scan(None if given else a, x, state, return_state=True, cu_seqlens=cut, reverse=reverse, **given)

    return call


def wkv_of(w, u, k, v, num, den, top, cut):
    y, final = wkv(w, u, k, v, None if num is None else WKVState(num, den, top), return_state=True, cu_seqlens=cut)
    return y, *invariants(final)


def invariants(state):
    """Return what does not depend on the scale of a state: the mean, and the logarithm of its weight."""
    return state.num / state.den, state.max + state.den.log()


def scan_step_of(a, x, state):
    return (linear_scan_step(None, x, state, log_a=-a),)


def wkv_step_of(w, u, k, v, num, den, top):
    y, final = wkv_step(w, u, k, v, WKVState(num, den, top))
    return y, *invariants(final)


def shapes_of(name, B, T, C, packed, fixed, state):
    """Return the shape of each argument; None for one that is not given, a list of offsets for offsets."""
    rows = (2 if packed else B, C) if state else None
    cut = [[0, i + 1, T] for i in range(SIZE)] if packed else None
    return {
        "scan": [(C,) if fixed else (B, T, C), (B, T, C), rows, cut],
        "wkv": [(C,), (C,), (B, T, C), (B, T, C), rows, rows, rows, cut],
        "scan_step": [(C,) if fixed else (B, C), (B, C), (B, C)],
        "wkv_step": [(C,), (C,), (B, C), (B, C), (B, C), (B, C), (B, C)],
    }[name]


@st.composite
def calls(draw, names=("scan", "wkv", "scan_step", "wkv_step")):
    """Draw a function, its arguments, and where the mapped axis is in each."""
    name, packed = draw(st.sampled_from(names)), draw(st.booleans())
    log, reverse, fixed, state = (draw(st.booleans()) for _ in range(4))
    shapes = shapes_of(name, 1 if packed else 2, 5, 2, packed, fixed, state)
    dtype = torch.complex128 if name == "scan" and not log and draw(st.booleans()) else torch.float64
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    inputs, dims = [], []
    for shape in shapes:
        mapped = draw(st.booleans())
        if shape is None:
            inputs.append(None)
            dims.append(None)
        elif isinstance(shape, list):
            inputs.append(torch.tensor(shape if mapped else shape[0]))
            dims.append(0 if mapped else None)
        else:
            dims.append(draw(st.integers(0, len(shape))) if mapped else None)
            whole = shape if not mapped else (*shape[: dims[-1]], SIZE, *shape[dims[-1] :])
            inputs.append(0.1 + torch.rand(whole, generator=generator, dtype=dtype))
    if all(dim is None for dim in dims):
        dims[0] = 0
        inputs[0] = torch.stack([inputs[0]] * SIZE)
    functions = {"scan": scan_of(log=log, reverse=reverse), "wkv": wkv_of}
    functions |= {"scan_step": scan_step_of, "wkv_step": wkv_step_of}
    return functions[name], inputs, tuple(dims)


def looped(function, inputs, dims):
    """Return what vmap promises."""
    outputs = [
        function(*(t if dim is None else t.select(dim, i) for t, dim in zip(inputs, dims, strict=True)))
        for i in range(SIZE)
    ]
    return tuple(torch.stack(column) for column in zip(*outputs, strict=True))


def differentiable(inputs):
    return [i for i, t in enumerate(inputs) if t is not None and (t.is_floating_point() or t.is_complex())]


def loss_of(outputs):
    return sum((y * y.conj()).real.sum() for y in outputs)


def assert_same(results, wanted):
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-10)


@EXAMPLES
@given(call=calls(), data=st.data())
def test_values_and_gradients_are_those_of_a_loop(implementation, call, data):
    function, inputs, dims = call
    inputs = [None if t is None else t.to(implementation.device) for t in inputs]
    with torch.no_grad():
        assert_same(vmap(function, in_dims=dims)(*inputs), looped(function, inputs, dims))
    asked = [i for i in differentiable(inputs) if data.draw(st.booleans())] or differentiable(inputs)[-1:]
    for i in asked:
        inputs[i].requires_grad_()
    leaves = [inputs[i] for i in asked]
    results = vmap(function, in_dims=dims)(*inputs)
    gradients = torch.autograd.grad(loss_of(results), leaves)
    assert_same(gradients, torch.autograd.grad(loss_of(looped(function, inputs, dims)), leaves))


@EXAMPLES
@given(call=calls())
def test_gradients_of_every_index_are_those_of_a_loop(implementation, call):
    function, inputs, dims = call
    inputs = [None if t is None else t.to(implementation.device) for t in inputs]
    gradient = grad(lambda *given: loss_of(function(*given)), tuple(differentiable(inputs)))

    def one(*given):
        whole = [t if t is None else t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex())
                 for t in given]  # fmt: skip
        return torch.autograd.grad(loss_of(function(*whole)), [whole[i] for i in differentiable(whole)])

    assert_same(vmap(gradient, in_dims=dims)(*inputs), looped(one, inputs, dims))


@pytest.mark.parametrize("mapped", ["k", "x"])
def test_gradient_of_the_one_input_that_asks_for_it_is_not_lost(mapped):
    t = torch.randn(3, 2, 5, 4, requires_grad=True)
    w = torch.ones(4)
    vmap(lambda t: wkv(w, w, t, t.detach()) if mapped == "k" else linear_scan(w, t))(t).sum().backward()
    assert t.grad.abs().sum() > 0


def test_nested_vmap_is_two_loops(implementation):
    a = torch.rand(2, 4, dtype=torch.float64, device=implementation.device, requires_grad=True)
    x = torch.rand(3, 1, 5, 4, 2, dtype=torch.float64, device=implementation.device, requires_grad=True)
    found = vmap(vmap(linear_scan, (None, 0), out_dims=2), (0, 4), out_dims=1)(a, x)
    rows = [[linear_scan(a[i], x[j, ..., i]) for j in range(3)] for i in range(2)]
    wanted = torch.stack([torch.stack(row, 2) for row in rows], 1)
    assert_same((found,), (wanted,))
    assert_same(*(torch.autograd.grad(h.sin().sum(), (a, x)) for h in (found, wanted)))


OF_X = {
    "scan": lambda x: linear_scan(torch.full_like(x[0, 0], 0.5), x),
    "wkv": lambda x: wkv(x[0, 0], x[0, 1], x, x.sin()),
}


@pytest.fixture(params=OF_X)
def of_x(request):
    """An operator as a function of one tensor of float64."""
    return OF_X[request.param]


def numbers(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_jacobian_is_that_of_single_gradients(of_x):
    x = numbers(1, 4, 2)
    h = of_x(x)
    wanted = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0] for one in h.flatten()])
    assert_same((jacrev(of_x)(x.detach()).flatten(0, 2),), (wanted,))
    assert_same((vmap(jacrev(of_x))(x.detach()[None])[0].flatten(0, 2),), (wanted,))
    assert_same((torch.autograd.functional.jacobian(of_x, x, vectorize=True).flatten(0, 2),), (wanted,))


def test_batched_gradients_are_single_ones(of_x):
    x, goals = numbers(2, 5, 3), numbers(4, 2, 5, 3).detach()
    h = of_x(x)
    wanted = torch.stack([torch.autograd.grad(h, x, goal, retain_graph=True)[0] for goal in goals])
    found = torch.autograd.grad(h, x, goals, is_grads_batched=True, retain_graph=True)
    assert_same(found, (wanted,))
    of_goal = vmap(lambda goal: torch.autograd.grad(h, x, goal, retain_graph=True)[0])
    assert_same((of_goal(goals),), (wanted,))


def test_batched_gradients_of_the_scan_can_be_differentiated():
    a, goals = numbers(3), numbers(4, 2, 5, 3).detach()

    def second(**options):
        h = linear_scan(a, goals[0])
        if options:
            first = torch.autograd.grad(h, a, goals, create_graph=True, **options)[0]
        else:
            first = torch.stack([torch.autograd.grad(h, a, goal, create_graph=True)[0] for goal in goals])
        return torch.autograd.grad(first.sin().sum(), a)

    assert_same(second(is_grads_batched=True), second())


def of_two(a, x):
    return linear_scan(a, x).sin()


DERIVATIVES = {
    "forward": jacfwd,
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "tangent": lambda f: lambda a, x: jvp(f, (a, x), (a.cos(), x.cos()))[1],
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_second_derivatives_and_tangents_of_the_scan_pass_through_vmap(derivative):
    a, x = numbers(3).detach(), numbers(4, 1, 5, 3).detach()
    wanted = torch.stack([derivative(of_two)(a, row) for row in x])
    assert_same((vmap(derivative(of_two), (None, 0))(a, x),), (wanted,))


def test_tangents_of_vmap_are_those_of_a_loop():
    a, x = numbers(3).detach(), numbers(4, 1, 5, 3).detach()
    tangent = DERIVATIVES["tangent"](vmap(of_two, (None, 0)))(a, x)
    assert_same((tangent,), (torch.stack([DERIVATIVES["tangent"](of_two)(a, row) for row in x]),))


FORWARD = {
    "alone": lambda f: lambda x: jacfwd(f)(x[0]),
    "in vmap": lambda f: vmap(jacfwd(f)),
    "around vmap": lambda f: jacfwd(vmap(f)),
    "over reverse": lambda f: vmap(jacfwd(jacrev(f))),
}


@pytest.mark.parametrize("derivative", FORWARD.values(), ids=FORWARD)
def test_forward_mode_of_wkv_is_refused(derivative):
    with pytest.raises(RuntimeError, match=r"fastwkv\.wkv (has no forward mode|can be differentiated once)"):
        derivative(lambda x: wkv(x[0, 0], x[0, 0], x, x))(numbers(2, 1, 4, 3).detach())


@pytest.mark.parametrize("wrap", [lambda f: lambda x: f(x[0]), vmap], ids=["alone", "in vmap"])
def test_second_derivative_of_wkv_is_refused(wrap):
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        wrap(jacrev(jacrev(lambda x: wkv(x[0, 0], x[0, 0], x, x).sum())))(numbers(2, 1, 4, 3).detach())


def test_tangent_of_a_cotangent_reaches_the_gradient():
    a, x, goal = numbers(3).detach(), numbers(1, 4, 3), numbers(1, 4, 3).detach()
    with torch.autograd.forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(linear_scan(a, x), x, torch.autograd.forward_ad.make_dual(goal, goal.cos()))
        tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    (wanted,) = torch.autograd.grad(linear_scan(a, x), x, goal.cos())
    assert_same((tangent,), (wanted,))


def test_bad_mapped_offsets_are_refused():
    cut = torch.tensor([[0, 2, 5], [0, 2, 4]])
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T = 5 without decreasing"):
        vmap(lambda cut: linear_scan(torch.ones(3), torch.ones(1, 5, 3), cu_seqlens=cut))(cut)
