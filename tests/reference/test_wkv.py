"""The two references against each other, and against sums written out by hand."""

import math

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from wkv_cases import cases, make_case, run

from fastwkv import WKVState, reference


@settings(max_examples=40)
@given(case=cases(dtypes=(torch.float64,), max_tokens=24))
def test_definition_equals_loop(case):
    assert_close(run(reference.wkv, case), run(reference.wkv_loop, case), (1e-12, 1e-12), floor=1.0)


@pytest.mark.parametrize("function", [reference.wkv, reference.wkv_loop])
def test_three_tokens_equal_the_sums_written_out(function):
    w, u = 0.5, 0.25
    k, v = [0.1, -0.2, 0.3], [1.0, 2.0, -3.0]
    num, den, top = 0.7, 0.9, -0.4  # the past before the first token
    exp = math.exp
    past_1 = (exp(top) * num, exp(top) * den)
    past_2 = (exp(-w) * past_1[0] + exp(k[0]) * v[0], exp(-w) * past_1[1] + exp(k[0]))
    past_3 = (exp(-w) * past_2[0] + exp(k[1]) * v[1], exp(-w) * past_2[1] + exp(k[1]))
    past_4 = (exp(-w) * past_3[0] + exp(k[2]) * v[2], exp(-w) * past_3[1] + exp(k[2]))
    wanted = [
        (past[0] + exp(u + k[t]) * v[t]) / (past[1] + exp(u + k[t])) for t, past in enumerate((past_1, past_2, past_3))
    ]

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    state = WKVState(*(tensor(x).view(1, 1) for x in (num, den, top)))
    y, final = function(
        tensor(w), tensor(u), tensor(*k).view(1, 3, 1), tensor(*v).view(1, 3, 1), state, return_state=True
    )
    assert y.flatten().tolist() == pytest.approx(wanted, rel=1e-14)
    assert (final.num * final.max.exp()).item() == pytest.approx(past_4[0], rel=1e-14)
    assert (final.den * final.max.exp()).item() == pytest.approx(past_4[1], rel=1e-14)


@pytest.mark.parametrize("function", [reference.wkv, reference.wkv_loop])
def test_inputs_in_16_bits_are_summed_in_float32(function):
    case = make_case(0, 1, 9, 3, dtype=torch.bfloat16)
    y, state = function(*case.arguments()[:5], return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.num.dtype == torch.float32
