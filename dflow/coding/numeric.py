"""In which numbers a law is coded: a decoder has to compute the very bits that the encoder has computed.

    law = prepare(model, "float64")      # or "fixed", "float32"
    push(law, x, coder)

- float64: networks in double precision. Integer flows give the same bits with one thread or two and with
  oneDNN on and off; another build or machine may round otherwise, and then a file does not decode: its
  checksum says so.
- fixed: networks in integers. The same everywhere. Networks of ReLU without norm.
- float32: networks as trained. The same build, machine and number of threads only.

In all of them a network's answer to a row is the same whatever other rows there are. A product of matrices
of one row has other last bits than that row of a larger one, and so have norms: such networks, and all in
float32, see one row at a time. Those that keep a state from call to call (sequences) cannot: push and pop
these in batches of one size, filled up with rows of length 0, and under `one_thread`, since attention adds
up in the order of threads.

Probabilities that depend on no network are kept as integers by `frozen_tables`, in every mode.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dflow.bijectors import Autoregressive, Chain, Coupling, Inverse, Permute, Reverse
from dflow.coding.frozen import Freezable, FrozenLogistic, FrozenMixture, freeze, frozen
from dflow.coding.tables import logistic_tables
from dflow.core import Context, Distribution
from dflow.distributions import (
    ConditionalCategorical,
    ConditionalLogistic,
    ConditionalWindow,
    LogisticMixture,
)
from dflow.distributions.any_order import Walk
from dflow.distributions.sequence import SequenceCategorical
from dflow.distributions.spectra import Spectra
from dflow.elementwise import IntegerShift
from dflow.flows import Flow, Split
from dflow.nn.densenet import DenseNet
from dflow.nn.fixed import FixedDenseNet, FixedProduct
from dflow.nn.rescaled import Rescaled

MODES = ("float64", "fixed", "float32")

#: What is exact in integers and powers of two, or is a single operation of IEEE an entry.
_EXACT = (
    Flow, Split, Chain, Inverse, Permute, Reverse, Coupling, IntegerShift, LogisticMixture,
    ConditionalLogistic, ConditionalWindow, Rescaled, DenseNet, nn.ModuleList,
)  # fmt: skip

#: Of which a network in float64 may be made that gives the same bits for every batch (convolutions do).
_ANY_BATCH = (
    Rescaled, DenseNet, FixedDenseNet, FixedProduct, nn.ModuleList, nn.Sequential, nn.Conv2d, nn.ReLU,
)  # fmt: skip


def frozen_tables(law: Distribution) -> dict[str, Tensor]:
    """What has to be kept with a model, by the names of its modules.

    Integer counts of laws that depend on no network, and constants that a mathematical library gives. They
    are made from the law as stored, for all modes. A decoder must use these tables, not recomputed ones.

    Raises:
        ValueError: a law that is prepared already, or has parameters that are not finite.
    """
    tables: dict[str, Tensor] = {}
    for name, module in _freezable(law):
        tables |= {_join(name, key): value for key, value in freeze(module).items()}
    return tables


def prepare(law: Distribution, mode: str, tables: Mapping[str, Tensor] | None = None) -> Distribution:
    """A copy of ``law`` to push and pop with, on the CPU, in evaluation mode, without gradients.

    Args:
        law: the model as stored; it stays as it is.
        mode: "float64", "fixed" or "float32"; see the module.
        tables: what `frozen_tables` gave; None to make them.

    Raises:
        ValueError: an unknown mode, a law that "fixed" cannot take (what and why), a law that is prepared
            already, tables of another law.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    unused = dict(frozen_tables(law) if tables is None else tables)
    if mode == "fixed":
        _check_exact(law)
    prepared = copy.deepcopy(law).cpu()
    if mode != "float32":
        prepared = prepared.double()
    for name, module in list(_freezable(prepared)):
        keys = [key for key in unused if key.rpartition(".")[0] == name]
        fitting = {key.rpartition(".")[2]: unused.pop(key) for key in keys}
        try:
            prepared = _replace(prepared, name, frozen(module, fitting))
        except ValueError as error:
            raise ValueError(f"the tables of {name or 'the law'} do not fit it: {error}") from None
    if unused:
        raise ValueError(f"tables of {', '.join(sorted(unused)[:3])}, which this law does not have")
    if mode == "fixed":
        for name, module in list(prepared.named_modules()):
            if isinstance(module, DenseNet):
                prepared = _replace(prepared, name, FixedDenseNet(module))
        return prepared.eval().requires_grad_(False)
    for owner in _owners(prepared):
        if mode == "float32" or any(not isinstance(module, _ANY_BATCH) for module in owner.net.modules()):
            owner.net = _RowNet(owner.net)
    return prepared.eval().requires_grad_(False)


