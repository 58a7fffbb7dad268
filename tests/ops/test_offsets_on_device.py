"""Offsets that the host does not read: the device asserts the rule where that is asked for."""

import pytest
import torch

from fastwkv.ops import checks


@pytest.mark.parametrize("offsets", [[5, 12], [0, 5, 10], [0, 5, 20], [0, 8, 5, 12], [-3, 12], [0, 12, 12, 11]])
def test_device_asserts_the_rule(offsets):
    with pytest.raises(RuntimeError, match="cu_seqlens must run from 0 to T = 12 without decreasing"):
        checks.assert_offsets(torch.tensor(offsets), 12)


@pytest.mark.parametrize("offsets", [[0, 12], [0, 0, 5, 5, 12, 12, 12]])
def test_device_asserts_nothing_else(offsets):
    checks.assert_offsets(torch.tensor(offsets), 12)


@pytest.mark.parametrize("wanted", [False, True])
def test_asserted_only_where_that_is_asked_for(monkeypatch, wanted):
    # A tensor without values stands for one on a GPU: its device is not the CPU either.
    asserted = []
    monkeypatch.setattr(checks, "CHECK_OFFSETS_ON_DEVICE", wanted)
    monkeypatch.setattr(checks, "assert_offsets", lambda *given: asserted.append(given))
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    checks.check_cu_seqlens(offsets, 1, 12)
    assert asserted == ([(offsets, 12)] if wanted else [])


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_environment_asks_for_it(monkeypatch, value, wanted):
    if value is None:
        monkeypatch.delenv("FASTWKV_CHECK_OFFSETS", raising=False)
    else:
        monkeypatch.setenv("FASTWKV_CHECK_OFFSETS", value)
    assert checks.offsets_are_asserted() is wanted
