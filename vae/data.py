"""Sources of data -> `Dataset`: rows in [0, 1], split into training, validation and test, and binarised.

Nothing is ever downloaded. Every random choice has a stream of its own under `DataConfig.seed`, so that the
validation and test rows are the same bits whether the training rows are binarised once or at every batch.
"""

import csv
import difflib
import gzip
import hashlib
import importlib.util
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vae.config import DataConfig, InputError

FILE_SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
DATA_DIR_VARIABLE = "VAESEARCH_DATA_DIR"
SYSTEM_DATASETS = Path("/usr/share/datasets")  # where Debian's dataset-* packages put theirs

IDX_SOURCES = {  # name -> how to get it
    "mnist": "put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    "t10k-labels-idx1-ubyte.gz into one folder and name it with data.data_dir; "
    "they are served at https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "apt-get install dataset-fashion-mnist, or name their folder with data.data_dir",
}
SOURCES = ("digits", *IDX_SOURCES)

_IDX3_UBYTE = 0x00000803  # the magic number: unsigned bytes, three dimensions
_GZIP_MAGIC = b"\x1f\x8b"
_NPZ_PAIRS = [(f"{x}train{y}", f"{x}test{y}") for x, y in (("x_", ""), ("X_", ""), ("", ""), ("", "_images"))]
_CHANNELS = ((), (1,), (3,), (4,))
_IMAGE_ARRAYS = "(rows, height, width) or (rows, height, width, channels)"
_BLOCK_ROWS = 4096  # rows worked on at once where a temporary is needed: bounds memory, changes no result
_CSV_BLOCK_BYTES = 64 * 2**20  # a line must not span three; Arrow's own 1 MiB refuses very wide tables
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
    source = _read_source(config)
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
        files, where, what = _find_idx(name, data_dir), None, ""
        if files is not None:
            where = str(files[0].parent)
            try:
                with (
                    _open_idx(files[0]) as ((rows, height, width), _),
                    _open_idx(files[1]) as ((more, *_), _),
                ):
                    what = f"{rows:,} + {more:,} images of {height} x {width}"
            except InputError as error:
                what = str(error)
        statuses.append(SourceStatus(name, files is not None, where, what, how_to_get))
    return statuses


# ---- reading


class _Source(NamedTuple):
    """What a reader hands on, before any scaling: (N, X), (N, H, W) or (N, H, W, C) of any real dtype."""

    label: str  # opens every error about it
    train: np.ndarray  # all rows, where the source has no test split of its own
    test: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    full_scale: int = 255  # what 8-bit integers are divided by under scale = auto


def _read_source(config: DataConfig) -> _Source:
    name, suffix = config.source, Path(config.source).suffix.lower()
    if name not in SOURCES and suffix not in FILE_SUFFIXES:
        raise InputError(
            f"unknown source {name!r}; known: {', '.join(SOURCES)}, "
            f"or a file ending in {', '.join(FILE_SUFFIXES)}{_nearest(name.lower(), SOURCES)}"
        )
    if config.key is not None and suffix != ".npz":
        raise InputError(f"{name}: data.key is for .npz files; leave it out")
    if config.columns is not None and suffix not in (".csv", ".parquet"):
        raise InputError(f"{name}: data.columns is for .csv and .parquet files; leave it out")
    if name == "digits":
        from sklearn.datasets import load_digits

        return _Source(name, load_digits().images.astype(np.uint8), full_scale=16)
    if name in IDX_SOURCES:
        return _read_idx_source(name, config.data_dir)
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder; give one file" if path.is_dir() else "no such file; check data.source"
        raise InputError(f"{path}: {what}")
    if suffix in (".npy", ".npz"):
        return _read_numpy(path, config.key)
    return (_read_csv if suffix == ".csv" else _read_parquet)(path, config.columns)


@contextmanager
def _reading(label: object) -> Iterator[None]:
    """Whatever a reader raises on a torn file, as one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the readers know dozens of types: zlib's, zipfile's, Arrow's, struct's, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{label}: cannot be read ({reason}); fetch or write the file again") from error


def _idx_folders(name: str, data_dir: str | None) -> list[Path]:
    """Where the idx files of a source are looked for, first to last."""
    given = [Path(base).expanduser() for base in (data_dir, os.environ.get(DATA_DIR_VARIABLE)) if base]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folders = [folder for base in given for folder in (base, base / name)]
    # The files of all idx sources are named alike: a folder that bears another source's name holds that one.
    folders = [folder for folder in folders if folder.name == name or folder.name not in IDX_SOURCES]
    return [*folders, SYSTEM_DATASETS / name, cache / "vaesearch" / name]


def _find_idx(name: str, data_dir: str | None) -> list[Path] | None:
    """The training and the test images, of the first folder that has both."""
    spellings = [f"-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for folder in _idx_folders(name, data_dir):
        found = [
            [file for spelling in spellings if (file := folder / f"{part}{spelling}").is_file()]
            for part in ("train", "t10k")
        ]
        if all(found):
            return [files[0] for files in found]
    return None


def _read_idx_source(name: str, data_dir: str | None) -> _Source:
    files = _find_idx(name, data_dir)
    if files is None:
        looked = ", ".join(str(folder) for folder in _idx_folders(name, data_dir))
        raise InputError(f"{name}: its idx files are not here; looked in {looked}\n{IDX_SOURCES[name]}")
    train, test = (_read_idx(file) for file in files)
    return _Source(name, train, test)


@contextmanager
def _open_idx(path: Path) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The shape (N, H, W) that the header tells, and the stream at the first pixel."""
    with _reading(path), path.open("rb") as file:
        # By content, not by name: browsers unpack .gz files and keep the name.
        zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if zipped else file
        magic, *shape = struct.unpack(">4I", stream.read(16))
        if magic != _IDX3_UBYTE:
            raise ValueError(f"its magic number is {magic:#010x}, that of idx images is {_IDX3_UBYTE:#010x}")
        yield tuple(shape), stream


