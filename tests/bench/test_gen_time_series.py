"""A line of the figure of gen_time.py: how it is timed, fitted and drawn."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("matplotlib", "transformers"):
    pytest.importorskip(package)
from common import figures
from generation import figure, series


@given(st.floats(0.5, 3.0), st.floats(1e-6, 1e2), st.integers(16, 2000), st.floats(0, 1e3))
@settings(max_examples=50, deadline=None)
def test_exponent_of_a_power_law_is_its_power(power: float, scale: float, tokens: int, prompt: float) -> None:
    cumulative = [
        scale * (prompt + n**power) for n in range(tokens)
    ]  # the first token is there when the prompt is read
    assert series.exponent(cumulative) == pytest.approx(power, abs=1e-3)


def test_exponent_of_mixed_growth_lies_between() -> None:
    cumulative = [1e-3 * n + 1e-5 * n * n for n in range(1, 1025)]
    exact = (1e-3 * 400 + 2e-5 * 400**2) / (1e-3 * 400 + 1e-5 * 400**2)  # the local slope in the middle of the fit
    assert series.exponent(cumulative) == pytest.approx(exact, abs=0.05)


def test_exponent_needs_16_tokens() -> None:
    assert series.exponent([0.1 * n for n in range(1, 16)]) is None
    assert series.exponent([0.1 * n for n in range(1, 17)]) == pytest.approx(1)


def test_passes_combine_to_the_median_of_each_token() -> None:
    one = series.Series("rwkv4", "recurrent", seconds=[[1, 2, 30, 4], [1, 20, 3, 4], [10, 2, 3]])
    assert one.cumulative == [1, 3, 6, 10]
    assert series.Series("rwkv4", "recurrent").cumulative == []


def test_slow_series_makes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(3)

    monkeypatch.setitem(series.PASSES, "recurrent", 2)
    monkeypatch.setattr(series, "REPEAT_FOR", math.inf)
    quick, slow = series.Series("rwkv4", "recurrent"), series.Series("rwkv4", "recurrent")
    series.measure(quick, steps, 2, lambda: None, lambda: None)
    monkeypatch.setattr(series, "REPEAT_FOR", 0.0)
    series.measure(slow, steps, 2, lambda: None, lambda: None)
    assert (len(quick.seconds), len(slow.seconds)) == (2, 1)


def test_clock_stops_only_when_the_device_has_finished() -> None:
    events: list[str] = []

    def steps() -> Iterator[torch.Tensor]:
        while True:
            events.append("step")
            yield torch.zeros(3)

    one = series.Series("rwkv4", "recompute")
    series.measure(one, steps, 2, lambda: events.append("synchronize"), lambda: events.append("tick"))
    assert events == ["step", "synchronize", "tick"] * 2
    assert one.carried == [12, 12]
    assert len(one.cumulative) == 2


@given(st.lists(st.floats(-50, 450), min_size=1, max_size=9), st.floats(1, 40))
def test_labels_stand_apart_and_keep_their_order(positions: list[float], gap: float) -> None:
    moved = figures.spread(positions, gap, 0, 400)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    ordered = [moved[i] for i in order]
    assert all(b - a >= gap * (1 - 1e-9) for a, b in itertools.pairwise(ordered))
    assert min(moved) >= -1e-6
    assert max(moved) <= 400 + 1e-6
    room = all(b - a >= gap for a, b in zip(sorted(positions), sorted(positions)[1:], strict=False))
    if room and min(positions) >= 0 and max(positions) <= 400 - gap * (len(positions) - 1):
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(moved, positions, strict=True))


RUNS = [
    series.Series("rwkv4", "recurrent", "complete", 1, [[0.1] * 40], [150] * 40),
    series.Series("gpt-neox", "kv-cache", "interrupted", 1, [[0.1] * 20, [0.2]], [400 * n for n in range(1, 20)]),
    series.Series("bloom", "recompute", "out of memory", 1, [[0.1 * n for n in range(1, 9)]], [8] * 8),
    series.Series("opt", "recompute", "out of memory"),
    series.Series("gpt-neo", "recompute"),
]


def record(runs: list[Any]) -> dict[str, Any]:
    settings = {"layers": 1, "width": 1, "dtype": "float32", "prompt_tokens": 1}
    device = {"type": "cpu", "name": "a chip", "threads": 1}
    return {"series": [one.record() for one in runs], "settings": settings, "device": device}


@pytest.mark.parametrize("runs", [RUNS, RUNS[2:], RUNS[3:]])
def test_figure_shows_whatever_was_measured(runs: list[Any], tmp_path: Path) -> None:
    figure.draw(record(runs), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_second_panel_is_what_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figure.plt, "close", drawn.append)
    figure.draw(record(RUNS), tmp_path / "figure.png")
    time, memory = drawn[0].axes
    assert [len(line.get_ydata()) for line in time.lines] == [40, 20, 8, 1]  # a mark where memory ran out
    state, cache = (line.get_ydata() for line in memory.lines)
    assert list(state) == [150] * 40
    assert list(cache) == [400 * n for n in range(1, 20)]
    texts = [text.get_text() for text in memory.texts]
    assert "150 B, at any length" in texts
    assert "interrupted at 20" in texts
    assert any(text.startswith("4.00 s, \N{PROPORTIONAL TO} tokens") for text in (t.get_text() for t in time.texts))
