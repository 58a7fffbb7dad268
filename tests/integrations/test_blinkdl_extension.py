"""The extension that BlinkDL's training code takes for its own: what it writes, what it refuses, who gets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastwkv.integrations.blinkdl import RUN_CUDA, install, uninstall, wkv_cuda

REPOSITORY = Path(__file__).parents[2]
OUTPUTS = ("y", "gk", "gv", "gw", "gu")


def arguments(place=lambda *shape: torch.full(shape, 7.0)):
    """Arguments of backward by name, for B, T, C = 2, 3, 4. What is written comes from ``place``, and holds sevens."""
    generator = torch.Generator().manual_seed(0)
    u, decay = torch.randn(2, 4, generator=generator)
    k, v, gy = torch.randn(3, 2, 3, 4, generator=generator)
    y, gk, gv = (place(2, 3, 4) for _ in range(3))
    gw, gu = (place(2, 4) for _ in range(2))
    return {"w": -decay.exp(), "u": u, "k": k, "v": v, "y": y, "gy": gy, "gw": gw, "gu": gu, "gk": gk, "gv": gv}


def call(given):
    wkv_cuda.forward(2, 3, 4, *(given[name] for name in ("w", "u", "k", "v", "y")))
    wkv_cuda.backward(2, 3, 4, *given.values())


def test_views_are_written_in_place_and_nothing_beside_them():
    memory = []

    def place(*shape):
        memory.append(torch.full((torch.Size(shape).numel() + 2,), 7.0))
        return memory[-1][1:-1].view(shape)

    views, whole = arguments(place), arguments()
    call(views)
    call(whole)
    for name, buffer in zip(OUTPUTS, memory, strict=True):
        assert torch.equal(buffer[1:-1], whole[name].flatten()), name
        assert (buffer[1:-1] != 7).all(), name
        assert (buffer[[0, -1]] == 7).all(), name


def test_nothing_is_recorded_for_autograd():
    given = arguments()
    for name in ("w", "u", "k", "v", "gy"):
        given[name].requires_grad_()
    call(given)
    assert not any(given[name].requires_grad for name in OUTPUTS)


BAD = {
    r"y must be \[B, T, C\] = \[2, 3, 4\], got shape \[2, 4, 3\]": ("y", torch.zeros(2, 4, 3)),
    r"y must be contiguous, got strides \[4, 8, 1\]": ("y", torch.zeros(3, 2, 4).transpose(0, 1)),
    "y must be float32 like k, got bfloat16": ("y", torch.zeros(2, 3, 4).bfloat16()),
    "y is on meta, but w is on cpu": ("y", torch.zeros(2, 3, 4, device="meta")),
    r"w must be \[C\] = \[4\], got shape \[1, 1, 4\]": ("w", torch.zeros(1, 1, 4)),
    r"u must be contiguous, got strides \[2\]": ("u", torch.zeros(8)[::2]),
    "k must be a tensor, got list": ("k", [1.0]),
    "v must be float32 like k, got float64": ("v", torch.zeros(2, 3, 4).double()),
    r"gy must be contiguous, got strides \[0, 0, 0\]": ("gy", torch.ones(()).expand(2, 3, 4)),
    r"gw must be \[B, C\] = \[2, 4\], got shape \[4\]": ("gw", torch.zeros(4)),
    "gu must be float32, float64, bfloat16 or float16, got int64": ("gu", torch.zeros(2, 4).long()),
    r"gk must be \[B, T, C\] = \[2, 3, 4\], got shape \[1, 3, 4\]": ("gk", torch.zeros(1, 3, 4)),
    "gv is on meta, but w is on cpu": ("gv", torch.zeros(2, 3, 4, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_tensors_raise_before_anything_is_written(message):
    name, bad = BAD[message]
    given = arguments()
    method = wkv_cuda.forward if name == "y" else wkv_cuda.backward
    taken = ("w", "u", "k", "v", "y") if name == "y" else tuple(given)
    with pytest.raises((TypeError, ValueError), match=message):
        method(2, 3, 4, *(bad if n == name else given[n] for n in taken))
    assert all((given[n] == 7).all() for n in OUTPUTS)


def test_bad_sizes_raise():
    given = arguments()
    w, u, k, v, y, *_ = given.values()
    wrong = r"k must be \[B, T, C\] = \[3, 2, 4\], got shape \[2, 3, 4\]"
    with pytest.raises(ValueError, match=wrong):
        RUN_CUDA(3, 2, 4, w, u, k, v)
    with pytest.raises(ValueError, match=wrong):
        wkv_cuda.forward(3, 2, 4, w, u, k, v, y)
    with pytest.raises(ValueError, match=r"gw must be \[B, C\] = \[3, 4\], got shape \[2, 4\]"):
        wkv_cuda.backward(3, 2, 4, *given.values())
    with pytest.raises(ValueError, match="k is empty: T must be at least 1"):
        wkv_cuda.forward(2, 0, 4, w, u, *(t[:, :0] for t in (k, v, y)))
    with pytest.raises(ValueError, match="k is empty: T must be at least 1"):
        wkv_cuda.backward(2, 0, 4, *(t[:, :0] if t.dim() == 3 else t for t in given.values()))
    with pytest.raises(TypeError, match="w must be a tensor, got float"):
        RUN_CUDA(2, 3, 4, -1.0, u, k, v)
    with pytest.raises(TypeError, match=r"after v come \[y,\] gy, gw, gu, gk, gv: 5 or 6 tensors, got 4"):
        wkv_cuda.backward(2, 3, 4, w, u, k, v, *list(given.values())[-4:])


@pytest.fixture
def compiler(monkeypatch):
    """PyTorch's ``load`` replaced by one that notes what it is asked to compile."""
    asked = []

    def compile_(*args, **kwargs):
        asked.append((args, kwargs))
        return "compiled"

    monkeypatch.setattr(cpp_extension, "load", compile_)
    install()
    yield asked
    uninstall()
    assert cpp_extension.load is compile_


