"""The error bounds of the package, on ordinary inputs and on hard ones, without a floor."""

import pytest
import torch
from comparison import assert_close, relative_error
from wkv_cases import ORDINARY, expected, make_case, run, state_invariants

from fastwkv import WKVState, wkv, wkv_step

# Hard inputs: keys within ±60, rates from 1e-6 to 20. The bounds of y, of the gradients, and of gw.
HARD = {"key_range": 60.0, "rates": (1e-6, 20.0)}
HARD_BOUNDS = (2e-6, 5e-6)
HARD_RATE = 2e-5


def length(implementation, tokens: int) -> int:
    """Interpreted kernels take a millisecond a token: there a sixteenth has to do."""
    return tokens // 16 if implementation.interpreted else tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_inputs_meet_the_bounds(implementation, dtype):
    case = make_case(0, 2, length(implementation, 1024), 64, dtype=dtype)
    wide = {} if dtype == torch.float32 else dict.fromkeys(("w", "u", "num", "den", "max"), ORDINARY[torch.float32][1])
    assert_close(run(wkv, case, implementation.device), expected(case), ORDINARY[dtype], **wide)


@pytest.mark.parametrize("tokens", [1024, 8192])
@pytest.mark.parametrize("state", [False, True])
def test_hard_inputs_meet_the_bounds(implementation, tokens, state):
    case = make_case(1, 1, length(implementation, tokens), 32, state=state, **HARD)
    assert_close(run(wkv, case, implementation.device), expected(case), HARD_BOUNDS, w=HARD_RATE)


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-2, 1.0])
def test_one_rate_for_all_channels_meets_the_bounds(implementation, rate):
    # Nothing averages out: the rounding of a rate that is added up would be the same in every channel.
    case = make_case(2, 1, length(implementation, 8192), 32, key_range=60.0, rates=(rate, rate), state=False)
    assert_close(run(wkv, case, implementation.device), expected(case), HARD_BOUNDS, w=HARD_RATE)


def test_float64_is_exact(implementation):
    case = make_case(3, 2, length(implementation, 1024), 16, dtype=torch.float64)
    assert_close(run(wkv, case, implementation.device), expected(case), (1e-12, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rates", "key_range"), [((1e-6, 1e-6), 60.0), ((1e-6, 20.0), 60.0), ((1e-2, 5.0), None)])
def test_steps_equal_sequence_over_thousands_of_tokens(implementation, dtype, rates, key_range):
    tokens = length(implementation, 8192)
    case = make_case(4, 1, tokens, 16, dtype=dtype, rates=rates, key_range=key_range)
    w, u, k, v, state, _ = (t if t is None or isinstance(t, tuple) else t.detach() for t in case.arguments())
    w, u, k, v = (t.to(implementation.device) for t in (w, u, k, v))
    state = WKVState(*(s.detach().to(implementation.device) for s in state))
    outputs = []
    y, final = wkv(w, u, k, v, state, return_state=True)
    for t in range(tokens):
        y_t, state = wkv_step(w, u, k[:, t], v[:, t], state)
        outputs.append(y_t)
    bound = 2e-6 if dtype == torch.float32 else ORDINARY[dtype][0]
    assert relative_error(torch.stack(outputs, 1), y) <= bound
    for name, wanted in state_invariants(final).items():
        assert relative_error(state_invariants(state)[name], wanted) <= 5e-6, name
