"""Fill gaps in a text: draws of what is hidden, given the text on both sides of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflow import zoo
from dflow.config import InputError
from dflow.core import Context, Distribution, Known
from dflow.data import Tokenizer
from dflow.distributions.documents import Documents
from dflow.models import TextModel
from dflow.ops.devices import widen, widest
from dflow.ops.noise import Controls, Noise


@dataclass(frozen=True)
class Filled:
    """A text whose gaps are filled.

    Attributes:
        ids: all of its symbols, int64 ``(n,)``, on the CPU.
        log_prob: log-probability in nats of what stands in the gaps, given the text around them, by the law
            of the model without controls.
    """

    ids: Tensor
    log_prob: float


@dataclass(frozen=True)
class Window:
    """A piece of a text, whose gaps are filled together.

    Attributes:
        begin: where it begins.
        end: where it ends, exclusive.
        hidden: bool ``(end - begin,)``, True in its gaps.
    """

    begin: int
    end: int
    hidden: Tensor


def windows(hidden: Tensor, length: int, context: int) -> list[Window]:
    """The pieces of a text in which its gaps are filled, from left to right.

    A window holds as many of the next gaps as fit: at most ``length`` hidden symbols, and at most ``context``
    known ones between them. What is left of the context goes to both sides in equal shares, and what one side
    has no use for goes to the other. A window ends before the next gap that is not filled yet; gaps to the
    left of it are filled, and known.

    Args:
        hidden: bool ``(n,)``, True in gaps.
        length: hidden symbols of a window, at most.
        context: known symbols of a window, at most.

    Raises:
        InputError: a gap of more than ``length`` symbols.

    >>> hidden = torch.tensor([c == "_" for c in "abc__d_efg__"])
    >>> [(window.begin, window.end) for window in windows(hidden, 3, 4)]
    [(1, 8), (6, 12)]
    """
    edges = torch.cat([torch.zeros(1), hidden.cpu().float(), torch.zeros(1)]).diff()
    begins, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    pieces = []
    i = 0
    while i < len(begins):
        if ends[i] - begins[i] > length:
            raise InputError(
                f"gap {i + 1} has {ends[i] - begins[i]} symbols, and this model fills at most {length} "
                "together; give a smaller size, or a model of a larger length"
            )
        j, size, between = i + 1, ends[i] - begins[i], 0
        while j < len(begins):
            size, between = size + ends[j] - begins[j], between + begins[j] - ends[j - 1]
            if size > length or between > context:
                break
            j += 1
        begin, end = begins[i], ends[j - 1]
        spare = context - int((~hidden[begin:end]).sum())
        right = (begins[j] if j < len(begins) else len(hidden)) - end
        before = min(begin, max(spare - right, spare - spare // 2))
        after = min(right, spare - before)
        piece = hidden[begin - before : end + after].clone()
        piece[:before] = False
        pieces.append(Window(begin - before, end + after, piece))
        i = j
    return pieces


def fill(
    model: TextModel,
    symbols: Tensor,
    hidden: Tensor,
    n: int = 1,
    *,
    seed: int = 0,
    batch_size: int = 100,
    controls: Controls | None = None,
) -> Iterator[Filled]:
    r"""``n`` draws of the hidden symbols of a text, given the others.

    For a family that takes known symbols anywhere, gaps are filled in `windows` of the text: several gaps
    together where they fit, with one joint law, else one window after another from left to right, each given
    what is filled by then:

    .. math:: p(\text{gaps} \mid \text{text}) = \prod_w p(\text{gaps of } w \mid \text{window } w)

    This is the law of all draws, exactly, and `Filled.log_prob` its value. Where the whole text fits into one
    window it is the model's conditional law of the gaps given all the text; else what lies outside of a
    window, and gaps further right, are left out of what it is given. A family that takes known symbols
    before the others fills one gap, at the end: a continuation.

    A draw is fixed by the seed and its number, whatever the batch size. A larger ``n`` begins with the
    draws of a smaller.

    Args:
        model: the law; its mode is restored.
        symbols: int64 ``(n,)``, the text; what stands in a gap is never read.
        hidden: bool ``(n,)``, True in the gaps.
        n: number of draws.
        seed: from 0 to 2^63 - 1.
        batch_size: number of draws at a time.
        controls: changes of the law, as temperature; None for the model's own.

    Raises:
        InputError: a model that takes no known symbols, or only those before the others while text stands
            behind a gap; no gap; a gap longer than the model can take; symbols outside the vocabulary; an
            argument outside its range. At once, not at the first draw.
    """
    _check_numbers(n, batch_size, seed)
    _check_symbols(model, symbols, hidden)
    law, pieces = _law(model, hidden)
    controls = None if controls is None or controls.exact else controls

    def draws() -> Iterator[Filled]:
        for start in range(0, n, batch_size):
            samples = torch.arange(start, min(n, start + batch_size), device=model.device)
            mode = model.training
            model.train(False)
            try:
                with torch.inference_mode():
                    filled = _draw(
                        law, pieces, symbols.to(model.device), Noise(seed, samples, None, controls)
                    )
            finally:
                model.train(mode)
            yield from filled

    return draws()


def _draw(law: Distribution, pieces: Sequence[Window], symbols: Tensor, noise: Noise) -> Iterator[Filled]:
    """The samples of some noise: the windows of a text, one after another."""
    x = symbols.repeat(len(noise.samples), 1)
    log_prob = torch.zeros(len(x), dtype=widest(x.device), device=x.device)
    for window in pieces:
        places = torch.arange(window.begin, window.end, device=x.device)
        mask = ~window.hidden.cpu()
        context = Context(known=Known(x[:, places], mask), noise=noise.select(places))
        # A document stops at its end, not behind its chunk.
        options: dict[str, Any] = {"length": len(places)} if isinstance(law, Documents) else {}
        x[:, places] = law.sample(len(x), context, **options)
        log_prob += widen(law.log_prob(x[:, places], Context(known=Known(x[:, places], mask))))
    return map(Filled, x.cpu(), log_prob.tolist())


def _check_numbers(n: int, batch_size: int, seed: int) -> None:
    for name, value in (("number of samples", n), ("batch size", batch_size)):
        if value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed {seed} must be from 0 to {(1 << 63) - 1}")


def _check_symbols(model: TextModel, symbols: Tensor, hidden: Tensor) -> None:
    if symbols.shape != hidden.shape or (symbols.dtype, symbols.ndim) != (torch.int64, 1):
        raise InputError(
            "a text is symbols int64 (n,) and its gaps a mask bool (n,), found "
            f"{symbols.dtype} {tuple(symbols.shape)} and {hidden.dtype} {tuple(hidden.shape)}"
        )
    if not bool(hidden.any()):
        raise InputError("the text has no gap, so that there is nothing to fill")
    known = symbols[~hidden]
    low, high = (int(v) for v in known.aminmax()) if known.numel() else (0, 0)
    if low < 0 or high >= model.config.vocab_size:
        raise InputError(
            f"symbol {low if low < 0 else high} lies outside 0..{model.config.vocab_size - 1}, the vocabulary"
        )


def _law(model: TextModel, hidden: Tensor) -> tuple[Distribution, list[Window]]:
    """The law that fills the gaps of a text, and the pieces of the text that it takes."""
    config, documents = model.config, model.documents
    if config.record.known == "anywhere" and documents is not None:
        return model.law, windows(hidden, config.length, config.context)
    if config.record.known != "before":
        raise InputError(
            f"this {config.family} model was not trained with known symbols, which stand around a gap; use "
            f"{_able()} that was trained with a model.context"
        )
    size = int(hidden.sum())
    if not bool(hidden[len(hidden) - size :].all()):
        raise InputError(
            f"text stands behind a gap, and a {config.family} model reads only what stands before; let the "
            f"text end with its only gap, without a line break behind it, or use {_able()} that was trained "
            "with a model.context"
        )
    if documents is None and len(hidden) > config.length:
        raise InputError(
            f"the text with its gap has {len(hidden)} symbols, and this model takes at most {config.length}; "
            "give a smaller size or less text, or use a model that was trained with a model.context"
        )
    return documents or model.law, [Window(0, len(hidden), hidden)]


def _able() -> str:
    """The models that read text on both sides of a gap."""
    names = [name for name in zoo.names("text") if zoo.find(name).known == "anywhere"]
    return f"one of family {', '.join(names)}"


def gapped(tokenizer: Tokenizer, text: str, mark: str, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The symbols of a text, int64 ``(n,)``, and its gaps, bool ``(n,)``, where the text has marks.

    Args:
        tokenizer: that of the model; it spells what stands between the marks, each piece on its own.
        text: with marks.
        mark: what stands for a gap.
        sizes: symbols of each gap, or one number for all.

    Raises:
        InputError: no mark in the text, another number of sizes than there are gaps, a size below 1, or a
            symbol outside the vocabulary.

    >>> from dflow.data import Characters
    >>> gapped(Characters("ab"), "a_b", "_", [2])
    (tensor([0, 0, 0, 1]), tensor([False,  True,  True, False]))
    """
    if not text:
        raise InputError("the text is empty, so that there is no gap to fill")
    gaps = text.count(mark) if mark else 0
    if not gaps:
        raise InputError(f"the text holds no gap {mark!r}; write this where a gap is, or name another mark")
    if len(sizes) not in (1, gaps):
        raise InputError(f"{len(sizes)} sizes for {gaps} gaps; give one for all, or one for each")
    if min(sizes) < 1:
        raise InputError(f"a gap of {min(sizes)} symbols; a size is at least 1")
    symbols, hidden = [], []
    start = 0
    for i, piece in enumerate(text.split(mark)):
        if i:
            size = sizes[0 if len(sizes) == 1 else i - 1]
            symbols.append(torch.zeros(size, dtype=torch.int64))
            hidden.append(torch.ones(size, dtype=torch.bool))
        codes = tokenizer.encode(text, start, start + len(piece))
        symbols.append(codes)
        hidden.append(torch.zeros(len(codes), dtype=torch.bool))
        start += len(piece) + len(mark)
    return torch.cat(symbols), torch.cat(hidden)


def spell(filled: Filled, hidden: Tensor, tokenizer: Tokenizer, exact: bool = True) -> str:
    """A filled text as a line of JSON: ``text``, ``gaps``, ``num_symbols``, ``log_prob``, ``exact``.

    ``gaps`` are the texts in the gaps, ``num_symbols`` counts the symbols in them, ``log_prob`` is in nats.
    """
    edges = (hidden.int().diff() != 0).nonzero().flatten() + 1
    runs = torch.tensor_split(filled.ids, edges.tolist())
    gaps = [tokenizer.decode(run) for run in runs[0 if bool(hidden[0]) else 1 :: 2]]
    values = {
        "text": tokenizer.decode(filled.ids),
        "gaps": gaps,
        "num_symbols": int(hidden.sum()),
        "log_prob": filled.log_prob,
        "exact": exact,
    }
    return json.dumps(values, ensure_ascii=False)
