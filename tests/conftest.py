"""Every test runs on the CPU path and on the Triton kernels: compiled where there is a GPU, else interpreted."""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
from hypothesis import HealthCheck, settings
from implementations import IMPLEMENTATIONS, Implementation

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several processes wait for each other: their tests take ten times as long

settings.register_profile(
    "default",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _language_prepared_once():
    """Let Triton's interpreter prepare its language for a kernel, but not again for each function that it calls.

    The second time changes nothing, and took more than half of the time of an interpreted kernel.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def prepare_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        return prepare(function) if any(language.core.is_builtin(m.load) for m in modules) else None

    interpreter._patch_lang = prepare_once


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """Fill what torch.empty returns with NaN, so that an output that is not written shows."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """The package with one of its implementations behind the public functions."""
    with Implementation(request.param) as implementation:
        yield implementation
