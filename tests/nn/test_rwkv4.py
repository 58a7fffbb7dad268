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


PARAMETERS = {
    "169m": 169342464,
    "430m": 430397440,
    "1.5b": 1515106304,
    "3b": 2984627200,
    "7b": 7392649216,
    "14b": 14148597760,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = RWKV4Config.preset(name)
    with torch.device("meta"):
        model = RWKV4(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    L, D, V = config.layers, config.width, config.vocab_size
    assert PARAMETERS[name] == 2 * V * D + 13 * D * D * L + D * (11 * L + 4)


def test_preset_takes_another_vocabulary() -> None:
    assert RWKV4Config.preset("169m", vocab_size=65536) == RWKV4Config(12, 768, 65536)


def test_model_built_on_meta_gets_every_initial_value() -> None:
    with torch.device("meta"):
        model = RWKV4(CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    fresh = RWKV4(CONFIG)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "ln" in name or "time" in name:
            assert torch.equal(parameter, fresh.get_parameter(name)), name


@pytest.mark.parametrize(("L", "d"), [(1, 8), (2, 6), (5, 12), (3, 1)])
def test_initial_vectors_follow_the_training_code(L: int, d: int) -> None:
    model = RWKV4(RWKV4Config(L, d, 11))
    for layer, block in enumerate(model.blocks):
        depth = layer / (L - 1) if L > 1 else 0.0
        att, ffn = block.attention, block.feed_forward
        for i in range(d):
            position = i / (d - 1) if d > 1 else 0.0
            mix = (i / d) ** (1 - layer / L)
            expected = {
                att.time_decay: -5 + 8 * position ** (0.7 + 1.3 * depth),
                att.time_first: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
                att.time_mix_key: mix,
                att.time_mix_value: mix + 0.3 * depth,
                att.time_mix_receptance: (i / d) ** (0.5 * (1 - layer / L)),
                ffn.time_mix_key: mix,
                ffn.time_mix_receptance: mix,
            }
            for parameter, value in expected.items():
                assert parameter[i].item() == pytest.approx(value, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("L", [1, 3])
def test_initial_matrices_follow_the_training_code(L: int) -> None:
    model = RWKV4(RWKV4Config(L, 16, 50))
    for block in model.blocks:
        att, ffn = block.attention, block.feed_forward
        for linear in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
            assert not linear.weight.any()
            assert linear.bias is None
        assert_orthogonal_columns(att.value.weight, 1.0)
        assert_orthogonal_columns(ffn.key.weight, 2.0)
    assert_orthogonal_columns(model.head.weight, 0.5 * math.sqrt(50 / 16))
    assert 0.9e-4 < model.embeddings.weight.abs().max() <= 1e-4
    assert model.embeddings.weight.min() < -0.9e-4


def test_head_of_a_small_vocabulary_has_gain_one_half() -> None:
    assert_orthogonal_columns(RWKV4(RWKV4Config(1, 16, 10)).head.weight.T, 0.5)


def assert_orthogonal_columns(weight: Tensor, gain: float) -> None:
    torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(weight.shape[1]), rtol=0, atol=2e-6)


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


BAD_TOKENS = {
    "tokens must be a tensor, got list": [[1, 2]],
    "tokens must be int64 or int32, got torch.float32": torch.ones(1, 2),
    r"\[B, T\].*got shape \[3\]": torch.tensor([1, 2, 3]),
    r"\[B, T\].*got shape \[2, 0\]": torch.zeros(2, 0, dtype=torch.int64),
    r"\[B, T\].*got shape \[0, 2\]": torch.zeros(0, 2, dtype=torch.int64),
    "tokens are on meta, but the model is on cpu": torch.zeros(1, 2, dtype=torch.int64, device="meta"),
}


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_bad_tokens_raise(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RWKV4(CONFIG)(BAD_TOKENS[message])


@pytest.mark.parametrize("length", [1, 4])
def test_bad_state_raises(length: int) -> None:
    model, tokens = RWKV4(CONFIG), text(2, length)
    with pytest.raises(ValueError, match=r"state.att_x must be \[L, B, D\] = \[3, 2, 20\], got shape \[3, 1, 20\]"):
        model(tokens, model.empty_state(1))
    with pytest.raises(TypeError, match="state must be an RWKV4State, got tuple"):
        model(tokens, tuple(model.empty_state(2)))
    with pytest.raises(TypeError, match=r"state\.att_x must be torch\.float32, got torch\.bfloat16"):
        model(tokens, model.empty_state(2)._replace(att_x=torch.zeros(3, 2, 20).bfloat16()))
    wkv = model.empty_state(2).wkv
    with pytest.raises(TypeError, match=r"state\.wkv\.den must be torch\.float32, got torch\.float64"):
        model(tokens, model.empty_state(2)._replace(wkv=wkv._replace(den=wkv.den.double())))


def test_bad_config_raises() -> None:
    with pytest.raises(ValueError, match=r"one of 169m, 430m, 1\.5b, 3b, 7b, 14b, got '2b'"):
        RWKV4Config.preset("2b")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        RWKV4Config(0, 8)
    with pytest.raises(TypeError, match="width must be an int, got float"):
        RWKV4Config(1, 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer_norm_eps must be positive and finite, got 0"):
        RWKV4Config(1, 8, layer_norm_eps=0)
    with pytest.raises(TypeError, match="layer_norm_eps must be a number, got str"):
        RWKV4Config(1, 8, layer_norm_eps="1e-5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rescale_every must be at least 0, got -1"):
        RWKV4Config(1, 8, rescale_every=-1)
    with pytest.raises(ValueError, match="layer must be at least 0 and below 3, got 3"):
        RWKV4Block(CONFIG, 3)
