"""A study as it lies on disk: open it, rank it, sum it up. Reads only; light to import."""

import logging
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import tomli_w

from search.layout import STUDY_FILE, study_folders
from search.spec import StudySpec
from search.storage import Location, location, write_atomically
from search.tables import FinalRow, TrialRow, read_table, to_rows, whole_runs
from vae.config import InputError, ModelConfig

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

log = logging.getLogger(__name__)

MODELS_FOLDER = "models"
MODEL_FILE = "config.json"  # of a model's folder, written last
CHECKPOINTS_FOLDER = "checkpoints"
FINAL_CHECKPOINTS_FOLDER = "final-checkpoints"

VERSIONS = ("vaesearch", "torch", "numpy")
"""The packages on whose versions the bits of a trained model depend."""

PENALTY = 1.0
"""A trial without a value counts as this much worse than a model that ignores its latents, in nats per example."""


@dataclass(frozen=True)
class ActivationSummary:
    """What was seen of one activation. Counts of trials; `best` is None if none healthy ran to its end."""

    activation: str
    trials: int
    full: int
    stopped: int
    failed: int  # collapsed, diverged, out of memory or in error
    best: TrialRow | None


@dataclass(frozen=True)
class Summary:
    """Where a study stands. `leaders` are the healthy trials with the full budget, best first."""

    name: str
    trials: int  # asked for
    states: Mapping[str, int]  # RUNNING, COMPLETE, PRUNED, FAIL -> how many
    statuses: Mapping[str, int]
    leaders: list[TrialRow]
    activations: list[ActivationSummary]  # best first
    train_objective: str  # vae_gan: the values rank with no other study's
    no_latent_nelbo: float | None
    stopped: int  # early, and healthy
    lowest: float | None  # validation value of any trial, whatever became of it
    epochs_trained: int
    epochs_saved: int  # by early stopping, against every such trial run to its end
    train_wall_s: float  # summed over the trials
    restarts: int  # attempts beyond each trial's first

    @property
    def ended(self) -> int:
        return sum(count for state, count in self.states.items() if state != "RUNNING")

    @property
    def is_complete(self) -> bool:
        return self.ended >= self.trials

    @property
    def best(self) -> TrialRow | None:
        return self.leaders[0] if self.leaders else None


class Study:
    """A stored study. Everything is read anew at each call, so it may be watched while it runs."""

    def __init__(self, path: Location) -> None:
        self.path = path

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from search.notebook import study_html

        return study_html(self)

    def to_optuna(self, storage: "str | BaseStorage | None" = None) -> "optuna.Study":
        """Its ended trials as a study of Optuna's: see `search.optuna_study`."""
        from search.optuna_study import to_optuna

        return to_optuna(self, storage)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def provenance(self) -> dict[str, Any]:
        """When it was made, with which versions, on which data (fingerprint). Raises InputError if it is damaged."""
        file = self.path / STUDY_FILE
        try:
            return dict(tomllib.loads(file.read_text(encoding="utf-8"))["provenance"])
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}: damaged: {error}; put the file of the same run back") from None

    @property
    def spec(self) -> StudySpec:
        """As it was resolved when the study began. Raises InputError if the file is damaged."""
        return StudySpec.load(self.path / STUDY_FILE)

    def trials(self) -> pa.Table:
        """One row a trial; columns as in `search.tables.TrialRow`."""
        return self._table("trials")

    def epochs(self) -> pa.Table:
        """One row a trial and epoch; columns as in `search.tables.EpochRow`."""
        return self._table("epochs")

    def diagnostics(self) -> pa.Table:
        """One row a trial and rung: what its model was like; columns as in `search.tables.DiagnosticsRow`."""
        return self._table("diagnostics")

    def layers(self) -> pa.Table:
        """One row a trial, rung and hidden layer; columns as in `search.tables.LayerRow`."""
        return self._table("layers")

    def attempts(self) -> pa.Table:
        """One row a start of a trial in a worker; columns as in `search.tables.AttemptRow`."""
        return self._table("attempts")

    def finals(self) -> pa.Table:
        """One row a finalist and fresh seed, scored on the test split; columns as in `search.tables.FinalRow`."""
        return self._table("finals")

    def final_images(self) -> pa.Table:
        """One row a finalist, seed and row of the test split; columns as in `search.tables.FinalImageRow`."""
        return self._table("final_images")

    def rows(self) -> list[TrialRow]:
        return to_rows(self.trials().sort_by("trial"), TrialRow)

    def final_rows(self) -> list[FinalRow]:
        return final_rows_of(self.finals())

    def whole_final_rows(self) -> list[FinalRow]:
        """Those of `final_rows` but runs whose rows of the test split went with a damaged part."""
        return final_rows_of(whole_runs(self.finals(), self.final_images()))

    def _table(self, name: str) -> pa.Table:
        return read_table(self.path, name)

    def summary(self) -> Summary:
        return summarise(self.name, self.spec.budget.trials, self.rows())

    def model_folders(self) -> list[Location]:
        """The exported models, best first."""
        configs = (self.path / MODELS_FOLDER).glob(f"*-trial-*/{MODEL_FILE}")
        return sorted((config.parent for config in configs), key=lambda folder: int(folder.name.split("-")[0]))


