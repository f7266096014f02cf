"""Classical codecs that have read a training text before: what a user would take in place of a model.

Encoder and decoder both have the text, as both have the weights of a model.
"""

from __future__ import annotations

from functools import cache, partial

from dflow.compare.peers import PPMD_MEMORY, ZSTD_LOG, Codec, library


def primed_codecs(text: bytes) -> tuple[Codec[bytes], ...]:
    """PPMd and zstd, primed with ``text``; ``beside`` of each is what it makes of that text itself."""
    words = f"primed with {len(text):,} bytes"
    return (*(_ppmd(order, text, words) for order in (8, 12, 16)), _zstd(text, words))


def _ppmd(order: int, text: bytes, words: str) -> Codec[bytes]:
    """PPMd whose file is the end of one stream: the beginning, of the text alone, both sides have."""

    def stream(data: bytes = b"") -> bytes:
        coder = library("pyppmd").Ppmd7Encoder(order, PPMD_MEMORY)
        return bytes(coder.encode(text) + (coder.encode(data) if data else b"") + coder.flush())

    alone = cache(stream)

    def encode(data: bytes) -> bytes:
        whole, known = stream(data), alone()
        common = next((i for i, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), len(known))
        # As many bytes as the two streams have in common, of which the last ones may differ.
        return len(data).to_bytes(4, "little") + (len(known) - common).to_bytes(1, "little") + whole[common:]

    def decode(data: bytes, _: bytes) -> bytes:
        size, known = int.from_bytes(data[:4], "little"), alone()
        whole = known[: len(known) - data[4]] + data[5:]
        coder = library("pyppmd").Ppmd7Decoder(order, PPMD_MEMORY)
        out = bytes(coder.decode(whole, len(text) + size))
        # The library may ask for one byte more than the encoder wrote.
        while len(out) < len(text) + size and not coder.eof and coder.needs_input:
            out += bytes(coder.decode(b"\0", len(text) + size - len(out)))
        return out[len(text) :]

    settings = f"variant H, order {order}, 256 MiB, {words}"
    return Codec("PPMd", settings, "pyppmd", encode, decode, lambda: len(alone()))


def _zstd(text: bytes, words: str) -> Codec[bytes]:
    def dictionary() -> object:
        z = library("zstandard")
        return z.ZstdCompressionDict(text, dict_type=z.DICT_TYPE_RAWCONTENT)

    def compress(data: bytes, primed: bool = True) -> bytes:
        z = library("zstandard")
        options = z.ZstdCompressionParameters.from_level(22, window_log=ZSTD_LOG, enable_ldm=True)
        extra = {"dict_data": dictionary()} if primed else {}
        return bytes(z.ZstdCompressor(compression_params=options, **extra).compress(data))

    def decode(data: bytes, _: bytes) -> bytes:
        decoder = library("zstandard").ZstdDecompressor(dict_data=dictionary(), max_window_size=1 << ZSTD_LOG)
        return bytes(decoder.decompress(data))

    beside = cache(partial(compress, text, primed=False))
    settings = f"--ultra -22 --long={ZSTD_LOG}, {words}"
    return Codec("zstd", settings, "zstandard", compress, decode, lambda: len(beside()))
