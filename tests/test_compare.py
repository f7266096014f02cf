"""The table: honest turns, the right reference, labels that can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, corpus_of, make_model, with_counts, write_text
from matplotlib.figure import Figure
from torch import Tensor

from dflow import compare as comparing
from dflow import hf
from dflow.bijectors import Autoregressive, Coupling
from dflow.compare import (
    FILES,
    Comparison,
    Contestant,
    compare,
    compare_texts,
    markdown,
    measure,
    num_calls,
    plot,
    record,
    timing,
    write,
)
from dflow.config import InputError
from dflow.data import Text
from dflow.distributions import AnyOrder, ConditionalCategorical, SequenceCategorical, Spectra
from dflow.evaluate import evaluate
from dflow.hf import DflowModel
from dflow.ops.live import TensorMemory


@pytest.fixture
def text(tmp_path: Path) -> Text:
    return corpus_of(write_text(tmp_path)).test


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def contestants(text: Text, *families: str) -> list[Contestant]:
    K = int(text.ids.max()) + 1
    return [Contestant(f"runs/{family}", make_model(family, K), text) for family in families]


@pytest.fixture
def comparison(text: Text) -> Comparison:
    return compare(contestants(text, "grouped", "lstm", "bipartite"), batch_size=4, rounds=3)


def test_rows_say_what_the_models_are(comparison: Comparison, text: Text) -> None:
    assert [row.family for row in comparison.rows] == ["grouped", "lstm", "bipartite"]
    assert [row.num_calls for row in comparison.rows] == [2, 8, 2]
    for row, c in zip(comparison.rows, contestants(text, "grouped", "lstm", "bipartite"), strict=True):
        assert row.evaluation == evaluate(c.model, text)
        assert row.num_parameters == sum(p.numel() for p in c.model.parameters())
        assert row.latency_threads in (1, 2)


def test_ratios_are_to_the_first_lstm_else_to_the_first_model(comparison: Comparison, text: Text) -> None:
    grouped, lstm, _ = comparison.rows
    assert comparison.reference == "runs/lstm"
    assert (lstm.latency_ratio, lstm.throughput_ratio) == (1, 1)
    assert grouped.latency_ratio == pytest.approx(lstm.latency_ms / grouped.latency_ms)
    assert grouped.throughput_ratio == pytest.approx(
        grouped.characters_per_second / lstm.characters_per_second
    )
    other = compare(contestants(text, "bipartite", "grouped"), batch_size=2, rounds=1, limit=1)
    assert other.reference == "runs/bipartite"


class Clock:
    """Stands still but for what a model takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(DflowModel):
    """Draws nothing, in a known time that depends on the threads."""

    clock: Clock
    log: list[tuple[str, int, int]]
    name: str
    seconds: dict[int, float]

    def generate(self, num_return_sequences: int = 1, **_: Any) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.log.append((self.name, torch.get_num_threads(), num_return_sequences))
        self.clock.now += self.seconds[torch.get_num_threads()]
        x = torch.zeros(num_return_sequences, 8, dtype=torch.int64)
        x[:, 6:] = -1
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def slow(
    text: Text, name: str, seconds: dict[int, float], log: list[tuple[str, int, int]], clock: Clock
) -> Contestant:
    [c] = contestants(text, "lstm")
    c.model.__class__ = Slow
    c.model.name, c.model.seconds, c.model.log, c.model.clock = name, seconds, log, clock
    return Contestant(name, c.model, text)


def test_models_take_turns_and_keep_their_better_threads(text: Text, clock: Clock) -> None:
    log: list[tuple[str, int, int]] = []
    a = slow(text, "a", {1: 0.25, 2: 0.75}, log, clock)
    b = slow(text, "b", {1: 1.0, 2: 0.5}, log, clock)
    a.model.train()
    first, second = measure([a, b], 5, 8, rounds=3, seed=0, progress=False)
    assert log == [("a", 1, 5), ("a", 2, 5), ("b", 1, 5), ("b", 2, 5)] * 4
    assert (first.threads, second.threads) == (1, 2)
    assert (first.seconds, second.seconds) == (0.25, 0.5)
    assert first.characters == 30  # absent entries are no text
    assert torch.get_num_threads() == 2
    assert a.model.training


def test_threads_and_modes_are_restored_after_an_error(text: Text, clock: Clock) -> None:
    a = slow(text, "a", {}, [], clock)
    a.model.train()
    with pytest.raises(KeyError):
        measure([a], 1, 8, rounds=1, seed=0, progress=False)
    assert torch.get_num_threads() == 2
    assert a.model.training


