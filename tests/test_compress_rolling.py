"""Texts coded chunk after chunk, each given the text before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import TEXT, write_text
from test_train import recipe_file, run

from dflow import cli
from dflow.coding import container
from dflow.compress import Drafts, TextCoder, compress_text, decompress_text, describe_text
from dflow.compress.text_coder import TextPlan
from dflow.config import InputError
from dflow.distributions import LawDrafter
from dflow.distributions.drafted import OpenDraws
from dflow.models.counts import counts_drafter

#: Settings of models that read text before a chunk.
MODELS = {
    "transformer": {"counts": 3},
    "grouped": {"counts": 3},
    "grouped blocks": {"block": 2, "num_calls": 4},
    "lstm": {"counts": 3},
    "ngram": {},
    "bipartite": {},
    "any_order": {},
}
FILES = {
    "a.txt": (TEXT[100:200] + "ten at a fixed size " * 12).encode(),
    "b.txt": "line Ä, and\r\nmore".encode(),
    "c.txt": b"",
}


@pytest.fixture(scope="module")
def coders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCoder]:
    made = {}
    for name, model in MODELS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        family = name.split()[0]
        path = recipe_file(folder, write_text(folder), family, {"context": 8, **model}, samples=0)
        made[name] = TextCoder.load(run(path))
    return made


@pytest.mark.parametrize("name", [name for name in MODELS if name != "any_order"])
def test_files_come_back_and_take_the_bits_of_the_likelihood(name: str, coders: dict[str, TextCoder]) -> None:
    coder, adapts = coders[name], "counts" in MODELS[name] or name == "ngram"
    sizes = {}
    for adapt in (False, True)[: 1 + adapts]:
        data, report = compress_text(FILES, coder, rolling=True, adapt=adapt, analytic=True)
        assert not report.stored
        assert decompress_text(data, coder) == FILES
        assert report.analytic is not None
        bits = 8 * report.bytes - 8 * report.header - report.side
        assert abs(bits - report.analytic) < 0.01 * report.symbols + 64
        described = dict(describe_text(data))["chunks"]
        assert "one after another, each given the 8 symbols before it" in described
        assert ("counts of all before it, 3 times" in described) == adapt
        sizes[adapt] = len(data)
    if adapts:
        assert sizes[True] < sizes[False]


def test_a_coder_that_has_adapted_codes_chunks_as_a_fresh_one(coders: dict[str, TextCoder]) -> None:
    coder = coders["ngram"]
    before, _ = compress_text(FILES, coder)
    data, _ = compress_text(FILES, coder, rolling=True, adapt=True)
    assert compress_text(FILES, coder)[0] == before
    decompress_text(data, coder)
    assert compress_text(FILES, coder)[0] == before


def test_a_changed_byte_is_refused(coders: dict[str, TextCoder]) -> None:
    coder = coders["ngram"]
    data, _ = compress_text(FILES, coder, rolling=True, adapt=True)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(InputError):
            decompress_text(bytes(changed), coder)


def test_a_file_with_counts_that_adapt_is_not_one_of_a_model_without(coders: dict[str, TextCoder]) -> None:
    data, _ = compress_text(FILES, coders["ngram"], rolling=True, adapt=True)
    parsed = container.read(data)
    other = coders["grouped blocks"]
    forged = container.write(
        container.Container(container.TEXT, parsed.mode, other.fingerprint, parsed.meta, parsed.segments)
    )
    with pytest.raises(InputError, match="counts that adapt, and the model has none"):
        decompress_text(forged, other)


def test_what_a_model_cannot_do_is_refused(
    coders: dict[str, TextCoder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="models of its family code each chunk by itself"):
        compress_text(FILES, coders["any_order"], rolling=True)
    with pytest.raises(InputError, match="has no counts that could adapt"):
        compress_text(FILES, coders["grouped blocks"], rolling=True, adapt=True)
    with pytest.raises(InputError, match="code them rolling, or leave adapt out"):
        compress_text(FILES, coders["ngram"], adapt=True)
    path = recipe_file(tmp_path, write_text(tmp_path), "transformer", samples=0)
    out = run(path)
    words = ["compress", str(tmp_path / "text.txt"), "--model", str(out), "-o", str(tmp_path / "text.dfl")]
    assert cli.main([*words, "--protocol", "rolling"]) == 2
    assert "cannot read the text before a chunk (model.context is 0)" in capsys.readouterr().err


# -- drafts ------------------------------------------------------------------------------------------------


class Constant:
    """Proposes one symbol."""

    def __init__(self, symbol: int) -> None:
        self.symbol = symbol

    def start(self, draws: OpenDraws) -> Callable[[int], torch.Tensor]:
        return lambda w: torch.full((1, w), self.symbol)


@pytest.mark.parametrize("adapt", [False, True])
def test_drafts_decide_the_number_of_calls_and_never_the_text(
    adapt: bool, coders: dict[str, TextCoder]
) -> None:
    coder = coders["transformer"]
    drafter = counts_drafter(coder.law)
    data, report = compress_text(FILES, coder, rolling=True, adapt=adapt, draft=drafter, analytic=True)
    assert report.analytic is not None
    bits = 8 * report.bytes - 8 * report.header - report.side
    # Eight states of 64 bits.
    assert abs(bits - report.analytic) < 0.01 * report.symbols + 64 + 8 * 64
    plain, _ = compress_text(FILES, coder, rolling=True, adapt=adapt)
    assert len(data) - len(plain) < 80
    assert "8 symbols a network call" in dict(describe_text(data))["chunks"]
    others = [None, Constant(0), LawDrafter(coders["ngram"].law), LawDrafter(coder.law)]
    calls = []
    for other in others:
        drafts = Drafts(other)
        assert decompress_text(data, coder, drafts=drafts) == FILES
        calls.append(drafts.calls)
    assert calls[0] == report.symbols
    assert calls[1] < calls[0]
    assert report.drafts.calls < 0.7 * report.symbols
    assert report.drafts.tally.accepted <= report.drafts.tally.drafted
    if not adapt:
        # The law itself: all drafts are right, but at the ends of chunks.
        assert calls[3] < report.symbols / 4


def test_calls_of_one_width_give_the_same_bits_wherever_they_begin(coders: dict[str, TextCoder]) -> None:
    net, generator = coders["transformer"].law.net, torch.Generator().manual_seed(0)
    length, width, K = 60, 8, net.K
    x = torch.randint(0, K, (1, length + width), generator=generator)
    plan = net.plan(torch.arange(length + width)[:, None], None, length + width)
    for before in (0, 9):
        results = []
        for turn in range(4):
            state, begin, out = net.start(1, None, plan), before, []
            if before:
                net.read(x[:, :before], state)
            state.even = True
            while begin < length:
                symbols = torch.nn.functional.pad(x, (1, 0), value=K)[:, begin : begin + width].clone()
                step = width if not turn else int(torch.randint(1, width + 1, (), generator=generator))
                if begin + step < length:
                    symbols[:, step:] = torch.randint(0, K, (1, width - step), generator=generator)
                out.append(net.ahead(symbols, [begin], state)[0, : min(step, length - begin)])
                begin += step
            results.append(torch.cat(out))
        assert all(torch.equal(results[0], other) for other in results[1:])
        torch.testing.assert_close(results[0], net(x[:, :length], None, plan)[0, before:], rtol=0, atol=1e-9)


def test_a_changed_byte_of_a_drafted_text_is_refused(coders: dict[str, TextCoder]) -> None:
    coder = coders["transformer"]
    files = {"a.txt": TEXT[:400].encode()}
    data, report = compress_text(files, coder, rolling=True, draft=Constant(1))
    assert not report.stored
    for place in range(0, len(data), 17):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(InputError):
            decompress_text(bytes(changed), coder)
    parsed = container.read(data)
    plan = replace(TextPlan.read(parsed.meta), context=1 << 40)
    forged = container.write(replace(parsed, meta=plan.to_bytes()))
    with pytest.raises(InputError, match="a context of 1099511627776 symbols, of a model of 8"):
        decompress_text(forged, coder)
    plan = TextPlan((("a", 99),), True, chunks=3, last=2, context=8, weight=3, ahead=8)
    for ahead in (0, 8, 64):
        assert TextPlan.read(replace(plan, ahead=ahead).to_bytes()) == replace(plan, ahead=ahead)
    for ahead in (1, 65):
        with pytest.raises(ValueError, match=r"calls of 1 symbols|too large"):
            TextPlan.read(replace(plan, ahead=ahead).to_bytes())


def test_drafts_that_cannot_be_are_refused(coders: dict[str, TextCoder]) -> None:
    coder = coders["transformer"]
    with pytest.raises(InputError, match="code them rolling, or leave draft out"):
        compress_text(FILES, coder, draft=Constant(0))
    for name, message in (
        ("lstm", "one after another, so that drafts save no"),
        ("grouped", "left to right"),
    ):
        with pytest.raises(InputError, match=message):
            compress_text(FILES, coders[name], rolling=True, draft=Constant(0))
    with pytest.raises(InputError, match="outside of 0 to"):
        compress_text(FILES, coder, rolling=True, draft=Constant(99))


def test_commands_draft(
    coders: dict[str, TextCoder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, out = coders["transformer"].where, tmp_path / "a.txt", tmp_path / "a.dfl"
    text.write_bytes(FILES["a.txt"])
    words = ["compress", str(text), "--model", model, "-o", str(out), "--json"]
    assert cli.main([*words, "--draft", "counts"]) == 2
    assert "code them rolling, or leave draft out" in capsys.readouterr().err
    assert cli.main([*words, "--protocol", "rolling", "--draft", "counts"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["calls"] < record["symbols"]
    assert record["accepted"] <= record["drafted"]
    for draft in ("auto", "none", coders["ngram"].where):
        folder = tmp_path / draft.replace("/", "_")
        assert cli.main(["decompress", str(out), "--model", model, "-o", str(folder), "--draft", draft]) == 0
        assert (folder / "a.txt").read_bytes() == FILES["a.txt"]
    capsys.readouterr()
    words[3], words[5] = coders["grouped blocks"].where, str(tmp_path / "b.dfl")
    assert cli.main([*words, "--protocol", "rolling", "--draft", "counts"]) == 2
    assert "this model has no counts of its training text" in capsys.readouterr().err
