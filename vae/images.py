"""Grids of examples as PNG files, for people to look at."""

from pathlib import Path

import numpy as np
from PIL import Image

# Shapes: N examples, X features, H and W height and width of an image, C its channels.

_TILE_PIXELS = 64  # images smaller than this are enlarged by a whole factor
_TABLE_PIXELS = 640  # the least width of a heat map
_TABLE_ROW_PIXELS = 12
_GAP_PIXELS = 2
_BACKGROUND = 96
# Anchors of the heat map from 0 to 1, taken from viridis: ordered in lightness, legible to the colour-blind.
_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_RANGE_ROWS = 4096  # enough to tell a range by
_RANGE = (0.01, 0.99)  # quantiles that stand for 0 and 1: a single outlier must not turn all others into one shade


def shades(
    rows: np.ndarray, train: np.ndarray, image_shape: tuple[int, ...] | None, logarithmic: bool = False
) -> np.ndarray:
    """rows (M, X) -> values to be drawn, most of them in [0, 1]; `logarithmic` is for counts.

    By the range of train (N, X): that of each column of a table, and one for all pixels of images. What lies in
    [0, 1] there stays as it is.
    """
    train = train[:_RANGE_ROWS]
    if train.min() >= 0 and train.max() <= 1:
        return rows
    if logarithmic:
        rows, train = np.log1p(rows), np.log1p(train)
    axis = None if image_shape is not None else 0
    low, high = np.quantile(train, _RANGE, axis=axis)
    least, most = train.min(axis=axis), train.max(axis=axis)
    low, high = np.where(high > low, low, least), np.where(high > low, high, most)
    return (rows - low) / np.where(high > low, high - low, np.inf)


def save_grid(rows: np.ndarray, image_shape: tuple[int, ...] | None, path: str | Path, columns: int = 8) -> None:
    """rows (N, X) in [0, 1], N >= 1 -> a PNG; without an image shape a heat map, an example a line."""
    if image_shape is None:
        columns = 1
    tiles = _tiles(rows, image_shape)
    num_tiles, height, width, _ = tiles.shape
    columns = min(columns, num_tiles)
    lines = -(-num_tiles // columns)
    shape = (lines * (height + _GAP_PIXELS) + _GAP_PIXELS, columns * (width + _GAP_PIXELS) + _GAP_PIXELS, 3)
    canvas = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top = _GAP_PIXELS + index // columns * (height + _GAP_PIXELS)
        left = _GAP_PIXELS + index % columns * (width + _GAP_PIXELS)
        canvas[top : top + height, left : left + width] = tile
    Image.fromarray(canvas).save(path, format="PNG")


def save_reconstructions(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    image_shape: tuple[int, ...] | None,
    path: str | Path,
    columns: int = 8,
) -> None:
    """Both (N, X) in [0, 1]: lines of originals, each with the line of their reconstructions below it."""
    columns = 1 if image_shape is None else min(columns, len(originals))
    blanks = np.zeros((-len(originals) % columns, originals.shape[1]), dtype=originals.dtype)
    above, below = (
        np.concatenate((rows, blanks)).reshape(-1, columns, rows.shape[1]) for rows in (originals, reconstructions)
    )
    save_grid(np.stack((above, below), axis=1).reshape(-1, originals.shape[1]), image_shape, path, columns)


def _tiles(rows: np.ndarray, image_shape: tuple[int, ...] | None) -> np.ndarray:
    """(N, X) in [0, 1] -> (N, H, W, 3) of bytes, enlarged."""
    rows = np.clip(rows, 0, 1)
    if image_shape is None:
        levels = np.linspace(0, 1, len(_HEAT))
        colours = np.stack([np.interp(rows, levels, channel) for channel in _HEAT.T], axis=-1)
        enlarge = -(-_TABLE_PIXELS // rows.shape[1])
        return colours.round().astype(np.uint8)[:, None].repeat(_TABLE_ROW_PIXELS, axis=1).repeat(enlarge, axis=2)
    images = rows.reshape(len(rows), *image_shape[:2], -1)
    if images.shape[-1] != 3:
        images = images.mean(axis=-1, keepdims=True).repeat(3, axis=-1)  # grey, or channels that are no colours
    enlarge = max(1, _TILE_PIXELS // max(image_shape[:2]))
    return (images * 255).round().astype(np.uint8).repeat(enlarge, axis=1).repeat(enlarge, axis=2)
