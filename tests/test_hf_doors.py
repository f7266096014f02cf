"""The doors of transformers for every family: auto classes, pipeline, Trainer, hub, remote code, card."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import LENGTH, SETTINGS, TEXT, image_recipe, make_model, write_model, write_text
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from dflow import hf, zoo
from dflow.cli import main
from dflow.config import InputError
from dflow.hf import remote
from dflow.hf.card import changed

FAMILIES = zoo.names("text")
CAUSAL = [name for name in FAMILIES if zoo.find(name).known == "before"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, saved as a training leaves it."""
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    for family in FAMILIES:
        source = write_model(folder / family, family, text)
        hf.load(source).save_pretrained(source)
    return folder


class Hub:
    """A stand-in of the hub: each repository is a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.commits: list[dict[str, Any]] = []
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(remote, "hf_hub_download", self.download)

    def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> Any:
        assert exist_ok
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(
        self, repo_id: str, folder_path: Path, ignore_patterns: list[str] | None = None, **commit: Any
    ) -> str:
        ignored = shutil.ignore_patterns(*(ignore_patterns or []))
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True, ignore=ignored)
        self.commits.append(commit)
        return f"stand-in/{repo_id}"

    def download(self, repo_id: str, name: str, **place: Any) -> str:
        path = self.folder / repo_id / name
        if not path.is_file():
            raise EntryNotFoundError(name)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_the_matrix_has_every_family() -> None:
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes(family: str, folders: Path) -> None:
    folder = folders / family
    config = AutoConfig.from_pretrained(folder)
    assert (type(config), config.family) == (hf.DflowConfig, family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["line 1 o", "line 22 "], return_tensors="pt")
    output = model(**batch, labels=batch.input_ids)
    assert bool(output.loss.isfinite())
    assert (output.logits is None) == (family not in CAUSAL)
    assert type(AutoModelForCausalLM.from_config(config)) is hf.DflowForCausalLM
    with pytest.raises(InputError, match="the number of symbols is part of the law"):
        model.resize_token_embeddings(len(tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline(family: str, folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    write = pipeline("text-generation", model=str(folders / family))
    assert "not supported" not in caplog.text
    set_seed(0)
    drawn = write("", num_return_sequences=3)
    set_seed(0)
    assert drawn == write("", num_return_sequences=3)
    texts = [each["generated_text"] for each in drawn]
    assert [len(text) for text in texts] == [LENGTH] * 3
    # The same samples as those of dflow itself, by the same noise: the law is not changed by a default.
    model = hf.load(folders / family)
    set_seed(0)
    ids = model.generate(3)
    assert texts == write.tokenizer.batch_decode(ids)
    if zoo.find(family).prompt == "no":
        with pytest.raises(InputError, match="cannot continue a prompt"):
            write("line")
        return
    prompts = ["li", "line 1", "a te"]
    full = write(prompts, batch_size=3, max_new_tokens=2)
    new = write(prompts, batch_size=3, max_new_tokens=2, return_full_text=False, temperature=0.5, top_k=4)
    for prompt, whole, part in zip(prompts, full, new, strict=True):
        assert whole[0]["generated_text"].startswith(prompt)
        assert len(whole[0]["generated_text"]) == len(prompt) + 2
        assert len(part[0]["generated_text"]) == 2
    with pytest.raises(InputError, match="num_beams=2 is not available"):
        write("li", num_beams=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_pushed_and_loaded_again(family: str, folders: Path, hub: Hub) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / family).eval()
    assert (
        model.push_to_hub("someone/model", commit_message="first", tags=["mine"]) == "stand-in/someone/model"
    )
    assert hub.commits == [{"commit_message": "first"}]
    there = hub.folder / "someone" / "model"
    again = AutoModelForCausalLM.from_pretrained(there).eval()
    x = torch.randint(0, model.config.vocab_size, (4, LENGTH))
    assert torch.equal(again(x, labels=x).loss, model(x, labels=x).loss)
    text = "line 12 "
    assert AutoTokenizer.from_pretrained(there)(text) == AutoTokenizer.from_pretrained(folders / family)(text)
    data = ModelCard.load(there / "README.md").data.to_dict()
    assert data["tags"] == ["dflow", family, "exact-likelihood", "mine"]
    assert "model='someone/model', trust_remote_code=True" in (there / "README.md").read_text(
        encoding="utf-8"
    )
    assert main(["check", str(there)]) == 0


def test_a_card_on_the_hub_that_others_wrote_stays(folders: Path, hub: Hub) -> None:
    model = hf.load(folders / "lstm")
    model.push_to_hub("someone/model", tags=["mine"])
    card = hub.folder / "someone" / "model" / "README.md"
    first = card.read_text(encoding="utf-8")
    assert not changed(first)
    model.push_to_hub("someone/model", tags=["mine"])
    assert card.read_text(encoding="utf-8") == first
    card.write_text(
        first.replace("## Limits", "## What we found\n\nIt rhymes.\n\n## Limits"), encoding="utf-8"
    )
    model.push_to_hub("someone/model")
    assert "It rhymes." in card.read_text(encoding="utf-8")
    # A card that was changed in the folder is pushed as it is, with the tags of the call.
    shutil.copytree(folders / "lstm", hub.folder / "local")
    (hub.folder / "local" / "README.md").write_text(
        first.replace("## Limits", "## What we saw\n\n## Limits"), encoding="utf-8"
    )
    hf.load(hub.folder / "local").push_to_hub("someone/other", tags=["theirs"])
    pushed = ModelCard.load(hub.folder / "someone" / "other" / "README.md")
    assert "## What we saw" in pushed.text
    assert pushed.data.tags == ["dflow", "lstm", "exact-likelihood", "mine", "theirs"]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer(family: str, folders: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / family)
    tokenizer = AutoTokenizer.from_pretrained(folders / family)
    ids = tokenizer(TEXT[: 40 * LENGTH]).input_ids
    rows = [{"input_ids": ids[i : i + LENGTH]} for i in range(0, len(ids), LENGTH)]
    run = Trainer(
        model=model,
        args=arguments(tmp_path / "out", learning_rate=0.01, gradient_accumulation_steps=2),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = [p.clone() for p in model.parameters()]
    run.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    loss = run.evaluate()["eval_loss"]
    x = torch.tensor([row["input_ids"] for row in rows[:8]])
    with torch.no_grad():
        exact = float(-model.eval().log_prob(x).sum() / x.numel())
        if family in CAUSAL:
            exact = float(-model.log_prob_each(x)[:, 1:].mean())
    assert loss == pytest.approx(exact, rel=1e-5)
    run.save_model(str(tmp_path / "out"))
    assert torch.equal(hf.load(tmp_path / "out").log_prob(x), model.log_prob(x))
    # Trained further, the model is not the one that the card of its folder speaks of.
    assert "not measured for these weights" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_texts_of_unequal_lengths_are_trained_on(tmp_path: Path) -> None:
    for family in ("grouped", "transformer"):
        source = write_model(tmp_path / family, family, write_text(tmp_path), "sentence", length=40)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        rows = [tokenizer(line) for line in TEXT.splitlines()[:32]]
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        settings = arguments(tmp_path / "out", per_device_eval_batch_size=len(rows))
        run = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows,
                      data_collator=collator)  # fmt: skip
        run.train()
        batch = collator(rows)
        with torch.no_grad():
            expected = float(model.eval()(**batch).loss)
        assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("what", ["missing", "unexpected"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, hf.DflowModel])
def test_foreign_weights_are_refused(what: str, auto: Any, tmp_path: Path) -> None:
    make_model("lstm", 5).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors |= {"extra": torch.zeros(3)}
    if what == "missing":
        tensors = {name: tensor for name, tensor in tensors.items() if "head.weight" not in name}
        del tensors["extra"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"foreign to its config.json: {what} keys .*restore both files"):
        auto.from_pretrained(tmp_path)


# -- remote code ---------------------------------------------------------------------------------------------

_LOAD = """
import sys
{hide}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
assert "dflow" not in sys.modules
config = AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print(type(model).__module__, type(tokenizer).__name__, type(config).__name__)
draw = pipeline("text-generation", model={folder!r}, trust_remote_code=True)
print(len(draw("", max_new_tokens=5)[0]["generated_text"]))
model.save_pretrained({folder!r} + "-saved")
"""
_HIDE = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dflow":
            raise ModuleNotFoundError("No module named 'dflow'", name="dflow")

sys.meta_path.insert(0, Hidden())
"""


