"""The files behind a source -> arrays of numbers as they stand there: sets known by name, .npy, .npz, .csv, .parquet.

Nothing is ever downloaded; what is missing is an InputError that says where it was looked for and how to get it.
"""

import csv
import difflib
import gzip
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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
HOW_TO_GET_DIGITS = "pip install scikit-learn"
SOURCES = ("digits", *IDX_SOURCES)

_IDX3_UBYTE = 0x00000803  # the magic number: unsigned bytes, three dimensions
_GZIP_MAGIC = b"\x1f\x8b"
_NPZ_PAIRS = [(f"{x}train{y}", f"{x}test{y}") for x, y in (("x_", ""), ("X_", ""), ("", ""), ("", "_images"))]
_CSV_BLOCK_BYTES = 64 * 2**20  # a line must not span three; Arrow's own 1 MiB refuses very wide tables


class Source(NamedTuple):
    """What a reader hands on, before any scaling: (N, X), (N, H, W) or (N, H, W, C) of any real dtype."""

    label: str  # opens every error about it
    train: np.ndarray  # all rows, where the source has no test split of its own
    test: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    full_scale: int = 255  # what 8-bit integers are divided by under scale = auto


def read_source(config: DataConfig) -> Source:
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
        return Source(name, _read_digits(), full_scale=16)
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


def find_digits() -> Path | None:
    """Where scikit-learn is, which is not imported for it."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _read_digits() -> np.ndarray:
    """(1797, 8, 8), 0 to 16. From scikit-learn's file of them, whose last column is the label: to import scikit-learn
    takes two seconds."""
    path = find_digits()
    if path is None:
        raise InputError(f"digits: scikit-learn, which ships them, is not there; {HOW_TO_GET_DIGITS}")
    with _reading(path):
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)[:, :-1].reshape(-1, 8, 8)


def _idx_folders(name: str, data_dir: str | None) -> list[Path]:
    """Where the idx files of a source are looked for, first to last."""
    given = [Path(base).expanduser() for base in (data_dir, os.environ.get(DATA_DIR_VARIABLE)) if base]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folders = [folder for base in given for folder in (base, base / name)]
    # The files of all idx sources are named alike: a folder that bears another source's name holds that one.
    folders = [folder for folder in folders if folder.name == name or folder.name not in IDX_SOURCES]
    return [*folders, SYSTEM_DATASETS / name, cache / "vaesearch" / name]


def find_idx(name: str, data_dir: str | None) -> list[Path] | None:
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


def _read_idx_source(name: str, data_dir: str | None) -> Source:
    files = find_idx(name, data_dir)
    if files is None:
        looked = ", ".join(str(folder) for folder in _idx_folders(name, data_dir))
        raise InputError(f"{name}: its idx files are not here; looked in {looked}\n{IDX_SOURCES[name]}")
    train, test = (_read_idx(file) for file in files)
    return Source(name, train, test)


@contextmanager
def open_idx(path: Path) -> Iterator[tuple[tuple[int, ...], Any]]:
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
    with open_idx(path) as (shape, stream):
        payload = stream.read()
        if len(payload) != math.prod(shape):
            raise ValueError(f"the header promises {math.prod(shape)} bytes and {len(payload)} follow")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)


def _read_numpy(path: Path, key: str | None) -> Source:
    """An .npy file, or the array(s) of an .npz file that `key` or the usual names tell."""
    with _reading(path), path.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return Source(str(path), loaded)
        with loaded as archive:
            keys = archive.files
            pair = next((pair for pair in _NPZ_PAIRS if set(pair) <= set(keys)), None)
            if key in keys or (key is None and len(keys) == 1):
                return Source(str(path), archive[keys[0] if key is None else key])
            if key is None and pair is not None:
                train, test = (archive[name] for name in pair)
                dtype = np.result_type(train, test)
                return Source(str(path), train.astype(dtype, copy=False), test.astype(dtype, copy=False))
    what = "no array says that it is the data" if key is None else f"no array {key!r}{_nearest(key, keys)}"
    raise InputError(f"{path}: {what}; set data.key to one of: {', '.join(keys)}")


def _read_csv(path: Path, wanted: tuple[str, ...] | None) -> Source:
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


def _read_parquet(path: Path, wanted: tuple[str, ...] | None) -> Source:
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


def _from_table(path: Path, table: Any) -> Source:
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
        return Source(str(path), to_numpy(lists.flatten()).reshape(len(lists), *lengths))

    if table.num_columns == 1 and (found := [mark for mark in ";\t|" if mark in table.column_names[0]]):
        raise InputError(f"{path}: its fields seem to be separated by {found[0]!r}; write them with commas")
    others = [f"{f.name!r} ({f.type})" for f in table.schema if not is_real(f.type)]
    if others:
        raise InputError(f"{path}: not numeric: {_some(others)}; name the columns to use with data.columns")
    arrays = [to_numpy(column) for column in table.columns]
    rows = np.empty((table.num_rows, len(arrays)), np.result_type(*arrays) if arrays else np.int8)
    for i, array in enumerate(arrays):
        rows[:, i] = array
    return Source(str(path), rows, columns=tuple(table.column_names))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
