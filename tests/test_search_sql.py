"""SQL over the studies: the three views answer, and nothing else on the machine can be reached or changed."""

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_search_ledger import epoch_row, start_writer, trial_row

from search import sql as sql_module
from search.ledger import Ledger
from search.results import list_studies, write_study_file
from search.spec import StudySpec
from search.sql import QueryFailed, query, query_rows
from search.studies_table import STUDIES
from search.tables import EPOCHS, TRIALS
from vae.config import InputError

VALUES = {"digits": [("relu", 90.5), ("silu", 88.25), ("relu", 89.0)], "faces": [("gelu", 300.0)]}
PROVENANCE = {"created_at": datetime(2026, 3, 1, tzinfo=UTC), "data_fingerprint": "f00"}
MADE_ANEW = pa.table({"x": [1]})  # a variable that no query may find by its name


def make_study(path: Path, values: list[tuple[str, float]], **spec: Any) -> Path:
    path.mkdir(parents=True)
    write_study_file(path, StudySpec.model_validate({"name": path.name, **spec}), PROVENANCE)
    ledger = Ledger(path)
    for number, (activation, value) in enumerate(values):
        ledger.add_epochs([epoch_row(number, epoch, study=path.name) for epoch in (1, 2)])
        ledger.end_trial(trial_row(number, study=path.name, activation=activation, val_nelbo=value))
    ledger.flush()
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    for name, values in VALUES.items():
        make_study(tmp_path / "studies" / name, values, budget={"trials": 5}, seed=3)
    return tmp_path / "studies"


def rows(sql: str, storage: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in query(sql, storage).to_pylist()]


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- answers


def test_the_statement_of_the_readme_ranks_the_activations(storage):
    sql = "SELECT activation, min(val_nelbo) FROM trials GROUP BY 1 ORDER BY 2"
    assert rows(sql, storage) == [("silu", 88.25), ("relu", 89.0), ("gelu", 300.0)]


def test_the_studies_view_has_a_row_a_study(storage):
    sql = "SELECT study, goal, seed, source, data_fingerprint, trials, created_at, path FROM studies ORDER BY 1"
    assert rows(sql, storage) == [
        (name, "best-model", 3, "digits", "f00", 5, PROVENANCE["created_at"], str(storage / name))
        for name in ("digits", "faces")
    ]


def test_the_views_span_all_studies_and_join(storage):
    assert rows("SELECT study, count(*) FROM trials GROUP BY 1 ORDER BY 1", storage) == [("digits", 3), ("faces", 1)]
    sql = """SELECT study, trial, max(epoch) FROM epochs JOIN trials USING (study, trial) JOIN studies USING (study)
             GROUP BY 1, 2 ORDER BY 1, 2"""
    assert rows(sql, storage) == [("digits", 0, 2), ("digits", 1, 2), ("digits", 2, 2), ("faces", 0, 2)]


@pytest.mark.parametrize(("view", "schema"), [("trials", TRIALS), ("epochs", EPOCHS), ("studies", STUDIES)])
def test_a_view_has_the_columns_of_its_schema(view, schema, storage):
    assert query(f"SELECT * FROM {view} LIMIT 0", storage).column_names == schema.names


@pytest.mark.parametrize(
    "sql",
    [
        "FROM trials",
        "SELECT 1;",
        "WITH best AS (SELECT min(val_nelbo) AS v FROM trials) SELECT * FROM best",
        "DESCRIBE trials",
        "SUMMARIZE trials",
        "EXPLAIN SELECT * FROM trials",
    ],
)
def test_what_only_reads_is_allowed(sql, storage):
    assert query(sql, storage).num_rows >= 1


def test_a_study_without_trials_has_its_row_and_empty_views(tmp_path):
    path = tmp_path / "new"
    path.mkdir()
    write_study_file(path, StudySpec(name="new"), PROVENANCE)
    assert rows("SELECT study FROM studies", tmp_path) == [("new",)]
    assert rows("SELECT count(*) FROM trials", tmp_path) == [(0,)]


def test_stray_files_and_half_written_parts_do_not_disturb(storage):
    for table in ("trials", "epochs"):
        folder = storage / "digits" / table
        (folder / "notes.txt").write_text("not Parquet")
        (folder / "part-00001.parquet.tmp").write_bytes(b"PAR1half")
        (folder / ".DS_Store").write_bytes(b"\x00")
    (storage / "stray").mkdir()
    (storage / "stray.toml").write_text("x = 1")
    assert rows("SELECT count(*) FROM trials", storage) == [(4,)]


def test_no_study_is_an_input_error_that_names_the_folder_and_the_flag(tmp_path):
    with pytest.raises(InputError) as caught:
        query("SELECT 1", tmp_path / "none")
    assert str(tmp_path / "none") in str(caught.value)
    assert "--storage" in str(caught.value)


# ---- refusals

