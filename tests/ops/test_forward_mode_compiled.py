"""Tangents where code is compiled or exported: the right ones or an error, never none."""

import pytest
import torch
from torch.autograd import forward_ad

from fastwkv import WKVState, linear_scan, linear_scan_step, wkv, wkv_step
from fastwkv.nn import LRU

pytestmark = pytest.mark.unpoisoned  # as in test_linear_scan_registration.py
A = torch.tensor([0.5, 0.9, -0.7])
X, DX = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
LAYER = LRU(3, 3)
RIGHT = {
    "scan": lambda x: linear_scan(A, x),
    "scan of log a": lambda x: linear_scan(None, x, log_a=x.sigmoid().log()),
    "step": lambda x: linear_scan_step(A, x.sum(1).bfloat16(), x.cos().sum(1)),
}
REFUSED = {
    "wkv": lambda x: wkv(A, A, x, x),
    "wkv_step": lambda x: wkv_step(A, A, x.sum(1), x.sum(1), WKVState(*[x.exp().sum(1)] * 3))[0],
}


def by_dual_numbers(function):
    def tangent(x, dx):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx))).tangent

    return tangent


def by_func(function):
    return lambda x, dx: torch.func.jvp(function, (x,), (dx,))[1]


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", **options)


WAYS = {
    "dual numbers of a compiled function": lambda f: by_dual_numbers(compiled(f)),
    "dual numbers in a compiled function": lambda f: compiled(by_dual_numbers(f)),
    "jvp of a compiled function": lambda f: by_func(compiled(f)),
    "jvp in a compiled function": lambda f: compiled(by_func(f)),
}


@pytest.fixture(autouse=True, scope="module")
def _kernels_compiled_before():
    # PyTorch's compiler would trace numba's.
    for function in (RIGHT | REFUSED).values():
        function(X.clone().requires_grad_()).sum().backward()
        with torch.no_grad():
            function(X)
    for function in (*RIGHT.values(), LAYER):
        by_func(function)(X, DX)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_tangent_in_compiled_code_is_that_of_eager_mode(function, way):
    torch.testing.assert_close(way(function)(X, DX), by_func(function)(X, DX))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_forward_mode_of_wkv_is_refused_in_compiled_code(function, way):
    with pytest.raises(RuntimeError, match=r"fastwkv\.wkv has no forward mode"):
        way(function)(X, DX)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tangent_of_a_compiled_layer_is_right_or_refused(way):
    try:
        tangent = way(LAYER)(X, DX)
    except RuntimeError:  # PyTorch's compiler has no tangents of products with matrices
        return
    torch.testing.assert_close(tangent, by_func(LAYER)(X, DX))


def test_function_compiled_before_is_compiled_again_for_tangents():
    function = compiled(RIGHT["scan"])
    function(X)
    torch.testing.assert_close(by_dual_numbers(function)(X, DX), by_func(RIGHT["scan"])(X, DX))


@pytest.mark.parametrize("function", [RIGHT["scan"], REFUSED["wkv"]], ids=["scan", "wkv"])
def test_whole_graph_with_tangents_is_refused(function):
    with pytest.raises(Exception, match="_not_compiled_within_transforms"):
        compiled(by_func(function), fullgraph=True)(X, DX)


@pytest.mark.parametrize("function", [RIGHT["scan"], REFUSED["wkv"]], ids=["scan", "wkv"])
def test_export_with_tangents_is_refused(function):
    class Tangent(torch.nn.Module):
        def forward(self, x, dx):
            return by_func(function)(x, dx)

    with pytest.raises(RuntimeError, match="cannot be exported within forward mode"):
        torch.export.export(Tangent(), (X, DX), strict=False)


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))])
@pytest.mark.parametrize("name", ["scan", "wkv"])
def test_vmap_in_compiled_code_is_that_of_eager_mode(name, transform):
    function, x = (RIGHT | REFUSED)[name], torch.stack((X, DX)).requires_grad_()
    mapped = transform(function)
    results = [f(x) for f in (compiled(mapped), mapped)]
    torch.testing.assert_close(*results)
    if results[0].requires_grad and transform is torch.vmap:
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x) for y in results))
