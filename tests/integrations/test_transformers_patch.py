"""What the patch replaces in transformers, when it refuses or warns, and that all of it can be taken back."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from transformers import RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv import modeling_rwkv

from fastwkv.integrations.transformers import MODELING, patch, unpatch


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def contents() -> dict[Any, dict[str, Any]]:
    owners = [owner for owner in vars(modeling_rwkv).values() if getattr(owner, "__module__", "") == MODELING]
    classes = {base for owner in owners if isinstance(owner, type) for base in owner.__mro__[:-1]}
    return {owner: dict(vars(owner)) for owner in (modeling_rwkv, *classes)}


def test_unpatch_restores_every_attribute() -> None:
    before = contents()
    patch()
    patch()
    during = contents()
    unpatch()
    assert contents() == before
    changed = {
        f"{owner.__name__}.{n}" for owner in before for n, v in during[owner].items() if before[owner].get(n) != v
    }
    assert changed == {
        f"{MODELING}.rwkv_linear_attention",
        f"{MODELING}.load_wkv_cuda_kernel",
        "RwkvSelfAttention.forward",
        "RwkvFeedForward.forward",
        "RwkvModel.forward",
        "RwkvModel.state_dict",
        "RwkvModel._load_from_state_dict",
        "RwkvPreTrainedModel._init_weights",
        "RwkvForCausalLM.prepare_inputs_for_generation",
        "RwkvForCausalLM._update_model_kwargs_for_generation",
        "RwkvForCausalLM._reorder_cache",
    }
    unpatch()
    assert contents() == before


def patched() -> bool:
    return hasattr(RwkvForCausalLM, "_reorder_cache")


def test_block_ends_as_it_began() -> None:
    with patch():
        with patch():
            assert patched()
        assert patched()
        with patch():
            unpatch()
        assert patched()
    assert not patched()
    patch()
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert patched()


def test_cuda_kernel_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(modeling_rwkv, "is_ninja_available", lambda: True)
    monkeypatch.setattr(modeling_rwkv, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(modeling_rwkv, "load_wkv_cuda_kernel", loaded.append)
    config = RwkvConfig(vocab_size=5, hidden_size=8, num_hidden_layers=2)
    with patch():
        RwkvForCausalLM(config)
    assert not loaded
    RwkvForCausalLM(config)
    assert loaded == [1024, 1024]


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0", "4.9.0", "6.1.0.dev0"])
def test_other_version_gives_one_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.warns(UserWarning, match="tested with") as caught, patch(), patch():
        pass
    assert [str(one.message) for one in caught] == [
        f"fastwkv is tested with transformers 4.57 to 5.x, this is {version}"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("version", ["4.57.0", "4.60.1", "5.0.0rc1", "5.99.0"])
def test_tested_version_gives_no_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch()


@pytest.mark.parametrize("name", ["rwkv_linear_attention", "load_wkv_cuda_kernel", "RwkvFeedForward"])
def test_missing_name_is_named_and_nothing_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_rwkv, name)
    before = contents()
    with pytest.raises(RuntimeError, match=f"has no {name}"):
        patch()
    assert contents() == before


def test_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODELING, None)
    with pytest.raises(RuntimeError, match=f"transformers .* has no {MODELING}"):
        patch()


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_import_does_not_import_transformers() -> None:
    python("import sys, fastwkv.integrations.transformers; assert 'transformers' not in sys.modules")


def test_without_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=4\.57'"):
        patch()
