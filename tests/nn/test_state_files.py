"""States of RWKV-4 in files: the same bits, in any process, of one size."""

import subprocess
import sys
from pathlib import Path

import torch
from checkpoints import assert_same_bits
from rwkv4_models import text, trained

from fastwkv.nn import RWKV4State


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
