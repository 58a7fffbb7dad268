"""Bad input is told apart, by name, before anything runs."""

import pytest
import torch

from fastwkv import WKVState, wkv, wkv_step

C, T = 4, 6


def arguments(**changes):
    state = WKVState(torch.zeros(2, C), torch.zeros(2, C), torch.zeros(2, C))
    good = {
        "w": torch.ones(C),
        "u": torch.ones(C),
        "k": torch.zeros(2, T, C),
        "v": torch.zeros(2, T, C),
        "initial_state": state,
        "cu_seqlens": None,
    }
    return good | changes


def packed(offsets, **changes):
    one = {"k": torch.zeros(1, T, C), "v": torch.zeros(1, T, C), "initial_state": None}
    return one | {"cu_seqlens": torch.tensor(offsets)} | changes


def state(*shape, dtype=torch.float32):
    return WKVState(*(torch.zeros(*shape, dtype=dtype) for _ in range(3)))


CASES = {
    "list for tensor": ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    "integer keys": ({"k": torch.zeros(2, T, C, dtype=torch.int64)}, TypeError, "k must be float32.* got int64"),
    "complex rate": ({"w": torch.zeros(C, dtype=torch.complex64)}, TypeError, "w must be float32.* got complex64"),
    "rank of k": ({"k": torch.zeros(T, C)}, ValueError, r"k must be \[B, T, C\], got shape \[6, 4\]"),
    "no tokens": (
        {"k": torch.zeros(2, 0, C), "v": torch.zeros(2, 0, C)},
        ValueError,
        r"k is empty: T must be at least 1, got shape \[2, 0, 4\]",
    ),
    "no channels": ({"k": torch.zeros(2, T, 0)}, ValueError, "k is empty: C must be at least 1"),
    "no batch": ({"k": torch.zeros(0, T, C)}, ValueError, "k is empty: B must be at least 1"),
    "v unlike k": ({"v": torch.zeros(2, T + 1, C)}, ValueError, r"v must be \[B, T, C\] = \[2, 6, 4\], got"),
    "w of another size": ({"w": torch.ones(C + 1)}, ValueError, r"w must be \[C\] = \[4\], got shape \[5\]"),
    "u of another rank": ({"u": torch.ones(1, 1, C)}, ValueError, r"u must be \[C\] = \[4\], got shape \[1, 1, 4\]"),
    "v of another dtype": (
        {"v": torch.zeros(2, T, C, dtype=torch.bfloat16)},
        TypeError,
        "v must be float32 like k, got bfloat16",
    ),
    "v on another device": ({"v": torch.zeros(2, T, C, device="meta")}, ValueError, "v is on meta, but w is on cpu"),
    "state that is no triple": ({"initial_state": torch.zeros(2, C)}, TypeError, "must be a WKVState.* got Tensor"),
    "state of another batch": ({"initial_state": state(3, C)}, ValueError, r"num must be \[B, C\] = \[2, 4\], got"),
    "state in 16 bits": (
        {"initial_state": state(2, C, dtype=torch.bfloat16)},
        TypeError,
        r"num must be float32 \(states are float32, float64 beside a float64 input\), got bfloat16",
    ),
    "state in too many bits": ({"initial_state": state(2, C, dtype=torch.float64)}, TypeError, "num must be float32"),
    "state on another device": (
        {"initial_state": WKVState(*(s.to("meta") for s in state(2, C)))},
        ValueError,
        "num is on meta, but k is on cpu",
    ),
    "offsets with a batch": ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "batch of one, but B = 2"),
    "offsets as list": (packed([0, T], cu_seqlens=[0, T]), TypeError, "cu_seqlens must be a tensor, got list"),
    "offsets as floats": (packed([0.0, 6.0]), TypeError, "cu_seqlens must be int32 or int64, got float32"),
    "offsets of rank 2": (packed([[0, T]]), ValueError, r"cu_seqlens must be \[N \+ 1\].* got shape \[1, 2\]"),
    "one offset": (packed([0]), ValueError, r"N at least 1, got shape \[1\]"),
    "offsets that start late": (
        packed([1, T]),
        ValueError,
        r"must run from 0 to T = 6 without decreasing, got \[1, 6\]",
    ),
    "offsets that end early": (
        packed([0, 3]),
        ValueError,
        r"must run from 0 to T = 6 without decreasing, got \[0, 3\]",
    ),
    "offsets that fall": (packed([0, 4, 2, T]), ValueError, r"got \[0, 4, 2, 6\]"),
    "many offsets": (packed(list(range(12))), ValueError, r"got \[0, 1, 2, 3, \.\.\., 9, 10, 11\]"),
    "state of the batch, packed": (
        packed([0, 3, T], initial_state=state(1, C)),
        ValueError,
        r"num must be \[N, C\] = \[2, 4\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_named_with_what_was_expected(name, monkeypatch):
    changes, error, message = CASES[name]
    monkeypatch.setattr(torch.ops.fastwkv, "wkv_fwd", None)  # nothing may be launched
    with pytest.raises(error, match=message):
        wkv(**arguments(**changes))


STEP_CASES = {
    "time axis": ({"k_t": torch.zeros(2, 1, C)}, ValueError, r"k_t must be \[B, C\], got shape \[2, 1, 4\]"),
    "v_t unlike k_t": ({"v_t": torch.zeros(3, C)}, ValueError, r"v_t must be \[B, C\] = \[2, 4\]"),
    "integers": ({"v_t": torch.zeros(2, C, dtype=torch.int32)}, TypeError, "v_t must be float32.* got int32"),
    "no state": ({"state": None}, TypeError, "must be a WKVState.* got NoneType"),
    "state in 16 bits": ({"state": state(2, C, dtype=torch.float16)}, TypeError, "num must be float32"),
}


@pytest.mark.parametrize("name", STEP_CASES)
def test_bad_argument_of_a_step_is_named(name):
    changes, error, message = STEP_CASES[name]
    good = {"w": torch.ones(C), "u": torch.ones(C), "k_t": torch.zeros(2, C), "v_t": torch.zeros(2, C)}
    with pytest.raises(error, match=message):
        wkv_step(**(good | {"state": state(2, C)} | changes))
