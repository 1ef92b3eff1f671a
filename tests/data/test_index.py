"""What the index says of a tar is what tarfile and webdataset read in it; what it can't trust, it refuses."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from pipeline.data.tar import BLOCK, BadShardError, ShardIndex, scan

Places = dict[str, dict[str, tuple[int, int]]]  # key → part → (offset, size)
WriteTar = Callable[..., Path]
Member = tuple[str, bytes] | tarfile.TarInfo
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FORMAT_NAMES = ["ustar", "gnu", "pax"]


def write_members(path: Path, members: Iterable[Member], fmt: int = tarfile.PAX_FORMAT) -> Path:
    """A tar by Python's tarfile.  A name with its bytes is a file."""
    with tarfile.open(path, "w", format=fmt) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(regular(*member), io.BytesIO(member[1]))
    return path


def regular(name: str, data: bytes, **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), pax
    return info


def special(kind: bytes, name: str = "a.png") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "b.png"
    return info


def patched(path: Path, at: int, field: bytes, *, header: int) -> None:
    """Put bytes into a header and set its checksum right."""
    data = bytearray(path.read_bytes())
    data[header + at : header + at + len(field)] = field
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    path.write_bytes(data)


def places(index: ShardIndex) -> Places:
    return {
        key: {
            part: (offset, size)
            for part, (offset, size) in zip(index.parts, index.offsets[row].tolist(), strict=True)
            if offset >= 0
        }
        for row, key in enumerate(index.keys)
    }


def places_by_tarfile(path: Path) -> Places:
    found: Places = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg():
                folder, slash, base = member.name.rpartition("/")
                key, _, part = base.partition(".")
                found.setdefault(folder + slash + key, {})[part.lower()] = (member.offset_data, member.size)
    return found


def samples_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    reader: Any = WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {name: data for name, data in s.items() if not name.startswith("__")}) for s in reader]


def samples_by_scan(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (key, {part: data[offset : offset + size] for part, (offset, size) in parts.items()})
        for key, parts in places(scan(path)).items()
    ]


def check_agreement(path: Path, num_samples: int) -> None:
    index = scan(path)
    assert len(index.keys) == num_samples
    assert list(index.parts) == sorted(index.parts)
    assert places(index) == places_by_tarfile(path)
    assert list(index.keys) == list(places_by_tarfile(path))
    assert samples_by_scan(path) == samples_by_webdataset(path)


def refusal(path: Path) -> str:
    """What a scan says against a shard, after the file's name."""
    with pytest.raises(BadShardError) as told:
        scan(path)
    said = str(told.value)
    assert said.startswith(f"{path}: at byte ")
    return said.removeprefix(f"{path}: ")


KEYS = {
    "plain": "000123",
    "in folders": "train/part-1/000123",
    "long": "train/" + "x" * 120,
    "long folders": "d" * 60 + "/" + "e" * 60 + "/" + "f" * 60,
    "not ASCII": "köter-猫-🐈",
    "long and not ASCII": "ä" * 70 + "/" + "猫" * 20,
    "dots in a folder": "v1.0/b.c/000123",
    "from here": "./000123",
    "spaces": " a b ",
    "99 characters": "y" * 95,
    "100 characters": "y" * 96,
    "101 characters": "y" * 97,
}


PARTS = {"cls": b"3", "JSON": b"{}", "moments.npy": b"", "png": b"p" * 700}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_agrees_on_what_webdataset_writes(tmp_path: Path, write_tar: WriteTar, key: str) -> None:
    path = write_tar(tmp_path / "a.tar", [{"__key__": key + mark} | PARTS for mark in ("", "1", "2")])
    check_agreement(path, 3)
    assert scan(path).parts == ("cls", "json", "moments.npy", "png")


