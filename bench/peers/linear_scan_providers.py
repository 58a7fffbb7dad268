"""The providers of the linear scan, this package and its peers. No other file knows how they are called."""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers.linear_scan_inputs import Inputs
from peers.provider import Provider
from torch import Tensor

import fastwkv
from fastwkv import reference


class ScanProvider(Provider):
    """One implementation of the linear scan."""

    gates = False
    """Whether it knows real multipliers only."""
    per_token = False
    """Whether it takes a multiplier of every token only."""
    log_a = False
    """Whether it takes log a in place of a."""
    time = 1
    """The dimension of time: 1 in ``[B, T, C]``, 2 in ``[B, C, T]``."""

    def refuses(self, which: str, inputs: Inputs) -> str | None:
        if self.gates and inputs.dtype.is_complex:
            return "takes real numbers only"
        if self.per_token and inputs.fixed:
            return "takes a multiplier of every token only"
        if which == "step" and type(self).step is ScanProvider.step:
            return "has no step"
        return super().refuses(which, inputs)

    def leaves(self, inputs: Inputs, *, token: bool = False) -> Sequence[Tensor]:
        a, x = (inputs.a_0, inputs.x[:, 0]) if token else (inputs.a, inputs.x)
        # log a is rounded to the dtype of the inputs.
        return self.laid_out(a.log() if self.log_a else a), self.laid_out(x)

    def initial(self, states: Sequence[Tensor] | None, leaves: Sequence[Tensor]) -> Any:
        return None if states is None else states[0]

    def gradient_of_output(self, inputs: Inputs) -> Tensor:
        return self.laid_out(inputs.gh)

    def forward(self, leaves: Sequence[Tensor], initial: Any, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.scan(*leaves, initial, **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}))

    def one_token(self, leaves: Sequence[Tensor], initial: Any) -> Any:
        return self.step(*leaves, initial)

    def after_token(self, result: Any) -> dict[str, Tensor]:
        return {"h": result}

    def in_our_form(self, name: str, result: Tensor, inputs: Inputs) -> Tensor:
        result = self.laid_out(result)
        return result.to(inputs.a.device).double() / inputs.a.double() if name == "ga" and self.log_a else result

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return ``[B, T, C]`` as it wants it, or what it has as ``[B, T, C]``; other shapes as they are."""
        return tensor.transpose(1, self.time).contiguous() if tensor.dim() == 3 else tensor

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        """Return h."""
        raise NotImplementedError

    def step(self, a_t: Tensor, x_t: Tensor, h: Tensor) -> Tensor:
        """Return h ``[B, C]`` after one more token."""
        raise NotImplementedError

    def started(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        """Return x with the initial state in its first token, for providers that take no initial state."""
        if h0 is None:
            return x
        first, rest = x.split((1, x.shape[self.time] - 1), self.time)
        a_0 = a if a.dim() == 1 else a.narrow(self.time, 0, 1)
        return torch.cat(((a_0 * h0.unsqueeze(self.time) + first).to(x.dtype), rest), self.time)


class FastWKV(ScanProvider):
    """The public functions of this package."""

    name = label = "fastwkv"
    about = "fastwkv.linear_scan, fastwkv.linear_scan_step"
    packs = True

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        return fastwkv.linear_scan(a, x, h0, cu_seqlens=cu_seqlens)

    def step(self, a_t: Tensor, x_t: Tensor, h: Tensor) -> Tensor:
        return fastwkv.linear_scan_step(a_t, x_t, h)


class Loop(ScanProvider):
    """A loop over slices taken by ``unbind``, so that its backward pass is linear in T. All in the dtype of x."""

    name = "loop"
    label = "PyTorch loop, unbound"
    about = "a plain PyTorch loop over unbind slices"
    loops = True
    longest = 4096

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        h = torch.zeros_like(x[:, 0]) if h0 is None else h0.to(x.dtype)
        outputs = []
        multipliers = [a] * x.shape[1] if a.dim() == 1 else a.unbind(1)
        for a_t, x_t in zip(multipliers, x.unbind(1), strict=True):
            h = self.step(a_t, x_t, h)
            outputs.append(h)
        return torch.stack(outputs, 1)

    def step(self, a_t: Tensor, x_t: Tensor, h: Tensor) -> Tensor:
        return a_t * h + x_t


class AssociativeScan(ScanProvider):
    """PyTorch's own parallel scan: on a CPU a tree of whole-tensor operations, on a GPU a compiled kernel."""

    name = "associative_scan"
    label = "PyTorch's associative_scan"
    about = "torch._higher_order_ops.associative_scan: generic on a CPU, pointwise under torch.compile on a GPU"
    longest = 4096

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        return _tree(x.is_cuda)(a.expand(x.shape), self.started(a, x, h0))


