"""The checks of correctness on a GPU: their cases, here on the CPU path, and how they tell of errors."""

import json
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from correctness import checks, groups, rwkv4_step, scan, wkv

CPU = torch.device("cpu")


def rows(capsys: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("group", ["wkv-float32", "wkv-bfloat16", "scan-complex64", "scan-bfloat16x2"])
def test_public_functions_are_within_the_bounds(group: str, capsys: Any) -> None:
    # Their launches are those that the CPU path has too; the longer ones are in the tests of the operators.
    cases = [case for case in groups.cases(group) if case.public and case.name.startswith("T=83")]
    assert len(cases) > 1
    assert checks.run("group", cases, CPU) == 0
    found = rows(capsys)
    assert [row["case"] for row in found] == [case.name for case in cases]
    assert all(0 <= row["relative_error"] <= row["bound"] for row in found)


def check(found: Any, bounds: dict[str, float] | None = None) -> Any:
    """Return a case of one result, which should be 1."""
    launch = found if callable(found) else lambda: {"y": torch.tensor([found])}
    one = checks.Check(launch, lambda: {"y": torch.tensor([1.0])}, bounds or {"y": 0.1})
    return checks.Case("case", lambda device: one)


def test_errors_of_a_case_are_said_and_the_next_one_is_checked(capsys: Any) -> None:
    calls = iter([1.0, 1.0 + 1e-7])

    def fails() -> None:
        raise RuntimeError("illegal\nand more")

    cases = [check(1.3), check(float("nan")), check(lambda: {"y": torch.tensor([next(calls)])}), check(fails)]
    cases += [check(1.0, {"z": 1.0}), check(1.05)]
    assert checks.run("group", cases, CPU) == 1
    assert [row.get("error") for row in rows(capsys)] == [
        "y 3.0e-01 > 1e-01",
        "y nan > 1e-01",
        "other bits the second time: y",
        "RuntimeError: illegal",
        "ValueError: results ['y'], expected ['y'], bounds ['z']",
        None,
    ]


def test_lost_device_ends_the_group(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "lost_device", lambda device: "it says nothing")
    assert checks.run("group", [check(9.0), check(1.0)], CPU) == 1
    assert [row["what"] for row in rows(capsys)] == ["case", "lost"]


def test_other_bits_from_a_graph_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "replayed", lambda launch: {"y": torch.tensor([2.0])})
    row = checks.compared(check(1.0).prepare(CPU), SimpleNamespace(type="cuda"))
    assert row["error"] == "other bits from a CUDA graph: y"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_scan_is_checked_with_all_pairs_of_what_it_is_compiled_for(dtype: str) -> None:
    forms = [form for form in scan.forms(dtype) if form.C > 3]
    names = ["state", "packed", "chunks", "fixed", "reverse", *([] if dtype == "complex64" else ["log"])]
    for one, other in combinations(names, 2):
        assert {(getattr(f, one), getattr(f, other)) for f in forms} == set(product((False, True), repeat=2))
    assert {form.C for form in forms} == {64, 65}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wkv_is_checked_in_all_forms(dtype: str) -> None:
    found = {(form.state, form.packed, form.chunks) for form in wkv.forms(dtype)}
    assert found == set(product((False, True), repeat=3))
    lengths = {case.name.split()[0] for case in wkv.cases(dtype)}
    assert lengths == {"T=1", "T=16", "T=83", "T=1000"}


def test_every_group_has_cases_and_each_dtype_a_group() -> None:
    for group in groups.GROUPS:
        assert list(groups.cases(group, True)), group
        assert list(groups.cases(group)), group
    kinds = {"wkv": wkv.DTYPES, "scan": scan.DTYPES}
    assert {f"{kind}-{dtype}" for kind, dtypes in kinds.items() for dtype in dtypes} <= set(groups.GROUPS)


def test_what_one_token_is_compared_with_is_its_formula() -> None:
    for case in rwkv4_step.cases("", True):
        one = case.prepare(CPU)
        assert set(one.wanted()) <= set(one.bounds)
        assert all(result.dtype == torch.float64 for result in one.wanted().values())


def test_kernels_of_public_functions_are_compiled_beforehand_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (("a",), ("b", False), ("c", False, True))
    cases = [checks.Case(name, lambda device: None, *more) for name, *more in kinds]
    monkeypatch.setattr(groups, "cases", lambda group: cases)
    monkeypatch.setattr(groups, "GROUPS", ("one",))
    assert [name for name, _ in groups.launches()] == ["one a", "one c"]
