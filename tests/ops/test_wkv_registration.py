"""WKV as PyTorch sees it: schemas, fake tensors, compilation, export."""

import pytest
import torch
from comparison import assert_close
from wkv_cases import make_case, run

from fastwkv import WKVState, wkv, wkv_step

pytestmark = pytest.mark.unpoisoned  # inductor fails to compile custom operators in deterministic mode
SETTINGS = [(state, lengths) for state in (False, True) for lengths in (None, [4, 13, 2])]


def operands(state, lengths, dtype=torch.float32):
    case = make_case(0, 2, 19, 3, dtype=dtype, state=state, lengths=lengths)
    w, u, k, v = (t.detach() for t in case.arguments()[:4])
    initial = None if case.initial is None else case.initial.to(case.acc)
    return case, (w, u, k, v, initial, case.cu_seqlens)


@pytest.mark.parametrize(("state", "lengths"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_passes_for_every_operator(implementation, state, lengths, dtype):
    case, args = operands(state, lengths, dtype)
    args = tuple(None if t is None else t.to(implementation.device) for t in args)
    for save in (False, True):
        torch.library.opcheck(torch.ops.fastwkv.wkv_fwd.default, (*args, save))
    y, final, checkpoints = torch.ops.fastwkv.wkv_fwd(*args, True)
    for gfinal in (None, torch.randn_like(final[:2])):
        torch.library.opcheck(torch.ops.fastwkv.wkv_bwd.default, (*args, checkpoints, torch.randn_like(y), gfinal))
    w, u, k, v, _, _ = args
    fields = (f.contiguous() for f in torch.rand(3, k.shape[0], 3, dtype=case.acc, device=implementation.device))
    torch.library.opcheck(
        torch.ops.fastwkv.wkv_step.default, (w, u, k[:, 0].contiguous(), v[:, 0].contiguous(), *fields)
    )


@pytest.mark.parametrize(("state", "lengths"), SETTINGS)
def test_compiled_without_graph_break_gives_the_same(state, lengths):
    case = make_case(0, 2, 19, 3, state=state, lengths=lengths)
    compiled = torch.compile(wkv, fullgraph=True)
    assert_close(run(compiled, case), run(wkv, case), (1e-6, 1e-6), floor=1.0)


def test_compiled_without_gradients_gives_the_same():
    case = make_case(0, 2, 19, 3)
    compiled = torch.compile(wkv, fullgraph=True)
    with torch.no_grad():
        w, u, k, v, state, _ = case.arguments()
        torch.testing.assert_close(compiled(w, u, k, v, state), wkv(w, u, k, v, state), rtol=0, atol=0)


def test_compiled_once_for_every_length():
    compiled = torch.compile(wkv, fullgraph=True, dynamic=True)
    graphs = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(wkv, backend=graphs, fullgraph=True, dynamic=True)
    for T in (20, 33, 47):
        case = make_case(0, 2, T, 3, state=False)
        assert_close(run(compiled, case), run(wkv, case), (1e-6, 1e-6), floor=1.0)
        with torch.no_grad():
            counted(*case.arguments()[:4])
    assert graphs.frame_count == 1


def test_compiled_call_with_bad_offsets_raises_at_run_time():
    w, k = torch.rand(3), torch.randn(1, 16, 3)
    compiled = torch.compile(lambda cu: wkv(w, w, k, k, cu_seqlens=cu), backend="aot_eager")
    with pytest.raises(ValueError, match="must run from 0 to T = 16 without decreasing"):
        compiled(torch.tensor([0, 5, 10**6]))


def test_compiled_step_gives_the_same():
    case = make_case(0, 2, 1, 3)
    w, u, k, v, state, _ = case.arguments()
    compiled = torch.compile(wkv_step, fullgraph=True)
    with torch.no_grad():
        y, final = compiled(w, u, k[:, 0], v[:, 0], state)
        y_eager, final_eager = wkv_step(w, u, k[:, 0], v[:, 0], state)
    torch.testing.assert_close(y, y_eager, rtol=0, atol=0)
    torch.testing.assert_close(final.num, final_eager.num, rtol=0, atol=0)


class Mixer(torch.nn.Module):
    """A module around the operator, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.rand(3))
        self.u = torch.nn.Parameter(torch.rand(3))

    def forward(self, k, v, num, den, max):
        y, state = wkv(self.w, self.u, k, v, WKVState(num, den, max), return_state=True)
        return y, state.num, state.den


def test_exported_module_gives_the_same_for_any_length():
    _, _, k, v, state, _ = make_case(0, 2, 19, 3).arguments()
    inputs = tuple(t.detach() for t in (k, v, *state))
    length = torch.export.Dim("length", min=2, max=4096)
    dynamic = ({1: length}, {1: length}, None, None, None)
    exported = torch.export.export(Mixer(), inputs, dynamic_shapes=dynamic)
    module = exported.module()
    _, _, k, v, state, _ = make_case(1, 2, 33, 3).arguments()
    inputs = tuple(t.detach() for t in (k, v, *state))
    model = Mixer()
    model.load_state_dict(module.state_dict())
    for result, wanted in zip(module(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_meta_tensors_give_shapes():
    k = torch.zeros(2, 19, 3, device="meta", dtype=torch.bfloat16)
    w = torch.zeros(3, device="meta")
    y, state = wkv(w, w, k, k, return_state=True)
    assert (y.shape, y.dtype, y.device.type) == (k.shape, k.dtype, "meta")
    assert [(tuple(s.shape), s.dtype) for s in state] == [((2, 3), torch.float32)] * 3
