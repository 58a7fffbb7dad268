"""A series of gen_time.py: timing, fit, table and figure."""

import itertools
import math

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
def test_exponent_of_a_power_law_is_its_power(power, scale, tokens, prompt):
    cumulative = [scale * (prompt + n**power) for n in range(tokens)]  # the first token is there with the prompt
    assert series.exponent(cumulative) == pytest.approx(power, abs=1e-3)


def test_exponent_of_mixed_growth_lies_between_and_needs_16_tokens():
    cumulative = [1e-3 * n + 1e-5 * n * n for n in range(1, 1025)]
    exact = (1e-3 * 400 + 2e-5 * 400**2) / (1e-3 * 400 + 1e-5 * 400**2)  # the local slope in the middle of the fit
    assert series.exponent(cumulative) == pytest.approx(exact, abs=0.05)
    assert series.exponent(cumulative[:15]) is None
    assert series.exponent(cumulative[:16]) is not None


def test_passes_combine_to_the_median_of_each_token():
    one = series.Series("rwkv4", "recurrent", seconds=[[1, 2, 30, 4], [1, 20, 3, 4], [10, 2, 3]])
    assert one.cumulative == [1, 3, 6, 10]
    assert series.Series("rwkv4", "recurrent").cumulative == []


def test_clock_stops_when_the_device_has_finished_and_a_slow_series_makes_one_pass(monkeypatch):
    events = []

    def steps():
        while True:
            events.append("step")
            yield torch.zeros(3)

    monkeypatch.setitem(series.PASSES, "recurrent", 2)
    for repeat_for, passes in ((math.inf, 2), (0.0, 1)):
        monkeypatch.setattr(series, "REPEAT_FOR", repeat_for)
        one = series.Series("rwkv4", "recurrent")
        events.clear()
        series.measure(one, steps, 2, lambda: events.append("synchronize"), lambda: events.append("tick"))
        assert events == ["step", "synchronize", "tick"] * 2 * passes
        assert len(one.seconds) == passes
        assert one.carried == [12, 12]


@given(st.lists(st.floats(-50, 450), min_size=1, max_size=9), st.floats(1, 40))
def test_labels_stand_apart_and_keep_their_order(positions, gap):
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
ONE = [series.Series(name, "kv-cache", "complete", 1, [[0.1]], [400]) for name in figure.NAMES]
MANY = [
    series.Series(name, protocol, "complete", 1, [[0.1 + 1e-4 * i] * 40], [400] * 40)
    for i, (name, protocol) in enumerate(itertools.product(figure.NAMES, figure.LINES))
]


def record(runs):
    settings = {"layers": 1, "width": 1, "dtype": "float32", "prompt_tokens": 1}
    device = {"type": "cpu", "name": "a chip", "threads": 1}
    return {"series": [one.record() for one in runs], "settings": settings, "device": device}


@pytest.mark.parametrize("runs", [RUNS, RUNS[2:], RUNS[3:], ONE, MANY], ids=["all", "some", "none", "one", "many"])
def test_figure_shows_whatever_was_measured_and_its_labels_apart(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    assert figure.draw(record(runs), tmp_path / "figure.png") == tmp_path / "figure.png"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    figures.plt.close("all")
    for axes in drawn[0].axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_panels_are_time_and_what_is_carried(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
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


def test_table_has_words_for_what_cannot_be_fitted():
    def cells(runs, tokens):
        lines = series.table(record(runs)["series"], tokens).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]

    head, first, *_ = cells(ONE, 1)
    assert head[:4] == ["series", "", "s at 1", "exponent"]
    assert first == ["rwkv4 kv-cache", "", "0.100", "needs 16 tokens", "-", "-", "400 B"]
    found = cells(RUNS, 40)
    assert found[1] == ["rwkv4 recurrent", "", "1.000", "2.000", "4.000", "1.000", "100.00", "100.00", "150 B"]
    assert found[3][:6] == ["bloom recompute", "out of memory at token 8", "-", "-", "-", "needs 16 tokens"]
    assert found[5] == ["gpt-neo recompute", "not run at token 0", *["-"] * 7]
