"""Answers on paper: the same rows as text, JSON, CSV and Parquet, and no value is taken for markup."""

import csv
import io
import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search.output import write_rows, write_table
from search.results import write_study_file
from search.spec import StudySpec
from search.sql import query, query_rows
from vae.config import InputError

TABLE = pa.table(
    {
        "study": ["digits", "[bold]faces[/bold]", None],
        "val_nelbo": [88.25, 1 / 3, None],
        "trial": pa.array([0, 1, 2], pa.int32()),
        "hidden_dims": pa.array([[128, 64], [], None], pa.list_(pa.int32())),
        "at": pa.array([datetime(2026, 3, 1, 12, tzinfo=UTC)] * 3, pa.timestamp("us", tz="UTC")),
    }
)

PROVENANCE = {"created_at": datetime(2026, 3, 1, tzinfo=UTC), "data_fingerprint": "f00"}


def written(table: pa.Table, format: str, tmp_path: Path) -> bytes:
    path = tmp_path / f"out.{format}"
    write_table(table, format, path)
    return path.read_bytes()


def csv_of(table: pa.Table, tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written(table, "csv", tmp_path).decode())))


def strict_json(content: bytes) -> list[dict[str, object]]:
    """As a strict parser reads it: NaN and Infinity are not JSON."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return json.loads(content, parse_constant=refuse)


def test_text_has_a_line_a_row_with_blanks_for_unknown_values(tmp_path):
    lines = written(TABLE, "table", tmp_path).decode().splitlines()
    assert [name for name in TABLE.column_names if name not in lines[0] + lines[1]] == []
    filled = [line for line in lines if line.strip()]
    assert len(filled) == 2 + TABLE.num_rows  # names and rule
    assert "88.25" in filled[2]
    assert "[128, 64]" in filled[2]
    assert "0.333333" in filled[3]
    assert "None" not in filled[4]


NUMBERS = ["7::UTINYINT", "7::UHUGEINT", "1.5::FLOAT", "7.25::DECIMAL(9, 2)", "sum(7)"]
OTHERS = ["true", "'7'", "[7]", "DATE '2026-03-01'"]


@pytest.mark.parametrize("value", NUMBERS + OTHERS)
def test_numbers_of_any_type_stand_to_the_right_whoever_decoded_them(value, tmp_path):
    (tmp_path / "s").mkdir()
    write_study_file(tmp_path / "s", StudySpec(name="s"), PROVENANCE)
    sql = f"SELECT {value} AS the_name_of_the_column"
    write_rows(query_rows(sql, tmp_path), tmp_path / "rows.txt")
    text = (tmp_path / "rows.txt").read_text()
    assert written(query(sql, tmp_path), "table", tmp_path).decode() == text
    name, _, cell = text.splitlines()
    assert cell.startswith(" ") == (len(cell) == len(name)) == (value in NUMBERS)


def test_markup_in_a_value_or_a_name_is_shown_as_it_is(tmp_path):
    table = pa.table({"[red]x[/red]": ["[bold]b[/bold]", "[/]", "[link=file:///etc/passwd]y[/link]"]})
    text = written(table, "table", tmp_path).decode()
    for value in ("[red]x[/red]", "[bold]b[/bold]", "[/]", "[link=file:///etc/passwd]y[/link]"):
        assert value in text
    assert "\x1b" not in text


def test_a_name_between_colons_is_shown_as_it_is(tmp_path):
    assert ":smile:" in written(pa.table({"reason": [":smile:"]}), "table", tmp_path).decode()


def test_long_text_stays_on_its_line_where_there_is_no_terminal(tmp_path):
    text = written(pa.table({"reason": ["x" * 400], "trial": [7]}), "table", tmp_path).decode()
    assert any("x" * 400 in line and line.rstrip().endswith("7") for line in text.splitlines())


def test_an_empty_answer_has_its_columns(tmp_path):
    empty = TABLE.slice(0, 0)
    assert "val_nelbo" in written(empty, "table", tmp_path).decode()
    assert strict_json(written(empty, "json", tmp_path)) == []
    assert written(empty, "csv", tmp_path).decode().strip().replace('"', "") == ",".join(TABLE.column_names)


def test_json_has_an_object_a_row_with_full_precision(tmp_path):
    rows = strict_json(written(TABLE, "json", tmp_path))
    assert [row["val_nelbo"] for row in rows] == [88.25, 1 / 3, None]
    assert [row["hidden_dims"] for row in rows] == [[128, 64], [], None]
    assert [row["trial"] for row in rows] == [0, 1, 2]
    assert datetime.fromisoformat(str(rows[0]["at"])) == datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_csv_has_lists_as_json_full_precision_and_nothing_for_unknown(tmp_path):
    rows = csv_of(TABLE, tmp_path)
    assert [row["study"] for row in rows] == ["digits", "[bold]faces[/bold]", ""]
    assert [row["hidden_dims"] for row in rows] == ["[128, 64]", "[]", ""]
    assert float(rows[1]["val_nelbo"]) == 1 / 3
    assert rows[2]["val_nelbo"] == ""


def test_csv_quotes_what_would_break_a_line(tmp_path):
    values = ["a,b", 'say "x"', "two\nlines", "ünïcode"]
    assert [row["reason"] for row in csv_of(pa.table({"reason": values}), tmp_path)] == values


def test_parquet_is_the_table_itself(tmp_path):
    written(TABLE, "parquet", tmp_path)
    assert pq.read_table(tmp_path / "out.parquet").equals(TABLE)


@pytest.mark.parametrize("format", ["table", "json", "csv", "parquet"])
def test_stdout_gets_the_same_bytes_as_a_file(format, tmp_path, capfdbinary):
    write_table(TABLE, format, None)
    assert capfdbinary.readouterr().out == written(TABLE, format, tmp_path)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError) as caught:
        write_table(TABLE, "xlsx", tmp_path / "x")
    assert all(word in str(caught.value) for word in ("xlsx", "table", "json", "csv", "parquet"))
    assert list(tmp_path.iterdir()) == []


def test_parquet_is_refused_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="-o"):
        write_table(TABLE, "parquet", None)


@pytest.mark.parametrize("place", ["missing/out.csv", "file/out.csv", "."])
def test_a_place_that_cannot_be_written_is_refused_by_its_name(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write_table(TABLE, "csv", tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


def test_a_full_disk_is_an_input_error_that_names_it():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(InputError, match="/dev/full"):
        write_table(TABLE, "json", Path("/dev/full"))


def test_json_of_a_figure_that_is_not_finite_is_still_json(tmp_path):
    strict_json(written(pa.table({"v": [float("nan"), float("inf")]}), "json", tmp_path))


def test_json_of_a_sum_of_whole_numbers_is_a_number(tmp_path):
    table = pa.table({"sum(epochs)": pa.array([Decimal(123)], pa.decimal128(38, 0))})
    assert strict_json(written(table, "json", tmp_path)) == [{"sum(epochs)": 123}]


def test_csv_of_a_list_of_times_has_a_cell_a_list(tmp_path):
    times = pa.array([[datetime(2026, 3, 1, tzinfo=UTC)]], pa.list_(pa.timestamp("us", tz="UTC")))
    (row,) = csv_of(pa.table({"list(suggested_at)": times}), tmp_path)
    assert "2026-03-01" in row["list(suggested_at)"]


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_the_time_a_trial_took_can_be_written(format, tmp_path):
    took = pa.array([pa.MonthDayNano([0, 0, 90_000_000_000])])
    assert written(pa.table({"ended_at - suggested_at": took}), format, tmp_path)
