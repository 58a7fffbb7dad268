"""tune.py: measuring by turns on a simulated GPU, what kernels without arithmetic do, and a rehearsal."""

import json

import pytest
import torch
import tune
from bench_scripts import assert_help_names
from launch_shapes import assumptions, candidates, kernels, report, skeleton, table, turns
from launch_shapes.choice import Cell
from simulated_gpu import CPU, SimulatedGpu

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors, which only interpreted kernels take")
KERNEL = {32: 100e-6, 64: 90e-6, 128: 130e-6}  # seconds of a pass, by the channels of a program


class Machine:
    """Cases on a simulated GPU: seconds of a pass by its launch shape, and what goes wrong."""

    def __init__(self, monkeypatch):
        self.gpu, self.calls, self.wrong, self.broken = SimulatedGpu(cache=1000), [], (), ()
        monkeypatch.setattr(turns, "call", self.call)
        monkeypatch.setattr(turns, "draw", lambda case, device, seed: (torch.ones(4),))

    def seconds(self, launch):
        return KERNEL[launch.block_c] + 1e-6 * (launch.stages - 4)

    def call(self, cell, tensors, launch):
        if launch in self.broken:
            raise RuntimeError("an illegal memory access\nwas encountered")
        self.calls.append(launch)
        self.gpu.launch(kernel=self.seconds(launch), host=1e-6)
        return (tensors[0] * (2 if launch in self.wrong else 1),) * 4

    def measure(self, cases, seconds=1e3):
        rows, trials = [], [turns.Trial(case) for case in cases]
        turns.measure(trials, self.gpu, turns.Budget(seconds, self.gpu.now), rows.append)
        return trials, rows


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def one_case(**changes):
    wanted = {"op": "wkv", "dtype": "bfloat16", "shape": (8, 4096, 2048), "which": "forward"} | changes
    return next(case for case in candidates.cases() if case.cell == Cell(**wanted))


def test_every_candidate_is_measured_and_the_fastest_is_the_fastest(machine):
    (trial,), rows = machine.measure([one_case()])
    assert {row["block_c"] for row in rows} == {32, 64, 128}
    for launch in trial.case.launches():
        assert list(trial.times[launch].values()) == pytest.approx([machine.seconds(launch)] * 3, rel=1e-6)
    last = table.latest(rows)
    assert len(last) == 9
    fastest = min(last, key=lambda row: row["ratio"])
    assert (fastest["block_c"], fastest["stages"]) == (64, 4)
    assert fastest["ratio"] == pytest.approx(0.9, rel=1e-5)
    assert fastest["compulsory_gb_per_s"] == pytest.approx(3 * 2 * 8 * 4096 * 2048 / 90e-6 / 1e9, rel=1e-3)
    assert [row["in_use"] for row in last].count(True) == 1


def test_time_that_is_over_leaves_rows_that_say_so(machine):
    cases = candidates.cases()
    _, rows = machine.measure(cases, seconds=0.2)
    skipped = [row["case"] for row in rows if "skipped" in row]
    measured = [row for row in rows if "ms" in row]
    assert measured
    assert 0 < len(skipped) < len(cases)
    assert skipped == [str(case.cell) for case in cases[-len(skipped) :]]
    assert machine.gpu.now() < 0.5


def test_undecided_cases_are_measured_again_with_those_in_question_alone(machine, monkeypatch):
    calls = []

    def seconds(launch):
        calls.append(launch)
        if launch.block_c == 128:
            return 200e-6
        return (90e-6 if launch.block_c == 64 else 91e-6) * (1 + 0.05 * (len(calls) * 7 % 11) / 11)

    monkeypatch.setattr(machine, "seconds", seconds)
    (trial,), _ = machine.measure([one_case()])
    counts = {launch: len(times) for launch, times in trial.times.items()}
    assert {count for launch, count in counts.items() if launch.block_c == 128} == {turns.ROUNDS}
    assert turns.ROUNDS < max(count for launch, count in counts.items() if launch.block_c == 64) <= turns.MOST_TURNS
    assert counts[trial.base] == max(counts.values())


def test_candidate_that_is_wrong_or_fails_is_an_error_and_leaves_the_others(machine):
    case = one_case()
    _, broken, _, wrong, *_ = case.launches()
    machine.broken, machine.wrong = (broken,), (wrong,)
    (trial,), rows = machine.measure([case])
    assert [row["error"] for row in table.latest(rows) if "error" in row] == [
        "RuntimeError: an illegal memory access",
        "ValueError: another result than that of the launch shape in use: 1.0e+00 of it",
    ]
    assert set(trial.times) == set(case.launches()) - {broken, wrong}


