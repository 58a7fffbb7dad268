"""What a short time on a GPU checks: its cases, here on the CPU path, and what it says of errors."""

import json
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from piece import checking, plan, scan_cases, step_cases, wkv_cases

CPU = torch.device("cpu")


def rows(capsys: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def public(dtype: str, kind: Any) -> list[Any]:
    """Cases whose launches are those of the public functions, which have a CPU path."""
    return [case for case in kind.cases(dtype) if case.name.endswith("public")]


@pytest.mark.parametrize("kind", ["wkv float32", "wkv bfloat16", "scan float32", "scan complex64", "scan bfloat16x2"])
def test_public_functions_are_within_the_bounds(kind: str, capsys: Any) -> None:
    operator, dtype = kind.split()
    cases = public(dtype, {"wkv": wkv_cases, "scan": scan_cases}[operator])
    assert len(cases) > 2
    assert checking.run("group", cases, CPU) == 0
    found = rows(capsys)
    assert [row["case"] for row in found] == [case.name for case in cases]
    assert all(0 <= row["relative_error"] <= row["bound"] for row in found)


def check(found: Any, wanted: float = 1.0, bound: float = 0.1) -> Any:
    """Return a case of one result."""
    launch = found if callable(found) else lambda: {"y": torch.tensor([found])}
    one = checking.Check("", launch, lambda: {"y": torch.tensor([wanted])}, {"y": bound})
    return checking.Case("case", lambda device: one)


@pytest.mark.parametrize(("found", "said"), [(1.3, "y 3.0e-01 > 1e-01"), (float("nan"), "y nan > 1e-01")])
def test_wrong_results_are_said(found: float, said: str, capsys: Any) -> None:
    assert checking.run("group", [check(found), check(1.05)], CPU) == 1
    wrong, right = rows(capsys)
    assert wrong["error"] == said
    assert "error" not in right


def test_other_bits_the_second_time_are_said(capsys: Any) -> None:
    calls = iter([1.0, 1.0 + 1e-7])
    assert checking.run("group", [check(lambda: {"y": torch.tensor([next(calls)])})], CPU) == 1
    assert rows(capsys)[0]["error"] == "other bits the second time: y"


def test_case_that_raises_does_not_end_the_group(capsys: Any) -> None:
    def fails() -> None:
        raise RuntimeError("illegal\nand more")

    assert checking.run("group", [check(fails), check(1.0)], CPU) == 1
    assert [row.get("error") for row in rows(capsys)] == ["RuntimeError: illegal", None]


def test_lost_device_ends_the_group(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "lost_device", lambda device: "it says nothing")
    assert checking.run("group", [check(9.0), check(1.0)], CPU) == 1
    assert [row["what"] for row in rows(capsys)] == ["case", "lost"]


def test_result_without_a_bound_is_refused(capsys: Any) -> None:
    one = checking.Check("", lambda: {"z": torch.ones(1)}, lambda: {"z": torch.ones(1)}, {"y": 1.0})
    assert checking.run("group", [checking.Case("case", lambda device: one)], CPU) == 1
    assert rows(capsys)[0]["error"].startswith("ValueError: results ['z'], expected ['z'], bounds ['y']")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_scan_is_checked_with_all_pairs_of_what_it_is_compiled_for(dtype: str) -> None:
    forms = [form for form in scan_cases.forms(dtype) if form.C > 3]
    names = ["state", "packed", "chunks", "fixed", "reverse", *([] if dtype == "complex64" else ["log"])]
    for one, other in combinations(names, 2):
        assert {(getattr(f, one), getattr(f, other)) for f in forms} == set(product((False, True), repeat=2))
    assert {form.C for form in forms} == {64, 65}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wkv_is_checked_in_all_forms(dtype: str) -> None:
    found = {(form.state, form.packed, form.chunks) for form in wkv_cases.forms(dtype)}
    assert found == set(product((False, True), repeat=3))
    lengths = {case.name.split()[0] for case in wkv_cases.cases(dtype)}
    assert lengths == {"T=1", "T=16", "T=83", "T=1000"}


def test_every_group_has_cases_and_each_dtype_a_group() -> None:
    from piece import correctness

    for group in plan.GROUPS:
        assert list(correctness.cases(group, True)), group
        assert list(correctness.cases(group)), group
    kinds = {"wkv": wkv_cases.DTYPES, "scan": scan_cases.DTYPES}
    assert {f"{kind}-{dtype}" for kind, dtypes in kinds.items() for dtype in dtypes} <= set(plan.GROUPS)


def test_what_one_token_is_compared_with_is_its_formula() -> None:
    for case in step_cases.rwkv4_step(True):
        one = case.prepare(CPU)
        assert set(one.wanted()) <= set(one.bounds)
        assert all(result.dtype == torch.float64 for result in one.wanted().values())


def test_graph_is_replayed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "replayed", lambda launch: {"y": torch.tensor([2.0])})
    one = check(1.0).prepare(CPU)
    row = checking.compared(one, SimpleNamespace(type="cuda"))
    assert row["error"] == "other bits from a CUDA graph: y"


def test_kernels_of_public_functions_are_compiled_beforehand_too() -> None:
    cases = [
        checking.Case(name, lambda device: None, *kinds) for name, *kinds in (("a",), ("b", False), ("c", False, True))
    ]
    assert [name for name, _ in checking.launched(cases)] == ["a", "c"]
    for kind in (wkv_cases, scan_cases):
        assert all(case.public for case in public("float32", kind))
