"""How a CUDA graph is recorded, with PyTorch's part of it replaced by one that writes down what it is asked for."""

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rwkv4_models import trained
from torch import nn

from fastwkv.nn import cuda_graph
from fastwkv.nn.cuda_graph import Graph, RecordingError, why_no_graph

CUDA = torch.device("cuda", 0)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, in order."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Generator:
        def clone_state(self) -> str:
            return "state"

        def graphsafe_set_state(self, state: str) -> None:
            log.append(f"new {state}")

    class FakeGraph:
        def register_generator_state(self, generator: Any) -> None:
            assert not torch.is_inference_mode_enabled()
            log.append("register generator")

        def capture_begin(self, capture_error_mode: str) -> None:
            assert not torch.is_inference_mode_enabled()
            log.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            assert not torch.is_inference_mode_enabled()
            log.append("end")
            if "fails" in log:
                raise RuntimeError("capture was invalidated")

        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def entered(name: str) -> Any:
        log.append(f"enter {name}")
        try:
            yield
        finally:
            log.append(f"leave {name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "default_generators", [Generator()])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("caller"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graph, "_FAILED", [])
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: Stream("side"))
    return log


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode, torch.enable_grad])
def test_body_runs_once_and_is_recorded_on_the_stream_it_ran_on(mode: Any, log: list[str]) -> None:
    def body() -> None:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        log.append("body" if gc.isenabled() else "body without collections")

    graph = Graph(CUDA, torch.cuda.default_generators[0])
    with mode():
        graph.capture(body)
    assert log == [
        "register generator",
        "side waits for caller",
        "enter side",
        "body",
        "begin thread_local",
        "body without collections",
        "end",
        "leave side",
        "caller waits for side",
    ]
    assert gc.isenabled()
    log.clear()
    graph.replay()
    assert log == ["replay"]


def test_failed_recording_ends_and_says_why(log: list[str]) -> None:
    def body() -> None:
        if "begin thread_local" in log:
            log.append("fails")
            raise RuntimeError("cannot wait here\nsecond line")

    with pytest.raises(RecordingError, match=r"^cannot wait here$"):
        Graph(CUDA, torch.cuda.default_generators[0]).capture(body)
    assert log[log.index("fails") :] == ["fails", "end", *["new state"] * 2, "leave side", "caller waits for side"]
    assert gc.isenabled()
    log.clear()
    Graph(CUDA, torch.cuda.default_generators[0]).capture(lambda: None)  # the next is free to try


def test_failure_of_the_body_itself_is_no_failed_recording(log: list[str]) -> None:
    def body() -> None:
        raise RuntimeError("wrong shape")

    with pytest.raises(RuntimeError, match="wrong shape") as caught:
        Graph(CUDA, torch.cuda.default_generators[0]).capture(body)
    assert not isinstance(caught.value, RecordingError)
    assert "begin thread_local" not in log
    assert log[-1] == "caller waits for side"


def test_reasons_against_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = trained()
    assert why_no_graph(model, CUDA) is None
    assert why_no_graph(model, torch.device("cpu")) == "the model is on cpu, and only a GPU has CUDA graphs"
    with monkeypatch.context() as patch:  # without a GPU autocast stays off
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert str(why_no_graph(model, CUDA)).startswith("autocast is on")
    everywhere = nn.modules.module.register_module_forward_hook
    for register in (model.register_forward_hook, model.blocks[1].attention.register_forward_pre_hook, everywhere):
        handle = register(lambda *_: None)
        assert "forward hooks, which a graph" in str(why_no_graph(model, CUDA))
        handle.remove()
    model.blocks[0]._compiled_call_impl = print  # what compile() sets
    assert str(why_no_graph(model, CUDA)).startswith("blocks.0 is compiled")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert why_no_graph(trained(), CUDA) == "it is being compiled"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_no_graph(SimpleNamespace(named_modules=list), CUDA) == "another graph is being recorded"  # type: ignore[arg-type]