def made(model: DflowModel, length: int, prompt: Tensor | None = None) -> int:
    """Calls of networks that a draw takes, counted where they are made."""
    count, steps = 0, []

    def spy(net: Any, name: str, block: int) -> None:
        method = getattr(net, name)

        def counted(*args: Any) -> Any:
            nonlocal count
            steps.append((net, name))
            # A call draws as many rows as a block has.
            count += (steps.count((net, name)) - 1) % block == 0
            return method(*args)

        setattr(net, name, counted)

    for module in model.modules():
        if isinstance(module, AnyOrder):
            spy(module, "logits", 1)
        elif isinstance(module, SequenceCategorical):
            spy(module.net, "step", module.block)
            if hasattr(module.net, "read"):
                spy(module.net, "read", 1)
        elif isinstance(module, Autoregressive):
            spy(module.net, "step", 1)
            spy(module, "params", 1)
        elif isinstance(module, Coupling):
            spy(module, "_params", 1)
        elif isinstance(module, ConditionalCategorical | Spectra):
            spy(module.net, "forward", 1)
    model.generate(1, length=length, generator=torch.Generator().manual_seed(0), prompt=prompt)
    return count


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in SETTINGS]
    + [
        ("grouped", {"num_calls": 4, "order": "lockstep"}),
        ("grouped", {"num_calls": 3, "block": 2}),
        ("grouped", {"num_calls": 8, "order": "bit_reversed"}),
        ("any_order", {"num_calls": 3, "order": "random", "schedule": "dp"}),
        ("any_order", {"num_calls": 3, "order": "confidence"}),
        ("autoregressive", {"inversion": "jacobi"}),
        ("autoregressive", {"base": "autoregressive"}),
        ("multiscale", {"conditional": "categorical"}),
    ],
    ids=str,
)
def test_the_calls_told_are_those_made(family: str, changes: dict[str, Any], explicit: bool) -> None:
    for length in (3, 8):
        torch.manual_seed(0)
        settings = SETTINGS[family] | {"length": LENGTH} | changes
        config = hf.DflowConfig(family=family, vocab_size=5, explicit_length=explicit, **settings)
        model = with_counts(hf.DflowModel(config), 5).eval()
        told = num_calls(model, length)
        assert told == made(model, length)


def test_a_law_from_left_to_right_stops_at_the_length(text: Text) -> None:
    lstm, grouped = (c.model for c in contestants(text, "lstm", "grouped"))
    assert (num_calls(lstm, 3), num_calls(lstm, 8), num_calls(grouped, 8)) == (3, 8, 2)


def test_markdown(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5
    assert len({line.count("|") for line in table}) == 1
    row = comparison.rows[0]
    assert f"{row.evaluation.bpc:.4f} ± {row.evaluation.standard_error:.4f}" in table[2]
    assert "exact" in table[0]
    assert "batch 4" in table[0]
    notes = "\n".join(lines)
    assert torch.__version__ in notes
    assert "runs/grouped, runs/lstm, runs/bipartite: chunks of 8 symbols" in notes
    assert "Ratios: to runs/lstm" in notes
    assert re.search(r"threads \d", notes)
    assert "FAILED" not in notes
    broken = replace(row, evaluation=replace(row.evaluation, round_trip=False))
    assert "ROUND TRIP FAILED, do not trust: runs/grouped" in markdown(replace(comparison, rows=(broken,)))


def test_record_is_one_line_of_json(comparison: Comparison) -> None:
    line = record(comparison)
    assert "\n" not in line
    found = json.loads(line)
    assert found["rows"][1]["evaluation"]["bpc"] == comparison.rows[1].evaluation.bpc
    assert found["environment"]["torch"] == torch.__version__


def test_the_plot_names_every_model_and_joins_the_budgets_of_one(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    same = [replace(comparison.rows[i % 3], name=f"runs/model_${i}") for i in range(14)]
    budgets = [replace(comparison.rows[0], name=f"runs/grouped@{c}", num_calls=c) for c in (8, 2, 4)]
    for rows in (comparison.rows, tuple(same), (same[0],), (*budgets, comparison.rows[1])):
        png = plot(replace(comparison, rows=tuple(rows)))
        assert png.startswith(b"\x89PNG")
        left, right = drawn[-1].axes
        assert left.get_xscale() == right.get_xscale() == "log"
        names = {row.name.split("@")[0].rpartition("/")[2].replace("$", r"\$") for row in rows}
        labels = [t for t in right.texts if not t.get_text().isdigit()]
        assert {t.get_text() for t in labels} == names
        assert sorted(int(t.get_text()) for t in right.texts if t.get_text().isdigit()) == sorted(
            row.num_calls for row in rows
        )
        boxes = [t.get_window_extent() for t in labels]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        ticks = [t for t in right.xaxis.get_majorticklabels() if t.get_text()]
        low, high = right.get_xlim()
        assert len([t for t in ticks if low <= t.get_position()[0] <= high]) >= 2
    # The budgets of one model are one line, from few calls to many.
    assert left.containers[0].lines[0].get_xdata().tolist() == [2, 4, 8]
    # What was scored on less of the text is hollow.
    less = replace(comparison.rows[0], evaluation=replace(comparison.rows[0].evaluation, num_symbols=1))
    plot(replace(comparison, rows=(less, comparison.rows[1])))
    points = [c for c in drawn[-1].axes[0].collections if len(c.get_facecolor())]
    assert [c.get_facecolor()[0].tolist() == [1, 1, 1, 1] for c in points].count(True) == 1


def test_results_are_written_and_never_over_others(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    assert [p.name for p in write(comparison, folder)] == list(FILES)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert (folder / "compare.md").read_text(encoding="utf-8") == markdown(comparison)
    assert json.loads((folder / "compare.json").read_text())["reference"] == "runs/lstm"
    with pytest.raises(InputError, match=r"compare\.json: exists already"):
        write(comparison, folder)
    with pytest.raises(InputError, match="not a folder"):
        comparing.check_folder(folder / "compare.md")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"length": 9}, "runs/lstm draws sequences of 1 to 8"),
        ({"length": 0}, "length 0"),
        ({"rounds": 0}, "rounds 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"limit": 0}, "limit 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], named: str, text: Text) -> None:
    with pytest.raises(InputError, match=named):
        compare(contestants(text, "lstm"), **settings)  # type: ignore[arg-type]


