"""The searcher alone, fed by hand: what Optuna is told of every end of a trial, and how the ledger tells it again."""

import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune.search import Searcher

from cluster.resources import Packing
from search import ledger as ledger_module
from search.ledger import Ledger
from search.results import PENALTY, summarise
from search.sampler import StudySearcher
from search.space import Space
from search.spec import StudySpec
from search.tables import TrialRow, read_table, read_trials

NO_LATENT = 30.0  # nats, in every result made here
RUNGS_AND_END = (2, 3, 6)
CONSTRAINTS = ("collapsed", "diverged", "oom")


def make_spec(**sections: Any) -> StudySpec:
    values: dict[str, Any] = {
        "name": "s",
        "budget": {"trials": 20, "max_epochs": 6},
        "sampler": {"startup_trials": 4},
        "scheduler": {"grace_epochs": 1},
    }
    for section, value in sections.items():
        values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return StudySpec.model_validate(values)


class Desk:
    """A searcher over a real ledger, and by hand what Tune and the workers do."""

    def __init__(self, path: Path, spec: StudySpec | None = None) -> None:
        self.path, self.spec = path, spec or make_spec()
        self.ledger = Ledger(path)
        curves: dict[int, dict[int, float]] = {}
        for row in read_table(path, "epochs").to_pylist():
            curves.setdefault(row["trial"], {})[row["epoch"]] = row["val_nelbo"]
        self.searcher = StudySearcher(self.spec, self.ledger, read_trials(path), curves, [])
        self.num_asked = 0

    def ask(self, *, is_placed: bool = True) -> tuple[str, dict[str, Any]]:
        trial_id = f"tune-{self.num_asked}"
        self.num_asked += 1
        config = self.searcher.suggest(trial_id)
        assert isinstance(config, dict), config
        if is_placed:
            self.searcher.placed(trial_id)
        return trial_id, config

    def end(self, trial_id: str, result: dict[str, Any] | None, error: bool = False) -> None:
        """As Tune does it: the last result comes with the end and not before it."""
        self.searcher.on_trial_complete(trial_id, result, error)
        self.ledger.flush()

    def lose(self, trial_id: str, error: Exception) -> None:
        """Its worker, again and again, once too often."""
        for _ in range(self.spec.budget.max_retries):
            trial_id = self.try_again(trial_id, error)
        self.searcher.worker_lost(trial_id, error)
        self.end(trial_id, None, error=True)

    def try_again(self, trial_id: str, error: Exception) -> str:
        """Its worker is lost, and it gets another one. Returns the id that it has from then on."""
        self.searcher.worker_lost(trial_id, error)
        self.end(trial_id, None, error=True)
        return self.ask()[0]

    def row(self, number: int) -> TrialRow:
        self.ledger.flush()
        return read_trials(self.path)[number]

    def told(self, number: int) -> FrozenTrial:
        return self.searcher.arms[0].study.get_trials(deepcopy=False)[number]

    def reborn(self, path: Path) -> "Desk":
        """Another driver, later, on a copy of what is on disk."""
        self.ledger.flush()
        shutil.copytree(self.path, path)
        return Desk(path, self.spec)


def anew(config: dict[str, Any]) -> dict[str, Any]:
    """What a worker gets for a trial that another one had begun."""
    return {**config, "is_first": False}


def result(
    values: dict[int, float], *, final: bool = False, status: str = "ok", reason: str | None = None, **more: Any
) -> dict[str, Any]:
    """What search.trial.VaeTrial reports of the epochs in `values`, and Tune adds to it."""
    epochs = [
        {
            "epoch": epoch,
            "train_nelbo": value + 1,
            "train_recon": value - 1,
            "train_kl": 2.0,
            "val_nelbo": value,
            "val_recon": value - 3,
            "val_kl": 3.0,
            "active_units": 2,
            "grad_norm": 1.0,
            "clipped_steps": 0,
            "skipped_steps": 0,
            "kl_weight": 1.0,
            "wall_s": 0.1,
            "samples_per_s": 1000.0,
            "objective": value,
        }
        for epoch, value in values.items()
    ]
    return {
        "epochs": epochs,
        "epoch": max(values, default=0),
        "objective": values[max(values)] if values else math.inf,
        "final": final,
        "status": status,
        "reason": reason,
        "probes": [],
        "step": None,
        "layer": None,
        "from_epoch": 0,
        "damaged": None,
        "num_parameters": 100,
        "no_latent_nelbo": NO_LATENT,
        "no_latent_objective": NO_LATENT,
        "device": "cpu",
        "train_wall_s": 0.5,
        "done": final or status != "ok",
        "hostname": "here",
        "node_id": "f0",
        "gpu_ids": [],
        "pid": 7,
        **more,
    }


def curve(first: int, last: int, start: float = 29.0) -> dict[int, float]:
    return {epoch: start - 0.5 * epoch for epoch in range(first, last + 1)}


def essence(trial: FrozenTrial) -> tuple[object, ...]:
    """All of a trial that a sampler looks at."""
    return (
        trial.number,
        trial.state,
        trial.params,
        trial.distributions,
        trial.values,
        trial.intermediate_values,
        {name: trial.constraints.get(name) for name in CONSTRAINTS},
    )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "s")


# ---- what became of a trial, and what Optuna is told


