"""`StudySearcher`: Ray Tune's side of `study.ask` and `study.tell`.

Stock OptunaSearch tells a stopped trial as COMPLETE with its partial loss and leaves a NaN trial RUNNING.
Here every result carries `final` and `status`, and what became of a trial decides what Optuna hears:

    trained to the last epoch       COMPLETE with the validation value
    stopped early                   its values so far, then PRUNED
    collapsed                       COMPLETE, constraint violated
    diverged, out of memory         a finite penalty, constraint violated, PRUNED
    error, worker lost for good     FAIL

A worker that was lost is nothing to Optuna as long as its trial is started again. The study lives in memory.
It is rebuilt from the ledger, never unpickled, and suggestion n depends on the study's seed, on n and on the
history alone.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from cluster.resources import Packing
from search.arm import Arm, Curve, beyond, constraints_of
from search.events import StudyEvents
from search.ledger import Ledger
from search.results import PENALTY
from search.rounds import is_out_of_memory, one_line
from search.spec import Params, StudySpec
from search.tables import PARAMS, AttemptRow, DiagnosticsRow, EpochRow, LayerRow, TrialRow
from vae.config import OWN_PARAMETERS

HOLD_S = 0.1

SlotsFor = Callable[[int, int], int]
"""Trials that could be under way, trials that have a worker -> how many may be under way: see `cluster.shares`."""


@dataclass
class _Live:
    """A trial under way."""

    trial: optuna.Trial
    params: Params
    row: TrialRow
    gpus: float = 0.0  # of its present attempt
    attempt: AttemptRow = field(init=False)
    told: float | None = None  # of its last epoch
    losses: int = 0  # of its workers, in this run
    is_known: bool = False  # from a former driver, which may have stored a state of it
    keep_below: float = math.inf  # as it began: an objective above is too high for its weights to be kept
    is_stalled: bool = False  # its worker is being taken away because nothing moved

    @property
    def config(self) -> dict[str, Any]:
        """What the worker gets."""
        return {
            "trial": self.row.trial,
            "seed": self.row.seed,
            "params": self.params,
            "gpus": self.gpus,
            "is_first": self.row.attempts == 1 and not self.is_known,
            "keep_below": self.keep_below,
        }


class StudySearcher(Searcher):
    """Suggests until the study has `spec.budget.trials` trials, and writes the ledger as it goes."""

    def __init__(
        self,
        spec: StudySpec,
        ledger: Ledger,
        rows: list[TrialRow],
        curves: Mapping[int, Curve],
        events: list[StudyEvents],
    ) -> None:
        super().__init__(metric="objective", mode="min")
        self.spec, self.ledger, self.events = spec, ledger, events
        self.arms = [Arm(spec, index, rows, curves) for index in range(spec.num_arms)]
        self.while_waiting: Callable[[], None] = lambda: None  # called while there is nothing to suggest yet
        self.slots_for: SlotsFor = lambda wanted, under_way: wanted  # how many trials may be under way
        self.keep_below: Callable[[TrialRow], float] = lambda row: math.inf  # see `search.rounds.BestStates`
        self.packing: Packing | None = None  # of trials on a GPU, where it was measured
        self.is_holding_back = False  # what others on the cluster have a right to
        self.failures: list[TrialRow] = []  # in a row, up to now
        known = {row.trial: row for row in rows}
        baselines = (row.no_latent_nelbo for row in rows if row.train_objective == "elbo")
        # of a model that ignores its latents: the same for all trials, known from the first result on
        self._no_latent_objective = next((value for value in baselines if value is not None), None)
        self._next_number = max(known, default=-1) + 1
        self._unfinished: dict[int, TrialRow | None] = {  # None: never begun, or its row was lost
            number: known.get(number)
            for number in range(self._next_number)
            if number not in known or known[number].state == "RUNNING"
        }
        self._asked: _Live | None = None  # a suggestion that is on disk, or on its way there
        self._live: dict[str, _Live] = {}  # by Ray's id
        self._lost: deque[_Live] = deque()  # with their workers, and to be tried again

    @property
    def gave_up(self) -> bool:
        """True once too many trials have failed in a row."""
        return len(self.failures) >= self.spec.budget.max_consecutive_failures

    @property
    def gpus(self) -> float:
        """What a trial that begins now is given."""
        return self.spec.resources.gpus(self.packing)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        self.claim()
        if self.is_holding_back:
            self.while_waiting()
            if not self._live:
                time.sleep(HOLD_S)  # Tune would ask again at once
            return None
        if self._lost and not self.gave_up:
            live = self._lost.popleft()
            self._begin_attempt(live)
            live.keep_below = self.keep_below(live.row)
            self.ledger.update_trial(live.row)
            self._live[trial_id] = live
            return live.config
        if self.gave_up or (self._asked is None and self._is_all_asked and not self._live):
            return Searcher.FINISHED  # type: ignore[return-value]  # Tune's own sentinel
        if self._asked is None:
            if self._is_all_asked:
                return None  # one of those under way may be lost, and tried again
            self._asked = self._ask()
        live = self._asked
        if not self.ledger.start_trial(live.row):
            # Tune comes back; meanwhile the trials under way are served. Where there are none it does nothing else
            # but ask again for up to ten minutes (2.60): so whatever else is to be looked after, is so from here.
            self.while_waiting()
            return None
        self._asked = None
        live.gpus, live.keep_below = self.gpus, self.keep_below(live.row)  # which may have changed since
        live.attempt = dataclasses.replace(live.attempt, gpus=live.gpus, started_at=_now())
        self.ledger.update_attempt(live.attempt)
        self._live[trial_id] = live
        for listener in self.events:
            listener.trial_started(live.row)
        return live.config

    def ask_ahead(self) -> None:
        """While several trials are under way: have the next suggestion on disk, so that no worker waits for it.

        It is made without what they will show, as the last one was without the others; a single worker waits.
        """
        is_wanted = len(self._live) > 1 and not self.is_holding_back
        if is_wanted and self._asked is None and not (self._lost or self._is_all_asked or self.gave_up):
            self._asked = self._ask()
            self.ledger.announce_trial(self._asked.row)

    def claim(self) -> None:
        """Tell the others on the cluster what could be used, and hear whether more trials may begin. Cheap."""
        under_way, to_come = len(self._live), 0 if self.gave_up else self.num_to_come
        at_work = sum(live.attempt.placed_at is not None for live in self._live.values())
        self.is_holding_back = under_way >= self.slots_for(under_way + to_come, at_work) and to_come > 0

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._take(self._live[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._live:
            return
        live = self._live.pop(trial_id)
        if result is not None and "epochs" in result and not error:
            self._take(live, result)
            if result["status"] == "oom" and self._unpacked(live):
                self._settle_attempt(live, "oom", f"out of memory with {live.gpus:g} of a GPU; now with {self.gpus:g}")
                self._lost.append(live)
                return
            self._settle_attempt(live, "ended", None)
            self._end(live, outcome_of(result))
        elif error:
            if live.attempt.outcome is None:
                self._settle_loss(live, "lost", "its worker was lost")
            if live.losses <= self.spec.budget.max_retries:
                self._lost.append(live)
            else:
                self._end(live, self._loss_for_good(live.attempt))
        else:  # the study was interrupted: the ledger's row stays RUNNING and goes on next time
            self._settle_attempt(live, "interrupted", None)

    def placed(self, trial_id: str) -> None:
        """A trial has its worker."""
        live = self._live[trial_id]
        live.attempt = dataclasses.replace(live.attempt, placed_at=_now())
        self.ledger.update_attempt(live.attempt)

    def stalled(self, trial_id: str) -> None:
        """The worker of a trial is about to be killed, since nothing moved."""
        self._live[trial_id].is_stalled = True

    def worker_lost(self, trial_id: str, error: BaseException | None) -> None:
        """A worker is gone, and Tune is about to give its trial up. Here it is tried again, if not lost too often."""
        if (live := self._live.get(trial_id)) is None:
            return
        if live.is_stalled:
            outcome, reason = "timeout", f"no training step for {self.spec.budget.stall_timeout_s:g} s"
        else:
            outcome, reason = "oom" if is_out_of_memory(error) else "lost", one_line(error)
        # a node that the cluster took away on purpose is nobody's fault
        self._settle_loss(live, outcome, reason, counts=not getattr(error, "preempted", False))
        for listener in self.events:
            listener.worker_lost(live.row, live.attempt)

    def save(self, checkpoint_path: str) -> None:
        """The ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """`Tuner.restore` is not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher now and then, and we never read that back

    @property
    def _is_all_asked(self) -> bool:
        return not self._unfinished and self._next_number >= self.spec.budget.trials

    @property
    def num_to_come(self) -> int:
        """Trials that have not begun yet, as far as is known: one under way may be lost, and come again."""
        fresh = max(0, self.spec.budget.trials - self._next_number)
        return len(self._lost) + (self._asked is not None) + len(self._unfinished) + fresh

    def _ask(self) -> _Live:
        """The next trial, unfinished ones first, and those whose row was lost."""
        number = min(self._unfinished, default=self._next_number)
        before = self._unfinished.pop(number, None)
        self._next_number = max(self._next_number, number + 1)
        arm, turn = self.spec.place(number)
        trial, params = self.arms[arm].ask(turn)
        live = _Live(trial, params, before or self._new_row(number, params), is_known=before is not None)
        self._begin_attempt(live)
        return live

    def _unpacked(self, live: _Live) -> bool:
        """True where a trial that ran out of memory gets a larger part of a GPU, as do all that begin from now on."""
        if self.packing is None:
            return False
        if live.gpus < self.packing.share:  # others that ran out of it had the same thought
            return True
        if self.packing.trials == 1:
            return False
        self.packing = self.packing.with_fewer()
        return True

    def _begin_attempt(self, live: _Live) -> None:
        live.is_stalled, live.gpus = False, self.gpus
        live.row = row = dataclasses.replace(live.row, attempts=self.ledger.next_attempt(live.row))
        live.attempt = AttemptRow(
            study=row.study, trial=row.trial, attempt=row.attempts, gpus=live.gpus, started_at=_now()
        )
        self.ledger.update_attempt(live.attempt)

    def _new_row(self, number: int, params: Params) -> TrialRow:
        model = self.spec.model_config_for(params, row_shape=(1, 1))
        train = self.spec.train_config_for(params)
        values = asdict(model) | asdict(train)
        own = ("decoder_activation", *OWN_PARAMETERS)  # null where they do not apply
        chosen: Params = {name: params.get(name) if name in own else values[name] for name in PARAMS}
        return TrialRow(
            study=self.spec.name,
            trial=number,
            phase=self.spec.phase(number),
            state="RUNNING",
            **chosen,
            hidden_dims=list(model.hidden_dims),
            train_objective=train.objective,
            seed=trial_seed(self.spec.seed, self.spec.place(number)[1]),
            max_epochs=train.max_epochs,
            suggested_at=_now(),
        )

    def _take(self, live: _Live, result: dict[str, Any]) -> None:
        """Write a result's epochs and tell Optuna of them."""
        now, row, trial = _now(), live.row, live.trial
        rows = [
            EpochRow(study=row.study, trial=row.trial, attempt=live.attempt.attempt, reported_at=now, **epoch)
            for epoch in result["epochs"]
        ]
        new = self.ledger.add_epochs(rows)
        self.ledger.add_diagnostics(*probe_rows(row, result["probes"]))
        told = _told(trial)
        for epoch in rows:
            if epoch.epoch not in told:
                trial.report(epoch.objective, epoch.epoch)
        if rows:
            live.told = rows[-1].objective
        if result["no_latent_objective"] is not None:
            self._no_latent_objective = result["no_latent_objective"]
        live.row = updated_row(row, result)
        self._update_attempt(live, result)
        for listener in self.events:
            listener.epochs_done(live.row, new)

    def _update_attempt(self, live: _Live, result: dict[str, Any]) -> None:
        is_first = live.attempt.from_epoch is None and result["from_epoch"] is not None
        live.attempt = dataclasses.replace(
            live.attempt,
            from_epoch=result["from_epoch"],
            damaged=result["damaged"],
            epochs=result["epoch"],
            host=live.row.host,
            node_id=result["node_id"],
            pid=live.row.pid,
            gpu_ids=result["gpu_ids"],
        )
        if is_first:
            self.ledger.update_attempt(live.attempt)
            if live.attempt.damaged is not None:
                for listener in self.events:
                    listener.state_damaged(live.row, live.attempt)

    def _settle_attempt(self, live: _Live, outcome: str, reason: str | None) -> None:
        live.attempt = dataclasses.replace(live.attempt, outcome=outcome, reason=reason, ended_at=_now())
        self.ledger.update_attempt(live.attempt)

    def _settle_loss(self, live: _Live, outcome: str, reason: str, *, counts: bool = True) -> None:
        live.losses += counts
        self._settle_attempt(live, outcome, reason)

    def _loss_for_good(self, attempt: AttemptRow) -> tuple[str, str, str | None]:
        """What becomes of a trial whose worker was lost too often."""
        assert attempt.outcome is not None
        state = "PRUNED" if attempt.outcome == "oom" else "FAIL"
        return state, attempt.outcome, f"{attempt.reason}, beyond {self.spec.budget.max_retries} retries"

    def _end(self, live: _Live, outcome: tuple[str, str, str | None]) -> None:
        trial, row = live.trial, live.row
        state, status, reason = outcome
        objective: float | None
        if status in ("diverged", "oom") and self._no_latent_objective is not None:
            objective = self._no_latent_objective + PENALTY
        else:
            objective = live.told if state == "COMPLETE" else None
        row = dataclasses.replace(row, state=state, status=status, reason=reason, objective=objective, ended_at=_now())
        self.ledger.end_trial(row)
        for name, violation in constraints_of(row).items():
            trial.set_constraint(name, violation)
        if status in ("diverged", "oom") and objective is not None:
            trial.report(objective, beyond(row, _told(trial)))
        arm, _ = self.spec.place(row.trial)
        self.arms[arm].study.tell(trial, objective if state == "COMPLETE" else None, state=TrialState[state])
        if not self.gave_up:  # which is for good, also when a trial still under way ends well
            self.failures = [*self.failures, row] if state == "FAIL" else []
        for listener in self.events:
            listener.trial_ended(row)


