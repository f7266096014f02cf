"""Binary networks as files and as programs: weights in bits, sums by XOR and popcount, in exact integers.

A file is a safetensors file. It holds for each layer the signs of its weights (``numpy.packbits``, first bit
first; for ternary weights a second plane with a 1 where they are not 0), and for each output a threshold and
a flip of the comparison; for the last layer a scale and a shift for each class. Header and SHA-256 are in its
metadata.

The first layer takes pixels: its sums are matrix products of integers held by floats, exact since none
exceeds 2^24 (float32) or 2^53 (float64). All other layers count bits or multiply bytes. Both give the same
integers; bytes take eight times the memory and are faster on processors with int8 matrix products.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from dflow.config import InputError, parse
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.binary import BinaryConv2d, BinaryLayer, BinaryLinear
from dflow.nn.classifier import Head, Pixels
from dflow.nn.moments import TINY, StochasticMaxPool2d, StochasticSign, means

Array = NDArray[Any]
#: How sums of signs are computed; see `PackedNetwork`.
Products = Literal["bits", "bytes"]

VERSION = 1
#: Pairs of words that are processed at a time, so that they fit into the cache of a core.
_TILE = 1 << 15
#: Largest number of inputs of a layer.
_MOST = 1 << 24


@dataclass(frozen=True)
class LayerHeader:
    """Shapes and sizes of a layer.

    Attributes:
        inputs: channels, height and width of the input.
        outputs: output channels, or units.
        kernel: height and width of the kernel of a convolution; 0 for a linear layer.
        stride: stride of a convolution.
        pool: height and width of the windows of the maximum; 1 for no pooling.
        ternary: whether weights may be 0.
    """

    inputs: list[int]
    outputs: int
    kernel: int = 0
    stride: int = 1
    pool: int = 1
    ternary: bool = False

    def __post_init__(self) -> None:
        sizes = [*self.inputs, self.outputs, self.stride, self.pool]
        valid = len(self.inputs) == 3 and min(sizes) >= 1 and (not self.kernel or self.kernel % 2 == 1)
        # Checked before memory of that size is allocated.
        if not valid or math.prod(self.inputs) > _MOST:
            raise InputError(f"{self} is not a valid layer")

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weights."""
        channels, height, width = self.inputs
        if self.kernel:
            return self.outputs, channels, self.kernel, self.kernel
        return self.outputs, channels * height * width

    @property
    def sums(self) -> tuple[int, int]:
        """Height and width of the sums."""
        _, height, width = self.inputs
        return (-(-height // self.stride), -(-width // self.stride)) if self.kernel else (1, 1)

    @property
    def out(self) -> list[int]:
        """Channels, height and width of the output."""
        return [self.outputs, *(n // self.pool for n in self.sums)]


@dataclass(frozen=True)
class Header:
    """Meaning and shapes of the arrays of a file.

    Attributes:
        levels: number of values of a pixel, which are 0 .. levels - 1.
        head: "ce": scores are logits; "bce": scores t, with Phi(t) the probability of a class.
        rule: rule by which the weights were fixed: map, ternary, sample.
        layers: one header for each layer.
        version: version of the format.
    """

    levels: int
    head: Literal["ce", "bce"]
    rule: str
    layers: list[LayerHeader]
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise InputError(f"version {self.version} of the format, and this program reads {VERSION}")
        if not self.layers or not 2 <= self.levels <= 1 << 16:
            raise InputError("no layers, or levels outside 2..65536")
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            if before.out != after.inputs:
                raise InputError(f"a layer gives {before.out} and the next takes {after.inputs}")


class PackedNetwork:
    """A binary network: it maps integers to scores of classes, and computes in integers.

    Args:
        header: describes the arrays.
        arrays: the arrays of the file by name.
        products: "bits", XOR and popcount on packed words; "bytes", products of int8 summed in int32.

    Raises:
        InputError: arrays that are missing, too many, or of another shape; unknown products.
    """

    def __init__(self, header: Header, arrays: dict[str, Array], products: Products = "bits") -> None:
        self.header, self.arrays = header, arrays
        if products not in get_args(Products):
            raise InputError(f"products {products!r} must be one of {', '.join(get_args(Products))}")
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, layer in enumerate(header.layers):
            size = (int(np.prod(layer.weight)) + 7) // 8
            planes = ("signs", "kept") if layer.ternary else ("signs",)
            expected |= {f"{i}.{plane}": ("uint8", (size,)) for plane in planes}
            if i < len(header.layers) - 1:
                expected[f"{i}.threshold"] = ("int32", (layer.outputs,))
                expected[f"{i}.flip"] = ("uint8", ((layer.outputs + 7) // 8,))
            else:
                expected |= {name: ("float64", (layer.outputs,)) for name in ("scale", "shift")}
        actual = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        if actual != expected:
            raise InputError(f"expected the arrays {expected}, found {actual}")
        self.layers: list[_PixelLayer | _PopcountLayer | _ByteLayer] = []
        kind = _PopcountLayer if products == "bits" else _ByteLayer
        for i, layer in enumerate(header.layers):
            weight = _unpack(arrays[f"{i}.signs"], layer.weight) * 2 - 1
            if layer.ternary:
                weight *= _unpack(arrays[f"{i}.kept"], layer.weight)
            self.layers.append(kind(layer, weight) if i else _PixelLayer(layer, weight, header.levels))
        self.thresholds = [
            (
                arrays[f"{i}.threshold"].astype(layer.dtype),
                np.unpackbits(arrays[f"{i}.flip"])[: layer.header.outputs].astype(bool),
            )
            for i, layer in enumerate(self.layers[:-1])
        ]

    @property
    def dim(self) -> int:
        """Pixels of an image."""
        return int(np.prod(self.header.layers[0].inputs))

    @property
    def num_bytes(self) -> int:
        """Size of all arrays in bytes: weights, thresholds, scales."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def num_weights(self) -> int:
        """Number of weights; as floats they would take four bytes each."""
        return sum(int(np.prod(layer.weight)) for layer in self.header.layers)

    def steps(self, pixels: Array) -> list[Array]:
        """Outputs of the layers: signs ``(n, H, W, C)`` as bool; of the last layer sums ``(n, classes)``.

        ``pixels`` are integers ``(n, dim)``.

        Raises:
            InputError: another number of pixels, or values outside ``0 .. levels - 1``.
        """
        if pixels.ndim != 2 or pixels.shape[1] != self.dim or pixels.dtype.kind not in "iu":
            raise InputError(
                f"expected integers (n, {self.dim}), found {pixels.dtype} of shape {pixels.shape}"
            )
        if pixels.size and not 0 <= pixels.min() <= pixels.max() < self.header.levels:
            raise InputError(
                f"values {pixels.min()}..{pixels.max()}, and this network takes 0..{self.header.levels - 1}"
            )
        x = pixels.reshape(len(pixels), *self.header.layers[0].inputs).transpose(0, 2, 3, 1)
        out = []
        for layer, (threshold, flip) in zip(self.layers, self.thresholds, strict=False):
            x = (_largest(layer(x), layer.header.pool) >= threshold) ^ flip
            out.append(x)
        return [*out, self.layers[-1](x)[:, 0, 0]]

    def __call__(self, pixels: Array) -> Array:
        """Scores ``(n, classes)`` in float64, largest for the most probable class; errors as in `steps`."""
        scores: Array = self.steps(pixels)[-1] * self.arrays["scale"] + self.arrays["shift"]
        return scores

    def to_bytes(self) -> bytes:
        """The contents of the file."""
        about = {"header": asdict(self.header), "sha256": _digest(self.header, self.arrays)}
        return save(self.arrays, {"dflow": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, products: Products = "bits") -> PackedNetwork:
        """Read a file written from `to_bytes`; ``products`` as in the class.

        Raises:
            InputError: the file is missing, truncated, damaged, changed, or of another kind.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; `dflow export` writes one") from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: truncated, damaged or no exported network ({error})") from None
        try:
            description = json.loads(metadata["dflow"])
            header = parse(Header, description["header"], "header")
            if description["sha256"] != _digest(header, arrays):
                raise InputError("its checksum fails")
            return cls(header, arrays, products)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: damaged or no exported network ({error}); export it again") from None


def pack(net: nn.Sequential, rule: str = "map") -> PackedNetwork:
    """The packed form of a network of `dflow.zoo.to_deterministic`, equal to it in every sign and sum.

    Raises:
        InputError: weights other than -1, 0 and 1, or another sequence of modules than ``pbnet``'s.
    """
    pixels, head = net[0], net[-1]
    if not isinstance(pixels, Pixels) or not isinstance(head, Head) or pixels.unit:
        raise InputError("only a network from pixels of integers to classes can be packed")
    shape = list(pixels.shape)
    headers: list[LayerHeader] = []
    arrays: dict[str, Array] = {}
    groups: list[tuple[BinaryLayer, list[nn.Module]]] = []
    for module in list(net)[1:-1]:
        if isinstance(module, BinaryLayer):
            groups.append((module, []))
        else:
            groups[-1][1].append(module)
    for i, (layer, following) in enumerate(groups):
        header = _header(layer, shape, following)
        weight = layer.theta.detach().cpu().numpy()
        if not np.isin(weight, (-1, 0, 1)).all() or (not header.ternary and not weight.all()):
            raise InputError("weights other than -1 and 1; make them with to_deterministic first")
        arrays[f"{i}.signs"] = np.packbits(weight.ravel() > 0)
        if header.ternary:
            arrays[f"{i}.kept"] = np.packbits(weight.ravel() != 0)
        norm = next((m for m in following if isinstance(m, StochasticBatchNorm)), None)
        taps = int(np.prod(header.weight[1:])) * (pixels.levels - 1 if i == 0 else 1)
        if i == len(groups) - 1:
            arrays |= _affine(layer, norm, head)
        elif norm is None:
            arrays[f"{i}.threshold"] = np.zeros(header.outputs, np.int32)
            arrays[f"{i}.flip"] = np.packbits(np.zeros(header.outputs, bool))
        else:
            threshold, flip = norm.fold(taps)
            arrays[f"{i}.threshold"] = threshold.cpu().numpy().astype(np.int32)
            arrays[f"{i}.flip"] = np.packbits(flip.cpu().numpy())
        headers.append(header)
        shape = header.out
    return PackedNetwork(Header(pixels.levels, head.kind, rule, headers), arrays)


@torch.no_grad()
def agrees(program: PackedNetwork, net: nn.Sequential, x: torch.Tensor) -> bool:
    """Whether a packed network has the same last sums as ``net``, for integers ``x`` ``(n, dim)``."""
    modules = list(net)
    last = max(i for i, module in enumerate(modules) if isinstance(module, BinaryLayer))
    sums = net[: last + 1](x)
    packed_sums = program.steps(x.cpu().numpy())[-1]
    return bool((packed_sums == means(sums).cpu().numpy()).all())


def _header(layer: BinaryLayer, shape: list[int], following: Sequence[nn.Module]) -> LayerHeader:
    packable = (StochasticMaxPool2d, StochasticBatchNorm, StochasticSign)
    if not isinstance(layer, (BinaryConv2d, BinaryLinear)) or not all(
        isinstance(m, packable) for m in following
    ):
        names = [type(m).__name__ for m in (layer, *following)]
        raise InputError(f"cannot pack a layer of {', '.join(names)}")
    pool = next((m.size for m in following if isinstance(m, StochasticMaxPool2d)), 1)
    ternary = bool((layer.weight == 0).any())
    if isinstance(layer, BinaryConv2d):
        return LayerHeader(shape, len(layer.weight), layer.kernel, layer.stride, pool, ternary)
    return LayerHeader(shape, len(layer.weight), pool=pool, ternary=ternary)


def _affine(layer: BinaryLayer, norm: StochasticBatchNorm | None, head: Head) -> dict[str, Array]:
    """Scale and shift from the last sums to scores, in float64."""
    outputs = len(layer.weight)
    scale, shift = torch.ones(outputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
    if norm is not None:
        weight, bias, m, v = (
            t.detach().cpu().double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        scale = weight * torch.rsqrt(v + norm.eps)
        shift = bias - m * scale
    if head.kind == "bce":
        if layer.noise is None:
            raise InputError("head 'bce' needs the variance of its last layer; use to_deterministic")
        unit = torch.rsqrt((layer.noise.detach().cpu().double() * scale.square()).clamp_min(TINY))
        scale, shift = scale * unit, shift * unit
    return {"scale": scale.numpy(), "shift": shift.numpy()}


def _digest(header: Header, arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(header), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(repr((name, str(array.dtype), array.shape)).encode() + array.tobytes())
    return digest.hexdigest()


def _unpack(bits: Array, shape: tuple[int, ...]) -> Array:
    return np.unpackbits(bits)[: int(np.prod(shape))].astype(np.int8).reshape(shape)


class _PackedLayer:
    """Sums ``(n, H, W, outputs)`` of weights ``(outputs, C, h, w)`` on -1, 0 and 1; the border counts 0."""

    def __init__(self, header: LayerHeader, weight: Array, largest: int) -> None:
        self.header = header
        _, *size = header.inputs
        channels = header.inputs[0]
        area = [header.kernel] * 2 if header.kernel else size
        #: ``(outputs, h, w, C)``, the order of `patches`.
        self.weight = weight.reshape(header.outputs, channels, *area).transpose(0, 2, 3, 1)
        self.bound = largest * int(np.prod(self.weight.shape[1:]))
        # A threshold may be one more than the largest sum.
        self.dtype = np.dtype(np.int16 if self.bound + 1 < 1 << 15 else np.int32)

    def patches(self, x: Array, border: int = 0) -> Array:
        """The summands of each sum, ``(n, H, W, h * w * C)``, from ``(n, H, W, C)``."""
        header = self.header
        if not header.kernel:
            return x.reshape(len(x), 1, 1, int(np.prod(x.shape[1:])))
        edge, stride = header.kernel // 2, header.stride
        padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=border)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (header.kernel,) * 2, (1, 2))
        windows = windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)
        return windows.reshape(*windows.shape[:3], int(np.prod(windows.shape[3:])))


class _PixelLayer(_PackedLayer):
    """Sums of integers: matrix products of floats, without rounding errors."""

    def __init__(self, header: LayerHeader, weight: Array, levels: int) -> None:
        super().__init__(header, weight, levels - 1)
        self.levels = levels
        self.float = np.float32 if self.bound < 1 << 24 else np.float64
        self.matrix = self.weight.reshape(header.outputs, -1).T.astype(self.float)

    def __call__(self, x: Array) -> Array:
        values = x.astype(self.float) * 2 - (self.levels - 1)
        sums: Array = (self.patches(values) @ self.matrix).astype(self.dtype)
        return sums


class _ByteLayer(_PackedLayer):
    """Sums of signs: matrix products of -1, 0 and 1 in int8, summed in int32."""

    def __init__(self, header: LayerHeader, weight: Array) -> None:
        super().__init__(header, weight, 1)
        rows = self.weight.reshape(header.outputs, -1).astype(np.int8)
        self.matrix = torch.from_numpy(np.ascontiguousarray(rows.T))

    def __call__(self, x: Array) -> Array:
        patches = self.patches(x.view(np.int8) * np.int8(2) - np.int8(1))
        rows = patches.reshape(int(np.prod(patches.shape[:3])), patches.shape[3])
        # A copy where patches are a read-only view (one place each): torch warns about these.
        matrix = torch.from_numpy(np.require(rows, requirements=("C", "W")))
        sums: Array = torch._int_mm(matrix, self.matrix).numpy()
        return sums.reshape(*patches.shape[:3], self.header.outputs)


class _PopcountLayer(_PackedLayer):
    """Sums of bits: with w, h on {-1, +1}, ``w h`` summed over N is ``N - 2 popcount(w xor h)``."""

    def __init__(self, header: LayerHeader, weight: Array) -> None:
        super().__init__(header, weight, 1)
        self.signs = self._rows(_words(self.weight > 0))
        nonzero = self.weight != 0
        self.mask = None if nonzero.all() else self._rows(_words(nonzero))
        count = nonzero.sum((1, 2, 3))
        # Bits of the border are 0, which counts as -1: add the weights there to cancel it.
        outside = self.patches(np.zeros((1, *header.inputs[1:], 1), np.int64), border=1)
        if header.kernel:
            count = count + outside @ self.weight.sum(3, dtype=np.int64).reshape(header.outputs, -1).T
        self.count = count.astype(self.dtype)

    def _rows(self, words: Array) -> Array:
        """Rows of 64-bit words ``(words, rows)``, from words of any size ``(rows, ...)``."""
        words = words.reshape(len(words), int(np.prod(words.shape[1:])))
        words = np.pad(words, ((0, 0), (0, -words.shape[1] % (8 // words.itemsize))))
        return np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint64).T)

    def __call__(self, x: Array) -> Array:
        patches = self.patches(_words(x))
        rows, shape = (
            self._rows(patches.reshape(int(np.prod(patches.shape[:3])), patches.shape[3])),
            patches.shape[:3],
        )
        outputs = self.header.outputs
        different = np.empty((rows.shape[1], outputs), self.dtype)
        step = max(1, _TILE // self.signs.size)
        for start in range(0, rows.shape[1], step):
            block = slice(start, start + step)
            words = rows[:, block, None] ^ self.signs[:, None]
            if self.mask is not None:
                words &= self.mask[:, None]
            np.add.reduce(_popcount(words), 0, dtype=self.dtype, out=different[block])
        different *= -2
        sums: Array = different.reshape(*shape, outputs) + self.count
        return sums


def _words(bits: Array) -> Array:
    """Bits ``(..., C)`` in as few words ``(..., n)`` of 8, 16, 32 or 64 bits as possible."""
    packed = np.packbits(bits, -1)
    size = next((n for n in (1, 2, 4) if packed.shape[-1] <= n), 8)
    edge = [(0, 0)] * (packed.ndim - 1)
    padded = np.pad(packed, [*edge, (0, -packed.shape[-1] % size)])
    return padded.view(f"u{size}")


#: Number of bits that are set in each number of 16 bits, for numpy 1.
_COUNTS = np.array([i.bit_count() for i in range(1 << 16)], dtype=np.uint8)


def _by_table(words: Array) -> Array:
    counts: Array = _COUNTS[words.view(np.uint16)].reshape(*words.shape, 4).sum(-1, dtype=np.uint8)
    return counts


_popcount: Callable[[Array], Array] = getattr(np, "bitwise_count", _by_table)


def _largest(sums: Array, size: int) -> Array:
    """Maximum of each window of ``size`` by ``size``, from ``(n, H, W, C)``."""
    if size == 1:
        return sums
    height, width = (n // size * size for n in sums.shape[1:3])
    corners = [sums[:, i:height:size, j:width:size] for i in range(size) for j in range(size)]
    return reduce(np.maximum, corners)