def test_a_trial_trained_to_its_end_is_complete_with_its_last_validation_value(desk):
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 3)))
    desk.end(trial_id, result(curve(4, 6), final=True))
    told, row = desk.told(0), desk.row(0)
    assert (told.state, told.value) == (TrialState.COMPLETE, 26.0)
    assert told.intermediate_values == curve(1, 6)
    assert told.constraints == dict.fromkeys(CONSTRAINTS, 0.0)
    assert (row.state, row.status, row.objective, row.val_nelbo, row.epochs) == ("COMPLETE", "ok", 26.0, 26.0, 6)
    assert (row.reason, row.num_parameters, row.host, row.pid) == (None, 100, "here", 7)
    assert row.ended_at >= row.suggested_at


def test_a_stopped_trial_is_pruned_after_its_last_values_were_reported(desk):
    """Tune keeps the result on which a trial is stopped from on_trial_result: it must not be lost."""
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 1)))
    desk.end(trial_id, result(curve(2, 3)))
    told, row = desk.told(0), desk.row(0)
    assert (told.state, told.value) == (TrialState.PRUNED, 27.5)
    assert told.intermediate_values == curve(1, 3)
    assert (row.state, row.status, row.objective, row.val_nelbo, row.epochs) == ("PRUNED", "ok", None, 27.5, 3)


def test_a_trial_stopped_on_its_first_result_is_pruned_with_its_values(desk):
    trial_id, _ = desk.ask()
    desk.end(trial_id, result(curve(1, 2)))
    assert desk.told(0).intermediate_values == curve(1, 2)
    assert desk.told(0).state == TrialState.PRUNED


def test_a_collapsed_trial_is_complete_with_its_value_and_violates_its_constraint(desk):
    trial_id, _ = desk.ask()
    desk.end(trial_id, result(curve(1, 6, 33.5), final=True, status="collapsed", reason="no active latent unit"))
    told, row = desk.told(0), desk.row(0)
    assert (told.state, told.value) == (TrialState.COMPLETE, 30.5)
    assert told.constraints == {"collapsed": 1.0, "diverged": 0.0, "oom": 0.0}
    assert (row.state, row.status, row.reason) == ("COMPLETE", "collapsed", "no active latent unit")


@pytest.mark.parametrize("status", ["diverged", "oom"])
@pytest.mark.parametrize("epochs_before", [0, 3])
def test_a_trial_that_blew_up_is_pruned_with_a_finite_penalty_and_violates_its_constraint(desk, status, epochs_before):
    trial_id, _ = desk.ask()
    if epochs_before:
        desk.searcher.on_trial_result(trial_id, result(curve(1, epochs_before)))
    desk.end(trial_id, result({}, status=status, reason="why"))
    told, row = desk.told(0), desk.row(0)
    assert told.state == TrialState.PRUNED
    assert told.constraints == {name: float(name == status) for name in CONSTRAINTS}
    assert math.isfinite(told.value)
    assert told.value > NO_LATENT  # worse than a model that has learned nothing
    assert max(told.intermediate_values) == epochs_before + 1
    assert {e: v for e, v in told.intermediate_values.items() if e <= epochs_before} == curve(1, epochs_before)
    assert (row.state, row.status, row.reason, row.epochs) == ("PRUNED", status, "why", epochs_before)
    assert row.objective == told.value
    assert row.val_nelbo == (27.5 if epochs_before else None)


def test_a_trial_whose_model_could_not_even_be_built_is_pruned_too(desk):
    trial_id, _ = desk.ask()
    unbuilt = {"no_latent_nelbo": None, "num_parameters": None, "device": None, "train_wall_s": 0.0}
    desk.end(trial_id, result({}, status="oom", reason="can't allocate memory", **unbuilt))
    assert desk.told(0).state == TrialState.PRUNED
    assert desk.told(0).constraints["oom"] == 1.0
    assert (desk.row(0).state, desk.row(0).status) == ("PRUNED", "oom")


def test_an_error_is_a_failure_with_its_reason_in_the_ledger(desk):
    trial_id, _ = desk.ask()
    desk.end(trial_id, result(curve(1, 2), status="error", reason="RuntimeError: boom"))
    row = desk.row(0)
    assert desk.told(0).state == TrialState.FAIL
    assert (row.state, row.status, row.reason, row.objective) == ("FAIL", "error", "RuntimeError: boom", None)
    assert read_table(desk.path, "epochs")["epoch"].to_pylist() == [1, 2]


def test_a_worker_lost_for_good_is_a_failure_that_says_what_took_it(desk):
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 2)))
    desk.lose(trial_id, RuntimeError("The actor died unexpectedly\nand more"))
    row = desk.row(0)
    assert desk.told(0).state == TrialState.FAIL
    assert (row.state, row.status) == ("FAIL", "lost")
    assert "The actor died unexpectedly" in row.reason
    assert str(desk.spec.budget.max_retries) in row.reason


def test_a_node_that_the_cluster_takes_away_does_not_count_against_its_trials(desk):
    info = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    preempted = ActorDiedError(ActorDiedErrorContext(actor_id=b"0" * 16, node_death_info=info))
    trial_id, _ = desk.ask()
    for _ in range(desk.spec.budget.max_retries + 2):
        trial_id = desk.try_again(trial_id, preempted)
    desk.end(trial_id, result(curve(1, 6), final=True))
    assert (desk.row(0).state, desk.row(0).status) == ("COMPLETE", "ok")
    outcomes = read_table(desk.path, "attempts")["outcome"].to_pylist()
    assert outcomes == ["lost"] * (desk.spec.budget.max_retries + 2) + ["ended"]


