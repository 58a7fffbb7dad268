"""What RWKV-4 says of wrong tokens, states and sizes."""

import pytest
import torch
from rwkv4_models import CONFIG, text

from fastwkv.nn import RWKV4, RWKV4Block, RWKV4Config

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
