"""The archives that ``torch.save`` writes are checked here before PyTorch maps or reads them.

PyTorch trusts the pickle in an archive: it takes as many bytes as a storage declares from the begin of its record on,
even if they are deflated, belong to the next record, or lie behind the memory into which it has read the record. It
writes checksums (CRC-32) and does not read them.
"""

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

_ALIGNMENT = 8  # bytes, for the widest numbers; torch.save has 64
_DEFLATED_AT_BEST = 1032  # bytes of zeros for each byte of the archive
_LARGEST_PICKLE = 2**26  # bytes, for some 300,000 tensors
_LOCAL_HEADER = struct.Struct("<26x2H")  # before the content of a record; the lengths of name and extra field follow
# The bytes of an element of torch.FloatStorage and so on; all other storages, such as UntypedStorage, count bytes.
_ELEMENT_BYTES = {"Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "QInt32": 4, "Float": 4} | {
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
_PIECE = 2**20
_MOST_THREADS = 8


def check_archive(path: Path, checksums: bool) -> bool:
    """Check that an archive holds what it declares; return whether its tensors can be used without copying them.

    They cannot if one is deflated, or not aligned.

    Args:
        path: the archive.
        checksums: whether to read all of it, too, and compare it with its checksums, if ``torch.save`` has written any.

    Raises:
        Exception: the archive is damaged or of another kind; the exception may have any type, and the first line of its
            message tells what is wrong.

    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        begins = _begins_of_records(archive, file)
        has_checksums = any(record.CRC for record in archive.infolist())  # torch.serialization.set_crc32_options
        root = archive.infolist()[0].filename.partition("/")[0] if begins else ""
        if f"{root}/data.pkl" not in begins:
            raise zipfile.BadZipFile("an archive without data.pkl")
        pickled = archive.getinfo(f"{root}/data.pkl")
        if pickled.file_size > _LARGEST_PICKLE:
            raise zipfile.BadZipFile(f"{pickled.filename} has {pickled.file_size} bytes, more than any list of tensors")
        if has_checksums:
            content = archive.read(pickled)
        else:
            file.seek(begins[pickled.filename])
            content = file.read(pickled.file_size)
        storages = {name: archive.getinfo(name) for name in begins if name.startswith(f"{root}/data/")}
        for key, size in _declared_storages(content):
            record = storages.get(f"{root}/data/{key}")
            if record is not None and record.file_size < size:  # PyTorch tells if one is missing
                raise zipfile.BadZipFile(f"{record.filename} has {record.file_size} of the {size} bytes it should have")
        if checksums and has_checksums:
            with ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS)) as pool:
                for _ in pool.map(partial(_read_through, archive), archive.infolist()):
                    pass  # the loop raises the exceptions of the threads
        return all(
            record.compress_type == zipfile.ZIP_STORED and begins[name] % _ALIGNMENT == 0
            for name, record in storages.items()
        )


def _begins_of_records(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, int]:
    """Return the offset of the content of each record; records must not overlap."""
    begins: dict[str, int] = {}
    end = 0
    for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
        archive.open(record).close()  # checks that the header is there, of the same name, and without a password
        file.seek(record.header_offset)
        begin = record.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
        if record.header_offset < end or begin + record.compress_size > archive.start_dir:
            raise zipfile.BadZipFile(f"{record.filename} overlaps what lies beside it")
        if record.filename in begins:
            raise zipfile.BadZipFile(f"there are two of {record.filename}")
        if record.compress_type == zipfile.ZIP_STORED:
            possible = record.file_size == record.compress_size
        elif record.compress_type == zipfile.ZIP_DEFLATED:
            possible = record.file_size <= _DEFLATED_AT_BEST * record.compress_size
        else:
            raise zipfile.BadZipFile(f"{record.filename} is compressed by a method that PyTorch cannot read")
        if not possible:
            raise zipfile.BadZipFile(f"{record.filename} has no {record.file_size} bytes")
        begins[record.filename] = begin
        end = begin + record.compress_size
    return begins


def _declared_storages(pickled: bytes) -> Iterator[tuple[str, int]]:
    """Yield the key and the bytes of every storage that a pickle declares. Nothing is imported or run.

    A value is the argument of the operation code that makes it, or a tuple of the values that it is made of. That is
    enough for ``("storage", "torch FloatStorage", key, location, number of elements)``.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            stack.append(pickletools.markobject)
        else:
            if code.name == "BINPERSID":
                yield _declared_storage(stack[-1])
            parts = _take(stack, code.stack_before)
            stack += [parts if code.arg is None else argument] * len(code.stack_after)


def _take(stack: list[Any], wanted: list[Any]) -> tuple[Any, ...]:
    """Remove the arguments of an operation from the stack and return them, or all values above the last mark."""
    parts: list[Any] = []
    count = len(wanted)
    if pickletools.markobject in wanted:
        while (part := stack.pop()) is not pickletools.markobject:
            parts.append(part)
        count = wanted.index(pickletools.markobject)
    parts += [stack.pop() for _ in range(count)]
    return tuple(reversed(parts))


def _declared_storage(identifier: Any) -> tuple[str, int]:
    match identifier:
        case ("storage", str(kind), str(key), str(), int(count)):
            return key, count * _ELEMENT_BYTES.get(kind.split()[-1].removesuffix("Storage"), 1)
    raise zipfile.BadZipFile("it declares a tensor in another way than torch.save")


def _read_through(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as content:
        while content.read(_PIECE):
            pass  # zipfile compares at the end
