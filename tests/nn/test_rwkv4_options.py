"""Options of RWKV-4: packed texts, gradient checkpointing, truncated back-propagation, autocast, rescaling."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import packed_lengths
from rwkv4_models import CONFIG, SAME, distance, fields, text, trained
from torch import Tensor
from torch.nn import functional as F

from fastwkv import WKVState
from fastwkv.nn import RWKV4, RWKV4State

lengths = packed_lengths(40, sequences=6)


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def row(state: RWKV4State, n: int) -> RWKV4State:
    att_x, ffn_x, *wkv = (field[:, n : n + 1] for field in (state.att_x, state.ffn_x, *state.wkv))
    return RWKV4State(att_x, ffn_x, WKVState(*wkv))


def tensors(state: RWKV4State) -> tuple[Tensor, ...]:
    return state.att_x, state.ffn_x, *state.wkv


def state_leaves(model: RWKV4, batch: int) -> tuple[RWKV4State, dict[str, Tensor]]:
    """A state after some text, and the fields of it that have gradients (max is a choice of scale)."""
    state = model(text(batch, 5, seed=1))[1].detach()
    leaves = {"att_x": state.att_x, "ffn_x": state.ffn_x, "num": state.wkv.num, "den": state.wkv.den}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return state, leaves


def gradients(model: RWKV4, loss: Tensor, leaves: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    inputs = dict(model.named_parameters()) | (leaves or {})
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert distance(gradient, expected[name]) <= bound, name


@settings(max_examples=25, deadline=None)
@given(lengths, st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_packed_texts_equal_one_after_the_other(lengths: list[int], carried: bool, dtype: torch.dtype) -> None:
    model = trained()
    state = model(text(len(lengths), 5, seed=1))[1] if carried else None
    tokens = text(1, sum(lengths))
    logits, final = model(tokens, state, cu_seqlens=offsets(lengths, dtype))
    pieces = zip(logits.split(lengths, 1), tokens.split(lengths, 1), strict=True)
    for n, (packed, piece) in enumerate(pieces):
        if not lengths[n]:
            before = row(state, n) if state else model.empty_state(1)
            assert all(map(torch.equal, tensors(row(final, n)), tensors(before)))
            continue
        expected, expected_final = model(piece, row(state, n) if state else None)
        assert distance(packed, expected) < SAME
        for name, field in fields(row(final, n)).items():
            assert distance(field, fields(expected_final)[name]) < SAME, name


def test_packed_gradients_equal_one_after_the_other() -> None:
    model, lengths = trained(), [7, 1, 30, 12]
    state, leaves = state_leaves(model, len(lengths))
    tokens = text(1, sum(lengths))
    packed = model(tokens, state, cu_seqlens=offsets(lengths))[0].square().sum()
    pieces = enumerate(tokens.split(lengths, 1))
    single = torch.stack([model(piece, row(state, n))[0].square().sum() for n, piece in pieces]).sum()
    assert_same(gradients(model, packed, leaves), gradients(model, single, leaves), SAME)  # measured 3.4e-7


def test_gradients_go_through_texts_without_tokens() -> None:
    model = trained()
    state, leaves = state_leaves(model, 3)
    final = model(text(1, 4), state, cu_seqlens=offsets([0, 4, 0]))[1]
    ends = {"att_x": final.att_x, "ffn_x": final.ffn_x, "num": final.wkv.num, "den": final.wkv.den}
    for name, leaf in leaves.items():
        (gradient,) = torch.autograd.grad(ends[name][:, [0, 2]].sum(), leaf, retain_graph=True)
        wanted = torch.ones_like(gradient)
        wanted[:, 1] = 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_packed_layers_alone_start_every_text_from_an_empty_state() -> None:
    block = trained().blocks[0]
    x, lengths = torch.randn(1, 12, CONFIG.width, generator=torch.Generator().manual_seed(0)), [5, 1, 6]
    packed, final = block(x, None, offsets(lengths))
    for n, piece in enumerate(x.split(lengths, 1)):
        y, expected = block(piece)
        assert distance(packed[:, sum(lengths[:n]) :][:, : lengths[n]], y) < SAME
        assert torch.equal(final.att_x[n], expected.att_x[0])


@pytest.mark.parametrize("carried", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(carried: bool) -> None:
    model, tokens = trained(), text(2, 30)
    state, leaves = state_leaves(model, 2) if carried else (None, {})

    def run() -> dict[str, Tensor]:
        logits, final = model(tokens, state)
        return gradients(model, logits.square().sum() + final.wkv.num.sum() + final.ffn_x.sum(), leaves)

    expected = run()
    model.gradient_checkpointing = True
    assert_same(run(), expected, 0)


def test_gradient_checkpointing_gives_the_same_bits_for_packed_texts_under_autocast() -> None:
    model, tokens, starts = trained(), text(1, 30), offsets([11, 19])

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(tokens, cu_seqlens=starts)
        return gradients(model, logits.float().square().sum())

    expected = run()
    model.gradient_checkpointing = True
    assert_same(run(), expected, 0)


def test_gradient_checkpointing_remembers_less() -> None:
    model, tokens = trained(), text(2, 30)

    def remembered() -> int:
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            model(tokens)[0].sum()
        return sum(t.numel() for t in found.values())

    plain = remembered()
    model.gradient_checkpointing = True
    assert remembered() < plain / 4  # measured: a seventeenth


def test_gradient_checkpointing_changes_nothing_in_inference() -> None:
    model, tokens = trained(), text(2, 30)
    with torch.no_grad():
        expected, _ = model(tokens)
        model.gradient_checkpointing = True
        assert torch.equal(model(tokens)[0], expected)


def test_truncated_gradient_is_that_of_the_last_window_from_a_constant_state() -> None:
    model, tokens = trained(), text(2, 40)
    state = None
    for window in tokens.split(20, 1):
        logits, state = model(window, state)
        truncated = gradients(model, logits.square().sum())
        before, state = state, state.detach()
    with torch.no_grad():
        _, constant = model(tokens[:, :20])
    logits, _ = model(tokens[:, 20:], constant)
    assert_same(truncated, gradients(model, logits.square().sum()), 0)
    assert before.att_x.requires_grad
    assert not state.att_x.requires_grad


def test_truncated_gradient_misses_only_what_crosses_the_cut() -> None:
    model, tokens = trained(), text(2, 40)
    whole = gradients(model, model(tokens)[0].square().sum())
    (first, state), pieces = model(tokens[:, :20]), {}
    for name, cut in (("carried", state), ("cut", state.detach())):
        second, _ = model(tokens[:, 20:], cut)
        pieces[name] = gradients(model, first.square().sum() + second.square().sum())
        first, state = model(tokens[:, :20])
    assert_same(pieces["carried"], whole, 5e-6)
    assert distance(pieces["cut"]["blocks.0.attention.key.weight"], whole["blocks.0.attention.key.weight"]) > 1e-3


class Rounded(torch.autograd.Function):
    """To bfloat16, values and gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.bfloat16().to(gradient)


