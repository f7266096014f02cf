"""Memory of codecs: that of the one that is measured, not of the process that measures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from dflow.compare import codecs, memory, peers
from dflow.compare.codecs import compare_codecs, texts

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Holder:
    """Holds so many MiB while it encodes, and fewer while it decodes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self) -> list[bytes]:
        return [bytes([len(b"\1" * (self.size * MIB)) % 7])]

    def decode(self, files: Sequence[bytes]) -> None:
        assert files == [bytes([self.size * MIB % 7])]
        assert sum(bytes(MIB)) == 0


def test_peaks_are_those_of_the_codec() -> None:
    held = b"\1" * (300 * MIB)
    found = memory.measure(Holder, 64)
    assert len(held) == 300 * MIB
    # Zeros that nobody looks at take nothing.
    assert 63 * MIB <= found["encode"] < 90 * MIB
    assert found["decode"] < 20 * MIB
    before = memory.peak()
    held += bytes(16 * MIB)
    assert memory.peak() >= before


def test_what_fails_there_is_told_here() -> None:
    with pytest.raises(RuntimeError, match="cannot be measured: ValueError: no codec none"):
        memory.measure(peers.find, "none", "such")
    with pytest.raises(RuntimeError, match="cannot be measured: BrokenProcessPool"):
        memory.measure(os._exit, 3)


def test_every_codec_is_found_again() -> None:
    for codec in (*peers.picture_codecs(), *peers.raw_codecs(), *peers.text_codecs()):
        assert peers.find(codec.name, codec.settings).library == codec.library


def test_the_table_has_a_column_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def measure(make: Any, *given: Any) -> dict[str, int]:
        asked.append(given)
        opened = make(*given)
        opened.decode(opened.encode())
        return {"encode": 3 * MIB, "decode": 5 * MIB // 2}

    monkeypatch.setattr(memory, "measure", measure)
    known = next(codec for codec in peers.text_codecs() if codec.name == "gzip")
    other = replace(known, name="other")
    material = texts("t", [b"a" * 99, b"b" * 99])
    found = compare_codecs(material, codecs=[known, other], rounds=1, each=False, memory=True)
    assert [row.memory for row in found.rows] == [{"encode": 3 * MIB, "decode": 5 * MIB // 2}, None]
    assert len(asked) == 1
    table = codecs.markdown(found)
    assert "| memory MiB |" in table
    assert "| 3 / 2 |" in table
    assert "Memory: what encoding / decoding adds" in table
    assert "memory" not in codecs.markdown(compare_codecs(material, codecs=[known], rounds=1)).lower()