def test_shape_in_use_that_fails_ends_its_case(machine):
    case = one_case()
    machine.broken = (case.launches()[0],)
    (trial,), rows = machine.measure([case])
    assert trial.turns == turns.ROUNDS
    assert report.conclude(rows.append, [trial]) == {"diff": ""}


def test_winner_beyond_the_spread_is_proposed_as_a_diff(machine):
    trials, rows = machine.measure([case for case in candidates.cases() if case.cell.which == "forward"])
    diff = report.conclude(rows.append, trials)["diff"]
    proposals = [row for row in rows if row["what"] == "proposal"]
    assert {row["name"] for row in proposals} == {"WKV_FORWARD", "SCAN_FORWARD"}
    assert "+WKV_FORWARD = Plan(row_bytes=200, warps=12, block_c=64, num_warps=2)" in diff.splitlines()
    assert not [line for line in diff.splitlines() if line[0] in "+-" and "BACKWARD" in line]
    assert all(row["win"] == pytest.approx(0.1, abs=0.01) for row in proposals)


def test_figures_of_the_device_are_those_of_the_simulation(monkeypatch):
    gpu = SimulatedGpu(cache=1 << 12, counted=(3510, 2000))
    monkeypatch.setattr(assumptions, "nothing", lambda x: gpu.launch(kernel=2e-6, host=5e-6))
    monkeypatch.setattr(assumptions, "follow", lambda *chain: chain[1].fill_(end(*chain)))
    monkeypatch.setattr(assumptions, "call", lambda *_: gpu.launch(kernel=1e-4, host=1e-6))
    monkeypatch.setattr(assumptions, "draw", lambda *_: ())
    monkeypatch.setattr(assumptions, "copy_seconds", lambda cuda, size: [size / 1e12, 2 * size / 1e12, 3 * size / 1e12])
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: gpu.launch(kernel=1e-4, host=1e-6))
    rows = []
    assumptions.measure(gpu, turns.Budget(1e3, gpu.now), rows.append, rehearsal=True)
    assert not [row for row in rows if "error" in row or "skipped" in row], rows
    found = {(row["name"], row.get("beside") or row.get("where")): row.get("value") for row in rows}
    assert found["multiprocessors", None] == 132
    assert found["copy_bandwidth", None] == pytest.approx(1e12)
    assert found["launch", "stream"] == pytest.approx(2e-6, rel=1e-2)
    assert found["launch", "host"] == pytest.approx(5e-6, rel=1e-2)
    for beside in ("nothing", "copies", "wkv backward"):
        assert found["latency", beside] == pytest.approx(2e-6 / assumptions.REHEARSED.steps)
        assert found["clock", beside] == pytest.approx(1.755e9)
    assert len(gpu.loads) == 2 * assumptions.CHAINS


def end(next_index, end, counters, first, steps):
    for _ in range(steps):
        first = int(next_index[first])
    return first