@pytest.mark.parametrize("fmt", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_agrees_on_every_format(tmp_path: Path, key: str, fmt: int) -> None:
    if fmt == tarfile.USTAR_FORMAT:  # it holds at most 100 bytes after the last slash
        folder, slash, base = key.rpartition("/")
        key = folder + slash + base[:20]
    members = [(f"{key}{mark}.{part}", data) for mark in ("", "1", "2") for part, data in PARTS.items()]
    check_agreement(write_members(tmp_path / "a.tar", members, fmt), 3)


@pytest.mark.parametrize("fmt", FORMATS, ids=FORMAT_NAMES)
def test_folders_are_passed_over(tmp_path: Path, fmt: int) -> None:
    deep = "d" * 60 + "/" + "e" * 80
    folders = [special(tarfile.DIRTYPE, name) for name in ("train", deep)]
    path = write_members(tmp_path / "a.tar", [folders[0], ("train/0.png", b"x"), folders[1], ("1.png", b"yy")], fmt)
    check_agreement(path, 2)


def test_other_remarks_in_pax_headers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as tar:
        for name in ("0.png", "ü" * 60 + ".png", "1.png"):
            info = regular(name, b"data", comment="path=../evil.png", mtime="1.25")
            tar.addfile(info, io.BytesIO(b"data"))
    check_agreement(path, 3)


def test_a_size_in_a_pax_header_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(regular("0.png", b"d" * 600, size="600"), io.BytesIO(b"d" * 600))
        tar.addfile(regular("1.png", b"e"), io.BytesIO(b"e"))
    patched(path, 124, b"0" * 11 + b"\0", header=2 * BLOCK)
    check_agreement(path, 2)


def test_a_size_in_base_256_counts(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"d" * 600), ("1.png", b"e")])
    patched(path, 124, b"\x80" + (600).to_bytes(11, "big"), header=0)
    check_agreement(path, 2)


@pytest.mark.parametrize("spelling", [b"%06o\0 ", b"%06o \0", b"%07o\0", b"%6o\0 ", b"%06o\0\0"])
def test_checksums_as_other_writers_spell_them(tmp_path: Path, spelling: bytes) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"d" * 600), ("1.png", b"e")])
    wanted = places(scan(path))
    data = bytearray(path.read_bytes())
    data[148:156] = spelling % int(data[148:154], 8)
    path.write_bytes(data)
    assert places(scan(path)) == wanted
    check_agreement(path, 2)


def test_parts_that_some_samples_lack(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x"), ("0.cls", b"1"), ("1.jpg", b"y"), ("2.cls", b"2")])
    check_agreement(path, 3)
    assert scan(path).offsets[1].tolist() == [[-1, 0], [4 * BLOCK + BLOCK, 1], [-1, 0]]


def test_an_empty_tar_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for end in (bytes(2 * BLOCK), bytes(20 * BLOCK)):
        path.write_bytes(end)
        assert scan(path).keys == () and scan(path).offsets.shape == (0, 0, 2)


def test_an_index_survives_the_disk(tmp_path: Path) -> None:
    index = scan(write_members(tmp_path / "a.tar", [("köter/猫.png", b"x"), ("köter/猫.cls", b"1"), ("1.jpg", b"y")]))
    index.save(tmp_path / "a.npz")
    loaded = ShardIndex.load(tmp_path / "a.npz")
    assert loaded.keys == index.keys and loaded.parts == index.parts
    assert np.array_equal(loaded.offsets, index.offsets) and loaded.offsets.dtype == np.int64


@pytest.mark.parametrize("fmt", FORMATS, ids=FORMAT_NAMES)
def test_every_cut_is_found(tmp_path: Path, fmt: int) -> None:
    deep = "d" * 80 + "/" + "e" * 80
    members = [("0.png", b"x" * 1100), ("0.cls", b""), (f"{deep}.png", b"y" * 512), (f"{deep}.cls", b"1")]
    path = write_members(tmp_path / "a.tar", members, fmt)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % BLOCK + 2 * BLOCK
    cut = tmp_path / "cut.tar"
    for size in sorted({*range(0, end, BLOCK), *range(0, end, 97), end - 1}):
        cut.write_bytes(data[:size])
        refusal(cut)
    cut.write_bytes(data[:end])
    assert places(scan(cut)) == places(scan(path))


def flip_all_bits(path: Path, start: int, length: int) -> tuple[list[int], int]:
    """Flip each bit, scan, flip back.  The bytes whose flips pass, and how many flips were refused."""
    wanted = places(scan(path))
    data = bytearray(path.read_bytes())
    passed: list[int] = []
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(start, start + length):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[at] ^ (1 << bit)]), at)
                try:
                    assert places(scan(path)) == wanted, f"a flip of bit {bit} of byte {at} changes what is read"
                    passed.append(at - start)
                except BadShardError:
                    refused += 1
            os.pwrite(file.fileno(), data[at : at + 1], at)
    return passed, refused


