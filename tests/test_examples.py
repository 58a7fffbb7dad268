"""Every program of examples/ runs as it stands, prints what it promises and stays short."""

import ast
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step +\d+: loss (\S+)$", printed, re.MULTILINE)]


def check_blinkdl(printed: str) -> None:
    first, second, third = losses(printed)
    assert 0 < third < second / 2 < first / 8


def check_blinkdl_extension(printed: str) -> None:
    first, second, third = losses(printed)
    assert 0 < third < second / 2 < first / 4


def check_checkpoints(printed: str) -> None:
    *formats, last = printed.splitlines()
    assert formats == [f"{format}: 140928 parameters" for format in ("fastwkv", "hf", "blinkdl")]
    assert last.endswith(": True")


def check_huggingface(printed: str) -> None:
    found = losses(printed)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 < 2 < found[0]
    texts = [[int(token) for token in line.split()] for line in printed.splitlines()[len(found) :]]
    assert texts == [[(first + n) % 10 for n in range(16)] for first in range(3)]  # it has learned to count


def check_continue_text(printed: str) -> None:
    found = losses(printed)
    assert found[-1] < found[0] / 2
    size, *texts = printed.splitlines()[len(found) :]
    read, state = map(int, re.fullmatch(r"(\d+) bytes of text, (\d+) bytes of state", size).groups())
    assert read == Path(random.__file__).stat().st_size
    assert 0 <= state - 5 * 2 * 64 * 4 < 1000  # five fields of two layers, and the names of them
    first, second = map(ast.literal_eval, texts)
    assert len(first) >= 15  # characters of 60 bytes
    assert first != second


def check_remember(printed: str) -> None:
    lasting, fading = (int(share) for share in re.findall(r"(\d+)% right$", printed, re.MULTILINE))
    assert lasting > 95
    assert fading < 20  # guessing has 12.5


CHECKS: dict[str, Callable[[str], None]] = {
    "blinkdl": check_blinkdl,
    "blinkdl_extension": check_blinkdl_extension,
    "checkpoints": check_checkpoints,
    "continue_text": check_continue_text,
    "huggingface": check_huggingface,
    "remember": check_remember,
}
SHORTER = {"continue_text": ["--steps", "30"], "remember": ["--delay", "20", "--steps", "60"]}
NEEDS = {"huggingface": "transformers"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_it_promises(path: Path) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(path.relative_to(ROOT)), *SHORTER.get(path.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    CHECKS[path.stem](done.stdout)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_has_ten_to_forty_lines_of_code(path: Path) -> None:
    code = re.sub(r'"""(.|\n)*?"""|^ *#.*$', "", path.read_text(), flags=re.MULTILINE)
    assert 10 <= sum(bool(line.strip()) for line in code.splitlines()) <= 40
