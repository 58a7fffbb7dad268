"""The linear scan as PyTorch sees it: schemas, fake tensors, compilation, export."""

from dataclasses import replace

import pytest
import torch
from comparison import assert_close
from scan_cases import make_case, run, values

from fastwkv import linear_scan, linear_scan_step

pytestmark = pytest.mark.unpoisoned  # inductor fails to compile custom operators in deterministic mode
OPS = torch.ops.fastwkv
LENGTHS = [None, [4, 13, 2]]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()  # PyTorch gives up on a function that was compiled in many ways


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_opcheck_passes_for_every_operator(implementation, fixed, lengths, dtype):
    log, reverse = dtype == torch.bfloat16, not fixed
    case = make_case(0, 2, 19, 3, dtype=dtype, fixed=fixed, lengths=lengths, log=log, reverse=reverse)
    a, x, initial, cut = (t if t is None else t.detach() for t in case.arguments(implementation.device))
    for state in (None, initial):
        torch.library.opcheck(OPS.linear_scan_fwd.default, (a, x, state, cut, log, reverse))
        h, final = OPS.linear_scan_fwd(a, x, state, cut, log, reverse)
        gfinal = None if state is None else torch.randn_like(final)
        gradients = (torch.randn_like(h), gfinal, dtype)
        given = (a, h, state, cut, log, reverse, *gradients)
        torch.library.opcheck(OPS.linear_scan_bwd.default, given)
        torch.library.opcheck(OPS.linear_scan_bwd_.default, given[:-1])
    a_t = a if fixed else a[:, 0].contiguous()
    step = (a_t, x[:, 0].contiguous(), torch.randn_like(initial[: x.shape[0]]), log)
    torch.library.opcheck(OPS.linear_scan_step.default, step)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_compiled_without_graph_break_gives_the_same(dtype, lengths):
    for fixed in (False, True):
        case = make_case(0, 2, 19, 3, dtype=dtype, fixed=fixed, lengths=lengths, log=fixed, reverse=fixed)
        compiled = torch.compile(linear_scan, fullgraph=True)
        assert_close(run(compiled, case), run(linear_scan, case), (1e-6, 1e-6), floor=1.0)


def test_compiled_without_gradients_gives_the_same():
    case = make_case(0, 2, 19, 3, log=True)
    compiled = values(torch.compile(linear_scan, fullgraph=True), case)
    torch.testing.assert_close(compiled, values(linear_scan, case), rtol=0, atol=0)


def test_compiled_once_for_every_length():
    graphs = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(linear_scan, backend=graphs, fullgraph=True, dynamic=True)
    compiled = torch.compile(linear_scan, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 33, 47):
        case = make_case(0, 2, T, 3)
        values(counted, case)
        assert_close(run(compiled, case), run(linear_scan, case), (1e-6, 1e-6), floor=1.0)
    assert graphs.frame_count == 1


def test_compiled_call_with_bad_offsets_raises_at_run_time():
    a, x = torch.rand(3), torch.randn(1, 16, 3)
    compiled = torch.compile(lambda cu: linear_scan(a, x, cu_seqlens=cu), backend="aot_eager")
    with pytest.raises(ValueError, match="must run from 0 to T = 16 without decreasing"):
        compiled(torch.tensor([0, 5, 10**6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_compiled_step_gives_the_same(dtype):
    case = make_case(0, 2, 1, 3, dtype=dtype)
    a, x, state, _ = case.arguments()
    compiled = torch.compile(linear_scan_step, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(a[:, 0], x[:, 0], state), linear_scan_step(a[:, 0], x[:, 0], state))


class Average(torch.nn.Module):
    """A module around the operator, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a = torch.nn.Parameter(-torch.rand(3))

    def forward(self, x, state):
        return linear_scan(None, x, state, log_a=self.log_a, return_state=True)


def test_exported_module_gives_the_same_for_any_length():
    def inputs(T):
        return tuple(t.detach() for t in make_case(0, 2, T, 3).arguments()[1:3])

    length = torch.export.Dim("length", min=2, max=4096)
    module = torch.export.export(Average(), inputs(19), dynamic_shapes=({1: length}, None)).module()
    model = Average()
    model.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(*inputs(33)), model(*inputs(33)), rtol=0, atol=0)


def test_meta_tensors_give_shapes():
    x = torch.zeros(2, 19, 3, device="meta", dtype=torch.bfloat16)
    a = torch.zeros(3, device="meta", dtype=torch.complex64)
    h, state = linear_scan(a, x, return_state=True)
    assert (h.shape, h.dtype, h.device.type) == (x.shape, torch.complex64, "meta")
    assert (tuple(state.shape), state.dtype) == ((2, 3), torch.complex64)
    h, state = linear_scan(torch.zeros(3, device="meta", dtype=torch.bfloat16), x, return_state=True)
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_forward_mode_of_a_compiled_training_step_is_not_asked_for():
    # torch.compile refuses an autograd.Function with a tangent; the scan's stays out of its sight.
    case = replace(make_case(0, 1, 8, 2), initial=None)
    a, x, _, _ = case.arguments()
    torch.compile(lambda a, x: linear_scan(a, x).square().sum(), fullgraph=True)(a, x).backward()
    assert a.grad is not None
