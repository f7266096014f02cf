"""JPEG, GIF and WebP files: their markers, blocks and chunks. Libraries decode their pixels.

Sources: ITU-T T.81 and JFIF 1.02; GIF89a specification (CompuServe, 1990); RFC 9649 (WebP).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from dflow.data.arrays import Array
from dflow.data.formats import tiff
from dflow.data.formats.layout import COLOURS_CHANGE, SAVE_EACH, Layout, Refused, lost

# -- JPEG ------------------------------------------------------------------------------------------------

#: Markers of frames: sequential and progressive, with Huffman or arithmetic codes.
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
_EXIF, _PROFILE, _FRAMES_OF_PHONE = b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0"
#: Markers and beginnings of segments, and the content of these.
_SEGMENTS = (
    (0xE1, _EXIF, "EXIF data"),
    (0xE1, b"http://ns.adobe.com/x", "XMP data"),
    (0xE2, _PROFILE, "ICC profile"),
    (0xED, b"Photoshop", "Photoshop or IPTC data"),
    (0xFE, b"", "comment"),
)


def jpeg(data: bytes) -> Layout:
    """What the markers before the pixels say.

    Raises:
        Refused: more than 8 bits, four channels, or a lossless or hierarchical file.
        ValueError: damaged; or struct.error.
    """
    frame, losses, orientation = None, dict[str, str](), 1
    for marker, body in _segments(data):
        if marker in _FRAMES:
            frame = frame or struct.unpack_from(">BHHB", body)
        elif marker in _OTHER_FRAMES:
            raise Refused("a JPEG file of a lossless or hierarchical kind")
        elif body.startswith(_FRAMES_OF_PHONE) and marker == 0xE2 and (n := _num_pictures(body)) > 1:
            losses["phone"] = f"only the first of its {n} pictures is kept: an MPO file, as phones write"
        elif marker == 0xE0 and body.startswith(b"JFIF") and len(body) >= 12 and body[7]:
            losses["resolution"] = lost("resolution")
        for number, start, name in _SEGMENTS:
            if marker == number and body.startswith(start):
                losses[name] = lost(name, COLOURS_CHANGE if start == _PROFILE else "")
        if marker == 0xE1 and body.startswith(_EXIF):
            orientation = tiff.orientation(body)
    if frame is None:
        raise ValueError("cut off")
    bits, H, W, channels = frame
    if bits != 8:
        raise Refused(f"a JPEG file of {bits} bits a sample")
    if channels not in (1, 3):
        raise Refused(f"a JPEG file of {channels} channels (CMYK or YCCK)")
    if not H or not W:
        raise ValueError(f"{W} x {H} pixels")
    return Layout("JPEG", (H, W), 8, channels, orientation=orientation, lost=tuple(losses.values()))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and what they hold, up to the pixels."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("a segment without a marker")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise ValueError("cut off")
        yield marker, body
        at += 2 + length


def _num_pictures(body: bytes) -> int:
    """How many pictures a file of a phone says that it holds."""
    try:
        return tiff.directory(body.removeprefix(_FRAMES_OF_PHONE)).number(0xB001, 1)
    except (ValueError, struct.error):
        return 1


# -- GIF -------------------------------------------------------------------------------------------------


def gif(data: bytes) -> Layout:
    """What the blocks say.

    Raises:
        Refused: several pictures, or one that does not fill the screen.
        ValueError: damaged; or struct.error or IndexError.
    """
    W, H, flags, _, aspect = struct.unpack_from("<HHBBB", data, 6)
    palette, at = _colour_table(data, flags, 13)
    losses, frames, transparent = dict[str, str](), 0, None
    if aspect:
        losses["aspect"] = lost("shape of a pixel")
    while data[at] != 0x3B:
        if data[at] == 0x21:
            label, block = data[at + 1], data[at + 3 : at + 3 + data[at + 2]]
            if label == 0xF9 and len(block) == 4 and not frames:
                transparent = block[3] if block[0] & 1 else None
            elif label == 0x01:
                raise Refused("a GIF file with text over the picture")
            elif label == 0xFE:
                losses["comment"] = lost("comment")
            elif label == 0xFF:
                losses["application"] = lost("data of an application (loop, XMP or ICC profile)")
            at = _end_of_blocks(data, at + 2)
        elif data[at] == 0x2C:
            *area, local = struct.unpack_from("<HHHHB", data, at + 1)
            frames += 1
            if area != [0, 0, W, H] and frames == 1:
                raise Refused("a GIF file whose picture does not fill its screen")
            local_palette, at = _colour_table(data, local, at + 10)
            palette = palette if local_palette is None else local_palette
            at = _end_of_blocks(data, at + 1)
        else:
            raise ValueError("a block of no known kind")
    if frames > 1:
        raise Refused("an animated GIF file, which holds several pictures", SAVE_EACH)
    if not frames or palette is None or not W or not H:
        raise ValueError("no picture, or none with a palette")
    if transparent is not None and transparent < len(palette):
        alpha = np.where(np.arange(len(palette)) == transparent, 0, 255).astype(np.uint8)
        palette = np.concatenate([palette, alpha[:, None]], 1)
    return Layout("GIF", (H, W), 8, 1, palette, lost=tuple(losses.values()))


def _colour_table(data: bytes, flags: int, at: int) -> tuple[Array | None, int]:
    """A palette, where the flags say that there is one, and where it ends."""
    if not flags & 0x80:
        return None, at
    n = 2 << (flags & 7)
    if at + 3 * n > len(data):
        raise ValueError("cut off")
    return np.frombuffer(data, np.uint8, 3 * n, at).reshape(n, 3), at + 3 * n


def _end_of_blocks(data: bytes, at: int) -> int:
    """Where a row of sub-blocks ends."""
    while data[at]:
        at += 1 + data[at]
    return at + 1


# -- WebP ------------------------------------------------------------------------------------------------

_CHUNKS = {b"ICCP": "ICC profile", b"EXIF": "EXIF data", b"XMP ": "XMP data"}


def webp(data: bytes) -> Layout:
    """What the chunks say.

    Raises:
        Refused: an animation.
        ValueError: damaged.
    """
    chunks, at, end = dict[bytes, bytes](), 12, 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        raise ValueError("cut off")
    while at + 8 <= end:
        (length,) = struct.unpack_from("<L", data, at + 4)
        if at + 8 + length > end:
            raise ValueError("cut off")
        chunks.setdefault(data[at : at + 4], data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    if b"ANIM" in chunks or b"ANMF" in chunks:
        raise Refused("an animated WebP file, which holds several pictures", SAVE_EACH)
    packed, coded = chunks.get(b"VP8L", b""), chunks.get(b"VP8 ", b"")
    if len(packed) >= 5 and packed[0] == 0x2F:
        bits = int.from_bytes(packed[1:5], "little")
        size, alpha = ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1), bool(bits >> 28 & 1)
    elif len(coded) >= 10 and coded[3:6] == b"\x9d\x01\x2a":
        W, H = struct.unpack_from("<HH", coded, 6)
        size, alpha = (H & 0x3FFF, W & 0x3FFF), b"ALPH" in chunks
    else:
        raise ValueError("no picture in it")
    more = chunks.get(b"VP8X", b"")
    if more and (alpha := bool(more[0] & 0x10)) and b"ALPH" not in chunks and not packed:
        raise ValueError("an alpha channel that is missing")
    names = [name for name in chunks if name not in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH")]
    losses = [lost(_CHUNKS.get(n, f"chunk {n!r}"), COLOURS_CHANGE if n == b"ICCP" else "") for n in names]
    orientation = tiff.orientation(chunks.get(b"EXIF", b""))
    return Layout("WEBP", size, 8, 4 if alpha else 3, orientation=orientation, lost=tuple(losses))
