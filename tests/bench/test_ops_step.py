"""One token inside a CUDA graph, on a device that is simulated: what is recorded, what is timed, what fails."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_scripts import measured
from peers import operators
from simulated_gpu import CPU, Simulated
from throughput import passes
from timing import by_turns as timing
from timing import on_gpu as cuda_timing
from torch.utils._pytree import tree_leaves

EFFORT = timing.Effort(repeats=5, seconds=1e-3, turn=1e-3)


def test_step_in_a_graph_waits_for_no_launch() -> None:
    simulated = Simulated()

    def step(state: torch.Tensor) -> torch.Tensor:
        simulated.launch(kernel=2e-6, host=30e-6)
        return 0.5 * state + 1

    task = cuda_timing.StepTask(
        step, CPU, cuda=simulated, make=lambda: torch.zeros(3), following=lambda made, result: result
    )
    figures = measured(task, EFFORT)
    assert figures["ms_graph"] == pytest.approx(2e-3, rel=1e-3)
    assert figures["ms_host"] == pytest.approx(30e-3, rel=1e-3)
    assert task.seconds


def launching(task: Any) -> Any:
    """Have every call of a task queue a kernel."""
    call = task.call

    def launched(prepared: Any) -> Any:
        task.cuda.launch(kernel=2e-6, host=30e-6)
        return call(prepared)

    task.call = launched
    return task


@pytest.mark.parametrize("name", ["wkv", "linear_scan", "linear_scan_fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_step_is_recorded_with_its_state_carried(name: str, dtype: torch.dtype) -> None:
    operator, simulated = operators.OPERATORS[name], Simulated()
    inputs = operator.draw("ordinary", (2, 4, 5), dtype, 0)
    task = launching(passes.cuda_task(operator, operator.providers["fastwkv"], "step", inputs, simulated))
    measured(task, EFFORT)
    made = task.make()
    first = result = task.call(made)
    for _ in range(cuda_timing.STEPS - 1):
        result = task.call(replace(made, initial=result[1] if name == "wkv" else result))
    found, wanted, before = map(tree_leaves, (simulated.recorded, result, first))
    assert all(map(torch.equal, found, wanted))
    assert not any(map(torch.equal, found, before))


def test_steps_of_peers_are_not_recorded() -> None:
    operator = operators.OPERATORS["wkv"]
    inputs = operator.draw("ordinary", (2, 4, 5), torch.float32, 0)
    task = launching(passes.cuda_task(operator, operator.providers["loop"], "step", inputs, Simulated()))
    assert "ms_graph" not in measured(task, EFFORT)


@pytest.mark.parametrize(
    ("spoilt", "message"), [("counts", "another result in a CUDA graph"), ("waits", "waits for the device")]
)
def test_step_that_a_graph_cannot_hold_fails(spoilt: str, message: str) -> None:
    calls = []

    def step(state: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        # The one is a number of Python's, which a graph keeps; the other takes a number from the device.
        return state + (len(calls) if spoilt == "counts" else state.sum().item())

    task = launching(cuda_timing.StepTask(step, CPU, cuda=Simulated(), make=lambda: torch.ones(3)))
    _, task.first = task.run()
    timing.measure([task], EFFORT, lambda: None)
    assert message in str(task.failure)
