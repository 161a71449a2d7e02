"""What `vaesearch` begins with.

A query in its plain form is answered from here: typer, and pydantic which typer (0.29) loads to read any option, take
as long to import as duckdb needs for a million rows. All else is `search.cli`'s.
"""

import os
import signal
import sys

from search.layout import DEFAULT_STORAGE
from search.status import end_with_status


def main() -> None:
    """The command."""
    match sys.argv[1:]:
        case ["query", sql] if not sql.startswith("-"):
            storage = os.environ.get("VAESEARCH_STORAGE") or DEFAULT_STORAGE
        case ["query", sql, "--storage", storage] if not sql.startswith("-"):
            pass
        case _:
            try:
                from search.cli import main as others
            except KeyboardInterrupt:  # before anybody listens for it
                sys.exit(128 + signal.SIGINT)
            others()
    end_with_status(lambda: _query(sql, storage))


def _query(sql: str, storage: str) -> None:
    from search.output import write_rows
    from search.sql import query_rows

    write_rows(query_rows(sql, storage), None)
