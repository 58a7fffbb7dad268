"""CUDA graphs: a function on a GPU is recorded once and launched as a whole.

A model that generates a token starts hundreds of small kernels, and a host takes longer to start most of them than a
GPU to run them. One launch of a graph starts them all.
"""

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules import module as hooks

_RECORDING = threading.Lock()  # all recordings on a device share one stream
_FAILED: list[torch.cuda.CUDAGraph] = []  # PyTorch's allocator of host memory may still refer to them


class RecordingError(RuntimeError):
    """A function could not be recorded."""


class Graph:
    """A function that reads and writes fixed memory, as a CUDA graph.

    Args:
        device: the GPU.
        generator: the random generator of the function. Every run takes its next numbers, as a call would.

    """

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._device = device
        self._generator = generator
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, body: Callable[[], None]) -> None:
        """Run ``body`` once, then record it, which runs nothing. Nothing waits for the device.

        A recording must not compile or set up anything, so the run does it before, on the same stream, which then needs
        no other workspace. Neither is in inference mode, since PyTorch makes tensors here that it keeps for its
        generators and for all later graphs.

        Raises:
            RecordingError: ``body`` has run, but it cannot be recorded, for example because it waits for the device.

        """
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device), _RECORDING:
            before, side = torch.cuda.current_stream(), _side_stream(self._device)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            side.wait_stream(before)
            try:
                with torch.cuda.stream(side):
                    body()
                    try:
                        _record(graph, body, self._device)
                    except BaseException as error:
                        self._release_generators()
                        if isinstance(error, RuntimeError):
                            raise RecordingError(str(error).partition("\n")[0]) from error
                        raise
            finally:
                before.wait_stream(side)
        self._graph = graph

    def _release_generators(self) -> None:
        """Make generators usable again that still wait for the end of a recording that has failed."""
        assert self._device.index is not None
        for generator in (self._generator, torch.cuda.default_generators[self._device.index]):
            generator.graphsafe_set_state(generator.clone_state())  # the same numbers, and free

    def replay(self) -> None:
        """Run the recorded function on the current stream."""
        assert self._graph is not None
        self._graph.replay()


def _record(graph: torch.cuda.CUDAGraph, body: Callable[[], None], device: torch.device) -> None:
    pool = torch.cuda.graph_pool_handle()  # known here, since a graph that fails does not tell its pool
    with _no_garbage_collection():  # it might free memory that must not be freed meanwhile
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on using the GPU
            try:
                body()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool, device)
            raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """Close the pool of a failed recording in PyTorch's allocator, wherever the recording has failed.

    ``capture_end`` undoes ``capture_begin`` step by step, and does nothing if CUDA has given up the recording. A pool
    left open slows every allocation, keeps the memory of the recording for good, and keeps the whole program from
    giving back memory that two streams have used.
    """
    old = "_cuda_endAllocateCurrentStreamToPool"  # its name in PyTorch 2.7
    end = getattr(torch._C, old, None) or getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(RuntimeError):  # it has ended, or never begun
            end(device.index, pool)
    try:
        graph.pool()  # a complete recording has one, and reset() below releases its memory
    except RuntimeError:
        _FAILED.append(graph)
        with contextlib.suppress(RuntimeError):  # it has never begun
            torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream to record on, which cannot be the default one. One is kept: cuBLAS has a workspace for each."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def why_no_graph(model: nn.Module, device: torch.device) -> str | None:
    """Return the reason for not recording ``model`` on ``device``, None if no reason is known."""
    if device.type != "cuda":
        return f"the model is on {device}, and only a GPU has CUDA graphs"
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which keeps copies of the weights for as long as it lasts"
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "all modules have forward hooks, which a graph would not call"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks, which a graph would not call"
        if module._compiled_call_impl is not None:
            return f"{name or 'the model'} is compiled, and may be compiled anew while it is recorded"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being recorded"
    return None
