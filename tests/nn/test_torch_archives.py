"""Archives of torch.save: what another program has packed is read, and what is damaged is refused, not taken as is."""

import contextlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_bits, blinkdl, refused, write_pth
from hypothesis import given, settings
from hypothesis import strategies as st

from fastwkv.nn import RWKV4, CheckpointError
from fastwkv.nn.checkpoint import open_checkpoint


def packed(source: Path, target: Path, *, method: int, shift: int = 0, names: Callable[[str], str] = str) -> Path:
    """The same records in a new archive, as a program for archives writes it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for record in old.infolist():
            info = zipfile.ZipInfo(names(record.filename))
            info.compress_type = method
            info.extra = struct.pack("<2H", 0x4642, shift) + bytes(shift)  # moves what comes behind it
            new.writestr(info, old.read(record))
    return target


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the content of each record begins and ends."""
    content, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            begin = record.header_offset + 30 + sum(struct.unpack_from("<2H", content, record.header_offset + 26))
            found[record.filename] = begin, begin + record.compress_size
    return found


def entry(content: bytes, name: str) -> int:
    """Where the directory of an archive describes this record."""
    place = content.rindex(name.encode()) - 46
    assert content[place : place + 4] == b"PK\x01\x02"
    return place


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@settings(max_examples=20)
@given(shift=st.integers(0, 70))
def test_archive_that_was_packed_again_is_read_bit_for_bit(tmp_path: Path, method: int, shift: int) -> None:
    weights = blinkdl()
    path = packed(write_pth(tmp_path / "model.pth", weights), tmp_path / "again.pth", method=method, shift=shift)
    tensors = open_checkpoint(path).tensors
    assert torch.equal(tensors["head.weight"], weights["head.weight"])
    model = RWKV4.from_pretrained(path)
    model.save_pretrained(tmp_path / "out.pth", format="blinkdl")
    assert_same_bits(torch.load(tmp_path / "out.pth"), weights)


