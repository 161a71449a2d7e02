"""Sources of data -> `Dataset`: rows in [0, 1], split into training, validation and test, and binarised.

Every random choice has a stream of its own under `DataConfig.seed`, so that the
validation and test rows are the same bits whether the training rows are binarised once or at every batch.
"""

import hashlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae.config import DataConfig, InputError
from vae.readers import IDX_SOURCES, find_idx, open_idx, read_source

_CHANNELS = ((), (1,), (3,), (4,))
_IMAGE_ARRAYS = "(rows, height, width) or (rows, height, width, channels)"
_BLOCK_ROWS = 4096  # rows worked on at once where a temporary is needed: bounds memory, changes no result
_SPLIT_STREAM, _TRAIN_STREAM, _VALIDATION_STREAM, _TEST_STREAM = range(4)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of rows in [0, 1]: float32, C-contiguous. X is the number of features of a row."""

    config: DataConfig
    train: np.ndarray  # (N, X): grey under binarize = dynamic (the trainer draws), else as trained on
    validation: np.ndarray  # (M, X): binarised once, unless binarize = none
    test: np.ndarray  # (T, X): likewise
    fingerprint: str  # SHA-256 of dtype, shape and bytes of the arrays read, before any scaling or split
    image_shape: tuple[int, ...] | None  # (H, W) or (H, W, C); None for tables
    columns: tuple[str, ...] | None  # names of a table's columns
    scale_min: np.ndarray | None  # (X,) float64, of scale = minmax: x * (scale_max - scale_min) + scale_min
    scale_max: np.ndarray | None  # undoes it

    @property
    def input_dim(self) -> int:
        return self.train.shape[1]

    @property
    def train_mean(self) -> np.ndarray:
        """(X,) float64: the mean of the rows as trained on; under dynamic draws that is the grey mean."""
        return self.train.mean(axis=0, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.validation.nbytes + self.test.nbytes


@dataclass(frozen=True)
class SourceStatus:
    """One line of `vaesearch data`."""

    name: str
    found: bool
    where: str | None
    description: str
    how_to_get: str


def load_data(config: DataConfig) -> Dataset:
    """Read, check, split, scale and binarise; InputError for whatever the user can mend."""
    source = read_source(config)
    label, columns = source.label, source.columns
    arrays = [_real(label, array) for array in (source.train, source.test) if array is not None]
    image_shape = _image_shape(label, arrays, config.image_shape)
    tables = [array.reshape(len(array), math.prod(array.shape[1:])) for array in arrays]
    picks = _split(label, [len(table) for table in tables], config)

    low, high = min(table.min() for table in tables), max(table.max() for table in tables)
    divided = config.scale == "auto" and tables[0].dtype == np.uint8 and high > 1
    for name, table in zip((label, f"{label} (test split)"), tables, strict=False):
        _check_finite(name, table, columns)
        if config.scale != "minmax" and not divided:
            _check_range(name, table, columns)
    if low == high:
        raise InputError(f"{label}: every value is {low}; there is nothing to learn from constant data")

    homes = (tables[0], tables[0], tables[-1])  # a split's rows are picked from its home
    rows = [home[pick] for home, pick in zip(homes, picks, strict=True)]
    scale_min = scale_max = None
    if config.scale == "minmax":
        scale_min, scale_max = _range_of(rows[0], per_column=image_shape is None)
        grey = [_minmax(part, scale_min, scale_max) for part in rows]
    else:
        divisor = np.float32(source.full_scale if divided else 1)
        grey = [np.divide(part, divisor, dtype=np.float32, casting="same_kind") for part in rows]
    train, validation, test = _binarize(grey, config)
    if train.min() == train.max():
        raise InputError(
            f"{label}: every value to train on is {train.min():g} under scale = {config.scale!r} and "
            f"binarize = {config.binarize!r}; set data.scale or data.binarize otherwise"
        )
    fingerprint = _fingerprint(arrays)
    return Dataset(config, train, validation, test, fingerprint, image_shape, columns, scale_min, scale_max)


def available_sources(data_dir: str | None = None) -> list[SourceStatus]:
    """The named sources: what is there, and how to get the rest. Reads no more than the files' headers."""
    shipped = importlib.util.find_spec("sklearn") is not None
    where, what = "ships with scikit-learn" if shipped else None, "1,797 images of 8 x 8"
    statuses = [SourceStatus("digits", shipped, where, what, "pip install scikit-learn")]
    for name, how_to_get in IDX_SOURCES.items():
        files, where, what = find_idx(name, data_dir), None, ""
        if files is not None:
            where = str(files[0].parent)
            try:
                with (
                    open_idx(files[0]) as ((rows, height, width), _),
                    open_idx(files[1]) as ((more, *_), _),
                ):
                    what = f"{rows:,} + {more:,} images of {height} x {width}"
            except InputError as error:
                what = str(error)
        statuses.append(SourceStatus(name, files is not None, where, what, how_to_get))
    return statuses


# ---- checking


