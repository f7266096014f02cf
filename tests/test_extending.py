"""Modules of users, as the guide has them: imported by a flag or an entry point, and used by every verb."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import write_model, write_pictures, write_text
from PIL import Image
from test_docs import blocks
from torch import Tensor, nn

from dflow import hf, objectives, plugins, zoo
from dflow.bijectors import Coupling
from dflow.cli import Results, main, verbs
from dflow.config import InputError
from dflow.core import Distribution, Elementwise
from dflow.data import DataConfig, load
from dflow.distributions import Categorical
from dflow.elementwise import ModRank
from dflow.flows import Flow
from dflow.nn.perceptron import InfillPerceptron
from dflow.ops.modular import one_hot
from dflow.ops.orders import ORDERS
from dflow.train import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registries")]

GUIDE = "docs/guide/extending.md"
MODULES = {code.split("\n", 1)[0].removeprefix("# "): code for code in blocks(GUIDE, "python")}
TRAIN = {"steps": 3, "batch_size": 4, "eval_chunks": 4, "eval_every": 2, "trackers": [], "samples": 0}

# A law that has a likelihood and draws, and nothing else.
PLAIN = """
from dataclasses import dataclass
import torch
from torch import nn
from dflow.core import Distribution
from dflow.zoo import Family, ModelConfig, register

@dataclass
class UnigramConfig(ModelConfig):
    unused: float = 1.0

class Unigram(Distribution):
    def __init__(self, K, dim):
        super().__init__()
        self.dim, self.logits = dim, nn.Parameter(torch.zeros(K))

    def log_prob(self, x, context=None):
        return self.logits.log_softmax(-1)[x].sum(1)

    def sample(self, n, context=None, generator=None):
        law = self.logits.softmax(-1)
        return law.multinomial(n * self.dim, True, generator=generator).view(n, self.dim)

