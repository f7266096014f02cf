"""Any bytes under any exact model of text: they come back, for what the likelihood says, or nothing does."""

from __future__ import annotations

import math
import random
import string
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import uneven
from folders import SETTINGS, make_model, write_model, write_text

from dflow import cli
from dflow.coding import Coder, container
from dflow.coding.container import Damaged, Reader
from dflow.compress import TextCoder, chunks, compress_text, decompress_text, describe_text, planes
from dflow.compress.planes import Alphabet, Counts
from dflow.compress.text_coder import TextPlan
from dflow.config import InputError
from dflow.core import Context
from dflow.data import Bytes, Characters, Numbers, SentencePiece, Tokenizer

SMALL = [*"\n abcdefghijklmnopqrstuvwxyz.,"]
LENGTH = 8


def peaked(family: str, tokenizer: Tokenizer, explicit: bool = False, **other: Any) -> TextCoder:
    """A model; of a large vocabulary the first symbols are likely, so that draws become smaller."""
    model = make_model(family, tokenizer.size, LENGTH, explicit, **other)
    if tokenizer.size > 64:
        with torch.no_grad():
            model.distribution.net.head.bias[64:] -= 6
    if explicit:
        model.set_length_counts(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 300]))
    return TextCoder.of(model, tokenizer)


LETTERS = Characters(SMALL)
GROUPED = peaked("grouped", LETTERS)
SENTENCES = peaked("grouped", Characters([s for s in SMALL if s != "\n"]), explicit=True)


