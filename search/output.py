"""A table of results as text for people, or as JSON, CSV or Parquet for programs."""

import io
import json
import sys
from pathlib import Path
from typing import Literal, get_args

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
    Console(file=target, highlight=False, width=width, markup=False).print(shown)
    return "\n".join(line.rstrip() for line in target.getvalue().strip("\n").splitlines()).encode() + b"\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_json(table: pa.Table) -> bytes:
    return json.dumps(table.to_pylist(), indent=2, default=str).encode() + b"\n"


def _as_csv(table: pa.Table) -> bytes:
    import pyarrow.csv

    flat = table
    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):  # CSV has no lists
            texts = pa.array([None if v is None else json.dumps(v) for v in table.column(index).to_pylist()])
            flat = flat.set_column(index, field.name, texts)
    sink = io.BytesIO()
    pyarrow.csv.write_csv(flat, sink)
    return sink.getvalue()


def _as_parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


_ENCODERS = {"table": _as_text, "json": _as_json, "csv": _as_csv, "parquet": _as_parquet}
