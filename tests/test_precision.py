"""Half precision: exact maps, laws that sum to 1, and every family of the registry in every precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BASES, BIJECTORS, build_base, build_bijector, code, enumerate_all
from folders import write_model, write_text
from PIL import Image
from registered import labels, score, tiny
from test_docs import reference
from torch import Tensor

from dflow import cli, hf, zoo
from dflow.config import InputError
from dflow.distributions import Categorical
from dflow.nn.attention import rotated, rotations
from dflow.ops.modular import one_hot
from dflow.ops.precision import agree

HALF = (torch.bfloat16, torch.float16)
#: Those whose nets read one-hot rows each in a way of its own.
MAPS = [name for name in BIJECTORS if name.startswith(("coupling", "autoregressive"))]
LAWS = [name for name in BASES if name != "counted"]


def both(names: list[str], sparse: str) -> Iterator[Any]:
    """Every name in both dtypes, of which one is tested fast; of a kind that is slow less."""
    for i, name in enumerate(names):
        for j, dtype in enumerate(HALF):
            fast = i % 2 == j and not (name.startswith(sparse) and i % 3)
            yield pytest.param(name, dtype, marks=[] if fast else pytest.mark.slow)


def as_complex(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation)).flatten(-2)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_rotations_are_products_of_complex_numbers(
    dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    queries, keys = torch.arange(100, 107), torch.arange(100, 107) - 1
    x = torch.randn(3, 7, 2, 4, 10, dtype=dtype)
    exact = as_complex(x.double(), rotations(queries, keys, 10, torch.float64))
    turned = rotated(x, rotations(queries, keys, 10, dtype))
    assert turned.dtype == dtype
    assert torch.allclose(turned.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    # In float64, in which files are coded, the bits are those of version 0.1.
    assert dtype != torch.float64 or torch.equal(turned, exact)


@pytest.mark.parametrize(("name", "dtype"), [*both(MAPS, "autoregressive")])
def test_maps_are_permutations_and_both_modes_agree(name: str, dtype: torch.dtype) -> None:
    x = enumerate_all(3, 4)
    bijector = build_bijector(name, 3, 4).to(dtype)
    z, _ = bijector.forward(x)
    assert torch.equal(bijector.inverse(z)[0], x)
    assert len(code(z, 3).unique()) == len(x)
    for of_rows in (torch.float32, dtype):
        rows = one_hot(x, 3, of_rows).requires_grad_()
        assert torch.equal(bijector.forward(rows)[0], one_hot(z, 3, of_rows))


@pytest.mark.parametrize(("name", "dtype"), [*both(LAWS, "any order")])
def test_laws_are_normalised_and_drawn_as_they_are_scored(name: str, dtype: torch.dtype) -> None:
    law = build_base(name, 3, 3)
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.div_(2)
    law = law.to(dtype)
    x = enumerate_all(3, 3)
    with torch.no_grad():
        log_p = law.log_prob(x)
    assert log_p.dtype in (torch.float32, torch.float64)
    assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(law.log_prob(one_hot(x, 3)).to(log_p.dtype), log_p, atol=1e-3)
    assert law.round_trip(x) is not False


def test_agreement_knows_the_precision() -> None:
    a = torch.tensor([-300.0, -20.0])
    net = torch.nn.Linear(2, 2)
    assert agree(a, a + 1e-3, net)
    assert not agree(a, a + 0.1, net)
    with torch.autocast("cpu", torch.bfloat16):
        assert agree(a, a + 0.1, net)
        assert not agree(a, a + 0.5, net)
    assert agree(a, a + 0.1, net.to(torch.bfloat16))
    assert not agree(a, a + 0.1, net.half())


# -- models ----------------------------------------------------------------------------------------------


def prepared(name: str, precision: str) -> tuple[Any, Tensor, AbstractContextManager[Any]]:
    """A tiny model, its data, and the context that it is used in."""
    model, data = tiny(name)
    dtype = getattr(torch, reference().PRECISIONS[precision])
    if precision.startswith("mixed"):
        return model, data, torch.autocast("cpu", dtype)
    return model.to(dtype), data, nullcontext()


def check_cell(name: str, precision: str) -> None:
    """A cell of the table in the guide: what it lists works, and training is refused where it does not."""
    able = reference().abilities(zoo.find(name), precision)
    exact, data = tiny(name)
    model, _, context = prepared(name, precision)
    with context:
        scored = score(model, data)
        assert scored.dtype in (torch.float32, torch.float64)
        # Draws in float64 are others than those in float32.
        others = precision == "float64" and name in ("pbnet", "dequantized")
        assert others or torch.allclose(scored.double(), score(exact, data).double(), rtol=0.05, atol=0.2)
        if "draw" in able:
            drawn = model.generate(20, generator=torch.Generator().manual_seed(3))
            assert drawn.dtype == torch.int64
            if model.config.record.exact:
                assert model.round_trip(data) is not False
        model.train()
        if "train" not in able:
            with pytest.raises(InputError, match="float16 cannot be trained"):
                model(data, **labels(model, data))
            return
        for how in ("fused", "foreach"):
            optimizer = torch.optim.AdamW(model.parameters(), **{how: True})
            optimizer.zero_grad()
            model(data, **labels(model, data)).loss.backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "precision"),
    [("grouped", "bfloat16"), ("integer", "bfloat16"), ("pbnet", "mixed fp16"), ("lstm", "float16")],
)
def test_some_families_in_half_precision(name: str, precision: str) -> None:
    check_cell(name, precision)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("precision", list(reference().PRECISIONS))
def test_every_family_in_every_precision(name: str, precision: str) -> None:
    check_cell(name, precision)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("grouped", {"block": 2, "calls": [1, 4]}),
    ("grouped", {"context": 4}),
    ("any_order", {"order": "random", "schedule": "dp"}),
    ("bipartite", {"elementwise": "affine", "base": "mixture"}),
    ("autoregressive", {"base": "autoregressive"}),
    ("multiscale", {"conditional": "categorical"}),
    ("integer", {"levels": [256], "kept": "quarter", "prior": "hurdle", "num_flows": 0, "num_levels": 2}),
    ("modular", {"kind": "binary"}),
    ("dequantized", {"density": "covariance", "dequantizer": "autoregressive"}),
    ("dequantized", {"density": "diagonal", "dequantizer": "normal", "partition": "orthant", "levels": [2]}),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_other_settings_in_half_precision(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model, data = tiny(name, **changes)
    exact = score(model, data).double()
    model = model.to(dtype)
    assert torch.allclose(score(model, data).double(), exact, rtol=0.05, atol=0.2)
    assert model.generate(20).dtype == torch.int64
    assert not model.config.record.exact or model.round_trip(data) is not False


def test_probabilities_of_labels_are_in_float32() -> None:
    model, data = tiny("pbnet")
    assert model.to(torch.bfloat16)(data).logits.dtype == torch.float32


# -- folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_no_weight_stays_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model, data = tiny("bipartite")
    [base] = [m for m in model.modules() if isinstance(m, Categorical)]
    base.assign(1000 + torch.rand_like(base.counts))
    model.set_length_counts(torch.full_like(model.length_counts, 1001))
    hf.save(model, tmp_path / "full")
    half = hf.DflowModel.from_pretrained(tmp_path / "full", dtype=dtype)
    hf.save(half, tmp_path / "half")
    for loaded in (half, hf.load(tmp_path / "half"), model.to(dtype)):
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        [same] = [m for m in loaded.modules() if isinstance(m, Categorical)]
        assert torch.equal(same.counts, base.counts)
        assert same.counts.dtype == torch.float32
        assert float(loaded.length_counts[0]) == 1001
        assert torch.equal(loaded.log_prob(data), half.log_prob(data))


def test_a_dtype_without_models_is_refused(tmp_path: Path) -> None:
    hf.save(tiny("ngram")[0], tmp_path)
    for dtype in (torch.int8, "float33"):
        with pytest.raises(InputError, match="bfloat16"):
            hf.DflowModel.from_pretrained(tmp_path, dtype=dtype)
    assert hf.DflowModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    assert hf.DflowModel.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["grouped", "bipartite"])
def test_a_folder_of_text_in_half_precision_on_the_command_line(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    folder = write_model(tmp_path / "model", family, text)
    hf.save(hf.load(folder).to(torch.bfloat16), folder)
    assert hf.load(folder).dtype == torch.bfloat16
    model = ["--model", str(folder), "--threads", "1"]
    assert cli.main(["generate", *model, "--n", "2", "-o", str(tmp_path / "s.txt")]) == 0
    assert cli.main(["evaluate", *model, "--limit", "4"]) == 0
    (tmp_path / "note.txt").write_text(text.read_text(encoding="utf-8")[:48], encoding="utf-8")
    packed = tmp_path / "note.dfl"
    assert cli.main(["compress", str(tmp_path / "note.txt"), "-o", str(packed), *model]) == 0
    assert cli.main(["decompress", str(packed), "-o", str(tmp_path / "back"), *model]) == 0
    assert (tmp_path / "back" / "note.txt").read_bytes() == (tmp_path / "note.txt").read_bytes()
    if family == "grouped":
        assert cli.main(["score", str(tmp_path / "note.txt"), *model]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["integer", "dequantized", "modular"])
def test_a_folder_of_images_in_half_precision_on_the_command_line(tmp_path: Path, family: str) -> None:
    model, data = tiny(family, levels=[256])
    hf.save(model.to(torch.bfloat16), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(data.view(-1, 4, 4).numpy().astype(np.uint8)[:4]):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    flags = ["--model", str(tmp_path / "model"), "--threads", "1"]
    assert cli.main(["generate", *flags, "--n", "2", "-o", str(tmp_path / "drawn.npy")]) == 0
    data_flags = ["--data", str(tmp_path / "images"), "--split", "all"]
    draws = ["--draws", "2"] * (family == "dequantized")
    assert cli.main(["evaluate", *flags, *data_flags, *draws]) == 0
