"""Images as a picture to look at: a grid of them, as a PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

#: A picture is at least this wide, in pixels, if magnifying its images makes it so.
WIDTH = 400
_GAP = 128


def grid(x: Tensor, shape: Sequence[int], levels: int, columns: int | None = None) -> bytes:
    """A PNG file of images side by side, row by row, with a grey gap of one pixel between them.

    Values ``0 .. levels - 1`` are spread over 0 .. 255. Each pixel of an image becomes a square of whole
    pixels, as many as make the picture at least `WIDTH` wide.

    Args:
        x: integers ``(n, C * H * W)``, n at least 1.
        shape: ``(C, H, W)``, C of 1 (grey) or 3 (red, green, blue).
        levels: number of values, 2 to 256.
        columns: images in a row (default: about as many as rows).

    Raises:
        ValueError: no images, another shape, values outside ``0 .. levels - 1`` or no integers.
    """
    C, H, W = shape
    if C not in (1, 3) or min(H, W) < 1:
        raise ValueError(f"shape={tuple(shape)} must be (1 or 3, H, W)")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels={levels} must lie in 2..256")
    if x.ndim != 2 or not len(x) or x.shape[1] != C * H * W or x.is_floating_point():
        raise ValueError(f"expected integers (n, {C * H * W}), found {x.dtype} of shape {tuple(x.shape)}")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"values {low}..{high} are not all among the levels 0..{levels - 1}")
    n = len(x)
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    columns = min(columns, n)
    rows = -(-n // columns)
    size = max(1, -(-(WIDTH - columns + 1) // (columns * W)))
    values = x.cpu().numpy().astype(np.int64).reshape(n, C, H, W)
    images = ((values * 255 + (levels - 1) // 2) // (levels - 1)).astype(np.uint8).transpose(0, 2, 3, 1)
    images = images.repeat(size, 1).repeat(size, 2)
    picture = np.full((rows * (H * size + 1) - 1, columns * (W * size + 1) - 1, C), _GAP, dtype=np.uint8)
    for i, image in enumerate(images):
        top, start = i // columns * (H * size + 1), i % columns * (W * size + 1)
        picture[top : top + H * size, start : start + W * size] = image
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if C == 1 else picture).save(file, "PNG")
    return file.getvalue()