def _real(label: str, array: np.ndarray) -> np.ndarray:
    """C-contiguous, of this machine's byte order; booleans as int8, for which no scale is guessed."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{label}: an array of {array.dtype} holds no real numbers; save it as float32 or uint8")
    if array.dtype.kind == "b":
        array = array.astype(np.int8)
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _fingerprint(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _image_shape(label: str, arrays: list[np.ndarray], wanted: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The shape of one row as an image, a single channel squeezed; None where rows are no images."""
    row = arrays[0].shape[1:]
    if any(array.shape[1:] != row for array in arrays):
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise InputError(f"{label}: training and test rows differ in shape: {shapes}")
    size = math.prod(row)
    if len(row) not in (1, 2, 3):
        raise InputError(f"{label}: an array of shape {arrays[0].shape}; give (rows, columns), {_IMAGE_ARRAYS}")
    if size < 2:
        raise InputError(f"{label}: a row of {size} value leaves nothing to compress; give at least 2 columns")
    if wanted is None and len(row) == 1:
        return None
    image = row if wanted is None else wanted
    if len(image) not in (2, 3) or min(image) < 1 or image[2:] not in _CHANNELS:
        raise InputError(f"{label}: images of shape {image}; give {_IMAGE_ARRAYS}, channels being 1, 3 or 4")
    if math.prod(image) != size:
        raise InputError(f"{label}: data.image_shape = {image} makes {math.prod(image)} values, a row has {size}")
    return image[:2] if image[2:] == (1,) else image


def _split(label: str, sizes: list[int], config: DataConfig) -> list[Any]:
    """Rows of the array(s) read -> indices of training, validation, test; a second array is all test."""
    total, has_test = sizes[0], len(sizes) == 2
    num_test = 0 if has_test else max(1, round(config.test_fraction * total))
    num_held_out = num_test + max(1, round(config.validation_fraction * total))
    if num_held_out >= total or 0 in sizes:
        raise InputError(
            f"{label}: too few rows ({' + '.join(map(str, sizes))}) for training, validation and test; "
            "give more, or lower data.validation_fraction and data.test_fraction"
        )
    order = _generator(config, _SPLIT_STREAM).permutation(total)
    test, validation, train = np.split(order, [num_test, num_held_out])
    return [train, validation, slice(None) if has_test else test]


def _check_finite(label: str, table: np.ndarray, columns: tuple[str, ...] | None) -> None:
    # The extremes tell without a temporary: NaN propagates through both.
    if table.dtype.kind != "f" or np.isfinite([table.min(), table.max()]).all():
        return
    bad = ~np.isfinite(table)
    place, value = _first(label, table, bad, columns)
    count = "1 value is" if bad.sum() == 1 else f"{bad.sum()} values are"
    shown = "NaN" if np.isnan(value) else str(value)
    raise InputError(f"{place} is {shown} ({count} not finite); drop or fill those rows")


def _check_range(label: str, table: np.ndarray, columns: tuple[str, ...] | None) -> None:
    if table.min() >= 0 and table.max() <= 1:
        return
    place, value = _first(label, table, (table < 0) | (table > 1), columns)
    remedy = "auto" if table.dtype == np.uint8 else "minmax"
    raise InputError(
        f"{place} is {value}, outside [0, 1] (the data span {table.min()} to {table.max()}); "
        f'set data.scale = "{remedy}"'
    )


def _first(label: str, table: np.ndarray, bad: np.ndarray, columns: tuple[str, ...] | None) -> tuple[str, Any]:
    """Where the first bad value stands, in words, and the value."""
    row, column = divmod(int(bad.argmax()), table.shape[1])
    name = "" if columns is None else f" ({columns[column]!r})"
    return f"{label}: row {row}, column {column}{name}, both counted from 0,", table[row, column]


# ---- scaling and binarising


def _range_of(train: np.ndarray, per_column: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, X) -> the least and the greatest value, each (X,) float64: of each column, or one pair for all."""
    axis = 0 if per_column else None
    low, high = (np.broadcast_to(edge, train.shape[1:]) for edge in (train.min(axis), train.max(axis)))
    return low.astype(np.float64), high.astype(np.float64)


def _minmax(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Rows outside the training range are clipped; a constant column is 0 everywhere."""
    span = np.where(high > low, high - low, np.inf)
    scaled = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):  # in float64: small spans far from 0 are lost in float32
        block = slice(start, start + _BLOCK_ROWS)
        scaled[block] = ((rows[block] - low) / span).clip(0, 1)
    return scaled


def _binarize(grey: list[np.ndarray], config: DataConfig) -> list[np.ndarray]:
    """Training, validation and test rows -> the same, as DataConfig.binarize says."""
    if config.binarize == "none":
        return grey
    if config.binarize == "threshold":
        return [(rows > 0.5).astype(np.float32) for rows in grey]
    train, validation, test = grey
    return [
        train if config.binarize == "dynamic" else _bernoulli(train, _generator(config, _TRAIN_STREAM)),
        _bernoulli(validation, _generator(config, _VALIDATION_STREAM)),
        _bernoulli(test, _generator(config, _TEST_STREAM)),
    ]


def _bernoulli(grey: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return (generator.random(grey.shape, dtype=np.float32) < grey).astype(np.float32)


def _generator(config: DataConfig, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(stream,)))
