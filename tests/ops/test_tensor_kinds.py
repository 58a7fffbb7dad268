"""Tensors that are not dense are refused by name, and so is what merely counts as a bool."""

import re
import warnings

import numpy as np
import pytest
import torch

from fastwkv import WKVState, linear_scan, linear_scan_step, wkv, wkv_step
from fastwkv.nn import LRU, RGLRU, S4D, LRUBlock, MinGRU

B, T, C = 2, 4, 4
VECTOR, TOKEN, TEXT = torch.rand(C), torch.rand(B, C), torch.rand(B, T, C)
ONE = torch.rand(1, T, C)
OFFSETS = torch.tensor([0, 1, T])
STATE = dict.fromkeys(WKVState._fields, TOKEN)


def nested(t, layout):
    return torch.nested.nested_tensor(list(t) if t.dim() > 1 else [t], layout=layout)


KINDS = {
    "COO": lambda t: t.to_sparse(),
    "CSR": lambda t: (t if t.dim() > 1 else t[None]).to_sparse_csr(),
    "CSC": lambda t: (t if t.dim() > 1 else t[None]).to_sparse_csc(),
    "BSR": lambda t: (t if t.dim() > 1 else t[None]).to_sparse_bsr((1, 1)),
    "MKL-DNN": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: nested(t, torch.strided),
    "nested, jagged": lambda t: nested(t, torch.jagged),
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones(t.shape, dtype=torch.bool)),
    "uninitialised": lambda t: torch.nn.UninitializedParameter(),
}
QUANTISED = {
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "quantised by channel": lambda t: torch.quantize_per_channel(
        t.float(), torch.ones(t.shape[0]), torch.zeros(t.shape[0]), 0, torch.quint8
    ),
}
CALLS = {
    "wkv": (
        lambda num, den, max, **given: wkv(**given, initial_state=WKVState(num, den, max)),
        {"w": VECTOR, "u": VECTOR, "k": TEXT, "v": TEXT, **STATE},
    ),
    "wkv by time_decay": (wkv, {"time_decay": VECTOR, "u": VECTOR, "k": TEXT, "v": TEXT}),
    "wkv, packed": (wkv, {"w": VECTOR, "u": VECTOR, "k": ONE, "v": ONE, "cu_seqlens": OFFSETS}),
    "wkv_step": (
        lambda num, den, max, **given: wkv_step(**given, state=WKVState(num, den, max)),
        {"w": VECTOR, "u": VECTOR, "k_t": TOKEN, "v_t": TOKEN, **STATE},
    ),
    "linear_scan": (linear_scan, {"a": TEXT, "x": TEXT, "initial_state": TOKEN}),
    "linear_scan of one multiplier": (linear_scan, {"a": VECTOR, "x": ONE, "cu_seqlens": OFFSETS}),
    "linear_scan by log_a": (linear_scan, {"log_a": TEXT, "x": TEXT}),
    "linear_scan_step": (linear_scan_step, {"a_t": TOKEN, "x_t": TOKEN, "state": TOKEN}),
    "linear_scan_step by log_a": (linear_scan_step, {"log_a": VECTOR, "x_t": TOKEN, "state": TOKEN}),
}
ARGUMENTS = [(call, name) for call, (_, given) in CALLS.items() for name in given]


