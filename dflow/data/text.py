"""Text as symbols: what models are trained on and evaluated with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflow.config import InputError, nearest
from dflow.data import files, image_sets, own_text, sets, splits, stores, synthetic
from dflow.data.splits import SPLITS, Arranged
from dflow.data.synthetic import Law
from dflow.data.tokenizers import Bytes, Characters, Numbers, SentencePiece, Tokenizer, compact

#: Longest sentence of the sentence protocol (Ziegler and Rush 2019, arXiv 1901.10548).
MAX_SENTENCE = 288


#: Symbols counted at a time.
_COUNTED = 1 << 24


@dataclass
class DataConfig:
    """What text, read and split how, spelled in what symbols."""

    name: str = field(
        default=sets.PYDOC,
        metadata={
            "help": ", ".join((sets.PYDOC, *sets.KNOWN))
            + ", synthetic/LAW, or the path of a text file or folder"
        },
    )
    protocol: Literal["stream", "sentence"] | None = field(
        default=None,
        metadata={
            "help": "stream (default): one long text; sentence: each line on its own, 1 to 288 characters"
        },
    )
    tokenizer: Literal["characters", "bytes", "sentencepiece"] = field(
        default="characters", metadata={"help": "the symbols"}
    )
    vocab_size: int = field(default=512, metadata={"help": "number of symbols, for sentencepiece"})
    folder: str | None = field(
        default=None, metadata={"help": "folder of the data (default: the environment variable DFLOW_DATA)"}
    )
    store: str | None = field(
        default=None,
        metadata={
            "help": "folder in which your own text, or hub:OWNER/NAME, is kept as symbols and read as "
            "needed: for texts larger than memory; made on first use"
        },
    )
    lowercase: bool = field(default=False, metadata={"help": "lower the case of your own text or of pydoc"})
    valid: float = field(
        default=0.05, metadata={"help": "share for validation, of your own text or of pydoc"}
    )
    test: float = field(default=0.05, metadata={"help": "share for the test, of your own text or of pydoc"})
    split_by: own_text.By = field(
        default="tail",
        metadata={
            "help": "what of your own text, where no names tell the splits, is for validation and test: "
            "tail, the end of the joined text; files, whole files; blocks, ends of 20 stretches of the text"
        },
    )
    parameters: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "parameters of a synthetic law"}
    )
    checksum: str | None = field(
        default=None, metadata={"help": "of the whole text: another one is refused (a model's recipe has it)"}
    )

    def __post_init__(self) -> None:
        """Check the shares and sizes."""
        if not (0 < self.valid < 1 and 0 < self.test < 1 and self.valid + self.test < 1):
            raise InputError(
                f"valid={self.valid} and test={self.test} must be above 0 and leave something to train on"
            )
        if self.vocab_size < 2:
            raise InputError(f"vocab_size={self.vocab_size} must be at least 2")
        if self.parameters and not synthetic.is_law(self.name):
            raise InputError(
                f"parameters are those of a synthetic law and {self.name!r} is none; leave them out, or name "
                f"a law: {', '.join(synthetic.PREFIX + name for name in synthetic.LAWS)}"
            )

    @property
    def is_path(self) -> bool:
        """Whether `name` is the path of a file or folder, not the name of a known text or law."""
        known = self.name in sets.KNOWN or self.name == sets.PYDOC or synthetic.is_law(self.name)
        return not (known or self.name.startswith(stores.HUB))

    def located(self) -> DataConfig:
        """The same text by absolute paths, so that it is found from any working directory.

        Raises:
            InputError: no such file or folder.
        """
        return replace(
            self,
            name=files.absolute(_path(self)) if self.is_path else self.name,
            folder=None if self.folder is None else files.absolute(self.folder),
            store=None if self.store is None else files.absolute(self.store),
        )

    def law(self, where: str = "data") -> Law | None:
        """The synthetic law that `name` and `parameters` say, or None when a text is named.

        Raises:
            InputError: no such law, or parameters that it does not take.
        """
        return synthetic.law(self.name, self.parameters, where) if synthetic.is_law(self.name) else None


@dataclass(frozen=True, eq=False)
class Text:
    """Symbols of one split, stored compactly: a stream ``(n,)``, or sentences ``(n, longest)`` with lengths.

    Sentences are padded with 0; ``lengths`` says what is present. ``num_characters`` counts the characters
    that the symbols spell, ``dropped`` the sentences that the protocol left out for their length and
    ``dropped_characters`` the characters of these. ``starts``, int64 ``(K,)``, says how many characters begin
    in each symbol; None where each symbol is one.
    """

    name: str
    ids: Tensor
    lengths: Tensor | None
    num_characters: int
    dropped: int = 0
    dropped_characters: int = 0
    starts: Tensor | None = None

    @property
    def num_symbols(self) -> int:
        """Symbols present; the ends of sentences are not counted."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Length of the longest sentence, or of the stream."""
        return self.ids.shape[-1]

    @property
    def amount(self) -> str:
        """What there is to train on, in words."""
        return f"{self.num_symbols:,} symbols to train on"

    @cached_property
    def characters_per_symbol(self) -> float:
        """Characters a symbol, so that bits a character compare over tokenizers; 1 for characters.

        In the sentence protocol the end of each sentence counts as a character and as a symbol.
        """
        ends = 0 if self.lengths is None else len(self.lengths)
        return (self.num_characters + ends) / (self.num_symbols + ends)

    def crops(
        self, batch: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Random pieces to train on: ids int64 ``(batch, length)``, and lengths ``(batch,)`` of sentences.

        A stream gives windows at uniform places, sentences come whole. The draw depends on nothing but the
        generator, which is on the CPU.

        Raises:
            InputError: ``length`` is above the stream's or below the longest sentence's.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        self._fits(length)
        if self.lengths is None:
            windows = self.ids.unfold(0, length, 1)
            return windows[torch.randint(len(windows), (batch,), generator=generator)].long(), None
        rows = torch.randint(len(self.ids), (batch,), generator=generator)
        return self._padded(self.ids[rows], length), self.lengths[rows]

    def chunks(self, length: int, limit: int | None = None) -> tuple[Tensor, Tensor | None]:
        """All of the text to evaluate on: ids int64 ``(n, length)``, and lengths ``(n,)`` of sentences.

        A stream is cut into chunks that do not overlap; the last `tail` symbols do not fill one and are left.

        Args:
            length: of a chunk.
            limit: only so many, the first ones.

        Raises:
            InputError: ``length`` is above the stream's or below the longest sentence's.
        """
        self._fits(length)
        if self.lengths is None:
            whole = self.ids[: len(self.ids) - self.tail(length)].reshape(-1, length)
            return whole[:limit].long(), None
        return self._padded(self.ids[:limit], length), self.lengths[:limit]

    def tail(self, length: int) -> int:
        """Symbols at the end of a stream that `chunks` leaves."""
        return len(self.ids) % length if self.lengths is None else 0

    def characters(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """How many characters begin in each row of symbols ``(n, length)``: int64 ``(n,)``, on the CPU.

        Symbols below 0, and those beyond ``lengths``, are absent. Ends of sentences are not counted.
        """
        counts = []
        rows = max(1, _COUNTED // max(1, ids.shape[1]))
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows].cpu()
            present = part >= 0
            if lengths is not None:
                present &= torch.arange(ids.shape[1]) < lengths[start : start + rows, None].cpu()
            each = present.long() if self.starts is None else self.starts[part.clamp(min=0)] * present
            counts.append(each.sum(1))
        return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)

    def marginals(self, K: int) -> Tensor:
        """Relative frequency of each symbol: float64 ``(K,)``, adding up to 1."""
        present = self.ids
        if self.lengths is not None:
            present = self.ids[torch.arange(self.longest) < self.lengths[:, None]]
        counts: NDArray[Any] = np.zeros(K, np.int64)
        # Counting takes eight bytes a symbol.
        for part in present.split(_COUNTED):
            found = np.bincount(part.numpy(), minlength=K)
            if len(found) > K:
                raise ValueError(f"symbol {len(found) - 1} is outside an alphabet of K={K}")
            counts += found
        return torch.from_numpy(counts / counts.sum())

    def length_counts(self, max_length: int) -> Tensor:
        """How many sentences have each length 0, 1, ..., ``max_length``: int64 ``(max_length + 1,)``.

        Raises:
            ValueError: A stream has no lengths.
            InputError: A sentence is longer.
        """
        if self.lengths is None:
            raise ValueError(f"the {self.name} text is a stream and has no lengths")
        self._fits(max_length)
        return torch.bincount(self.lengths, minlength=max_length + 1)

    def _padded(self, ids: Tensor, length: int) -> Tensor:
        return F.pad(ids[:, :length].long(), (0, max(0, length - ids.shape[1])))

    def _fits(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be positive")
        if self.lengths is None and length > len(self.ids):
            raise InputError(
                f"the {self.name} text has {len(self.ids):,} symbols, too few for pieces of {length:,}; "
                "give more text, a larger share for it, or a smaller length"
            )
        if self.lengths is not None and length < self.longest:
            raise InputError(
                f"the {self.name} text has sentences of {self.longest} symbols, above length={length}; "
                f"set the length to at least {self.longest}"
            )


@dataclass(frozen=True, eq=False)
class Draws(Text):
    """A law as a text: `crops` draws afresh, `chunks` gives draws that are always the same."""

    law: Law = field(kw_only=True)

    @staticmethod
    def of(law: Law, name: str) -> Draws:
        """The split ``name`` of a law: its own draws to evaluate on."""
        # The seeds of training are hashes of 56 bits.
        seed = ("train", "valid", "test").index(name)
        # A law without an entropy is drawn by many sweeps.
        n = NUM_DRAWS if law.entropy is not None else NUM_DRAWS // 16
        x = law.sample(n, torch.Generator().manual_seed(seed))
        codes = x.flatten().numpy().astype(compact(law.K))
        return Draws(name, torch.from_numpy(codes), None, x.numel(), law=law)

    @property
    def amount(self) -> str:
        """The law's entropy, and what independent entries cost."""
        told = [
            f"{name} {value:.4f} nats"
            for name, value in (("entropy", self.law.entropy), ("factorized", self.law.factorized))
            if value is not None
        ]
        return f"fresh draws of {self.law.dim} symbols ({', '.join(told)})"

    def crops(
        self, batch: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``batch`` fresh draws, int64 ``(batch, length)``, and None.

        Raises:
            InputError: ``length`` is not the law's.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        self._fits(length)
        return self.law.sample(batch, generator), None

    def _fits(self, length: int) -> None:
        if length != self.law.dim:
            raise InputError(
                f"the law is over sequences of {self.law.dim} symbols and the model's length is {length}; "
                f"set model.length to {self.law.dim} or leave it out, or change the law's parameters"
            )


#: Draws of each split of a law that is exact; an evaluation scores them where outcomes cannot be listed.
NUM_DRAWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits, each spelled by the tokenizer when it is first asked for.

    ``checksum`` is that of the whole text (all splits, UTF-8) and ``num_characters`` its length, so that a
    result can say on what it was measured where the text has no fixed version. ``law`` is the synthetic law
    of which the text is drawn, and then the checksum is that of its name and parameters. ``sources`` names
    the files that each split is taken from, where they are the user's, ``notes`` are sentences on how they
    were read, and ``pooled`` says whether the test split is a share that was cut off, and no text of its own.
    """

    name: str
    protocol: Literal["stream", "sentence"]
    tokenizer: Tokenizer
    parts: Mapping[str, Callable[[], Text]]
    num_characters: int
    checksum: str
    note: str = ""
    law: Law | None = None
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pooled: bool = False

    def split(self, name: str) -> Text:
        """The split called ``name``: train, valid or test; or all of them, as they were read.

        Raises:
            InputError: no split of that name, or a character outside the vocabulary.
        """
        if name not in (*SPLITS, splits.ALL):
            raise InputError(f"no split {name!r}; {nearest(name, [*SPLITS, splits.ALL])}")
        if name not in self.parts:
            raise InputError(f"{self.name} is drawn and has no {name!r} to score; name train, valid or test")
        return self.parts[name]()

    def about(self) -> dict[str, Any]:
        """What was dealt, as plain values: of each split its characters, symbols and files; and the notes."""
        parts = {}
        for split in SPLITS:
            text = self.split(split)
            parts[split] = {
                "characters": text.num_characters,
                "symbols": text.num_symbols,
                "files": list(self.sources.get(split, ())),
            }
            if text.lengths is not None:
                parts[split]["sentences"] = len(text.ids)
        return {
            "name": self.name,
            "protocol": self.protocol,
            "checksum": self.checksum,
            "splits": parts,
            "notes": list(self.notes),
        }

    @property
    def train(self) -> Text:
        """What to train on."""
        return self.split("train")

    @property
    def valid(self) -> Text:
        """What to choose by."""
        return self.split("valid")

    @property
    def test(self) -> Text:
        """What to tell results on."""
        return self.split("test")


def load(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, split and encode the text that ``config`` names.

    Without ``tokenizer`` one is made: characters are ordered by their frequency in the training text, and
    those of the other splits are part of the alphabet; pieces are learned from the training text alone. With
    one (that of a trained model), the text is spelled in it, and ``config.tokenizer`` is not read.

    Raises:
        InputError: Nothing of that name, damaged or undecodable files, too little text, settings that do not
            go together, parameters that a law does not take, another checksum than the config's; and when a
            split is asked for, a character outside the vocabulary.
    """
    try:
        corpus = _load(config, tokenizer, splits.texts)
        files.check_same(config.name, corpus.checksum, config.checksum)
    except InputError:
        before = _load_before(config, tokenizer)
        if before is None:
            raise
        return before
    return corpus


def _load_before(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus | None:
    """The text as version 0.1.0 read it, if the checksum that a model keeps is that of this reading."""
    own = config.law() is None and config.name not in (sets.PYDOC, *sets.KNOWN)
    if config.checksum is None or not own or config.name.startswith(stores.HUB):
        return None
    try:
        corpus = _load(config, tokenizer, splits.texts_before)
    except InputError:
        return None
    return corpus if corpus.checksum == config.checksum else None


Arrange = Callable[[Path], Arranged]


def _load(config: DataConfig, tokenizer: Tokenizer | None, arrange: Arrange) -> Corpus:
    law = config.law()
    if law is not None:
        return _drawn(law, config, tokenizer)
    if config.store is not None:
        return _stored(config, tokenizer, arrange)
    protocol = config.protocol or "stream"
    known = sets.KNOWN.get(config.name)
    reading = _read(config, protocol, arrange, scoring=tokenizer is not None)
    texts = dict(reading.parts)
    made = tokenizer is None
    num_characters = sum(map(len, texts.values()))
    if tokenizer is None:
        alphabet = known.alphabet if known is not None else ""
        alphabet = alphabet or "".join(sorted(set().union(*texts.values())))
        tokenizer = _tokenizer(config, texts["train"], alphabet, protocol)
    encode = _sentences if protocol == "sentence" else _stream

    @functools.cache
    def spelled(split: str) -> Text:
        if split == splits.ALL and len(texts) < len(SPLITS):
            return _joined([spelled(part) for part in reading.parts])
        # A line break between sentences is none of their characters.
        between = "\n" if protocol == "sentence" else ""
        text = between.join(texts.values()) if split == splits.ALL else texts[split]
        try:
            symbols = encode(split, text, tokenizer)
        except InputError as error:
            raise InputError(f"{config.name} ({split}): {error}") from None
        if split != splits.ALL:
            del texts[split]  # the symbols are there
        return symbols

    if made:
        # Whoever trains hears of it before anything is built.
        for split in SPLITS:
            spelled(split)
    return Corpus(
        name=config.name,
        protocol=protocol,
        tokenizer=tokenizer,
        parts={split: functools.partial(spelled, split) for split in (*SPLITS, splits.ALL)},
        num_characters=num_characters,
        checksum=reading.checksum,
        note=known.note if known is not None else sets.PYDOC_NOTE * (config.name == sets.PYDOC),
        sources=reading.sources,
        notes=reading.notes,
        pooled=reading.pooled,
    )


def _read(config: DataConfig, protocol: str, arrange: Arrange, scoring: bool) -> own_text.Reading:
    """The text of each split."""
    known = sets.KNOWN.get(config.name)
    default = DataConfig()
    if known is not None:
        settings = (config.lowercase, config.valid, config.test, config.split_by)
        if settings != (default.lowercase, default.valid, default.test, default.split_by):
            raise InputError(
                f"{config.name} has splits and a spelling of its own: leave out lowercase, valid, test and "
                "split_by"
            )
        if protocol == "sentence" and known.alphabet:
            raise InputError(f"{config.name} has no lines: use protocol 'stream'")
        parts = dict(zip(SPLITS, known.read(files.data_folder(config.folder)), strict=True))
        return own_text.Reading(parts, {}, False, files.digest("".join(parts.values()).encode("utf-8")))
    shares = {"valid": config.valid, "test": config.test}
    deal = own_text.Deal(config.name, shares, config.split_by, protocol == "sentence", scoring)
    if config.name == sets.PYDOC:
        if config.split_by == "files":
            raise InputError(
                "pydoc is one text: data.split_by: files has no files to deal; choose blocks or tail"
            )
        text = sets.read_pydoc()
        text = text.lower() if config.lowercase else text
        return own_text.Reading(
            own_text.cut(text, shares, deal).parts, {}, False, files.digest(text.encode("utf-8"))
        )
    found = arrange(_path(config))
    for split in found.parts.keys() & shares.keys():
        if shares[split] != getattr(default, split):
            raise InputError(f"{config.name} has a split of its own for {split}: leave {split} out")
    return own_text.of_files(found, deal, config.lowercase)


def _joined(texts: Sequence[Text]) -> Text:
    """Splits one after another, as one."""
    first = texts[0]
    lengths = None
    ids = [text.ids for text in texts]
    if first.lengths is not None:
        lengths = torch.cat([text.lengths for text in texts if text.lengths is not None])
        longest = max(text.longest for text in texts)
        ids = [F.pad(part, (0, longest - part.shape[1])) for part in ids]
    return Text(
        splits.ALL,
        torch.cat(ids),
        lengths,
        sum(text.num_characters for text in texts),
        sum(text.dropped for text in texts),
        sum(text.dropped_characters for text in texts),
        first.starts,
    )


def _drawn(law: Law, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """A law as a corpus."""
    plain = DataConfig(
        config.name, folder=config.folder, parameters=config.parameters, checksum=config.checksum
    )
    if replace(config, protocol=None) != plain or config.protocol == "sentence":
        raise InputError(
            f"{config.name} is drawn: leave out protocol, tokenizer, vocab_size, lowercase, valid, test "
            "and split_by"
        )
    if tokenizer is not None and tokenizer != Numbers(law.K):
        raise InputError(
            f"{config.name} has {law.K} symbols, spelled as numbers; the model has {tokenizer.size}, spelled "
            f"as {tokenizer.kind}; name data like those that it was trained on"
        )
    texts = {split: Draws.of(law, split) for split in SPLITS}
    return Corpus(
        name=config.name,
        protocol="stream",
        tokenizer=Numbers(law.K),
        parts={split: functools.partial(texts.__getitem__, split) for split in texts},
        num_characters=sum(text.num_characters for text in texts.values()),
        checksum=files.digest(repr(law).encode()),
        note=law.note,
        law=law,
    )


def _stored(config: DataConfig, tokenizer: Tokenizer | None, arrange: Arrange) -> Corpus:
    """A text that is read from the disk as it is needed."""
    if config.name in sets.KNOWN or config.name == sets.PYDOC or config.protocol == "sentence":
        raise InputError(
            f"data.store is for streams of your own, and {config.name} is none; leave out store, or protocol"
        )
    shares = {"valid": config.valid, "test": config.test}
    found = None if config.name.startswith(stores.HUB) else arrange(_path(config))
    if config.split_by == "blocks" or (found is None and config.split_by != "tail"):
        raise InputError(
            f"data.split_by: {config.split_by} does not go with data.store and {config.name}; leave it out, "
            "or choose files for a folder"
        )
    if found is not None and config.split_by == "files":
        found = splits.by_files(found, shares)
    stored = stores.open_store(
        files.expanded(str(config.store)),
        stores.Source(config.name, found, config.lowercase),
        config.tokenizer,
        config.vocab_size,
        (config.valid, config.test),
        tokenizer,
    )
    about = stored.about
    starts = _starts(stored.tokenizer)
    texts = {s: Text(s, stored.ids[s], None, about.characters[s], starts=starts) for s in SPLITS}
    parts = {split: functools.partial(texts.__getitem__, split) for split in texts}
    return Corpus(
        name=config.name,
        protocol="stream",
        tokenizer=stored.tokenizer,
        parts=parts | {splits.ALL: lambda: _joined([texts[split] for split in about.characters])},
        num_characters=sum(about.characters.values()),
        checksum=about.checksum,
        sources={} if found is None else {s: [found.name(p) for p in found.parts.get(s, ())] for s in SPLITS},
        notes=(*(() if found is None else found.notes), *about.notes),
        pooled=found is None or "test" not in found.parts,
    )


def _path(config: DataConfig) -> Path:
    """Of the user's text."""
    path = files.expanded(config.name)
    if not files.exists(path) and (folder := files.data_folder(config.folder)):
        path = folder / config.name
    if not files.exists(path):
        if config.name in (image_sets.CHECKERBOARD, *image_sets.KNOWN) or config.name.startswith("hub:"):
            raise InputError(
                f"{config.name}: images, and this is a model of text; use model.family dequantized (a text "
                "of the hub needs data.store)"
            )
        if config.checksum is not None:
            raise files.gone(config.name, config.checksum)
        raise InputError(
            f"{config.name}: neither a data set nor a file or folder; "
            + nearest(config.name, [sets.PYDOC, *sets.KNOWN])
        )
    return path


def _tokenizer(config: DataConfig, train: str, alphabet: str, protocol: str) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer == "sentencepiece":
        return SentencePiece.train(train, config.vocab_size)
    if protocol == "sentence":
        train, alphabet = train.replace("\n", ""), alphabet.replace("\n", "")
    try:
        return Characters.train(train, alphabet)
    except InputError as error:
        raise InputError(f"{config.name}: {error}") from None


def _stream(name: str, text: str, tokenizer: Tokenizer) -> Text:
    codes = tokenizer.codes(text)
    return Text(name, torch.from_numpy(codes), None, len(text), starts=_starts(tokenizer))


def _starts(tokenizer: Tokenizer) -> Tensor | None:
    return None if tokenizer.starts is None else torch.from_numpy(tokenizer.starts)


def _sentences(name: str, text: str, tokenizer: Tokenizer) -> Text:
    """One sentence a line, stripped; empty lines are none, and those above `MAX_SENTENCE` are dropped."""
    lines = [line for line in (raw.strip() for raw in text.split("\n")) if line]
    kept = [line for line in lines if len(line) <= MAX_SENTENCE]
    if not kept:
        raise InputError(f"no line of 1 to {MAX_SENTENCE} characters; use protocol 'stream'")
    codes = [tokenizer.codes(line) for line in kept]
    lengths = np.array([len(c) for c in codes])
    ids = np.zeros((len(codes), int(lengths.max())), dtype=compact(tokenizer.size))
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(codes)
    characters = sum(map(len, kept))
    return Text(
        name,
        torch.from_numpy(ids),
        torch.from_numpy(lengths),
        characters,
        len(lines) - len(kept),
        sum(map(len, lines)) - characters,
        _starts(tokenizer),
    )
