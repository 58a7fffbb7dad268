"""The table of a short time on a GPU: all that failed, the figures that matter, below 10 kB."""

from typing import Any

from gpu_minutes import table


def case(group: str, n: int, **more: Any) -> dict[str, Any]:
    row = {"step": "correctness", "command": group, "what": "case", "group": group, "case": f"T={n} C=65 plain"}
    return {**row, "worst": "y", "relative_error": 1e-7 * n, "bound": 5e-7, **more}


def ended(step: str, name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"step": step, "what": "command", "name": name, "status": status, "seconds": 12.0, **more}


def figure(which: str, fraction: float, **more: Any) -> dict[str, Any]:
    row = {"step": "headline", "what": "bandwidth", "op": "wkv", "dtype": "bfloat16", "shape": [8, 4096, 2048]}
    return row | {"packed": False, "pass": which, "fraction": fraction, "head_start": True, "mhz": 1755.0} | more


def text(*rows: dict[str, Any]) -> str:
    return str(table.text(rows, "first", 300.0, 123.4))


def test_passed_cases_are_counted_and_the_nearest_to_its_bound_is_named() -> None:
    found = text(case("wkv-float32", 1), case("wkv-float32", 4), ended("correctness", "wkv-float32", "passed"))
    assert "NOTHING FAILED" in found
    assert "wkv-float32        2/2    y 4.0e-07 of 5e-07, T=4 C=65 plain" in found
    assert "123 s of 300" in found


def test_failure_is_named_with_error_and_bound() -> None:
    bad = case("scan-float16", 83, error="ga 3.0e-01 > 5e-04; other bits the second time: ga")
    found = text(bad, ended("correctness", "scan-float16", "failed", error="failed after 12 s"))
    assert "FAILED: 2 rows" in found
    assert "correctness scan-float16 T=83 C=65 plain: ga 3.0e-01 > 5e-04; other bits the second time: ga" in found
    assert "scan-float16       0/1" in found


def test_group_that_did_not_end_is_told_from_one_that_passed() -> None:
    late = ended("correctness", "steps", "out of time", error="out of time after 32 s")
    dead = ended("correctness", "wkv-float64", "killed by SIGKILL", error="killed by SIGKILL after 3 s")
    found = text(case("steps", 1), late, dead)
    assert "steps              1/1    y 1.0e-07 of 5e-07, T=1 C=65 plain  OUT OF TIME" in found
    assert "wkv-float64      no case, KILLED BY SIGKILL" in found


def test_bandwidth_is_a_line_a_shape_and_says_where_the_host_was_not_ahead() -> None:
    copy = {"step": "headline", "what": "copy", "gbps": 3012.4}
    found = text(copy, figure("forward", 0.9123), figure("backward", 0.8, head_start=False))
    assert "copy 3012 GB/s, clock 1755 to 1755 MHz" in found
    assert ["8x4096x2048", "0.91", "/", "0.80*"] in [line.split() for line in found.splitlines()]


def test_what_was_not_done_is_said() -> None:
    skipped = {"step": "profile", "what": "skipped", "reason": "2 s were left, it needs 12"}
    absent = ended("tuning", "tuning", "not available", said="bench/tune.py is not there")
    found = text(skipped, absent, {"step": "run", "what": "interrupted"})
    assert "skipped: profile, 2 s were left, it needs 12" in found
    assert "not available: tuning, bench/tune.py is not there" in found
    assert "INTERRUPTED" in found


def test_table_stays_below_10_kb_and_begins_with_what_failed() -> None:
    rows = [case(f"group-{n}", n, error="y 3.0e-01 > 5e-07 " * 9) for n in range(400)]
    rows += [figure("forward", 0.9, shape=[n, 4096, 2048]) for n in range(400)]
    found = text(*rows)
    assert len(found.encode()) < 10_000
    assert "FAILED: 400 rows" in found
    assert "... and 370 more" in found
    assert "the rest is in rows.jsonl" in found
    assert max(map(len, found.splitlines())) <= 120


def test_generation_peers_profile_and_tests_have_their_lines() -> None:
    token = {"step": "generation", "what": "token", "graph": True, "ms": 2.9, "ms_min": 2.8, "ms_together": 2.85}
    peer = {"step": "peers", "what": "peer", "op": "wkv", "pass": "forward", "dtype": "float32", "B": 8, "T": 4, "C": 2}
    counted = {"step": "profile", "what": "profile", "kernel": "_wkv_fwd_kernel", "dram %": [71.25, "%"]}
    found = text(
        token | {"weight_gbps": 2000.0},
        {"step": "generation", "what": "kernel", "name": "gemv", "us": 12.5, "count": 32.0},
        peer | {"provider": "fastwkv", "ms": 1.0, "fraction": 0.9},
        peer | {"provider": "fla", "ms": 2.0, "fraction": 0.45},
        peer | {"provider": "rwkv-cuda", "reason": "unavailable: needs ninja"},
        counted,
        {"step": "tests", "what": "test", "name": "t", "outcome": "passed", "seconds": 0.1},
    )
    assert "generation, graph: 2.900 ms a token (least 2.800), 2.850 unwatched, weights at 2000 GB/s" in found
    assert "12.5 us   32.0 x gemv" in found
    assert "wkv forward float32 8x4x2: fastwkv 1.000 (0.90), fla 2.000 (0.45)" in found
    assert "rwkv-cuda: unavailable: needs ninja" in found
    assert "dram % 71.25 %" in found
    assert "tests: 1 passed" in found


def test_rows_of_nothing_make_a_table() -> None:
    assert "NOTHING FAILED" in table.of_rows([])


def test_ceilings_of_launch_shapes_are_a_line_a_pass() -> None:
    row = {"step": "tuning", "what": "skeleton", "pass": "forward", "dtype": "bfloat16", "num_warps": 1, "stages": 4}
    fast, slow = (row | {"block_c": c, "ms": ms, "gb_per_s": 100 / ms} for c, ms in ((64, 0.05), (32, 0.1)))
    found = text(slow, fast, row | {"block_c": 128, "error": "OutOfResources"})
    assert "bare reads and writes, forward bfloat16: best and worst shape, GB/s: 64,1,4 2000; 32,1,4 1000" in found
