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


class Memory:
    """What PyTorch's allocator keeps of recordings: which allocate from their pool, and how many use a pool."""

    def __init__(self) -> None:
        self.underway: set[tuple[int, int]] = set()
        self.users: dict[tuple[int, int], int] = {}
        self.failing: str | None = None

    def handle(self) -> tuple[int, int]:
        return 0, len(self.users) + 1

    def begin(self, pool: tuple[int, int]) -> None:
        self.underway.add(pool)
        self.users[pool] = self.users.get(pool, 0) + 1

    def end(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 0
        if pool not in self.underway:
            raise RuntimeError("not recording to this pool")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 0
        if not self.users.get(pool):
            raise RuntimeError("unknown pool")
        self.users[pool] -= 1

    def fail(self, place: str) -> None:
        if self.failing == place:
            raise RuntimeError(place)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> list[str]:
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
        _complete = False

        def register_generator_state(self, generator: Any) -> None:
            assert not torch.is_inference_mode_enabled()
            log.append("register generator")

        def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
            assert not torch.is_inference_mode_enabled()
            memory.fail("before all")
            log.append(f"begin {capture_error_mode}")
            self._pool, self._complete = pool, False
            memory.begin(pool)
            memory.fail("at the begin")

        def capture_end(self) -> None:
            assert not torch.is_inference_mode_enabled()
            log.append("end")
            if "fails" in log:
                raise RuntimeError("capture was invalidated")
            memory.fail("at the end")
            memory.end(0, self._pool)
            memory.fail("without a graph")
            self._complete = True
            memory.fail("at its instance")

        def pool(self) -> tuple[int, int]:
            if not self._complete:
                raise RuntimeError("no successful capture")
            return self._pool

        def reset(self) -> None:
            if self._complete:
                memory.release(0, self._pool)
                self._complete = False

        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def entered(name: str) -> Any:
        log.append(f"enter {name}")
        try:
            yield
        finally:
            log.append(f"leave {name}")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", memory.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", memory.release, raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", memory.handle)
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


PLACES = ("before all", "at the begin", "at the end", "without a graph", "at its instance", None)


FAILURES = [(place, error) for place in PLACES for error in (RuntimeError, ValueError, KeyboardInterrupt, None)]


@pytest.mark.parametrize(("place", "error"), FAILURES[:-1])  # the last is none
def test_failed_recording_leaves_allocator_and_generators_as_they_were(
    place: str | None, error: type[BaseException] | None, log: list[str], memory: Memory
) -> None:
    def body() -> None:
        if "begin thread_local" in log and error is not None:
            raise error("of the body")

    memory.failing = place
    early = place in PLACES[:2]
    expected = RecordingError if early or error in (RuntimeError, None) else error
    assert expected is not None
    with pytest.raises(expected, match=f"^{place if early or error is None else 'of the body'}$"):
        Graph(CUDA, torch.cuda.default_generators[0]).capture(body)
    assert not memory.underway
    assert not any(memory.users.values())
    assert log[-4:] == [*["new state"] * 2, "leave side", "caller waits for side"]
    assert gc.isenabled()
    assert (len(cuda_graph._FAILED) == 1) == (place not in ("at its instance", None))

    memory.failing = None
    log.clear()
    graph = Graph(CUDA, torch.cuda.default_generators[0])
    graph.capture(lambda: None)  # the next is free to try
    graph.replay()
    assert not memory.underway
    assert sum(memory.users.values()) == 1


def test_pool_is_closed_by_its_older_name_too(log: list[str], memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", memory.end, raising=False)
    memory.failing = "at the end"
    with pytest.raises(RecordingError, match="at the end"):
        Graph(CUDA, torch.cuda.default_generators[0]).capture(lambda: None)
    assert not memory.underway
    assert not any(memory.users.values())


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
