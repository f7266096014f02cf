"""Memory that is freed is kept: fewer faults of pages, and only where nobody has said otherwise."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from dflow import memory

_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")

#: Forty blocks of 64 MB, each written and freed; the faults of pages that took.
_BLOCKS = """
import resource, sys, torch
from dflow.memory import keep_memory
kept = sys.argv[1] == "keep" and keep_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(1 << 24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, int]:
    for name in memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-c", _BLOCKS, how]
    kept, count = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(count)


@_LINUX
def test_blocks_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, few = faults("keep", monkeypatch)
    if kept == "False":
        pytest.skip("a C library without these settings")
    _, many = faults("leave", monkeypatch)
    assert few < many / 5, (few, many)


@_LINUX
@pytest.mark.parametrize("name", memory._VARIABLES)
def test_settings_of_the_environment_are_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = "" if name == "GLIBC_TUNABLES" else "131072"
    assert faults("keep", monkeypatch, **{name: value})[0] == "False"


def test_older_versions_are_asked_for_less_and_never_for_half(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for most, asked in ((1 << 25, 3), (1 << 20, 2)):
        calls: list[tuple[int, int]] = []

        def mallopt(name: int, size: int, most: int = most, calls: list[tuple[int, int]] = calls) -> int:
            calls.append((name, size))
            return int(name == memory._TRIM_THRESHOLD or size <= most)

        library = type("Library", (), {"mallopt": staticmethod(mallopt)})
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        assert memory.keep_memory() == (asked == 3)
        assert len(calls) == asked
        assert [name for name, _ in calls[:2]] == [memory._MMAP_THRESHOLD] * 2


def test_other_libraries_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not memory.keep_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_memory()
