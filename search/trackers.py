"""`--logger`: what a study finds, handed on to other people's trackers as it comes in, by their own clients.

In a thread of its own: a tracker that is slow holds nothing up, and one that fails is left out and told of. The ledger
remains the record. A trial that goes on after an interruption goes on in its run there, too.
"""

import contextlib
import importlib.util
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from search.events import StudyEvents
from search.interrupts import join_or_leave
from search.spec import StudySpec
from search.tables import EpochRow, TrialRow
from vae.config import InputError

METRICS = (
    "val_nelbo",
    "val_recon",
    "val_kl",
    "train_nelbo",
    "train_recon",
    "train_kl",
    "active_units",
    "grad_norm",
    "kl_weight",
)
"""What of each epoch is handed on, under its name in the table `epochs`."""

LAST_S, INTERRUPTED_S = 30.0, 2.0
"""What all trackers together may take for what they have not sent when a study ends, and when something ends it."""


class Backend(Protocol):
    """One tracker. All is called from one thread; what it raises ends its part."""

    def begin(self, row: TrialRow) -> None:
        """A trial starts, or goes on."""

    def log(self, row: TrialRow, epochs: Sequence[EpochRow]) -> None:
        """New epochs of a trial that has begun."""

    def end(self, row: TrialRow) -> None:
        """A trial has ended."""

    def close(self) -> None:
        """Nothing more will come; trials that have not ended are to go on another time."""


@contextlib.contextmanager
def tracking(names: Sequence[str], spec: StudySpec, say: Callable[[str], None]) -> Iterator[list[StudyEvents]]:
    """Who tells trackers of a study, to be events of `run_study` in this block; names: of `BACKENDS`.

    Raises InputError, before anything begins, for one that is unknown or not installed.
    """
    trackers = [_Tracker(name, backend, say) for name, backend in backends(names, spec).items()]
    wait_s = INTERRUPTED_S
    try:
        yield list[StudyEvents](trackers)
        wait_s = LAST_S
    finally:
        for tracker in trackers:
            tracker.finish()
        deadline = time.monotonic() + wait_s
        for tracker in trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))


def backends(names: Sequence[str], spec: StudySpec) -> dict[str, Backend]:
    """Name -> its client. Raises InputError as `tracking`."""
    return {name: _backend(name, spec) for name in names}


def _backend(name: str, spec: StudySpec) -> Backend:
    if name not in BACKENDS:
        raise InputError(f"--logger {name}: known are {', '.join(BACKENDS)}")
    module, kind = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"--logger {name} needs its client: pip install 'vaesearch[{name}]'")
    return kind(spec)


