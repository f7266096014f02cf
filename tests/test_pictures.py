"""A picture of images shows every pixel of every image at its place."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dflow.data import grid


def decoded(data: bytes) -> np.ndarray:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(("C", "H", "W"), [(1, 2, 2), (3, 2, 3), (1, 3, 150), (3, 1, 500)])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("columns", [None, 2])
@pytest.mark.parametrize("levels", [2, 32, 256])
def test_each_pixel_is_there(C: int, H: int, W: int, n: int, columns: int | None, levels: int) -> None:
    x = torch.randint(levels, (n, C * H * W))
    picture = decoded(grid(x, (C, H, W), levels, columns))
    across = min(n, columns or {1: 1, 5: 3}[n])
    down = -(-n // across)
    size = (picture.shape[1] + 1 - across) // (across * W)
    # As wide as asked, and no wider than it needs whole factors for.
    assert picture.shape[:2] == (down * (H * size + 1) - 1, across * (W * size + 1) - 1)
    assert picture.shape[1] >= 400
    assert size == 1 or across * (W * (size - 1) + 1) - 1 < 400
    assert picture.ndim == (2 if C == 1 else 3)
    picture = picture.reshape(*picture.shape[:2], C).astype(float)
    seen = np.zeros(picture.shape[:2], dtype=bool)
    for i in range(n):
        top, left = i // across * (H * size + 1), i % across * (W * size + 1)
        part = picture[top : top + H * size, left : left + W * size]
        seen[top : top + H * size, left : left + W * size] = True
        exact = x[i].reshape(C, H, W).permute(1, 2, 0).numpy() * 255 / (levels - 1)
        assert (np.abs(part - exact.repeat(size, 0).repeat(size, 1)) <= 0.5).all()
    assert (picture[~seen] == 128).all()


def test_any_integers_will_do() -> None:
    x = torch.tensor([[0, 1, 1, 0]])
    assert grid(x.bool(), (1, 2, 2), 2) == grid(x.to(torch.uint8), (1, 2, 2), 2) == grid(x, (1, 2, 2), 2)
    assert set(np.unique(decoded(grid(x, (1, 2, 2), 2)))) == {0, 255}


@pytest.mark.parametrize(
    ("x", "shape", "levels", "columns", "message"),
    [
        (torch.zeros(1, 4), (1, 2, 2), 2, None, "expected integers"),
        (torch.zeros(0, 4, dtype=torch.int64), (1, 2, 2), 2, None, "expected integers"),
        (torch.zeros(1, 5, dtype=torch.int64), (1, 2, 2), 2, None, r"\(n, 4\)"),
        (torch.zeros(4, dtype=torch.int64), (1, 2, 2), 2, None, r"\(n, 4\)"),
        (torch.zeros(1, 8, dtype=torch.int64), (2, 2, 2), 2, None, r"\(2, 2, 2\)"),
        (torch.tensor([[2]]), (1, 1, 1), 2, None, r"values 2\.\.2"),
        (torch.tensor([[-1]]), (1, 1, 1), 2, None, r"values -1\.\.-1"),
        (torch.tensor([[0]]), (1, 1, 1), 257, None, "levels=257"),
        (torch.tensor([[0]]), (1, 1, 1), 1, None, "levels=1"),
        (torch.tensor([[0]]), (1, 1, 1), 2, 0, "columns=0"),
    ],
)
def test_what_is_no_image(x, shape, levels, columns, message) -> None:
    with pytest.raises(ValueError, match=message):
        grid(x, shape, levels, columns)