def final_rows_of(finals: pa.Table) -> list[FinalRow]:
    """In the order of their trials and runs."""
    return to_rows(finals.sort_by([("trial", "ascending"), ("run", "ascending")]), FinalRow)


def summarise(name: str, trials: int, rows: list[TrialRow]) -> Summary:
    leaders = ranked(rows)
    of_activation: dict[str, list[TrialRow]] = {}
    leading = {row.trial for row in leaders}
    for row in [*leaders, *(row for row in rows if row.trial not in leading)]:
        of_activation.setdefault(row.activations, []).append(row)
    stopped = [row for row in rows if row.state == "PRUNED" and row.status == "ok"]
    return Summary(
        name=name,
        trials=trials,
        states=dict(Counter(row.state for row in rows)),
        statuses=dict(Counter(row.status for row in rows if row.status is not None)),
        leaders=leaders,
        activations=[_summarise_activation(name, its_rows) for name, its_rows in of_activation.items()],
        train_objective=rows[0].train_objective if rows else "elbo",
        no_latent_nelbo=no_latent_nelbo(rows),
        stopped=len(stopped),
        lowest=min((row.val_nelbo for row in rows if row.val_nelbo is not None), default=None),
        epochs_trained=sum(row.epochs for row in rows),
        epochs_saved=sum(row.max_epochs - row.epochs for row in stopped),
        train_wall_s=sum(row.train_wall_s for row in rows),
        restarts=sum(max(0, row.attempts - 1) for row in rows),
    )


def no_latent_nelbo(rows: Iterable[TrialRow | FinalRow]) -> float | None:
    """Of a model that ignores its latents: the same for all, known once one has been built."""
    return next((row.no_latent_nelbo for row in rows if row.no_latent_nelbo is not None), None)


def _summarise_activation(activation: str, rows: list[TrialRow]) -> ActivationSummary:
    leaders = ranked(rows)
    return ActivationSummary(
        activation=activation,
        trials=len(rows),
        full=len(leaders),
        stopped=sum(row.state == "PRUNED" and row.status == "ok" for row in rows),
        failed=sum(row.status not in (None, "ok") for row in rows),
        best=leaders[0] if leaders else None,
    )


def ranked(rows: list[TrialRow]) -> list[TrialRow]:
    """The trials that may be called best: healthy, with the full budget; lowest objective first."""
    full = [r for r in rows if r.state == "COMPLETE" and r.status == "ok" and r.val_nelbo is not None]
    return sorted(full, key=lambda row: (row.ranks_by, row.trial))


def best_of_each(rows: list[TrialRow]) -> dict[str, TrialRow]:
    """Activation -> the best of its trials that may be called so; the best of all first."""
    best: dict[str, TrialRow] = {}
    for row in ranked(rows):
        best.setdefault(row.activations, row)
    return best


def exportable(spec: StudySpec, rows: list[TrialRow]) -> list[TrialRow]:
    """The trials whose models are worth keeping, best first: of a comparison, the best of each activation alone."""
    return ranked(rows) if spec.goal == "best-model" else list(best_of_each(rows).values())


def exported(spec: StudySpec, rows: list[TrialRow]) -> list[TrialRow]:
    """The trials whose models are kept, best first."""
    return exportable(spec, rows)[: spec.num_exported]


def model_config_of(spec: StudySpec, row: TrialRow, row_shape: tuple[int, ...]) -> ModelConfig:
    """The architecture of a trial in the ledger. row_shape: (X,), or of an image (H, W) or (H, W, C)."""
    return replace(spec.model_config_for(row.params, row_shape), hidden_dims=tuple(row.hidden_dims))


def storage_flag(study_path: Location) -> str:
    """What a command on a study needs besides its name: nothing, or a blank and --storage."""
    storage = str(study_path.parent)
    return "" if storage == "studies" else f" --storage {shlex.quote(storage)}"


def open_study(path: str | Location) -> Study:
    """The study in a folder or behind a URL. Raises InputError if there is none."""
    path = location(path)
    if not (path / STUDY_FILE).is_file():
        others = [study.name for study in list_studies(path.parent)]
        known = f"studies in {path.parent}: {', '.join(others)}" if others else f"there is none in {path.parent}"
        raise InputError(f"{path}: no study there; {known}")
    return Study(path)


def list_studies(storage: str | Location) -> list[Study]:
    """All studies of a storage folder, by name."""
    return [Study(folder) for folder in study_folders(location(storage))]


def readable_studies(storage: str | Location) -> list[Study]:
    """All studies of a storage folder whose study file can be read, by name; the others are logged."""
    readable = []
    for study in list_studies(storage):
        try:
            study.spec  # noqa: B018
            readable.append(study)
        except InputError as error:
            log.warning("left out: %s", str(error).splitlines()[0])
    return readable


def write_study_file(path: Location, spec: StudySpec, provenance: Mapping[str, Any]) -> None:
    content = tomli_w.dumps({**spec.dump(), "provenance": dict(provenance)})
    write_atomically(path / STUDY_FILE, content.encode())
