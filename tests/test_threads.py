"""Threads by the size of the work, where a user has chosen none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import SETTINGS, write_model, write_text

from dflow import threads, zoo
from dflow.cli import main
from dflow.threads import PAYS, Suited


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "processors", lambda: 2)
    yield
    Suited.free = False
    torch.set_num_threads(before)


def test_small_work_takes_one_thread_and_large_work_all() -> None:
    Suited.free = True
    for work, number in ((PAYS - 1, 1), (PAYS, 2), (None, 2), (1, 1)):
        Suited.to(work)
        assert torch.get_num_threads() == number


def test_a_number_that_a_user_has_chosen_stays() -> None:
    torch.set_num_threads(2)
    Suited.to(1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "family", [name for name in zoo.names("text") if "hidden_size" in zoo.find(name).fields]
)
def test_work_grows_with_batch_and_width_and_falls_with_calls(family: str) -> None:
    record = zoo.find(family)
    settings = zoo.settings(family, SETTINGS[family] | {"length": 16, "hidden_size": 8})
    assert record.multiplications(settings, 4) == 4 * 64 * (1 if record.recurrent else 16)
    assert record.multiplications(settings, 4, 16) == 4 * 64
    assert record.multiplications(settings, 4, 0) == record.multiplications(settings, 4)


@pytest.mark.parametrize(("words", "number"), [([], 1), (["--threads", "2"], 2)], ids=str)
def test_commands_choose_for_small_models_alone(
    words: list[str], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    model, text = write_model(tmp_path / "m", "grouped", write_text(tmp_path)), write_text(tmp_path)
    for command in (["generate"], ["evaluate", "--data", str(text), "--split", "all"]):
        torch.set_num_threads(2)
        assert main([command[0], "--model", str(model), *command[1:], *words]) == 0
        assert torch.get_num_threads() == number