def made(kind, tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half of them are prototypes, the other half deprecated
        return (KINDS | QUANTISED)[kind](tensor)


@pytest.mark.parametrize("kind", KINDS | QUANTISED)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_tensor_of_another_kind_is_refused_by_name(call, name, kind):
    function, given = CALLS[call]
    bad = made(kind, given[name])
    wanted = "dense tensor|int32 or int64" if kind in KINDS else "float32|dense tensor|int32 or int64"
    with pytest.raises(TypeError, match=f"^{name} must be .*({wanted}).*, got "):
        function(**(given | {name: bad}))


@pytest.mark.parametrize("value", ["no", 1, 0, None, torch.tensor(True), [True]])
def test_flag_that_is_no_bool_is_refused(value):
    got = type(value).__name__
    with pytest.raises(TypeError, match=f"^reverse must be a bool, got {got}"):
        linear_scan(VECTOR, TEXT, reverse=value)
    with pytest.raises(TypeError, match=f"^return_state must be a bool, got {got}"):
        linear_scan(VECTOR, TEXT, return_state=value)
    with pytest.raises(TypeError, match=f"^return_state must be a bool, got {got}"):
        wkv(VECTOR, VECTOR, TEXT, TEXT, return_state=value)
    for layer in (LRU(C, 3), LRUBlock(C, 3), S4D(C, 2), RGLRU(C), MinGRU(C)):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with pytest.raises(TypeError, match=f"^return_state must be a bool, got {got}"):
            layer(TEXT, return_state=value)
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    for build in (LRU, LRUBlock):
        with pytest.raises(TypeError, match=f"^bidirectional must be a bool, got {got}"):
            build(C, 3, bidirectional=value)
    with pytest.raises(TypeError, match=f"^positive must be a bool, got {got}"):
        MinGRU(C, positive=value)


def test_bool_of_numpy_is_told_from_pythons():
    flag = np.bool_(True)
    name = re.escape(f"numpy.{type(flag).__name__}" if type(flag).__name__ == "bool" else "bool_")
    with pytest.raises(TypeError, match=f"^reverse must be a bool, got {name}$"):
        linear_scan(VECTOR, TEXT, reverse=flag)


@pytest.mark.parametrize("kind", ["COO", "CSR", "nested", "nested, jagged", "masked"])
def test_starts_of_segments_of_another_kind_are_refused(kind):
    starts = made(kind, torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^segment_starts must be a dense tensor .*, got "):
        RGLRU(C)(TEXT, segment_starts=starts)


def test_parameters_and_subclasses_of_tensors_are_taken_as_before():
    class Named(torch.Tensor):
        pass

    plain = linear_scan(VECTOR, TEXT)
    torch.testing.assert_close(linear_scan(torch.nn.Parameter(VECTOR), torch.nn.Buffer(TEXT)), plain)
    torch.testing.assert_close(
        linear_scan(VECTOR.as_subclass(Named), TEXT.as_subclass(Named)), plain, check_dtype=False
    )
    strided = TEXT.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(linear_scan(VECTOR, strided), plain)


def test_multiplier_of_another_rank_is_told_both_shapes():
    with pytest.raises(ValueError, match=r"^a must be \[C\] = \[4\] or \[B, T, C\] = \[2, 4, 4\], got shape \[4, 4\]$"):
        linear_scan(torch.ones(T, C), TEXT)
    with pytest.raises(ValueError, match=r"^log_a must be \[C\] = \[4\] or \[B, T, C\] = \[2, 4, 4\], got shape \[\]$"):
        linear_scan(x=TEXT, log_a=torch.tensor(-0.1))
    with pytest.raises(ValueError, match=r"^a_t must be \[C\] = \[4\] or \[B, C\] = \[2, 4\], got shape \[2, 1, 4\]$"):
        linear_scan_step(torch.ones(2, 1, C), TOKEN, TOKEN)


def test_number_for_all_channels_is_told_how():
    k, state = TEXT, WKVState(TOKEN, TOKEN, TOKEN)
    for name, call in {
        "a": lambda: linear_scan(0.5, TEXT),
        "log_a": lambda: linear_scan(x=TEXT, log_a=0.5),
        "a_t": lambda: linear_scan_step(0.5, TOKEN, TOKEN),
        "w": lambda: wkv(0.5, VECTOR, k, k),
        "u": lambda: wkv_step(VECTOR, 0.5, TOKEN, TOKEN, state),
        "time_decay": lambda: wkv(u=VECTOR, k=k, v=k, time_decay=0.5),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got float; torch.full\(\(C,\), 0.5\)"):
            call()
    with pytest.raises(TypeError, match=r"^x must be a tensor, got float$"):
        linear_scan(VECTOR, 0.5)
    with pytest.raises(TypeError, match=r"^x must be a tensor, got ndarray; torch.from_numpy makes one$"):
        linear_scan(VECTOR, TEXT.numpy())


def test_pairs_beside_a_real_multiplier_are_told_what_they_lack():
    wanted = r"^x must be \[B, T, C\], got shape \[2, 4, 4, 2\]; pairs can stand beside a complex a only$"
    with pytest.raises(ValueError, match=wanted):
        linear_scan(VECTOR, torch.zeros(B, T, C, 2))


def test_arguments_behind_one_that_is_left_out_are_missed_by_name():
    with pytest.raises(TypeError, match=r"^x must be a tensor, got NoneType"):
        linear_scan(VECTOR)
    with pytest.raises(TypeError, match=r"^v must be a tensor, got NoneType"):
        wkv(VECTOR, VECTOR, TEXT)


@pytest.mark.parametrize("log_a", [VECTOR - 2, TEXT - 2])
def test_multiplier_is_left_out_beside_its_logarithm(log_a):
    torch.testing.assert_close(linear_scan(x=TEXT, log_a=log_a), linear_scan(None, TEXT, log_a=log_a), rtol=0, atol=0)
    token = log_a if log_a.dim() == 1 else log_a[:, 0]
    torch.testing.assert_close(
        linear_scan_step(x_t=TOKEN, state=TOKEN, log_a=token), linear_scan_step(None, TOKEN, TOKEN, log_a=token)
    )
