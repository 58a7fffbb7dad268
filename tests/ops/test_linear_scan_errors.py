"""Bad input is told apart, by name, before anything runs."""

import pytest
import torch

from fastwkv import linear_scan, linear_scan_step

C, T = 4, 6


def arguments(**changes):
    good = {
        "a": torch.ones(2, T, C),
        "x": torch.zeros(2, T, C),
        "initial_state": torch.zeros(2, C),
        "log_a": None,
        "cu_seqlens": None,
    }
    return good | changes


def packed(offsets, **changes):
    one = {"a": torch.zeros(C), "x": torch.zeros(1, T, C), "initial_state": None}
    return one | {"cu_seqlens": torch.tensor(offsets)} | changes


CASES = {
    "neither multiplier": ({"a": None}, TypeError, "give one of a and log_a, got neither"),
    "both multipliers": ({"log_a": torch.zeros(C)}, TypeError, "give one of a and log_a, got both"),
    "list for tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "number for multiplier": ({"a": 0.5}, TypeError, "a must be a tensor, got float"),
    "integers": (
        {"x": torch.zeros(2, T, C, dtype=torch.int64)},
        TypeError,
        "x must be float32, float64, bfloat16, float16, complex64 or complex128, got int64",
    ),
    "log of another dtype": (
        {"a": None, "log_a": torch.zeros(C, dtype=torch.int32)},
        TypeError,
        "log_a must be float32.* got int32",
    ),
    "rank of x": ({"x": torch.zeros(T, C)}, ValueError, r"x must be \[B, T, C\], got shape \[6, 4\]"),
    "no tokens": ({"x": torch.zeros(2, 0, C)}, ValueError, r"x is empty: T must be at least 1, got shape \[2, 0, 4\]"),
    "no channels": ({"x": torch.zeros(2, T, 0)}, ValueError, "x is empty: C must be at least 1"),
    "no batch": ({"x": torch.zeros(0, T, C)}, ValueError, "x is empty: B must be at least 1"),
    "a unlike x": ({"a": torch.zeros(2, T + 1, C)}, ValueError, r"a must be \[B, T, C\] = \[2, 6, 4\], got"),
    "a of another rank": (
        {"a": torch.zeros(T, C)},
        ValueError,
        r"a must be \[C\] = \[4\] or \[B, T, C\] = \[2, 6, 4\]",
    ),
    "fixed a of another size": ({"a": torch.ones(C + 1)}, ValueError, r"a must be \[C\] = \[4\], got shape \[5\]"),
    "log_a of another size": (
        {"a": None, "log_a": torch.ones(C + 1)},
        ValueError,
        r"log_a must be \[C\] = \[4\], got shape \[5\]",
    ),
    "a on another device": ({"a": torch.zeros(C, device="meta")}, ValueError, "x is on cpu, but a is on meta"),
    "state of another batch": (
        {"initial_state": torch.zeros(3, C)},
        ValueError,
        r"initial_state must be \[B, C\] = \[2, 4\], got shape \[3, 4\]",
    ),
    "state that is a tuple": ({"initial_state": ()}, TypeError, "initial_state must be a tensor, got tuple"),
    "state in 16 bits": (
        {"initial_state": torch.zeros(2, C, dtype=torch.bfloat16)},
        TypeError,
        r"initial_state must be float32 \(as states are: the dtype of a with x, 16 bits as float32\), got bfloat16",
    ),
    "real state of a complex scan": (
        {"a": torch.ones(C, dtype=torch.complex64)},
        TypeError,
        "initial_state must be complex64 .* got float32",
    ),
    "state on another device": (
        {"initial_state": torch.zeros(2, C, device="meta")},
        ValueError,
        "initial_state is on meta, but x is on cpu",
    ),
    "offsets with a batch": ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "batch of one, but B = 2"),
    "offsets as list": (packed([0, T], cu_seqlens=[0, T]), TypeError, "cu_seqlens must be a tensor, got list"),
    "offsets as floats": (packed([0.0, 6.0]), TypeError, "cu_seqlens must be int32 or int64, got float32"),
    "offsets that end early": (
        packed([0, 3]),
        ValueError,
        r"must run from 0 to T = 6 without decreasing, got \[0, 3\]",
    ),
    "offsets that fall": (packed([0, 4, 3, T]), ValueError, r"got \[0, 4, 3, 6\]"),
    "state of the batch, packed": (
        packed([0, 3, T], initial_state=torch.zeros(1, C)),
        ValueError,
        r"initial_state must be \[N, C\] = \[2, 4\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_named_with_what_was_expected(name, monkeypatch):
    changes, error, message = CASES[name]
    monkeypatch.setattr(torch.ops.fastwkv, "linear_scan_fwd", None)  # nothing may be launched
    with pytest.raises(error, match=message):
        linear_scan(**arguments(**changes))


STEP_CASES = {
    "time axis": ({"x_t": torch.zeros(2, 1, C)}, ValueError, r"x_t must be \[B, C\], got shape \[2, 1, 4\]"),
    "a_t unlike x_t": ({"a_t": torch.zeros(3, C)}, ValueError, r"a_t must be \[B, C\] = \[2, 4\]"),
    "fixed a_t of another size": ({"a_t": torch.zeros(3)}, ValueError, r"a_t must be \[C\] = \[4\]"),
    "neither multiplier": ({"a_t": None}, TypeError, "give one of a_t and log_a, got neither"),
    "integers": ({"x_t": torch.zeros(2, C, dtype=torch.int32)}, TypeError, "x_t must be float32.* got int32"),
    "no state": ({"state": None}, TypeError, "state must be a tensor, got NoneType"),
    "state in 16 bits": ({"state": torch.zeros(2, C, dtype=torch.float16)}, TypeError, "state must be float32"),
}


@pytest.mark.parametrize("name", STEP_CASES)
def test_bad_argument_of_a_step_is_named(name):
    changes, error, message = STEP_CASES[name]
    good = {"a_t": torch.ones(C), "x_t": torch.zeros(2, C), "state": torch.zeros(2, C)}
    with pytest.raises(error, match=message):
        linear_scan_step(**(good | changes))
