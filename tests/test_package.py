"""The package from outside: what importing it needs, ships and leaves alone."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastwkv

REPOSITORY = Path(__file__).parents[1]


def python(code: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_from_the_root_of_the_repository():
    # There, `import kernels` finds our folder; as a package it would pass for the one that transformers uses.
    pytest.importorskip("transformers")
    python("import transformers; from transformers import GPTNeoXForCausalLM; import fastwkv")


def test_cpu_path_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # makes every import of it fail
import torch, fastwkv
x = torch.randn(1, 5, 3, requires_grad=True)
fastwkv.wkv(torch.ones(3), torch.ones(3), x, x).sum().backward()
print(x.grad.isfinite().all().item())
"""
    assert python(code).strip() == "True"


def test_importing_the_package_loads_neither_triton_nor_numba():
    assert python("import sys, fastwkv; print({'triton', 'numba'} & sys.modules.keys())").strip() == "set()"


def test_public_names_are_those_promised():
    assert {"WKVState", "wkv", "wkv_step", "reference"} <= set(fastwkv.__all__)
    assert callable(fastwkv.reference.wkv)
    assert (Path(fastwkv.__file__).parent / "py.typed").exists()


def test_version_is_that_of_the_package_metadata():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{fastwkv.__version__}"' in text
    assert f"version: {fastwkv.__version__}" in (REPOSITORY / "CITATION.cff").read_text()


def test_classifiers_name_every_python_from_the_first_that_is_required() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    (first,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', text, re.MULTILINE)
    named = [
        int(minor) for minor in re.findall(r'^    "Programming Language :: Python :: 3\.(\d+)",$', text, re.MULTILINE)
    ]
    assert named == list(range(int(first), named[-1] + 1))


def test_kernels_folder_is_no_package_of_its_own():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_wheel_and_sdist_hold_every_module_and_run(tmp_path):
    pytest.importorskip("build")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, REPOSITORY],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fastwkv-{fastwkv.__version__}-py3-none-any.whl"
    with tarfile.open(tmp_path / f"fastwkv-{fastwkv.__version__}.tar.gz") as sdist:
        held = {Path(name).relative_to(f"fastwkv-{fastwkv.__version__}") for name in sdist.getnames()}
    modules = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "fastwkv").rglob("*.py")}
    assert modules <= held
    assert not [path for path in held if path.parts[:1] in (("tests",), ("bench",))]  # none of them, not a few
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    sources = {p.relative_to(REPOSITORY / "kernels") for p in (REPOSITORY / "kernels").rglob("*.py")}
    assert {p.relative_to(target / "fastwkv/kernels") for p in (target / "fastwkv/kernels").rglob("*.py")} == sources
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import torch, fastwkv
assert fastwkv.__file__.startswith({str(target)!r})
x = torch.randn(1, 5, 3)
print(fastwkv.wkv(torch.ones(3), torch.ones(3), x, x).shape)
"""
    assert "5, 3" in python(code, cwd=tmp_path)