def test_archive_under_another_name_is_read(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    path = packed(path, tmp_path / "2.pth", method=zipfile.ZIP_DEFLATED, names=lambda n: n.replace("model/", "x y/"))
    assert torch.equal(RWKV4.from_pretrained(path).head.weight, blinkdl()["head.weight"])


def test_only_what_stands_as_it_is_in_the_file_is_mapped(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", weights := blinkdl())
    again = packed(path, tmp_path / "again.pth", method=zipfile.ZIP_STORED, shift=1)
    for file, mapped in ((path, True), (again, False)):
        tensors = open_checkpoint(file).tensors
        begin, end = places(file)["model/data/0"]
        with file.open("r+b") as changed:
            changed.seek(begin)
            changed.write(bytes(end - begin))
        assert torch.equal(tensors["embeddings.weight"], weights["emb.weight"]) != mapped


@settings(max_examples=40)
@given(data=st.data())
def test_changed_bit_of_a_tensor_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    name, (begin, end) = data.draw(st.sampled_from(sorted(places(path).items())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(begin, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    refused(path, f"not a whole file of torch.save .*{name}")


@settings(max_examples=20)
@given(data=st.data())
def test_changed_byte_of_a_deflated_tensor_changes_nothing_or_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = packed(write_pth(tmp_path / "m.pth", blinkdl()), tmp_path / "model.pth", method=zipfile.ZIP_DEFLATED)
    begin, end = data.draw(st.sampled_from(sorted(places(path).values())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(begin, end - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):  # the last byte has bits that say nothing
        model = RWKV4.from_pretrained(path)
        model.save_pretrained(tmp_path / "out.pth", format="blinkdl")
        assert_same_bits(torch.load(tmp_path / "out.pth"), blinkdl())


def test_checksums_can_be_left_unread(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", weights := blinkdl())
    content = bytearray(path.read_bytes())
    content[places(path)["model/data/0"][0] + 3] ^= 0x80  # the sign of the first number
    path.write_bytes(content)
    refused(path, "Bad CRC-32 for file 'model/data/0'")
    model = RWKV4.from_pretrained(path, checksums=False)
    assert model.embeddings.weight[0, 0] == -weights["emb.weight"][0, 0]
    assert torch.equal(open_checkpoint(path).tensors["head.weight"], weights["head.weight"])  # as `info` reads it


@pytest.mark.parametrize("checksums", ["no", 0, None])
def test_switch_that_is_no_bool_is_refused(tmp_path: Path, checksums: object) -> None:
    with pytest.raises(TypeError, match="checksums must be True or False, got"):
        RWKV4.from_pretrained(write_pth(tmp_path / "model.pth", blinkdl()), checksums=checksums)  # type: ignore


def test_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = write_pth(tmp_path / "model.pth", blinkdl())
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(RWKV4.from_pretrained(path).head.weight, blinkdl()["head.weight"])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 4, 2479])
def test_record_that_is_short_is_refused(tmp_path: Path, method: int, size: int) -> None:
    write_pth(tmp_path / "model.pth", blinkdl())
    with zipfile.ZipFile(tmp_path / "model.pth") as old, zipfile.ZipFile(tmp_path / "cut.pth", "w", method) as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, content[:size] if record.filename == "model/data/0" else content)
    for checksums in (True, False):
        with pytest.raises(CheckpointError, match=rf"model/data/0 has {size} of the 2480 bytes it should have\)$"):
            RWKV4.from_pretrained(tmp_path / "cut.pth", checksums=checksums)


def test_record_that_is_gone_is_named(tmp_path: Path) -> None:
    write_pth(tmp_path / "model.pth", blinkdl())
    with zipfile.ZipFile(tmp_path / "model.pth") as old, zipfile.ZipFile(tmp_path / "cut.pth", "w") as new:
        for record in old.infolist():
            if record.filename != "model/data/1":
                new.writestr(record.filename, old.read(record))
    refused(tmp_path / "cut.pth", "data/1")


def set_field(content: bytearray, name: str, offset: int, form: str, value: int) -> None:
    struct.pack_into(form, content, entry(content, name) + offset, value)


def begin_at_another(content: bytearray, name: str) -> None:
    (place,) = struct.unpack_from("<I", content, entry(content, "model/data/1") + 42)
    set_field(content, name, 42, "<I", place)


DAMAGE: dict[str, Callable[[bytearray, str], None]] = {
    "begins where another does": begin_at_another,
    "reaches into the next": lambda content, name: [
        set_field(content, name, offset, "<I", 2480 + 4000) for offset in (20, 24)
    ],
    "reaches behind the end": lambda content, name: [
        set_field(content, name, offset, "<I", 2**31) for offset in (20, 24)
    ],
    "larger than it can be": lambda content, name: set_field(content, name, 24, "<I", 2**31),
    "of another size than is stored": lambda content, name: set_field(content, name, 24, "<I", 2481),
    "encrypted": lambda content, name: set_field(content, name, 8, "<H", 0x809),
    "of another method": lambda content, name: set_field(content, name, 10, "<H", 12),
    "of an unknown method": lambda content, name: set_field(content, name, 10, "<H", 99),
    "without a header": lambda content, name: set_field(content, name, 42, "<I", 7),
}


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_directory_that_does_not_fit_the_records_is_refused(tmp_path: Path, damage: str, checksums: bool) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    content = bytearray(path.read_bytes())
    DAMAGE[damage](content, "model/data/0")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pth: not a whole file of torch\.save \(.+\)$"):
        RWKV4.from_pretrained(path, checksums=checksums)


@pytest.mark.parametrize("size", [2**31, 2**32 - 2])
def test_deflated_record_that_declares_more_than_it_can_hold_is_refused(tmp_path: Path, size: int) -> None:
    path = packed(write_pth(tmp_path / "m.pth", blinkdl()), tmp_path / "model.pth", method=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    set_field(content, "m/data/0", 24, "<I", size)
    path.write_bytes(content)
    refused(path, f"m/data/0 has no {size} bytes")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/0", bytes(2480))
    refused(path, "there are two of model/data/0")


def test_pickle_that_is_no_list_of_tensors_is_not_inflated(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(2**26 + 1))
    assert (tmp_path / "model.pth").stat().st_size < 2**17
    refused(tmp_path / "model.pth", "data.pkl has 67108865 bytes, more than any list of tensors")


@pytest.mark.parametrize("names", [(), ("a.txt",), ("model/a.txt",), ("model/", "model/data/0")])
def test_archive_of_something_else_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    refused(tmp_path / "model.pth", "an archive without data.pkl")


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The archive with another pickle, and checksums that are right."""
    again = path.with_name("again.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, change(content) if record.filename.endswith("data.pkl") else content)
    return again


FIRST = b"X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06M\x6c\x02t"  # key "0", on the CPU, 620 elements


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (FIRST.replace(b"M\x6c\x02", b"J\x6c\x02\x00\x10"), "has 2480 of the 1073744304 bytes"),
        (FIRST.replace(b"X\x01\x00\x00\x000", b"K\x00"), "declares a tensor in another way"),  # a number for a key
        (FIRST.replace(b"M\x6c\x02", b"G\x41\xb0" + bytes(6)), "declares a tensor in another way"),  # a fraction
        (FIRST.replace(b"M\x6c\x02", b""), "declares a tensor in another way"),
    ],
)
def test_pickle_that_declares_more_than_its_record_holds_is_refused(tmp_path: Path, changed, message) -> None:
    path = write_pth(tmp_path / "model.pth", blinkdl())
    with zipfile.ZipFile(path) as archive:
        assert FIRST in archive.read("model/data.pkl")
    refused(with_pickle(path, lambda content: content.replace(FIRST, changed)), message)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=50)
@given(data=st.data())
def test_changed_pickle_raises_nothing_but_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
        return bytes(changed)

    path = with_pickle(write_pth(tmp_path / "model.pth", blinkdl()), change)
    with contextlib.suppress(CheckpointError):
        RWKV4.from_pretrained(path)