def outcome_of(result: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Optuna's state, our status and the reason, from a trial's last result."""
    status, reason = result["status"], result["reason"]
    if status == "error":
        return "FAIL", status, reason
    if status in ("diverged", "oom") or not result["final"]:
        return "PRUNED", status, reason
    return "COMPLETE", status, reason


def updated_row(row: TrialRow, result: Mapping[str, Any]) -> TrialRow:
    """The row with what a result says; the figures are those of the last epoch."""
    known = {
        "num_parameters": result["num_parameters"],
        "no_latent_nelbo": result["no_latent_nelbo"],
        "device": result["device"],
        "host": result.get("hostname"),
        "pid": result.get("pid"),
        "train_wall_s": result["train_wall_s"],
        "step": result["step"],
        "layer": result["layer"],
    }
    if result["epochs"] and (last := result["epochs"][-1])["epoch"] >= row.epochs:  # else it goes over them again
        same = ("val_nelbo", "val_recon", "val_kl", "active_units", "train_nelbo", "samples_per_s")
        known |= {name: last[name] for name in same} | {"epochs": last["epoch"]}
    # an attempt that failed before its model was built knows less than one before it
    return dataclasses.replace(row, **{name: value for name, value in known.items() if value is not None})


def probe_rows(row: TrialRow, probes: list[dict[str, Any]]) -> tuple[list[DiagnosticsRow], list[LayerRow]]:
    """What `vae.training.Probed` has, as rows of the tables."""
    of_models, of_layers = [], []
    for probe in probes:
        where = {"study": row.study, "trial": row.trial, "epoch": probe["epoch"]}
        figures = dict(probe["diagnostics"])
        of_layers += [LayerRow(**where, **layer) for layer in figures.pop("layers")]
        own = {name: probe[name] for name in ("generalization_gap", "precision_effect")}
        of_models.append(DiagnosticsRow(**where, **figures, **own))
    return of_models, of_layers


def trial_seed(study_seed: int, number: int) -> int:
    """The seed of a trial: of its initial weights, its order of rows and its noise."""
    return int(np.random.SeedSequence([study_seed, number, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _told(trial: optuna.Trial) -> Mapping[int, float]:
    """Epoch -> what Optuna heard of it."""
    return trial.storage.get_trial(trial._trial_id).intermediate_values


def _now() -> datetime:
    return datetime.now(UTC)