@functools.cache
def _tree(compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    associative_scan = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(a: Tensor, x: Tensor) -> Tensor:
        return associative_scan(combine, (a, x), dim=1, combine_mode="pointwise" if compiled else "generic")[1]

    if not compiled:
        return scan
    # Every shape and dtype is compiled, which PyTorch gives up after a few; with fullgraph it says so.
    importlib.import_module("torch._dynamo.config").recompile_limit = 256
    return torch.compile(scan, fullgraph=True, dynamic=False)


class Reference(ScanProvider):
    """The loop of this package's reference, with float32 sums beside 16 bits."""

    name, label = "reference", "fastwkv.reference"
    about = "fastwkv.reference.linear_scan, fastwkv.reference.linear_scan_step"
    packs = loops = True
    longest = 4096

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        return reference.linear_scan(a, x, h0, cu_seqlens=cu_seqlens)

    def step(self, a_t: Tensor, x_t: Tensor, h: Tensor) -> Tensor:
        return reference.linear_scan_step(a_t, x_t, h)


class FlaRecurrent(ScanProvider):
    """The Triton kernels of flash-linear-attention that run through the tokens: h_t = exp(g_t) h_{t-1} + x_t."""

    name = "fla-recurrent"
    label = "fla fused_recurrent_hgrn"
    about = "fla.ops.hgrn.fused_recurrent_hgrn"
    packages = ("triton", "fla")
    distribution = "fla-core"
    language = "Triton"
    gates = per_token = log_a = packs = True

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        return _hgrn().fused_recurrent_hgrn(x, a, initial_state=h0, cu_seqlens=cu_seqlens)[0]

    def step(self, a_t: Tensor, x_t: Tensor, h: Tensor) -> Tensor:
        options = {"initial_state": h, "output_final_state": True}
        return _hgrn().fused_recurrent_hgrn(x_t[:, None], a_t[:, None], **options)[1]


class FlaChunk(ScanProvider):
    """The same in chunks along time. It has no gradient of the initial state."""

    name = "fla-chunk"
    label = "fla chunk_hgrn"
    about = "fla.ops.hgrn.chunk_hgrn"
    packages = ("triton", "fla")
    distribution = "fla-core"
    language = "Triton"
    gates = per_token = log_a = True

    def missing(self, device: torch.device, *, interpreted: bool = False) -> str | None:
        if interpreted:
            return "Triton's interpreter cannot run it (mask has unsupported dtype)"
        return super().missing(device)

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        return _hgrn().chunk_hgrn(x if h0 is None else self.started(a.exp(), x, h0), a)[0]


def _hgrn() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
        return importlib.import_module("fla.ops.hgrn")


class AcceleratedScan(ScanProvider):
    """The package of that name: scans along the last dimension of ``[B, C, T]``."""

    packages = ("accelerated_scan",)
    distribution = "accelerated-scan"
    per_token = True
    time = 2

    def module(self, dtype: torch.dtype) -> str:
        """Return the module whose ``scan`` is for this dtype."""
        raise NotImplementedError

    def scan(self, a: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
        return importlib.import_module(self.module(x.dtype)).scan(a, self.started(a, x, h0))


class AcceleratedScanTriton(AcceleratedScan):
    """Its Triton kernels, a real and a complex one."""

    name = label = "accelerated-scan"
    about = "accelerated_scan.scalar.scan, accelerated_scan.complex.scan"
    packages = ("triton", "accelerated_scan")
    language = "Triton"

    def missing(self, device: torch.device, *, interpreted: bool = False) -> str | None:
        # Blocks of 2048 tokens, whatever T, through which the interpreter goes one by one for every channel.
        return "takes minutes to interpret" if interpreted else super().missing(device)

    def refuses(self, which: str, inputs: Inputs) -> str | None:
        return "takes complex64 only" if inputs.dtype == torch.complex128 else super().refuses(which, inputs)

    def module(self, dtype: torch.dtype) -> str:
        return f"accelerated_scan.{'complex' if dtype.is_complex else 'scalar'}"


class AcceleratedScanWarp(AcceleratedScan):
    """Its CUDA kernels, compiled when they are first imported."""

    name = label = "accelerated-scan-warp"
    about = "accelerated_scan.warp.scan"
    language = "CUDA"
    gates = True

    def missing(self, device: torch.device, *, interpreted: bool = False) -> str | None:
        if reason := super().missing(device):
            return reason
        no_compiler = importlib.import_module("torch.utils.cpp_extension").CUDA_HOME is None
        return "needs the CUDA compiler" if no_compiler else None

    def refuses(self, which: str, inputs: Inputs) -> str | None:
        T = inputs.shape[1]
        if T & (T - 1) or not 32 <= T <= 65536:
            return "takes powers of two from 32 to 65536 for T only"
        return "does not take float64" if inputs.dtype == torch.float64 else super().refuses(which, inputs)

    def module(self, dtype: torch.dtype) -> str:
        return "accelerated_scan.warp"


class AcceleratedScanTree(AcceleratedScan):
    """The tree of whole-tensor operations that it compares its kernels with."""

    name = label = "accelerated-scan-ref"
    about = "accelerated_scan.ref.scan"

    def module(self, dtype: torch.dtype) -> str:
        return "accelerated_scan.ref"


PROVIDERS: dict[str, ScanProvider] = {
    one.name: one
    for one in (
        FastWKV(),
        Loop(),
        AssociativeScan(),
        Reference(),
        FlaRecurrent(),
        FlaChunk(),
        AcceleratedScanTriton(),
        AcceleratedScanWarp(),
        AcceleratedScanTree(),
    )
}
