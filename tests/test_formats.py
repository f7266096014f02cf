"""Files of pictures: every sample as other readers find it, or refused by name; damage is one error."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from forks import FORKS
from PIL import Image

from dflow.config import InputError
from dflow.data import formats
from dflow.data.formats import png

imagecodecs = pytest.importorskip("imagecodecs", reason="imagecodecs, a second reader, is not installed")


def noise(*shape: int, top: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, top, shape).astype(dtype)


GREY, RGB, RGBA = noise(9, 13), noise(9, 13, 3), noise(9, 13, 4)
WIDE = noise(9, 13, 3, top=1 << 16, dtype=np.uint16)


def both(data: bytes) -> formats.StoredFormat:
    """A file as it is read, which is the same by both ways."""
    one, other = formats.read(data, "a"), formats.read_again(data, "a")
    assert one.values.dtype == other.values.dtype
    np.testing.assert_array_equal(one.values, other.values)
    assert (one.alpha is None) == (other.alpha is None)
    if one.alpha is not None:
        np.testing.assert_array_equal(one.alpha, other.alpha)
    assert (one.depth, one.notes) == (other.depth, other.notes)
    return one


def whole(stored: formats.StoredFormat) -> np.ndarray:
    """Values with alpha, ``(H, W)`` of one channel."""
    parts = [stored.values] if stored.alpha is None else [stored.values, stored.alpha[..., None]]
    values = np.concatenate(parts, -1)
    return values[..., 0] if values.shape[2] == 1 else values


def refused(data: bytes, message: str) -> None:
    for read in (formats.read, formats.read_again):
        with pytest.raises(InputError, match=rf"^the file: .*{message}.*; ") as caught:
            read(data, "the file")
        assert "\n" not in str(caught.value)


def saved(values: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(file, kind, **options)
    return file.getvalue()


# -- PNG -------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(
    samples: np.ndarray, depth: int, kind: int, *chunks: tuple[bytes, bytes], interlaced: bool = False
) -> bytes:
    """A PNG file whose rows are under all five filters in turn."""
    H, W, S = samples.shape
    lines = b""
    for x, y, dx, dy in png._PASSES if interlaced else ((0, 0, 1, 1),):
        part = samples[y::dy, x::dx]
        if not part.size:
            continue
        if depth == 16:
            rows = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        else:
            bits = np.unpackbits(part.astype(np.uint8).reshape(len(part), -1, 1), axis=2)[..., 8 - depth :]
            rows = np.packbits(bits.reshape(len(part), -1), axis=1)
        pixel = max(1, S * depth // 8)
        filtered = png._predictions(rows, np.zeros(rows.shape[1], np.uint8), pixel)
        for i, row in enumerate(rows):
            lines += bytes([i % 5]) + (row - filtered[i % 5][i]).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", W, H, depth, kind, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return png.SIGNATURE + b"".join(chunk(name, body) for name, body in parts)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("kind", "depth"),
    [(k, d) for k, depths in png._DEPTHS.items() for d in depths],
)
def test_every_kind_of_png(kind: int, depth: int, interlaced: bool) -> None:
    samples = noise(37, 21, png._SAMPLES[kind], top=1 << depth, dtype=np.uint16)
    palette = noise(1 << depth, 3) if kind == 3 else np.zeros((0, 3), np.uint8)
    chunks = [(b"PLTE", palette.tobytes())] if kind == 3 else []
    data = png_file(samples, depth, kind, *chunks, interlaced=interlaced)
    expected = palette[samples[..., 0]] if kind == 3 else samples.squeeze()
    stored = both(data)
    np.testing.assert_array_equal(whole(stored), expected)
    assert stored.depth == (8 if kind == 3 else depth)
    if depth >= 8:
        np.testing.assert_array_equal(imagecodecs.png_decode(data), expected)
    assert stored.notes == (("its palette became colours",) if kind == 3 else ())


@pytest.mark.parametrize("shape", [(300, 40, 3), (300, 1, 1), (2, 900, 4), (513, 30, 4)])
def test_filters_of_many_shapes(shape: tuple[int, int, int]) -> None:
    for depth in (8, 16):
        samples = noise(*shape, top=1 << depth, dtype=np.uint16)
        data = png_file(samples, depth, png._TYPES[shape[2]])
        np.testing.assert_array_equal(png.read(data), samples)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 2])
def test_a_transparent_colour_of_png(kind: int, depth: int) -> None:
    if depth not in png._DEPTHS[kind]:
        return
    samples = noise(8, 8, png._SAMPLES[kind], top=1 << depth, dtype=np.uint16)
    key = samples[3, 4]
    stored = both(png_file(samples, depth, kind, (b"tRNS", key.astype(">u2").tobytes())))
    clear = (samples == key).all(-1)
    top = (1 << stored.depth) - 1
    np.testing.assert_array_equal(stored.alpha, np.where(clear, 0, top))
    assert stored.depth == max(8, depth)
    np.testing.assert_array_equal(stored.values, samples * (top // ((1 << depth) - 1)))
    assert any("transparent colour" in note for note in stored.notes)
    assert any("bits became 8 bits" in note for note in stored.notes) == (depth < 8)


def test_bits_beyond_the_depth_of_a_transparent_colour_do_not_count() -> None:
    samples = noise(8, 8, 3)
    key = samples[3, 4].astype(np.uint16) + 0x100
    stored = both(png_file(samples, 8, 2, (b"tRNS", key.astype(">u2").tobytes())))
    assert stored.alpha is not None
    assert stored.alpha[3, 4] == 0


def test_a_palette_with_alpha() -> None:
    samples, palette = noise(6, 6, 1, top=4), noise(4, 3)
    stored = both(png_file(samples, 2, 3, (b"PLTE", palette.tobytes()), (b"tRNS", b"\0\x80")))
    np.testing.assert_array_equal(stored.values, palette[samples[..., 0]])
    np.testing.assert_array_equal(stored.alpha, np.array([0, 128, 255, 255])[samples[..., 0]])
    refused(png_file(samples, 2, 3, (b"PLTE", palette[:2].tobytes())), "damaged.* of a palette of 2")


def test_chunks_that_are_lost_are_named() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    blob = exif.tobytes().removeprefix(b"Exif\0\0")
    names = [*png._ANCILLARY, b"prVt"]
    bodies = [blob if name == b"eXIf" else b"\0\0\xb1\x8f" for name in names]
    # Pillow reads what is in some of them; here they hold nothing, and it is given no file of them.
    data = png_file(RGB, 8, 2, *zip(names, bodies, strict=True))
    layout = png.layout(data + b"more")
    for name in names:
        assert sum(name.decode() in line for line in layout.losses) == 1
    assert "not kept: its gamma (gAMA) (viewers may show other colours without it)" in layout.losses
    assert any("orientation 6 (viewers show it turned by 90 degrees" in line for line in layout.losses)
    assert any("4 bytes behind its end" in line for line in layout.losses)
    assert layout.orientation == 6
    refused(png_file(RGB, 8, 2, (b"CrIt", b"")), "critical chunk b'CrIt'")


def test_png_of_several_pictures_or_damaged() -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    refused(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated PNG")
    data = png_file(RGB, 8, 2)
    refused(data[:-12], "cut off")
    refused(data[:60] + bytes([data[60] ^ 1]) + data[61:], "is damaged")
    refused(png_file(RGB, 8, 0), "bytes of pixels|truncated|expected|damaged")


# -- TIFF ------------------------------------------------------------------------------------------------


def tiff_file(values: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="tifffile, which writes the files, is not installed")
    file = io.BytesIO()
    options = {"metadata": None, "software": False, "photometric": "minisblack"} | options
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"rowsperstrip": 2},
        {"tile": (16, 16)},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw"},
        {"compression": "packbits", "rowsperstrip": 1},
        {"compression": "zlib", "predictor": True, "tile": (16, 16), "byteorder": ">"},
    ],
    ids=str,
)
def test_plain_tiff(options: dict[str, Any]) -> None:
    for values, more in (
        (GREY, {}),
        (WIDE[..., 0], {}),
        (RGB, {"photometric": "rgb"}),
        (RGBA, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (noise(9, 13, 2), {"extrasamples": ["unassalpha"], "planarconfig": "contig"}),
    ):
        data = tiff_file(values, **options, **more)
        stored = both(data)
        np.testing.assert_array_equal(whole(stored), values)
        np.testing.assert_array_equal(pytest.importorskip("tifffile").imread(io.BytesIO(data)), values)
        assert stored.depth == 8 * values.itemsize


def test_lzw_of_long_tables() -> None:
    smooth = (np.add.outer(np.arange(300), np.arange(400)) // 7 % 256).astype(np.uint8)
    for values in (noise(120, 200, 3), smooth, np.zeros((90, 5000), np.uint8)):
        kind = "rgb" if values.ndim == 3 else "minisblack"
        data = tiff_file(values, photometric=kind, compression="lzw", rowsperstrip=10_000)
        np.testing.assert_array_equal(whole(both(data)), values)


def test_tiff_of_few_bits_and_palettes() -> None:
    bits = noise(9, 13, top=2).astype(bool)
    np.testing.assert_array_equal(whole(both(tiff_file(bits))), bits)
    white = both(tiff_file(bits, photometric="miniswhite"))
    np.testing.assert_array_equal(whole(white), ~bits)
    assert "its values, in which 0 is white, became 1 minus each, in which 0 is black" in white.notes
    np.testing.assert_array_equal(whole(both(tiff_file(GREY, photometric="miniswhite"))), 255 - GREY)
    palette = noise(3, 256)
    indexed = both(tiff_file(GREY, photometric="palette", colormap=palette.astype(np.uint16) * 257))
    np.testing.assert_array_equal(indexed.values, palette.T[GREY])
    refused(
        tiff_file(GREY, photometric="palette", colormap=palette.astype(np.uint16) * 200),
        "palette of more than 8 bits",
    )
    refused(saved(Image.fromarray(bits), "TIFF", compression="group4"), r"compression 4 \(fax codes\)")


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (RGBA, {"photometric": "rgb", "extrasamples": ["assocalpha"]}, "premultiplied"),
        (RGBA, {"photometric": "rgb", "extrasamples": ["unspecified"]}, "4 samples a pixel, 1 of"),
        (noise(9, 13, 5), {"photometric": "rgb", "planarconfig": "contig"}, "5 samples a pixel"),
        (noise(9, 13, 2), {"extrasamples": ["assocalpha"], "planarconfig": "contig"}, "premultiplied"),
        (noise(9, 13, 2), {"extrasamples": [0], "planarconfig": "contig"}, "2 samples a pixel"),
        (GREY.astype(np.int8), {}, "signed integers"),
        (GREY.astype(np.int16), {}, "signed integers"),
        (GREY.astype(np.int32), {}, "signed integers"),
        (GREY.astype(np.uint32), {}, "grey with 32 bits"),
        (GREY.astype(np.float32), {}, "floating-point"),
        (GREY.astype(np.float16), {}, "floating-point"),
        (GREY.astype(np.complex64), {}, "samples of kind 6"),
        (WIDE[..., 0], {"photometric": "miniswhite"}, "counts from white with 16 bits"),
        (WIDE, {"photometric": "rgb"}, "RGB with 16 bits"),
        (RGB.transpose(2, 0, 1).copy(), {"photometric": "rgb", "planarconfig": "separate"}, "planar"),
        (RGBA, {"photometric": "separated"}, "CMYK"),
        (RGB, {"photometric": "ycbcr"}, "YCbCr"),
        (RGB, {"photometric": "cielab"}, "L.a.b"),
        (RGB, {"photometric": "rgb", "compression": "jpeg"}, "YCbCr|JPEG"),
        (np.stack([GREY] * 3), {}, "several pictures"),
        (GREY, {"compression": "lerc"}, "compression 34887"),
        (GREY, {"compression": "zstd"}, r"compression 50000 \(Zstandard\)"),
    ],
)  # fmt: skip
def test_other_tiff_is_refused_by_name(values: np.ndarray, options: dict[str, Any], message: str) -> None:
    refused(tiff_file(values, **options), message)


def test_tags_that_are_lost_are_named() -> None:
    data = tiff_file(RGB, photometric="rgb", description="a b", resolution=(300, 300), software="s",
                     extratags=[(34675, "B", 3, b"icc", True), (50000, "H", 1, 7, True)])  # fmt: skip
    lines = both(data).notes
    for name in ("ImageDescription", "resolution", "Software", "ICC profile", "tag 50000"):
        assert sum(name in line for line in lines) == 1
    assert lines[-1] == "a TIFF file: its pixels are kept, not its bytes"


# -- other formats ---------------------------------------------------------------------------------------


def test_jpeg() -> None:
    for image in (GREY, RGB):
        for options in ({}, {"progressive": True}, {"quality": 30, "subsampling": 0} if image is RGB else {}):
            data = saved(image, "JPEG", **options)
            np.testing.assert_array_equal(whole(both(data)), np.asarray(Image.open(io.BytesIO(data))))
    refused(saved(Image.new("CMYK", (4, 4)), "JPEG"), r"4 channels \(CMYK")
    refused(imagecodecs.jpeg8_encode(WIDE[..., 0] >> 4, bitspersample=12), "12 bits a sample")
    refused(imagecodecs.ljpeg_encode(GREY), "lossless")
    refused(saved(RGB, "JPEG")[:300], "damaged")
    phone = saved(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())])
    stored = both(phone)
    np.testing.assert_array_equal(stored.values, whole(both(saved(RGB, "JPEG"))))
    assert any("only the first of its 2 pictures is kept" in note for note in stored.notes)


def test_gif() -> None:
    few = noise(9, 13, top=5)
    image = Image.fromarray(few).convert("P")
    palette = noise(256, 3)
    image.putpalette(palette.tobytes())
    data = saved(image, "GIF", comment=b"words", optimize=False)
    stored = both(data)
    np.testing.assert_array_equal(stored.values, imagecodecs.gif_decode(data).reshape(9, 13, -1)[..., :3])
    np.testing.assert_array_equal(stored.values, palette[few])
    assert "not kept: its comment" in stored.notes
    clear = both(saved(image, "GIF", transparency=2))
    np.testing.assert_array_equal(clear.alpha, np.where(few == 2, 0, 255))
    refused(saved(image, "GIF", save_all=True, append_images=[Image.new("P", (13, 9), 1)]), "animated GIF")
    part = bytearray(data)
    part[6:8] = struct.pack("<H", 20)
    refused(bytes(part), "does not fill its screen")


def test_webp() -> None:
    for values in (RGB, RGBA):
        data = saved(values, "WEBP", lossless=True, exact=True)
        np.testing.assert_array_equal(whole(both(data)), values)
        np.testing.assert_array_equal(imagecodecs.webp_decode(data), values)
        lossy = saved(values, "WEBP", quality=60)
        np.testing.assert_array_equal(whole(both(lossy)), np.asarray(Image.open(io.BytesIO(lossy))))
    profile = both(saved(RGB, "WEBP", lossless=True, icc_profile=b"p" * 200))
    assert "not kept: its ICC profile (viewers may show other colours without it)" in profile.notes
    frames = [Image.fromarray(RGB[::-1].copy())]
    refused(saved(RGB, "WEBP", save_all=True, append_images=frames), "animated WebP")


def bmp_file(rows: np.ndarray, W: int, H: int, bits: int, packing: int = 0, more: bytes = b"") -> bytes:
    """A BMP file of rows as they lie, without padding; ``more`` stands behind the header of 40 bytes."""
    row = -(-W * bits // 32) * 4
    lines = b"".join(line.tobytes().ljust(row, b"\0") for line in rows)
    masks = b"" if packing != 3 else struct.pack("<4L", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    header = struct.pack("<LllHHLLllLL", 40 + len(masks), W, H, 1, bits, packing, 0, 0, 0, len(more) // 4, 0)
    start = 14 + len(header) + len(masks) + len(more)
    return struct.pack("<2sLLL", b"BM", start + len(lines), 0, start) + header + masks + more + lines


def test_bmp() -> None:
    bgr = RGB[::-1, :, ::-1]
    np.testing.assert_array_equal(both(bmp_file(bgr, 13, 9, 24)).values, RGB)
    np.testing.assert_array_equal(both(bmp_file(bgr[::-1], 13, -9, 24)).values, RGB)
    unused = np.concatenate([bgr, np.zeros((9, 13, 1), np.uint8)], 2)
    np.testing.assert_array_equal(both(bmp_file(unused, 13, 9, 32)).values, RGB)
    unused[0, 0, 3] = 1
    refused(bmp_file(unused, 13, 9, 32), "does not say whether the last 8 are alpha")
    bgra = RGBA[::-1][..., [2, 1, 0, 3]]
    np.testing.assert_array_equal(whole(both(bmp_file(bgra, 13, 9, 32, 3))), RGBA)
    for bits in (1, 4, 8):
        places, palette = noise(9, 13, top=1 << bits), noise(1 << bits, 3)
        packed = np.packbits(np.unpackbits(places[..., None], axis=2)[..., 8 - bits :].reshape(9, -1), axis=1)
        table = np.pad(palette[:, ::-1], ((0, 0), (0, 1))).tobytes()
        np.testing.assert_array_equal(
            both(bmp_file(packed[::-1], 13, 9, bits, 0, table)).values, palette[places]
        )
    refused(bmp_file(noise(9, 26), 13, 9, 16), "16 bits a pixel")
    refused(bmp_file(noise(9, 26), 13, 9, 8, 1, bytes(1024)), "8 bits a pixel and compression 1")
    refused(b"BM" + bytes(12) + struct.pack("<LHHHH", 12, 4, 4, 1, 24) + bytes(99), "header of 12 bytes")
    refused(bmp_file(bgr, 13, 9, 24)[:-9], "cut off")
    np.testing.assert_array_equal(both(saved(GREY, "BMP")).values, GREY[..., None].repeat(3, 2))


def test_pnm() -> None:
    def file(kind: int, values: np.ndarray, top: int | None, note: bytes = b"") -> bytes:
        H, W = values.shape[:2]
        return b"P%d\n%s%d %d%s\n" % (kind, note, W, H, b"" if top is None else b"\n%d" % top)

    def numbers(values: np.ndarray) -> bytes:
        return b" ".join(b"%d" % v for v in values.ravel())

    bits = noise(9, 13, top=2)
    rows = np.packbits(bits, axis=1).tobytes()
    cases = [
        (file(5, GREY, 255) + GREY.tobytes(), GREY),
        (file(6, RGB, 255) + RGB.tobytes(), RGB),
        (file(5, WIDE[..., 0], 65535) + WIDE[..., 0].astype(">u2").tobytes(), WIDE[..., 0]),
        (file(6, WIDE, 65535) + WIDE.astype(">u2").tobytes(), WIDE),
        (file(2, GREY, 255, b"# one\n") + numbers(GREY), GREY),
        (file(3, WIDE, 65535) + numbers(WIDE), WIDE),
        (file(4, bits, None) + rows, 1 - bits),
        (file(1, bits, None) + numbers(bits), 1 - bits),
        (file(5, bits, 1) + bits.tobytes(), bits),
    ]
    for data, expected in cases:
        np.testing.assert_array_equal(whole(both(data)), expected)
        refused(data[: data.rindex(b" ")] if data[1] in b"23" else data[:-2], "expected|damaged")
    assert "not kept: its comment" in both(cases[4][0]).notes
    refused(file(5, GREY, 254) + GREY.tobytes(), "largest value is 254")
    refused(file(6, WIDE, 4095) + (WIDE >> 4).astype(">u2").tobytes(), "largest value is 4095")
    refused(cases[0][0] * 2, "several pictures")
    refused(b"P7\nWIDTH 1\n", r"another format \(PAM\)")


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_what_viewers_apply(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(RGB, kind, exif=exif, **options)
        stored = both(data)
        assert stored.layout.orientation == turn
        assert stored.values.shape == RGB.shape
        if kind != "JPEG":
            np.testing.assert_array_equal(stored.values, RGB)
        plain = Image.fromarray(stored.values)
        plain.info["exif"] = exif.tobytes()
        from PIL import ImageOps

        seen = np.asarray(ImageOps.exif_transpose(plain))
        np.testing.assert_array_equal(formats.turned(stored.values, turn), seen)
        assert any(f"orientation {turn}" in note for note in stored.notes) == (turn != 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, truncated or no picture"),
        (b"\0\0\0\x1cftypheic" + bytes(20), r"another format \(HEIC\)"),
        (b"\0\0\0\x1cftypavif" + bytes(20), r"another format \(AVIF\)"),
        (b"\xff\x0a" + bytes(20), r"another format \(JPEG XL\)"),
        (png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 15, 1 << 15, 8, 2, 0, 0, 0))
         + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""), "32,768 x 32,768 pixels, more than"),
        (b"P5 99999 99999 255\n", "bytes of pixels"),
    ],
)  # fmt: skip
def test_other_files_are_refused(data: bytes, message: str) -> None:
    refused(data, message)


# -- files changed at random -----------------------------------------------------------------------------


def seeds() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(noise(9, 13, top=5)).convert("P")
    return {
        "rgb.png": png_file(RGB, 8, 2, (b"gAMA", struct.pack(">I", 45455))),
        "deep.png": png_file(WIDE, 16, 2, interlaced=True),
        "palette.png": png_file(noise(9, 13, 1, top=4), 2, 3, (b"PLTE", noise(4, 3).tobytes())),
        "plain.tif": saved(RGB, "TIFF"),
        "packed.tif": saved(GREY, "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2, 278: 2}),
        "lzw.tif": saved(GREY, "TIFF", compression="tiff_lzw"),
        "bits.tif": saved(Image.fromarray(GREY > 99), "TIFF", compression="packbits"),
        "big.tif": saved(WIDE[..., 0], "TIFF", big_tiff=True),
        "photo.jpg": saved(RGB, "JPEG", exif=exif),
        "phone.jpg": saved(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
        "few.gif": saved(palette, "GIF", transparency=1),
        "exact.webp": saved(RGBA, "WEBP", lossless=True),
        "lossy.webp": saved(RGBA, "WEBP", exif=exif),
        "plain.bmp": saved(RGB, "BMP"),
        "palette.bmp": bmp_file(GREY, 13, 9, 8, 0, noise(256, 4).tobytes()),
        "grey.pgm": saved(GREY, "PPM"),
    }


def test_pictures_changed_at_random_are_read_or_refused(forks: None, tmp_path: Path) -> None:
    for name, data in seeds().items():
        (tmp_path / name).write_bytes(data)
    report = tmp_path / "report.json"
    process = FORKS.Process(target=hostile.work_pictures, args=(tmp_path, sorted(seeds()), 120, report))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    found = json.loads(report.read_text())
    assert not found["wrong"], "\n\n".join("\n".join(w) for w in found["wrong"][:3])
    assert not found["slow"]
    assert not found["bare"]
    assert not found["noise"]
    assert found["read"] > 50
    assert found["refused"] > 600
