"""A table of results as text for people, or as JSON, CSV or Parquet for programs."""

import io
import json
import math
import sys
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from vae.config import InputError

Format = Literal["table", "json", "csv", "parquet"]


def write_table(table: pa.Table, format: str, output: Path | None) -> None:
    """Write to a file, or to stdout. Raises InputError for an unknown format and for Parquet on a terminal."""
    if format not in get_args(Format):
        raise InputError(f"--format {format}: known are {', '.join(get_args(Format))}")
    if format == "parquet" and output is None and sys.stdout.isatty():
        raise InputError("Parquet is not for a terminal; name a file with -o")
    content = _ENCODERS[format](table)
    if output is None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None


def _as_text(table: pa.Table) -> bytes:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE, pad_edge=False)
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        shown.add_column(field.name, justify="right" if number else "left", overflow="fold")
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        shown.add_row(*(_cell(value) for value in row))
    target = io.StringIO()
    width = None if sys.stdout.isatty() else 1000
    Console(file=target, highlight=False, width=width, markup=False, emoji=False).print(shown)
    return "\n".join(line.rstrip() for line in target.getvalue().strip("\n").splitlines()).encode() + b"\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_json(table: pa.Table) -> bytes:
    return json.dumps(plain(table.to_pylist()), indent=2, allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    """The value in JSON's terms: numbers stay numbers, NaN and infinities become null, the rest text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _as_csv(table: pa.Table) -> bytes:
    import pyarrow.csv

    sink = io.BytesIO()
    pyarrow.csv.write_csv(_with_text(table, pa.types.is_nested, pa.types.is_interval), sink)
    return sink.getvalue()


def _as_parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(_with_text(table, pa.types.is_interval), sink, compression="zstd")
    return sink.getvalue()


def _with_text(table: pa.Table, *kinds: Callable[[pa.DataType], bool]) -> pa.Table:
    """Columns of types that a format does not have, as text: lists as JSON, intervals as Python writes them."""
    for index, field in enumerate(table.schema):
        if any(is_kind(field.type) for is_kind in kinds):
            values = (plain(value) for value in table.column(index).to_pylist())
            texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table


_ENCODERS = {"table": _as_text, "json": _as_json, "csv": _as_csv, "parquet": _as_parquet}
