"""A packed cache of compiled kernels: written where they are compiled, checked and unpacked where they run.

Of a kernel it holds what Triton reads when it finds it: the machine code and its description, not the stages between.
The list of both, which Triton reads first, names absolute paths and is written where the cache is unpacked. Beside them
are launchers in C and ``manifest.json``: versions, digests of the source files, and of each kernel what its folder is
named after (:mod:`precompiled.triton_keys`).
"""

import hashlib
import io
import json
import lzma
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from precompiled import triton_keys

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, lzma.LZMAError, tarfile.TarError)


@dataclass(frozen=True)
class Entry:
    """A compiled kernel: its name, digests of its source with arguments and of its options, and its two files."""

    name: str
    source: str
    options: str
    code: bytes
    description: bytes


@dataclass(frozen=True)
class Fit:
    """The part of a packed cache that is of use on this machine."""

    kernels: int = 0
    """That will be found, if none of their sources has changed."""
    launchers: int = 0
    reasons: tuple[str, ...] = ()
    """Why some or all of it will not be found."""
    notes: tuple[str, ...] = ()
    """Differences that do not matter."""


def source_digests(files: Iterable[str | Path]) -> dict[str, str]:
    """Return digests of those files that are part of the repository, by their paths in it."""
    paths = {Path(file).resolve() for file in files}
    inside = sorted(path for path in paths if path.is_relative_to(ROOT))
    return {str(path.relative_to(ROOT)): _digest(path.read_bytes()) for path in inside}


def code(*more: Any) -> str:
    """Return a digest of the programs and all that they use of this repository, and of ``more``, as JSON has it."""
    paths = (path for folder in ("bench", "fastwkv", "kernels", "reference") for path in (ROOT / folder).rglob("*.py"))
    return _digest(json.dumps([source_digests(paths), more]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def pack(
    path: Path,
    entries: Sequence[Entry],
    sources: Iterable[str | Path],
    launchers: dict[str, bytes] | None = None,
    names: dict[str, str] | None = None,
    suffix: str = "",
    **about: Any,
) -> int:
    """Write a cache and return its bytes.

    ``launchers`` are modules by their sources, ``names`` theirs, ``suffix`` how their files' names end. ``about`` is
    kept in the manifest, for whoever asks.
    """
    index, digest = triton_keys.library()
    record: dict[str, Any] = {**triton_keys.about(), "library": [index, digest], "suffix": suffix, **about}
    record["sources"] = source_digests(sources)
    record["kernels"], record["launchers"] = [], []
    files: dict[str, bytes] = {}
    for number, entry in enumerate(sorted(entries, key=lambda entry: entry.name)):  # what is alike packs best
        at = f"kernels/{number}"
        files |= {f"{at}.json": entry.description, f"{at}.cubin": entry.code}
        kernel = {key: value for key, value in asdict(entry).items() if isinstance(value, str)}
        record["kernels"].append({"at": at, **kernel})
    for number, (source, module) in enumerate((launchers or {}).items()):
        at = f"launchers/{number}"
        files |= {f"{at}.c": source.encode(), f"{at}.so": module}
        record["launchers"].append({"at": at, "name": (names or {})[source]})
    partial = path.with_name(f"{path.name}.part")
    with tarfile.open(partial, "w:xz", preset=9) as archive:
        for name, data in {MANIFEST: json.dumps(record).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    partial.replace(path)
    return path.stat().st_size


def manifest(path: Path) -> dict[str, Any]:
    """Return what a cache says of itself. ValueError if there is none, or it is damaged."""
    if not path.exists():
        raise ValueError(f"there is no {path.name}: `make gpu-ready` makes it, on a machine without a GPU")
    name, data = next(_members(path))
    if name != MANIFEST:
        raise ValueError(f"{path.name} is no cache of kernels")
    return json.loads(data)


def unpack(path: Path, folder: Path) -> Fit:
    """Unpack a cache into the ``folder`` that shall be ``TRITON_CACHE_DIR``; return what of it is of use."""
    try:
        about = manifest(path)
        fit = _fit(about)
        if fit.kernels:
            _unpack(path, about, folder.resolve(), bool(fit.launchers))
    except DAMAGED as error:
        return Fit(reasons=(_said(path, error),))
    return fit


def _said(path: Path, error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{path.name} is damaged: {type(error).__name__}: {error}"


def _fit(about: dict[str, Any]) -> Fit:
    forbids, notes = triton_keys.differences(about, about["library"][0])
    if forbids:
        return Fit(reasons=tuple(forbids), notes=tuple(notes))
    reasons, launchers = [], len(about["launchers"])
    for name, digest in about["sources"].items():
        if not (ROOT / name).exists() or _digest((ROOT / name).read_bytes()) != digest:
            reasons.append(f"{name} has changed since, and what its kernels are made of with it")
    if launchers and about["suffix"] != _suffix():
        notes.append(f"launchers are made for {about['suffix']}, and compiled here for {_suffix()}")
        launchers = 0
    return Fit(len(about["kernels"]), launchers, tuple(reasons), tuple(notes))


def _suffix() -> str:
    return sysconfig.get_config_var("EXT_SUFFIX")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def _unpack(path: Path, about: dict[str, Any], folder: Path, launchers: bool) -> None:
    places: dict[str, Path] = {}
    for kernel in about["kernels"]:
        into = folder / triton_keys.folder_name(triton_keys.key(kernel["source"], kernel["options"]))
        into.mkdir(parents=True, exist_ok=True)
        both = {f"{kernel['name']}{suffix}": suffix for suffix in (".json", ".cubin")}
        places |= {kernel["at"] + suffix: into / name for name, suffix in both.items()}
        group = {"child_paths": {name: str(into / name) for name in both}}
        (into / f"__grp__{kernel['name']}.json").write_text(json.dumps(group))
    files = dict(_members(path))
    for name, place in places.items():
        place.write_bytes(files[name])
    for launcher in about["launchers"] if launchers else ():
        into = folder / triton_keys.folder_name(triton_keys.module_key(files[f"{launcher['at']}.c"].decode()))
        into.mkdir(parents=True, exist_ok=True)
        (into / f"{launcher['name']}{about['suffix']}").write_bytes(files[f"{launcher['at']}.so"])
