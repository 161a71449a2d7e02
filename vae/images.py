"""Grids of examples as PNG files, for people to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vae.config import InputError

COLUMNS = 8  # of a grid
MAX_PIXELS = 80_000_000  # of a picture: viewers, and Pillow itself, take larger ones for an attack

# Shapes: N examples, X features, H and W height and width of an image, C its channels.

_TILE_PIXELS = 64  # images smaller than this are enlarged by a whole factor
_TABLE_PIXELS = 640  # the least width of a heat map
_TABLE_ROW_PIXELS = 12
_GAP_PIXELS = 2
_BACKGROUND = 96
_LABEL_COLOUR, _LABEL_PIXELS, _LABEL_MARGIN_PIXELS = (255, 255, 255), 14, 6
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


def save_grid(
    rows: np.ndarray,
    image_shape: tuple[int, ...] | None,
    path: str | Path | IO[bytes],
    columns: int = COLUMNS,
    labels: Sequence[str] = (),
    max_pixels: int | None = MAX_PIXELS,
) -> None:
    """rows (N, X) in [0, 1], N >= 1 -> a PNG; without an image shape a heat map, an example a line.

    labels: written before the lines of the grid, one each. InputError for a picture of more than `max_pixels`.
    """
    size = grid_size(len(rows), rows.shape[1], image_shape, columns, max_pixels)
    canvas = np.full((*size, 3), _BACKGROUND, dtype=np.uint8)
    columns = 1 if image_shape is None else min(columns, len(rows))
    height, width = _tile_size(rows.shape[1], image_shape)
    for index, tile in enumerate(_tiles(rows, image_shape)):
        top = _GAP_PIXELS + index // columns * (height + _GAP_PIXELS)
        left = _GAP_PIXELS + index % columns * (width + _GAP_PIXELS)
        canvas[top : top + height, left : left + width] = tile
    picture = Image.fromarray(canvas)
    if labels:
        picture = _labelled(picture, labels, height + _GAP_PIXELS)
    picture.save(path, format="PNG")


def grid_size(
    num_rows: int,
    num_features: int,
    image_shape: tuple[int, ...] | None,
    columns: int = COLUMNS,
    max_pixels: int | None = MAX_PIXELS,
) -> tuple[int, int]:
    """Height and width in pixels of the picture that `save_grid` makes of so many. InputError as there."""
    columns = 1 if image_shape is None else min(columns, num_rows)
    tile = _tile_size(num_features, image_shape)
    height, width = (
        count * (size + _GAP_PIXELS) + _GAP_PIXELS
        for count, size in zip((-(-num_rows // columns), columns), tile, strict=True)
    )
    if max_pixels is not None and height * width > max_pixels:
        raise InputError(
            f"a picture of {num_rows:,} examples would be of {width:,} x {height:,} pixels; "
            "ask for fewer, or write .npy"
        )
    return height, width


def save_reconstructions(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    image_shape: tuple[int, ...] | None,
    path: str | Path | IO[bytes],
    columns: int = COLUMNS,
    max_pixels: int | None = MAX_PIXELS,
) -> None:
    """Both (N, X) in [0, 1]: lines of originals, each with the line of their reconstructions below it.

    InputError for a picture of more than `max_pixels`.
    """
    columns = 1 if image_shape is None else min(columns, len(originals))
    blanks = np.zeros((-len(originals) % columns, originals.shape[1]), dtype=originals.dtype)
    above, below = (
        np.concatenate((rows, blanks)).reshape(-1, columns, rows.shape[1]) for rows in (originals, reconstructions)
    )
    both = np.stack((above, below), axis=1).reshape(-1, originals.shape[1])
    save_grid(both, image_shape, path, columns, max_pixels=max_pixels)


def num_that_fit(num_features: int, image_shape: tuple[int, ...] | None, tiles: int = 1) -> int:
    """How many examples of so many tiles each a picture of MAX_PIXELS holds, one in any case; in whole lines."""
    height, width = _tile_size(num_features, image_shape)
    most = MAX_PIXELS // (tiles * (height + _GAP_PIXELS) * (width + _GAP_PIXELS))
    return max(1, most if most < COLUMNS else most - most % COLUMNS)


def _labelled(picture: Image.Image, labels: Sequence[str], line_pixels: int) -> Image.Image:
    """With a margin on the left, where each label stands beside the middle of its line."""
    font = ImageFont.load_default(_LABEL_PIXELS)
    widest = max(font.getlength(label) for label in labels)
    margin = round(widest) + 2 * _LABEL_MARGIN_PIXELS
    wider = Image.new("RGB", (picture.width + margin, picture.height), (_BACKGROUND,) * 3)
    wider.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wider)
    for line, label in enumerate(labels):
        middle = _GAP_PIXELS / 2 + (line + 0.5) * line_pixels
        draw.text((margin - _LABEL_MARGIN_PIXELS, middle), label, _LABEL_COLOUR, font, anchor="rm")
    return wider


def _tile_size(num_features: int, image_shape: tuple[int, ...] | None) -> tuple[int, int]:
    """Height and width of an example as it is drawn, in pixels."""
    if image_shape is None:
        return _TABLE_ROW_PIXELS, num_features * -(-_TABLE_PIXELS // num_features)
    enlarge = max(1, _TILE_PIXELS // max(image_shape[:2]))
    return image_shape[0] * enlarge, image_shape[1] * enlarge


def _tiles(rows: np.ndarray, image_shape: tuple[int, ...] | None) -> np.ndarray:
    """(N, X) in [0, 1] -> (N, H, W, 3) of bytes, enlarged."""
    rows = np.clip(rows, 0, 1)
    height, width = _tile_size(rows.shape[1], image_shape)
    if image_shape is None:
        levels = np.linspace(0, 1, len(_HEAT))
        colours = np.stack([np.interp(rows, levels, channel) for channel in _HEAT.T], axis=-1)
        pixels = colours.round().astype(np.uint8)[:, None]
        return pixels.repeat(height, axis=1).repeat(width // rows.shape[1], axis=2)
    images = rows.reshape(len(rows), *image_shape[:2], -1)
    if images.shape[-1] != 3:
        images = images.mean(axis=-1, keepdims=True).repeat(3, axis=-1)  # grey, or channels that are no colours
    enlarge = width // image_shape[1]
    return (images * 255).round().astype(np.uint8).repeat(enlarge, axis=1).repeat(enlarge, axis=2)
