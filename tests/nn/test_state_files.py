"""States of RWKV-4 in files: the same bits, in any process, of one size."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_bits
from rwkv4_models import text, trained
from safetensors.torch import save_file

from fastwkv.nn import CheckpointError, RWKV4State


def test_state_goes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    _, state = trained()(text(2, 7))
    state.save(tmp_path / "state")  # of any name
    loaded = RWKV4State.load(tmp_path / "state")
    assert_same_bits(loaded.tensors(), state.tensors())


def test_empty_state_goes_through_a_file(tmp_path: Path) -> None:
    model = trained().to(torch.bfloat16)
    model.empty_state(1).save(tmp_path / "state.safetensors")
    loaded = RWKV4State.load(tmp_path / "state.safetensors")
    assert_same_bits(loaded.tensors(), model.empty_state(1).tensors())
    assert torch.equal(model(text(1, 4), loaded)[0], model(text(1, 4))[0])


def test_file_of_a_state_does_not_grow_with_the_text(tmp_path: Path) -> None:
    model, sizes = trained(), set()
    for length in (1, 10, 1000):
        with torch.no_grad():
            model(text(1, length))[1].save(tmp_path / "state.safetensors")
        sizes.add((tmp_path / "state.safetensors").stat().st_size)
    assert len(sizes) == 1


def test_state_is_continued_in_another_process(tmp_path: Path) -> None:
    model, tokens = trained().double(), text(2, 20)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, _ = model(tokens[:, 12:], model(tokens[:, :12])[1])
        model(tokens[:, :12])[1].save(tmp_path / "state.safetensors")
    torch.save(tokens[:, 12:], tmp_path / "tokens.pt")
    code = (
        "import sys, torch; from fastwkv.nn import RWKV4, RWKV4State; folder = sys.argv[1]\n"
        "state, tokens = RWKV4State.load(folder + '/state.safetensors'), torch.load(folder + '/tokens.pt')\n"
        "torch.save(RWKV4.from_pretrained(folder)(tokens, state)[0].detach(), folder + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    # The other process may have another number of threads and add up in another order: sums of at most 80 terms of
    # size 1, in three layers, are then off by some hundred ε.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-12)


def test_loaded_state_does_not_depend_on_its_file(tmp_path: Path) -> None:
    _, state = trained()(text(2, 7))
    state.save(tmp_path / "state")
    loaded = RWKV4State.load(tmp_path / "state")
    with (tmp_path / "state").open("r+b") as damaged:  # in place: a mapping would see it
        damaged.write(bytes((tmp_path / "state").stat().st_size))
    assert torch.equal(loaded.att_x, state.att_x)


def test_state_is_loaded_onto_the_device(tmp_path: Path) -> None:
    trained().empty_state(1).save(tmp_path / "state")
    assert all(t.is_meta for t in RWKV4State.load(tmp_path / "state", "meta").tensors().values())


def test_row_of_a_state_goes_through_a_file(tmp_path: Path) -> None:
    _, state = trained()(text(3, 7))
    row = RWKV4State.from_tensors({name: tensor[:, 1:2] for name, tensor in state.tensors().items()})
    row.save(tmp_path / "state")
    assert torch.equal(RWKV4State.load(tmp_path / "state").wkv.num, row.wkv.num)


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_of_a_model_or_a_block_of_any_dtype_is_read(tmp_path: Path, layers: tuple[int, ...], dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    names = ("att_x", "ffn_x", "wkv.num", "wkv.den", "wkv.max")
    tensors = {name: torch.rand(*layers, 2, 20).to(wide if "wkv" in name else dtype) for name in names}
    save_file(tensors, tmp_path / "state")
    assert_same_bits(RWKV4State.load(tmp_path / "state").tensors(), tensors)
    save_file({**tensors, "last_token": torch.tensor([1])}, tmp_path / "state")  # as `fastwkv generate` writes it
    assert_same_bits(RWKV4State.load(tmp_path / "state").tensors(), tensors)


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensor).clone() for name, tensor in tensors.items()})


OTHER_STATES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "att_x must be float32, float64, bfloat16 or float16, got torch.int64": each(torch.Tensor.long),
    "att_x must be float32, float64, bfloat16 or float16, got torch.bool": each(torch.Tensor.bool),
    "wkv.num must be torch.float32 beside att_x of torch.float32, got torch.int32": lambda tensors: tensors.update(
        {"wkv.num": tensors["wkv.num"].int()}
    ),
    "wkv.max must be torch.float32 beside att_x of torch.float32, got torch.float64": lambda tensors: tensors.update(
        {"wkv.max": tensors["wkv.max"].double()}
    ),
    "ffn_x must be torch.float32 beside att_x of torch.float32, got torch.float16": lambda tensors: tensors.update(
        ffn_x=tensors["ffn_x"].half()
    ),
    r"att_x must be \[L, B, D\] or \[B, D\], got shape \[\]": each(torch.Tensor.sum),
    r"att_x must be \[L, B, D\] or \[B, D\], got shape \[20\]": each(lambda tensor: tensor[0, 0]),
    r"att_x must be \[L, B, D\] or \[B, D\], got shape \[1, 3, 1, 20\]": each(lambda tensor: tensor[None]),
    r"wkv.den has shape \[\], but att_x \[3, 1, 20\]": lambda tensors: tensors.update({"wkv.den": torch.tensor(1.0)}),
    r"ffn_x has shape \[3, 1, 19\], but att_x \[3, 1, 20\]": lambda tensors: tensors.update(
        ffn_x=torch.zeros(3, 1, 19)
    ),
    r"wkv.num has shape \[3, 2, 20\], but att_x \[3, 1, 20\]": lambda tensors: tensors.update(
        {"wkv.num": torch.zeros(3, 2, 20)}
    ),
    "expected the state of an RWKV-4 model, but it also has 'more'": lambda tensors: tensors.update(
        more=torch.zeros(1)
    ),
    "expected the state of an RWKV-4 model, but it has no 'wkv.den'": lambda tensors: tensors.pop("wkv.den"),
}


@pytest.mark.parametrize("message", OTHER_STATES)
def test_state_that_no_model_returns_is_refused(tmp_path: Path, message: str) -> None:
    tensors = dict(trained().empty_state(1).tensors())
    OTHER_STATES[message](tensors)
    save_file(tensors, tmp_path / "state")
    with pytest.raises(CheckpointError, match=message + "$") as caught:
        RWKV4State.load(tmp_path / "state")
    assert str(caught.value).startswith(f"{tmp_path / 'state'}: ")
