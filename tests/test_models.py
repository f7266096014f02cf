"""Models of text without transformers, packed counts, small copies, and the models that come with dflow."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import SETTINGS, TEXT, image_recipe, make_model, write_pictures, write_text
from safetensors.torch import load_file, save_file
from test_imports import loaded
from test_initial import recipe
from torch import Tensor
from transformers import AutoModel

import dflow
from dflow import hf, models, shipped
from dflow.cli import main
from dflow.config import InputError
from dflow.data import Tokenizer, count
from dflow.models import packed_counts
from dflow.ops.counts import CountsError, CountTable, patterns_of
from dflow.train import compact, load_recipe, train

K = 5


def symbols(n: int = 4, length: int = 8) -> Tensor:
    return torch.randint(0, K, (n, length), generator=torch.Generator().manual_seed(1))


# -- without transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SETTINGS)
def test_it_is_the_model_of_transformers(family: str, tmp_path: Path) -> None:
    hf.save(make_model(family, K), tmp_path)
    small, whole = models.load(tmp_path), hf.load(tmp_path)
    assert type(small) is models.TextModel
    with torch.no_grad():
        assert torch.equal(small.log_prob(symbols()), whole.log_prob(symbols()))
    draws = [m.generate(3, generator=torch.Generator().manual_seed(2)) for m in (small, whole)]
    assert torch.equal(*draws)
    assert small.num_calls == whole.num_calls


def test_weights_in_half_precision_and_in_pieces_and_lengths(tmp_path: Path) -> None:
    model = make_model("transformer", K, explicit_length=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    small = models.load(tmp_path)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    lengths = torch.tensor([1, 8, 3, 5])
    with torch.no_grad():
        assert torch.equal(small.log_prob(symbols(), lengths), hf.load(tmp_path).log_prob(symbols(), lengths))
    assert models.load(str(tmp_path) + "@8").num_calls == 8


def damaged(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    (folder / "manifest.json").unlink()
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "foreign":
        save_file({"other": torch.ones(2)}, weights)
    elif what == "infinite":
        name = next(n for n, t in tensors.items() if t.is_floating_point())
        save_file(tensors | {name: tensors[name] * torch.inf}, weights)
    elif what == "counts":
        (folder / "counts.safetensors").unlink()
    else:
        config = json.loads((folder / "config.json").read_text()) | json.loads(what)
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "model.safetensors: truncated or damaged"),
        ("foreign", "foreign to its config.json: missing keys"),
        ("infinite", "not finite"),
        ("counts", "no counts.safetensors"),
        ('{"counts": 2}', "does not fit its config.json"),
        ('{"vocab_size": 1}', "vocab_size must be at least 2"),
        ('{"counts": -1}', "config.json: .*counts must be"),
        ('{"model_type": "dflow-image"}', "a model of images or tables; this takes a model of text"),
        ('{"length": 100000000}', "need more than"),
    ],
)
def test_what_cannot_be_loaded_is_refused(what: str, message: str, tmp_path: Path) -> None:
    hf.save(make_model("ngram", K), tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(InputError, match=message):
        models.load(tmp_path)


def test_drawing_text_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    """Counted in modules, since seconds depend on the machine."""
    hf.save(make_model("grouped", K), tmp_path)
    (tmp_path / "vocabulary.json").write_text(
        json.dumps({"tokenizer": "characters", "size": K, "symbols": [*"abcde"]})
    )
    modules = loaded(
        f"from dflow.cli import main; assert main(['generate', '--model', {str(tmp_path)!r}]) == 0"
    )
    slow = {"transformers", "accelerate", "datasets", "matplotlib", "sympy", "torch._dynamo", "numba"}
    assert "torch" in modules
    assert not slow & modules


# -- packed counts -----------------------------------------------------------------------------------------


def table_of(both_sides: bool) -> tuple[CountTable, list[tuple[int, ...]]]:
    _, patterns = patterns_of(5, both_sides)
    text = torch.randint(0, K, (2000,), generator=torch.Generator().manual_seed(3)) ** 2 % K
    return count(text, K, patterns), patterns


def same(a: CountTable, b: CountTable) -> bool:
    return all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


@pytest.mark.parametrize("both_sides", [False, True])
def test_packed_counts_are_the_same(both_sides: bool) -> None:
    table, patterns = table_of(both_sides)
    tensors = packed_counts.packed(table, K, patterns)
    assert not len(tensors[packed_counts.HASHES])
    assert len(tensors[packed_counts.LARGE])
    assert sum(t.nbytes for t in tensors.values()) < table.num_bytes / 2.5
    assert same(packed_counts.unpacked(tensors, K, patterns[::-1]), table)
    # Contexts whose parents are not in the table keep their hashes.
    some = table.where(torch.arange(len(table.keys)) % 3 > 0)
    tensors = packed_counts.packed(some, K, patterns)
    assert len(tensors[packed_counts.HASHES])
    assert same(packed_counts.unpacked(tensors, K, patterns), some)
    none = table.where(torch.zeros(len(table.keys), dtype=torch.bool))
    assert same(packed_counts.unpacked(packed_counts.packed(none, K, patterns), K, patterns), none)


@pytest.mark.parametrize("name", sorted(packed_counts._NAMES))
@pytest.mark.parametrize("change", ["shorter", "longer", "other", "real"])
def test_damaged_packed_counts_are_refused_or_are_others(name: str, change: str) -> None:
    table, patterns = table_of(True)
    tensors = packed_counts.packed(table, K, patterns)
    t = tensors[name]
    changed = {
        "shorter": t[:-1],
        "longer": torch.cat([t, t[-1:] * 0 + 1]),
        "other": t + 1,
        "real": t.double(),
    }
    tensors[name] = changed[change]
    try:
        other = packed_counts.unpacked(tensors, K, patterns)
    except CountsError:
        return
    assert change != "real"
    # The digest among the weights refuses these.
    assert not same(other, table) or torch.equal(tensors[name], t)


# -- small copies ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    path = recipe(folder, "base", TEXT, "grouped", steps=40, eval_every=40, learning_rate=0.03)
    return train(load_recipe(path, ["model.counts=3"]))


@pytest.mark.parametrize("digits", [11, 4])
def test_a_small_copy_costs_less_than_a_hundredth_bit(digits: int, trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    size = compact(trained, small, digits)
    stored = load_file(small / "model.safetensors")
    model, whole = models.load(small), models.load(trained)
    names = [name for name, _ in model.named_parameters()]
    assert {stored[name].dtype for name in names} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = Tokenizer.load(small).encode(TEXT)[: 64 * 16].view(-1, 16)
    with torch.no_grad():
        nats = [float(m.log_prob(text).mean()) / 16 for m in (model, whole)]
        assert torch.equal(model.log_prob(text), AutoModel.from_pretrained(small).eval().log_prob(text))
    assert abs(nats[0] - nats[1]) < 0.01 * 0.69
    assert nats[0] != nats[1]
    assert size.whole == sum(file.stat().st_size for file in small.iterdir())
    assert size.zipped < size.whole
    assert {f.status for f in hf.check(small) if f.name != shipped.CARD} == {"whole"}
    # The trained folder lies at a place of this machine, which is no part of a copy.
    assert load_recipe(trained / "recipe.yaml").output.is_absolute()
    assert load_recipe(small / "recipe.yaml").output == Path(trained.name)
    with pytest.raises(InputError, match="is there already, and stays"):
        compact(trained, small)


def test_a_small_copy_codes_and_is_copied(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, file = str(tmp_path / "small"), tmp_path / "file.txt"
    assert main(["compact", str(trained), "-o", small, "--digits", "5"]) == 0
    table = capsys.readouterr().out
    assert "zipped" in table
    now, before = re.findall(r"\d\.\d{4}", table)
    assert abs(float(now) - float(before)) < 0.01
    file.write_text(TEXT[:100], encoding="utf-8")
    assert main(["compress", str(file), "-o", str(tmp_path / "file.dfl"), "--model", small]) == 0
    out = str(tmp_path / "out")
    assert main(["decompress", str(tmp_path / "file.dfl"), "-o", out, "--model", small]) == 0
    assert (tmp_path / "out" / "file.txt").read_bytes() == file.read_bytes()
    again = tmp_path / "again"
    compact(small, again, 5)
    for name in ("model.safetensors", "counts.safetensors"):
        assert (again / name).read_bytes() == (Path(small) / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--digits", "12"], "digits 12: give 2 to 11"), ([], "leave out @2")],
)
def test_a_copy_that_cannot_be_made_is_refused(
    words: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(trained) if words else f"{trained}@2"
    assert main(["compact", name, "-o", str(tmp_path / "small"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_images_have_small_copies_and_large_weights_none(tmp_path: Path) -> None:
    model = train(load_recipe(image_recipe(tmp_path, str(write_pictures(tmp_path / "pictures")))))
    compact(model, tmp_path / "small")
    assert hf.load(tmp_path / "small", kind=hf.DflowImageModel).dtype == torch.float32
    text = make_model("lstm", K)
    with torch.no_grad():
        next(text.parameters()).fill_(1e5)
    hf.save(text, tmp_path / "text")
    with pytest.raises(InputError, match="weights beyond 65504"):
        compact(tmp_path / "text", tmp_path / "large")


# -- names -------------------------------------------------------------------------------------------------

NAMES = {"tolstoy": "tolstoy_grouped", "tolstoy-causal": "tolstoy_causal"}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shipped_models_are_there() -> None:
    """Both, whole, and made by the recipes that come with them."""
    assert shipped.names() == sorted(NAMES)
    for name, recipe_name in NAMES.items():
        folder, made = shipped.folder_of(name), load_recipe(shipped.folder_of(name) / "recipe.yaml")
        assert {f.status for f in hf.check(folder) if f.name != shipped.CARD} == {"whole"}
        named = load_recipe(recipe_name)
        assert made.model == named.model
        budget = {"minutes", "steps", "eval_minutes", "eval_every", "eval_chunks"}
        assert {k: v for k, v in asdict(made.train).items() if k not in budget} == {
            k: v for k, v in asdict(named.train).items() if k not in budget
        }
        assert (made.data.name, made.data.folder) == ("war-and-peace", None)
        assert not made.output.is_absolute()
        card = (folder / shipped.CARD).read_text(encoding="utf-8")
        for words in ("Louise and Aylmer Maude", "Project Gutenberg", "public domain", "bits a character"):
            assert words in card, (name, words)


def test_a_name_draws_and_scores_anywhere(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        assert main(["generate", "--model", name, "--length", "40", "--prompt", "It's \"Pierre"]) == 0
        assert "It's \"Pierre" in capsys.readouterr().out
    file = write_text(empty, "Prince Andrew looked at Natasha and smiled.\n" * 20)
    assert main(["score", str(file), "--model", "tolstoy@4"]) == 0
    model: Any = dflow.load("tolstoy@8")
    assert model.num_calls == 8
    assert Tokenizer.load("tolstoy").size == 96


def test_a_folder_of_that_name_wins(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.split_calls("tolstoy@4") == (shipped.folder_of("tolstoy"), 4)
    hf.save(make_model("grouped", K), "tolstoy")
    assert models.load("tolstoy").config.vocab_size == K
    shutil.rmtree("tolstoy")
    for words in (["generate", "--model", "tolstoi"], ["check", "tolstoi"]):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert "tolstoi: no such folder" in message
        assert "comes with dflow (tolstoy, tolstoy-causal)" in message


def test_models_are_listed(trained: Path, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()] == ["name", *sorted(NAMES)]
    assert "1, 2, 4, 8, 16, 32" in table
    shutil.copytree(trained, empty / "runs" / "base")
    (empty / "runs" / "half").mkdir()
    (empty / "runs" / "half" / "config.json").write_text("{")
    (empty / "runs" / "other").mkdir()
    (empty / "runs" / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["models", "runs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["runs/base", "runs/half"]
    assert rows[0]["family"] == "grouped"
    assert rows[0]["bits"].endswith("bits a character")
    assert rows[1]["family"].startswith("damaged")
    assert main(["models", "nowhere"]) == 2
