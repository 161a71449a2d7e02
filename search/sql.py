"""SQL over the Parquet of all studies of a storage folder: read-only, and able to reach nothing else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from search.results import Study, readable_studies
from search.storage import Location
from search.tables import SCHEMAS, read_table
from vae.config import InputError

TIME_LIMIT_S = 300.0
STUDIES = pa.schema(
    [
        ("study", pa.string()),
        ("goal", pa.string()),
        ("seed", pa.int64()),
        ("source", pa.string()),
        ("data_fingerprint", pa.string()),
        ("binarize", pa.string()),
        ("body", pa.string()),
        ("likelihood", pa.string()),
        ("train_objective", pa.string()),
        ("trials", pa.int32()),  # asked for
        ("max_epochs", pa.int32()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("path", pa.string()),
    ]
)


class QueryFailed(InputError):
    """The SQL is wrong, not allowed, or took too long. The text is duckdb's, or says what is allowed."""


def query(sql: str, storage: str | Location, time_limit_s: float = TIME_LIMIT_S) -> pa.Table:
    """The answer to one SELECT over `studies` and the tables of a study. Raises QueryFailed, InputError."""
    studies = readable_studies(storage)
    if not studies:
        raise InputError(f"{storage}: there is no study there; name the folder of your studies with --storage")
    with _connection(sql, studies) as connection:
        _check_statement(sql)
        timer = threading.Timer(time_limit_s, connection.interrupt)
        timer.start()
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.InterruptException:
            raise QueryFailed(f"the query took longer than {time_limit_s:g} s and was stopped") from None
        except duckdb.Error as error:
            raise QueryFailed(str(error).strip()) from None
        finally:
            timer.cancel()


def _check_statement(sql: str) -> None:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryFailed(str(error).strip()) from None
    allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(statements) != 1 or statements[0].type not in allowed:
        raise QueryFailed("one SELECT (or EXPLAIN) at a time: the results are read-only")


@contextmanager
def _connection(sql: str, studies: list[Study]) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that sees the views and, from then on, no file and no network."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "temp_directory": "",
    }
    connection = duckdb.connect(":memory:", config=config)
    try:
        connection.register("studies", _studies_table(studies))
        for table, schema in SCHEMAS.items():
            # Read whole, once: a view over the files would open them again for every mention, and a part that
            # was replaced in between spoils the query. A table that the SQL does not name is not read.
            named = studies if table in sql.lower() else []
            tables = [schema.empty_table(), *(read_table(study.path, table) for study in named)]
            connection.register(table, pa.concat_tables(tables))
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection
    finally:
        connection.close()


def _studies_table(studies: list[Study]) -> pa.Table:
    return pa.Table.from_pylist([_study_row(study) for study in studies], schema=STUDIES)


def _study_row(study: Study) -> dict[str, Any]:
    spec, provenance = study.spec, study.provenance
    return {
        "study": study.name,
        "goal": spec.goal,
        "seed": spec.seed,
        "source": spec.data.source,
        "data_fingerprint": provenance["data_fingerprint"],
        "binarize": spec.data.binarize,
        "body": spec.model.body,
        "likelihood": spec.model.likelihood,
        "train_objective": spec.train.objective,
        "trials": spec.budget.trials,
        "max_epochs": spec.budget.max_epochs,
        "created_at": provenance["created_at"],
        "path": str(study.path),
    }
