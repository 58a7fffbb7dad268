"""A minus sign in a Triton kernel is an addition on Triton 3.6, often one that the next step waits for."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def is_jitted(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list)


def is_known_when_compiled(node: ast.AST) -> bool:
    """Whether this is a number, the name of a constant, or -inf: compilers take their signs for granted."""
    if isinstance(node, ast.Name):
        return node.id.isupper()
    return isinstance(node, ast.Constant) or ast.unparse(node) == "float('inf')"


def minus_signs(source: str) -> list[str]:
    """Return the values that the kernels of a file turn the sign of."""
    return [
        ast.unparse(node)
        for kernel in ast.walk(ast.parse(source))
        if is_jitted(kernel)
        for node in ast.walk(kernel)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not is_known_when_compiled(node.operand)
    ]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_turn_signs_without_an_addition(path):
    assert minus_signs(path.read_text()) == []


def test_minus_signs_are_found():
    source = (
        "@triton.jit\ndef f(x, A: tl.constexpr):\n    y = -x * -A - 1\n    return f(-1.0, -float('inf'), -(x + y))\n"
    )
    assert sorted(minus_signs(source)) == ["-(x + y)", "-x"]
