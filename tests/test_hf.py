from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from folders import LENGTH, SETTINGS, make_model, write_model, write_text
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from dflow import hf, objectives
from dflow.cli import main
from dflow.config import InputError
from dflow.data import Tokenizer
from dflow.distributions import SequenceCategorical, Walk
from dflow.flows import Split

K = 5


@pytest.fixture(params=sorted(SETTINGS))
def model(request):
    made = make_model(request.param, K)
    base = objectives.closed_form(made.distribution)
    if base is not None:
        base.assign(torch.rand_like(base.counts) * 9)
    return made


def test_saved_models_come_back_the_same(model, tmp_path):
    hf.save(model, tmp_path)
    files = {"README.md", "config.json", "manifest.json", "model.safetensors", "modeling_dflow.py"}
    files |= {"counts.safetensors"} if model.config.family == "ngram" else set()
    assert {p.name for p in tmp_path.iterdir()} == files
    x = torch.randint(0, K, (6, LENGTH))
    expected = model.log_prob(x)
    drawn = model.generate(4, generator=torch.Generator().manual_seed(0))
    for loaded in (hf.load(tmp_path), AutoModel.from_pretrained(tmp_path).eval()):
        assert isinstance(loaded, hf.DflowModel)
        assert torch.equal(loaded.log_prob(x), expected)
        assert torch.equal(loaded.generate(4, generator=torch.Generator().manual_seed(0)), drawn)
    assert AutoConfig.from_pretrained(tmp_path).family == model.config.family


def test_forward_is_mean_nats_a_symbol(model):
    x = torch.randint(0, K, (6, LENGTH))
    out = model(input_ids=x)
    assert torch.equal(out.log_prob, model.log_prob(x))
    assert out.loss.item() == pytest.approx(-model.log_prob(x).sum().item() / x.numel())


def test_what_is_scored_is_what_is_drawn(model):
    x = torch.randint(0, K, (6, LENGTH))
    assert model.round_trip(x)
    if isinstance(model.distribution, SequenceCategorical):
        net, step = model.distribution.net, model.distribution.net.step
        net.step = lambda *args: step(*args) + torch.arange(K)
    elif isinstance(model.distribution, Walk):
        entries = model.distribution.entries

        def other(*args):
            places, drawn, logits = entries(*args)
            return places, drawn, logits + torch.arange(K)

        model.distribution.entries = other
    else:
        d = model.distribution
        owner = d.conditional.elementwise if isinstance(d, Split) else d.bijector
        owner.inverse = lambda z, context=None: (z, None)
    assert not model.round_trip(x)


