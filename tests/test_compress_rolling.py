"""Texts coded chunk after chunk, each given the text before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import TEXT, write_text
from test_train import recipe_file, run

from dflow import cli
from dflow.coding import container
from dflow.compress import TextCoder, compress_text, decompress_text, describe_text
from dflow.config import InputError

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