register(Family("unigram", "text", UnigramConfig, lambda config, K: Unigram(K, config.length)))
"""


def module(folder: Path, name: str, code: str | None = None) -> str:
    path = folder / name
    path.write_text(MODULES[name] if code is None else code, encoding="utf-8")
    return str(path)


def recipe(folder: Path, data: Any, model: dict[str, Any], **train: Any) -> str:
    path = folder / f"{model['family']}.yaml"
    values = {
        "data": {"name": str(data)},
        "model": model,
        "train": TRAIN | train,
        "output": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]


def coded(file: Path, model: str, flag: list[str], *packing: str) -> Path:
    """The file after it was compressed and decompressed."""
    packed, back = file.with_suffix(".dfl"), file.parent / "back"
    assert main(["compress", str(file), "-o", str(packed), "--model", model, *packing, *flag]) == 0
    assert main(["decompress", str(packed), "-o", str(back), "--model", model, *flag]) == 0
    return back / file.name


def test_a_family_of_text_goes_through_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, mine = write_text(tmp_path), module(tmp_path, "bigram.py")
    flag, out = ["--import", mine], str(tmp_path / "out")
    model = {"family": "bigram", "length": 8, "start": 0.1}
    assert main(["train", recipe(tmp_path, text, model, learning_rate=0.1), *flag]) == 0
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["import"] == [mine]
    assert hf.load(out).config.settings().start == 0.1
    capsys.readouterr()
    assert main(["evaluate", "--model", out, *flag]) == 0
    found = told(capsys)
    assert (found["kind"], found["round_trip"]) == ("exact", True)
    law = hf.load(out)
    x = load(DataConfig(name=str(text))).test.chunks(8)[0]
    assert found["bpc"] == pytest.approx(-law.log_prob(x).sum().item() / x.numel() / math.log(2), abs=1e-5)
    assert main(["generate", "--model", out, "--n", "2", "--prompt", "line", *flag]) == 0
    assert capsys.readouterr().out.count("line") >= 2
    lstm = str(write_model(tmp_path / "lstm", "lstm", text))
    assert main(["compare", out, lstm, "--rounds", "1", "--length", "4", "--limit", "4", *flag]) == 0
    rows = told(capsys)
    assert [row["family"] for row in rows["rows"]] == ["bigram", "lstm"]
    assert rows["reference"] == lstm
    file = tmp_path / "a.txt"
    file.write_text(text.read_text()[:205] + "Ω")
    assert coded(file, out, flag).read_bytes() == file.read_bytes()
    sentences = ["--set", "data.protocol=sentence", "model.length=40", f"output={tmp_path / 'lines'}"]
    assert main(["train", str(tmp_path / "bigram.yaml"), *flag, *sentences]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "lines"), *flag]) == 0
    assert told(capsys)["round_trip"] is True


def test_a_network_draws_any_length_and_reads_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, flag = write_text(tmp_path), ["--import", module(tmp_path, "convolution.py")]
    out = str(tmp_path / "out")
    model = {"family": "convolution", "length": 8, "context": 4, "hidden_size": 8, "num_hidden_layers": 2}
    assert main(["train", recipe(tmp_path, text, model, learning_rate=0.1), *flag]) == 0
    capsys.readouterr()
    for protocol in ("chunks", "rolling"):
        assert main(["evaluate", "--model", out, "--protocol", protocol, *flag]) == 0
        evaluated = told(capsys)
        assert (evaluated["kind"], evaluated["round_trip"]) == ("exact", True)
    assert main(["generate", "--model", out, "--prompt", "line", "--length", "30", *flag]) == 0
    assert len(capsys.readouterr().out.partition("line")[2]) >= 26
    file = tmp_path / "a.txt"
    file.write_text(text.read_text()[:205] + "Ω")
    assert coded(file, out, flag, "--protocol", "rolling").read_bytes() == file.read_bytes()
    # A value below the least one is refused before anything is trained.
    assert main(["train", recipe(tmp_path, text, model | {"num_hidden_layers": 0}), *flag]) == 2
    assert "model: num_hidden_layers must be at least 1, found 0" in capsys.readouterr().err


def test_the_program_takes_the_flag_and_says_which_one_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, mine = write_text(tmp_path), module(tmp_path, "bigram.py")
    plugins.load(mine)
    assert main(["train", recipe(tmp_path, text, {"family": "bigram", "length": 8})]) == 0

    # A module is found by its name in the working folder.
    command = [sys.executable, "-m", "dflow", "generate", "--model", "out", "--import", "bigram"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sample 1" in done.stdout
    del zoo.FAMILIES["bigram"]
    monkeypatch.setattr(plugins, "_loaded", [])
    capsys.readouterr()
    out = str(tmp_path / "out")
    for words in (["generate", "--model", out], ["train", f"{out}/recipe.yaml", "--resume"]):
        assert main(words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "'bigram'" in line
        assert "give --import" in line
    assert line.endswith(f"give --import {mine}")


def test_a_law_without_steps_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, flag = write_text(tmp_path), ["--import", module(tmp_path, "plain.py", PLAIN)]
    out = str(tmp_path / "out")
    model = {"family": "unigram", "length": 8, "unused": 0.5}
    assert main(["train", recipe(tmp_path, text, model), *flag]) == 0
    assert hf.load(out).config.settings().unused == 0.5
    capsys.readouterr()
    assert main(["evaluate", "--model", out, *flag]) == 0
    streams = capsys.readouterr().out
    assert re.search("^round trip +not checked", streams, re.MULTILINE)
    assert json.loads(streams.splitlines()[-1])["round_trip"] is None
    assert main(["compare", out, "--rounds", "1", "--limit", "2", *flag]) == 0
    assert f"Round trip not checked: {out}." in capsys.readouterr().out
    assert main(["generate", "--model", out, "--n", "2", *flag]) == 0
    assert main(["generate", "--model", out, "--prompt", "a", *flag]) == 2
    assert "a unigram model cannot continue a prompt" in capsys.readouterr().err
    assert main(["compress", str(text), "-o", str(tmp_path / "a.dfl"), "--model", out, *flag]) == 2
    assert "no exact code for Unigram: let a law over symbols extend dflow.distributions.Stepwise" in (
        capsys.readouterr().err
    )
    # It scores symbols that are not there.
    sentences = ["--set", "data.protocol=sentence", "model.length=40", f"output={tmp_path / 'lines'}"]
    assert main(["train", str(tmp_path / "unigram.yaml"), *flag, *sentences]) == 2
    assert "'unigram' scores symbols beyond the end of a sentence" in capsys.readouterr().err


def test_a_command_runs_and_is_listed_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = module(tmp_path, "count.py")
    text = tmp_path / "notes.txt"
    text.write_text("abca", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["count", str(text)])
    assert "invalid choice: 'count'" in capsys.readouterr().err
    words = ["count", "--import", path, str(text), "--least", "2"]
    assert main([*words, "--json"]) == 0
    assert told(capsys) == {"symbols": 4, "different": 3}
    assert main(words) == 0
    assert "symbols" in capsys.readouterr().out
    assert main([*words[:-1], "4"]) == 2
    assert "3 different symbols; --least asks for 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "count       Count the symbols of a text file" in " ".join(capsys.readouterr().out.split("\n"))
    with pytest.raises(InputError, match="there is a verb 'train' already"):
        verbs.register_verb("train", Results, lambda flags: 0, "")
    with pytest.raises(InputError, match="one word of letters"):
        verbs.register_verb("two words", Results, lambda flags: 0, "")


def test_a_family_of_images_goes_through_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, flag = write_pictures(tmp_path / "pictures"), ["--import", module(tmp_path, "left.py")]
    out = str(tmp_path / "out")
    assert main(["train", recipe(tmp_path, pictures, {"family": "left", "smoothing": 2.0}), *flag]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", out, *flag]) == 0
    found = told(capsys)
    assert (found["kind"], found["round_trip"]) == ("exact", True)
    assert main(["generate", "--model", out, "-o", str(tmp_path / "drawn.npy"), *flag]) == 0
    back = coded(pictures / "000.png", out, flag)
    assert Image.open(back).tobytes() == Image.open(pictures / "000.png").tobytes()


@pytest.mark.parametrize(
    ("rule", "trains"),
    [("auto", True), ("gumbel", True), ("straight_through", True), ("layerwise", False), ("expected", False)],
)
def test_a_map_of_ones_own_is_trained_or_refused(
    rule: str, trains: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, flag = write_text(tmp_path), ["--import", module(tmp_path, "reflect.py")]
    model = {
        "family": "bipartite", "length": 8, "num_flows": 2, "num_attention_heads": 1, "hidden_size": 8,
        "elementwise": "reflect",
    }  # fmt: skip
    code = main(["train", recipe(tmp_path, text, model, rule=rule), *flag])
    assert code == (0 if trains else 2)
    if not trains:
        assert "Reflect" in capsys.readouterr().err
        return
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "out"), *flag]) == 0
    assert told(capsys)["round_trip"] is True


def test_a_map_is_trained_by_the_rules_whose_part_it_has() -> None:
    class Symbols(Elementwise):
        """Of symbols only: no rows, no estimator."""

        def __init__(self, K: int) -> None:
            super().__init__()
            self.K = self.num_params = K

        def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            return ModRank(self.K).forward(x.long(), params)

        def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            return ModRank(self.K).inverse(z, params)

    class Predicting(Symbols):
        predicts = True

    class Expecting(Symbols):
        def expected(self, x: Tensor, params: Tensor, cost: Tensor) -> Tensor:
            return (params.softmax(-1) * cost).sum(-1)

    def flow(elementwise: Elementwise) -> Flow:
        even = torch.arange(4) % 2 == 0
        net = InfillPerceptron(3, 3, even.nonzero()[:, 0], (~even).nonzero()[:, 0], hidden_size=4)
        return Flow(Coupling(elementwise, net, even), Categorical(4, 3, learned=False))

    x = torch.randint(0, 3, (8, 4))
    for elementwise, rule in ((Predicting(3), "layerwise"), (Expecting(3), "expected")):
        model = flow(elementwise)
        assert objectives.default_rule(model) == rule
        loss, _ = objectives.Objective(model, rule)(x)  # type: ignore[arg-type]
        loss.backward()
        assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    with pytest.raises(InputError, match=r"no rule trains this model: .*Symbols.*'estimator'.*'expected'"):
        objectives.default_rule(flow(Symbols(3)))

    class Table(Distribution):
        """A base that knows symbols only."""

        dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
            return self.logits.log_softmax(-1)[x].sum(1)

        def sample(self, n: int, context: Any = None, generator: Any = None) -> Tensor:
            return torch.zeros(n, 4, dtype=torch.int64)

    model = flow(ModRank(3))
    model.base = Table()
    with pytest.raises(InputError, match=r"needs Table.log_prob to take one-hot rows too"):
        objectives.Objective(model, "gumbel")
    with pytest.raises(InputError, match=r"needs Symbols.forward to take one-hot rows"):
        objectives.Objective(flow(Symbols(3)), "straight_through")


def test_an_order_and_a_data_set_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = ["--import", module(tmp_path, "more.py")]
    sizes = {"length": 8, "num_calls": 2, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1}
    for family in ("grouped", "any_order"):
        path = recipe(tmp_path, "zen", {"family": family, "order": "backwards", **sizes})
        out = str(tmp_path / family)
        assert main(["train", path, "-o", out, *flag]) == 0
        capsys.readouterr()
        assert main(["evaluate", "--model", out, *flag]) == 0
        assert told(capsys)["data"] == "zen"
    assert main(["data", "list", *flag]) == 0
    assert "The Zen of Python" in capsys.readouterr().out
    assert main(["data", "check", "zen", *flag]) == 2


def test_what_a_module_prints_is_no_part_of_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = ["--import", module(tmp_path, "loud.py", "print('hello')\n")]
    assert main(["data", "list", "--json", *flag]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert captured.err == "hello\n"


@pytest.mark.parametrize("family", ["grouped", "any_order"])
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda dim, G: torch.zeros(G, dim // G, dtype=torch.int64), "each of the 8 positions exactly once"),
        (lambda dim, G: torch.arange(dim), r"matrix \(G, S\), found torch.int64 \(8,\)"),
        (lambda dim, G: [[0, 1], [2, 3]], "found list"),
    ],
)
def test_orders_that_are_none(family: str, order: Any, message: str) -> None:
    ORDERS["mine"] = order
    settings = zoo.settings(family, {"length": 8, "num_calls": 2, "order": "mine", "hidden_size": 8})
    with pytest.raises(InputError, match=f"model.order 'mine': .*{message}"):
        zoo.build(family, settings, 5)


@pytest.mark.parametrize(("family", "name"), [("grouped", "order"), ("bipartite", "elementwise")])
def test_a_choice_that_no_module_has_added_tells_of_the_flag(family: str, name: str) -> None:
    with pytest.raises(InputError, match=f"unknown {name} 'of_mine'.*give --import MODULE"):
        zoo.settings(family, {name: "of_mine"})


def test_a_flow_learns_in_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [code for code in blocks(GUIDE, "python") if "optimizer.step()" in code]
    scope: dict[str, Any] = {}
    exec(compile(code, "loop", "exec", dont_inherit=True), scope)
    x, K = scope["x"], scope["K"]
    counts = torch.bincount(x.flatten(), minlength=K).double() / x.numel()
    unigram = torch.special.entr(counts).sum().item() / math.log(2)
    # Below what the frequencies of the symbols alone would come to: the coupling has learned too.
    assert scope["bits"] < unigram - 0.1 < math.log2(K) - 1
    assert f"{scope['bits']:.2f} bits a character" in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("gone.py", None, "no such file"),
        (
            "broken.py",
            "import torch\n1 / 0\n",
            r"ZeroDivisionError: division by zero \(.*broken.py, line 2\)",
        ),
        (
            "taken.py",
            f"{PLAIN}\n".replace('"unigram"', '"lstm"'),
            r"'lstm' exists already.*taken.py, line 24",
        ),
        ("leaves.py", "raise SystemExit(3)\n", r"SystemExit: 3 \(.*leaves.py, line 1\)"),
        ("no_such_module", None, "No module named 'no_such_module'"),
    ],
)
def test_modules_that_cannot_be_imported(name: str, code: str | None, message: str, tmp_path: Path) -> None:
    if code is not None:
        (tmp_path / name).write_text(code)
    with pytest.raises(InputError, match=message):
        plugins.load(str(tmp_path / name) if name.endswith(".py") else name)
    assert name not in plugins.loaded()


def test_a_module_is_imported_once_and_hides_none_of_pythons(tmp_path: Path) -> None:
    mine = module(tmp_path, "random.py", MODULES["bigram.py"])
    for _ in range(2):
        plugins.load(mine)
    assert plugins.loaded().count(mine) == 1
    import random

    assert hasattr(random, "gauss")
    assert "bigram" in zoo.names("text")


def test_installed_packages_name_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dflow_test_plugin.py").write_text(MODULES["bigram.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("mine", "dflow_test_plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    plugins.load_installed.cache_clear()
    assert zoo.find("bigram").prompt == "exact"
    (tmp_path / "dflow_test_plugin.py").write_text("raise RuntimeError('no')")
    sys.modules.pop("dflow_test_plugin")
    plugins.load_installed.cache_clear()
    with pytest.raises(
        InputError, match=r"plug-in mine \(dflow_test_plugin\) of a package cannot be imported"
    ):
        zoo.find("bigram")
    plugins.load_installed.cache_clear()
    sys.modules.pop("dflow_test_plugin", None)


def test_nothing_is_imported_because_a_file_says_so(tmp_path: Path) -> None:
    mine = module(tmp_path, "bigram.py", "raise SystemExit('imported')")
    path = Path(recipe(tmp_path, write_text(tmp_path), {"family": "bigram"}))
    path.write_text(path.read_text() + yaml.safe_dump({"import": [mine]}))
    with pytest.raises(
        InputError, match=f"it comes from {mine}: if you trust that module, give --import {mine}"
    ):
        load_recipe(path)


def test_records_are_checked_when_they_are_made_and_when_they_build() -> None:
    lstm = zoo.find("lstm")

    def family(**changes: Any) -> zoo.Family:
        values = {"name": "mine", "kind": "text", "settings": zoo.ModelConfig, "build": lstm.build}
        return zoo.Family(**values | changes)

    with pytest.raises(InputError, match="did you mean 'text'"):
        family(kind="texts")
    with pytest.raises(InputError, match=r"without a field 'length'; extend dflow\.zoo\.ModelConfig"):
        family(settings=zoo.ValuesConfig)
    with pytest.raises(InputError, match=r"without a field 'shape'; extend dflow\.zoo\.ValuesConfig"):
        family(kind="images")
    with pytest.raises(InputError, match=r"without a field 'classes'; extend dflow\.zoo\.PBNetConfig"):
        family(kind="labels", settings=zoo.ValuesConfig)

    @dataclass
    class Warm(zoo.ModelConfig):
        temperature: float = 1.0

    zoo.register(family(settings=Warm))
    with pytest.raises(InputError, match="'temperature' is a setting of transformers"):
        hf.DflowConfig("mine")
    with pytest.raises(InputError, match="'lstm' exists already"):
        zoo.register(family(name="lstm"))
    zoo.register(lstm)
    with pytest.raises(InputError, match="builds a Linear; one of text builds a Distribution"):
        family(build=lambda config, K: nn.Linear(1, 1)).model(None, 3)

    class Bare(Distribution):
        def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
            return torch.zeros(len(x))

        def sample(self, n: int, context: Any = None, generator: Any = None) -> Tensor:
            return torch.zeros(n, 1)

    with pytest.raises(InputError, match=r"Bare.sample takes no length and no prompt"):
        family(build=lambda config, K: Bare(), prompt="exact").model(None, 3)
    assert Bare().round_trip(torch.zeros(1, 1)) is None
    with pytest.raises(InputError, match="one of models of labels of images, and this takes one of text"):
        zoo.find("pbnet", "text")


def test_draws_in_steps_follow_the_law(tmp_path: Path) -> None:
    plugins.load(module(tmp_path, "bigram.py"))
    law = zoo.build("bigram", zoo.settings("bigram", {"length": 2, "start": 1.0}), 3).eval()
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    p = law.log_prob(x).exp()
    assert p.sum().item() == pytest.approx(1)
    drawn = law.sample(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert (counts - 20_000 * p).square().div(20_000 * p).sum() < 27  # chi-square of 8: one in 1,500
    assert law.round_trip(x) is True
    with torch.no_grad():
        law.log_prob = lambda x, context=None: torch.zeros(len(x))  # type: ignore[method-assign]
    assert law.round_trip(x) is False
    assert torch.equal(one_hot(x, 3).argmax(-1), x)