@pytest.mark.parametrize(("fmt", "header"), [(0, 2), (0, 4), (1, 2), (2, 2), (2, 4)])
def test_every_flipped_bit_of_a_header_is_found(tmp_path: Path, fmt: int, header: int) -> None:
    name = "d" * 80 + "/" + "e" * 80  # in ustar split in two; in GNU and pax with a header of its own
    path = write_members(tmp_path / "a.tar", [("0.png", b"x"), (f"{name}.png", b"y"), ("2.png", b"z")], FORMATS[fmt])
    passed, refused = flip_all_bits(path, header * BLOCK, BLOCK)
    assert refused + len(passed) == 8 * BLOCK
    assert set(passed) <= {148, 154, 155}  # in the checksum's field: a blank for its first 0, blanks and NULs behind it
    assert len(passed) <= 4


def test_every_flipped_bit_of_the_end_is_found(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x")])
    passed, refused = flip_all_bits(path, 2 * BLOCK, 2 * BLOCK)
    assert not passed and refused == 16 * BLOCK


def test_a_hole_of_zeros_is_found(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [(f"{i}.png", b"x" * 2000) for i in range(4)])
    data = bytearray(path.read_bytes())
    data[5 * BLOCK : 10 * BLOCK] = bytes(5 * BLOCK)  # the second member
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["0.png"]  # to others, a tar that ends here
    assert refusal(path).startswith(f"at byte {10 * BLOCK}: more bytes after the end-of-archive blocks")


def test_a_second_archive_behind_the_first_is_found(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x")])
    path.write_bytes(path.read_bytes() * 2)
    assert refusal(path).startswith("at byte 10240: more bytes after the end-of-archive blocks")


SEPARATE = "the parts of key 'a' do not lie side by side, or it comes twice"
WRONG_MEMBERS = {
    "split key": ([("a.png", b""), ("b.png", b""), ("a.cls", b"")], 1536, SEPARATE),
    "key twice": ([("a.png", b""), ("a.cls", b""), ("b.png", b""), ("a.png", b"")], 2048, SEPARATE),
    "part twice": ([("a.png", b"1"), ("a.png", b"2")], 1536, "'a.png' comes twice"),
    "part twice, in capitals": ([("a.png", b"1"), ("a.PNG", b"2")], 1536, "'a.PNG' comes twice"),
    "no part": ([("a", b"")], 512, "'a' is not named KEY.PART"),
    "no part after the dot": ([("a.", b"")], 512, "'a.' is not named KEY.PART"),
    "no key": ([(".png", b"")], 512, "'.png' is not named KEY.PART"),
    "no key in a folder": ([("a.b/.png", b"")], 512, "'a.b/.png' is not named KEY.PART"),
    "no part in a folder": ([("a.b/c", b"")], 512, "'a.b/c' is not named KEY.PART"),
    "up": ([("../a.png", b"")], 512, "'../a.png' points out of the archive"),
    "up in the middle": ([("b/../../a.png", b"")], 512, "'b/../../a.png' points out of the archive"),
    "absolute": ([("/etc/a.png", b"")], 512, "'/etc/a.png' points out of the archive"),
    "metadata folder": ([("__meta__/a.png", b"")], 512, "has a name that WebDataset keeps for itself"),
    "metadata": ([("__a.b__", b"")], 512, "has a name that WebDataset keeps for itself"),
    "a part of that name": ([("a.__url__", b"")], 512, "has a name that WebDataset keeps for itself"),
    "symbolic link": ([special(tarfile.SYMTYPE)], 0, "member of type b'2': only regular files are read"),
    "hard link": ([special(tarfile.LNKTYPE)], 0, "member of type b'1': only regular files are read"),
    "character device": ([special(tarfile.CHRTYPE)], 0, "member of type b'3': only regular files are read"),
    "block device": ([special(tarfile.BLKTYPE)], 0, "member of type b'4': only regular files are read"),
    "pipe": ([special(tarfile.FIFOTYPE)], 0, "member of type b'6': only regular files are read"),
    "GNU sparse file": ([special(tarfile.GNUTYPE_SPARSE)], 0, "member of type b'S': only regular files are read"),
    "pax sparse file": (
        [regular("a.png", b"", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.png"})],
        512,
        "an extended header with b'GNU.sparse.major': only regular files are read",
    ),
}


@pytest.mark.parametrize(("members", "offset", "reason"), WRONG_MEMBERS.values(), ids=WRONG_MEMBERS.keys())
def test_a_wrong_member_is_named_with_its_place(
    tmp_path: Path, members: list[Member], offset: int, reason: str
) -> None:
    said = refusal(write_members(tmp_path / "a.tar", members))
    assert said.startswith(f"at byte {offset}: ") and reason in said


SIZES = {
    "negative": b"-0000001000\0",
    "signed": b"+0000000001\0",
    "grouped": b"0000000_001\0",
    "not octal": b"00000000008\0",
    "cut by a NUL": b"00000\00000012",
    "negative in base 256": b"\xff" * 12,
    "base 256 beyond 11 bytes": b"\x81" + bytes(10) + b"\1",
}


@pytest.mark.parametrize("field", SIZES.values(), ids=SIZES.keys())
def test_a_size_that_is_no_octal_number_is_refused(tmp_path: Path, field: bytes) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x"), ("1.png", b"y")])
    patched(path, 124, field, header=1024)
    assert refusal(path).startswith("at byte 1024: the header's size field is not octal")


@pytest.mark.parametrize("field", [b"77777777777\0", b"\x80" + b"\x7f" * 11], ids=["octal", "base 256"])
def test_a_size_past_the_end_is_refused(tmp_path: Path, field: bytes) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x"), ("1.png", b"y")])
    patched(path, 124, field, header=1024)
    assert "reaches past the end of the file" in refusal(path)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", b"x")])
    patched(path, 0, b"\xff\xfe.png\0", header=0)
    assert refusal(path) == r"at byte 0: the member's name is not UTF-8: b'\xff\xfe.png'"


def pax_record(key: bytes, value: bytes) -> bytes:
    length = next(n for n in range(9, 99) if n == len(b"%d %s=%s\n" % (n, key, value)))
    return b"%d %s=%s\n" % (length, key, value)


EXTENDED = {
    "no length": b"path=a.png\n",
    "length 0": b"0 path=a.png\n",
    "negative length": b"-14 path=a.png\n",
    "length past the end": b"99 path=a.png\n",
    "no value": b"9 path\n",
    "no line's end": b"13 path=a.png",
    "a size that is no number": pax_record(b"size", b"-512"),
}


@pytest.mark.parametrize("record", EXTENDED.values(), ids=EXTENDED.keys())
def test_a_malformed_extended_header_is_refused(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        header = special(b"0", "x")
        header.size = len(record)
        tar.addfile(header, io.BytesIO(record))
        tar.addfile(regular("0.png", b"x"), io.BytesIO(b"x"))
    patched(path, 156, b"x", header=0)
    assert "extended header" in refusal(path) and refusal(path).startswith("at byte 512: ")


@pytest.mark.parametrize("record", [pax_record(b"path", b"a.png"), pax_record(b"size", b"1")], ids=["path", "size"])
def test_a_global_header_that_names_members_is_refused(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        header = special(b"0", "x")
        header.size = len(record)
        tar.addfile(header, io.BytesIO(record))
        tar.addfile(regular("0.png", b"x"), io.BytesIO(b"x"))
    patched(path, 156, b"g", header=0)
    assert "a global header gives all members one path or size" in refusal(path)


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [regular("0.png", b"", path="a\0.png")])
    assert "is not named KEY.PART" in refusal(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        bytes(511),
        bytes(512),
        bytes(1023),
        b"not a tar at all" * 100,
        gzip.compress(b"x" * 10_000),
        gzip.compress(np.random.default_rng(0).bytes(10_000)),
        np.random.default_rng(0).bytes(10_000),
    ],
    ids=["nothing", "a byte", "511 zeros", "512 zeros", "1023 zeros", "text", "small gzip", "gzip", "noise"],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert refusal(path).startswith("at byte 0: ")


def test_a_compressed_tar_named_tar_is_refused(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [("0.png", np.random.default_rng(0).bytes(4000))])
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert samples_by_webdataset(path)  # which would read it, but not by offset
    assert refusal(path).startswith("at byte 0: not a tar header")