def test_out_of_memory_on_a_shared_gpu_means_a_larger_share_for_it_and_all_that_follow(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(resources={"gpus_per_trial": "auto"}))
    desk.searcher.packing = Packing(4)
    (first, config), (second, _) = desk.ask(), desk.ask()
    assert config["gpus"] == 0.25
    desk.end(first, result({}, status="oom", reason="CUDA out of memory"))
    desk.end(second, result({}, status="oom", reason="CUDA out of memory"))  # from the same crowd: halved once
    again, config = desk.ask()
    assert (config["trial"], config["gpus"]) == (0, 0.5)
    other, config = desk.ask()
    assert (config["trial"], config["gpus"]) == (1, 0.5)
    desk.end(again, result(curve(1, 6), final=True))
    desk.searcher.packing = Packing(1)  # somebody else ran out of it at the same share, and was first
    desk.end(other, result({}, status="oom"))
    alone, config = desk.ask()
    assert (config["trial"], config["gpus"]) == (1, 1.0)
    desk.end(alone, result({}, status="oom", reason="even so"))  # now it is the model's own
    assert (desk.row(1).state, desk.row(1).status) == ("PRUNED", "oom")
    rows = read_table(desk.path, "attempts").sort_by([("trial", "ascending"), ("attempt", "ascending")])
    assert rows.select(["trial", "gpus", "outcome"]).to_pylist() == [
        {"trial": 0, "gpus": 0.25, "outcome": "oom"},
        {"trial": 0, "gpus": 0.5, "outcome": "ended"},
        {"trial": 1, "gpus": 0.25, "outcome": "oom"},
        {"trial": 1, "gpus": 0.5, "outcome": "oom"},
        {"trial": 1, "gpus": 1.0, "outcome": "ended"},
    ]
    assert "0.25 of a GPU; now with 0.5" in rows["reason"][0].as_py()
    assert desk.told(0).state == TrialState.COMPLETE
    assert desk.row(0).attempts == 2


def test_a_study_starts_no_more_than_its_share_and_goes_on_when_there_is_room(desk):
    share, asked = 2, []

    def slots_for(wanted: int, at_work: int) -> int:
        asked.append((wanted, at_work))
        return share

    desk.searcher.slots_for = slots_for
    one, two = desk.ask(), desk.ask(is_placed=False)
    assert desk.searcher.suggest("more") is None
    assert desk.searcher.is_holding_back
    assert asked[-1] == (desk.spec.budget.trials, 1)  # who waits for a worker has had nothing yet
    desk.end(one[0], result(curve(1, 6), final=True))
    assert desk.ask()[1]["trial"] == 2
    share = 0  # somebody else's turn
    desk.end(two[0], result(curve(1, 6), final=True))
    assert desk.searcher.suggest("more") is None
    share = 9
    assert desk.ask()[1]["trial"] == 3
    assert not desk.searcher.is_holding_back


def test_an_interrupted_trial_stays_running_in_the_ledger(desk):
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 2)))
    desk.end(trial_id, None)
    row = desk.row(0)
    assert (row.state, row.status, row.ended_at) == ("RUNNING", None, None)


def test_an_end_is_heard_once(desk):
    trial_id, _ = desk.ask()
    desk.end(trial_id, result(curve(1, 6), final=True))
    before = desk.row(0)
    desk.end(trial_id, None, error=True)
    desk.end("never heard of", result(curve(1, 2)))
    assert desk.row(0) == before
    assert len(desk.searcher.arms[0].study.get_trials()) == 1


def test_epochs_that_a_retried_trial_reports_again_are_neither_doubled_nor_told_twice(desk):
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 3)))
    trial_id = desk.try_again(trial_id, RuntimeError("killed"))
    desk.searcher.on_trial_result(trial_id, result(curve(1, 4)))  # Optuna would warn of a second report
    desk.end(trial_id, result(curve(5, 6), final=True))
    epochs = read_table(desk.path, "epochs")
    assert epochs["epoch"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert epochs["attempt"].to_pylist() == [1, 1, 1, 2, 2, 2]
    assert desk.told(0).intermediate_values == curve(1, 6)
    assert desk.row(0).attempts == 2


# ---- attempts


def attempts(desk: Desk, trial: int) -> list[tuple[object, ...]]:
    desk.ledger.flush()
    rows = [row for row in read_table(desk.path, "attempts").to_pylist() if row["trial"] == trial]
    return [(row["attempt"], row["outcome"], row["from_epoch"], row["epochs"]) for row in rows]


def test_every_attempt_has_a_row_with_its_end_and_where_it_began(desk):
    trial_id, _ = desk.ask()
    assert attempts(desk, 0) == [(1, None, None, 0)]
    desk.searcher.on_trial_result(trial_id, result(curve(1, 3)))
    trial_id = desk.try_again(trial_id, RuntimeError("killed"))
    desk.searcher.on_trial_result(trial_id, result(curve(1, 4), from_epoch=2, damaged="the state of epoch 3"))
    desk.end(trial_id, result(curve(5, 6), from_epoch=2, damaged="the state of epoch 3", final=True))
    assert attempts(desk, 0) == [(1, "lost", 0, 3), (2, "ended", 2, 6)]
    table = read_table(desk.path, "attempts").to_pylist()
    assert [row["reason"] for row in table] == ["killed", None]
    assert [row["damaged"] for row in table] == [None, "the state of epoch 3"]
    assert all(row["ended_at"] >= row["started_at"] for row in table)


def test_an_attempt_of_a_driver_that_died_is_interrupted(tmp_path):
    desk = Desk(tmp_path / "live")
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 2)))
    again = desk.reborn(tmp_path / "again")
    again.ask()
    assert attempts(again, 0) == [(1, "interrupted", 0, 2), (2, None, None, 0)]
    desk.end(trial_id, None)  # one that was told to stop
    assert attempts(desk, 0) == [(1, "interrupted", 0, 2)]


