"""What the README shows runs, and what it says of results is in the committed files."""

import re
from pathlib import Path

import pytest
import torch

from fastwkv.integrations.transformers import unpatch

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """What the examples write and exchange is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    unpatch()


def test_examples_run(elsewhere):
    pytest.importorskip("transformers")
    names = {}
    smaller = {
        "B, T, C = 8, 1024, 768": "B, T, C = 2, 700, 12",
        'RWKV4Config.preset("169m")': "RWKV4Config(layers=1, width=12, vocab_size=20)",
        "generate(model, tokens, 100,": "generate(model, tokens, 3,",
    }
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for large, small in smaller.items():
            code = code.replace(large, small)
        exec(code, names)
        names |= {"tokens": torch.zeros(2, 5, dtype=torch.int64), "u": torch.randn(2, 9, 256)}
        names["u_t"] = names["u"][:, 0]
    assert names["y_t"].shape == (2, 256)
    assert names["h"].shape == (2, 700, 12)
    assert names["logits"].shape == (2, 5, 20)
    assert names["model"].config.hidden_size == 64
    assert names["texts"].shape == (3, 12)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)|`((?:bench|tests|kernels)/[\w./]+)`", README))
def test_files_that_are_named_exist(path):
    assert (REPOSITORY / (path[0] or path[1])).exists()