def _read_idx(path: Path) -> np.ndarray:
    """-> (N, H, W) uint8."""
    with _open_idx(path) as (shape, stream):
        payload = stream.read()
        if len(payload) != math.prod(shape):
            raise ValueError(f"the header promises {math.prod(shape)} bytes and {len(payload)} follow")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)


def _read_numpy(path: Path, key: str | None) -> _Source:
    """An .npy file, or the array(s) of an .npz file that `key` or the usual names tell."""
    with _reading(path), path.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _Source(str(path), loaded)
        with loaded as archive:
            keys = archive.files
            pair = next((pair for pair in _NPZ_PAIRS if set(pair) <= set(keys)), None)
            if key in keys or (key is None and len(keys) == 1):
                return _Source(str(path), archive[keys[0] if key is None else key])
            if key is None and pair is not None:
                train, test = (archive[name] for name in pair)
                dtype = np.result_type(train, test)
                return _Source(str(path), train.astype(dtype, copy=False), test.astype(dtype, copy=False))
    what = "no array says that it is the data" if key is None else f"no array {key!r}{_nearest(key, keys)}"
    raise InputError(f"{path}: {what}; set data.key to one of: {', '.join(keys)}")


def _read_csv(path: Path, wanted: tuple[str, ...] | None) -> _Source:
    """Commas between fields, a header or none. Without one, columns are named by their numbers from 0."""
    from pyarrow import csv as arrow_csv

    nulls = arrow_csv.ConvertOptions().null_values
    with _reading(path):
        with path.open(encoding="utf-8-sig", newline="") as lines:
            first = next((fields for fields in csv.reader(lines) if fields), [])
        numbers = [_is_number(field) for field in first if field not in nulls]
        headerless = bool(numbers) and all(numbers)
        names = [str(i) for i in range(len(first))] if headerless else first
        chosen = _choose(path, names, wanted)
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(
                column_names=names if headerless else None,
                block_size=_CSV_BLOCK_BYTES,
            ),
            convert_options=arrow_csv.ConvertOptions(include_columns=chosen),
        )
    return _from_table(path, table)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # Python's 1_000 is a name here


def _read_parquet(path: Path, wanted: tuple[str, ...] | None) -> _Source:
    """Columns of numbers, or one column of equally long lists of numbers."""
    from pyarrow.parquet import ParquetFile  # not read_table, which imports pyarrow.dataset

    with _reading(path), ParquetFile(path) as file:
        table = file.read(columns=_choose(path, file.schema_arrow.names, wanted))
    return _from_table(path, table)


def _choose(path: Path, names: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    chosen = names if wanted is None else list(wanted)
    here, asked = Counter(names), Counter(chosen)
    for name in chosen:
        if name not in here:
            near = _nearest(name, names)
            raise InputError(f"{path}: no column {name!r} (data.columns); it has {_some(names)}{near}")
        if here[name] > 1 or asked[name] > 1:
            raise InputError(f"{path}: column {name!r} is there twice; rename one, or pick with data.columns")
    return chosen


def _from_table(path: Path, table: Any) -> _Source:
    """A pyarrow Table -> (N, X) of the columns' common dtype; null cells become NaN."""
    import pyarrow as pa
    from pyarrow import types

    def is_real(kind: Any) -> bool:
        checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
        return any(check(kind) for check in checks)

    def to_numpy(column: Any) -> np.ndarray:
        if types.is_boolean(column.type):
            column = column.cast(pa.int8())
        elif types.is_decimal(column.type) or types.is_null(column.type):
            column = column.cast(pa.float64())
        return column.to_numpy(zero_copy_only=False)

    def is_list(kind: Any) -> bool:
        checks = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        return any(check(kind) for check in checks) and is_real(kind.value_type)

    if table.num_columns == 1 and is_list(table.schema.types[0]):
        lists = table.column(0).combine_chunks()
        lengths = set(lists.value_lengths().to_pylist())
        if len(lengths) != 1 or None in lengths:
            raise InputError(f"{path}: the lists of column {table.column_names[0]!r} are not of one length")
        return _Source(str(path), to_numpy(lists.flatten()).reshape(len(lists), *lengths))

    others = [f"{f.name!r} ({f.type})" for f in table.schema if not is_real(f.type)]
    if others:
        raise InputError(f"{path}: not numeric: {_some(others)}; name the columns to use with data.columns")
    arrays = [to_numpy(column) for column in table.columns]
    rows = np.empty((table.num_rows, len(arrays)), np.result_type(*arrays) if arrays else np.int8)
    for i, array in enumerate(arrays):
        rows[:, i] = array
    return _Source(str(path), rows, columns=tuple(table.column_names))


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


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
