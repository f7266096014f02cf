"""Text as symbols: what models are trained on and evaluated with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dflow.config import InputError
from dflow.data import files, own_text, sets, splits, stores
from dflow.data.corpus import Corpus, Draws, Text, joined
from dflow.data.known import HUB
from dflow.data.laws import Law
from dflow.data.pieces import SentencePiece
from dflow.data.settings import DataConfig, load_either
from dflow.data.splits import SPLITS, Arranged
from dflow.data.tokenizers import Bytes, Characters, Numbers, Tokenizer, compact

#: Longest sentence of the sentence protocol (Ziegler and Rush 2019, arXiv 1901.10548).
MAX_SENTENCE = 288

Arrange = Callable[[Path], Arranged]


def load(config: DataConfig, tokenizer: Tokenizer | None = None, length: int | None = None) -> Corpus:
    """Read, split and encode the text that ``config`` names.

    Without ``tokenizer`` one is made: characters are ordered by their frequency in the training text, and
    those of the other splits are part of the alphabet; pieces are learned from the training text alone. With
    one (that of a trained model), the text is spelled in it, and ``config.tokenizer`` is not read. Protocol
    lines leaves out lines of more than ``length`` symbols, where it is given.

    Raises:
        InputError: nothing of that name, damaged or undecodable files, too little text, settings that do not
            go together, parameters that a law does not take, another checksum than the config's; and when a
            split is read, a character outside the vocabulary.
    """
    arrange = splits.lines if config.protocol == "lines" else splits.texts
    return load_either(
        config,
        lambda: _load(config, tokenizer, arrange, length),
        lambda: _load(config, tokenizer, splits.texts_before, length),
    )


def _load(config: DataConfig, tokenizer: Tokenizer | None, arrange: Arrange, length: int | None) -> Corpus:
    law = config.law()
    if law is not None:
        return _drawn(law, config, tokenizer)
    if config.store is not None:
        return _stored(config, tokenizer, arrange)
    protocol = config.protocol or "stream"
    named = sets.KNOWN.get(config.name) or sets.BUILT_IN.get(config.name)
    reading = _read(config, arrange, scoring=tokenizer is not None)
    texts = dict(reading.texts)
    training = tokenizer is None
    num_characters = sum(map(len, texts.values()))
    if tokenizer is None:
        alphabet = getattr(named, "alphabet", "") or "".join(sorted(set().union(*texts.values())))
        tokenizer = _tokenizer(config, texts["train"], alphabet)
    notes = own_text.repeated_lines(texts) if protocol == "lines" else []

    @functools.cache
    def spelled(split: str) -> Text:
        if split == splits.ALL and len(texts) < len(SPLITS):
            return joined([spelled(name) for name in reading.texts])
        # A line break between sentences is not one of their characters.
        between = "\n" if protocol == "sentence" else ""
        text = between.join(texts.values()) if split == splits.ALL else texts[split]
        try:
            symbols = (
                _lines(split, text, tokenizer, protocol, length)
                if config.by_lines
                else _stream(split, text, tokenizer)
            )
        except InputError as error:
            raise InputError(f"{config.name} ({split}): {error}") from None
        if split != splits.ALL:
            del texts[split]  # the symbols are there
        return symbols

    if training:
        # Errors are raised before anything is built.
        for split in SPLITS:
            spelled(split)
    return Corpus(
        name=config.name,
        protocol=protocol,
        tokenizer=tokenizer,
        texts={split: functools.partial(spelled, split) for split in (*SPLITS, splits.ALL)},
        num_characters=num_characters,
        checksum=reading.checksum,
        note="" if named is None else named.note,
        sources=reading.sources,
        notes=(*reading.notes, *notes),
        pooled=reading.pooled,
    )


def _read(config: DataConfig, arrange: Arrange, scoring: bool) -> own_text.TextReading:
    """The text of each split."""
    known_set = sets.KNOWN.get(config.name)
    if known_set is not None:
        default = DataConfig(config.name, protocol=config.protocol)
        if any(getattr(config, s) != getattr(default, s) for s in ("lowercase", "valid", "test", "split_by")):
            raise InputError(
                f"{config.name} has splits and a spelling of its own: leave out lowercase, valid, test and "
                "split_by"
            )
        if config.by_lines and known_set.alphabet:
            raise InputError(f"{config.name} has no lines: use protocol 'stream'")
        texts = dict(zip(SPLITS, known_set.read(files.data_folder(config.folder)), strict=True))
        return own_text.TextReading(texts, {}, False, files.digest("".join(texts.values()).encode("utf-8")))
    if config.name in sets.BUILT_IN:
        if config.split_by == "files":
            raise InputError(
                f"{config.name} is one text: data.split_by: files has no files to deal; choose blocks or tail"
            )
        text = sets.BUILT_IN[config.name].read()
        text = text.lower() if config.lowercase else text
        _, texts = own_text.cut(text, config.shares, config, scoring)
        return own_text.TextReading(texts, {}, False, files.digest(text.encode("utf-8")))
    return own_text.of_files(arrange(config.path()), config, scoring)


def _drawn(law: Law, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """A law as a corpus."""
    plain = DataConfig(
        config.name, folder=config.folder, parameters=config.parameters, checksum=config.checksum
    )
    if config.by_lines or replace(config, protocol=None) != plain:
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
        texts={split: functools.partial(texts.__getitem__, split) for split in texts},
        num_characters=sum(text.num_characters for text in texts.values()),
        checksum=files.digest(repr(law).encode()),
        note=law.note,
        law=law,
    )


def _stored(config: DataConfig, tokenizer: Tokenizer | None, arrange: Arrange) -> Corpus:
    """A text that is read from the disk as it is needed."""
    if config.name in (*sets.KNOWN, *sets.BUILT_IN) or config.by_lines:
        raise InputError(
            "data.store is for streams of your own, which rules out a known text and protocols 'sentence' "
            f"and 'lines'; {config.name}, protocol {config.protocol or 'stream'!r}: leave out store, or "
            "protocol"
        )
    arranged = None if config.name.startswith(HUB) else arrange(config.path())
    if config.split_by == "blocks" or (arranged is None and config.split_by != "tail"):
        raise InputError(
            f"data.split_by: {config.split_by} does not go with data.store and {config.name}; leave it out, "
            "or choose files for a folder"
        )
    if arranged is not None and config.split_by == "files":
        arranged = splits.by_files(arranged, config.shares)
    stored = stores.open_store(
        files.expanded(str(config.store)), stores.StoreSource(config, arranged), tokenizer
    )
    about = stored.about
    starts = stored.tokenizer.starts
    texts = {s: Text(s, stored.ids[s], None, about.characters[s], starts=starts) for s in SPLITS}
    getters = {split: functools.partial(texts.__getitem__, split) for split in texts}
    sources = {}
    if arranged is not None:
        sources = {split: list(map(arranged.name, arranged.paths.get(split, ()))) for split in SPLITS}
    return Corpus(
        name=config.name,
        protocol="stream",
        tokenizer=stored.tokenizer,
        texts=getters | {splits.ALL: lambda: joined([texts[split] for split in about.characters])},
        num_characters=sum(about.characters.values()),
        checksum=about.checksum,
        sources=sources,
        notes=(*(() if arranged is None else arranged.notes), *about.notes),
        pooled=arranged is None or "test" not in arranged.paths,
    )


def _tokenizer(config: DataConfig, train: str, alphabet: str) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer == "sentencepiece":
        return SentencePiece.train(train, config.vocab_size)
    if config.by_lines:
        train, alphabet = train.replace("\n", ""), alphabet.replace("\n", "")
    try:
        return Characters.train(train, alphabet)
    except InputError as error:
        raise InputError(f"{config.name}: {error}") from None


def _stream(name: str, text: str, tokenizer: Tokenizer) -> Text:
    codes = tokenizer.codes(text)
    return Text(name, torch.from_numpy(codes), None, len(text), starts=tokenizer.starts)


def _lines(name: str, text: str, tokenizer: Tokenizer, protocol: str, length: int | None) -> Text:
    """A sequence a line, without those that are empty or too long.

    Protocol sentence strips its lines and takes up to `MAX_SENTENCE` characters; protocol lines takes each as
    it stands, up to ``length`` symbols.
    """
    sentence = protocol == "sentence"
    rows = text.split("\n")
    if not rows[-1]:  # behind the last line break
        rows.pop()
    lines = [line for line in (row.strip() if sentence else row for row in rows) if line]
    short = [line for line in lines if not sentence or len(line) <= MAX_SENTENCE]
    coded = [(line, tokenizer.codes(line)) for line in short]
    fitting = [(line, codes) for line, codes in coded if sentence or length is None or len(codes) <= length]
    if not fitting:
        raise InputError(_nothing_fits(min((len(codes) for _, codes in coded), default=0), sentence, length))
    lengths = np.array([len(codes) for _, codes in fitting])
    ids = np.zeros((len(fitting), int(lengths.max())), dtype=compact(tokenizer.size))
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate([codes for _, codes in fitting])
    num_characters = sum(len(line) for line, _ in fitting)
    return Text(
        name,
        torch.from_numpy(ids),
        torch.from_numpy(lengths),
        num_characters,
        len(lines) - len(fitting),
        sum(map(len, lines)) - num_characters,
        tokenizer.starts,
        "sentences" if sentence else "lines",
        None if sentence else length,
        0 if sentence else len(rows) - len(lines),
    )


def _nothing_fits(shortest: int, sentence: bool, length: int | None) -> str:
    if sentence:
        return f"no line of 1 to {MAX_SENTENCE} characters; use protocol 'stream'"
    if not shortest:
        return "no line with a character in it; give more lines, or a larger share for it"
    return (
        f"no line of 1 to {length} symbols, the shortest has {shortest:,}; set model.length to at least "
        f"{shortest}, or use protocol 'stream'"
    )
