"""Sources of data -> `Dataset`: rows fit for a likelihood, split into training, validation and test, and binarised.

Every random choice has a stream of its own under `DataConfig.seed`, so that the
validation and test rows are the same bits whether the training rows are binarised once or at every batch.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vae.config import DataConfig, InputError, LikelihoodName
from vae.readers import HOW_TO_GET_DIGITS, IDX_SOURCES, Source, find_digits, find_idx, open_idx, read_source

_CHANNELS = ((), (1,), (3,), (4,))
_IMAGE_ARRAYS = "(rows, height, width) or (rows, height, width, channels)"
_BLOCK_ROWS = 4096  # rows worked on at once where a temporary is needed: bounds memory, changes no result
MAX_COUNT = 2**24
_OVERDISPERSED = 2.0  # variance over mean beyond which counts speak against a Poisson distribution
_SPLIT_STREAM, _TRAIN_STREAM, VALIDATION_STREAM, _TEST_STREAM = range(4)
_DIGITS = 6  # behind the unit of a column's spread: what float32 holds of a row
_MAX_DECIMALS = 15


@dataclass(frozen=True, eq=False, slots=True)
class Units:
    """Between the data's own units and the rows of a model: own = row * factor + shift, by feature."""

    shift: np.ndarray | None  # (X,) float64; None, as the other: the rows are in the data's own units
    factor: np.ndarray | None  # (X,) float64; 0 for a feature that is constant in training under scale = minmax
    clip: bool  # whether rows end at 0 and 1, as under scale = minmax

    def scale(self, own: np.ndarray) -> np.ndarray:
        """(N, X) in the data's own units -> float32 rows as the model was trained on, before any binarisation."""
        if self.shift is None or self.factor is None:
            return np.array(own, dtype=np.float32)
        factor = np.where(self.factor == 0, np.inf, self.factor)
        rows = np.empty(own.shape, np.float32)
        with np.errstate(over="ignore"):  # of float32; load_data looks for what became infinite
            for block in _blocks(len(own)):  # in float64: small spans far from 0 are lost in float32
                scaled = (own[block] - self.shift) / factor
                rows[block] = scaled.clip(0, 1) if self.clip else scaled
        return rows

    def restore(self, rows: np.ndarray) -> np.ndarray:
        """(N, X) rows, or means of them, -> float64 in the data's own units."""
        own = np.array(rows, dtype=np.float64)
        return own if self.shift is None or self.factor is None else own * self.factor + self.shift

    def rounded(self, own: np.ndarray) -> np.ndarray:
        """(N, X) float64 in the data's own units -> the same to the digits that float32 rows have, for tables."""
        rounded = own.copy()
        for i, spread in enumerate(np.ones(own.shape[1]) if self.factor is None else self.factor):
            decimals = _DIGITS - math.floor(math.log10(spread)) if spread > 0 else _MAX_DECIMALS
            if decimals <= _MAX_DECIMALS:
                rounded[:, i] = rounded[:, i].round(decimals)
        return rounded


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of rows on `config.support`: float32, C-contiguous. X is the number of features of a row."""

    config: DataConfig
    train: np.ndarray  # (N, X): grey under binarize = dynamic (the trainer draws), else as trained on
    validation: np.ndarray  # (M, X): binarised once, unless binarize = none
    test: np.ndarray  # (T, X): likewise
    fingerprint: str  # SHA-256 of dtype, shape and bytes of the arrays read, before any scaling or split
    image_shape: tuple[int, ...] | None  # (H, W) or (H, W, C); None for tables
    columns: tuple[str, ...] | None  # names of a table's columns
    shift: np.ndarray | None  # (X,) float64: x * factor + shift is in the data's own units; None: x is already
    factor: np.ndarray | None

    @property
    def input_dim(self) -> int:
        return self.train.shape[1]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(X,) of tables, the shape of one image of images."""
        return (self.input_dim,) if self.image_shape is None else self.image_shape

    @property
    def units(self) -> Units:
        return Units(self.shift, self.factor, clip=self.config.scale == "minmax")

    def restore(self, rows: np.ndarray) -> np.ndarray:
        """(N, X) rows -> float64 in the data's own units; what was clipped or binarised does not come back."""
        return self.units.restore(rows)

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.validation.nbytes + self.test.nbytes


