"""What the README shows runs, and what it says of results is in the committed files."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_first_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(code.replace("B, T, C = 8, 1024, 768", "B, T, C = 2, 700, 12"), names)
    assert names["y"].shape == (1, 700, 12)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)|`((?:bench|tests|kernels)/[\w./]+)`", README))
def test_files_that_are_named_exist(path):
    assert (REPOSITORY / (path[0] or path[1])).exists()