def test_a_suggestion_made_ahead_is_on_disk_and_waits_for_the_next_worker(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 4}))
    desk.searcher.ask_ahead()
    trial_id, _ = desk.ask()
    desk.searcher.ask_ahead()
    assert len(read_trials(desk.path)) == 1  # a single worker's next trial may as well know of the last
    desk.ask()
    for _ in range(2):
        desk.searcher.ask_ahead()  # again and again, and one it is
    assert desk.row(2).state == "RUNNING"
    assert len(read_trials(desk.path)) == 3
    assert attempts(desk, 2) == [(1, None, None, 0)]
    params = desk.row(2).params
    assert desk.searcher.num_to_come == 2
    desk.end(trial_id, result(curve(1, 6), final=True))
    _, config = desk.ask()
    assert (config["trial"], config["is_first"]) == (2, True)
    assert config["params"].items() <= params.items()
    desk.ask()
    desk.searcher.ask_ahead()
    assert desk.searcher.num_to_come == 0
    assert [row.attempts for row in read_trials(desk.path)] == [1, 1, 1, 1]


def test_nothing_is_suggested_ahead_while_others_have_the_cluster(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 4}))
    desk.ask()
    desk.ask()
    desk.searcher.slots_for = lambda wanted, at_work: 2
    desk.searcher.claim()
    assert desk.searcher.is_holding_back
    desk.searcher.ask_ahead()
    assert len(read_trials(desk.path)) == 2


def test_a_suggestion_made_ahead_is_the_next_one_of_a_driver_that_comes_after(tmp_path):
    desk = Desk(tmp_path / "study", make_spec(budget={"trials": 3}))
    desk.ask()
    desk.ask()
    desk.searcher.ask_ahead()
    again = desk.reborn(tmp_path / "copy")
    configs = [again.ask()[1] for _ in range(3)]
    assert [config["trial"] for config in configs] == [0, 1, 2]
    assert configs[2] == anew(desk.ask()[1])


def test_a_trial_that_never_had_a_worker_was_not_started_by_the_driver_that_died(tmp_path):
    """One that was suggested ahead, and one that was still waiting for its worker."""
    desk = Desk(tmp_path / "study", make_spec(budget={"trials": 4}))
    desk.ask()
    desk.ask()
    desk.searcher.ask_ahead()
    desk.ask(is_placed=False)
    desk.searcher.ask_ahead()
    again = desk.reborn(tmp_path / "copy")
    for _ in range(4):
        trial_id, config = again.ask()
        assert not config["is_first"]  # the driver may have died before it could say that there was a worker
        again.end(trial_id, result(curve(1, 6), final=True))
    assert [row.attempts for row in read_trials(again.path)] == [2, 2, 1, 1]
    assert summarise("s", 4, read_trials(again.path)).restarts == 2
    ended = [(1, "ended", 0, 6)]
    cut_off = [(1, "interrupted", None, 0), (2, "ended", 0, 6)]
    assert [attempts(again, trial) for trial in range(4)] == [cut_off, cut_off, ended, ended]


def test_a_trial_whose_worker_is_lost_is_suggested_again_also_as_the_last_of_all(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 2, "max_retries": 2}))
    trial_id, config = desk.ask()
    other, _ = desk.ask()
    assert desk.searcher.suggest("more") is None  # for now: one may come back
    losses = [lambda: desk.searcher.worker_lost(trial_id, RuntimeError("killed")), lambda: None]
    for told in losses:  # Tune may tell of it, or not
        told()
        desk.end(trial_id, None, error=True)
        assert desk.row(0).state == "RUNNING"
        trial_id, again = desk.ask()
        assert again == anew(config)
    desk.end(other, result(curve(1, 6), final=True))
    assert desk.searcher.suggest("more") is None
    desk.end(trial_id, result(curve(1, 6), final=True))
    assert desk.searcher.suggest("more") == Searcher.FINISHED
    assert attempts(desk, 0) == [(1, "lost", None, 0), (2, "lost", None, 0), (3, "ended", 0, 6)]
    assert desk.told(0).state == TrialState.COMPLETE
    assert len(desk.searcher.arms[0].study.get_trials()) == 2


def test_one_that_is_lost_too_often_is_lost_for_good(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 1, "max_retries": 2}))
    for _ in range(3):
        trial_id, _ = desk.ask()
        desk.end(trial_id, None, error=True)
    assert (desk.row(0).state, desk.row(0).status, desk.row(0).attempts) == ("FAIL", "lost", 3)
    assert desk.searcher.suggest("more") == Searcher.FINISHED


