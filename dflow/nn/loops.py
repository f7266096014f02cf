"""The mixture of `dflow.nn.counted` for single entries, as loops that numba compiles.

An entry takes some fifty operations on a few hundred numbers each. With tensors the overhead of the
operations is nearly all of their time; compiled, an entry takes a tenth of it. This module is imported where
numba is installed. Compiled code is kept in a cache beside this file, or in that of the user.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

#: Numbers that the gate reads of each pattern.
_FEATURES = 5

# Sums of products may be added up in another order, so that they are vectorised.
_compiled: Any = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _find(keys, begins, low, high, shift, key):  # type: ignore[no-untyped-def]
    """The place of a key in a table, -1 where it is not there; see `dflow.ops.counts.RowReader`."""
    part = key >> shift
    if part < low or part > high:
        return -1
    left, right = begins[part - low], begins[part - low + 1]
    end = right
    while left < right:
        middle = (left + right) >> 1
        if keys[middle] < key:
            left = middle + 1
        else:
            right = middle
    return left if left < end and keys[left] == key else -1


@_compiled
def _linear(weight, bias, x, out):  # type: ignore[no-untyped-def]
    for i in range(weight.shape[0]):
        total = bias[i]
        for j in range(weight.shape[1]):
            total += weight[i, j] * x[j]
        out[i] = total


@_compiled
def _gelu(x):  # type: ignore[no-untyped-def]
    half, root = np.float32(0.5), np.float32(math.sqrt(0.5))
    for i in range(len(x)):
        x[i] = half * x[i] * (np.float32(1) + math.erf(x[i] * root))


@_compiled
def _place(table, reading, symbols, K, p):  # type: ignore[no-untyped-def]
    """The place of an entry's context of one pattern in the table, -1 where it is not met."""
    keys, _, _, _, begins, low, high, shift = table
    factors, bits = reading
    key = np.int64(0)
    for c in range(len(symbols)):
        factor = factors[c, p]
        if factor != 0:
            if symbols[c] == K:
                return -1
            key += (symbols[c] + 1) * factor
    return _find(keys, begins, low, high, shift, key >> bits)


@_compiled
def _look_up(table, reading, symbols, K, places, inputs):  # type: ignore[no-untyped-def]
    """The place of each context of an entry, -1 where it is not met, and what the gate reads of it."""
    starts, counts = table[1], table[3]
    for p in range(len(places)):
        places[p] = place = _place(table, reading, symbols, K, p)
        if place < 0:
            continue
        total, once, most = 0, 0, 0
        for i in range(starts[place], starts[place + 1]):
            times = counts[i]
            total += times
            once += times == 1
            most = max(most, times)
        first = p * _FEATURES
        inputs[first] = math.log1p(float(total)) / 4
        inputs[first + 1] = math.log1p(float(starts[place + 1] - starts[place])) / 2
        inputs[first + 2] = once / total
        inputs[first + 3] = most / total
        inputs[first + 4] = 1


@_compiled
def _weigh(gate, inputs, h, places):  # type: ignore[no-untyped-def]
    """The weights of the network and of each context, which add up to 1."""
    outer, outer_bias, inner, inner_bias, last, last_bias, of_hidden = gate
    one, two = np.empty_like(outer_bias), np.empty_like(inner_bias)
    weights = np.empty_like(last_bias)
    _linear(outer, outer_bias, inputs, one)
    if len(h):
        _linear(of_hidden, one, h, one)
    _gelu(one)
    _linear(inner, inner_bias, one, two)
    _gelu(two)
    _linear(last, last_bias, two, weights)
    top = weights[0]
    for p in range(len(places)):
        if places[p] >= 0:
            top = max(top, weights[1 + p])
    total = np.float32(0)
    for j in range(len(weights)):
        weights[j] = math.exp(weights[j] - top) if j == 0 or places[j - 1] >= 0 else 0
        total += weights[j]
    for j in range(len(weights)):
        weights[j] /= total
    return weights


