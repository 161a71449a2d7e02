"""`run_study`: wires data, ledger, sampler, early stopping and Ray Tune together. Run and resume are one function."""

import contextlib
import functools
import importlib
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.head import head_watched
from cluster.resources import Packing
from cluster.runtime import Runtime, environment, ray_runtime, replaced
from cluster.shares import Shares
from search.arm import curves_of, told_of
from search.checkpoints import CheckpointStore
from search.checks import check_space, concurrency_of, fitting, prepared
from search.early_stopping import EarlyStopping
from search.events import StudyEvents
from search.interrupts import Interrupts, interrupts_caught, join_or_leave
from search.lease import Lease
from search.ledger import Contents, Ledger, take_stock
from search.packing import packing_for
from search.results import (
    CHECKPOINTS_FOLDER,
    FINAL_CHECKPOINTS_FOLDER,
    Study,
    exported,
    write_study_file,
)
from search.rounds import BestStates, Rounds, store_server
from search.space import Space
from search.spec import StudySpec, largest
from search.storage import Location, StorageFailed, failing_clearly
from search.tables import FinalRow, TrialRow
from search.watchdog import Watchdog
from search.writer import Patience
from vae.data import Dataset, likelihood_advice

if TYPE_CHECKING:
    from search.sampler import SlotsFor, StudySearcher

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger is the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's returns normally after Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshots are never read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: not a word on stdout
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
FEW_STEPS = 1000  # of training: with less, models of small tables have hardly begun to use their latents
LAST_FLUSH_S = 1.0  # what an interrupted study may take for its last rows
IMPORT_WAIT_S = 0.5  # what an interrupted study may wait for a module that it will not need
LOGGED_VERSIONS = ("vaesearch", "ray", "torch", "optuna", "numpy", "pyarrow")


class StudyFailed(RuntimeError):
    """Too many trials, or finalists' runs, failed in a row. The text shows the first of them."""