def test_a_stalled_worker_is_a_timeout_and_one_too_many_a_failure(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 9, "max_retries": 2}))
    trial_id, _ = desk.ask()
    desk.searcher.stalled(trial_id)
    trial_id = desk.try_again(trial_id, RuntimeError("The actor is dead because it was killed by `ray.kill`."))
    trial_id = desk.try_again(trial_id, RuntimeError("killed"))
    desk.searcher.stalled(trial_id)
    desk.searcher.worker_lost(trial_id, RuntimeError("The actor is dead because it was killed by `ray.kill`."))
    desk.end(trial_id, None, error=True)
    assert [outcome for _, outcome, _, _ in attempts(desk, 0)] == ["timeout", "lost", "timeout"]
    row = desk.row(0)
    assert (row.state, row.status, row.attempts) == ("FAIL", "timeout", 3)
    assert f"{desk.spec.budget.stall_timeout_s:g} s" in row.reason
    assert desk.told(0).state == TrialState.FAIL


def test_a_worker_killed_for_memory_too_often_is_out_of_memory_to_the_sampler(desk):
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 2)))
    desk.lose(trial_id, OutOfMemoryError("Task was killed due to the node running low on memory."))
    row = desk.row(0)
    assert (row.state, row.status) == ("PRUNED", "oom")
    assert desk.told(0).constraints["oom"] == 1.0
    assert row.objective == NO_LATENT + PENALTY


def test_a_trial_that_runs_out_of_memory_in_a_later_attempt_has_the_penalty_of_what_was_known_before(tmp_path):
    first = Desk(tmp_path / "s")
    first.end(first.ask()[0], result(curve(1, 6), final=True))
    trial_id, _ = first.ask()
    first.searcher.on_trial_result(trial_id, result(curve(1, 2)))
    unbuilt = {"num_parameters": None, "no_latent_nelbo": None, "no_latent_objective": None, "device": None}
    failed = result({}, status="oom", reason="can't allocate memory", **unbuilt)
    later = first.reborn(tmp_path / "later")
    later.end(later.ask()[0], failed)
    assert later.row(1).objective == NO_LATENT + PENALTY
    first.end(trial_id, failed)
    assert (first.row(1).objective, first.row(1).num_parameters) == (NO_LATENT + PENALTY, 100)


def test_an_attempt_that_goes_over_known_epochs_takes_nothing_back(tmp_path):
    """And the penalty of its end comes behind all that the sampler was told, in a study rebuilt from the ledger too."""
    first = Desk(tmp_path / "s")
    first.end(first.ask()[0], result(curve(1, 6), final=True))
    trial_id, _ = first.ask()
    first.searcher.on_trial_result(trial_id, result(curve(1, 5)))
    trial_id = first.try_again(trial_id, RuntimeError("killed"))
    first.searcher.on_trial_result(trial_id, result(curve(1, 2), from_epoch=2))
    assert first.row(1).epochs == 5
    first.lose(trial_id, OutOfMemoryError("Task was killed due to the node running low on memory."))
    row, told = first.row(1), first.told(1)
    assert (row.status, row.epochs, row.val_nelbo) == ("oom", 5, curve(1, 5)[5])
    assert told.intermediate_values == {**curve(1, 5), 6: NO_LATENT + PENALTY}
    assert [epochs for *_, epochs in attempts(first, 1)][:2] == [5, 2]
    assert essence(first.reborn(tmp_path / "later").told(1)) == essence(told)


# ---- the ledger


def test_a_suggestion_waits_for_the_disk_and_is_the_same_when_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "START_WAIT_S", 0.05)
    desk, other = Desk(tmp_path / "s"), Desk(tmp_path / "other")
    shutil.rmtree(tmp_path / "s")  # a disk that cannot be written
    waited: list[int] = []
    desk.searcher.while_waiting = lambda: waited.append(1)
    assert desk.searcher.suggest("tune-0") is None
    assert waited == [1]
    assert desk.searcher.suggest("tune-1") is None
    assert desk.ledger.error is not None
    for table in ("trials", "epochs", "attempts"):
        (tmp_path / "s" / table).mkdir(parents=True)
    assert desk.ledger.writer.wait(timeout_s=10)
    monkeypatch.undo()
    _, config = desk.ask()
    assert config == other.ask()[1]
    assert [row.trial for row in read_trials(desk.path)] == [0]
    assert desk.ask()[1] == other.ask()[1]


def test_trials_whose_rows_were_lost_are_tried_anew_under_their_numbers(tmp_path):
    desk = Desk(tmp_path / "live", make_spec(budget={"trials": 6}))
    asked = [desk.ask() for _ in range(5)]
    for trial_id, _ in asked[:4]:
        desk.end(trial_id, result(curve(1, 6), final=True))
    desk.ledger.flush()
    (part,) = (tmp_path / "live" / "trials").iterdir()
    table = pq.read_table(part)
    for kept, lost in (([1, 4], [0, 2, 3]), ([0], [1, 2, 3, 4])):  # the middle, and the end
        path = tmp_path / f"lost-{len(lost)}"
        shutil.copytree(desk.path, path)
        rows = table.filter(pa.compute.is_in(table["trial"], pa.array(kept, pa.int32())))
        pq.write_table(rows, path / "trials" / part.name)
        again = Desk(path, desk.spec)
        numbers = [again.ask()[1]["trial"] for _ in range(6 - len([n for n in kept if n != 4]))]
        assert numbers == [n for n in range(6) if n not in kept or n == 4]
        assert again.searcher.suggest("more") is None
        again.ledger.flush()
        assert [row.trial for row in read_trials(path)] == list(range(6))
        assert set(read_table(path, "epochs")["trial"].to_pylist()) <= set(kept)  # those of the lost rows went, too
        assert {row["trial"] for row in read_table(path, "attempts").to_pylist()} == set(range(6))


