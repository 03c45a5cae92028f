"""The crop grid: a fixed set of squares per image to which every box is snapped.

In: image sizes and boxes. Out: crop ids and their boxes. Distinct crops number at most images x MAX_CROPS, whatever the
number of units, so each is embedded once.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tasks.pixels import distinct_shapes

MAX_CROPS = 64
"""Also the stride of crop ids: crop_id = image * MAX_CROPS + number in the grid; number 0 is the whole image."""
ROWS = 8192
"""Boxes compared with their grids at once."""


@dataclass
class CropSettings:
    sizes: list[float] = field(default_factory=lambda: [0.5, 0.25])
    """Sides of the squares as shares of the geometric mean of width and height, largest first."""
    context: float = 0.25
    """Share of the box's side added around the active part."""

    def __post_init__(self) -> None:
        if not all(0 < size <= 1 for size in self.sizes) or sorted(self.sizes, reverse=True) != list(self.sizes):
            raise ValueError(f"patches.crops.sizes={self.sizes}: allowed are shares in (0, 1], largest first")
        if self.context < 0:
            raise ValueError(f"patches.crops.context={self.context}: must be at least 0")


def crop_grid(width: int, height: int, sizes: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """int [n <= MAX_CROPS, 4] boxes x0, y0, x1, y1 in pixels, and int [n] their level; row 0 is the whole image.

    The level is 0 for the whole image, else 1 + the index of the size. Squares of each size lie evenly, at least half
    overlapping, over the whole image; where that gives more than MAX_CROPS in all, the most numerous overlap less.
    """
    return _grid(width, height, tuple(sizes))


@lru_cache(maxsize=65536)
def _grid(width: int, height: int, sizes: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    sides = [max(1, min(width, height, round(size * (width * height) ** 0.5))) for size in sizes]
    counts = [[_half_overlapping(width, side), _half_overlapping(height, side)] for side in sides]
    while 1 + sum(x * y for x, y in counts) > MAX_CROPS:
        last = max(range(len(counts)), key=lambda i: counts[i][0] * counts[i][1])
        counts[last][0 if counts[last][0] >= counts[last][1] else 1] -= 1
    boxes, levels = [[0, 0, width, height]], [0]
    for level, (side, (across, down)) in enumerate(zip(sides, counts, strict=True), 1):
        for y in _evenly(height - side, down):
            for x in _evenly(width - side, across):
                boxes.append([x, y, x + side, y + side])
                levels.append(level)
    return np.array(boxes), np.array(levels)


def _half_overlapping(length: int, side: int) -> int:
    return -(-2 * (length - side) // side) + 1


def _evenly(room: int, count: int) -> np.ndarray:
    return np.linspace(0, room, count).round().astype(int) if count > 1 else np.array([room // 2])


def square(boxes_N4: np.ndarray, context: float) -> np.ndarray:
    """Boxes grown to squares around their centre, with `context` times the longer side added."""
    centre = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    half = (boxes_N4[:, 2:] - boxes_N4[:, :2]).max(1, keepdims=True) * (1 + context) / 2
    return np.concatenate([centre - half, centre + half], 1)


def grids(sizes_N2: np.ndarray, sizes: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The grids of all different shapes among N images: int [S, MAX_CROPS, 4] boxes, int [S, MAX_CROPS] levels, and int
    [N], which of them is each image's.

    sizes_N2: width and height of each image. Behind the end of a smaller grid lie empty boxes, which overlap nothing.
    """
    shapes, shape_N = distinct_shapes(sizes_N2)
    boxes = np.zeros((len(shapes), MAX_CROPS, 4), np.int64)
    levels = np.zeros((len(shapes), MAX_CROPS), np.int64)
    for i, (width, height) in enumerate(shapes):
        grid, level = crop_grid(width, height, sizes)
        boxes[i, : len(grid)], levels[i, : len(grid)] = grid, level
    return boxes, levels, shape_N


def snap(boxes_N4: np.ndarray, images_N: np.ndarray, sizes_N2: np.ndarray, sizes: list[float]) -> np.ndarray:
    """int64 [N] crop ids: of each image's grid the square with the largest intersection over union, first on ties.

    boxes_N4: float boxes in pixels; images_N: image numbers; sizes_N2: width and height of each image.
    """
    grids_SG4, _, shape_N = grids(sizes_N2, sizes)
    grids_SG4, ids = grids_SG4.astype(np.float64), images_N.astype(np.int64) * MAX_CROPS
    for start in range(0, len(ids), ROWS):
        rows = slice(start, start + ROWS)
        ids[rows] += iou(boxes_N4[rows], grids_SG4[shape_N[rows]]).argmax(1)
    return ids


def iou(boxes_N4: np.ndarray, grid_G4: np.ndarray) -> np.ndarray:
    """float [N, G], intersection over union of every box with every square; grid_G4 may be [N, G, 4], one for each."""
    x0, y0, x1, y1 = (boxes_N4[:, i, None] for i in range(4))
    left, top, right, bottom = (grid_G4[..., i] for i in range(4))
    across = (np.minimum(x1, right) - np.maximum(x0, left)).clip(0)
    inter = across * (np.minimum(y1, bottom) - np.maximum(y0, top)).clip(0)
    area = (x1 - x0) * (y1 - y0) + (right - left) * (bottom - top)
    return inter / np.maximum(area - inter, 1e-9)