@dataclass(frozen=True)
class _Values:
    """What the rows are, as far as their likelihood is concerned."""

    binary: bool  # 0 and 1 alone, as trained on
    whole: bool  # whole numbers from 0, in the data's own units
    pixels: bool  # images of 8 bits
    unit: bool  # rows in [0, 1]
    dispersion: float  # of whole numbers: variance over mean, 1 for Poisson counts of rows of unlike totals


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
    picks = split_rows(label, [len(table) for table in tables], config)

    low, high = min(table.min() for table in tables), max(table.max() for table in tables)
    divided = config.scale == "auto" and config.support != "counts" and tables[0].dtype == np.uint8 and high > 1
    divided = divided and (config.support == "unit" or image_shape is not None)
    for name, table in zip((label, f"{label} (test split)"), tables, strict=False):
        check_finite(name, table, columns)
        if config.support == "counts":
            _check_counts(name, table, columns)
        elif config.support == "unit" and config.scale != "minmax" and not divided:
            _check_range(name, table, columns)
    if low == high:
        raise InputError(f"{label}: every value is {low}; there is nothing to learn from constant data")

    homes = (tables[0], tables[0], tables[-1])  # a split's rows are picked from its home
    rows = [home[pick] for home, pick in zip(homes, picks, strict=True)]
    shift = factor = None
    standardised = config.scale == "auto" and config.support == "real" and image_shape is None
    if config.scale == "minmax":
        shift, most = _range_of(rows[0], per_column=image_shape is None)
        factor = most - shift
    elif config.scale == "standard" or standardised:
        shift, factor = _moments_of(rows[0], per_column=image_shape is None)
    if shift is not None and factor is not None:
        grey = [Units(shift, factor, clip=config.scale == "minmax").scale(part) for part in rows]
    else:
        divisor = np.float32(source.full_scale if divided else 1)
        with np.errstate(over="ignore"):  # told below
            grey = [np.divide(part, divisor, dtype=np.float32, casting="same_kind") for part in rows]
        if divided:
            shift, factor = np.zeros(len(grey[0][0])), np.full(len(grey[0][0]), float(divisor))
    for name, part in zip(("training", "validation", "test"), grey, strict=True):
        _check_float32(f"{label} ({name} rows, scaled)", part, columns)
    train, validation, test = _binarize(grey, config)
    if train.min() == train.max():
        raise InputError(
            f"{label}: every value to train on is {train.min():g} under scale = {config.scale!r} and "
            f"binarize = {config.binarize!r}; set data.scale or data.binarize otherwise"
        )
    fingerprint = _fingerprint(arrays)
    return Dataset(config, train, validation, test, fingerprint, image_shape, columns, shift, factor)


def fingerprint_of(source: Source) -> str:
    """As a `Dataset` has it of what was read."""
    return _fingerprint([_real(source.label, array) for array in (source.train, source.test) if array is not None])


def feature_names(columns: tuple[str, ...] | None, input_dim: int) -> tuple[str, ...]:
    """Of a table's columns; x0, x1, ... where they have none."""
    return columns or tuple(f"x{i}" for i in range(input_dim))


def fitting_likelihoods(data: Dataset) -> tuple[LikelihoodName, ...]:
    """Those under which the data, as they are loaded, have a likelihood; the first is the usual choice."""
    return _fitting(_values(data))


def likelihood_advice(likelihood: str, data: Dataset) -> str | None:
    """A line of warning where the data speak for another family, with the key that would do; None where it fits."""
    values = _values(data)
    fitting = _fitting(values)
    if likelihood in fitting:
        return None
    remedy = f'set model.likelihood = "{fitting[0]}"'
    if values.binary:
        if likelihood == "continuous_bernoulli" and data.config.binarize != "none":
            remedy += ', or data.binarize = "none"'
        return f"the data are 0 and 1 alone, to which {likelihood} gives no probabilities; {remedy}"
    if likelihood == "bernoulli" and data.config.binarize == "none":
        return (
            "grey values have no likelihood under bernoulli: its values compare with each other alone; "
            f'set model.likelihood = "{_fitting(replace(values, whole=False))[0]}", or data.binarize = "dynamic"'
        )
    if likelihood == "poisson" and values.whole:
        return (
            f"the counts vary {values.dispersion:.1f} times as much as Poisson counts of one rate a column; "
            'if that is not all due to their latents, set model.likelihood = "negative_binomial"'
        )
    if likelihood == "gaussian" and values.whole and not values.pixels:
        return f"the data are whole numbers from 0; if they count something, {remedy}"
    return None