FORBIDDEN = [
    "INSERT INTO trials SELECT * FROM trials",
    "UPDATE trials SET val_nelbo = 0",
    "DELETE FROM trials",
    "CREATE TABLE t (a INT)",
    "CREATE VIEW v AS SELECT 1",
    "DROP VIEW trials",
    "COPY trials TO '{outside}/out.csv'",
    "COPY (SELECT 1) TO '{outside}/out.parquet'",
    "EXPORT DATABASE '{outside}/db'",
    "ATTACH '{outside}/x.db'",
    "PRAGMA database_list",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "INSTALL httpfs",
    "LOAD httpfs",
    "CALL pragma_version()",
    "BEGIN TRANSACTION",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY trials TO '{outside}/out.csv'",
    "",
    "-- nothing",
]
UNREACHABLE = [
    "SELECT * FROM read_text('{outside}/secret.csv')",
    "SELECT * FROM read_blob('{outside}/secret.csv')",
    "SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM read_json('{outside}/secret.csv')",
    "SELECT * FROM sniff_csv('{outside}/secret.csv')",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM read_parquet('{outside}/*.parquet')",
    "SELECT * FROM read_parquet('{storage}/digits/trials/part-00000.parquet')",
    "SELECT * FROM parquet_schema('{storage}/digits/trials/part-00000.parquet')",
    "SELECT * FROM '{storage}/digits/trials/part-00000.parquet'",
    "SELECT * FROM glob('{outside}/*')",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
    "SELECT * FROM 'https://127.0.0.1:9/x.csv'",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT (SELECT content FROM read_text('{outside}/secret.csv'))",
    "SELECT * FROM query('SELECT * FROM read_text(''{outside}/secret.csv'')')",
    "EXPLAIN ANALYZE COPY trials TO '{outside}/out.csv'",
    "EXPLAIN ANALYZE SET enable_external_access = true",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
    # Python's variables, of this module, of the package and of its functions
    "SELECT * FROM MADE_ANEW",
    "SELECT * FROM made_here",
    "SELECT * FROM SCHEMAS",
    "SELECT * FROM connection",
]


@pytest.mark.parametrize("sql", FORBIDDEN)
def test_all_but_one_select_is_refused_before_it_runs(sql, storage, tmp_path):
    before = files_under(tmp_path)
    with pytest.raises(QueryFailed, match="one SELECT"):
        query(sql.format(outside=tmp_path, storage=storage), storage)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("sql", UNREACHABLE)
def test_no_file_network_or_variable_can_be_reached(sql, storage, tmp_path):
    made_here = pa.table({"x": [1]})
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    before = files_under(tmp_path)
    with pytest.raises(QueryFailed) as caught:
        query(sql.format(outside=tmp_path, storage=storage), storage)
    assert "hunter2" not in str(caught.value)
    assert files_under(tmp_path) == before
    assert made_here.num_rows == MADE_ANEW.num_rows


def test_a_query_that_would_not_end_is_stopped_by_the_time_limit(storage):
    began = time.monotonic()
    with pytest.raises(QueryFailed, match=r"0\.3 s"):
        query("SELECT sum(a.range + b.range) FROM range(10000000) a, range(10000000) b", storage, time_limit_s=0.3)
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC 1", ["SELEC"]),
        ("SELECT nonsense FROM trials", ["nonsense"]),
        ("SELECT * FROM trails", ["trails"]),
        ("SELECT val_nelbo FROM trials GROUP BY 1 HAVING", ["syntax"]),
        ("SELECT 'abc'::INT", ["abc"]),
    ],
)
def test_wrong_sql_is_told_in_duckdbs_words(sql, words, storage):
    with pytest.raises(QueryFailed) as caught:
        query(sql, storage)
    assert all(word in str(caught.value) for word in words)


# ---- alive and light


def test_a_view_joined_with_itself_answers_while_the_study_is_written(tmp_path):
    study = tmp_path / "s"
    study.mkdir()
    write_study_file(study, StudySpec(name="s"), PROVENANCE)
    writer = start_writer(study, 200, rows_a_part=20)
    try:
        while writer.poll() is None:
            sql = "SELECT count(*), count(DISTINCT trial) FROM trials JOIN trials AS t USING (trial)"
            ((count, distinct),) = rows(sql, tmp_path)
            assert count == distinct
    finally:
        writer.kill()
        writer.communicate()


def test_queries_answer_while_the_study_is_written(tmp_path):
    study = tmp_path / "s"
    study.mkdir()
    write_study_file(study, StudySpec(name="s"), PROVENANCE)
    writer, seen, polls = start_writer(study, 50, rows_a_part=20), 0, 0
    try:
        while writer.poll() is None:
            ((count, distinct),) = rows("SELECT count(*), count(DISTINCT trial) FROM trials", tmp_path)
            assert seen <= count == distinct
            seen, polls = count, polls + 1
    finally:
        writer.kill()
        writer.communicate()
    assert polls > 5


