"""The finalists' runs: each trained to its end from a fresh seed, scored on the test split, written to the ledger.

Without Tune, since nothing is suggested and nothing stopped here. A run that was lost goes on from its last stored
rung, as trials do.
"""

import contextlib
import dataclasses
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from cluster.resources import Packing
from search.attempt import Attempt, Ended, Heartbeat, ended_by, set_up_torch, train_wall_s
from search.events import StudyEvents
from search.finalists import final_seed, missing_runs
from search.ledger import Ledger
from search.rounds import Rounds, is_out_of_memory, one_line
from search.spec import StudySpec
from search.tables import SCHEMAS, FinalRow, TrialRow
from vae.data import Dataset
from vae.objective import ImportanceEstimate, importance_weighted

RUNS_APART = 1000  # the store knows states by one number: as many for each trial as finalists.seeds can be
WAIT_S = 0.1

# Shapes: N rows of the test split.


@dataclass(frozen=True)
class _Result:
    ended: Ended
    known: dict[str, Any]  # columns of the row
    nll: np.ndarray  # (N,); empty where it failed
    nelbo: np.ndarray


@dataclass(frozen=True)
class _Run:
    """One under way."""

    row: FinalRow
    worker: Any
    gpus: float


class Confirmation:
    """What is missing of a study's finals. `failures`: runs that failed one after the other, up to now."""

    def __init__(
        self,
        spec: StudySpec,
        data: Dataset,
        ledger: Ledger,
        store: Any,
        rows: list[TrialRow],
        finals: list[FinalRow],
        events: Sequence[StudyEvents],
        packing: Packing | None,
    ) -> None:
        begun = {final.key: final for final in finals}
        missing = missing_runs(spec, rows, finals)
        self.failures: list[FinalRow] = []
        self._spec, self._ledger, self._store, self._events = spec, ledger, store, events
        self._trials = {row.trial: row for row, _ in missing}
        self._waiting = deque(self._anew(begun.get((row.trial, run)), row, run) for row, run in missing)
        self._losses: Counter[Hashable] = Counter()  # of each run, under this driver
        self._running: dict[Any, _Run] = {}  # by the result's reference
        self._idle: list[Any] = []  # workers
        self._stalled: set[str] = set()  # runs that are being ended because nothing moved
        self._unneeded: list[int] = []  # states in the store
        self._data, self._packing = ray.put(data), packing
        # Actors: of a host that fell silent Ray (2.60) tells who waits for one, and not who waits for a plain task
        self._worker: Any = ray.remote(_Worker)
        ended = len(finals) - sum(final.state == "RUNNING" for final in finals)
        for listener in events:
            listener.confirmation_started(ended + len(missing), ended)

    @property
    def gave_up(self) -> bool:
        return len(self.failures) >= self._spec.budget.max_consecutive_failures

    def run(self, rounds: Rounds, slots_for: Callable[[int, int], int]) -> None:
        """Until all have ended, or too many in a row have failed. slots_for: see `search.sampler.SlotsFor`."""
        while self._running or (self._waiting and not self.gave_up):
            under_way = len(self._running)
            slots = slots_for(under_way + len(self._waiting), under_way)
            while self._waiting and len(self._running) < slots and not self.gave_up:
                self._start(self._waiting.popleft(), rounds)
            self._idle.clear()  # nothing waits for them now; a worker without a handle ends
            if not self._running:
                time.sleep(WAIT_S)  # others on the cluster are first
            ended, _ = ray.wait(list(self._running), timeout=WAIT_S)
            for result in ended:
                rounds.watchdog.ended(result.hex())
                self._take(result, self._running.pop(result))
            rounds()

    def stalled(self, result: str) -> None:
        """The worker of a run is about to be killed, since nothing moved."""
        self._stalled.add(result)

    def drop_unneeded(self) -> None:
        """Drop the states of runs that have ended. To be called while all that the ledger knows is on disk."""
        for number in self._unneeded:
            self._store.drop.remote(number)  # not waited for
        self._unneeded.clear()

    def _anew(self, before: FinalRow | None, row: TrialRow, run: int) -> FinalRow:
        if before is not None:
            return dataclasses.replace(before, state="RUNNING", status=None, reason=None, ended_at=None)
        return FinalRow(
            study=self._spec.name,
            trial=row.trial,
            activation=row.activations,
            run=run,
            seed=final_seed(self._spec.seed, run),
            state="RUNNING",
            importance_samples=self._spec.finalists.importance_samples,
        )

    def _start(self, row: FinalRow, rounds: Rounds) -> None:
        row = dataclasses.replace(row, attempts=row.attempts + 1, started_at=row.started_at or datetime.now(UTC))
        params = self._trials[row.trial].params
        number = _number(row)
        gpus = self._spec.resources.gpus(self._packing)
        new = self._worker.options(num_cpus=self._spec.resources.cpus_per_trial, num_gpus=gpus)
        worker = self._idle.pop() if self._idle else new.remote()
        what = {"number": number, "params": params, "seed": row.seed, "gpus": gpus}
        result = worker.train_and_score.remote(self._spec, self._data, self._store, **what)
        rounds.watchdog.started(result.hex(), number, worker)
        for listener in self._events:
            listener.final_started(row)
        row = dataclasses.replace(row, status=None, reason=None)  # of an earlier attempt
        self._running[result] = _Run(row, worker, gpus)
        self._ledger.update_final(row)

    def _take(self, reference: Any, run: _Run) -> None:
        row = run.row
        try:
            result: _Result = ray.get(reference)
        except RayError as error:
            self._lost(reference, row, error)
            return
        ended = result.ended
        if ended.status == "oom" and self._packing is not None and run.gpus < 1:
            if run.gpus == self._packing.share:
                self._packing = self._packing.with_fewer()
            self._store.forget.remote(_number(row))
            self._waiting.appendleft(dataclasses.replace(row, status="oom", reason=ended.reason))
            return  # to be made again with a larger part of a GPU
        if run.gpus == self._spec.resources.gpus(self._packing):
            self._idle.append(run.worker)
        state = "COMPLETE" if ended.status in ("ok", "collapsed") else "FAIL"
        row = dataclasses.replace(row, **result.known, ended_at=datetime.now(UTC))
        row = dataclasses.replace(row, state=state, status=ended.status, reason=ended.reason)
        self._end(row, result.nll, result.nelbo)

    def _lost(self, reference: Any, row: FinalRow, error: RayError) -> None:
        """Start it again, or give it up if it was lost too often."""
        stalled = reference.hex() in self._stalled
        status = "timeout" if stalled else "oom" if is_out_of_memory(error) else "lost"
        reason = one_line(error) if not stalled else "no training step for too long"
        row = dataclasses.replace(row, status=status, reason=reason)
        self._store.forget.remote(_number(row))
        self._losses[row.key] += not getattr(error, "preempted", False)  # else the cluster took the node away
        if self._losses[row.key] <= self._spec.budget.max_retries:
            self._waiting.appendleft(row)
            return
        none = np.empty(0)
        reason = f"{reason}, beyond {self._spec.budget.max_retries} retries"
        self._end(dataclasses.replace(row, state="FAIL", reason=reason, ended_at=datetime.now(UTC)), none, none)

    def _end(self, row: FinalRow, nll: np.ndarray, nelbo: np.ndarray) -> None:
        self._ledger.end_final(row, _images(row, nll, nelbo))
        self._unneeded.append(_number(row))
        self.failures = [*self.failures, row] if row.status not in ("ok", "collapsed", "diverged") else []
        for listener in self._events:
            listener.final_ended(row)


