"""The file format: what is written is read, and nothing else is."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from dataclasses import replace

import pytest

from dflow.coding.container import IMAGES, Container, Damaged, Reader, Segment, crc32, read, varint, write

ONE = Container(IMAGES, 2, bytes(range(8)), b"meta", (Segment(7, False, (b"ab", b"", b"cdef")),))
MANY = Container(
    IMAGES,
    0,
    bytes(8),
    b"m" * 200,
    (
        Segment(1, False, (b"a1" * 100, b"a2" * 90, b"a3" * 300)),
        Segment(2, True, (b"raw" * 70,)),
        Segment(3, False, (b"c1", b"c2" * 8000, b"")),
        Segment(4, True, (b"", b"", b"extra")),
    ),
)


def content(c: Container) -> tuple[object, ...]:
    return c.kind, c.mode, c.fingerprint, c.meta, [(s.crc, s.raw, s.levels) for s in c.segments]


def told(meta: bytes, segments: bytes) -> bytes:
    """A header with a right checksum around numbers that may be hostile."""
    header = b"dfl\x02\x10" + bytes(8) + meta + segments
    return header + struct.pack("<I", crc32(header))


@pytest.mark.parametrize("file", [ONE, MANY, replace(ONE, segments=(), meta=b"")])
def test_what_is_written_is_read(file):
    again = read(write(file))
    assert content(again) == content(file)
    assert again.present == again.num_levels == file.num_levels
    assert again.level_bytes == file.level_bytes
    assert len(write(file)) == again.header + sum(file.level_bytes)


def test_the_bytes_are_these():
    assert write(ONE).hex() == (
        "64666c" "02" "12" "0001020304050607" "04" "6d657461" "01"
        "07000000" "03" "02" "f069" "00" "04" "daf9" "a02d7fdb" "6162" "63646566"
    )  # fmt: skip


def test_a_header_without_meta_has_36_bytes():
    levels = (b"x" * 200, b"y" * 2000, b"z" * 16000)
    file = Container(IMAGES, 0, bytes(8), b"", (Segment(0, False, levels),))
    assert len(write(file)) - sum(map(len, levels)) == 36


def test_the_levels_lie_one_after_the_other():
    data = write(MANY)
    start, sizes = read(data).header, MANY.level_bytes
    first = data[start : start + sizes[0]]
    assert first == b"a1" * 100 + b"raw" * 70 + b"c1"


def test_every_prefix_gives_the_levels_that_are_whole():
    data, header = write(MANY), read(write(MANY)).header
    ends = [header + sum(MANY.level_bytes[: i + 1]) for i in range(3)]
    for size in sorted({0, 3, header - 1, header, *ends, *(e - 1 for e in ends), *(e + 1 for e in ends[:2])}):
        whole = sum(size >= end for end in ends)
        if not whole:
            with pytest.raises(Damaged):
                read(data[:size], prefix=True)
            continue
        found = read(data[:size], prefix=True)
        assert found.present == whole
        assert found.num_levels == 3
        assert found.level_bytes == MANY.level_bytes
        for mine, theirs in zip(found.segments, MANY.segments, strict=True):
            assert mine.levels == theirs.levels[:whole]
        if whole < 3:
            with pytest.raises(Damaged, match="are missing"):
                read(data[:size])
    with pytest.raises(Damaged, match="1 bytes too many"):
        read(data + b"x", prefix=True)


def test_every_flipped_bit_and_every_cut_is_refused():
    data = write(ONE)
    for i in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[i // 8] ^= 1 << i % 8
        with pytest.raises(Damaged):
            read(bytes(wrong))
    for size in range(len(data)):
        with pytest.raises(Damaged):
            read(data[:size])


def test_mutations_are_refused():
    data, rng = write(MANY), random.Random(0)
    for _ in range(1000):
        wrong, place, size = bytearray(data), rng.randrange(len(data)), rng.randrange(1, 50)
        match rng.randrange(4):
            case 0:
                wrong[place] ^= rng.randrange(1, 256)
            case 1:
                del wrong[place : place + size]
            case 2:
                wrong[place:place] = rng.randbytes(size)
            case _:
                other = rng.randrange(len(data))
                wrong[place : place + size] = data[other : other + size]
        if bytes(wrong) != data:
            with pytest.raises(Damaged):
                read(bytes(wrong))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (told(varint(1 << 60), b""), "ends within"),
        (told(b"\xff" * 9, b""), "too large"),
        (told(b"\x80" * 8 + b"\x01", b""), "ends within"),
        (told(b"\x81\x00", b"m\x00"), "too large"),
        (told(b"\x00", varint(1 << 60)), "too large"),
        (told(b"\x00", varint(3) + bytes(10)), "too large|without levels"),
        (told(b"\x00", b"\x01" + bytes(4) + b"\x00" + bytes(9)), "without levels"),
        (told(b"\x00", b"\x01" + bytes(4) + b"\x01" + varint(1 << 60) + b"cc"), "cut off"),
        (told(b"\x00", b"\x01" + bytes(4) + b"\x7f" + (varint(1 << 61) + b"cc") * 127), "cut off"),
        (b"", "not a .dfl"),
        (b"\x89PNG" + bytes(100), "not a .dfl"),
        (b"dfl", "ends within"),
        (b"dfl\x01" + bytes(100), "version 1 .* reads version 2"),
    ],
)
def test_hostile_numbers_are_refused_at_once(header, message):
    tracemalloc.start()
    start = time.perf_counter()
    for prefix in (False, True):
        with pytest.raises(Damaged, match=message):
            read(header, prefix)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16383, 16384, (1 << 62) - 1, 1 << 62])
def test_varints_go_there_and_back(value):
    reader = Reader(varint(value) + b"z")
    assert reader.varint() == value
    assert reader.left == 1
    with pytest.raises(Damaged, match="too many"):
        reader.finish()


@pytest.mark.parametrize(
    "file",
    [
        replace(ONE, kind=16),
        replace(ONE, mode=-1),
        replace(ONE, fingerprint=b"short"),
        replace(ONE, segments=(Segment(0, False, ()),)),
        replace(ONE, segments=(Segment(0, False, (b"",) * 128),)),
    ],
)
def test_what_does_not_fit_is_not_written(file):
    with pytest.raises(ValueError, match=r"fit|levels"):
        write(file)


def test_a_varint_is_not_negative():
    with pytest.raises(ValueError, match="-1 is not in"):
        varint(-1)
