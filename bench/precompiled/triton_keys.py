"""The folders in which Triton looks for compiled kernels, and what their names depend on.

Its cache has a folder for each kernel, named after a digest of: the files of Triton's compiler, backends and language
and its ``libtriton.so`` (``triton_key``); the source text of the function and of all that it calls, with their first
lines' numbers, and the arguments' types, alignments and constants; the version of ptxas and the capability; the options
of the compiler, libdevice among them; and the environment variables that change code. Neither the path of a file nor
the version of Python is part of it, but ``libtriton.so`` is another for every version of Python and every build.

That one alone says nothing of the machine code: where all else is the same, a cache fits. So a cache is kept by the
other parts of the digest, and gets its folders' names where it is unpacked.
"""

import base64
import hashlib
import importlib
import itertools
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CAPABILITY = 90


def about() -> dict[str, Any]:
    """Return the parts of the digest that no kernel changes, as JSON has them. ValueError: no Triton that it knows."""
    triton = _triton()
    return {
        "triton": triton.version,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "files": _files(),
        "ptxas": triton.backend.hash(),
        "options": triton.backend.parse_options({}).hash(),
        "environment": dict(sorted(triton.environment().items())),
    }


def library() -> tuple[int, str]:
    """Return which of the files is ``libtriton.so``, and the digest of the one that is installed."""
    triton = _triton()
    (path,) = (triton.folder / "_C").glob("libtriton.*so")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _files().index(digest), digest


def key(source: str, options: str) -> str:
    """Return the digest for a function with its arguments and the options, of which it takes the digests."""
    triton = _triton()
    parts = (SimpleNamespace(hash=lambda: source), triton.backend, SimpleNamespace(hash=lambda: options))
    return hashlib.sha256(triton.get_cache_key(*parts, triton.environment()).encode()).hexdigest()


def options_digest(options: dict[str, Any]) -> str:
    """Return the digest of options as a launch passes them to the compiler."""
    return _triton().backend.parse_options(dict(options)).hash()


def settle() -> None:
    """Compute the digests of all kernels' sources now, in one order. Call it before anything is launched.

    Into the digest of a function goes which constants are used by the functions that it calls, but of those alone whose
    own digest was there before: without this, which folders a process looks into depends on what it launches first.
    """
    from triton.runtime.jit import JITFunction

    import fastwkv.kernels

    for found in sorted(pkgutil.iter_modules(fastwkv.kernels.__path__), key=lambda found: found.name):
        if not found.ispkg:  # that of the CPU
            module = importlib.import_module(f"fastwkv.kernels.{found.name}")
            for _, one in sorted(vars(module).items()):
                if isinstance(one, JITFunction) and one.fn.__module__ == module.__name__:
                    _ = one.cache_key


def module_key(source: str) -> str:
    """Return the digest for a module in C, as which Triton compiles launchers until 3.6 and its driver."""
    return hashlib.sha256((source + _triton().platform_key()).encode()).hexdigest()


def folder_name(digest: str) -> str:
    """Return the name of the folder of a digest."""
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def differences(theirs: dict[str, Any], library_index: int) -> tuple[list[str], list[str]]:
    """Compare with what :func:`about` returned elsewhere; return what forbids the kernels from there, and what is new.

    New may be ``libtriton.so``, which every release of Python has another of, and ptxas: compiled kernels need neither.
    """
    ours = about()
    if ours["triton"].partition("+")[0] != theirs["triton"].partition("+")[0]:
        return [f"made with Triton {theirs['triton']}, here is {ours['triton']}"], []
    forbids, new = [], []
    pairs = list(itertools.zip_longest(ours["files"], theirs["files"]))
    if any(a != b for index, (a, b) in enumerate(pairs) if index != library_index):
        forbids.append(f"Triton {ours['triton']} is another here: files of its compiler differ")
    elif ours["files"] != theirs["files"] and ours["python"] == theirs["python"]:
        new.append(f"Triton {ours['triton']} is another build here, of the same files")
    if ours["ptxas"] != theirs["ptxas"]:
        releases = (_release(each["ptxas"]) for each in (theirs, ours))
        new.append("made with ptxas {}, here is {}".format(*releases))
    if ours["options"] != theirs["options"]:
        forbids.append("the compiler's options have other defaults here (libdevice, or an environment variable)")
    for name in sorted(ours["environment"].keys() | theirs["environment"].keys()):
        made, here = (each["environment"].get(name, "not set") for each in (theirs, ours))
        if made != here:
            forbids.append(f"{name} changes what is compiled: made with {made}, here {here}")
    return forbids, new


def _release(ptxas: str) -> str:
    return next((line.rpartition(" ")[2] for line in ptxas.splitlines() if " release " in line), ptxas[:40])


def _files() -> list[str]:
    triton = _triton()
    return triton.files.removeprefix(triton.version).split("-")


@cache
def _triton() -> SimpleNamespace:
    """Import what is needed of Triton; PyTorch is not."""
    try:
        import triton
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
        from triton.runtime.build import platform_key
        from triton.runtime.cache import get_cache_key, triton_key
    except ImportError as error:
        raise ValueError(f"needs Triton 3.6 or later: {error}") from error
    return SimpleNamespace(
        version=triton.__version__,
        folder=Path(triton.__file__).parent,
        files=triton_key(),
        get_cache_key=get_cache_key,
        environment=get_cache_invalidating_env_vars,
        platform_key=platform_key,
        backend=make_backend(GPUTarget("cuda", CAPABILITY, 32)),
    )