@_compiled
def _mixture(table, reading, gate, symbols, law, h, out):  # type: ignore[no-untyped-def]
    """The law of one entry, of that of a network and of the counts in its contexts.

    Args:
        table: keys, starts, symbols and counts of the table, and where parts of its keys begin.
        reading: factors of the hashes, ``(columns, patterns)``, and how far a hash is shifted.
        gate: weights and biases of its three layers, and the weights of the network's features.
        symbols: those around the entry, ``(columns,)``, K where there is none.
        law: log-probabilities of the network, ``(K,)``.
        h: features of the network, ``(hidden,)``.
        out: probabilities, ``(K,)``.
    """
    starts, members, counts = table[1], table[2], table[3]
    K, patterns = len(law), reading[0].shape[1]
    places = np.empty(patterns, np.int64)
    inputs = np.zeros(patterns * _FEATURES + 2, np.float32)
    _look_up(table, reading, symbols, K, places, inputs)
    entropy, highest = np.float32(0), law[0]
    for k in range(K):
        out[k] = math.exp(law[k])
        entropy += out[k] * law[k]
        highest = max(highest, law[k])
    inputs[-2], inputs[-1] = entropy, highest
    weights = _weigh(gate, inputs, h, places)
    for k in range(K):
        out[k] *= weights[0]
    for p in range(patterns):
        if places[p] >= 0:
            begin, end = starts[places[p]], starts[places[p] + 1]
            total = 0
            for i in range(begin, end):
                total += counts[i]
            share = weights[1 + p] / np.float32(total)
            for i in range(begin, end):
                out[members[i]] += share * counts[i]


@_compiled
def mix(table, reading, gate, symbols, law, h, out):  # type: ignore[no-untyped-def]
    """Log-probabilities of entries into ``out``, all (entries, ...); see `_mixture`."""
    for e in range(len(out)):
        _mixture(table, reading, gate, symbols[e], law[e], h[e], out[e])
        for k in range(out.shape[1]):
            out[e, k] = math.log(max(out[e, k], np.float32(1.1754944e-38)))


@_compiled
def _columns(offsets, line, place, K, symbols):  # type: ignore[no-untyped-def]
    """The symbols at offsets from a place of a line, K before its beginning."""
    for c in range(len(offsets)):
        at = place + offsets[c]
        symbols[c] = line[at] if at >= 0 else K


@_compiled
def _most(law, noise):  # type: ignore[no-untyped-def]
    """The symbol whose log-probability and noise have the largest sum."""
    best, value = 0, -math.inf
    for k in range(len(law)):
        score = math.log(max(law[k], 1.1754944e-38)) + noise[k]
        if score > value:
            best, value = k, score
    return best


@_compiled
def draft(table, reading, gate, offsets, line, begin, noise):  # type: ignore[no-untyped-def]
    """Symbols one after another, each the most probable one after Gumbel noise, by counts alone.

    Args:
        table: see `_mixture`.
        reading: see `_mixture`.
        gate: see `_mixture`.
        offsets: of the columns from an entry, int64 ``(columns,)``, all before it.
        line: symbols, the last ones of which are to be drafted.
        begin: place of the first of these.
        noise: float64 ``(drafted, K)``.
    """
    K = noise.shape[1]
    law = np.full(K, -math.log(K), np.float32)
    out, symbols, h = np.empty(K, np.float32), np.empty(len(offsets), np.int64), np.empty(0, np.float32)
    for i in range(len(noise)):
        _columns(offsets, line, begin + i, K, symbols)
        _mixture(table, reading, gate, symbols, law, h, out)
        line[begin + i] = _most(out, noise[i])


@_compiled
def back_off(table, reading, offsets, line, begin, noise, new):  # type: ignore[no-untyped-def]
    """As `draft` by the law of `dflow.nn.backoff`, with ``new`` for each symbol of a context."""
    starts, members, counts = table[1], table[2], table[3]
    K = noise.shape[1]
    out, symbols = np.empty(K, np.float64), np.empty(len(offsets), np.int64)
    for i in range(len(noise)):
        _columns(offsets, line, begin + i, K, symbols)
        out[:] = 1 / K
        for p in range(reading[0].shape[1]):
            place = _place(table, reading, symbols, K, p)
            if place < 0:
                break
            first, end = starts[place], starts[place + 1]
            more = new * (end - first)
            total = more
            for j in range(first, end):
                total += counts[j]
            for k in range(K):
                out[k] *= more / total
            for j in range(first, end):
                out[members[j]] += counts[j] / total
        line[begin + i] = _most(out, noise[i])
