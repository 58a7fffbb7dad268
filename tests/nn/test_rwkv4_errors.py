"""What RWKV-4 says of wrong tokens, states and sizes."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rwkv4_models import CONFIG, text

from fastwkv.nn import RWKV4, RWKV4Block, RWKV4ChannelMix, RWKV4Config, RWKV4State, RWKV4TimeMix, generate

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


OUTSIDE = st.integers(CONFIG.vocab_size, 2**31 - 1) | st.integers(-(2**31), -1)


@given(OUTSIDE, st.integers(1, 3), st.integers(1, 5), st.sampled_from([torch.int64, torch.int32]), st.data())
def test_token_outside_the_vocabulary_is_named(
    token: int, batch: int, length: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    model, tokens = RWKV4(CONFIG), text(batch, length).to(dtype)
    tokens[data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, length - 1))] = token
    message = rf"^tokens must be at least 0 and below V = {CONFIG.vocab_size}, got {token}$"
    for call in (model, model.features, lambda tokens: generate(model, tokens, 1)):
        with pytest.raises(ValueError, match=message):
            call(tokens)


def test_token_outside_the_vocabulary_is_named_by_a_step_which_leaves_the_state() -> None:
    model, tokens = RWKV4(CONFIG), text(2, 1)[:, 0]
    _, state = model(text(2, 3))
    before, tokens[1] = state.clone(), CONFIG.vocab_size
    with pytest.raises(ValueError, match=rf"below V = {CONFIG.vocab_size}, got {CONFIG.vocab_size}$"):
        model.step_(tokens, state)
    assert all(torch.equal(t, s) for t, s in zip(state.tensors().values(), before.tensors().values(), strict=True))


def test_index_error_that_is_not_of_a_token_is_left_alone() -> None:
    def fail(*_: object) -> None:
        raise IndexError("of a hook")

    model = RWKV4(CONFIG)
    model.embeddings.register_forward_hook(fail)
    with pytest.raises(IndexError, match="of a hook"):
        model(text(1, 2))


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


NOT_DENSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "COO": torch.Tensor.to_sparse,
    "CSR": lambda t: t.flatten(1).to_sparse_csr(),
    "MKL-DNN": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "nested, jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
}


def made(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half of them are prototypes, the other half deprecated
        return NOT_DENSE[kind](tensor)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_are_refused_by_name(kind: str, length: int) -> None:
    model, tokens = RWKV4(CONFIG), text(2, length)
    for call in (model, model.features, lambda *given: generate(model, given[0], 1, state=given[-1])):
        with pytest.raises(TypeError, match=r"^tokens must be a dense tensor .*, got "):
            call(made(kind, tokens), model.empty_state(2))
        for name in ("att_x", "ffn_x", "wkv.num", "wkv.den", "wkv.max"):
            tensors = model.empty_state(2).tensors()
            tensors[name] = made(kind, tensors[name])
            with pytest.raises(TypeError, match=rf"^state\.{name} must be a dense tensor .*, got "):
                call(tokens, RWKV4State.from_tensors(tensors))


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
    with pytest.raises(TypeError, match="layer must be an int, got str"):
        RWKV4Block(CONFIG, "first")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the preset must be a str, got int"):
        RWKV4Config.preset(169)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [RWKV4, RWKV4Block, RWKV4TimeMix, RWKV4ChannelMix])
def test_config_of_another_type_is_named(module: type[torch.nn.Module]) -> None:
    with pytest.raises(
        TypeError, match=r"^config must be an RWKV4Config, got dict; RWKV4Config\(\*\*config\) makes one"
    ):
        module({"layers": 1, "width": 8})
    with pytest.raises(TypeError, match=r"^config must be an RWKV4Config, got str; RWKV4Config\.preset and"):
        module("169m")
    with pytest.raises(TypeError, match=r"^config must be an RWKV4Config, got NoneType$"):
        module(None)


@pytest.mark.parametrize("name", ["169m", "430m", "1.5b", "3b", "7b", "14b"])
def test_preset_is_found_in_capitals_too(name: str) -> None:
    assert RWKV4Config.preset(name.upper()) == RWKV4Config.preset(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_to_load_is_taken_by_name_too(dtype: torch.dtype, tmp_path) -> None:
    RWKV4(CONFIG).save_pretrained(tmp_path)
    for name in (str(dtype), str(dtype).removeprefix("torch.")):
        assert RWKV4.from_pretrained(tmp_path, dtype=name).head.weight.dtype == dtype
    for wrong in ("", "int8", "auto", "torch", "dtype", torch.int8, 16):
        with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, got "):
            RWKV4.from_pretrained(tmp_path, dtype=wrong)