def drawn(coder: TextCoder, n: int, seed: int = 0) -> bytes:
    """A text of the model's own law, which it makes smaller."""
    g = torch.Generator().manual_seed(seed)
    chunks = -(-n // coder.length)
    lengths = None if coder.lengths is None else torch.full((chunks,), coder.length)
    x = coder.law.sample(chunks, Context(lengths=lengths), g).flatten()[:n]
    if isinstance(coder.tokenizer, Bytes):
        return bytes(x.tolist())
    return coder.tokenizer.decode(x).encode()


def back(data: bytes, coder: TextCoder) -> bytes:
    [content] = decompress_text(data, coder).values()
    return content


# The law


@pytest.mark.parametrize("explicit", [False, True], ids=["stream", "sentences"])
@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_codes_at_its_likelihood(family: str, explicit: bool) -> None:
    symbols = [s for s in SMALL if s != "\n"] if explicit else SMALL
    coder = peaked(family, Characters(symbols), explicit)
    text = drawn(coder, 1001)
    if explicit:
        text = b"\n".join(text[i : i + 1 + i % 19] for i in range(0, len(text), 1 + 19))
    data, report = compress_text({"a": text}, coder, analytic=True)
    assert back(data, coder) == text
    assert not report.stored
    assert report.analytic is not None
    excess = 8 * (report.bytes - report.header) - report.side - report.analytic
    assert -1 <= excess <= 0.002 * report.symbols + 64
    assert report.header <= 48
    assert report.encode.network > 0
    assert report.decode is not None


@pytest.mark.parametrize("family", ["bipartite", "multiscale"])
def test_flows_with_a_context_code_chunks_with_nothing_known(family: str) -> None:
    model = make_model(family, len(SMALL), LENGTH, context=5)
    uneven(model)
    text = drawn(GROUPED, 203)
    data, _ = compress_text({"a": text}, TextCoder.of(model, LETTERS))
    assert back(data, TextCoder.of(model, LETTERS)) == text
    _, report = compress_text({"a": text[:200]}, TextCoder.of(model, LETTERS), analytic=True)
    nats = -float(model.log_prob(LETTERS.encode(text[:200].decode()).view(-1, LENGTH)).detach().sum())
    assert report.analytic == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize("family", ["grouped", "bipartite", "lstm"])
def test_the_likelihood_is_that_of_the_model(family: str) -> None:
    """Chunks of the model's length, each alone, as an evaluation scores them."""
    model = make_model(family, len(SMALL))
    text = drawn(TextCoder.of(model, LETTERS), 64 * LENGTH)
    _, report = compress_text({"a": text}, TextCoder.of(model, LETTERS), analytic=True)
    ids = LETTERS.encode(text.decode()).view(-1, LENGTH)
    assert report.analytic == pytest.approx(
        -float(model.log_prob(ids).detach().sum()) / math.log(2), rel=1e-5
    )


@pytest.mark.parametrize("family", ["grouped", "lstm", "bipartite"])
def test_texts_are_coded_and_decoded_on_one_thread(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several threads depend on how many these are; the setting is restored, after an error too."""
    coder, before = peaked(family, LETTERS), torch.get_num_threads()
    text, seen = drawn(coder, 100), []
    push, pop = chunks.codec.push, chunks.codec.pop

    def spy(call: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            seen.append(torch.get_num_threads())
            return call(*args, **kwargs)

        return noting

    monkeypatch.setattr(chunks.codec, "push", spy(push))
    monkeypatch.setattr(chunks.codec, "pop", spy(pop))
    try:
        torch.set_num_threads(3)
        data, _ = compress_text({"a": text}, coder, verify=False)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
        seen.clear()
        assert back(data, coder) == text
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(chunks.codec, "pop", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            back(data, coder)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_network_calls_are_chosen_and_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = write_text(tmp_path)
    folder = write_model(tmp_path / "m", "grouped", text)
    settings = SETTINGS["grouped"] | {"calls": [1, 4]}
    from dflow import hf

    config = hf.DflowConfig(
        family="grouped", vocab_size=hf.load(folder).config.vocab_size, length=LENGTH, **settings
    )
    hf.save(hf.DflowModel(config), folder)
    sizes = {}
    for calls in ("", "@1", "@4"):
        data, report = compress_text({"a": text.read_bytes()}, f"{folder}{calls}", analytic=True)
        assert decompress_text(data, folder) == {"a": text.read_bytes()}
        assert ("4 network calls" in str(describe_text(data))) == (calls == "@4")
        sizes[calls] = report.analytic
    assert len(set(sizes.values())) == 3
    with pytest.raises(InputError, match="4 network calls"):
        decompress_text(data, f"{folder}@1")
    with pytest.raises(InputError, match="made by"):
        decompress_text(data, TextCoder.load(f"{folder}@1"))
    noise = {"noise": random.Random(0).randbytes(500)}
    for calls in ("", "@1", "@4"):
        data, report = compress_text(noise, f"{folder}{calls}")
        assert report.stored
        for other in ("", "@1", "@4"):
            assert decompress_text(data, f"{folder}{other}") == noise


# Bytes


AWKWARD = {
    "empty": b"",
    "a byte": b"a",
    "not a multiple": b"abcdefghijk",
    "none of the vocabulary": "ЖЩЮ!?Я".encode() * 5,
    "every byte": bytes(range(256)) * 2,
    "noise": random.Random(0).randbytes(3000),
    "capitals": b'The Cat. A DOG and an iPhone\n\n"Hello," said McDonald. IT WAS\tI\n',
    "tabs and ends": b"\n\n\t a\r\nb\r\n \x00 \t",
    "marks": "\ufeffé, ß ǅ İ ı ﬀ \U0001f600".encode(),
    "half a character": "é".encode()[:1] + b"abc",
    "surrogate": b"\xed\xa0\x80abc",
    "long runs": b"abc" + b"7" * 5000 + b" d" + b"89" * 40,
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("coder", [GROUPED, SENTENCES], ids=["stream", "sentences"])
def test_any_bytes_come_back(coder: TextCoder, name: str) -> None:
    data, report = compress_text({"a": AWKWARD[name]}, coder)
    assert back(data, coder) == AWKWARD[name]
    assert len(data) <= len(AWKWARD[name]) + 40
    assert report.bytes == len(data)


def test_noise_is_stored() -> None:
    for name, kept in (("noise", True), ("every byte", True), ("empty", True), ("long runs", False)):
        data, report = compress_text({"a": AWKWARD[name]}, GROUPED)
        assert report.stored == kept
        assert bool(report.notes) == (kept and name != "empty")
        assert ("stored as it is" in str(describe_text(data))) == kept


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 515])
def test_chunks_of_any_number(n: int) -> None:
    text = drawn(GROUPED, n)
    for batch in (1, 3, 64):
        coder = GROUPED
        data, _ = compress_text({"a": text}, coder, batch=batch)
        assert back(data, coder) == text


def test_chunks_that_are_coded_together_are_in_the_file() -> None:
    text = drawn(GROUPED, 8 * 100)
    rows = dict(describe_text(compress_text({"a": text}, GROUPED)[0]))
    assert rows["chunks"] == "100, 50 at a time"
    rows = dict(describe_text(compress_text({"a": text}, GROUPED, batch=7)[0]))
    assert rows["chunks"] == "100, 7 at a time"


def test_threads_may_change() -> None:
    text, before = drawn(GROUPED, 3000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compress_text({"a": text}, GROUPED)[0]
        torch.set_num_threads(2)
        assert back(one, GROUPED) == text
        assert compress_text({"a": text}, GROUPED)[0] == one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece", "numbers"])
def test_other_vocabularies(tokenizer: str) -> None:
    made: Tokenizer
    if tokenizer == "bytes":
        made, spelled, other = Bytes(), bytes(range(256)), None
    elif tokenizer == "sentencepiece":
        made = SentencePiece.train("a text of words, of many other words and letters.\n" * 40, 300)
        spelled, other = "a text of wörds\r\n\x00".encode(), b"\xff\xfe" * 60
    else:
        made, spelled, other = Numbers(20), b"3 0 17 3 3 0", b"3  0 17"
    coder = peaked("grouped", made)
    texts_ = [drawn(coder, 200), spelled] + [other] * (other is not None)
    for text in texts_:
        data, report = compress_text({"a": text}, coder)
        assert back(data, coder) == text
        if text is other:
            assert report.stored
            assert "cannot spell" in report.notes[0]
    assert not compress_text({"a": texts_[0]}, coder)[1].stored


def test_many_files_are_one_text(tmp_path: Path) -> None:
    files = {"a.txt": drawn(GROUPED, 100), "empty": b"", "b.bin": b"\x00\xffx" * 5, "ü.txt": "ü".encode()}
    data, report = compress_text(files, GROUPED)
    assert decompress_text(data, GROUPED) == files
    assert list(decompress_text(data, GROUPED)) == list(files)
    assert (report.files, report.raw) == (4, sum(map(len, files.values())))
    assert ("b.bin", "15 bytes") in describe_text(data)
    for name in ("", "..", "a/b", "a\\b", "C:x", "a\n", "x" * 300):
        with pytest.raises(InputError, match="its name"):
            compress_text({name: b"x"}, GROUPED)
    with pytest.raises(InputError, match="no files"):
        compress_text({}, GROUPED)
    for batch in (0, 1000):
        with pytest.raises(InputError, match=f"batch size {batch}"):
            compress_text({"a": b"x"}, GROUPED, batch=batch)


def test_golden_file() -> None:
    """If this fails, files of before can no longer be read."""
    coder = replace(flat(), fingerprint=bytes(8))
    text = b"Adcba dac bab. Caaa b\n" * 6 + b"A 2nd line in CAPS\n"
    data, _ = compress_text({"a": text}, coder)
    assert data.hex() == GOLDEN
    assert back(bytes.fromhex(GOLDEN), coder) == text


GOLDEN = (
    "64666c022000000000000000001e05016197010013061306112520060e0101010c0101030150232201013201012fd0ce"
    "73014cb6ff858837a2eb8169012f15a15b560cafe69fb6d93fc53f3a572e1cccfc6b9878b13d8ff85875b0201b55fdff"
    "1bbfdb8d58baeeab3c640a63be501fc64c740d03ca575d8d2f6911caed024d6de54c692896"
)


def flat() -> TextCoder:
    """A law that hangs on no net: the same everywhere."""
    from dflow.distributions import Categorical

    law = Categorical(LENGTH, len(SMALL), learned=True)
    with torch.no_grad():
        law.logits.copy_(-torch.arange(len(SMALL)) / 3 * torch.ones(LENGTH, 1))
    return TextCoder(law.double().eval(), LETTERS, LENGTH, None, 0, bytes(8))


# Planes


def halves(text: str, symbols: list[str], lines: bool = False) -> tuple[Any, Counts, float]:
    """Stream, counts and bits of a text that came back from its planes."""
    points = np.array([ord(c) for c in text], np.uint32)
    alphabet = Alphabet(symbols, lines)
    stream, cuts, values, counts = alphabet.split(points)
    assert Counts.read(Reader(counts.to_bytes()), len(text) + 1) == counts
    coder = Coder()
    coder.push(*planes.intervals(alphabet.planes(stream, cuts, counts), values))
    bits = coder.num_bits
    assert np.array_equal(planes.pop(alphabet.planes(stream, cuts, counts), coder), points)
    coder.finish()
    return stream, counts, bits


LOWER = [*" ", *string.ascii_lowercase]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("symbols", [LOWER, SMALL, ["a", "b"], [" ", "A", "b", "\n"], ["é", "ß"]], ids=len)
def test_planes_of_any_text(symbols: list[str], lines: bool) -> None:
    draw = random.Random(1)
    for n in range(150):
        halves("".join(draw.choice("aAbB .\n\tZzÉéßN0\r1") for _ in range(n % 60)), symbols, lines)


def test_what_goes_where() -> None:
    stream, counts, _ = halves("The cat.\nNASA's", LOWER)
    assert "".join(LOWER[i] for i in stream) == "the cat nasas"
    assert counts.breaks == (1, 1, 0)
    assert "".join(map(chr, counts.points)) == "'."
    assert counts.escapes == (1, 1)
    # Words: The (longer than one, begins), cat, NASA (begins), s.
    words = np.array(counts.words).reshape(2, 3, 4)
    assert words.sum() == 4
    assert words[1, 1, 1] == 1
    assert words[1, 2, 2] == 1
    assert words[0, 1, 0] == 1
    assert words[0, 0, 0] == 1
    # What the vocabulary holds is never taken for something else.
    stream, counts, _ = halves("Nab NAb", ["N", "a", "b", " "])
    assert [*stream] == [0, 1, 2, 3, 0, 1, 2]
    assert not counts.points


def test_a_text_of_the_vocabulary_has_no_planes() -> None:
    stream, counts, bits = halves("abc abc", LOWER)
    assert (len(stream), bits, counts) == (7, 0, Counts())
    assert counts.to_bytes() == b"\0"


def test_capitals_of_sentences_cost_little() -> None:
    """The laws are those of beginnings and of others: neither costs anything where each is certain."""
    text = "The cat saw a dog. The dog saw a cat. " * 200
    stream, counts, bits = halves(text, [*LOWER, "."])
    assert len(stream) == len(text)
    assert len(counts.to_bytes()) < 40
    assert bits < 64
    # A law of all words alike would take 0.5 bit a word.
    draw = random.Random(0)
    assert halves("".join(draw.choice(["The ", "the "]) for _ in range(1000)), LOWER)[2] > 900


def test_lines_cut_the_text() -> None:
    alphabet = Alphabet(LOWER, lines=True)
    _, cuts, _, _ = alphabet.split(np.array([ord(c) for c in "ab\n\n.c\n"], np.uint32))
    assert cuts.tolist() == [2, 2, 3]


@pytest.mark.parametrize(
    "counts",
    [
        Counts(breaks=(5, 1, 0)),
        Counts(runs=(1,) * 32, points=(33,), escapes=(3,)),
        Counts(points=(33, 34), runs=(0,) * 32, escapes=(1, 1)),
        Counts(words=(0, 9, 0, 0) * 6),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: Counts) -> None:
    alphabet = Alphabet(["N", *LOWER])
    stream = np.array([0, 2, 1, 2, 3, 0, 2])
    steps = alphabet.planes(stream, stream[:0], counts)
    with pytest.raises(Damaged):
        planes.pop(steps, Coder(random.Random(0).randbytes(400)))


# Damage


def test_100_mutations_are_refused() -> None:
    text = drawn(GROUPED, 300) + b"And More!"
    data = compress_text({"a.txt": text}, GROUPED)[0]
    draw = random.Random(2)
    for _ in range(100):
        damaged = bytearray(data)
        kind = draw.randrange(4)
        at = draw.randrange(len(data))
        if kind == 0:
            damaged[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            damaged[at:at] = draw.randbytes(1 + draw.randrange(8))
        else:
            damaged[at : at + 4] = data[at // 2 :][:4]
        if bytes(damaged) == data:
            continue
        with pytest.raises(InputError, match=r"^x\.dfl: "):
            decompress_text(bytes(damaged), GROUPED, name="x.dfl")


def hostile(data: bytes, **changes: Any) -> bytes:
    """A file whose checksums are right and whose meta is not."""
    found = container.read(data)
    plan = replace(TextPlan.read(found.meta), **changes)
    return container.write(replace(found, meta=plan.to_bytes()))


def test_a_file_that_was_made_to_harm_is_refused() -> None:
    text = drawn(GROUPED, 300) + b"And More!"
    text += "é".encode()
    data = compress_text({"a": text}, GROUPED)[0]
    n = len(text)
    cases: list[dict[str, Any]] = [
        {"files": (("a", 1 << 60),)},
        {"files": (("a", n - 1),)},
        {"files": (("../a", n),)},
        {"files": ()},
        {"chunks": 1 << 40},
        {"chunks": 5},
        {"batch": 0},
        {"batch": 1 << 7},
        {"last": 0},
        {"last": 9},
        {"last": 1},
        {"latin": True},
        {"calls": 3},
        {"counts": Counts()},
        {"counts": Counts(runs=(1,) * 32, points=(33,), escapes=(1 << 50,))},
        {"counts": Counts(runs=(1,) * 32, points=(1 << 40,), escapes=(3,))},
        {"coded": False},
    ]
    begun = time.perf_counter()
    for changes in cases:
        with pytest.raises(InputError):
            decompress_text(hostile(data, **changes), GROUPED)
    assert time.perf_counter() - begun < 5
    assert decompress_text(hostile(data), GROUPED) == {"a": text}
    with pytest.raises(InputError, match="--limit"):
        decompress_text(data, GROUPED, limit=n - 1)
    found = container.read(data)
    for segments in ((), found.segments * 2, (replace(found.segments[0], levels=(b"", b"")),)):
        with pytest.raises(InputError):
            decompress_text(container.write(replace(found, segments=segments)), GROUPED)
    for payload in (b"abc", bytes(8), random.Random(0).randbytes(400)):
        segment = replace(found.segments[0], levels=(payload,))
        with pytest.raises(InputError):
            decompress_text(container.write(replace(found, segments=(segment,))), GROUPED)
    with pytest.raises(InputError, match="images"):
        decompress_text(container.write(replace(found, kind=container.IMAGES)), GROUPED)


def test_another_model_or_vocabulary_is_refused() -> None:
    text = drawn(GROUPED, 100)
    data = compress_text({"a": text}, GROUPED)[0]
    swapped = Characters([SMALL[1], SMALL[0], *SMALL[2:]])
    for other in (peaked("grouped", LETTERS, seed=1), peaked("grouped", swapped), peaked("lstm", LETTERS)):
        with pytest.raises(InputError, match=GROUPED.fingerprint.hex()):
            decompress_text(data, other)
    # The law of lengths is part of a model of sentences.
    model = make_model("grouped", len(SMALL) - 1, LENGTH, True)
    first, second = (
        TextCoder.of(model, SENTENCES.tokenizer).fingerprint
        for counts in (torch.arange(9.0), torch.ones(9))
        if model.set_length_counts(counts) is None
    )
    assert first != second


def test_what_does_not_decode_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chunks.codec.pop
    monkeypatch.setattr(chunks.codec, "pop", lambda *given: whole(*given) ^ 1)
    with pytest.raises(InputError, match="nothing is written"):
        compress_text({"a": drawn(GROUPED, 100)}, GROUPED)
    assert compress_text({"a": drawn(GROUPED, 100)}, GROUPED, verify=False)[1].decode is None


# Command line


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(range(256)))
    folder = str(write_model(tmp_path / "m", "grouped", text))
    packed, out = tmp_path / "t.dfl", tmp_path / "back"

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        found = capsys.readouterr()
        return code, found.out, found.err

    code, told, _ = run("compress", text, other, "-o", packed, "--model", folder)
    assert code == 0
    assert "bits a byte" in told
    code, told, _ = run("info", packed)
    assert code == 0
    assert "other.bin" in told
    assert run("decompress", packed, "-o", out, "--model", folder)[0] == 0
    assert (out / "text.txt").read_bytes() == text.read_bytes()
    assert (out / "other.bin").read_bytes() == other.read_bytes()
    assert run("compress", text, other, "-o", tmp_path / "each", "--separate", "--model", folder)[0] == 0
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["other.bin.dfl", "text.txt.dfl"]
    for argv, named in (
        (("decompress", packed, "-o", out, "--model", folder), "exists already"),
        (("decompress", packed, "-o", tmp_path / "b2", "--model", folder, "--levels", "1"), "--levels"),
        (("decompress", packed, "-o", tmp_path / "b2", "--model", folder, "--limit", "9"), "--limit"),
        (("compress", text, "-o", tmp_path / "x", "--model", folder, "--mode", "fixed"), "--mode fixed"),
        (("compress", text, "-o", tmp_path / "x", "--model", folder, "--tiles", "3"), "--tiles"),
        (("compress", text, text, "-o", tmp_path / "x", "--model", folder), "would both come back as"),
        (("compress", text, "-o", tmp_path / "x", "--model", folder, "--batch-size", "0"), "batch size 0"),
        (("plot", "progressive", packed, "--model", folder, "-o", tmp_path / "p.png"), "text"),
    ):
        code, _, error = run(*argv)
        assert (code, named in error) == (2, True), error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("separate", [True, False])
def test_two_files_of_one_name_are_told_a_way_that_works(
    separate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(write_model(tmp_path / "model", "lstm", write_text(tmp_path)))
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "s.txt").write_text(f"line of {folder}\n")
    words = ["--model", model, *["--separate"] * separate]
    assert cli.main(["compress", "a/s.txt", "b/s.txt", "-o", "both", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a/s.txt and b/s.txt would both")
    assert "rename one, or compress them by two commands, each with an --output of its own" in said
    for folder in ("a", "b"):
        packed = f"{folder}.dfl"
        assert cli.main(["compress", f"{folder}/s.txt", "-o", packed, *words]) == 0
        file = f"{packed}/s.txt.dfl" if separate else packed
        assert cli.main(["decompress", file, "-o", f"{folder}_back", "--model", model]) == 0
        assert Path(f"{folder}_back/s.txt").read_text() == f"line of {folder}\n"
    Path("b/s.txt").rename("b/t.txt")
    assert cli.main(["compress", "a/s.txt", "b/t.txt", "-o", "both2", *words]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="names of Windows")
@pytest.mark.parametrize("name", ["10:30.log", "-", " s.txt", "a b:c", "-o"])
def test_odd_names_of_files_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(write_model(tmp_path / "model", "lstm", write_text(tmp_path)))
    Path(name).write_text("line 1 of a text\n")
    assert cli.main(["compress", f"./{name}", "-o", "x.dfl", "--model", model]) == 0
    assert cli.main(["decompress", "x.dfl", "-o", "back", "--model", model]) == 0
    assert (Path("back") / name).read_text() == "line 1 of a text\n"