def test_no_model_and_two_of_one_name_are_refused(text: Text) -> None:
    with pytest.raises(InputError, match="at least one"):
        compare([])
    with pytest.raises(InputError, match="one name"):
        compare(contestants(text, "lstm", "lstm"))


def test_calls_that_hang_on_the_sample_are_counted():
    config = hf.DflowConfig(
        family="autoregressive", vocab_size=5, length=LENGTH, inversion="jacobi", **SETTINGS["autoregressive"]
    )
    model = hf.DflowModel(config).eval()
    assert model.num_calls == LENGTH + 1
    # Zero weights of the heads: the identity, which one call confirms.
    assert num_calls(model, LENGTH, rounds=3) == 1
    net = model.distribution.bijector[0].net
    torch.nn.init.constant_(net.head.bias[:1], -9.0)
    assert num_calls(model, LENGTH, rounds=3) == 2


# -- texts of any length -------------------------------------------------------------------------------------


def with_context(text: Text, *families: str, context: int = 6) -> list[Contestant]:
    K = int(text.ids.max()) + 1
    return [Contestant(f, make_model(f, K, context=context), text) for f in families]


def test_texts_are_timed_after_a_prompt_beside_the_plain_loop(text: Text) -> None:
    torch.set_num_threads(1)
    models = with_context(text, "grouped", "lstm", "any_order", "transformer")
    found = compare(models, length=43, batch_size=1, rounds=1, limit=2)
    assert (found.length, found.reference) == (LENGTH, "lstm")
    texts = found.texts
    assert texts is not None
    assert (texts.length, texts.prompt, texts.shorter, texts.rounds) == (43, 6, 19, 1)
    assert texts.reference == "transformer"
    for row, c in zip(texts.rows, models, strict=True):
        assert row.name == c.name
        assert row.num_calls == made(c.model, 43, text.ids[:6].long())
        assert row.ratio == pytest.approx(row.characters_per_second / texts.rows[3].characters_per_second)
        assert row.characters_per_second == pytest.approx(37e3 / row.milliseconds)
    assert "| model, text of 43 symbols |" in markdown(found)
    assert "the first 6 of the scored text as its prompt" in markdown(found)
    assert json.loads(record(found))["texts"]["rows"][0]["num_calls"] == texts.rows[0].num_calls
    # Without a plain loop the baseline is the reference.
    assert compare_texts(models[:2], 20, 1, 1).reference == "lstm"


@pytest.mark.parametrize("family", ["grouped", "any_order", "transformer", "lstm"])
def test_memory_does_not_grow_with_the_length_beyond_the_text(family: str, text: Text) -> None:
    torch.set_num_threads(1)
    texts = compare_texts(with_context(text, family), 94, 0, 1)
    # The chunks and the text that they are joined to, int64 each.
    most = 2 * 8 * (94 - 30)
    assert texts.shorter == 30
    assert 0 < texts.rows[0].memory_growth <= most

    # A law that keeps all of the text in mind is noticed.
    [c] = with_context(text, family, context=200)
    peaks = []
    for length in (30, 30, 94):
        with TensorMemory() as memory:
            c.model.generate(1, length=length, prompt=text.ids[:6].long())
        peaks.append(memory.peak)
    assert peaks[2] - peaks[1] > 5 * most


def test_texts_that_cannot_be_drawn_are_refused(text: Text) -> None:
    models = [*with_context(text, "grouped"), Contestant("runs/old", make_model("lstm", 30), text)]
    with pytest.raises(InputError, match=r"length 9: runs/old draws .* 1 to 8 .*without a model\.context"):
        compare(models, length=9)
    long = with_context(text, "transformer", context=50)
    with pytest.raises(InputError, match="the prompt has 50 symbols; take a larger"):
        compare(long, length=50)
    short = [replace(c, text=replace(c.text, ids=c.text.ids[:40])) for c in long]
    with pytest.raises(InputError, match=r"takes the first 50 symbols .* fewer for transformer"):
        compare(short, length=60)
