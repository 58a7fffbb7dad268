"""Timing by turns on a CPU, and on a GPU that is simulated: a queue, a clock of its own and one of the host."""

import gc
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_scripts import measured
from peers.operators import OPERATORS
from simulated_gpu import CPU, Simulated
from throughput import passes
from timing import by_turns, on_gpu
from timing.saved_bytes import kept_bytes
from torch.utils._pytree import tree_leaves

EFFORT = by_turns.Effort(repeats=5, seconds=1e-3, turn=1e-3)


def test_tasks_take_turns_and_neither_first_runs_nor_preparations_count(monkeypatch):
    events, clock = [], [0.0]
    monkeypatch.setattr(by_turns, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def pass_time(name, seconds):
        events.append(name)
        clock[0] += seconds

    tasks = [
        by_turns.Task(lambda _, name=name: pass_time(name, 0.01), CPU, lambda name=name: pass_time(f"before {name}", 8))
        for name in "ab"
    ]
    for task in tasks:
        task.first = 2 * by_turns.SLOW
    finished = []
    by_turns.measure(tasks, by_turns.Effort(repeats=2, seconds=0.0, turn=0.0), lambda: finished.append(None))
    # From the second turn on the task is known to be quick, so that its turn begins with a run that does not count.
    assert events == ["before a", "a", "before b", "b"] + 2 * ["before a", "a"] + 2 * ["before b", "b"]
    assert [task.seconds for task in tasks] == [pytest.approx([0.01] * 2)] * 2
    assert len(finished) == 2


def test_call_that_takes_very_long_is_measured_once():
    task = by_turns.Task(lambda _: pytest.fail("ran again"), CPU, first=by_turns.FULL.once + 1)
    by_turns.measure([task], by_turns.FULL, lambda: None)
    assert task.figures()["repeats"] == 1
    assert task.figures()["ms"] == pytest.approx(1e3 * (by_turns.FULL.once + 1))


def test_task_that_fails_leaves_the_others():
    def fail(_):
        raise RuntimeError("no luck")

    tasks = [by_turns.Task(call, CPU, first=1e-3) for call in (fail, lambda _: None)]
    finished = []
    by_turns.measure(tasks, by_turns.Effort(repeats=2, seconds=0.0, turn=0.0), lambda: finished.append(None))
    assert [str(task.failure) for task in tasks] == ["no luck", "None"]
    assert len(tasks[1].seconds) == len(finished) == 2


def test_work_of_other_processes_shows():
    began, others = time.monotonic(), by_turns.OtherWork()
    if others.seen is None:
        pytest.skip("the system does not tell")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        while cpu_seconds(process.pid) < 0.5:  # which last the longer, the less of a core the process gets
            time.sleep(0.05)
        busy = others.cores()
        process.kill()
    # The system counts in ticks, of 1/100 s mostly, and whom a tick finds at work is charged all of it: half of what
    # the process has used is what 25 ticks of 50 show.
    assert busy * (time.monotonic() - began) > 0.25


def cpu_seconds(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, the 14th and 15th


class Keeping(torch.autograd.Function):
    """Keeps on its context too."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = (x.double(),)
        ctx.save_for_backward(x, x.half())
        return x.clone()

    @staticmethod
    def backward(ctx, gx):
        return gx


def test_bytes_that_a_graph_keeps_are_counted_once():
    x = torch.randn(100, requires_grad=True)
    exponential = x.exp()
    assert kept_bytes((exponential * exponential).sin(), [x]) == 2 * 400  # e^x, twice used, and its square
    assert kept_bytes(x.sin(), [x]) == kept_bytes(x.exp(), [x]) == 0
    assert kept_bytes(Keeping.apply(x), [x]) == 800 + 200


def test_launches_on_the_host_are_not_device_time():
    simulated = Simulated()

    def call(_):
        for _ in range(5):
            simulated.launch(kernel=20e-6, host=30e-6)

    figures = measured(on_gpu.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["ms"] == figures["quantiles"]["0.9"] == pytest.approx(0.1, rel=1e-6)
    assert figures["ms_host"] == pytest.approx(0.15, rel=1e-6)
    assert figures["head_start"] is True
    assert figures["repeats"] >= 5


def test_group_that_was_queued_too_late_does_not_count():
    simulated, calls = Simulated(), []

    def call(_):
        calls.append(simulated.clock)
        together = len(calls) > 1 and calls[-1] - calls[-2] < 1e-3 and simulated.free > simulated.clock
        simulated.launch(kernel=10e-6, host=130e-6 if together else 30e-6)  # slower than by itself

    figures = measured(on_gpu.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["head_start"] is True
    assert figures["ms"] == pytest.approx(0.01, rel=1e-6)
    assert figures["ms_min"] == pytest.approx(0.01, rel=1e-6)
    assert max(simulated.slept) > 1.9 * min(simulated.slept)


def test_call_that_waits_for_the_device_has_no_head_start():
    simulated = Simulated()

    def call(_):
        simulated.launch(kernel=10e-6, host=30e-6)
        simulated.synchronize()

    figures = measured(on_gpu.CudaTask(call, CPU, cuda=simulated), EFFORT)
    assert figures["head_start"] is False
    assert figures["ms"] == pytest.approx(0.04, rel=1e-2)
    assert len(simulated.slept) == on_gpu.TRIES


def test_short_calls_are_timed_several_together_and_not_for_ever():
    simulated, calls = Simulated(), []

    def call(_):
        calls.append(None)
        simulated.launch(kernel=2e-6, host=1e-6)

    task = on_gpu.CudaTask(call, CPU, cuda=simulated, first=1e-5)
    task.take_turn(EFFORT)  # by themselves they seem longer
    before, count = len(calls), len(task.seconds)
    task.take_turn(EFFORT)
    assert 10 * (len(task.seconds) - count) < len(calls) - before <= on_gpu.QUEUED + on_gpu.HOST_CALLS
    assert task.seconds[-1] == pytest.approx(2e-6, rel=1e-6)
    assert task.spent() > 5 * sum(task.seconds)
    by_turns.measure([task], by_turns.Effort(repeats=5, seconds=1.0, turn=1e-3, most=40), lambda: None)
    assert 40 <= len(task.seconds) < 120


class Thing:
    """An object that can be seen to be gone."""


def test_inputs_and_results_are_taken_in_turn_and_freed_after_it():
    simulated, copies, seen = Simulated(), 3, []
    made, results = weakref.WeakSet(), weakref.WeakSet()

    def make():
        made.add(one := Thing())
        return one

    def call(one):
        simulated.launch(kernel=200e-6, host=1e-6)
        assert len(results) >= min(len(seen), copies)  # the allocator cannot give out their memory again
        seen.append(id(one))
        results.add(result := Thing())
        return result

    on_gpu.CudaTask(call, CPU, cuda=simulated, make=make, copies=copies).take_turn(EFFORT)
    assert len(seen) >= 8
    assert len(set(seen[-copies:])) == len(set(seen)) == copies
    gc.collect()
    assert not made
    assert not results


def test_no_more_graphs_are_prepared_than_there_are_copies():
    simulated, alive, most = Simulated(), [0], []

    def prepare(_):
        alive[0] += 1
        most.append(alive[0])

    def call(_):
        alive[0] -= 1
        simulated.launch(kernel=1e-6, host=1e-6)

    measured(on_gpu.CudaTask(call, CPU, cuda=simulated, prepare=prepare, copies=4, holds=True), EFFORT)
    assert max(most) == 4


def test_peak_is_that_of_the_call_alone():
    simulated = Simulated()

    def call(_):
        simulated.allocate(300)
        simulated.allocate(-200)
        simulated.launch(1e-6, 1e-6)

    task = on_gpu.CudaTask(call, CPU, cuda=simulated, prepare=lambda _: simulated.allocate(5000))
    assert measured(task, EFFORT)["peak_bytes"] == 300


def cuda_task(name, provider, which, cuda, dtype=torch.float32):
    operator = OPERATORS[name]
    inputs = operator.draw("ordinary", (2, 16, 5), dtype, 0)  # of WKV 1920 bytes forward
    return passes.cuda_task(operator, operator.providers[provider], which, inputs, cuda)


@pytest.mark.parametrize(("which", "cache", "copies"), [("forward", 10, 1), ("forward", 2000, 5), ("step", 2000, 16)])
def test_copies_are_as_many_as_the_cache_cannot_hold(which, cache, copies):
    assert cuda_task("wkv", "fastwkv", which, Simulated(cache)).copies == copies


def test_backward_prepares_its_graphs_before_it_is_timed():
    task = cuda_task("linear_scan", "fastwkv", "backward", Simulated(10000), torch.complex64)
    assert task.holds
    output, _ = task.prepare(task.make())
    assert output.grad_fn is not None


def test_copy_bandwidth_is_the_largest_of_several_sizes(monkeypatch):
    simulated, copy = Simulated(), torch.Tensor.copy_

    def slow(target, source):
        simulated.launch(kernel=1e-6 * (1 + source.nbytes / 1000), host=1e-6)
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", slow)
    monkeypatch.setattr(on_gpu, "COPIED", (1000, 4000))
    assert on_gpu.copy_bandwidth(simulated) == pytest.approx(2 * 4000 / 5e-6 / 1e9, rel=1e-3)


def launching(task):
    """Have every call of a task queue a kernel."""
    call = task.call

    def launched(prepared):
        task.cuda.launch(kernel=2e-6, host=30e-6)
        return call(prepared)

    task.call = launched
    return task


@pytest.mark.parametrize("name", OPERATORS)
def test_our_step_is_recorded_with_its_state_carried_and_waits_for_no_launch(name):
    simulated = Simulated()
    task = launching(cuda_task(name, "fastwkv", "step", simulated, torch.bfloat16))
    figures = measured(task, EFFORT)
    assert figures["ms_graph"] == pytest.approx(2e-3, rel=1e-3)
    assert figures["ms_host"] == pytest.approx(30e-3, rel=1e-3)
    made = task.make()
    first = result = task.call(made)
    for _ in range(on_gpu.STEPS - 1):
        result = task.call(replace(made, initial=result[1] if name == "wkv" else result))
    found, wanted, before = map(tree_leaves, (simulated.recorded, result, first))
    assert all(map(torch.equal, found, wanted))
    assert not any(map(torch.equal, found, before))


def test_steps_of_peers_are_not_recorded():
    assert "ms_graph" not in measured(launching(cuda_task("wkv", "loop", "step", Simulated())), EFFORT)


@pytest.mark.parametrize(
    ("spoilt", "message"), [("counts", "another result in a CUDA graph"), ("waits", "waits for the device")]
)
def test_step_that_a_graph_cannot_hold_fails(spoilt, message):
    calls = []

    def step(state):
        calls.append(None)
        # The one is a number of Python's, which a graph keeps; the other takes a number from the device.
        return state + (len(calls) if spoilt == "counts" else state.sum().item())

    task = launching(on_gpu.StepTask(step, CPU, cuda=Simulated(), make=lambda: torch.ones(3)))
    _, task.first = task.run()
    by_turns.measure([task], EFFORT, lambda: None)
    assert message in str(task.failure)