def test_a_suggestion_is_on_disk_when_it_is_handed_out(desk):
    for number in range(3):
        _, config = desk.ask()
        stored = [row for file in desk.path.glob("trials/*.parquet") for row in pq.read_table(file).to_pylist()]
        assert [row["trial"] for row in stored] == list(range(number + 1))
        last = stored[-1]
        assert last["state"] == "RUNNING"
        assert last["seed"] == config["seed"]
        assert last["attempts"] == 1
        assert {name: last[name] for name in ("activation", "dropout", "learning_rate", "latent_dim")} == {
            name: config["params"][name] for name in ("activation", "dropout", "learning_rate", "latent_dim")
        }
        assert last["leaky_relu_slope"] == config["params"].get("leaky_relu_slope")


OUTCOMES = ("complete", "stopped", "collapsed", "diverged", "diverged at once", "oom unbuilt", "error", "lost", "live")


def play(desk: Desk, rng: random.Random, trials: int) -> Counter[str]:
    """Let `trials` trials end in every way there is, out of order, some not at all."""
    open_, seen = [], Counter[str]()
    for _ in range(trials):
        open_.append(desk.ask()[0])
        if rng.random() < 0.3 and len(open_) < 4:
            continue  # several at once
        trial_id = open_.pop(rng.randrange(len(open_)))
        outcome = rng.choice(OUTCOMES)
        seen[outcome] += 1
        values = {e: rng.uniform(22, 35) for e in range(1, 7)}
        early = {e: values[e] for e in range(1, rng.choice(RUNGS_AND_END[:-1]) + 1)}
        if rng.random() < 0.5 and outcome not in ("diverged at once", "oom unbuilt"):
            desk.searcher.on_trial_result(trial_id, result({1: values[1]}))
            values.pop(1)
            early.pop(1)
        match outcome:
            case "complete":
                desk.end(trial_id, result(values, final=True))
            case "stopped":
                desk.end(trial_id, result(early))
            case "collapsed":
                desk.end(trial_id, result(values, final=True, status="collapsed", reason="?"))
            case "diverged":
                desk.end(trial_id, result(early, status="diverged", reason="?"))
            case "diverged at once":
                desk.end(trial_id, result({}, status="diverged", reason="?"))
            case "oom unbuilt":
                desk.end(trial_id, result({}, status="oom", reason="?", no_latent_nelbo=None, num_parameters=None))
            case "error":
                desk.end(trial_id, result(early, status="error", reason="?"))
            case "lost":
                desk.lose(trial_id, RuntimeError("killed"))
            case "live":
                desk.end(trial_id, None)
    return seen


def test_a_study_rebuilt_from_the_ledger_equals_the_live_one_and_suggests_the_same_next(tmp_path):
    seen = Counter[str]()
    for seed in range(5):
        spec = make_spec(seed=seed, budget={"trials": 40, "max_consecutive_failures": 40})
        desk = Desk(tmp_path / f"live-{seed}", spec)
        seen += play(desk, random.Random(seed), trials=16)
        again = desk.reborn(tmp_path / f"again-{seed}")
        live, rebuilt = desk.searcher.arms[0].study.get_trials(), again.searcher.arms[0].study.get_trials()
        assert len(live) == len(rebuilt) == 16
        running = [trial for trial in live if trial.state == TrialState.RUNNING]
        waiting = [trial for trial in rebuilt if trial.state == TrialState.WAITING]
        assert [t.number for t in running] == [t.number for t in waiting]
        assert [t.params for t in running] == [t.system_attrs["fixed_params"] for t in waiting]
        ended = [trial for trial in live if trial.state.is_finished()]
        assert [essence(t) for t in ended] == [essence(t) for t in rebuilt if t.state.is_finished()]
        for trial in waiting:  # what was under way comes first
            assert again.ask()[1]["trial"] == trial.number
        for _ in range(2):
            assert desk.ask()[1] == again.ask()[1]
    assert set(seen) == set(OUTCOMES)


def test_no_trial_is_left_running_in_optuna_when_all_have_ended(tmp_path):
    ends = [
        (result(curve(1, 6), final=True), False),
        (result(curve(1, 2)), False),
        (result(curve(1, 6), final=True, status="collapsed", reason="?"), False),
        (result({}, status="diverged", reason="?"), False),
        (result({}, status="oom", reason="?", no_latent_nelbo=None), False),
        (result(curve(1, 1), status="error", reason="?"), False),
        (None, True),
    ]
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": len(ends), "max_retries": 0}))
    ids = [desk.ask()[0] for _ in ends]
    for trial_id, (last, error) in zip(ids, ends, strict=True):
        desk.end(trial_id, last, error)
    assert all(trial.state.is_finished() for trial in desk.searcher.arms[0].study.get_trials())
    assert {row.state for row in read_trials(desk.path)} == {"COMPLETE", "PRUNED", "FAIL"}