def test_autocast_gradients_are_off_by_the_rounding_of_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = trained(), text(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(tokens)
    found = gradients(model, logits.float().square().sum())
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    exact = gradients(model.double(), model(tokens)[0].square().sum())
    # In float64, where no library matters, the operands and results of products are rounded by hand. Its roundings are
    # others of the same sizes: of all gradients of eight models none had more than 2.1 times the error of its pair.
    linear, rounded = F.linear, Rounded.apply
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: rounded(linear(rounded(x), rounded(weight), bias)))
    pairs = gradients(model, model(tokens)[0].square().sum())
    for name, gradient in found.items():
        off = distance(pairs[name], exact[name])
        assert 0 < distance(gradient, exact[name]) <= 4 * off < 0.2, name


def test_packed_model_compiles_to_one_graph() -> None:
    model, tokens, starts = trained(), text(1, 12), offsets([5, 7])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert distance(compiled(tokens, cu_seqlens=starts)[0], model(tokens, cu_seqlens=starts)[0]) < SAME


BAD = {
    "cu_seqlens packs sequences into a batch of one, but B = 2": (2, [0, 3, 6]),
    r"cu_seqlens must run from 0 to T = 6 without decreasing, got \[0, 3, 5\]": (1, [0, 3, 5]),
    r"cu_seqlens must be \[N \+ 1\]": (1, [0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_offsets_raise(message: str) -> None:
    batch, starts = BAD[message]
    with pytest.raises(ValueError, match=message):
        trained()(text(batch, 6), cu_seqlens=torch.tensor(starts))


def test_state_of_another_number_of_texts_raises() -> None:
    model = trained()
    with pytest.raises(ValueError, match=r"state.att_x must be \[L, B, D\] = \[3, 2, 20\]"):
        model(text(1, 6), model.empty_state(1), cu_seqlens=torch.tensor([0, 2, 6]))


@torch.no_grad()
def test_rescaling_changes_only_the_weight_of_epsilon_and_that_in_inference() -> None:
    tokens, eps = text(2, 30), 1e-5
    plain = trained(replace(CONFIG, layers=5, layer_norm_eps=eps)).double()
    halving = trained(replace(CONFIG, layers=5, layer_norm_eps=eps, rescale_every=2)).double()
    assert torch.equal(halving(tokens)[0], plain(tokens)[0])
    halving.eval()
    assert distance(halving(tokens)[0], plain(tokens)[0]) > 1e-7
    for layer, block in enumerate(plain.blocks):
        block.ln1.eps = block.ln2.eps = eps * 4 ** (layer // 2)
    plain.ln_out.eps = eps * 4**2
    assert distance(halving(tokens)[0], plain(tokens)[0]) < 1e-14


@torch.no_grad()
def test_rescaling_keeps_a_large_residual_stream_within_float16() -> None:
    config = replace(CONFIG, layers=40, rescale_every=10)
    model = trained(config)
    for block in model.blocks:
        block.feed_forward.value.weight.mul_(6000)
    expected, _ = model(text(2, 30))
    model = model.half()
    assert not model(text(2, 30))[0].isfinite().all()
    assert distance(model.eval()(text(2, 30))[0], expected) < 1e-2
