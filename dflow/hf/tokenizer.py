"""The vocabulary of a model as a tokenizer of transformers, with the same symbols and an exact round trip.

It is built with the library tokenizers from ``vocabulary.json``, so that a folder from before it was saved as
``tokenizer.json`` has it too. It has one token more than the model has symbols: `PAD`, number K, which fills
up batches and is neither scored nor drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dflow.config import InputError
from dflow.hf.config import DflowConfig

#: Files of the vocabulary: of dflow, the pieces of sentencepiece, and those of transformers.
VOCABULARY, PIECES = "vocabulary.json", "tokenizer.model"
FILES = ("tokenizer.json", "tokenizer_config.json")

#: What fills up the sequences of a batch. A text that holds these characters is spelled in its own symbols.
PAD = "<pad>"

_SPACE = "\u2581"
#: The largest vocabulary of numbers, each of which is a token.
_MOST_NUMBERS = 1 << 20


def backend(vocabulary: Mapping[str, Any], pieces: bytes | None = None) -> Tokenizer:
    """The tokenizer of the library tokenizers for the content of ``vocabulary.json``.

    Args:
        vocabulary: the content of the file.
        pieces: the content of ``tokenizer.model``, for a vocabulary of sentencepiece.

    Raises:
        InputError: a vocabulary of a kind that is unknown here, or without its pieces.
    """
    kind = vocabulary.get("tokenizer")
    if kind == "characters":
        tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(vocabulary["symbols"])}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == "bytes":
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(_characters_of_bytes())}))
        each = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spell, each])
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "numbers" and 2 <= vocabulary["size"] <= _MOST_NUMBERS:
        # Without a decoder tokens are joined by spaces.
        tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary["size"])}))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "sentencepiece" and pieces is not None:
        tokenizer = _byte_pairs(pieces)
    else:
        missing = f" without {PIECES}" * (kind == "sentencepiece")
        raise InputError(f"{VOCABULARY}: a tokenizer {kind!r}{missing}; restore the files of the model")
    return tokenizer


def _characters_of_bytes() -> list[str]:
    """The printable characters by which the library spells each byte, in the order of the bytes.

    Radford et al. 2019, GPT-2: printable bytes of Latin-1 stand for themselves, the others for 256 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_pairs(model: bytes) -> Tokenizer:
    """The pieces of sentencepiece: a pair that makes a piece is merged, that of the highest score first.

    Spaces are kept as they are, so that the character that stands for them in the model is spelled in bytes.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    special = {i for i in range(len(names)) if processor.is_byte(i) or processor.is_unknown(i)}
    vocabulary = {name if i in special else name.replace(_SPACE, " "): i for i, name in enumerate(names)}
    plain = {name for name, i in vocabulary.items() if i not in special}
    merges = [
        (-processor.get_score(vocabulary[name]), cut, name[:cut], name[cut:])
        for name in plain
        for cut in range(1, len(name))
        if name[:cut] in plain and name[cut:] in plain
    ]
    pairs = [(left, right) for _, _, left, right in sorted(merges)]
    unknown = next(names[i] for i in sorted(special) if processor.is_unknown(i))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, byte_fallback=True))
    steps = [decoders.Replace(unknown, "\ufffd"), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


class DflowTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a model of dflow; what it cannot spell is named.

    Padding is on the left, as for all models that continue a text.
    """

    vocab_files_names = {  # noqa: RUF012 - as the base class has it
        "tokenizer_file": FILES[0],
        "vocabulary_file": VOCABULARY,
        "pieces_file": PIECES,
    }
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as the base class has it
    padding_side = "left"

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the constructor; a folder without ``tokenizer.json`` has its vocabulary read."""
        vocabulary, pieces = kwargs.pop("vocabulary_file", None), kwargs.pop("pieces_file", None)
        if kwargs.get("tokenizer_file") is None and "tokenizer_object" not in kwargs:
            if vocabulary is None:
                raise InputError(f"no {FILES[0]} and no {VOCABULARY}; give the folder of a model of text")
            model = None if pieces is None else Path(pieces).read_bytes()
            made = _parsed(Path(vocabulary).read_bytes(), model, vocabulary)
            kwargs = _SETTINGS | kwargs | {"tokenizer_object": made}
        return kwargs

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers.

        Raises:
            InputError: a character that the vocabulary lacks.
        """
        try:
            return super()._encode_plus(*args, **kwargs)
        except Exception as error:
            if "Missing [UNK]" not in str(error):
                raise
            raise InputError(self._unknown(args, kwargs)) from None

    def _unknown(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """What a text holds that the vocabulary lacks."""
        texts = kwargs.get("text", args[0] if args else "")
        symbols = self.get_vocab()
        for text in [texts] if isinstance(texts, str) else texts:
            for piece in self.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
                if piece[0] not in symbols:
                    return (
                        f"{piece[0]!r} at character {piece[1][0] + 1} is not in the vocabulary of "
                        f"{len(symbols) - 1} symbols; remove it, or train on text with it"
                    )
        return "the text holds what the vocabulary lacks; remove it, or train on text with it"


#: Settings of every tokenizer: a text that holds the name of the padding token is a text.
_SETTINGS = {
    "pad_token": PAD,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}


def size_of(vocabulary: bytes) -> int | None:
    """The number of symbols that a ``vocabulary.json`` names; None for one that is damaged."""
    try:
        size = json.loads(vocabulary)["size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return size if isinstance(size, int) else None


def _parsed(vocabulary: bytes, pieces: bytes | None, where: str) -> Tokenizer:
    """`backend` of the contents of files; an InputError that names the file ``where`` for damaged ones."""
    try:
        return backend(json.loads(vocabulary), pieces)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise InputError(f"{where}: truncated or damaged ({error}); restore the file") from None


def tokenizer_of(vocabulary: bytes, pieces: bytes | None, longest: int | None = None) -> DflowTokenizer:
    """The tokenizer of a vocabulary.

    Args:
        vocabulary: the content of ``vocabulary.json``.
        pieces: the content of ``tokenizer.model``, if there is one.
        longest: symbols that the model takes at most; None for any number.

    Raises:
        InputError: damaged files.
    """
    limit = {} if longest is None else {"model_max_length": longest}
    tokenizer: Any = _parsed(vocabulary, pieces, VOCABULARY)
    return DflowTokenizer(tokenizer_object=tokenizer, **_SETTINGS, **limit)  # type: ignore[no-untyped-call]


AutoTokenizer.register(DflowConfig, fast_tokenizer_class=DflowTokenizer)