def test_unfinished_trials_are_suggested_again_first_with_number_parameters_and_seed(tmp_path):
    desk = Desk(tmp_path / "live")
    asked = [desk.ask() for _ in range(4)]
    desk.end(asked[1][0], result(curve(1, 6), final=True))
    desk.searcher.on_trial_result(asked[2][0], result(curve(1, 2)))
    again = desk.reborn(tmp_path / "again")
    for number in (0, 2, 3):
        _, config = again.ask()
        assert config == anew(asked[number][1])
        assert again.row(number).attempts == 2
    assert again.ask()[1]["trial"] == 4
    third = again.reborn(tmp_path / "third")
    assert third.ask()[1] == anew(asked[0][1])
    assert third.row(0).attempts == 3


def test_a_trial_that_goes_on_after_a_crash_ends_as_if_nothing_had_happened(tmp_path):
    desk = Desk(tmp_path / "live")
    trial_id, _ = desk.ask()
    desk.searcher.on_trial_result(trial_id, result(curve(1, 3)))
    again = desk.reborn(tmp_path / "again")
    desk.end(trial_id, result(curve(4, 6), final=True))
    trial_id, _ = again.ask()
    again.searcher.on_trial_result(trial_id, result(curve(1, 5)))
    again.end(trial_id, result(curve(6, 6), final=True))
    assert essence(again.told(0)) == essence(desk.told(0))
    assert read_table(again.path, "epochs")["epoch"].to_pylist() == [1, 2, 3, 4, 5, 6]


# ---- when it stops suggesting


def test_suggestions_end_with_the_budget(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"trials": 3}))
    ids = [desk.ask()[0] for _ in range(3)]
    for trial_id in ids:
        assert desk.searcher.suggest("more") is None  # one of those under way may have to be suggested again
        desk.end(trial_id, result(curve(1, 6), final=True))
    assert desk.searcher.suggest("more") == Searcher.FINISHED
    assert len(read_trials(desk.path)) == 3
    assert not desk.searcher.gave_up


def fail(desk: Desk) -> None:
    desk.end(desk.ask()[0], result({}, status="error", reason=f"number {desk.num_asked - 1}"))


def test_it_gives_up_after_failures_in_a_row_and_keeps_the_first_reason(tmp_path):
    desk = Desk(tmp_path / "s", make_spec(budget={"max_consecutive_failures": 3}))
    for _ in range(3):
        assert not desk.searcher.gave_up
        fail(desk)
    assert desk.searcher.gave_up
    assert desk.searcher.suggest("more") == Searcher.FINISHED
    assert [row.reason for row in desk.searcher.failures] == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("other_end", ["complete", "stopped", "diverged"])
def test_failures_that_are_not_in_a_row_do_not_count(tmp_path, other_end):
    desk = Desk(tmp_path / "s", make_spec(budget={"max_consecutive_failures": 3}))
    ends = {
        "complete": result(curve(1, 6), final=True),
        "stopped": result(curve(1, 2)),
        "diverged": result({}, status="diverged", reason="?"),
    }
    for _ in range(2):
        fail(desk)
        fail(desk)
        desk.end(desk.ask()[0], ends[other_end])
    fail(desk)
    fail(desk)
    assert not desk.searcher.gave_up
    fail(desk)
    assert desk.searcher.gave_up


def test_giving_up_is_for_good_also_when_a_trial_still_under_way_ends_well(tmp_path):
    """Tune asks no more once it was told FINISHED: whoever looks at `gave_up` afterwards must see it."""
    desk = Desk(tmp_path / "s", make_spec(budget={"max_consecutive_failures": 2}))
    slow, _ = desk.ask()
    fail(desk)
    fail(desk)
    assert desk.searcher.suggest("more") == Searcher.FINISHED
    desk.end(slow, result(curve(1, 6), final=True))
    assert desk.searcher.gave_up


# ---- the samplers


def suggestions(path: Path, spec: StudySpec, trials: int) -> list[dict[str, Any]]:
    """What is suggested when the value of a trial is a known function of its parameters."""
    desk, configs = Desk(path, spec), []
    for _ in range(trials):
        trial_id, config = desk.ask()
        configs.append(config)
        params = config["params"]
        value = 25 + abs(math.log10(params["learning_rate"]) + 2.5) + params["dropout"]
        desk.end(trial_id, result(dict.fromkeys(range(1, 7), value), final=True))
    return configs


