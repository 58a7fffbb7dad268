"""Imports point one way: cli to nn, nn and integrations to ops, ops to kernels; the reference stands alone."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What the modules of a folder may import of the package, besides their own folder.
ALLOWED = {
    "reference": set(),
    "kernels": set(),
    "fastwkv/ops": {"fastwkv.kernels.config", "fastwkv.kernels.launch", "fastwkv.reference.wkv"},  # WKVState is there
    "fastwkv/nn": {"fastwkv.ops", "fastwkv.reference.wkv"},
    "fastwkv/integrations": {"fastwkv.ops", "fastwkv.nn", "fastwkv.reference.wkv"},
    "fastwkv/cli": {"fastwkv.nn", "fastwkv._startup"},
}
NAMES = {"reference": "fastwkv.reference", "kernels": "fastwkv.kernels"}
FILES = [path for folder in ALLOWED for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("fastwkv")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path):
    folder = next(f for f in ALLOWED if path.is_relative_to(REPOSITORY / f))
    own = NAMES.get(folder, folder.replace("/", "."))
    allowed = ALLOWED[folder] | {own}
    for name in imports(path):
        if name == "fastwkv" or name.startswith("fastwkv."):
            ancestors = {a for a in allowed if name == a or name.startswith(a + ".") or a.startswith(name + ".")}
            assert ancestors, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_triton_is_imported_by_gpu_kernels_only(path):
    used = any(name.split(".")[0] == "triton" for name in imports(path))
    assert not used or path.parent == REPOSITORY / "kernels"


def test_reference_imports_torch_alone():
    for path in (REPOSITORY / "reference").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)}
        assert outside <= {"torch", "typing", "collections"}, path.name