def run_python(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(Path(hf.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


@pytest.mark.slow
def test_a_pushed_folder_loads_by_trust_remote_code(folders: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folders / "transformer", copied)
    done = run_python(_LOAD.format(folder=str(copied), hide=""), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["dflow.hf.causal DflowTokenizer DflowConfig", "5"]
    # Nothing of the package was copied into what was saved.
    saved = {path.name for path in Path(f"{copied}-saved").glob("*.py")}
    assert saved == {"modeling_dflow.py"}
    hidden = run_python(_LOAD.format(folder=str(copied), hide=_HIDE), tmp_path)
    assert hidden.returncode == 1
    last = hidden.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model is one of dflow")
    assert "which is not installed here; install it: git clone" in last


def test_the_code_of_a_folder_names_its_classes(folders: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders / "lstm")
    text = (folders / "lstm" / "modeling_dflow.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(text, "modeling_dflow.py", "exec"), names)
    assert {names[ref.partition(".")[2]] for ref in config.auto_map.values()} == {
        hf.DflowConfig, hf.DflowModel, hf.DflowForCausalLM,
    }  # fmt: skip
    # What transformers does with classes that it loads in this way leaves no trace.
    for cls in (hf.DflowConfig, hf.DflowForCausalLM):
        cls.register_for_auto_class("AutoModelForCausalLM")
        assert cls._auto_class is None


# -- card ----------------------------------------------------------------------------------------------------


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_card(family: str, folders: Path) -> None:
    text = hf.card(
        folders / family, "apache-2.0", [hf.Figure("text8", "test", "all of it", 1.5, "bits a character")]
    )
    head, body = parts(text)
    assert head["library_name"] == "dflow"
    assert head["pipeline_tag"] == "text-generation"
    assert head["license"] == "apache-2.0"
    assert head["datasets"] == ["text8"]
    results = ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in results] == [
        ("bits_a_character", 1.5, "test")
    ]
    assert "| bits a character, exact: text8, test part; all of it | 1.5000 |" in body
    assert f"It draws {LENGTH} symbols at most." in body
    assert ("cannot continue a prompt" in body) == (zoo.find(family).prompt == "no")
    assert ("counts of the training text" in body) == (family == "ngram")
    # The recipe, without the places of the machine that trained.
    assert "text.txt" in body
    assert str(folders) not in text


def test_a_card_is_never_written_over_the_words_of_a_user(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders / "lstm", folder)
    card = folder / "README.md"
    assert hf.write_card(folder, licence="mit")
    assert parts(card.read_text(encoding="utf-8"))[0]["license"] == "mit"
    for words in (card.read_text(encoding="utf-8").replace("mit", "mine"), "My model.\n"):
        card.write_text(words, encoding="utf-8")
        assert not hf.write_card(folder, licence="apache-2.0")
        hf.load(folder).save_pretrained(folder)
        assert card.read_text(encoding="utf-8") == words
    assert main(["check", str(folder)]) == 0
    assert sorted(p.name for p in folder.glob(".*")) == []


def test_a_card_names_the_other_numbers_of_calls(tmp_path: Path) -> None:
    settings = SETTINGS["grouped"] | {"length": LENGTH, "calls": [1, 4], "context": 3}
    model = hf.DflowModel(hf.DflowConfig(family="grouped", vocab_size=5, **settings))
    model.save_pretrained(tmp_path / "model")
    _, body = parts((tmp_path / "model" / "README.md").read_text(encoding="utf-8"))
    assert "drawn in 2 network calls. The same weights are also drawn in 1, 4 calls." in body
    assert "each given the 3 symbols before it" in body
    assert "symbols at most" not in body


def test_a_card_goes_with_its_weights_alone(folders: Path, tmp_path: Path) -> None:
    hf.write_card(
        folders / "lstm", figures=[hf.Figure("text8", "test", "all of it", 1.5, "bits a character")]
    )
    model = hf.load(folders / "lstm")
    model.save_pretrained(tmp_path / "same")
    assert "1.5000" in (tmp_path / "same" / "README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "other")
    assert "not measured for these weights" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"config.json: missing or damaged"):
        hf.card(tmp_path)


@pytest.mark.usefixtures("registries")
def test_every_training_ends_with_a_card(tmp_path: Path) -> None:
    recipe = {
        "data": {"name": str(write_text(tmp_path))},
        "model": {"family": "lstm", "length": LENGTH, **SETTINGS["lstm"]},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "eval_chunks": 6,
            "eval_every": 1,
            "trackers": [],
            "samples": 0,
        },
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head, body = parts(text)
    result = head["model-index"][0]["results"][0]
    assert result["dataset"] == {"type": "text.txt", "name": "text.txt", "split": "valid"}
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    best = min(yaml.safe_load(line)["valid_bits"] for line in metrics)
    assert result["metrics"][0]["value"] == pytest.approx(best, abs=1e-4)
    assert f"the first 6 chunks of {LENGTH} symbols, each on its own" in body
    assert f"is drawn in {LENGTH} network calls" in body
    assert str(tmp_path) not in text
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("line").input_ids
    assert main(["check", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("registries")
def test_a_training_of_images_too(tmp_path: Path) -> None:
    assert main(["train", str(image_recipe(tmp_path, "checkerboard"))]) == 0
    head, body = parts((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert head["pipeline_tag"] == "unconditional-image-generation"
    assert head["tags"] == ["dflow", "dequantized"]
    assert "elbo" in body
    assert "Its likelihood is known by bounds only." in body