def run_study(
    spec: StudySpec,
    *,
    address: str | None = None,
    extend: int = 0,
    events: Sequence[StudyEvents] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Start a study, or go on with it where its ledger stands, and export its best models.

    address: a Ray cluster to join; None: a private Ray on this machine. extend: trials beyond those the
    stored study asks for. events: who hears of trials. say: takes the few lines meant for people.
    Raises InputError before anything is written; StudyFailed; StorageFailed; Interrupted. A cluster that dies
    as a whole ends this process with status 1.
    """
    begin = prepared(spec, address=address, extend=extend)
    spec, data, stored, path = begin.spec, begin.data, begin.stored, spec.folder
    if stored is not None and begin.is_complete:
        say(f"{spec.name}: complete with {spec.budget.trials} trials; --extend N asks for more")
        return stored
    lease = Lease(path)
    if Space(spec.space).is_fixed:
        say("the space leaves nothing to choose: every trial is the same configuration with another seed")
    with interrupts_caught() as interrupts, contextlib.ExitStack() as stack:
        with ray_runtime(address, data_bytes=data.nbytes) as runtime:
            has_others = address is not None or len(runtime.nodes) > 1  # or may have
            if has_others:
                from search.doctor import check_cluster, refuse_if_failed

                checks = check_cluster(spec, data, runtime)
                refuse_if_failed(checks)
                for check in checks:
                    if check.verdict == "warning":
                        say(f"warning: {check.what}; {check.mend}")
            packing = packing_for(spec, data, runtime, say)
            concurrency = concurrency_of(spec, runtime, spec.resources.gpus(packing))
            check_space(spec, data, concurrency)
            stack.enter_context(_held(lease, say))  # from here on files are written
            if stored is None or spec != stored.spec:
                with failing_clearly(path):
                    write_study_file(path, spec, _provenance(spec, data, stored))
            with _fair_share(spec, concurrency, packing, runtime if has_others else None) as slots_for:
                driver = _Driver(spec, data, path, concurrency, slots_for, packing, lease, interrupts, events, say)
                driver.search()
                if spec.finalists.confirm:
                    driver.confirm()
        from search.publish import publish_best  # torch: only now, so that trials start sooner

        study = Study(path)
        with failing_clearly(path):
            published = publish_best(study, data)
            for folder in (CHECKPOINTS_FOLDER, FINAL_CHECKPOINTS_FOLDER):
                CheckpointStore(path / folder).clear()
        leaders = len(exported(spec, study.rows()))
        if len(published) < leaders:
            say(f"{path}: of the best {leaders} models, the weights of {leaders - len(published)} were not kept")
    return study


@contextlib.contextmanager
def _fair_share(
    spec: StudySpec, concurrency: int, packing: Packing | None, shared: Runtime | None
) -> Iterator["SlotsFor"]:
    """How many trials may be under way: on a cluster that others use, too, not always all that fit.

    shared: None where nobody else is. A cluster that grows is not shared out: it grows for each.
    """
    if shared is None or spec.resources.autoscaling:
        yield lambda wanted, at_work: concurrency
        return
    shares = Shares(spec.name, fitting(spec, shared, spec.resources.gpus(packing), None), concurrency)
    try:
        yield shares.slots_for
    finally:
        shares.leave()


@dataclass
class _Driver:
    """What the parts of a run have in common."""

    spec: StudySpec
    data: Dataset
    path: Location
    concurrency: int
    slots_for: "SlotsFor"
    packing: Packing | None
    lease: Lease
    interrupts: Interrupts
    events: Sequence[StudyEvents]
    say: Callable[[str], None]

    def search(self) -> None:
        """Run what is missing of the trials through Tune."""
        import ray

        from search.sampler import StudySearcher

        spec, path = self.spec, self.path
        contents, ledger = self._open_ledger()
        rows = contents.trials
        ended = sum(row.state != "RUNNING" for row in rows)
        if ended >= spec.budget.trials:
            is_written = ledger.flush(spec.storage.patience_s)
            ledger.close()
            if not is_written:
                raise StorageFailed(path, str(ledger.error))
            return
        best = BestStates(spec, rows, CheckpointStore(path / CHECKPOINTS_FOLDER))
        searcher = StudySearcher(spec, ledger, rows, curves_of(contents.epochs), [best, *self.events])
        stopping = _rebuilt_stopping(spec, contents.epochs)
        concurrency = min(self.concurrency, spec.budget.trials - ended)
        for line in _opening_lines(spec, self.data, rows, concurrency):
            self.say(line)
        for listener in self.events:
            listener.search_started(spec, rows)
        del contents, rows  # a long study's are large
        with self._at_work(ledger, CHECKPOINTS_FOLDER) as server:
            best.server = server
            watchdog = Watchdog(spec.budget.stall_timeout_s, ray.kill)
            rounds = self._rounds(ledger, server, watchdog, searcher.stalled, best.drop_unneeded)
            searcher.while_waiting, searcher.slots_for, searcher.packing = rounds, self.slots_for, self.packing
            searcher.keep_below = best.keep_below
            _fit(spec, self.data, server, searcher, stopping, concurrency, rounds)
            rounds.finish()
        self.packing = searcher.packing  # as it turned out
        self._raise_if_failed("trials", searcher.failures, searcher.gave_up)

    def confirm(self) -> None:
        """Run what is missing of the finalists' runs."""
        import ray

        from search.confirm import Confirmation

        contents, ledger = self._open_ledger()
        with self._at_work(ledger, FINAL_CHECKPOINTS_FOLDER) as server:
            rows, finals = contents.trials, contents.finals
            confirmation = Confirmation(self.spec, self.data, ledger, server, rows, finals, self.events, self.packing)
            watchdog = Watchdog(self.spec.budget.stall_timeout_s, ray.kill, knows_of_queues=False)
            rounds = self._rounds(ledger, server, watchdog, confirmation.stalled, confirmation.drop_unneeded)
            confirmation.run(rounds, self.slots_for)
            rounds.finish()
        self._raise_if_failed("finalists' runs", confirmation.failures, confirmation.gave_up)

    def _open_ledger(self) -> tuple[Contents, Ledger]:
        contents = take_stock(self.path)
        for part in contents.set_aside:
            self.say(f"{part}: a damaged part of the tables, set aside; trials whose rows it held are made again")
        return contents, Ledger(self.path, contents)

    @contextlib.contextmanager
    def _at_work(self, ledger: Ledger, checkpoints: str) -> Iterator[Any]:
        """Workers may run in this block, and leave their states with the store that it gives."""

        def leave(reason: str) -> None:
            self.say(reason)
            try:
                ledger.flush(LAST_FLUSH_S)
            finally:
                os._exit(1)

        watched, served = head_watched(on_lost=leave), store_server(self.path / checkpoints)
        with watched, served as server, contextlib.closing(ledger):
            try:
                with self.interrupts.deferred():
                    yield server
            finally:
                ledger.flush(LAST_FLUSH_S)

    def _rounds(
        self,
        ledger: Ledger,
        server: Any,
        watchdog: Watchdog,
        stalled: Callable[[str], None],
        written: Callable[[], None],
    ) -> Rounds:
        patience = Patience(self.path, self.spec.storage.patience_s, self.say)
        return Rounds(
            ledger,
            self.lease,
            server,
            patience,
            self.interrupts,
            watchdog=watchdog,
            stalled=stalled,
            written=written,
        )

    def _raise_if_failed(self, what: str, failures: Sequence[TrialRow | FinalRow], gave_up: bool) -> None:
        if gave_up:
            first = failures[0]
            raise StudyFailed(
                f"{self.path}: {len(failures)} {what} failed in a row; the first, trial {first.trial}, with:\n"
                f"{first.reason}"
            )


def _fit(
    spec: StudySpec,
    data: Dataset,
    server: Any,
    searcher: "StudySearcher",
    stopping: EarlyStopping,
    concurrency: int,
    rounds: Rounds,
) -> None:
    """The one place that knows Ray Tune's controller."""
    from ray import tune
    from ray.air._internal import usage
    from ray.exceptions import RayError
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import trial as tune_trial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    from search.trial import VaeTrial

    class AshaScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if stopping.may_go_on(trial.config["trial"], result["epoch"], result["objective"]):
                return TrialScheduler.CONTINUE
            return TrialScheduler.STOP

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            handled = sys.exception()
            if handled is not None and not isinstance(handled, RayError):
                raise handled  # by a callback of ours as a trial ended: Tune (2.60) takes it for the trial's own
            rounds.watchdog.ended(trial.trial_id)
            searcher.worker_lost(trial.trial_id, trial.get_error())

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            if searcher.is_holding_back:
                # Tune (2.60) keeps one idle worker for the next trial, and with it what others wait for
                tune_controller._tune_controller._cleanup_cached_actors(force_all=True)
            return super().choose_trial_to_run(tune_controller)

        def __getstate__(self) -> dict[str, Any]:
            return {}

    class StepCallback(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            rounds()
            searcher.claim()
            searcher.ask_ahead()
            if not searcher.num_to_come:
                publishing.start()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            rounds.watchdog.started(trial.trial_id, trial.config["trial"], trial.temporary_state.ray_actor)
            searcher.placed(trial.trial_id)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            rounds.watchdog.ended(trial.trial_id)
            # Tune (2.60) keeps every trial for ever, most of it moving averages of every metric that nobody reads
            trial.run_metadata.metric_analysis.clear()
            trial.run_metadata.metric_n_steps.clear()

        def __getstate__(self) -> dict[str, Any]:
            return {}

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"CPU": spec.resources.cpus_per_trial, "GPU": config["gpus"]}])

    publishing = _ImportedMeanwhile("search.publish")  # torch: a second, and the last trials leave a core or two
    trainable = tune.with_parameters(VaeTrial, spec=spec, data=data, store=server)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it tells of failed trials, which the ledger has
    with environment(TUNE_ENVIRONMENT), tempfile.TemporaryDirectory(prefix="vaesearch-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="min",
                search_alg=searcher,
                scheduler=AshaScheduler(),
                num_samples=-1,
                max_concurrent_trials=concurrency,  # without it Tune keeps one trial pending at a time
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=scratch,
                callbacks=[StepCallback()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # ours go to the store
                # No retries of Tune's (2.60): they miss a worker that dies as it takes its trial. The searcher does it.
                verbose=0,
            ),
        )
        ask = TuneController._update_trial_queue
        one_trainable = {
            "get_trainable_cls": functools.cache(tune_trial.get_trainable_cls),
            "validate_trainable": functools.cache(tune_trial.validate_trainable),
        }
        with (
            # Where nothing may begin yet, Tune (2.60) would ask for a trial for ten minutes and do nothing else.
            replaced(TuneController, _update_trial_queue=lambda self, blocking=False, timeout=600: ask(self)),
            # For every trial it would ask Ray's head five times for the trainable, and unpickle it.
            replaced(tune_trial, **one_trainable),
            # To count their users it would import MLflow and others: a second or two, and files in the home folder.
            replaced(usage, tag_callbacks=lambda callbacks: False),
        ):
            try:
                tuner.fit()
            finally:
                publishing.join(IMPORT_WAIT_S)


