"""The CUDA kernels that RWKV-4 was trained with, compiled from the files that transformers shipped until 4.57."""

import functools
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers.fetched import RWKV_CUDA as FETCHED
from peers.fetched import SOURCES
from peers.wkv_inputs import Inputs
from peers.wkv_providers import WKVProvider
from torch import Tensor
from torch.utils import cpp_extension

FLAGS = ("--maxrregcount", "60", "--use_fast_math", "-O3", "-Xptxas", "-O3", "--extra-device-vectorization")  # theirs
NEEDED = 8
"""Bytes that a thread of the backward kernel keeps of every token, in memory of its own."""
SHARE = 0.5
"""Of a GPU's memory that may be set aside for that: CUDA does so for every thread that could run at a time."""


class RwkvCuda(WKVProvider):
    """The original program's ``RUN_CUDA``: one thread a sequence and channel, from the first token to the last.

    It takes log w in float32 and all else in the dtype of k; ``gw`` and ``gu`` come as ``[B, C]`` and are summed. The
    longest sequence is a constant of the backward kernel, which is compiled for the longest that is asked for.
    """

    name, label = "rwkv-cuda", "RWKV-4's CUDA kernel"
    about = "transformers/kernels/rwkv of transformers 4.57.6, called as in RWKV-LM"
    language = "CUDA"
    log_decay = True

    folder: Path | None = None
    """The folder of the sources, if not that in the installed transformers."""
    lengths: tuple[int, ...] = (1024,)
    """Of the sequences that will be asked for."""

    def missing(self, device: torch.device, *, interpreted: bool = False) -> str | None:
        if reason := super().missing(device):
            return reason
        if self.sources() is None:
            return f"{_transformers()} does not ship it; give its folder with --rwkv-cuda"
        if cpp_extension.CUDA_HOME is None:
            return "needs the CUDA compiler"
        return None if cpp_extension.is_ninja_available() else "needs ninja"

    def refuses(self, which: str, inputs: Inputs) -> str | None:
        B, _, C = inputs.shape
        if which == "step":
            return "has no step"
        if inputs.dtype not in (torch.float32, torch.bfloat16):
            return "takes float32 and bfloat16 only"
        if B * C % min(C, 32):
            return "takes multiples of 32 channels only"
        return super().refuses(which, inputs)

    def too_long(self, device: torch.device, which: str, tokens: int) -> str | None:
        if "backward" not in which or tokens <= longest(device):
            return None
        return f"its backward pass sets {NEEDED} bytes a token aside for every thread of the GPU: too many"

    def leaves(self, inputs: Inputs, *, token: bool = False) -> tuple[Tensor, ...]:
        decay, u, k, v = super().leaves(inputs, token=token)
        return decay.float(), u.to(k.dtype), k, v

    def wkv(self, decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        sources = self.sources()
        assert sources is not None, "missing() says so"
        most = longest(k.device)
        tokens = max((length for length in self.lengths if length <= most), default=1)
        return _Function.apply(compiled(sources, tokens), tokens, decay, u, k, v)

    def sources(self) -> Path | None:
        """Return the folder of the sources."""
        folders = [self.folder] if self.folder else [FETCHED]
        if self.folder is None and (found := importlib.util.find_spec("transformers")) and found.origin:
            folders.insert(0, Path(found.origin).parent / "kernels" / "rwkv")
        return next((each for each in folders if all((each / name).is_file() for name in SOURCES)), None)


def longest(device: torch.device) -> int:
    """Return the longest sequence, in tokens, for whose backward pass the memory of a GPU suffices."""
    about = torch.cuda.get_device_properties(device)
    threads = about.multi_processor_count * about.max_threads_per_multi_processor
    return int(SHARE * about.total_memory) // (NEEDED * threads)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Any, tokens: int, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, y = -log_w.exp(), torch.empty_like(v)
        ctx.module, ctx.tokens = module, tokens
        ctx.save_for_backward(w, u, k, v, y)
        (module.forward_bf16 if k.dtype == torch.bfloat16 else module.forward)(w, u, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        w, u, k, v, y = ctx.saved_tensors
        if k.shape[1] > ctx.tokens:  # it would write past its own memory
            raise ValueError(f"compiled for {ctx.tokens} tokens at most, got {k.shape[1]}")
        gw, gu = (k.new_empty(k.shape[0], k.shape[2]) for _ in "wu")
        gk, gv = torch.empty_like(k), torch.empty_like(v)
        call = ctx.module.backward_bf16 if k.dtype == torch.bfloat16 else ctx.module.backward
        call(w, u, k, v, y, gy.contiguous(), gw, gu, gk, gv)
        return None, None, gw.sum(0), gu.sum(0), gk, gv


def compiled(folder: Path, tokens: int) -> Any:
    """Return the compiled extension; PyTorch keeps it in its cache of extensions."""
    module = _compile(folder, tokens)
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


@functools.cache
def _compile(folder: Path, tokens: int) -> Any:
    # A failure is kept too: what did not compile once is not tried again for every row.
    try:
        return cpp_extension.load(
            name=f"fastwkv_bench_rwkv_{tokens}",
            sources=[str(folder / name) for name in SOURCES],
            extra_cuda_cflags=[*FLAGS, f"-DTmax={tokens}"],
        )
    except Exception as error:
        return f"does not compile: {error}".partition("\n")[0]


def _transformers() -> str:
    try:
        return f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        return "no transformers that is installed here"


RWKV_CUDA = RwkvCuda()
STATELESS: dict[str, WKVProvider] = {RWKV_CUDA.name: RWKV_CUDA}
