"""Conclusions from measurements of launch shapes: made-up ones, of which the answer is known."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_shapes import choice
from launch_shapes.candidates import CONFIG, PLANS, all_variants, cases, launch_of, plan_in_use

from fastwkv.kernels.config import Launch, Plan

NOW = Plan(row_bytes=200, warps=12)
WIDE = replace(NOW, block_c=64, num_warps=2)
MORE = replace(NOW, warps=24)
LARGE = choice.Cell("wkv", "bfloat16", (8, 4096, 2048), "forward")
LONG = choice.Cell("wkv", "bfloat16", (1, 65536, 1024), "forward")
CELLS = (LARGE, LONG)
CLOCKS = st.lists(st.floats(0.5, 2.0), min_size=choice.MIN_TURNS, max_size=9)  # the machine's speed, by turns


def times(seconds, clocks, noise=lambda plan, turn: 1.0):
    """Return what is measured of plans that take so long, on a machine whose clock changes from turn to turn."""
    return {
        cell: {
            launch_of(cell, plan): {turn: one / clock * noise(plan, turn) for turn, clock in enumerate(clocks)}
            for plan, one in of.items()
        }
        for cell, of in seconds.items()
    }


def propose(measured, plans=(WIDE, MORE)):
    return choice.propose(measured, NOW, plans, launch_of)


@given(clocks=CLOCKS, factor=st.floats(0.2, 5.0))
def test_ratio_is_that_of_the_times_whatever_the_clock_does(clocks, factor):
    measured = times({LARGE: {NOW: 1e-4, WIDE: factor * 1e-4}}, clocks)[LARGE]
    found = choice.ratio(measured, launch_of(LARGE, WIDE), launch_of(LARGE, NOW))
    assert found.median == pytest.approx(factor)
    assert found.spread == pytest.approx(0, abs=1e-9)


def test_ratio_of_few_turns_in_common_is_not_known():
    base, other = launch_of(LARGE, NOW), launch_of(LARGE, WIDE)
    measured = {base: dict.fromkeys(range(5), 1.0), other: dict.fromkeys((0, 1, 7), 1.0)}
    assert choice.ratio(measured, other, base) is None
    assert choice.ratio(measured, Launch(1, 1, 1), base) is None
    assert choice.ratio({**measured, other: dict.fromkeys((0, 1, 4), 2.0)}, other, base) == (2.0, 0.0)


@given(clocks=CLOCKS, wins=st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5)))
def test_plan_that_is_faster_everywhere_is_proposed_with_its_mean_win(clocks, wins):
    measured = times({cell: {NOW: 1e-4, WIDE: (1 - win) * 1e-4} for cell, win in zip(CELLS, wins, strict=True)}, clocks)
    plan, (reason,) = propose(measured)
    assert plan == reason.plan == WIDE
    assert 1 - reason.win == pytest.approx(math.sqrt((1 - wins[0]) * (1 - wins[1])))
    assert set(reason.ratios) == set(CELLS)


@given(clocks=CLOCKS, win=st.floats(0.0, 0.02))
def test_plan_that_wins_by_less_than_the_spread_is_not_proposed(clocks, win):
    noisy = times(
        {LARGE: {NOW: 1e-4, WIDE: (1 - win) * 1e-4}},
        clocks,
        lambda plan, turn: 1 + 0.05 * (plan == WIDE) * (turn % 3 - 1),
    )
    plan, reasons = propose(noisy)
    assert plan == NOW
    assert not reasons


@given(clocks=CLOCKS, loss=st.floats(0.01, 0.5))
def test_plan_that_is_slower_in_one_case_is_not_proposed(clocks, loss):
    measured = times({LARGE: {NOW: 1e-4, WIDE: 0.2e-4}, LONG: {NOW: 1e-4, WIDE: (1 + loss) * 1e-4}}, clocks)
    found = choice.compare(measured, NOW, WIDE, launch_of)
    assert found.win > 0.4
    assert found.losing == [LONG]
    assert propose(measured) == (NOW, [])


def test_the_fastest_shape_and_number_of_chunks_are_chosen_each_by_itself():
    fastest = replace(WIDE, stages=6)
    seconds = {NOW: 1e-4, WIDE: 0.9e-4, fastest: 0.8e-4}
    measured = times({LARGE: seconds, LONG: seconds | {MORE: 0.7e-4}}, [1.0] * 3)
    plan, reasons = propose(measured, (WIDE, fastest, MORE))
    assert plan == replace(fastest, warps=24)
    assert [one.plan for one in reasons] == [fastest, MORE]


def test_cases_that_a_plan_launches_alike_do_not_count():
    measured = times({LARGE: {NOW: 1e-4}, LONG: {NOW: 1e-4, MORE: 0.9e-4}}, [1.0] * 3)
    assert list(choice.compare(measured, NOW, MORE, launch_of).ratios) == [LONG]
    assert choice.compare({LARGE: measured[LARGE]}, NOW, MORE, launch_of) is None


def test_what_is_surely_slower_is_decided_and_what_is_as_fast_is_not():
    slow, close = replace(WIDE, stages=5), replace(WIDE, stages=6)
    seconds = {NOW: 1e-4, WIDE: 0.9e-4, close: 0.899e-4, slow: 1.5e-4}
    base = launch_of(LARGE, NOW)
    noisy = times({LARGE: seconds}, [1.0] * 5, lambda plan, turn: 1 + 0.01 * (plan == close) * turn)[LARGE]
    assert set(choice.undecided(noisy, base)) == {launch_of(LARGE, WIDE), launch_of(LARGE, close)}
    clear = times({LARGE: seconds}, [1.0] * 5)[LARGE]
    assert choice.undecided(clear, base) == []
    assert choice.ranked(clear, base)[0][0] == launch_of(LARGE, close)
    assert set(choice.undecided({base: {0: 1.0}}, base)) == {base}


@given(
    plan=st.builds(
        Plan, row_bytes=st.integers(1, 999), warps=st.integers(1, 99), block_c=st.sampled_from((32, 64)),
        num_warps=st.integers(1, 4), stages=st.integers(2, 9),
    )
)  # fmt: skip
def test_text_of_a_plan_makes_it_again(plan):
    assert eval(choice.plan_text(plan), {"Plan": Plan}) == plan


def test_diff_changes_the_lines_of_config_that_hold_the_plans():
    text = CONFIG.read_text()
    changed = {"WKV_FORWARD": WIDE, "SCAN_BACKWARD": MORE}
    diff = choice.config_diff(text, changed)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added == [f"{name} = {choice.plan_text(plan)}" for name, plan in changed.items()]
    removed = [line[1:] for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert len(removed) == 2
    assert all(line in text.splitlines() for line in removed)
    assert diff.startswith("--- a/kernels/config.py\n+++ b/kernels/config.py\n@@")


def test_every_plan_stands_in_config_where_a_diff_finds_it_and_no_other():
    plans = {name: replace(plan_in_use(*key), warps=97) for key, name in PLANS.items()}
    assert choice.config_diff(CONFIG.read_text(), plans).count("warps=97") == len(plans)
    with pytest.raises(ValueError, match=r"expected one line 'NOTHING = Plan\(...\)', found 0"):
        choice.config_diff(CONFIG.read_text(), {"NOTHING": NOW})


def test_every_candidate_is_a_launch_that_kernels_take():
    for case in cases():
        launches = case.launches()
        assert launches[0] == case.launch(case.now)
        assert len(launches) == len(set(launches)) > 1
        for launch in launches:
            assert launch.block_c == 32 * launch.num_warps
            assert launch.chunk % 16 == 0
            assert 0 < launch.chunk <= case.cell.shape[1]
            assert 4 <= launch.stages <= 6


def test_candidates_have_the_shapes_and_chunks_that_are_in_question():
    found = {case.cell: case.launches() for case in cases()}
    assert len(found) == 2 * 2 * 2 * 4
    shapes = {(one.block_c, one.num_warps, one.stages) for one in found[LARGE]}
    assert shapes == {(32 * n, n, stages) for n in (1, 2, 4) for stages in (4, 5, 6)}
    assert len({one.chunk for one in found[LARGE]}) == 1
    for shape in ((1, 65536, 1024), (8, 1024, 768)):
        assert len({one.chunk for one in found[LARGE._replace(shape=shape)]}) > 3
    assert all(plan != plan_in_use("wkv", "forward") for plan in all_variants(plan_in_use("wkv", "forward")))
