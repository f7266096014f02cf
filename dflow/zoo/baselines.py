"""Families of text to compare with: the LSTM, and counts alone."""

from __future__ import annotations

from dataclasses import dataclass

from dflow.core import Distribution
from dflow.distributions import SequenceCategorical
from dflow.nn.lstm import LSTM
from dflow.nn.ngram import NgramNet
from dflow.ops.orders import lockstep
from dflow.zoo.family import Family, register
from dflow.zoo.settings import setting
from dflow.zoo.text_settings import ModelConfig


@dataclass
class LstmConfig(ModelConfig):
    """Baseline: the regularised LSTM of Merity et al., one network call a symbol."""

    num_hidden_layers: int = setting(2, "layers", least=1)
    hidden_size: int = setting(384, "cells of a layer", least=1)
    embedding_size: int = setting(128, "features of a symbol")
    dropout_hidden: float = setting(0.0, "locked dropout between layers")
    dropout_input: float = setting(0.0, "locked dropout of the embedded symbols")
    dropout_embedding: float = setting(0.0, "dropout of whole symbols of the embedding")
    weight_drop: float = setting(0.0, "DropConnect of the recurrent weights")


@dataclass
class NgramConfig:
    """Counts alone: every order of n-grams, each trusted as much as a small network says."""

    length: int = setting(256, "longest sequence, in symbols", least=1)
    context: int = setting(
        0, "number of symbols that may be known before those that are scored or drawn", least=0
    )
    counts: int = setting(10, "longest context, in symbols, of the counts of the training text", least=1)
    counts_megabytes: int = setting(
        128, "most megabytes of counts, the rarest of the longest contexts are left out", least=1
    )


def lstm(config: LstmConfig, K: int) -> Distribution:
    """Merity, Keskar and Socher 2018 (arXiv 1708.02182)."""
    net = LSTM(
        K,
        K,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        embedding_size=config.embedding_size,
        dropout=config.dropout,
        dropout_hidden=config.dropout_hidden,
        dropout_input=config.dropout_input,
        dropout_embedding=config.dropout_embedding,
        weight_drop=config.weight_drop,
        counts=config.counts,
        counts_dropout=config.counts_dropout,
    )
    return SequenceCategorical(net, lockstep(config.length, config.length), config.length)


def ngram(config: NgramConfig, K: int) -> Distribution:
    """Counts of all orders under a gate, see `dflow.nn.counted`."""
    order = lockstep(config.length, config.length)
    return SequenceCategorical(NgramNet(K, config.counts), order, config.length)


register(
    Family(
        "lstm",
        "text",
        LstmConfig,
        lstm,
        prompt="exact",
        known="before",
        left_to_right=True,
        baseline=True,
        recurrent=True,
    )
)
register(
    Family(
        "ngram",
        "text",
        NgramConfig,
        ngram,
        prompt="exact",
        known="before",
        left_to_right=True,
    )
)
