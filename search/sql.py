"""SQL over the Parquet of all studies of a storage folder: read-only, and able to reach nothing else.

A query sees each part as it was at one moment: parts are replaced while a study runs, and duckdb opens a file by its
name again for every mention. So each is read here, once. Most often duckdb is given copies in memory that nobody can
change (what it may read it may write, too: duckdb 2.0, COPY within a CTE), and decodes the columns that it needs. Where
that does not do (a part is damaged, another version wrote it, a table has no part yet, the SQL asks for `studies`,
speaks of files or is wrong), the tables are read whole and decoded by pyarrow, as everywhere else; that takes longer,
and tells what is the matter.
"""

import fcntl
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from search.layout import DEFAULT_STORAGE, SCHEMA_VERSION, TABLES, part_files, study_folders
from search.storage import Location, RemotePath, location
from vae.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

T = TypeVar("T")
Take = Callable[[duckdb.DuckDBPyRelation], T]
"""What is to be had of an answer."""

TIME_LIMIT_S = 300.0
ELSEWHERE = ("studies", "parquet", "read_", "glob")
"""SQL with one of these asks for no table of a study alone, or by the names of files."""


class QueryFailed(InputError):
    """The SQL is wrong, not allowed, or took too long. The text is duckdb's, or says what is allowed."""


@dataclass(frozen=True)
class Rows:
    """An answer in Python's own types."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


def query(sql: str, storage: str | Location = DEFAULT_STORAGE, time_limit_s: float = TIME_LIMIT_S) -> "pa.Table":
    """The answer to one SELECT over `studies` and the tables of a study. Raises QueryFailed, InputError."""
    return _answer(sql, storage, time_limit_s, lambda relation: relation.to_arrow_table())


def query_rows(sql: str, storage: str | Location, time_limit_s: float = TIME_LIMIT_S) -> Rows:
    """As `query`, for whoever does well without pyarrow, which takes longer to load than many a query."""
    return _answer(sql, storage, time_limit_s, lambda relation: Rows(list(relation.columns), relation.fetchall()))


def _answer(sql: str, storage: str | Location, time_limit_s: float, take: Take[T]) -> T:
    folders = study_folders(location(storage))
    if not folders:
        raise InputError(f"{storage}: there is no study there; name the folder of your studies with --storage")
    _check_statement(sql)
    try:
        with _over_parts(sql, folders) as connection:
            if connection is not None:
                return _within(time_limit_s, connection, sql, take)
    except (duckdb.Error, OSError) as error:
        log.debug("not by the parts alone: %s", error)
    with _over_tables(sql, storage) as connection:
        try:
            return _within(time_limit_s, connection, sql, take)
        except duckdb.Error as error:
            raise QueryFailed(str(error).strip()) from None


def _within(time_limit_s: float, connection: duckdb.DuckDBPyConnection, sql: str, take: Take[T]) -> T:
    timer = threading.Timer(time_limit_s, connection.interrupt)
    timer.start()
    try:
        return take(connection.sql(sql))
    except duckdb.InterruptException:
        raise QueryFailed(f"the query took longer than {time_limit_s:g} s and was stopped") from None
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # duckdb's (2.0) word for a Ctrl-C
            raise KeyboardInterrupt from None
        raise
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
def _over_parts(sql: str, folders: list[Location]) -> Iterator[duckdb.DuckDBPyConnection | None]:
    """A database over the parts as they are now; None where that does not do."""
    parts = {table: [part for folder in folders for part in part_files(folder, table)] for table in _named(sql)}
    is_elsewhere = any(word in sql.lower() for word in ELSEWHERE)
    if is_elsewhere or not parts or not all(parts.values()) or sys.platform != "linux":
        yield None
        return
    with ExitStack() as stack:
        opened = {table: [stack.enter_context(_opened(part)) for part in its] for table, its in parts.items()}
        connection = stack.enter_context(_connection())
        everything = [path for paths in opened.values() for path in paths]
        connection.execute(f"SET allowed_paths = {everything}")
        _shut(connection)
        for table, paths in opened.items():
            connection.execute(f"CREATE VIEW {table} AS FROM read_parquet({paths})")
        versions = connection.execute(
            "SELECT DISTINCT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'vaesearch.schema_version'",
            [everything],
        ).fetchall()
        yield connection if versions == [(SCHEMA_VERSION,)] else None


@contextmanager
def _opened(part: Location) -> Iterator[str]:
    """A name for a part's present content, which can be read and not be written. On Linux alone."""
    file = os.memfd_create(part.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if isinstance(part, RemotePath):
            with open(file, "wb", closefd=False) as copy:
                copy.write(part.read_bytes())
        else:
            with open(part, "rb") as source:
                done, size = 0, os.fstat(source.fileno()).st_size
                while done < size:
                    done += os.sendfile(file, source.fileno(), done, size - done)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


@contextmanager
def _over_tables(sql: str, storage: str | Location) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database over all tables, decoded; those that the SQL does not name are empty."""
    import pyarrow as pa

    from search.results import readable_studies
    from search.studies_table import studies_table
    from search.tables import SCHEMAS, read_table

    studies, named = readable_studies(storage), _named(sql)
    with _connection() as connection:
        connection.register("studies", studies_table(studies))
        for table, schema in SCHEMAS.items():
            tables = [read_table(study.path, table) for study in studies] if table in named else []
            connection.register(table, pa.concat_tables([schema.empty_table(), *tables]))
        _shut(connection)
        yield connection


def _named(sql: str) -> list[str]:
    return [table for table in TABLES if table in sql.lower()]


@contextmanager
def _connection() -> Iterator[duckdb.DuckDBPyConnection]:
    config: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "temp_directory": "",
    }
    connection = duckdb.connect(":memory:", config=config)
    try:
        yield connection
    finally:
        connection.close()


def _shut(connection: duckdb.DuckDBPyConnection) -> None:
    """From now on it sees no file but those that are allowed, and no network."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
