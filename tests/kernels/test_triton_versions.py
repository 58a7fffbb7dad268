"""What older versions of Triton cannot compile, held by the source alone: only one version can be installed."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def jit_functions():
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield pytest.param(node, id=f"{path.stem}.{node.name}")


def may_be_none(value):
    if isinstance(value, ast.IfExp):
        return may_be_none(value.body) or may_be_none(value.orelse)
    return isinstance(value, ast.Constant) and value.value is None


@pytest.mark.parametrize("function", list(jit_functions()))
def test_no_function_returns_none_in_a_tuple(function):
    # Triton below 3.7 makes a tensor of every constant that a function returns, and can make none of None.
    for returned in (node for node in ast.walk(function) if isinstance(node, ast.Return)):
        tuples = (part for part in ast.walk(returned) if isinstance(part, ast.Tuple))
        assert not any(may_be_none(value) for part in tuples for value in part.elts), returned.lineno


@pytest.mark.parametrize("function", list(jit_functions()))
def test_no_condition_is_a_chain_of_more_than_two(function):
    # Triton 3.3 wants parentheses: a and (b and c).
    for condition in (node for node in ast.walk(function) if isinstance(node, ast.BoolOp)):
        assert len(condition.values) == 2, condition.lineno


@pytest.mark.parametrize("function", list(jit_functions()))
def test_no_function_calls_itself(function):
    # Triton below 3.5 follows the calls for its cache key and finds no end.
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    assert function.name not in {call.id for call in calls if isinstance(call, ast.Name)}