def _number(row: FinalRow) -> int:
    """By which the store knows a run."""
    return row.trial * RUNS_APART + row.run


def _images(row: FinalRow, nll: np.ndarray, nelbo: np.ndarray) -> pa.Table:
    size = len(nll)
    columns = [[row.study] * size, np.full(size, row.trial), np.full(size, row.run), np.arange(size), nll, nelbo]
    schema = SCHEMAS["final_images"]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


class _Worker:
    """Lives on from run to run."""

    def train_and_score(self, spec: StudySpec, data: Dataset, store: Any, **what: Any) -> _Result:
        return _train_and_score(spec, data, store, **what)


def _train_and_score(
    spec: StudySpec, data: Dataset, store: Any, *, number: int, params: dict[str, Any], seed: int, gpus: float
) -> _Result:
    """In a worker. What fails in it is told, and only what is no fault of the run raised."""
    set_up_torch(spec.resources.cpus_per_trial, gpus)
    attempt = Attempt(spec, data, store, number=number, params=params, seed=seed, gpus=gpus)
    known: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    nll = nelbo = np.empty(0)
    with contextlib.closing(Heartbeat(store, spec.budget.stall_timeout_s)) as heartbeat:
        heartbeat.attempt = attempt
        try:
            while not attempt.is_final:
                attempt.advance()
            collapse = attempt.collapse()
            ended = Ended("ok") if collapse is None else Ended("collapsed", collapse)
            scores, figures = _score(spec, data, attempt)
            nll, nelbo = -scores.log_likelihood, -scores.elbo
            known |= figures
        except Exception as error:  # nothing may be lost
            ended = ended_by(error)
    if (trainer := attempt.trainer) is not None:
        known |= {"num_parameters": trainer.model.num_parameters, "device": str(trainer.device)}
    if history := attempt.history:
        known |= {name: history[-1][name] for name in ("val_nelbo", "active_units")}
        known |= {"epochs": history[-1]["epoch"], "train_wall_s": train_wall_s(history)}
    return _Result(ended, known, nll, nelbo)


def _score(spec: StudySpec, data: Dataset, attempt: Attempt) -> tuple[ImportanceEstimate, dict[str, Any]]:
    """The trained model on the test split, with noise that depends on the study's seed and the row alone."""
    assert attempt.trainer is not None
    model = attempt.trainer.result
    started = time.perf_counter()

    def tell(rows: int) -> None:
        attempt.rows_scored = rows

    x = torch.from_dlpack(data.test).to(attempt.trainer.device)
    scores = importance_weighted(model, x, spec.finalists.importance_samples, spec.seed, progress=tell)
    bad = np.flatnonzero(~(np.isfinite(scores.log_likelihood) & np.isfinite(scores.elbo)))
    if len(bad):
        raise ArithmeticError(f"the bound of row {bad[0]} of the test split is {scores.elbo[bad[0]]}")
    return scores, {
        "nll": scores.nll,
        "nelbo": scores.nelbo,
        "effective_samples": float(np.median(scores.effective_samples)),
        "no_latent_nelbo": model.likelihood.no_latent_nelbo(data.train, data.test),
        "score_wall_s": time.perf_counter() - started,
    }