def test_generate_draws_what_is_asked_for(model):
    generator = torch.Generator().manual_seed(0)
    x = model.generate(7, length=3, generator=generator)
    assert x.shape == (7, 3)
    assert 0 <= int(x.min()) <= int(x.max()) < K
    assert model.generate().shape == (1, LENGTH)
    for arguments, message in [
        ({"num_return_sequences": 0}, "cannot draw 0"),
        ({"length": LENGTH + 1}, "length 9"),
        ({"length": 0}, "length 0"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate(**arguments)


def test_prompts_are_kept_or_refused(model):
    prompt = torch.tensor([3, 1])
    if model.config.record.prompt == "no":
        with pytest.raises(InputError, match="cannot continue a prompt"):
            model.generate(prompt=prompt)
        return
    assert (model.generate(5, prompt=prompt)[:, :2] == prompt).all()
    for bad, message in [
        (torch.zeros(LENGTH, dtype=torch.int64), "fewer than the length 8"),
        (torch.tensor([K]), "symbol 5"),
        (prompt[None], r"int64 \(n,\), one for all samples, found torch.int64 \(1, 2\).*Tokenizer"),
        (prompt.int(), r"found torch.int32 \(2,\)"),
        ([3, 1], "found list"),
        ("ab", "found str"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate(prompt=bad)


@pytest.mark.parametrize("bad", [torch.zeros(LENGTH, dtype=torch.int64), [3, 1], torch.tensor(3)])
def test_prompts_are_refused_where_lengths_are_drawn_too(bad):
    model = make_model("transformer", K, explicit_length=True)
    with pytest.raises(InputError, match="prompt"):
        model.generate(2, prompt=bad)


def test_unfit_sequences_are_refused(model):
    with pytest.raises(InputError, match="at most 8"):
        model.log_prob(torch.zeros(1, LENGTH + 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"symbol 5 lies outside 0\.\.4"):
        model.log_prob(torch.full((1, LENGTH), K))
    with pytest.raises(InputError, match="lengths must lie in"):
        model.log_prob(torch.zeros(1, LENGTH, dtype=torch.int64), torch.tensor([0]))
    short = torch.zeros(1, 3, dtype=torch.int64)
    if model.config.record.left_to_right:
        assert model.log_prob(short).shape == (1,)
    else:
        with pytest.raises(InputError, match="exactly 8"):
            model.log_prob(short)


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_lengths_have_a_law_and_all_sequences_add_up_to_one(family):
    model = make_model(family, 2, length=4, explicit_length=True).double()
    model.set_length_counts(torch.tensor([0.0, 3, 0, 5, 1]))
    total = 0.0
    for n in range(1, 5):
        x = torch.cartesian_prod(*[torch.arange(2)] * n).view(-1, n)
        total += model.log_prob(x).exp().sum().item()
        padded = torch.nn.functional.pad(x, (0, 4 - n))
        lengths = torch.full((len(x),), n)
        torch.testing.assert_close(model.log_prob(padded, lengths), model.log_prob(x))
        assert model.round_trip(padded, lengths)
    assert total == pytest.approx(1, abs=1e-6)
    drawn = model.generate(2000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount((drawn >= 0).sum(1), minlength=5) / 2000
    expected = torch.tensor([0, 3.5, 0.5, 5.5, 1.5]) / 11
    assert (shares - expected).abs().max() < 0.04
    fixed = model.generate(5, length=3)
    assert fixed.shape == (5, 3)
    assert (fixed >= 0).all()


def spoil(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    if what == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "garbage weights":
        weights.write_bytes(os.urandom(1000))
    elif what == "missing weights":
        weights.unlink()
    elif what == "missing config":
        config.unlink()
    elif what == "truncated config":
        config.write_text(config.read_text()[:40])
    elif what == "another library's model":
        config.write_text(json.dumps(values | {"model_type": "gpt2"}))
    elif what == "another family":
        config.write_text(json.dumps(values | {"family": "bipartite", "num_flows": 2, "window": 3}))
    elif what == "unknown family":
        config.write_text(json.dumps(values | {"family": "groupd"}))
    elif what == "another size":
        config.write_text(json.dumps(values | {"hidden_size": 16}))
    elif what == "a setting of the wrong type":
        config.write_text(json.dumps(values | {"num_calls": "many"}))
    elif what == "foreign tensors":
        save_file({"other": torch.zeros(3)}, weights, {"format": "pt"})
    elif what == "a tensor too many":
        save_file(load_file(weights) | {"extra": torch.zeros(3)}, weights, {"format": "pt"})
    elif what == "a config that is a list":
        config.write_text("[]")
    elif what == "a pickle":
        weights.unlink()
        torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "what",
    [
        "truncated weights",
        "garbage weights",
        "missing weights",
        "missing config",
        "truncated config",
        "another library's model",
        "another family",
        "unknown family",
        "another size",
        "a setting of the wrong type",
        "foreign tensors",
        "a tensor too many",
        "a config that is a list",
        "a pickle",
    ],
)
def test_spoilt_folders_give_one_clear_error(what, tmp_path):
    hf.save(make_model("grouped", K), tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(InputError) as caught:
        hf.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        hf.load(tmp_path / "none")


def test_a_failed_save_leaves_the_old_model_whole(tmp_path, monkeypatch):
    model = make_model("grouped", K)
    hf.save(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@torch.no_grad()
def test_an_any_order_model_of_another_budget_is_saved_as_such(tmp_path):
    whole = make_model("any_order", 5)
    hf.save(whole, tmp_path / "model")
    model = hf.load(f"{tmp_path / 'model'}@4")
    assert model.num_calls == 4
    x = torch.randint(0, 5, (3, model.config.length))
    hf.save(model, tmp_path / "saved")
    again = hf.load(tmp_path / "saved")
    assert again.num_calls == 4
    torch.testing.assert_close(again.log_prob(x), model.log_prob(x))
    assert not torch.allclose(hf.load(tmp_path / "model").log_prob(x), model.log_prob(x))


def test_another_number_of_calls_goes_where_the_model_is():
    model = make_model("any_order", 3, length=8)
    assert not any(part.training for part in model.at(4).modules())
    other = model.to("meta").at(2)
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}


def test_what_are_no_symbols_is_told():
    model = make_model("transformer", 5)
    for x in (torch.tensor([1, 2]), torch.tensor([[1, 2]], dtype=torch.int32)):
        with pytest.raises(InputError, match=r"expected symbols int64 \(batch, n\)"):
            model.log_prob(x)
    with pytest.raises(InputError, match="symbols to begin with are given as prompt="):
        model.generate(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("family", ["grouped", "lstm"])
def test_a_folder_of_save_pretrained_is_whole_and_has_its_vocabulary(family, tmp_path, capsys):
    source = write_model(tmp_path / "source", family, write_text(tmp_path))
    (source / "coding.safetensors").write_bytes(b"tables")
    for name, model in (("one", hf.load(source)), ("two", AutoModel.from_pretrained(source))):
        model.save_pretrained(tmp_path / name)
        assert Tokenizer.load(tmp_path / name) == Tokenizer.load(source)
        assert (tmp_path / name / "coding.safetensors").read_bytes() == b"tables"
        assert main(["check", str(tmp_path / name)]) == 0
        told = capsys.readouterr()
        assert "whole; the model loads" in told.out
        assert "error" not in told.err
    # Without the manifest nothing says what the files were: one verdict, which does not claim it.
    (tmp_path / "one" / "manifest.json").unlink()
    assert main(["check", str(tmp_path / "one")]) == 0
    told = capsys.readouterr()
    assert "config.json, model.safetensors are as they were saved cannot be checked" in told.out
    assert "whole" not in told.out + told.err
    assert "error" not in told.out + told.err
    file = tmp_path / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["check", str(tmp_path / "two")]) == 1
    told = capsys.readouterr()
    assert "model.safetensors damaged" in told.err
    assert "the model loads" not in told.out


def test_weights_in_several_files_load_as_by_transformers(tmp_path, capsys):
    model, x = make_model("grouped", K), torch.randint(0, K, (6, LENGTH))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    shards = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    for loaded in (hf.load(tmp_path), AutoModel.from_pretrained(tmp_path).eval()):
        assert torch.equal(loaded.log_prob(x), model.log_prob(x))
    assert main(["check", str(tmp_path)]) == 0
    assert "whole; the model loads" in capsys.readouterr().out

    index = tmp_path / "model.safetensors.index.json"
    for file, damage, message in [
        (shards[1], lambda data: None, f"no {shards[1]}, a file of weights"),
        (shards[1], lambda data: data[:-8], f"{shards[1]}: damaged or changed"),
        (index.name, lambda data: data[:50], "index.json: damaged or changed"),
        (index.name, lambda data: data.replace(b"model-", b"../odel-"), "no index of weights"),
    ]:
        path = tmp_path / file
        before, new = path.read_bytes(), damage(path.read_bytes())
        path.unlink() if new is None else path.write_bytes(new)
        if new is not None and len(new) == 50:
            message = "truncated or no index of weights"
        with pytest.raises(InputError, match=message):
            hf.load(tmp_path)
        path.write_bytes(before)
    # Saved again in one file: what is left of the many would say otherwise.
    make_model("grouped", K, seed=1).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.glob("model*.safetensors*")} == {"model.safetensors"}
    make_model("grouped", K, seed=2).save_pretrained(tmp_path, max_shard_size="1KB")
    assert torch.equal(hf.load(tmp_path).log_prob(x), make_model("grouped", K, seed=2).log_prob(x))


def test_a_truncated_shard_without_a_manifest_is_named(tmp_path):
    make_model("lstm", K).save_pretrained(tmp_path, max_shard_size="1KB")
    (tmp_path / "manifest.json").unlink()
    file = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{file.name}: truncated or damaged"):
        hf.load(tmp_path)


def test_an_upload_is_what_is_saved(tmp_path, monkeypatch):
    source = write_model(tmp_path / "source", "grouped", write_text(tmp_path))
    model, uploads = hf.load(source), []

    def push(self, repo_id, **more):
        self.save_pretrained(tmp_path / "upload")
        uploads.append((repo_id, more))

    monkeypatch.setattr(hf.DflowModel, "push_to_hub", push)
    model.save_pretrained(tmp_path / "pub", push_to_hub=True, commit_message="first", token="t")
    model.save_pretrained(tmp_path / "pub", push_to_hub=True, repo_id="someone/model")
    assert uploads == [("pub", {"commit_message": "first", "token": "t"}), ("someone/model", {})]
    assert Tokenizer.load(tmp_path / "upload") == Tokenizer.load(source)
