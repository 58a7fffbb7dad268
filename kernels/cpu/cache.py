"""Compiled kernels on disk, in numba's files, of which none is believed.

A process may end while it writes, a disk may fill up or fail, and two processes may choose the same name. numba
unpickles what it finds, so a file that is damaged stops every call of every process. Here a file ends in a digest of
what stands before it, and says what it was compiled from and for: one that is not whole, not readable or not of this
kernel counts as not there, the kernel is compiled, and the file replaced if it can be.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile


class KernelCache(FunctionCache):
    """The compiled forms of one kernel, one for each signature and processor.

    Args:
        function: the kernel.
        sources: says of what else than the function itself the compiled forms are made.

    Raises:
        RuntimeError: there is no folder to write to.

    """

    def __init__(self, function: Callable[..., Any], sources: str) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), sources
        self._cache_file = _CheckedFiles(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled form for a signature, None if there is none that can be used."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # what other versions of its libraries have written can fail in any way
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled form for a signature, if there is somewhere to write it."""
        with suppress(OSError):
            super().save_overload(sig, data)


class _CheckedFiles(IndexDataCacheFile):
    """numba's index, and its file for each compiled form, with digests."""

    def load(self, key: Any) -> Any:
        written_for, data = super().load(key) or (None, None)
        # An index may name a file that another process has written for another key, or for older sources.
        return data if written_for == self._written_for(key) else None

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (self._written_for(key), data))

    def _written_for(self, key: Any) -> tuple[Any, ...]:
        return self._version, self._source_stamp, key

    def _load_index(self) -> Any:
        try:
            return super()._load_index() if _is_whole(self._index_path) else {}
        except Exception:  # whole, but of other versions
            return {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # numba takes it as a file that is gone
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        with super()._open_for_write(filepath) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getbuffer()).digest())  # pickle stops before it


def _is_whole(path: str) -> bool:
    try:
        content = Path(path).read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]