def available_sources(data_dir: str | None = None) -> list[SourceStatus]:
    """The named sources: what is there, and how to get the rest. Reads no more than the files' headers."""
    shipped = find_digits() is not None
    where, what = "ships with scikit-learn" if shipped else None, "1,797 images of 8 x 8"
    statuses = [SourceStatus("digits", shipped, where, what, HOW_TO_GET_DIGITS)]
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


def split_rows(label: str, sizes: list[int], config: DataConfig) -> list[Any]:
    """Rows of the array(s) read -> indices of training, validation, test; a second array is all test."""
    total, has_test = sizes[0], len(sizes) == 2
    num_test = 0 if has_test else max(1, round(config.test_fraction * total))
    num_held_out = num_test + max(1, round(config.validation_fraction * total))
    if num_held_out >= total or 0 in sizes:
        raise InputError(
            f"{label}: too few rows ({' + '.join(map(str, sizes))}) for training, validation and test; "
            "give more, or lower data.validation_fraction and data.test_fraction"
        )
    order = generator_of(config.seed, _SPLIT_STREAM).permutation(total)
    test, validation, train = np.split(order, [num_test, num_held_out])
    return [train, validation, slice(None) if has_test else test]


def check_finite(label: str, table: np.ndarray, columns: tuple[str, ...] | None) -> None:
    """table (N, X), N >= 1. InputError where a value is not finite."""
    # The extremes tell without a temporary: NaN propagates through both.
    if table.dtype.kind != "f" or np.isfinite([table.min(), table.max()]).all():
        return
    bad = ~np.isfinite(table)
    place, value = first_bad(label, table, bad, columns)
    count = "1 value is" if bad.sum() == 1 else f"{bad.sum()} values are"
    shown = "NaN" if np.isnan(value) else str(value)
    raise InputError(f"{place} is {shown} ({count} not finite); drop or fill those rows")


def _check_range(label: str, table: np.ndarray, columns: tuple[str, ...] | None) -> None:
    if table.min() >= 0 and table.max() <= 1:
        return
    place, value = first_bad(label, table, (table < 0) | (table > 1), columns)
    remedy = "auto" if table.dtype == np.uint8 else "minmax"
    other = "poisson" if _is_whole(table) else "gaussian"
    raise InputError(
        f"{place} is {value}, outside [0, 1] (the data span {table.min()} to {table.max()}); "
        f'set data.scale = "{remedy}", or model.likelihood = "{other}"'
    )


def _check_counts(label: str, table: np.ndarray, columns: tuple[str, ...] | None) -> None:
    if not _is_whole(table):
        place, value = first_bad(label, table, (table < 0) | (table != np.floor(table)), columns)
        other = "continuous_bernoulli" if table.min() >= 0 and table.max() <= 1 else "gaussian"
        raise InputError(f'{place} is {value}, and counts are whole numbers from 0; set model.likelihood = "{other}"')
    if table.max() > MAX_COUNT:
        place, value = first_bad(label, table, table > MAX_COUNT, columns)
        raise InputError(
            f"{place} is {value}, beyond the {MAX_COUNT} to which float32 counts exactly; "
            'count in thousands, or set model.likelihood = "gaussian"'
        )


def _is_whole(table: np.ndarray) -> bool:
    """Whether all values are whole numbers from 0."""
    if table.min() < 0:
        return False
    blocks = (table[block] for block in _blocks(len(table)))
    return table.dtype.kind in "iu" or all((block == np.floor(block)).all() for block in blocks)


def _check_float32(label: str, rows: np.ndarray, columns: tuple[str, ...] | None) -> None:
    if np.isfinite([rows.min(), rows.max()]).all():
        return
    place, _ = first_bad(label, rows, ~np.isfinite(rows), columns)
    raise InputError(f'{place} is beyond float32; drop such rows, or set data.scale = "minmax"')


def first_bad(label: str, table: np.ndarray, bad: np.ndarray, columns: tuple[str, ...] | None) -> tuple[str, Any]:
    """table, bad (N, X) -> where the first bad value stands, in words, and the value. N = 1: no row is told."""
    row, column = divmod(int(bad.argmax()), table.shape[1])
    name = "" if columns is None else f" ({columns[column]!r})"
    place = f"column {column}{name}, counted from 0,"
    if len(table) > 1:
        place = f"row {row}, column {column}{name}, both counted from 0,"
    return f"{label}: {place}", table[row, column]


