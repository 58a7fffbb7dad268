"""Checkpoints in and out: every format, every bit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_bits, blinkdl, hugging_face, place, write_hugging_face, write_pth
from rwkv4_models import CONFIG, text, trained
from safetensors.torch import load_file

from fastwkv.nn import RWKV4, RWKV4Config
from fastwkv.nn.checkpoint import open_checkpoint
from fastwkv.nn.checkpoint_names import FORMATS, shapes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("safetensors", "bin", "safetensors-sharded", "bin-sharded")


def test_table_of_shapes_is_that_of_the_model() -> None:
    for config in (CONFIG, RWKV4Config(1, 8, 5), RWKV4Config.preset("14b")):
        with torch.device("meta"):
            parameters = RWKV4(config).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == shapes(config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blinkdl_file_goes_in_and_out_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = blinkdl(dtype=dtype)
    model = RWKV4.from_pretrained(write_pth(tmp_path / "in.pth", weights))
    assert model.config == CONFIG
    model.save_pretrained(tmp_path / "out.pth", format="blinkdl")
    assert_same_bits(torch.load(tmp_path / "out.pth", weights_only=True), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_folder_goes_in_and_out_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = RWKV4.from_pretrained(write_hugging_face(tmp_path / "in", kind))
    assert model.config == replace(CONFIG, rescale_every=6)  # theirs, where nothing is written
    assert not model.training
    model.save_pretrained(tmp_path / "out", format="hf")
    assert_same_bits(load_file(tmp_path / "out/model.safetensors"), hugging_face(blinkdl()))


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_every_pair_of_formats_keeps_every_bit(tmp_path: Path, first: str, second: str) -> None:
    model = trained(RWKV4Config(2, 12, 9))
    model.blocks[1].attention.key.weight.data[0, :3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    bits = {name: tensor.clone().view(torch.int32) for name, tensor in model.state_dict().items()}
    for folder, format in ((tmp_path / "1", first), (tmp_path / "2", second)):
        model.save_pretrained(place(folder, format), format=format)
        model = RWKV4.from_pretrained(place(folder, format))
    assert_same_bits({name: tensor.view(torch.int32) for name, tensor in model.state_dict().items()}, bits)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("format", ["fastwkv", "hf"])
def test_config_goes_in_and_out(tmp_path: Path, format: str, eps: float) -> None:
    config = RWKV4Config(layers=1, width=8, vocab_size=5, layer_norm_eps=eps, rescale_every=4)
    RWKV4(config).save_pretrained(tmp_path, format=format)
    assert RWKV4.from_pretrained(tmp_path).config == config


def test_old_file_of_torch_is_read(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "old.pth", blinkdl(), _use_new_zipfile_serialization=False)
    assert torch.equal(RWKV4.from_pretrained(path).head.weight, blinkdl()["head.weight"])


def test_parameters_that_were_saved_as_such_are_read(tmp_path: Path) -> None:
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in blinkdl().items()}
    model = RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", weights))
    model(text(1, 3))[0].sum().backward()
    assert all(p.is_leaf and p.requires_grad and p.grad is not None for p in model.parameters())


def test_transposed_tensor_is_read_as_contiguous(tmp_path: Path) -> None:
    weights = blinkdl()
    weights["blocks.0.att.key.weight"] = weights["blocks.0.att.key.weight"].T.contiguous().T
    model = RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", weights))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(model.blocks[0].attention.key.weight, weights["blocks.0.att.key.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_converts_all_but_rates_and_bonuses(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_pth(tmp_path / "model.pth", weights := blinkdl())
    model = RWKV4.from_pretrained(path, dtype=dtype)
    for name, parameter in model.named_parameters():
        wide = name.endswith((".time_decay", ".time_first")) and dtype.itemsize == 2
        assert parameter.dtype == (torch.float32 if wide else dtype), name
    assert torch.equal(model.head.weight, weights["head.weight"].to(dtype))
    logits, state = model(text(2, 5))
    logits, _ = model(text(2, 1), state)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_model_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    model = RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", blinkdl()), dtype=torch.bfloat16)
    for format in FORMATS:
        model.save_pretrained(place(tmp_path, format), format=format)
        assert_same_bits(RWKV4.from_pretrained(place(tmp_path, format)).state_dict(), model.state_dict())


def test_device_is_where_the_parameters_are(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    assert RWKV4.from_pretrained(path, device="meta").head.weight.is_meta
    assert RWKV4.from_pretrained(path, device=torch.device("cpu")).head.weight.device.type == "cpu"


def test_subclass_loads_itself(tmp_path: Path) -> None:
    class Mine(RWKV4):
        pass

    assert type(Mine.from_pretrained(write_pth(tmp_path / "model.pth", blinkdl()))) is Mine


@pytest.mark.parametrize("format", FORMATS)
def test_loaded_model_does_not_depend_on_its_file(tmp_path: Path, format: str) -> None:
    path = place(tmp_path, format)
    trained().save_pretrained(path, format=format)
    model = RWKV4.from_pretrained(path)
    expected, _ = model(text(1, 4))
    file = path if format == "blinkdl" else path / "model.safetensors"
    with file.open("r+b") as damaged:  # in place: a mapping would see it
        damaged.write(bytes(file.stat().st_size))
    assert torch.equal(model(text(1, 4))[0], expected)


def test_opening_names_what_is_there_and_loads_nothing(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path, format="hf")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.config) == ("hf", CONFIG)
    assert sum(tensor.numel() for tensor in checkpoint.tensors.values()) == sum(
        p.numel() for p in RWKV4(CONFIG).parameters()
    )


PEAK = """
import sys, threading, torch
from fastwkv.nn import RWKV4, RWKV4Config
with torch.device("meta"):
    RWKV4(RWKV4Config(1, 8, 5))  # PyTorch loads 75 MB of its own for this
def anonymous():  # what the process owns; pages of a mapped file are the system's to take back
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
model = RWKV4.from_pretrained(sys.argv[1])
done.set()
thread.join()
print((max(peak, anonymous()) - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", FORMATS)
def test_peak_of_loading_is_one_copy(tmp_path: Path, format: str) -> None:
    path = place(tmp_path, format)
    RWKV4(RWKV4Config(layers=4, width=768, vocab_size=5000)).save_pretrained(path, format=format)  # 144 MB
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.2  # measured 1.00 to 1.03


def test_whole_file_is_read_before_shards_that_another_save_left(tmp_path: Path) -> None:
    for kind in ("safetensors-sharded", "bin", "bin-sharded"):
        write_hugging_face(tmp_path, kind)
    model = trained(seed=1)
    model.save_pretrained(tmp_path, format="hf")
    assert torch.equal(RWKV4.from_pretrained(tmp_path).head.weight, model.head.weight)


@pytest.mark.parametrize("every", [-1, 0])
def test_rescaling_that_hugging_face_turns_off_is_off(tmp_path: Path, every: int) -> None:
    assert RWKV4.from_pretrained(write_hugging_face(tmp_path, rescale_every=every)).config.rescale_every == 0


def test_sizes_that_hugging_face_leaves_open_are_accepted(tmp_path: Path) -> None:
    RWKV4.from_pretrained(write_hugging_face(tmp_path, attention_hidden_size=None, intermediate_size=None))
