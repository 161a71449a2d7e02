"""What `vaesearch` begins with.

A query in its plain form is answered from here: typer, and pydantic which typer (0.29) loads to read any option, take
as long to import as duckdb needs for a million rows. All else is `search.cli`'s, errors of a query too.
"""

import os
import sys

from search.layout import DEFAULT_STORAGE


def main() -> None:
    """The command."""
    match sys.argv[1:]:
        case ["query", sql] if not sql.startswith("-"):
            is_done = _answered(sql, os.environ.get("VAESEARCH_STORAGE") or DEFAULT_STORAGE)
        case ["query", sql, "--storage", storage] if not sql.startswith("-"):
            is_done = _answered(sql, storage)
        case _:
            is_done = False
    if not is_done:
        from search.cli import main as others

        others()


def _answered(sql: str, storage: str) -> bool:
    """Whether it could be; if not, whoever tries again tells why."""
    from search.output import write_rows
    from search.sql import query_rows

    try:
        write_rows(query_rows(sql, storage), None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        return False
    return True