class _Tracker(StudyEvents):
    def __init__(self, name: str, backend: Backend, say: Callable[[str], None]) -> None:
        self._name, self._backend, self._say = name, backend, say
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"vaesearch-{name}", daemon=True)
        self._thread.start()

    def trial_started(self, row: TrialRow) -> None:
        self._hand_on(lambda: self._backend.begin(row))

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        self._hand_on(lambda: self._backend.log(row, epochs))

    def trial_ended(self, row: TrialRow) -> None:
        self._hand_on(lambda: self._backend.end(row))

    def finish(self) -> None:
        """Nothing more will come."""
        self._calls.put(self._backend.close)
        self._calls.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until all is sent, but not for ever."""
        join_or_leave(self._thread, timeout_s)
        if self._thread.is_alive():
            self._say(f"{self._name}: did not take all in time; the ledger has it")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as `search.rounds.Rounds`

    def _hand_on(self, call: Callable[[], None]) -> None:
        if self._thread.is_alive():  # else it has failed
            self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # whatever a client raises, the study goes on
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                self._say(f"{self._name}: {reason[:200]}; nothing more is sent there, the ledger has it")
                with contextlib.suppress(Exception):  # here, where the wait is bounded, and not as Python ends
                    self._backend.close()
                return


class _TensorBoard:
    """Event files in `<study>/tensorboard/trial-<n>/`; torch's own writer, which TensorBoard's hyperparameters need."""

    def __init__(self, spec: StudySpec) -> None:
        self._folder = _local(spec, "tensorboard") / "tensorboard"
        self._writers: dict[int, Any] = {}

    def begin(self, row: TrialRow) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if row.trial not in self._writers:
            self._writers[row.trial] = SummaryWriter(str(self._folder / f"trial-{row.trial}"))

    def log(self, row: TrialRow, epochs: Sequence[EpochRow]) -> None:
        for epoch in epochs:
            for name, value in _metrics(epoch).items():
                self._writers[row.trial].add_scalar(name, value, epoch.epoch)

    def end(self, row: TrialRow) -> None:
        writer = self._writers.pop(row.trial)
        writer.add_hparams(_hparams(row), _outcome(row), run_name=".")
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _MLflow:
    """A run for each trial, in an experiment named after the study; where MLFLOW_TRACKING_URI says, else in
    `<study>/mlflow.db`."""

    def __init__(self, spec: StudySpec) -> None:
        self._study = spec.name
        self._folder = None if "MLFLOW_TRACKING_URI" in os.environ else _local(spec, "mlflow")
        self._client: Any = None
        self._runs: dict[int, str] = {}  # trial -> the run's id

    def begin(self, row: TrialRow) -> None:
        from mlflow.entities import Param

        if self._client is None:
            self._connect()
        mark = {"vaesearch.study": row.study, "vaesearch.trial": f"{row.trial} of {row.suggested_at.isoformat()}"}
        found = self._client.search_runs([self._experiment], f"tags.`vaesearch.trial` = '{mark['vaesearch.trial']}'")
        if found:
            self._runs[row.trial] = found[0].info.run_id
            return
        run = self._client.create_run(self._experiment, run_name=f"trial-{row.trial}", tags=mark)
        self._runs[row.trial] = run.info.run_id
        params = [Param(name, str(value)) for name, value in _hparams(row).items()]
        self._client.log_batch(run.info.run_id, params=params)

    def log(self, row: TrialRow, epochs: Sequence[EpochRow]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(epoch.reported_at.timestamp() * 1000), epoch.epoch)
            for epoch in epochs
            for name, value in _metrics(epoch).items()
        ]
        self._client.log_batch(self._runs[row.trial], metrics=metrics)

    def end(self, row: TrialRow) -> None:
        run = self._runs.pop(row.trial)
        self._client.set_tag(run, "vaesearch.status", f"{row.state} {row.status}")
        self._client.set_terminated(run, "FAILED" if row.state == "FAIL" else "FINISHED")

    def close(self) -> None: ...

    def _connect(self) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        uri = None if self._folder is None else f"sqlite:///{self._folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(self._study)
        if experiment is not None:
            self._experiment = experiment.experiment_id
        else:
            place = None if self._folder is None else (self._folder / "mlruns").as_uri()
            self._experiment = self._client.create_experiment(self._study, artifact_location=place)


class _WandB:
    """A run for each trial, in a group named after the study, of the project `vaesearch` or WANDB_PROJECT."""

    def __init__(self, spec: StudySpec) -> None:
        self._folder = _local(spec, "wandb")
        self._runs: dict[int, Any] = {}

    def begin(self, row: TrialRow) -> None:
        import wandb

        if row.trial in self._runs:
            return
        wandb.setup(wandb.Settings(silent=True))  # before init (0.31), which else asks for a key on the terminal
        self._runs[row.trial] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vaesearch"),
            group=row.study,
            name=f"trial-{row.trial}",
            id=f"{row.study}-{row.trial}-{row.suggested_at.timestamp():.0f}",
            resume="allow",
            config=_hparams(row),
            dir=str(self._folder),
            reinit="create_new",  # several at once
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: TrialRow, epochs: Sequence[EpochRow]) -> None:
        for epoch in epochs:
            self._runs[row.trial].log(_metrics(epoch), step=epoch.epoch)

    def end(self, row: TrialRow) -> None:
        run = self._runs.pop(row.trial)
        run.summary.update({"state": row.state, "status": row.status})
        run.finish(exit_code=int(row.state == "FAIL"))

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)


BACKENDS: dict[str, tuple[str, Callable[[StudySpec], Backend]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _WandB),
}
"""Name -> the module that must be installed, and what speaks to it. The extra has the tracker's name."""


def _local(spec: StudySpec, name: str) -> Path:
    """The study's folder. Raises InputError for an object store, where these clients cannot write."""
    folder = spec.folder
    if not isinstance(folder, Path):
        raise InputError(
            f"--logger {name} writes beside the study, which {spec.storage.path} cannot hold: use a folder"
        )
    return folder.absolute()


def _metrics(epoch: EpochRow) -> dict[str, float]:
    """Those that are finite: not all trackers take others."""
    values = {name: float(getattr(epoch, name)) for name in METRICS}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _hparams(row: TrialRow) -> dict[str, Any]:
    params = {name: value for name, value in row.params.items() if value is not None}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in params.items()
    }


def _outcome(row: TrialRow) -> dict[str, float]:
    values = {"hparam/val_nelbo": row.val_nelbo, "hparam/epochs": float(row.epochs)}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