@interpreted
def test_chain_of_loads_goes_through_all_memory_and_ends_where_it_should():
    chain = assumptions.Chain(SimulatedGpu(cache=1 << 12), assumptions.Scale((1,), steps=7))
    at, seen = 0, set()
    while at not in seen:
        seen.add(at)
        at = int(chain.next[at])
    assert len(seen) == len(chain.order)
    assert all(index % assumptions.LINE == 0 for index in seen)
    chain.follow(2)
    chain.check(2)
    with pytest.raises(RuntimeError, match="the chain of loads ended at"):
        chain.check(1)
    chain.follow = lambda part: chain.end.fill_(int(chain.order[(part + 1) * chain.steps]))
    with pytest.raises(RuntimeError, match="the load ended before the chain beside it"):
        chain.measure(lambda: None, 1)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bare_patterns_read_and_write_every_element(dtype):
    B, T, C, rows = 2, 64, 64, 16
    k, v, gy = (torch.randn(B, T, C).to(dtype) for _ in range(3))
    options = {"C": C, "ROWS": rows, "STAGES": 4, "BLOCK_C": 32}
    y, sums = torch.empty_like(k), torch.empty(B * 2, C)
    kernels.forward_pattern[B * 2, 2](k, v, y, sums, T, 32, **options)
    torch.testing.assert_close(y, k + v)
    kernels.forward_pattern[B * 2, 2](k, v, None, sums, T, 32, **options)
    both = k.float() + v.float()
    torch.testing.assert_close(sums, both.view(B * 2, 32, C).sum(1), rtol=1e-5, atol=1e-5)
    state = torch.randn(B, 3 * T // rows, C)
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    kernels.backward_pattern[B, 2](k, v, gy, state, gk, gv, T, **options)
    of_tile = state.view(B, T // rows, 3, C).sum(2).repeat_interleave(rows, 1)
    torch.testing.assert_close(gk, (both + of_tile).to(dtype))
    torch.testing.assert_close(gv, (both * gy).to(dtype))


def test_pattern_counts_the_bytes_that_its_tensors_have():
    for one in skeleton.patterns():
        tensors = one.tensors((2, 64, 128), CPU, torch.zeros)
        streams = [t for t in tensors if t.dim() == 3]
        assert one.moved((2, 64, 128)) == sum(t.nbytes for t in streams)


def test_slice_that_stays_in_the_cache_saves_what_reading_it_took():
    found = skeleton.slice_row({"summary": 10e-6, "finish": 12e-6, "pair": 16e-6})
    assert found["us_finish_right_after"] == pytest.approx(6)
    assert found["saved"] == pytest.approx(0.5)
    assert skeleton.slice_row({"summary": 10e-6, "finish": 12e-6, "pair": 22e-6})["saved"] == pytest.approx(0)


@interpreted
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("op", ["wkv", "linear_scan"])
def test_empty_tensors_are_like_those_that_are_measured(op, which):
    case = next(one for one in candidates.cases(rehearsal=True) if (one.cell.op, one.cell.which) == (op, which))
    drawn, empty = candidates.draw(case, CPU, 0), candidates.empty(case)
    assert [(t.shape, t.dtype) for t in drawn] == [(t.shape, t.dtype) for t in empty]


def test_launches_have_names_of_their_own_and_every_part_has_some():
    names = [name for part in (assumptions, candidates, skeleton) for name, _ in part.launches()]
    assert len(names) == len(set(names))
    for part in ("chain of loads", "nothing", "skeleton", "slice, summary", "wkv forward", "linear_scan backward"):
        assert any(name.startswith(part) for name in names)


@interpreted
def test_rehearsal_reaches_every_part_and_its_rows_are_lines_of_json(tmp_path, capsys):
    assert tune.main(["--rehearse", "--rows", "--seconds", "100000", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert {row["what"] for row in rows} == {"assumption", "candidate", "skeleton", "l2"}
    assert not [row for row in rows if "error" in row or "skipped" in row]
    record = json.loads((tmp_path / "tune.json").read_text())
    assert record["settings"]["rehearsal"] is True
    assert len(record["rows"]) == len(table.latest(rows)) == len(rows)
    assert "a rehearsal: times mean nothing" in printed.err
    assert len(printed.err.encode()) < 10_000
    for said in ("latency, copies: ", "wkv forward bfloat16 8x4096x2048: [", "L2: ", "reads and writes, backward"):
        assert said in printed.err
    assert not (tmp_path / "tune.diff").exists()


@interpreted
def test_part_that_fails_is_said_and_the_program_ends_with_status_1(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(skeleton.Pattern, "run", broken)
    monkeypatch.setattr(skeleton, "summarise", broken)
    assert tune.main(["--rehearse", "--parts", "skeleton,l2", "--seconds", "9", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no such thing" in capsys.readouterr().out
    record = json.loads((tmp_path / "tune.json").read_text())
    assert {row["what"] for row in record["rows"] if "error" in row} == {"skeleton", "l2"}


def test_budget_is_shared_and_never_grows():
    clock = [0.0]
    budget = turns.Budget(60, lambda: clock[0])
    share = budget.share(0.25)
    assert share.left() == 15
    clock[0] = 20
    assert (budget.left(), share.left()) == (40, -5)
    assert budget.share(1.0).left() == 40
    clock[0] = 70
    assert budget.share(1.0).left() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here; --rehearse goes through all of it on a CPU"),
        (["--rehearse", "--parts", "all"], "unknown part 'all'"),
        (["--rehearse", "--seconds", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_arguments_that_are_wrong_are_refused(refused, arguments, message):
    if not arguments and torch.cuda.is_available():
        pytest.skip("it would measure")
    refused(tune, arguments, message)


def test_help_names_every_option(capsys):
    assert_help_names(tune, "parts seconds rows rehearse out", capsys)
