"""Timing on a GPU, on a device that is simulated: a queue, a clock of its own and one of the host."""

import gc
import weakref

import pytest
import torch
from bench_scripts import measured
from peers import operators
from simulated_gpu import CPU, Simulated
from throughput import passes
from timing import by_turns as timing
from timing import on_gpu as cuda_timing

EFFORT = timing.Effort(repeats=5, seconds=1e-3, turn=1e-3)


def test_launches_on_the_host_are_not_device_time() -> None:
    simulated = Simulated()

    def call(_: None) -> None:
        for _ in range(5):
            simulated.launch(kernel=20e-6, host=30e-6)

    figures = measured(cuda_timing.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["ms"] == pytest.approx(0.1, rel=1e-6)
    assert figures["quantiles"]["0.9"] == pytest.approx(0.1, rel=1e-6)
    assert figures["ms_host"] == pytest.approx(0.15, rel=1e-6)
    assert figures["head_start"] is True
    assert figures["repeats"] >= 5


def test_group_that_was_queued_too_late_does_not_count() -> None:
    simulated, calls = Simulated(), []

    def call(_: None) -> None:
        calls.append(simulated.clock)
        together = len(calls) > 1 and calls[-1] - calls[-2] < 1e-3 and simulated.free > simulated.clock
        simulated.launch(kernel=10e-6, host=130e-6 if together else 30e-6)  # slower than by itself

    figures = measured(cuda_timing.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["head_start"] is True
    assert figures["ms"] == pytest.approx(0.01, rel=1e-6)
    assert figures["ms_min"] == pytest.approx(0.01, rel=1e-6)
    assert max(simulated.slept) > 1.9 * min(simulated.slept)


def test_call_that_waits_for_the_device_has_no_head_start() -> None:
    simulated = Simulated()

    def call(_: None) -> None:
        simulated.launch(kernel=10e-6, host=30e-6)
        simulated.synchronize()

    figures = measured(cuda_timing.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["head_start"] is False
    assert figures["ms"] == pytest.approx(0.04, rel=1e-2)
    assert len(simulated.slept) == cuda_timing.TRIES


def test_call_that_queues_for_long_is_not_tried_with_a_head_start() -> None:
    simulated = Simulated()
    task = cuda_timing.CudaTask(lambda _: simulated.launch(1e-6, 8e-3), CPU, cuda=simulated)
    figures = measured(task, EFFORT)
    assert figures["head_start"] is False
    assert figures["repeats"] >= EFFORT.repeats
    assert not simulated.slept


def test_calls_that_would_fill_the_queue_are_fewer_in_a_group() -> None:
    simulated, most = Simulated(), cuda_timing.LONG_QUEUING

    def call(_: None) -> None:
        simulated.launch(kernel=10e-6, host=1e-3)
        simulated.queued += 1
        if simulated.queued > most / 1e-3:  # the host waits
            simulated.synchronize()

    figures = measured(cuda_timing.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["head_start"] is True
    assert figures["ms"] == pytest.approx(0.01, rel=1e-6)


def test_short_calls_are_enough_after_a_number_of_measurements() -> None:
    simulated = Simulated()
    task = cuda_timing.CudaTask(lambda _: simulated.launch(kernel=2e-6, host=20e-6), CPU, cuda=simulated)
    _, task.first = task.run()
    timing.measure([task], timing.Effort(repeats=5, seconds=1.0, turn=1e-3, most=40), lambda: None)
    assert 40 <= len(task.seconds) < 120
    assert task.spent() < 0.1


def test_short_calls_are_timed_several_together() -> None:
    simulated, calls = Simulated(), []

    def call(_: None) -> None:
        calls.append(None)
        simulated.launch(kernel=2e-6, host=1e-6)

    task = cuda_timing.CudaTask(call, CPU, cuda=simulated)
    task.first = 1e-5
    task.take_turn(EFFORT)  # by themselves they seem longer
    before, count = len(calls), len(task.seconds)
    task.take_turn(EFFORT)
    assert 10 * (len(task.seconds) - count) < len(calls) - before <= cuda_timing.QUEUED + cuda_timing.HOST_CALLS
    assert task.seconds[-1] == pytest.approx(2e-6, rel=1e-6)
    assert task.spent() > 5 * sum(task.seconds)


class Thing:
    """What can be seen to be gone."""


def test_inputs_and_results_are_taken_in_turn_and_freed_after_it() -> None:
    simulated, copies = Simulated(), 3
    made: weakref.WeakSet[Thing] = weakref.WeakSet()
    results: weakref.WeakSet[Thing] = weakref.WeakSet()
    seen: list[int] = []

    def make() -> Thing:
        made.add(one := Thing())
        return one

    def call(one: Thing) -> Thing:
        simulated.launch(kernel=200e-6, host=1e-6)
        assert len(results) >= min(len(seen), copies)  # the allocator cannot give out their memory again
        seen.append(id(one))
        results.add(result := Thing())
        return result

    task = cuda_timing.CudaTask(call, CPU, cuda=simulated, make=make, copies=copies)
    task.take_turn(EFFORT)
    assert len(seen) >= 8
    assert len(set(seen[-copies:])) == copies
    assert len(set(seen)) == copies
    gc.collect()
    assert not made
    assert not results


def test_no_more_graphs_are_prepared_than_there_are_copies() -> None:
    simulated, alive, most = Simulated(), [0], []

    def prepare(_: None) -> None:
        alive[0] += 1
        most.append(alive[0])

    def call(_: None) -> None:
        alive[0] -= 1
        simulated.launch(kernel=1e-6, host=1e-6)

    measured(cuda_timing.CudaTask(call, CPU, cuda=simulated, prepare=prepare, copies=4, holds=True), EFFORT)
    assert max(most) == 4


def test_peak_is_that_of_the_call_alone() -> None:
    simulated = Simulated()

    def call(_: None) -> None:
        simulated.allocate(300)
        simulated.allocate(-200)
        simulated.launch(1e-6, 1e-6)

    task = cuda_timing.CudaTask(call, CPU, cuda=simulated, prepare=lambda _: simulated.allocate(5000))
    assert measured(task, EFFORT)["peak_bytes"] == 300


@pytest.mark.parametrize(("which", "cache", "copies"), [("forward", 10, 1), ("forward", 2000, 5), ("step", 2000, 16)])
def test_copies_are_as_many_as_the_cache_cannot_hold(which: str, cache: int, copies: int) -> None:
    operator = operators.OPERATORS["wkv"]
    inputs = operator.draw("ordinary", (2, 16, 5), torch.float32, 0)  # 1920 bytes forward
    task = passes.cuda_task(operator, operator.providers["fastwkv"], which, inputs, Simulated(cache))
    assert task.copies == copies
    results, task.first = task.run()
    wanted = operator.expected(inputs, state=False) if which == "forward" else operator.expected_step(inputs)
    assert max(passes.errors(operator, operator.providers["fastwkv"], which, inputs, results, wanted).values()) < 1e-6


def test_backward_prepares_its_graphs_before_it_is_timed() -> None:
    operator = operators.OPERATORS["linear_scan"]
    inputs = operator.draw("ordinary", (2, 16, 5), torch.complex64, 0)
    task = passes.cuda_task(operator, operator.providers["fastwkv"], "backward", inputs, Simulated(10000))
    assert task.holds
    output, _ = task.prepare(task.make())
    assert output.grad_fn is not None


def test_copy_bandwidth_is_the_largest_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Simulated()
    copy = torch.Tensor.copy_

    def slow(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        simulated.launch(kernel=1e-6 * (1 + source.nbytes / 1000), host=1e-6)
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", slow)
    monkeypatch.setattr(cuda_timing, "COPIED", (1000, 4000))
    assert cuda_timing.copy_bandwidth(simulated) == pytest.approx(2 * 4000 / 5e-6 / 1e9, rel=1e-3)
