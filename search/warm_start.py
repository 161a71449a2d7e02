"""`--warm-start`: what did well before is tried first, in a study's `sampler.first`.

Configurations are taken over and not their values, which on other data, or in another budget, mean something else.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from search.layout import STUDY_FILE
from search.results import open_study, ranked
from search.space import INTEGERS
from search.spec import SpaceSpec, StudySpec, fits
from search.storage import location
from vae.config import InputError

TAKEN = 5  # configurations at the most
RANKED_BY = ("objective", "val_nelbo", "value")  # the column of a file that says which rows are best: the lowest


def warm_started(spec: StudySpec, source: str, say: Callable[[str], None] = lambda text: None) -> StudySpec:
    """`spec` with the best distinct configurations of `source` to be tried first; a study that has begun keeps its own.

    source: the name of a study in the same storage, or its folder; or a .csv or .parquet file with columns named as the
    parameters of the space, and one of RANKED_BY, without which its rows count in their order. What lies outside of the
    space is left to the sampler, which is said. Raises InputError where nothing can be taken over.
    """
    if spec.goal != "best-model":
        raise InputError(
            "--warm-start is for goal = best-model: a comparison tries the same settings with each activation"
        )
    if (spec.folder / STUDY_FILE).is_file():
        return spec
    taken: list[dict[str, Any]] = []
    left: set[str] = set()
    for params in _candidates(spec, source):
        known = {name: value for name, value in params.items() if getattr(spec.space, name) is not None}
        fitting = {name: value for name, value in known.items() if fits(getattr(spec.space, name), value)}
        left |= known.keys() - fitting.keys()
        if fitting and fitting not in taken:
            taken.append(fitting)
        if len(taken) == TAKEN:
            break
    if not taken:
        raise InputError(f"--warm-start {source}: has no configuration with a parameter that is searched here")
    say(f"{source}: its best {len(taken)} configurations are tried first")
    if left:
        say(f"{source}: values outside of the space are left to the sampler: {', '.join(sorted(left))}")
    return spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"first": tuple(taken)})})


def _candidates(spec: StudySpec, source: str) -> Iterator[dict[str, Any]]:
    """Parameters of the space, best first."""
    if Path(source).suffix.lower() in (".csv", ".parquet"):
        rows: list[Mapping[str, Any]] = list(_rows_of_file(Path(source)))
    else:
        folder = Path(source) if (Path(source) / STUDY_FILE).is_file() else location(spec.storage.path) / source
        rows = [row.params for row in ranked(open_study(folder).rows())]
    for row in rows:
        params = {name: _plain(name, row[name]) for name in SpaceSpec.model_fields if row.get(name) is not None}
        yield {name: value for name, value in params.items() if not (isinstance(value, float) and math.isnan(value))}


def _rows_of_file(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pa.csv.read_csv(file) if file.suffix.lower() == ".csv" else pa.parquet.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--warm-start {file}: cannot be read: {error}") from None
    if not set(table.column_names) & set(SpaceSpec.model_fields):
        raise InputError(f"--warm-start {file}: no column is named as a parameter, such as learning_rate or activation")
    rows = table.to_pylist()
    if "state" in table.column_names:  # one of ours, or of Optuna's
        rows = [row for row in rows if row["state"] == "COMPLETE"]
    by = next((name for name in RANKED_BY if name in table.column_names), None)
    if by is not None:
        rows = sorted((row for row in rows if _is_number(row[by])), key=lambda row: row[by])
    yield from rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(name: str, value: Any) -> Any:
    """Whole numbers as such: a column with gaps has them as floats."""
    return int(value) if name in INTEGERS and isinstance(value, float) and value.is_integer() else value
