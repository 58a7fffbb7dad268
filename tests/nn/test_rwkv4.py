"""The RWKV-4 model: sizes, initial values, and one result however the text is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv4_models import CONFIG, SAME, distance, fields, text, trained
from torch import Tensor

from fastwkv.nn import RWKV4, RWKV4Block, RWKV4ChannelMix, RWKV4Config, RWKV4TimeMix

few = settings(max_examples=25, deadline=None)


def textbook(model: RWKV4, tokens: Tensor) -> Tensor:
    """The formulas of the paper in float64, a token at a time, with plain sums of exponentials."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    norm = torch.nn.functional.layer_norm
    B, T = tokens.shape
    L, D = model.config.layers, model.config.width
    att_x, ffn_x, num, den = (torch.zeros(L, B, D, dtype=torch.float64) for _ in range(4))
    logits = []
    for t in range(T):
        x = weights["embeddings.weight"][tokens[:, t]]
        x = norm(x, (D,), weights["blocks.0.pre_ln.weight"], weights["blocks.0.pre_ln.bias"])
        for layer in range(L):
            p = {n.removeprefix(f"blocks.{layer}."): w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}

            def mixed(part: str, name: str, new: Tensor, old: Tensor, p: dict[str, Tensor] = p) -> Tensor:
                mix = p[f"{part}.time_mix_{name}"]
                return (mix * new + (1 - mix) * old) @ p[f"{part}.{name}.weight"].T

            y = norm(x, (D,), p["ln1.weight"], p["ln1.bias"])
            r, k, v = (mixed("attention", name, y, att_x[layer]) for name in ("receptance", "key", "value"))
            att_x[layer] = y
            bonus = torch.exp(p["attention.time_first"] + k)
            wkv = (num[layer] + bonus * v) / (den[layer] + bonus)
            decay = torch.exp(-torch.exp(p["attention.time_decay"]))
            num[layer] = decay * num[layer] + k.exp() * v
            den[layer] = decay * den[layer] + k.exp()
            x = x + (r.sigmoid() * wkv) @ p["attention.output.weight"].T

            y = norm(x, (D,), p["ln2.weight"], p["ln2.bias"])
            r, k = (mixed("feed_forward", name, y, ffn_x[layer]) for name in ("receptance", "key"))
            ffn_x[layer] = y
            x = x + r.sigmoid() * (k.clamp(min=0) ** 2 @ p["feed_forward.value.weight"].T)
        x = norm(x, (D,), weights["ln_out.weight"], weights["ln_out.bias"])
        logits.append(x @ weights["head.weight"].T)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_logits_equal_the_formulas_of_the_paper(layers: int) -> None:
    model = trained(RWKV4Config(layers, 20, CONFIG.vocab_size))
    assert distance(model(text(2, 23))[0], textbook(model, text(2, 23))) < SAME


def test_logits_equal_the_formulas_of_the_paper_in_float64() -> None:
    model = trained().double()
    logits, state = model(text(2, 23))
    assert distance(logits, textbook(model, text(2, 23))) < 1e-13
    assert state.wkv.num.dtype == torch.float64


