"""Tables: real columns in units of their own, which files are read, and what a model of one draws."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import image_recipe
from torch import Tensor

from dflow import cli, hf, zoo
from dflow.config import InputError
from dflow.data import ImageConfig, load_images
from dflow.dequantize import Dequantized
from dflow.train import load_recipe, train

PERCEPTRON = {"conditioner": "perceptron", "hidden_size": 16, "num_hidden_layers": 1}


def law(**settings: Any) -> Dequantized:
    values = {"shape": [2, 1, 1], "levels": [6, None], "lowest": [-1, None], **settings}
    torch.manual_seed(0)
    model = hf.DflowImageModel(hf.DflowImageConfig(family="dequantized", **PERCEPTRON | values))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.double().eval().dequantized


def data(n: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return torch.cat([torch.randint(-1, 5, (n, 1), generator=generator).double(), real], 1)


def write(folder: Path, real: np.ndarray, name: str = "table.csv") -> Path:
    whole = np.random.default_rng(5).integers(0, 9, len(real))
    path = folder / name
    path.write_text(
        "count,real\n" + "".join(f"{a},{b!r}\n" for a, b in zip(whole, real.tolist(), strict=True))
    )
    return path


def trained(
    folder: Path, path: Path, steps: int = 40, data: dict[str, Any] | None = None, **model: Any
) -> Path:
    folder.mkdir()
    settings = {"num_levels": 1, "num_flows": 2, **PERCEPTRON, **model}
    recipe = image_recipe(
        folder, {"name": str(path), **(data or {})}, settings,
        steps=steps, eval_every=steps, batch_size=64, learning_rate=0.005,
    )  # fmt: skip
    return train(load_recipe(recipe))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


# -- units ---------------------------------------------------------------------------------------------------

DENSITIES = [
    {"density": "flow"},
    {"density": "flow", "dequantizer": "autoregressive"},
    {"density": "flow", "dequantizer": "normal"},
    {"density": "diagonal"},
    {"density": "covariance"},
    {"density": "diagonal", "dequantizer": "truncated"},
    {"density": "covariance", "dequantizer": "truncated"},
]


@pytest.mark.parametrize("settings", DENSITIES, ids=str)
@pytest.mark.parametrize(("loc", "scale"), [(1.7e9, 300.0), (-2e-4, 1e-6), (0.0, 1e12)])
def test_a_scaled_column_costs_the_logarithm_of_its_scale(
    settings: dict[str, str], loc: float, scale: float
) -> None:
    plain, scaled = law(**settings), law(**settings, loc=[None, loc], scale=[None, scale])
    x = data()
    raw = torch.stack([x[:, 0], x[:, 1] * scale + loc], 1)
    noise = plain.dequantizer.noise(3 * len(x), 2, torch.Generator().manual_seed(1), torch.float64)
    noise = noise.view(3, len(x), 1)
    # What float64 leaves of 1.7e9 seconds.
    close = {"rtol": 0.0, "atol": 1e-5 if abs(loc) > 1e6 * scale else 1e-9}
    for name in ("log_weights", "assess"):
        values, expected = (
            getattr(found, name)(rows, 3, noise=noise) for found, rows in ((scaled, raw), (plain, x))
        )
        if name == "assess":
            values, expected = values.iwbo, expected.iwbo
        torch.testing.assert_close(values, expected - math.log(scale), **close)
    values, expected = scaled.exact_log_prob(raw), plain.exact_log_prob(x)
    torch.testing.assert_close(values, expected - math.log(scale), **close | {"atol": 1e-5})
    drawn, expected = (found.sample(50, torch.Generator().manual_seed(2)) for found in (scaled, plain))
    assert torch.equal(drawn[:, 0], expected[:, 0])
    torch.testing.assert_close((drawn[:, 1] - loc) / scale, expected[:, 1], **close)


def test_the_density_of_a_real_column_integrates_to_one() -> None:
    """In the units of the data, whatever those are."""
    found = law(density="diagonal", loc=[None, 5e3], scale=[None, 1e-3])
    real = torch.linspace(5e3 - 0.01, 5e3 + 0.01, 501, dtype=torch.float64)
    total = 0.0
    for count in range(-8, 9):
        x = torch.stack([torch.full_like(real, count), real], 1)
        total += float(torch.trapezoid(found.exact_log_prob(x).exp(), real))
    assert total == pytest.approx(1, abs=1e-5)


def test_a_model_without_units_is_that_of_version_0_1_0(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"shape": [2, 1, 1], "levels": [6, None], "lowest": [-1, None], **PERCEPTRON}
    model = hf.DflowImageModel(hf.DflowImageConfig(family="dequantized", **settings))
    hf.save(model, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("columns", "loc", "scale"):
        assert config.pop(name) == []
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "manifest.json").unlink()
    old = hf.load(tmp_path / "old", kind=hf.DflowImageModel)
    assert old.dequantized.units is None
    x = data()
    noise = torch.full((1, len(x), 1), 0.25)
    v = torch.stack([x[:, 0] + 0.25, x[:, 1]], 1).float()
    expected = model.eval().dequantized.density.log_prob(v)
    assert torch.equal(old.dequantized.log_weights(x, noise=noise)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": [None, 1.0]}, "scale must be a number for each real column"),
        ({"loc": [1.0, 1.0], "scale": [None, 1.0]}, "loc must be a number for each real column"),
        ({"loc": [None, 1.0], "scale": [None, 0.0]}, "scale must be above 0"),
        ({"loc": [None, math.nan], "scale": [None, 1.0]}, r"loc\[1\]: expected float, found nan"),
        ({"columns": ["a"]}, "columns must be 2 names"),
    ],
)
def test_units_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        law(**change)


# -- trained on files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loc", "scale", "continuous"),
    [(0.0, 1e-5, None), (1.7e9, 300.0, ["real"]), (3e-3, 1e-9, None), (-1e12, 1e7, ["real"])],
)
def test_draws_are_as_wide_as_the_data(
    loc: float, scale: float, continuous: list[str] | None, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(loc, scale, 400)
    values = values if continuous is None else values.round()
    out = trained(tmp_path / "run", write(tmp_path, values), data={"continuous": continuous})
    model = hf.load(out, kind=hf.DflowImageModel)
    drawn = model.generate(4000, torch.Generator().manual_seed(0)).flatten(1)[:, 1].numpy()
    assert drawn.std() == pytest.approx(values.std(), rel=0.1)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.15 * scale)
    assert len(np.unique(drawn)) > 3990


def test_the_recipe_of_an_older_model_goes_on_without_units(tmp_path: Path) -> None:
    """Such a recipe has the levels of its data: new units under old weights would be another law."""
    path = write(tmp_path, np.random.default_rng(0).normal(0, 1, 60))
    of_data = {"shape": [2, 1, 1], "levels": [9, None], "lowest": [0, None]}
    old = hf.load(trained(tmp_path / "old", path, 2, **of_data), kind=hf.DflowImageModel)
    new = hf.load(trained(tmp_path / "new", path, 2), kind=hf.DflowImageModel)
    assert (old.config.scale, old.dequantized.units) == ([], None)
    assert new.config.scale == [None, pytest.approx(1, abs=0.3)]
    assert old.config.columns == new.config.columns == ["count", "real"]


def test_bits_of_a_table_in_other_units(tmp_path: Path) -> None:
    """Trained and scored alike, they differ by the logarithm of the unit, half of it a dimension."""
    values = np.random.default_rng(0).normal(0, 1, 300)
    bits = []
    for number, scale in enumerate((1.0, 2.0**-20)):
        path = write(tmp_path, values * scale, f"{number}.csv")
        out = trained(tmp_path / str(number), path, steps=10)
        bits.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["valid_bits"])
    assert bits[1] == pytest.approx(bits[0] - 10, abs=1e-4)


def test_what_is_drawn_has_names_and_types_and_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "people.csv"
    rows = zip(rng.integers(0, 4, 80), rng.normal(1.75, 0.1, 80), rng.integers(-2, 1, 80), strict=True)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["age, in years", 'so "tall"', "c"])
        lines.writerows([int(a), float(b), int(c)] for a, b, c in rows)
    out = trained(tmp_path / "run", path, steps=4)
    drawn = tmp_path / "drawn.csv"
    argv = ["generate", "--model", str(out), "--n", "300", "--output", str(drawn)]
    assert cli.main(argv) == 0
    with drawn.open(newline="") as file:
        header, *found = csv.reader(file)
    assert header == ["age, in years", 'so "tall"', "c"]
    assert all(row[0].lstrip("-").isdigit() and row[2].lstrip("-").isdigit() for row in found)
    assert all("." in row[1] for row in found)
    # After four steps many lie outside the range of the data, and they are scored all the same.
    assert {int(row[0]) for row in found} - set(range(4))
    assert cli.main(["evaluate", "--model", str(out), "--data", str(drawn), "--split", "train"]) == 0
    capsys.readouterr()
    other = tmp_path / "other.csv"
    other.write_text(drawn.read_text().replace('"age, in years"', "age"))
    said = fails(capsys, "evaluate", "--model", str(out), "--data", str(other))
    assert "the columns are age, so" in said
    assert "trained on age, in years" in said


# -- columns that no density fits ----------------------------------------------------------------------------

N = 60
NORMAL = np.random.default_rng(1).normal(0, 1, N)


@pytest.mark.parametrize(
    ("real", "message"),
    [
        (np.full(N, 2.5), "'real' is 2.5 in every row to train on, and has no density; leave the column out"),
        (np.arange(N) % 3 / 2, "'real' has only 3 different values in the 54 rows to train on"),
        (
            1e18 + np.arange(N) * 1024.0,
            "'real' has a standard deviation of .* 128 apart in 64 bits; subtract",
        ),
    ],
)
def test_columns_without_a_density_are_refused(
    real: np.ndarray, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, real)
    # They can be scored, by a model that learned from others.
    unfit = load_images(ImageConfig(str(path), continuous=["real"])).unfit
    assert re.search(rf"table\.csv: the real column {message}", unfit)
    recipe = image_recipe(tmp_path, {"name": str(path), "continuous": ["real"]}, PERCEPTRON)
    assert fails(capsys, "train", str(recipe)) == f"error: {unfit}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "1e999", "", "NA", "1_000", "0x1"])
def test_cells_that_are_no_numbers_are_refused(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("count,real\n1,0.5\n2," + cell + "\n")
    with pytest.raises(InputError, match=r"table\.csv, line 3, column 'real': .*fill the value in"):
        load_images(ImageConfig(str(path)))


def test_columns_of_which_bits_mean_little_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    lines = [f"{i % 5},{a},{3 - 2 * a},{a if i % 3 == 0 else 0.0}" for i, a in enumerate(NORMAL.tolist())]
    path.write_text("\n".join(["count,a,b,rain", *lines]))
    note = load_images(ImageConfig(str(path))).note
    assert "the real column 'rain' is 0.0 in 6" in note
    assert "the real columns 'a' and 'b' depend linearly: a density can grow there without limit" in note
    assert "without limit" not in load_images(ImageConfig(str(write(tmp_path, NORMAL, "b.csv")))).note


# -- files ---------------------------------------------------------------------------------------------------

ROWS = [(i % 4, round(float(a), 3)) for i, a in enumerate(NORMAL)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", "count,real\n" + "".join(f"{a},{b}\n" for a, b in ROWS)),
        ("UPPER.CSV", "count,real\n" + "".join(f"{a},{b}\n" for a, b in ROWS)),
        ("quoted.csv", '"count","real"\n' + "".join(f'"{a}","{b}"\n' for a, b in ROWS)),
        ("semicolons.csv", "count;real\n" + "".join(f"{a};{b}\n" for a, b in ROWS)),
        ("decimal_commas.csv", "count;real\n" + "".join(f"{a};{b}\n".replace(".", ",") for a, b in ROWS)),
        ("tabs.tsv", "count\treal\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS)),
        ("mark.csv", "\ufeffcount,real\r\n" + "".join(f"{a},{b}\r\n" for a, b in ROWS)),
        ("pandas.csv", ",count,real\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(ROWS))),
        (
            "pandas_twice.csv",
            ",Unnamed: 0,count,real\n" + "".join(f"{i},{i},{a},{b}\n" for i, (a, b) in enumerate(ROWS)),
        ),
        ("returns.csv", "count,real\r" + "".join(f"{a},{b}\r" for a, b in ROWS)),
        ("again.csv", "Unnamed: 0,count,real\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(ROWS))),
    ],
)
def test_tables_are_read_as_they_are_written(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = load_images(ImageConfig(str(path)))
    assert found.columns == ("count", "real")
    values = torch.cat([found.train.values, found.valid.values, found.test.values])
    assert sorted(map(tuple, values.tolist())) == sorted(ROWS)
    assert ("counts the rows: it is left out" in found.note) == ("pandas" in name or "again" in name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1,2\n3,4\n",
            "the first line must name the columns, found '1,2'; add a line of names, such as a,b,c",
        ),
        (",a\n7,1\n5,2\n", r"the first column has no name; name it, or leave .*index=False"),
        ("a,b,\n1,2,\n", "every column, and column 3 has no name; name it, or delete"),
        ("a,b;c\n1,2\n", "the first line has commas and semicolons, found 'a,b;c'; separate by one"),
        ("a b\n1 2\n", "no comma, semicolon or tab, found 'a b'; separate by commas"),
        ("a|b\n1|2\n", "no comma, semicolon or tab, found 'a|b'; separate by commas".replace("|", r"\|")),
        ("\na,b\n1,2\n", "the first line must name the columns, and is empty; remove empty lines above it"),
        ("# by x\na,b\n1,2\n", "line 2: 2 values, and the header names 1 columns, '# by x'; correct one"),
        (
            "a,b\n1,red\n",
            "'red' is no finite number; .*write a number for each word, or leave the column out",
        ),
        ("a,b\n1,NA\n", "'NA' is no finite number; leave the row out or fill"),
        ("a,b\n1,5,2,5\n", "4 values, and the header names 2 columns.*separate columns by semicolons"),
        ('a,b\n1,"2,5"\n', "'2,5' is no finite number; write numbers with a decimal point"),
        ("a;b\n1;2,5\n1;2.5\n", "line 3, column 'b': '2.5' is no finite .*have decimal commas"),
        ("a\tb\n1\t2,5\n", "'2,5' is no finite number; write numbers with a decimal point"),
    ],
)
def test_other_tables_are_refused_with_a_way_out(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"table\.csv.*{message}"):
        load_images(ImageConfig(str(path)))


def test_a_model_of_version_0_1_0_keeps_a_column_that_counts_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    path.write_text("Unnamed: 0,count\n" + "".join(f"{i},{i % 5}\n" for i in range(60)))
    assert load_images(ImageConfig(str(path))).columns == ("count",)
    # The checksum of version 0.1.0, which took the column.
    checksum = "sha256:f9ba9b9de68ae46cff4d9916febb28e3e17f0d082887835ebe8d2a40b96c4c88"
    found = load_images(ImageConfig(str(path), checksum=checksum))
    assert found.columns == ("Unnamed: 0", "count")
    with pytest.raises(InputError, match="the data have changed"):
        load_images(ImageConfig(str(path), checksum="sha256:0"))


@pytest.mark.parametrize("continuous", [None, ["real"], ["large"]])
def test_all_columns_that_have_to_be_real_are_told_at_once(
    continuous: list[str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("count,large,real\n" + "".join(f"{i % 5},{2_000_000 + i},{i / 7}\n" for i in range(60)))
    with pytest.raises(InputError, match=r"or correct the value") as told:
        load_images(ImageConfig(str(path), continuous=continuous))
    assert "data.continuous=[large,real]" in str(told.value)
    assert load_images(ImageConfig(str(path), continuous=["large", "real"])).lowest == (0, None, None)


# -- draws are scored ----------------------------------------------------------------------------------------

INTEGER = {"num_levels": 1, "num_flows": 2, "hidden_size": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("integer", INTEGER),
        ("integer", INTEGER | {"num_flows": 0, "prior": "hurdle", "num_levels": 2}),
        ("integer", INTEGER | {"num_levels": 2, "prior_components": 2}),
        ("integer", INTEGER | {"groups": 3, "start": "marginals"}),
        ("dequantized", {"density": "diagonal"}),
        ("dequantized", {"density": "covariance", "dequantizer": "truncated"}),
        ("dequantized", PERCEPTRON | {"num_flows": 2}),
        (
            "dequantized",
            {"density": "diagonal", "partition": "orthant", "dequantizer": "normal"} | PERCEPTRON,
        ),
        ("modular", {"num_flows": 1, "hidden_size": 8}),
    ],
    ids=str,
)
def test_a_model_scores_its_own_draws(family: str, settings: dict[str, Any]) -> None:
    """Also those outside of the range of the data, where the law covers them."""
    torch.manual_seed(0)
    binary = settings.get("partition") == "orthant"
    of_data = {"shape": [1, 4, 4], "levels": [2 if binary or family == "modular" else 3]}
    if family == "modular":
        of_data = {"shape": [1, 4, 4], "levels": [2]}
    model = hf.DflowImageModel(hf.DflowImageConfig(family=family, **of_data, **settings)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "loc" in name or "centre" in name or p.ndim > 1:
                p.add_(0.3 * torch.randn(p.shape))
    x = model.generate(500, torch.Generator().manual_seed(0))
    assert bool((x.min() < 0) | (x.max() >= of_data["levels"][0])) == (family != "modular" and not binary)
    values = model.log_prob(x) if model.exact else model.elbo(x).values
    assert values.isfinite().all()
    if family != "modular" and not binary:
        far = torch.full((1, 1, 4, 4), 5000)
        assert (model.log_prob(far) if model.exact else model.elbo(far).values).isfinite().all()
    with pytest.raises(InputError, match="is no integer in"):
        model.check(torch.full((1, 16), (1 << 22) + 1))


def test_support_is_that_of_the_data_where_a_law_covers_no_more() -> None:
    config = zoo.settings("modular", {"shape": [1, 4, 4], "levels": [2], "num_flows": 1})
    assert isinstance(config, zoo.ValuesConfig)
    assert config.support == config.ranges
