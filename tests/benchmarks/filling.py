"""A table of trained models that is made in several processes, and gone on with where it was stopped."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def fill(
    table: Path,
    schema: pa.Schema,
    key: Sequence[str],
    wanted: Sequence[dict[str, Any]],
    train: Callable[..., dict[str, Any]],
    *,
    write_every: int,
    processes: int | None = None,
) -> None:
    """Train what is missing of `wanted`, each told by its columns of `key`, in whose order the rows are kept.

    train: called with one of `wanted` as keywords; gives a row. processes: as many as there are cores.
    """

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in key)

    rows = pq.read_table(table, schema=schema).to_pylist() if table.exists() else []
    known = set(map(place, rows))
    missing = [config for config in wanted if place(config) not in known]
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:
        for done, future in enumerate(as_completed([pool.submit(train, **config) for config in missing]), start=1):
            rows.append(future.result())
            if done % write_every == 0 or done == len(missing):
                rows.sort(key=place)
                beside = table.with_suffix(".tmp")
                pq.write_table(pa.Table.from_pylist(rows, schema=schema), beside, compression="zstd")
                beside.replace(table)
                print(f"{done} of {len(missing)}", flush=True)