class Fingerprint:
    """SHA-256 of all that decoding depends on, the tensors of the law hashed once for any tables.

    Names, dtypes, shapes and values of the tensors of the law as stored and of its tables, the tables of
    logistic laws, the mode.

    Args:
        law: the model as stored, not what `prepare` gave.
        mode: one of `MODES`.
        extra: what else there is, such as the vocabulary of a tokenizer.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, law: nn.Module, mode: str, extra: bytes = b"") -> None:
        """See the class."""
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        logistic = logistic_tables().fingerprint()
        self.mode, self._sha = (
            mode,
            hashlib.sha256(f"dflow 1 {mode} {logistic} {len(extra)} ".encode() + extra),
        )
        _hash(self._sha, "law", law.state_dict())

    def of(self, tables: Mapping[str, Tensor]) -> bytes:
        """32 bytes; ``tables`` are what `frozen_tables` gave."""
        sha = self._sha.copy()
        _hash(sha, "tables", tables)
        return sha.digest()


def _hash(sha: Any, what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\n{what} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def fingerprint(law: nn.Module, tables: Mapping[str, Tensor], mode: str, extra: bytes = b"") -> bytes:
    """The `Fingerprint` of a law with its tables."""
    return Fingerprint(law, mode, extra).of(tables)


def in_pieces(law: Distribution, rows: int) -> Distribution:
    """``law`` with its networks evaluated in pieces of up to ``rows`` rows, which bounds their memory.

    Answers are the same bits, so that a decoder may take other pieces than the encoder.

    Args:
        law: what `prepare` gave; it is changed. Called again, the last call counts.
        rows: at a time.

    Raises:
        ValueError: rows below 1; networks that keep a state from call to call, which have no pieces.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, found {rows}")
    for module in law.modules():
        if isinstance(module, (SequenceCategorical, Autoregressive, Walk)):
            raise ValueError(
                f"the network of {type(module).__name__} keeps a state and cannot be evaluated in pieces: "
                "push and pop that many rows at a time"
            )
    for owner in _owners(law):
        if not isinstance(owner.net, _RowNet):
            owner.net = _Pieces(owner.net.net if isinstance(owner.net, _Pieces) else owner.net, rows)
    return law.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, as many as there were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pieces(nn.Module):
    """A network of rows, up to ``rows`` at a time."""

    def __init__(self, net: nn.Module, rows: int) -> None:
        super().__init__()
        self.net, self.rows = net, rows
        self.takes_known = getattr(net, "takes_known", False)

    def forward(self, x: Tensor, *context: Context | None) -> Tensor:
        """The answer to all rows."""
        if len(x) <= self.rows:
            answer: Tensor = self.net(x, *context)
            return answer
        ends = ((start, start + self.rows) for start in range(0, len(x), self.rows))
        return torch.cat([self.net(x[i:j], *(c and c.rows(i, j) for c in context)) for i, j in ends])


class _RowNet(_Pieces):
    """A network of rows, one at a time whatever is asked for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, 1)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _freezable(law: Distribution) -> Iterator[tuple[str, Freezable]]:
    """Modules of ``law`` of which tables are kept."""
    for name, module in law.named_modules():
        if isinstance(module, (FrozenMixture, FrozenLogistic)):
            raise ValueError("the law is prepared already; prepare the one that is stored")
        if isinstance(module, (LogisticMixture, ConditionalLogistic)):
            yield name, module


def _owners(
    law: Distribution,
) -> list[Coupling | ConditionalCategorical | ConditionalLogistic | ConditionalWindow | Spectra]:
    """The modules that call a network with rows and keep no state of it."""
    kinds = (Coupling, ConditionalCategorical, ConditionalLogistic, ConditionalWindow, Spectra)
    return [module for module in law.modules() if isinstance(module, kinds)]


def _replace(law: Distribution, name: str, module: Distribution | nn.Module) -> Distribution:
    """``law`` with ``module`` in the place of its part ``name``."""
    if not name:
        if not isinstance(module, Distribution):
            raise ValueError(f"a law cannot be a {type(module).__name__}")
        return module
    parent, _, last = name.rpartition(".")
    law.get_submodule(parent).register_module(last, module)
    return law


def _check_exact(law: nn.Module, name: str = "") -> None:
    """ValueError for what has no exact form in integers."""
    why = ""
    if isinstance(law, ConditionalLogistic) and law.components > 1:
        why = "is a mixture that a network gives, whose probabilities a mathematical library computes"
    elif isinstance(law, Coupling) and not isinstance(law.elementwise, IntegerShift):
        why = f"moves by {type(law.elementwise).__name__}, not by integers"
    elif not isinstance(law, _EXACT):
        why = (
            f"is a {type(law).__name__}, which has no form in integers (only integer flows with networks of "
            "ReLU without norm have one)"
        )
    if why:
        raise ValueError(f"mode fixed: {name or 'the law'} {why}; use mode float64")
    if isinstance(law, DenseNet):
        FixedDenseNet(law)
        return
    for key, child in law.named_children():
        _check_exact(child, _join(name, key))