QUERY = """
import sys
from pathlib import Path
from search.sql import query
print(query("SELECT min(val_nelbo) AS v FROM trials", Path(sys.argv[1]))["v"][0])
print(*sys.modules)
"""


def test_a_query_loads_neither_torch_nor_ray_nor_optuna(storage):
    done = subprocess.run([sys.executable, "-c", QUERY, str(storage)], check=True, capture_output=True, text=True)
    answer, modules = done.stdout.splitlines()
    assert answer == "88.25"
    assert not set(modules.split()) & {"torch", "ray", "optuna", "sklearn"}


def test_a_query_says_nothing_on_stderr(storage):
    done = subprocess.run([sys.executable, "-c", QUERY, str(storage)], check=True, capture_output=True, text=True)
    assert done.stderr == ""


LIGHT = """
import sys
from pathlib import Path
from search.sql import query_rows
sql = "SELECT activation, epoch, epochs.val_nelbo FROM epochs JOIN trials USING (study, trial)"
found = query_rows(sql, Path(sys.argv[1]))
assert len(found.rows) == 8
print(*sys.modules)
"""


def test_rows_of_tables_are_had_without_pyarrow_and_pydantic(storage):
    done = subprocess.run([sys.executable, "-c", LIGHT, str(storage)], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"pyarrow", "pydantic", "numpy", "torch", "ray", "optuna", "rich"}


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM trials ORDER BY study, trial",
        "SELECT * FROM epochs JOIN trials USING (study, trial) ORDER BY study, trial, epoch",
        "SELECT t, hidden_dims, suggested_at FROM trials AS t ORDER BY study, trial",
        "DESCRIBE epochs",
    ],
)
def test_decoding_by_duckdb_and_by_pyarrow_give_one_answer(storage, sql, monkeypatch):
    quick, its_rows = query(sql, storage), query_rows(sql, storage)
    monkeypatch.setattr(sql_module, "SCHEMA_VERSION", "another")
    whole = query(sql, storage)
    assert quick.column_names == whole.column_names == its_rows.columns
    assert quick.to_pylist() == whole.to_pylist()
    assert its_rows == query_rows(sql, storage)
    monkeypatch.undo()


@pytest.mark.parametrize("cut", [4, 300])
def test_a_damaged_part_is_left_out_and_logged(storage, caplog, cut):
    """One without its footer, and one whose bytes in the middle are others."""
    (part,) = (storage / "digits" / "trials").iterdir()
    content = bytearray(part.read_bytes())
    content[-cut:] = bytes(cut) if cut == 4 else content[-cut:]
    if cut == 300:
        content[4:cut] = bytes(cut - 4)
    part.write_bytes(content)
    assert rows("SELECT min(study), min(activation), count(*) FROM trials", storage) == [("faces", "gelu", 1)]
    assert "digits" in caplog.text


def test_tables_of_another_version_are_refused(storage):
    (part,) = (storage / "digits" / "trials").iterdir()
    metadata = {b"vaesearch.schema_version": b"1"}
    pq.write_table(pq.read_table(part).replace_schema_metadata(metadata), part)
    with pytest.raises(InputError, match="version 1"):
        query("SELECT count(*) FROM trials", storage)


def test_every_connection_is_closed_and_the_next_query_starts_afresh(storage):
    with pytest.raises(QueryFailed):
        query("SELECT * FROM read_text('/etc/hostname')", storage)
    assert rows("SELECT count(*) FROM trials", storage) == [(4,)]
    make_study(storage / "more", [("elu", 1.0)])
    assert rows("SELECT count(*) FROM trials", storage) == [(5,)]
    assert [study.name for study in list_studies(storage)] == ["digits", "faces", "more"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere duckdb is given no files at all")
@pytest.mark.parametrize(
    "sql",
    [
        "EXPLAIN ANALYZE COPY (SELECT 1 AS a FROM trials) TO '/proc/self/fd/{}' (FORMAT csv, USE_TMP_FILE false)",
        "WITH t AS (COPY (SELECT 1 FROM trials) TO '/proc/self/fd/{}' (FORMAT csv, USE_TMP_FILE false)) FROM t",
    ],
)
def test_what_duckdb_may_read_it_cannot_write(storage, sql):
    before = files_under(storage)
    answer = rows("SELECT count(*) FROM trials", storage)
    for number in range(64):  # one of which is the part's
        with pytest.raises(QueryFailed):
            query_rows(sql.format(number), storage)
    assert files_under(storage) == before
    assert rows("SELECT count(*) FROM trials", storage) == answer


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere duckdb is given no files at all")
def test_a_plain_query_is_answered_by_the_parts_alone(storage, monkeypatch):
    monkeypatch.setattr(sql_module, "_over_tables", None)
    assert query_rows("SELECT count(*) FROM epochs", storage).rows == [(8,)]
    assert query_rows("SELECT count(*) FROM trials JOIN epochs USING (study, trial)", storage).rows == [(8,)]