@pytest.mark.parametrize("kind", ["tpe", "random", "gp"])
def test_suggestions_depend_on_the_seed_alone(tmp_path, kind):
    def spec(seed: int) -> StudySpec:
        return make_spec(seed=seed, sampler={"kind": kind})

    first, again, other = (
        suggestions(tmp_path / name, spec(seed), trials=6) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert all(one["params"] != two["params"] for one, two in zip(first[1:], other[1:], strict=True))
    assert not {config["seed"] for config in first} & {config["seed"] for config in other}
    assert len({config["seed"] for config in first}) == len(first)


@pytest.mark.parametrize("kind", ["tpe", "random", "gp"])
def test_every_suggestion_lies_in_the_space_and_has_a_slope_only_under_leaky_relu(tmp_path, kind):
    spec = make_spec(sampler={"kind": kind}, space={"activation": ["leaky_relu", "relu"]})
    configs = suggestions(tmp_path / "s", spec, trials=6)
    distributions = Space(spec.space).distributions
    for config in configs:
        params = config["params"]
        assert ("leaky_relu_slope" in params) == (params["activation"] == "leaky_relu")
        for name, value in params.items():
            assert distributions[name]._contains(distributions[name].to_internal_repr(value)), (name, value)
    assert {config["params"]["activation"] for config in configs} == {"leaky_relu", "relu"}


def test_the_first_trial_is_the_defaults_of_the_model_and_its_training(tmp_path):
    from vae.config import ModelConfig, TrainConfig

    params = Desk(tmp_path / "s").ask()[1]["params"]
    model, train = ModelConfig(input_dim=1), TrainConfig()
    assert params["activation"] == model.activation
    assert params["latent_dim"] == model.latent_dim
    assert params["learning_rate"] == train.learning_rate
    assert params["dropout"] == model.dropout


def diverged_share(path: Path, kind: str, seed: int, told: str = "diverged") -> float:
    """Share of trials that go over a cliff in the middle of the range of learning rates, after the start-up."""
    startup, trials = 8, 32
    spec = make_spec(
        seed=seed,
        budget={"trials": trials, "max_consecutive_failures": trials},
        sampler={"kind": kind, "startup_trials": startup},
        space={"learning_rate": {"low": 1e-4, "high": 1.0, "log": True}, "activation": "tanh", "latent_dim": 8},
    )
    desk, diverged = Desk(path, spec), 0
    for number in range(trials):
        trial_id, config = desk.ask()
        rate = math.log10(config["params"]["learning_rate"])
        if rate > -2:
            diverged += number >= startup
            desk.end(trial_id, result({}, status=told, reason="?"))
        else:
            desk.end(trial_id, result(dict.fromkeys(range(1, 7), 25 + abs(rate + 2.7)), final=True))
    return diverged / (trials - startup)


def test_tpe_learns_to_keep_off_a_cliff_of_divergence(tmp_path):
    told, untold, chance = (
        sum(diverged_share(tmp_path / f"{kind}-{status}-{seed}", kind, seed, status) for seed in range(2)) / 2
        for kind, status in (("tpe", "diverged"), ("tpe", "error"), ("random", "diverged"))
    )
    assert chance > 0.35  # half of the range lies beyond
    assert told < 0.6 * chance
    assert told < 0.8 * untold  # the control: a failure teaches the sampler nothing


def test_trials_under_way_are_known_to_the_sampler(tmp_path):
    """Several at once don't get one suggestion twice, though nothing has ended since."""
    desk = Desk(tmp_path / "s", make_spec(sampler={"startup_trials": 2}))
    for _ in range(4):
        desk.end(desk.ask()[0], result(curve(1, 6), final=True))
    asked = [desk.ask()[1]["params"] for _ in range(4)]
    assert len({params["learning_rate"] for params in asked}) == 4


def test_optuna_says_nothing_on_its_own(desk, capfd):
    desk.end(desk.ask()[0], result(curve(1, 6), final=True))
    assert optuna.logging.get_verbosity() >= optuna.logging.ERROR
    assert capfd.readouterr() == ("", "")


# ---- a comparison


def compared_spec() -> StudySpec:
    return make_spec(
        goal="compare-activations",
        space={"activation": ["relu", "leaky_relu"]},
        budget={"trials": 12, "max_epochs": 6},
        comparison={"settings": 2},
        sampler={"startup_trials": 2},
    )


def finish(desk: Desk, asked: list[tuple[str, dict[str, Any]]]) -> None:
    for trial_id, config in asked:
        value = 25.0 + math.sin(config["trial"]) + config["params"]["dropout"]
        desk.end(trial_id, result(dict.fromkeys(range(1, 7), value), final=True))


def test_each_activation_is_refined_by_what_is_known_of_it_alone(tmp_path):
    """What the other one's trials came to changes no suggestion."""
    suggested = []
    for shift in (0.0, 100.0):
        desk = Desk(tmp_path / f"study {shift}", compared_spec())
        for _ in range(12):
            trial_id, config = desk.ask()
            value = 25.0 + config["params"]["dropout"] + (shift if config["params"]["activation"] == "relu" else 0)
            desk.end(trial_id, result(dict.fromkeys(range(1, 7), value), final=True))
        suggested.append([row.params for row in read_trials(desk.path) if row.activation == "leaky_relu"])
    assert suggested[0] == suggested[1]


def test_a_comparison_rebuilt_from_the_ledger_suggests_what_it_would_have(tmp_path):
    desk = Desk(tmp_path / "study", compared_spec())
    for _ in range(4):
        finish(desk, [desk.ask(), desk.ask()])
    asked = [desk.ask(), desk.ask(), desk.ask()]
    desk.row(8)
    again = desk.reborn(tmp_path / "copy")
    assert [again.ask()[1] for _ in asked] == [anew(config) for _, config in asked]
    finish(again, [(f"tune-{number}", {**asked[number][1]}) for number in range(3)])
    assert again.ask()[1]["trial"] == 11
    for live, rebuilt in zip(desk.searcher.arms, again.searcher.arms, strict=True):
        ended = [trial for trial in live.study.get_trials() if trial.state.is_finished()]
        assert [essence(trial) for trial in ended] == [essence(t) for t in rebuilt.study.get_trials()[: len(ended)]]


def test_a_comparison_ends_with_its_last_trial(tmp_path):
    desk = Desk(tmp_path / "study", compared_spec())
    for _ in range(12):
        finish(desk, [desk.ask()])
    assert desk.searcher.suggest("one more") == Searcher.FINISHED
