"""Make a folder of mixed pictures, and of files that are none, to try `dflow compress FOLDER` with.

Of the Kodak pictures, the subset of CIFAR-10, histology and MNIST in the folder that DFLOW_DATA names: crops
and single pictures, as PNG in grey, colours, with palette, alpha, 1 and 16 bits, as JPEG, WebP, TIFF and BMP;
beside them what is left out: a CMYK JPEG, an animated GIF, a truncated PNG, a text, an empty file. Names have
spaces, letters of several scripts, and up to 200 characters. The same seed makes the same files.

    DFLOW_DATA=data python scripts/make_mixed_folder.py mixed --files 2000
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dflow.data import files
from dflow.data.formats import png
from dflow.data.image_sets import from_idx

Array = NDArray[Any]

#: Stems of names.
STEMS = (
    "picture", "with space", "Ünïcödé", "фото", "写真", "صورة", "emoji \N{CAMERA}", "a.b.c", "-dash",
    "quote'd", "n" * 190,
)  # fmt: skip


def sources(data: Path) -> dict[str, Callable[[np.random.Generator], Array]]:
    """What draws a picture of each kind, uint8 ``(H, W, 3)`` or ``(H, W)``."""
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((data / "kodak").glob("*.png"))]
    slides = [
        np.asarray(Image.open(path).convert("RGB")) for path in sorted((data / "histology").glob("*.png"))
    ]
    with np.load(data / "cifar10" / "cifar10-subset.npz") as archive:
        small = archive["x_valid"]
    digits = from_idx(files.read(data / "mnist" / "t10k-images-idx3-ubyte.gz"))

    def crop(pictures: list[Array], rng: np.random.Generator) -> Array:
        picture = pictures[rng.integers(len(pictures))]
        H, W = rng.integers(16, 65, 2)
        top, left = rng.integers(picture.shape[0] - H), rng.integers(picture.shape[1] - W)
        return picture[top : top + H, left : left + W]

    return {
        "kodak": lambda rng: crop(photos, rng),
        "histology": lambda rng: crop(slides, rng),
        "cifar": lambda rng: small[rng.integers(len(small))],
        "mnist": lambda rng: digits[rng.integers(len(digits))],
    }


def grey(values: Array) -> Array:
    """``(H, W)``."""
    return values if values.ndim == 2 else values.mean(2).astype(np.uint8)


def colour(values: Array) -> Array:
    """``(H, W, 3)``."""
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)


def ramp(values: Array) -> Array:
    """A plane of alpha, ``(H, W, 1)``."""
    line = np.linspace(0, 255, values.shape[1], dtype=np.uint8)[:, None]
    return np.broadcast_to(line, (*values.shape[:2], 1))


#: How pictures of 8 bits or 1 are made of values, and those of 16 bits.
MAKE: dict[str, Callable[[Array], Array]] = {
    "grey": grey,
    "bits": lambda values: grey(values) > 127,
    "rgba": lambda values: np.concatenate([colour(values), ramp(values)], 2),
    "grey-alpha": lambda values: np.concatenate([grey(values)[..., None], ramp(values)], 2),
}
DEEP: dict[str, Callable[[Array], Array]] = {
    "sixteen": lambda values: colour(values).astype(np.uint16) * 257 - colour(values) % 3,
    "sixteen grey": lambda values: grey(values)[..., None].astype(np.uint16) * 16 + 5,
}
KINDS = ("png", "png", "png", "jpg", "webp", "tif", "bmp", "npy", "palette", *MAKE, *DEEP)


def write(path: Path, values: Array, kind: str) -> None:
    """A file of one of `KINDS`."""
    if kind in MAKE:
        Image.fromarray(MAKE[kind](values)).save(path.with_suffix(".png"))
    elif kind in DEEP:
        path.with_suffix(".png").write_bytes(png.write(DEEP[kind](values), 16))
    elif kind == "palette":
        Image.fromarray(colour(values)).quantize(32).save(path.with_suffix(".png"))
    elif kind == "npy":
        np.save(path.with_suffix(".npy"), colour(values)[None])
    else:
        Image.fromarray(values).save(path.with_suffix(f".{kind}"), lossless=True)


def write_others(folder: Path, values: Array) -> list[str]:
    """Files that are no picture, or none that is read; their names."""
    Image.fromarray(colour(values)).convert("CMYK").save(folder / "cmyk.jpg")
    frames = [Image.fromarray(grey(values)), Image.fromarray(255 - grey(values))]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    write(folder / "truncated.png", colour(values), "png")
    whole = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: 2 * len(whole) // 3])
    (folder / "notes on the pictures.txt").write_text("no picture\n" * 20, encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    return ["animated.gif", "cmyk.jpg", "empty.png", "notes on the pictures.txt", "truncated.png"]


def make(folder: Path, data: Path, num_files: int, seed: int = 0) -> list[str]:
    """Write so many files below ``folder``, which must not exist; names of those that are left out."""
    rng, draw = np.random.default_rng(seed), sources(data)
    folder.mkdir(parents=True)
    places = [folder / name for name in draw] + [folder / "sub folder" / "über" / "深い"]
    for place in places:
        place.mkdir(parents=True)
    names = list(draw)
    for i in range(num_files - 5):
        values = draw[names[i % len(names)]](rng)
        place = places[i % len(names)] if i % 7 else places[-1]
        write(place / f"{STEMS[i % len(STEMS)]} {i:05}.x", values, KINDS[i // len(names) % len(KINDS)])
    others = folder / "sub folder"
    return [f"sub folder/{name}" for name in write_others(others, draw["kodak"](rng))]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    for name in make(words.folder, Path(os.environ["DFLOW_DATA"]), words.files, words.seed):
        print(name)


if __name__ == "__main__":
    main()