@few
@given(st.data(), st.integers(1, 4), st.integers(1, 24))
def test_any_split_of_the_text_gives_the_same_logits(data: st.DataObject, batch: int, length: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
    model, tokens = trained(), text(batch, length)
    with torch.no_grad():
        whole, final = model(tokens)
        state, pieces = None, []
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            logits, state = model(tokens[:, start:stop], state)
            pieces.append(logits)
    assert distance(torch.cat(pieces, 1), whole) < SAME
    for name, field in fields(state).items():
        assert distance(field, fields(final)[name]) < SAME, name


def test_token_by_token_equals_all_at_once_over_a_long_text() -> None:
    model, tokens = trained(), text(2, 300)
    with torch.no_grad():
        whole, _ = model(tokens)
        state, steps = None, []
        for token in tokens.split(1, 1):
            logits, state = model(token, state)
            steps.append(logits)
    assert distance(torch.cat(steps, 1), whole) < SAME


@few
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_each_text_of_a_batch_is_independent(batch: int, length: int, seed: int) -> None:
    model, tokens = trained(), text(batch, length, seed)
    with torch.no_grad():
        together, _ = model(tokens)
        for row in range(batch):
            assert distance(together[row : row + 1], model(tokens[row : row + 1])[0]) < SAME


def test_a_state_of_several_texts_is_carried_per_text() -> None:
    model, tokens = trained(), text(3, 9)
    with torch.no_grad():
        _, state = model(tokens[:, :5])
        together, _ = model(tokens[:, 5:6], state)
        for row in range(3):
            alone, _ = model(tokens[row : row + 1, :6])
            assert distance(together[row], alone[0, 5:]) < SAME


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = trained(), text(1, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


def test_empty_state_equals_no_state() -> None:
    model = trained()
    with torch.no_grad():
        for length in (1, 4):
            tokens = text(2, length)
            assert torch.equal(model(tokens)[0], model(tokens, model.empty_state(2))[0])


@pytest.mark.parametrize("module", [RWKV4TimeMix, RWKV4ChannelMix, RWKV4Block])
def test_a_layer_alone_starts_from_an_empty_state(module: type[torch.nn.Module]) -> None:
    layer = module(CONFIG)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, CONFIG.width)
    with torch.no_grad():
        whole, _ = layer(x)
        state, steps = None, []
        for x_t in x.unbind(1):
            y, state = layer(x_t, state)
            steps.append(y)
    assert distance(torch.stack(steps, 1), whole) < SAME


def gradients(model: RWKV4, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("cut", [None, 1, 5, 8])
def test_gradients_flow_through_a_carried_state(cut: int | None) -> None:
    model, tokens = trained().double(), text(2, 9)
    goal = torch.randn(2, 9, CONFIG.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = gradients(model, (model(tokens)[0] * goal).sum())
    state, loss = None, torch.zeros((), dtype=torch.float64)
    pieces = tokens.split(1, 1) if cut is None else (tokens[:, :cut], tokens[:, cut:])
    position = 0
    for piece in pieces:
        logits, state = model(piece, state)
        loss = loss + (logits * goal[:, position : position + piece.shape[1]]).sum()
        position += piece.shape[1]
    assert distance(gradients(model, loss), expected) < 1e-12


def test_gradients_equal_finite_differences() -> None:
    model, tokens = trained(RWKV4Config(2, 6, 5)).double(), text(2, 5) % 5
    loss = model(tokens)[0].logsumexp(-1).sum()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    directions = [torch.randn_like(parameter) for parameter in model.parameters()]
    step, losses = 1e-5, []
    with torch.no_grad():
        for shift in (step, -step):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=shift)
            losses.append(float(model(tokens)[0].logsumexp(-1).sum()))
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.sub_(direction, alpha=shift)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_every_parameter_of_a_trained_model_has_a_gradient() -> None:
    model = trained()
    model(text(2, 6))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_detached_state_cuts_the_gradient() -> None:
    model = trained()
    _, state = model(text(1, 4))
    assert state.wkv.num.requires_grad
    assert not any(f.requires_grad for f in fields(state.detach()).values())


def test_fresh_model_learns_a_repeated_text() -> None:
    torch.manual_seed(0)
    model, tokens = RWKV4(CONFIG), text(1, 9).repeat(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 < math.log(CONFIG.vocab_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_keeps_a_float32_wkv_state(dtype: torch.dtype) -> None:
    model, tokens = trained().to(dtype), text(2, 30)
    with torch.no_grad():
        logits, final = model(tokens)
        state = None
        for token in tokens.split(1, 1):
            step, state = model(token, state)
        exact, _ = model.double()(tokens)
    assert logits.dtype == step.dtype == state.att_x.dtype == state.ffn_x.dtype == dtype
    assert {field.dtype for field in (*state.wkv, *final.wkv)} == {torch.float32}
    bound = 6 * torch.finfo(dtype).eps  # three layers of rounded products
    assert distance(logits, exact) < bound
    assert distance(step[:, 0], exact[:, -1]) < bound


def test_rate_is_computed_in_float32_in_a_half_precision_model() -> None:
    layer = RWKV4TimeMix(CONFIG).bfloat16()
    x = torch.randn(1, 2, CONFIG.width).bfloat16()
    _, (_, after_one) = layer(x[:, 0])
    _, (_, after_two) = layer(x[:, 1], (x[:, 0], after_one))
    # A fresh layer has k = 0, so the two tokens weigh 1 and exp(-w); a rate in bfloat16 would be off by 1e-3.
    weight = after_two.den * after_two.max.exp()
    torch.testing.assert_close(weight, 1 + torch.exp(-layer.time_decay.float().exp())[None], rtol=0, atol=5e-7)


@pytest.mark.parametrize("length", [1, 6])
def test_compiles_to_one_graph(length: int) -> None:
    torch._dynamo.reset()
    model, tokens = trained(), text(2, length)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = model(tokens)
        for carried in (None, state):
            logits, _ = compiled(tokens, carried)
            assert distance(logits, model(tokens, carried)[0]) < SAME
    logits, _ = compiled(tokens, None)
    assert distance(gradients(model, logits.sum()), gradients(model, model(tokens)[0].sum())) < SAME


def test_autocast_gives_bfloat16_products_and_a_float32_state() -> None:
    model, tokens = trained(), text(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        logits, state = model(tokens[:, :1], state)
    assert logits.dtype == torch.bfloat16
    assert state.wkv.num.dtype == state.att_x.dtype == torch.float32


def test_parameter_names_map_to_published_checkpoints() -> None:
    names = {name for name, _ in RWKV4(RWKV4Config(2, 4, 5)).named_parameters()}
    attention = {f"time_mix_{n}" for n in ("key", "value", "receptance")} | {"time_decay", "time_first"}
    attention |= {f"{n}.weight" for n in ("key", "value", "receptance", "output")}
    ffn = {"time_mix_key", "time_mix_receptance", "key.weight", "receptance.weight", "value.weight"}
    expected = {"embeddings.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    expected |= {"blocks.0.pre_ln.weight", "blocks.0.pre_ln.bias"}
    for layer in (0, 1):
        expected |= {f"blocks.{layer}.{ln}.{p}" for ln in ("ln1", "ln2") for p in ("weight", "bias")}
        expected |= {f"blocks.{layer}.attention.{n}" for n in attention}
        expected |= {f"blocks.{layer}.feed_forward.{n}" for n in ffn}
    assert names == expected


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_state_bytes_do_not_depend_on_the_text(dtype: torch.dtype, size: int) -> None:
    model = trained().to(dtype)
    entries = CONFIG.layers * 2 * CONFIG.width
    for length in (1, 3, 17):
        assert model(text(2, length))[1].nbytes == entries * (2 * size + 3 * 4)