# ---- judging


def _fitting(values: _Values) -> tuple[LikelihoodName, ...]:
    if values.binary:
        return ("bernoulli",)
    fitting: list[LikelihoodName] = []
    if values.unit and (values.pixels or not values.whole):
        fitting.append("continuous_bernoulli")
    if values.pixels or not values.whole:
        fitting.append("gaussian")
    if values.whole:
        fitting += ["poisson", "negative_binomial"] if values.dispersion < _OVERDISPERSED else ["negative_binomial"]
    return tuple(fitting)


def _values(data: Dataset) -> _Values:
    """By the training rows."""
    if data.config.binarize != "none":
        return _Values(binary=True, whole=True, pixels=False, unit=True, dispersion=1.0)
    binary = whole = True
    most = 0.0
    for block in _blocks(len(data.train)):
        rows = data.train[block]
        own = data.restore(rows)
        # float32 keeps a value to one part in 2^24 of its distance from the shift.
        slack = np.zeros(1) if data.shift is None else 1e-9 + 2**-23 * np.abs(own - data.shift)
        whole = whole and bool(own.min() > -0.5 and (np.abs(own - own.round()) <= slack).all() and slack.max() < 0.1)
        binary = binary and (bool(((rows == 0) | (rows == 1)).all()) or (whole and own.max() < 1.5))
        most = max(most, own.max())
    pixels = whole and data.image_shape is not None and most < 255.5
    unit = bool(data.train.min() >= 0 and data.train.max() <= 1)
    return _Values(binary, whole, pixels, unit, _dispersion(data) if whole else math.nan)


def _dispersion(data: Dataset) -> float:
    """Sum of squares about the rates that a row's total and a column's mean give, over the sum of those rates."""
    own = data.restore(data.train[:_BLOCK_ROWS]).round()
    totals, means = own.sum(axis=1, keepdims=True), own.mean(axis=0)
    rates = totals / max(totals.mean(), 1) * means
    return float(((own - rates) ** 2).sum() / max(rates.sum(), 1))


# ---- scaling and binarising


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        yield slice(start, start + _BLOCK_ROWS)


def _range_of(train: np.ndarray, per_column: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, X) -> the least and the greatest value, each (X,) float64: of each column, or one pair for all."""
    axis = 0 if per_column else None
    low, high = (np.broadcast_to(edge, train.shape[1:]) for edge in (train.min(axis), train.max(axis)))
    return low.astype(np.float64), high.astype(np.float64)


def _moments_of(train: np.ndarray, per_column: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, X) -> mean and standard deviation, likewise; those of what is constant are its value and 1."""
    axis = 0 if per_column else None
    low, high = _range_of(train, per_column)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond 1e154 or so: told by _check_float32
        mean = np.where(high > low, np.broadcast_to(train.mean(axis, dtype=np.float64), low.shape), low)
        variance = np.zeros_like(mean)
        for block in _blocks(len(train)):
            squares = (train[block] - mean) ** 2
            variance += (squares.sum(axis=0) if per_column else squares.sum() / train.shape[1]) / len(train)
    return mean, np.where((high > low) & (variance > 0), np.sqrt(variance), 1.0)


def _binarize(grey: list[np.ndarray], config: DataConfig) -> list[np.ndarray]:
    """Training, validation and test rows -> the same, as DataConfig.binarize says."""
    if config.binarize == "none":
        return grey
    if config.binarize == "threshold":
        return [(rows > 0.5).astype(np.float32) for rows in grey]
    train, validation, test = grey
    return [
        train if config.binarize == "dynamic" else bernoulli(train, generator_of(config.seed, _TRAIN_STREAM)),
        bernoulli(validation, generator_of(config.seed, VALIDATION_STREAM)),
        bernoulli(test, generator_of(config.seed, _TEST_STREAM)),
    ]


def bernoulli(grey: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """grey (...) in [0, 1] -> float32 zeros and ones drawn with these probabilities."""
    return (generator.random(grey.shape, dtype=np.float32) < grey).astype(np.float32)


def generator_of(seed: int, stream: int) -> np.random.Generator:
    """That of one use of a seed, independent of its other uses."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))
