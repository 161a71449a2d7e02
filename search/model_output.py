"""What a trained model gives, as a picture, an array or a table. Light until something is written.

All goes beside its file first: one that was there is replaced as a whole, or not at all.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, get_args

from vae.config import SUPPORTS, InputError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from vae.loaded import Model

ValuesFormat = Literal["png", "npy", "csv", "parquet"]
LatentsFormat = Literal["parquet", "csv", "npy"]
VALUES_FORMATS: tuple[ValuesFormat, ...] = get_args(ValuesFormat)
LATENTS_FORMATS: tuple[LatentsFormat, ...] = get_args(LatentsFormat)

ROW = "row"
"""The column that tells which row of the data a line is about."""

GRID_COLUMNS = 8

# Shapes: N rows, X input features.


@dataclass(frozen=True, slots=True)
class Written:
    """What a command tells of its output."""

    path: str | None  # None: stdout
    rows: int
    columns: tuple[str, ...]  # of a table; () for pictures and arrays


def output_format(output: Path | None, known: Sequence[str] = VALUES_FORMATS, flag: str = "-o") -> str:
    """By the suffix; CSV for stdout. Raises InputError for one that is not known and for a folder that is not there."""
    if output is None:
        return "csv"
    format = output.suffix.lower().lstrip(".")
    if format not in known:
        raise InputError(f"{flag} {output}: a file ending in {', '.join(f'.{name}' for name in known)} is expected")
    if output.is_dir() or not output.absolute().parent.is_dir():
        what = f"{output.parent} is no folder" if not output.is_dir() else "it is a folder"
        raise InputError(f"{output}: cannot be written: {what}")
    return format


def check_output(model: "Model", output: Path | None) -> None:
    """Raises InputError for a picture of what is no image, and for images on stdout."""
    if output is None and model.image_shape is not None:
        raise InputError("images go into a file: -o grid.png, or .npy, .csv or .parquet for their values")
    if output is not None and output.suffix.lower() == ".png" and model.image_shape is None:
        raise InputError(f"{output}: the model is of a table, not of images; use .csv or .parquet")


def check_picture(model: "Model", output: Path | None, num_images: int) -> None:
    """Before they are computed: raises InputError for a picture of more images than one can hold."""
    if output is not None and output.suffix.lower() == ".png":
        from vae.images import grid_size

        num_images = max(num_images, 1)  # none at all is refused elsewhere
        grid_size(num_images, model.input_dim, model.image_shape, grid_columns(num_images))


def write_values(
    model: "Model",
    values: "np.ndarray",
    output: Path | None,
    *,
    beside: "Mapping[str, np.ndarray] | None" = None,
    originals: "np.ndarray | None" = None,
    columns: int = GRID_COLUMNS,
    labels: Sequence[str] = (),
) -> Written:
    """values (N, X) in the data's own units -> a picture, an array (N, X) or (N, H, W[, C]), or a table.

    output: its suffix says which; None is CSV on stdout. beside: columns of a table, each (N,), that come first; an
    underscore is added to one whose name the data have, too. originals (N, X): a picture shows them above the values.
    columns, labels: of a picture, as in `vae.images.save_grid`. Raises InputError for what cannot be written.
    """
    check_output(model, output)
    format = output_format(output)
    if format in ("csv", "parquet"):
        return write_columns(_table(model, values, beside or {}), output)
    assert output is not None
    with _replacing(output) as file:
        if format == "png":
            _draw(model, values, originals, file, columns, labels)
        else:
            _save_array(file, values.reshape(len(values), *(model.image_shape or (model.input_dim,))))
    return Written(str(output), len(values), ())


def write_columns(table: "pa.Table", output: Path | None) -> Written:
    """A table of latents as .parquet or .csv, or but for its `row` as an array, .npy: (N, Z) of draws, (N, 2 Z) of mu
    beside logvar. None: CSV on stdout."""
    format = output_format(output, LATENTS_FORMATS)
    if output is None:
        from search.output import write_table

        write_table(table, "csv", None)
        return Written(None, table.num_rows, tuple(table.column_names))
    with _replacing(output) as file:
        if format == "npy":
            import numpy as np

            table = table.select([name for name in table.column_names if name != ROW])
            _save_array(file, np.column_stack([column.to_numpy() for column in table.columns]))
        else:
            _save_table(file, table, format)
    return Written(str(output), table.num_rows, tuple(table.column_names))


def grid_columns(num_images: int) -> int:
    """Of a picture of so many images: a line of eight, or more where that makes it square."""
    return max(GRID_COLUMNS, math.isqrt(max(num_images - 1, 0)) + 1)


def gives_classes(model: "Model") -> bool:
    """Whether its outputs are above or below a threshold, and no place on the data's own scale."""
    data = model.config.get("data") or {}
    return bool((data.get("config") or {}).get("binarize") == "threshold")


def _save_array(file: IO[bytes], values: "np.ndarray") -> None:
    import numpy as np

    np.save(file, values)


def _save_table(file: IO[bytes], table: "pa.Table", format: str) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    if format == "csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pyarrow.parquet.write_table(table, file, compression="zstd")


def _table(model: "Model", values: "np.ndarray", beside: "Mapping[str, np.ndarray]") -> "pa.Table":
    import pyarrow as pa

    from vae.data import feature_names

    names = feature_names(model.columns, model.input_dim)
    rounded = values if values.dtype.itemsize < 8 else model.units.rounded(values)
    columns = dict(zip(names, rounded.T, strict=True))
    first = {}
    for name, column in beside.items():
        while name in columns:
            name += "_"
        first[name] = column
    return pa.table(first | columns)


def _draw(
    model: "Model",
    values: "np.ndarray",
    originals: "np.ndarray | None",
    file: IO[bytes],
    columns: int,
    labels: Sequence[str],
) -> None:
    from vae.images import save_grid, save_reconstructions

    if originals is None:
        save_grid(_shades(model, values, values), model.image_shape, file, columns, labels)
    else:
        originals = originals.reshape(values.shape).astype(values.dtype)  # as read, they may be bytes
        above, below = _shades(model, originals, originals, is_data=True), _shades(model, values, originals)
        save_reconstructions(above, below, model.image_shape, file, columns)


def _shades(model: "Model", values: "np.ndarray", reference: "np.ndarray", is_data: bool = False) -> "np.ndarray":
    """(N, X) in the data's own units -> in [0, 1], by the range of `reference` where the model knows none."""
    from vae.images import shades

    support = SUPPORTS[model.vae.config.likelihood]
    if support != "unit":
        return shades(values, reference, model.image_shape, logarithmic=support == "counts")
    return values if gives_classes(model) and not is_data else model.units.scale(values)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once all is written. Raises InputError where that cannot be."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
