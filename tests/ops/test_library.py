"""Operators as they are registered: one signature for the fake, from which the schema comes, and the launchers."""

import inspect

import pytest
import torch
from implementations import Implementation

import fastwkv  # noqa: F401 (registers the operators)
from fastwkv.ops.library import OPERATORS


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwkv::{operator}", key)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("name", "key"), [("cpu", "CPU"), ("triton", "CUDA")])
def test_launcher_takes_the_arguments_of_its_operator(operator, name, key):
    if name == "triton":
        pytest.importorskip("triton")
    if not has_kernel(operator, key):
        assert key == "CPU"
        assert operator.endswith("_")
        return
    wanted = [argument.name for argument in getattr(torch.ops.fastwkv, operator).default._schema.arguments]
    found = inspect.signature(Implementation(name).launcher(operator)).parameters
    assert list(found)[: len(wanted)] == wanted
    assert all(parameter.default is not parameter.empty for parameter in list(found.values())[len(wanted) :])


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_whose_name_ends_in_an_underscore_is_the_one_that_writes(operator):
    arguments = getattr(torch.ops.fastwkv, operator).default._schema.arguments
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    assert writes == operator.endswith("_")
