"""`--warm-start`: what did well before is tried first, in a study's `sampler.first`.

Configurations are taken over and not their values, which on other data, or in another budget, mean something else.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from search.layout import STUDY_FILE
from search.results import open_study, ranked
from search.space import INTEGERS, Space
from search.spec import SpaceSpec, StudySpec, fits
from search.storage import location
from vae.config import InputError

TAKEN = 5  # configurations at the most
RANKED_BY = ("objective", "val_nelbo", "value")  # the column of a file that says which rows are best: the lowest


def warm_started(spec: StudySpec, source: str, say: Callable[[str], None] = lambda text: None) -> StudySpec:
    """`spec` with the best distinct configurations of `source` to be tried first, behind those that it has already.

    source: the name of a study in the same storage, its folder or URL; or a .csv or .parquet file with columns named as
    the parameters of the space, or as Optuna names them, and one of RANKED_BY, without which its rows count in their
    order. What lies outside of the space is left to the sampler, which is said. A study that has begun keeps what it
    began with. Raises InputError where nothing can be taken over.
    """
    if spec.goal != "best-model":
        raise InputError(
            "--warm-start is for goal = best-model: a comparison tries the same settings with each activation"
        )
    if (spec.folder / STUDY_FILE).is_file():
        say(f"{spec.name}: has begun, and keeps what it began with; --warm-start {source} is passed over")
        return spec
    searched = Space(spec.space).distributions
    taken: list[dict[str, Any]] = []
    left: set[str] = set()
    for params in _candidates(spec, source):
        known = {name: value for name, value in params.items() if name in searched}
        fitting = {name: value for name, value in known.items() if fits(getattr(spec.space, name), value)}
        left |= known.keys() - fitting.keys()
        if fitting and fitting not in taken:
            taken.append(fitting)
        if len(taken) == TAKEN:
            break
    if not taken:
        raise InputError(f"--warm-start {source}: has no configuration with a parameter that is searched here")
    first = (*spec.sampler.first, *(found for found in taken if found not in spec.sampler.first))
    others = f" and {len(spec.sampler.first)} of sampler.first" if spec.sampler.first else ""
    say(f"{source}: tried first, behind the default{others}: the best {len(taken)} that fit")
    if left:
        say(f"{source}: values outside of the space are left to the sampler: {', '.join(sorted(left))}")
    if len(first) >= spec.budget.trials:
        room = max(0, spec.budget.trials - 1 - len(spec.sampler.first))
        say(f"{source}: budget.trials = {spec.budget.trials} has room for {room} of them")
    return spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"first": first})})


def _candidates(spec: StudySpec, source: str) -> Iterator[dict[str, Any]]:
    """Parameters of the space, best first."""
    if "://" not in source and Path(source).suffix.lower() in (".csv", ".parquet"):
        rows: list[dict[str, Any]] = _rows_of_file(Path(source))
    else:
        is_place = "://" in source or (Path(source) / STUDY_FILE).is_file()
        folder = location(source) if is_place else location(spec.storage.path) / source
        rows = [row.params for row in ranked(open_study(folder).rows())]
        if not rows:
            raise InputError(f"--warm-start {source}: no healthy trial of it has trained to its last epoch yet")
    for row in rows:
        params = {name: _plain(name, row[name]) for name in SpaceSpec.model_fields if row.get(name) is not None}
        yield {name: value for name, value in params.items() if not (isinstance(value, float) and math.isnan(value))}


def _rows_of_file(file: Path) -> list[dict[str, Any]]:
    """Best first, where a column says so."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pa.csv.read_csv(file) if file.suffix.lower() == ".csv" else pa.parquet.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--warm-start {file}: cannot be read: {error}") from None
    table = table.rename_columns([name.removeprefix("params_") for name in table.column_names])  # Optuna's
    if not set(table.column_names) & set(SpaceSpec.model_fields):
        raise InputError(f"--warm-start {file}: no column is named as a parameter, such as learning_rate or activation")
    rows = table.to_pylist()
    if "state" in table.column_names:  # one of our tables, or of Optuna's
        rows = [row for row in rows if row["state"] == "COMPLETE" and row.get("status") in (None, "ok")]
    ranks = [name for name in RANKED_BY if name in table.column_names]
    by = next((name for name in ranks if any(_is_number(row[name]) for row in rows)), None)
    if by is not None:
        return sorted((row for row in rows if _is_number(row[by])), key=lambda row: row[by])
    if ranks:
        raise InputError(f"--warm-start {file}: {', '.join(ranks)}: no trial that ended well has a number there")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(name: str, value: Any) -> Any:
    """Whole numbers as such: a column with gaps has them as floats."""
    return int(value) if name in INTEGERS and isinstance(value, float) and value.is_integer() else value
