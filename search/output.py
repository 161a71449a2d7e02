"""A table of results as text for people, or as JSON, CSV or Parquet for programs."""

import io
import json
import math
import sys
import textwrap
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from search.sql import Rows
from search.terminal import room
from vae.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["table", "json", "csv", "parquet"]


def write_table(table: "pa.Table", format: str, output: Path | None) -> None:
    """Write to a file, or to stdout. Raises InputError for an unknown format and for Parquet on a terminal."""
    if format not in get_args(Format):
        raise InputError(f"--format {format}: known are {', '.join(get_args(Format))}")
    if format == "parquet" and output is None and sys.stdout.isatty():
        raise InputError("Parquet is not for a terminal; name a file with -o")
    _put(_ENCODERS[format](table), output)


def write_rows(rows: Rows, output: Path | None) -> None:
    """As a table for people; in a terminal that it does not fit, a line a value."""
    table, width = _as_lines(rows), room(sys.stdout) if output is None else None
    if width is not None and rows.rows and max(map(len, table.decode().split("\n"))) > width:
        table = _as_blocks(rows, width)
    _put(table, output)


def _put(content: bytes, output: Path | None) -> None:
    if output is None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None


def _as_text(table: "pa.Table") -> bytes:
    columns = (column.to_pylist() for column in table.columns)
    return _as_lines(Rows(table.column_names, list(zip(*columns, strict=True))))


def _as_lines(rows: Rows) -> bytes:
    """Numbers to the right, all else to the left; a cell of several lines takes several. Without rich: that is slow."""
    cells = [[(text.splitlines() or [""]) for text in map(_cell, row)] for row in rows.rows]
    parts = [[name] for name in rows.columns], *cells
    is_number = [all(map(_is_number, (row[at] for row in rows.rows))) for at in range(len(rows.columns))]
    widths = [max(len(line) for row in parts for line in row[at]) for at in range(len(rows.columns))]
    lines = []
    for row in parts:
        for line in zip_longest(*row, fillvalue=""):
            cut = [t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, is_number, strict=True)]
            lines.append("   ".join(cut).rstrip())
    lines.insert(1, "─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(lines).encode() + b"\n"


def _as_blocks(rows: Rows, width: int) -> bytes:
    """A line a value, below the number of its row: numbers are whole, and text is broken between words."""
    widest, lines = max(map(len, rows.columns)), []
    for number, row in enumerate(rows.rows, start=1):
        lines.append(f"── {number} ".ljust(min(width, widest + 20), "─"))
        for name, value in zip(rows.columns, row, strict=True):
            texts = _cell(value).splitlines() or [""]
            if not _is_number(value):
                texts = [line for text in texts for line in _folded(text, width - widest - 2)]
            names = [name, *[""] * (len(texts) - 1)]
            lines += [f"{name.ljust(widest)}  {text}".rstrip() for name, text in zip(names, texts, strict=True)]
    return "\n".join(lines).encode() + b"\n"


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def _is_number(value: object) -> bool:
    """Or unknown. By the values: the types are duckdb's of one answer, and Arrow's of another."""
    return value is None or (isinstance(value, int | float | Decimal) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_json(table: "pa.Table") -> bytes:
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


def _as_csv(table: "pa.Table") -> bytes:
    import pyarrow as pa
    import pyarrow.csv

    sink = io.BytesIO()
    pyarrow.csv.write_csv(_with_text(table, pa.types.is_nested, pa.types.is_interval), sink)
    return sink.getvalue()


def _as_parquet(table: "pa.Table") -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(_with_text(table, pa.types.is_interval), sink, compression="zstd")
    return sink.getvalue()


def _with_text(table: "pa.Table", *kinds: "Callable[[pa.DataType], bool]") -> "pa.Table":
    """Columns of types that a format does not have, as text: lists as JSON, intervals as Python writes them."""
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if any(is_kind(field.type) for is_kind in kinds):
            values = (plain(value) for value in table.column(index).to_pylist())
            texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table


_ENCODERS = {
    "table": _as_text,
    "json": _as_json,
    "csv": _as_csv,
    "parquet": _as_parquet,
}
