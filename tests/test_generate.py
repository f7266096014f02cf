"""Draws: what fixes them, what is refused, and files that are whole or absent."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, make_model, write_model, write_text
from torch import Tensor

from dflow.cli import main
from dflow.config import InputError
from dflow.data import Bytes, Characters, files
from dflow.generate import Spelling, check_output, generate, pieces, write, write_whole
from dflow.hf import DflowModel

K = 5
TOKENIZER = Characters(list("ab\ncé"))


def draw(model: DflowModel, n: int, **settings: Any) -> Tensor:
    return torch.stack(list(generate(model, n, **settings)))


@pytest.mark.parametrize("family", SETTINGS)
def test_seed_and_batch_size_fix_the_draws(family: str) -> None:
    model = make_model(family, K)
    x = draw(model, 7, batch_size=3, seed=4)
    assert x.shape == (7, LENGTH)
    assert x.dtype == torch.int64
    assert 0 <= int(x.min()) <= int(x.max()) < K
    torch.manual_seed(99)  # the global state has no say
    assert torch.equal(draw(model, 7, batch_size=3, seed=4), x)
    assert not torch.equal(draw(model, 7, batch_size=3, seed=5), x)
    assert not torch.equal(x[:3], x[3:6])


def test_more_samples_begin_with_the_full_batches_of_fewer() -> None:
    model = make_model("lstm", K)
    assert torch.equal(draw(model, 9, batch_size=3)[:6], draw(model, 6, batch_size=3))


def test_length_and_absent_entries() -> None:
    assert draw(make_model("bipartite", K), 3, length=5).shape == (3, 5)
    model = make_model("lstm", K, explicit_length=True)
    samples = list(generate(model, 40, batch_size=40))
    lengths = {int((ids >= 0).sum()) for ids in samples}
    assert len(lengths) > 1
    assert all(bool((ids >= 0).int().diff().le(0).all()) for ids in samples)


def test_the_prompt_begins_every_sample() -> None:
    prompt = torch.tensor([3, 1, 4])
    x = draw(make_model("transformer", K), 10, prompt=prompt)
    assert torch.equal(x[:, :3], prompt.expand(10, -1))
    assert len(x[:, 3:].unique(dim=0)) > 1


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_a_prompt_is_never_longer_than_what_it_begins(family: str) -> None:
    model, prompt = make_model(family, 2, length=4, explicit_length=True), torch.tensor([1, 0, 1])
    model.set_length_counts(torch.tensor([0.0, 50.0, 50.0, 20.0, 10.0]))
    x = model.generate(4000, prompt=prompt, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x[:, :3], prompt.expand(4000, -1))
    # Given the prompt: from left to right a prefix costs the same whatever the length.
    texts = [[1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 1]]
    law = torch.stack([model.log_prob(torch.tensor([t])).detach().double().exp()[0] for t in texts])
    found = torch.tensor([(x[:, 3] == end).double().mean() for end in (-1, 0, 1)])
    assert torch.allclose(found, law / law.sum(), atol=0.03)


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
def test_the_loss_counts_the_end_where_it_has_a_law(explicit: bool) -> None:
    model = make_model("transformer", 2, length=4, explicit_length=explicit)
    x = torch.randint(2, (3, 4))
    lengths = torch.full((3,), 4) if explicit else None
    assert model(x).loss == model(x, lengths).loss
    total = -model.log_prob(x).sum() / (3 * (4 + explicit))
    assert float(model(x).loss) == pytest.approx(float(total))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n": 0}, "number of samples 0"),
        ({"n": -3}, "number of samples -3"),
        ({"batch_size": 0}, "batch size 0"),
        ({"length": 0}, "length 0"),
        ({"length": 9}, "1 to 8"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 63}, "seed"),
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "0 symbols"),
        ({"prompt": torch.zeros(8, dtype=torch.int64)}, "8 symbols"),
        ({"prompt": torch.zeros(4, dtype=torch.int64), "length": 4}, "4 symbols"),
        ({"prompt": torch.tensor([0, 5])}, "symbol 5"),
        ({"prompt": torch.tensor([0, -1])}, "symbol -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        generate(make_model("lstm", K), **{"n": 1, **settings})


def test_a_flow_refuses_a_prompt() -> None:
    with pytest.raises(InputError, match="prompt"):
        draw(make_model("bipartite", K), 1, prompt=torch.tensor([1]))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training: bool) -> None:
    model = make_model("lstm", K).train(training)
    next(generate(model, 2, batch_size=1))
    assert model.training == training


def test_formats() -> None:
    ids = torch.tensor([0, 2, 4, -1])
    assert Spelling(TOKENIZER)(ids, 7) == "--- sample 7 ---\na\né\n"
    line = Spelling(TOKENIZER, "jsonl")(ids)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line) == {"text": "a\né", "num_symbols": 3, "exact": True}
    assert "é" in line


def some(*rows: list[int]) -> Iterator[Tensor]:
    return iter([torch.tensor(row) for row in rows])


def test_stdout_gets_samples_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    def samples() -> Iterator[Tensor]:
        yield torch.tensor([0])
        assert capsys.readouterr().out == "--- sample 1 ---\na\n"
        yield torch.tensor([1])

    write(samples(), Spelling(TOKENIZER, "text"), None)
    assert capsys.readouterr().out == "--- sample 2 ---\nb\n"


def test_a_file_is_whole(tmp_path: Path) -> None:
    write(some([0, 1], [4]), Spelling(TOKENIZER, "text"), tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_bytes() == ("--- sample 1 ---\nab\n--- sample 2 ---\né\n".encode())
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_an_interrupted_draw_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[Tensor]:
        yield torch.tensor([0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(samples(), Spelling(TOKENIZER, "text"), tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write(some([0]), Spelling(TOKENIZER, "text"), path)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path / "link")
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "no" / "out.txt")


def test_a_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match=r"out\.txt") as caught:
        write_whole(tmp_path / "out.txt", b"x")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "out.txt")


def test_any_bytes_can_be_written(tmp_path: Path) -> None:
    write(some([255, 65]), Spelling(Bytes(), "jsonl"), tmp_path / "out")
    assert json.loads((tmp_path / "out").read_text(encoding="utf-8"))["text"] == "\ufffdA"
    surrogates = Characters(["a", "\ud800"])
    write(some([0, 1]), Spelling(surrogates, "text"), tmp_path / "other")
    assert (tmp_path / "other").read_text(encoding="utf-8") == "--- sample 1 ---\na?\n"


# -- texts piece by piece ------------------------------------------------------------------------------------


def test_pieces_are_the_sample_and_end_where_they_should() -> None:
    model = make_model("transformer", 5, context=6)
    tokenizer = Characters("abcde")
    prompt = torch.tensor([0, 1, 2])
    for number, ids in enumerate(generate(model, 3, length=40, seed=2, prompt=prompt)):
        whole = tokenizer.decode(ids)
        texts = list(pieces(model, tokenizer, number, length=40, seed=2, prompt=prompt))
        assert "".join(texts) == whole
        assert len(texts) > 3
        stop = whole[20:22]
        place = whole.find(stop, 3)
        assert (
            "".join(pieces(model, tokenizer, number, length=40, seed=2, prompt=prompt, stop=stop))
            == whole[:place]
        )
        assert Spelling(tokenizer, stop=stop, begin=3)(ids, 1) == f"--- sample 1 ---\n{whole[:place]}\n"
        # In the prompt it does not count.
        assert Spelling(tokenizer, stop="ab", begin=3)(ids)[17:19] == "ab"
    with pytest.raises(InputError, match=r"without a model\.context"):
        next(pieces(make_model("transformer", 5), tokenizer, 0))


def test_prompts_come_from_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_model(tmp_path / "m", "transformer", write_text(tmp_path)))
    words = ["generate", "--model", model, "--format", "jsonl"]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("of", encoding="utf-8")
    assert main([*words, "--prompt", "of"]) == 0
    first = capsys.readouterr().out
    assert main([*words, "--prompt-file", str(prompt)]) == 0
    assert capsys.readouterr().out == first
    assert main([*words, "--prompt-file", str(prompt), "--prompt", "of"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    prompt.write_bytes(b"\xff")
    assert main([*words, "--prompt-file", str(prompt)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert main([*words, "--prompt-file", str(tmp_path / "none")]) == 2