class _ImportedMeanwhile:
    """A module that will be needed, imported in a thread."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=importlib.import_module, args=(self._module,))
            self._thread.start()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            join_or_leave(self._thread, timeout_s)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as `search.rounds.Rounds`


def _rebuilt_stopping(spec: StudySpec, epochs: pa.Table) -> EarlyStopping:
    """As it stood: by the values that the ledger has at the rungs, in the order in which they came."""
    stopping = EarlyStopping(spec)
    at_rungs = epochs.filter(pc.is_in(epochs["epoch"], pa.array(spec.rungs(), pa.int32()))).sort_by("reported_at")
    for trial, epoch, value in told_of(at_rungs):
        stopping.may_go_on(trial, epoch, value)
    return stopping


def _provenance(spec: StudySpec, data: Dataset, stored: Study | None) -> dict[str, Any]:
    if stored is not None:
        return stored.provenance
    return {
        "created_at": datetime.now(UTC),
        "trials_at_first": spec.budget.trials,
        "data_fingerprint": data.fingerprint,
        "data_rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "input_dim": data.input_dim,
        "versions": {name: version(name) for name in LOGGED_VERSIONS},
    }


def _opening_lines(spec: StudySpec, data: Dataset, rows: list[TrialRow], concurrency: int) -> Iterator[str]:
    ended = sum(row.state != "RUNNING" for row in rows)
    begin = f"going on at {ended} of" if rows else "searching:"
    yield (
        f"{spec.name}: {begin} {spec.budget.trials} trials of up to {spec.budget.max_epochs} epochs, "
        f"{concurrency} at once"
    )
    splits = f"{len(data.train)} rows to train on, {len(data.validation)} to judge by, {len(data.test)} kept aside"
    yield f"{data.config.source}: {data.input_dim} features, {splits}"
    steps = spec.budget.max_epochs * math.ceil(len(data.train) / largest(spec.batch_sizes))
    if steps < FEW_STEPS:
        yield f"a trial has {steps} training steps at the most, which may be too few; --max-epochs gives it more"
    advice = likelihood_advice(spec.model.likelihood, data)
    if advice is not None:
        yield f"warning: {advice}"


@contextlib.contextmanager
def _held(lease: Lease, say: Callable[[str], None]) -> Iterator[None]:
    with failing_clearly(lease.path.parent):
        lease.path.parent.mkdir(parents=True, exist_ok=True)
        former = lease.acquire()
    if former is not None:
        say(f"{lease.path.parent}: taken over from {former}, which is gone")
    try:
        yield
    finally:
        # In a thread, because a storage that does not answer must not hold up the end.
        release = threading.Thread(target=lease.release, name="vaesearch-release", daemon=True)
        release.start()
        join_or_leave(release, LAST_FLUSH_S)