@pytest.mark.parametrize("name", ["wkv", "wkv_1024", "wkv_cuda", "wkv_4096_bf16"])
@pytest.mark.parametrize("version", ["", "_bf16"])
@pytest.mark.parametrize("as_path", [str, Path])
def test_extension_of_the_training_code_is_not_compiled(compiler, name, version, as_path):
    sources = [as_path(f"src/cuda/wkv_cuda{version}.cu"), as_path(f"src/cuda/wkv_op{version}.cpp")]
    assert cpp_extension.load(name, sources, verbose=True) is wkv_cuda
    assert not compiler


OTHERS = {
    "a later operator": ("wkv5", ["cuda/wkv5_op.cpp", "cuda/wkv5_cuda.cu"]),
    "another name": ("timex", ["cuda/wkv_op.cpp", "cuda/wkv_cuda.cu"]),
    "a carried state": ("wkv_8_bf16", ["cuda/wkv_op_state_bf16.cpp", "cuda/wkv_cuda_state_bf16.cu"]),
    "Hugging Face's": ("wkv_8", ["wkv_op.cpp", "wkv_cuda.cu", "wkv_cuda_bf16.cu"]),
    "one file": ("wkv", "wkv_op.cpp"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_extensions_are_compiled_as_before(compiler, which):
    name, sources = OTHERS[which]
    assert cpp_extension.load(name, sources, ["-O3"], verbose=True) == "compiled"
    assert compiler == [((name, sources, ["-O3"]), {"verbose": True})]


def test_extension_without_a_module_is_compiled_as_before(compiler):
    sources = ["cuda/wkv_op.cpp", "cuda/wkv_cuda.cu"]
    assert cpp_extension.load(name="wkv_8", sources=sources, is_python_module=False) == "compiled"
    assert compiler == [(("wkv_8", sources), {"is_python_module": False})]


def test_uninstall_restores_what_was_there_however_often_it_was_installed(compiler):
    install()
    load = cpp_extension.load
    uninstall()
    assert cpp_extension.load("wkv", ["wkv_op.cpp", "wkv_cuda.cu"]) == "compiled"
    assert load("timex", ["timex.cpp"]) == "compiled"  # held by code that imported it meanwhile
    uninstall()
    assert cpp_extension.load("wkv", ["wkv_op.cpp", "wkv_cuda.cu"]) == "compiled"


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_import_in_front_is_enough():
    code = """
import sys
import fastwkv.integrations.blinkdl
early = "torch.utils.cpp_extension" in sys.modules
import fastwkv.integrations.blinkdl_extension
import torch
from torch.utils.cpp_extension import load
wkv_cuda = load(name="wkv_1024", sources=["cuda/wkv_op.cpp", "cuda/wkv_cuda.cu"], verbose=True, extra_cuda_cflags=[])
w, u = torch.zeros(2, 3)
k, v, y = torch.zeros(3, 1, 2, 3)
v[:, 0] = 4.0
wkv_cuda.forward(1, 2, 3, w, u, k, v, y)
print(early, y.tolist())
"""
    assert python(code) == "False [[[4.0, 4.0, 4.0], [2.0, 2.0, 2.0]]]"


def test_missing_setuptools_is_named():
    code = """
import sys
sys.modules["setuptools"] = None
import fastwkv.integrations.blinkdl
try:
    import fastwkv.integrations.blinkdl_extension
except ImportError as error:
    print(error)
"""
    assert python(code).startswith("torch.utils.cpp_extension needs setuptools and cannot be imported: ")
