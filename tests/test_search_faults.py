"""What may befall a study, staged for real in small: hung workers, damaged files, dead drivers, full disks."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from optuna.trial import TrialState, create_trial
from test_search_study import (
    Recorder,
    assert_epochs_fit_states,
    fingerprints,
    recorded,
    retrained,
    stored_in,
    trials_and_epochs,
    with_,
)

import search.checks
from search.arm import Arm, frozen_trial
from search.checkpoints import CheckpointStore, StoreServer
from search.checks import disk_budget_bytes, most_parameters
from search.events import StudyEvents
from search.results import Study, open_study
from search.rounds import BestStates
from search.space import Space
from search.spec import StudySpec
from search.study import run_study
from search.tables import AttemptRow, EpochRow, TrialRow, read_table
from vae.activations import ACTIVATIONS
from vae.config import InputError, ModelConfig
from vae.data import load_data
from vae.model import num_parameters

pytestmark = pytest.mark.usefixtures("ray_here")

FULL = {"scheduler": {"kind": "none"}, "budget": {"trials": 2, "max_epochs": 8}}
"""Two trials that nobody stops early."""


class Died(Exception):
    """The driver's end, staged."""


class DiesAt(StudyEvents):
    """Ends the driver once a trial has reported an epoch."""

    def __init__(self, trial: int, epoch: int) -> None:
        self.trial, self.epoch = trial, epoch

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        if row.trial == self.trial and row.epochs >= self.epoch:
            raise Died


class Losses(StudyEvents):
    """The attempts that were lost, and the states that were damaged."""

    def __init__(self) -> None:
        self.lost: list[AttemptRow] = []
        self.damaged: list[AttemptRow] = []

    def worker_lost(self, row: TrialRow, attempt: AttemptRow) -> None:
        self.lost.append(attempt)

    def state_damaged(self, row: TrialRow, attempt: AttemptRow) -> None:
        self.damaged.append(attempt)


def attempts_of(study: Study, trial: int) -> list[dict[str, Any]]:
    table = study.attempts().sort_by("attempt")
    return table.filter(pa.compute.equal(table["trial"], trial)).to_pylist()


def assert_whole(study: Study) -> None:
    """What must hold of a study that is complete, whatever befell it on the way."""
    spec = study.spec
    rows = study.rows()
    assert [row.trial for row in rows] == list(range(spec.budget.trials))
    assert "RUNNING" not in {row.state for row in rows}
    assert_epochs_fit_states(study)
    pairs = study.epochs().select(["trial", "epoch"]).to_pylist()
    assert len({(pair["trial"], pair["epoch"]) for pair in pairs}) == len(pairs)
    attempts = study.attempts().select(["trial", "attempt"]).to_pylist()
    assert len({(pair["trial"], pair["attempt"]) for pair in attempts}) == len(attempts)
    assert None not in study.attempts()["outcome"].to_pylist()
    assert not (study.path / "checkpoints").exists()


# ---- workers


class Stopper(StudyEvents):
    """Stops the worker of a trial in its tracks, once: it neither dies nor says a word."""

    def __init__(self, trial: int) -> None:
        self.trial = trial
        self.pid: int | None = None

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        if row.trial == self.trial and self.pid is None and row.pid is not None:
            self.pid = row.pid
            os.kill(row.pid, signal.SIGSTOP)


def test_a_worker_that_hangs_is_killed_after_a_while_and_its_trial_goes_on_in_another(small_spec, tmp_path):
    spec = stored_in(with_(small_spec, **FULL), tmp_path)
    spec = with_(spec, budget={"stall_timeout_s": 10.0}, resources={"concurrency": 2})
    stopper, losses = Stopper(1), Losses()
    study = run_study(spec, events=[stopper, losses])
    assert stopper.pid is not None
    stat, deadline = Path(f"/proc/{stopper.pid}/stat"), time.monotonic() + 100
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # killed, if not yet gone
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_whole(study)
    first, second = attempts_of(study, 1)
    assert (first["outcome"], second["outcome"]) == ("timeout", "ended")
    assert "10 s" in first["reason"]
    assert [attempt.outcome for attempt in losses.lost] == ["timeout"]
    assert study.rows()[1].attempts == 2
    assert recorded(study, 1) == retrained(spec, study.rows()[1], load_data(spec.data_config()))
    assert len(attempts_of(study, 0)) == 1


def test_a_long_epoch_is_no_hanging_worker(small_spec, tmp_path):
    """Training that moves is left alone, however long it takes to the next result. Many short steps: of a large model
    all that is no step may take as long, too."""
    np.save(tmp_path / "points.npy", (np.random.default_rng(0).random((100_000, 16)) > 0.5).astype(np.float32))
    values = stored_in(with_(small_spec, **FULL), tmp_path).dump() | {"data": {"source": str(tmp_path / "points.npy")}}
    values |= {"model": {"hidden_dims": [64]}, "train": {"batch_size": 4, "kl_warmup_epochs": 0}}
    values["budget"] = {"trials": 1, "max_epochs": 1, "stall_timeout_s": 4.0, "max_retries": 0}
    study = run_study(StudySpec.model_validate(values))
    assert study.rows()[0].train_wall_s > 4.0
    assert [attempt["outcome"] for attempt in attempts_of(study, 0)] == ["ended"]


def test_a_study_in_which_trials_diverge_goes_on_and_the_sampler_hears_of_them_as_violations(small_spec, tmp_path):
    values = with_(small_spec, budget={"trials": 4, "max_epochs": 4}).dump()
    values["space"] = {"activation": ["exponential", "tanh"], "learning_rate": {"low": 3.0, "high": 10.0}}
    values["storage"] = {"path": str(tmp_path)}
    study = run_study(StudySpec.model_validate(values))
    rows = study.rows()
    diverged = [row for row in rows if row.status == "diverged"]
    assert len(rows) == 4
    assert diverged
    space, spec = Space(study.spec.space), study.spec
    for row in diverged:
        assert row.state == "PRUNED"
        assert row.epochs < spec.budget.max_epochs
        assert frozen_trial(space, row, {}).constraints["diverged"] == 1.0


# ---- stored states


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def newest_gone(states: list[Path]) -> None:
    states[-1].unlink()


def newest_torn(states: list[Path]) -> None:
    damage(states[-1])


def all_torn(states: list[Path]) -> None:
    for state in states:
        damage(state)


@pytest.mark.parametrize(
    ("harm", "from_epoch", "told"),
    [(newest_gone, 2, False), (newest_torn, 2, True), (all_torn, 0, True)],
)
def test_a_trial_whose_states_were_harmed_goes_on_from_what_is_left_to_the_same_end(
    small_spec, tmp_path, harm: Callable[[list[Path]], None], from_epoch, told
):
    spec = stored_in(with_(small_spec, budget={"trials": 1, "max_epochs": 8}), tmp_path)
    assert spec.rungs() == [2, 4]
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesAt(0, 4)])
    states = sorted((tmp_path / spec.name / "checkpoints").iterdir())
    assert [path.name[-8:] for path in states][:2] == ["00002.pt", "00004.pt"]
    for later in states[2:]:
        later.unlink()
    harm(states[:2])
    losses = Losses()
    study = run_study(spec, events=[losses])
    assert_whole(study)
    first, second = attempts_of(study, 0)
    assert (first["outcome"], second["outcome"]) == ("interrupted", "ended")
    assert second["from_epoch"] == from_epoch
    assert (second["damaged"] is not None) == told == bool(losses.damaged)
    if told:
        assert "epoch 4" in second["damaged"]
    row = study.rows()[0]
    assert recorded(study, 0) == retrained(spec, row, load_data(spec.data_config()))
    assert study.model_folders()


def test_what_had_no_worker_when_the_driver_died_was_not_started(small_spec, tmp_path):
    class DiesWithASuggestion(StudyEvents):
        def trial_started(self, row: TrialRow) -> None:
            if row.trial == 2:
                raise Died

    spec = with_(stored_in(with_(small_spec, **FULL), tmp_path), budget={"trials": 4}, resources={"concurrency": 2})
    with pytest.raises(Died):
        run_study(spec, events=[DiesWithASuggestion()])
    assert [attempt["placed_at"] for attempt in attempts_of(Study(tmp_path / spec.name), 2)] == [None]
    study = run_study(spec)
    assert_whole(study)
    assert [attempt["outcome"] for attempt in attempts_of(study, 2)] == ["ended"]
    assert study.summary().restarts == study.attempts()["outcome"].to_pylist().count("interrupted")


def test_a_model_whose_last_state_is_damaged_is_trained_again_to_its_end(small_spec, tmp_path, monkeypatch):
    spec = stored_in(with_(small_spec, **FULL), tmp_path)

    def dies(*args: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("search.publish.publish_best", dies)
        with pytest.raises(Died):
            run_study(spec)
    for state in (tmp_path / spec.name / "checkpoints").glob("*.epoch-00008.pt"):
        damage(state)
    torch.set_num_threads(2)  # of the driver; its trials had one each
    try:
        study = run_study(spec)  # whose export checks each model against the ledger
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(study.model_folders()) == len(study.summary().leaders)
    assert_whole(study)


def test_the_disk_budget_is_an_upper_bound_and_not_absurd(small_spec, tmp_path):
    spec = stored_in(small_spec, tmp_path)
    folder = tmp_path / spec.name / "checkpoints"
    seen = [0]

    class Weighs(StudyEvents):
        def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
            seen.append(sum(path.stat().st_size for path in folder.iterdir()))

    run_study(spec, events=[Weighs()])
    budget = disk_budget_bytes(spec, max(map(num_parameters, spec.largest_models((8, 8)))), 1)
    assert 0 < max(seen) <= budget
    assert budget < 40 * max(seen)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"hidden_dims": (7,), "normalization": "batch"},
        {"hidden_dims": (3, 50, 4), "latent_dim": 1, "normalization": "layer", "apl_hinges": 40},
        {"hidden_dims": (1000, 10), "likelihood": "gaussian", "gaussian_scale": "per_dimension", "latent_dim": 300},
        {"hidden_dims": (), "latent_dim": 2},
    ],
)
def test_the_bound_on_parameters_is_no_less_than_what_the_model_has(activation, more):
    config = ModelConfig(input_dim=30, activation=activation, **more)
    bound = most_parameters(config)
    assert bound is not None
    assert num_parameters(config) <= bound
    assert bound <= 2**14 + 12 * num_parameters(config) or config.apl_hinges > 2  # of no use if far too high


def test_torch_is_not_imported_before_the_first_trial_where_the_disk_has_room(small_spec, tmp_path):
    code = f"""
import sys
from search.checks import check_space
from search.spec import StudySpec
from vae.data import load_data
spec = StudySpec.model_validate({small_spec.model_dump(mode="json")!r})
check_space(spec, load_data(spec.data_config()), 2)
import search.study, search.sampler, search.trial
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_that_does_not_fit_the_disk_is_refused_before_anything_is_written(small_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(search.checks, "free_bytes", lambda place: 100_000)
    with pytest.raises(InputError, match="MiB are free"):
        run_study(stored_in(small_spec, tmp_path / "studies"))
    assert list(tmp_path.iterdir()) == []


# ---- tables


@pytest.fixture
def copy(small_study: Study, small_spec: StudySpec, tmp_path: Path) -> tuple[Study, StudySpec]:
    shutil.copytree(small_study.path, tmp_path / small_study.name)
    return Study(tmp_path / small_study.name), stored_in(small_spec, tmp_path)


def split_trials(study: Study, sealed: int) -> None:
    """Have the first trials in a part of their own, as if the table were long."""
    table = study.trials().sort_by("trial")
    pq.write_table(table.slice(0, sealed), study.path / "trials" / "part-00000.parquet")
    pq.write_table(table.slice(sealed), study.path / "trials" / "part-00001.parquet")


@pytest.mark.parametrize(("part", "lost"), [(0, [0, 1, 2, 3]), (1, [4, 5])])
def test_a_torn_part_of_the_trials_is_set_aside_and_what_it_held_is_made_again(copy, small_study, part, lost, caplog):
    study, spec = copy
    split_trials(study, 4)
    damage(study.path / "trials" / f"part-0000{part}.parquet")
    kept = [row for row in small_study.rows() if row.trial not in lost]
    assert study.rows() == kept  # the rest is readable at once, and it is said that something is missing
    assert f"part-0000{part}.parquet" in caplog.text

    said: list[str] = []
    study = run_study(spec, say=said.append)
    assert any("set aside" in text and f"part-0000{part}" in text for text in said)
    assert (study.path / "trials" / f"part-0000{part}.parquet.damaged").is_file()
    assert_whole(study)
    assert [row for row in study.rows() if row.trial not in lost] == kept
    for number in lost:
        row = study.rows()[number]
        assert recorded(study, number) == retrained(spec, row, load_data(spec.data_config()))
    before = fingerprints(study.path)
    run_study(spec)
    assert fingerprints(study.path) == before


def test_a_stopped_trial_whose_end_was_not_written_before_its_states_went_ends_again_where_it_did(copy, small_study):
    """As a driver killed between the two leaves it: all epochs are there, and the trial begins anew."""
    study, spec = copy
    late = [row for row in small_study.rows() if row.state == "PRUNED" and row.epochs > spec.rungs()[0]]
    table = study.trials().to_pylist()
    for row in table:
        if row["trial"] == late[0].trial:
            row |= {"state": "RUNNING", "ended_at": None}
    pq.write_table(pa.Table.from_pylist(table, study.trials().schema), study.path / "trials" / "part-00000.parquet")
    study = run_study(spec)
    assert_whole(study)
    again = study.rows()[late[0].trial]
    assert (again.state, again.epochs, again.val_nelbo) == ("PRUNED", late[0].epochs, late[0].val_nelbo)
    assert study.epochs().num_rows == small_study.epochs().num_rows


def test_states_stay_until_the_end_of_their_trial_is_written(small_study, tmp_path):
    import ray

    store = CheckpointStore(tmp_path)
    for trial in range(3):
        store.put(trial, 1, b"state")
    best = BestStates(StudySpec.model_validate({"export": {"top": 1}}), [], CheckpointStore(tmp_path / "none yet"))
    best.server = ray.remote(StoreServer).options(num_cpus=0).remote(str(tmp_path))
    leader = small_study.summary().best
    assert leader is not None
    for trial, value in enumerate((30.0, 20.0)):
        best.trial_ended(replace(leader, trial=trial, val_nelbo=value, objective=value))
    try:
        ray.get(best.server.report.remote())
        assert CheckpointStore(tmp_path).trials() == [0, 1, 2]
        best.drop_unneeded()
        deadline = time.monotonic() + 100
        while CheckpointStore(tmp_path).trials() != [1, 2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        ray.kill(best.server)


def test_weights_are_kept_below_what_the_worst_of_the_best_has(small_study, tmp_path):
    leader = small_study.summary().best
    assert leader is not None

    def best(spec: dict[str, Any]) -> BestStates:
        states = BestStates(StudySpec.model_validate(spec), [], CheckpointStore(tmp_path / "none yet"))
        ended = ((30.0, "relu", "ok"), (20.0, "silu", "ok"), (10.0, "silu", "collapsed"), (25.0, "silu", "ok"))
        for trial, (value, activation, status) in enumerate(ended):
            row = replace(leader, trial=trial, val_nelbo=value, objective=value, activation=activation, status=status)
            states.trial_ended(row)
        return states

    bounds = [best({"export": {"top": top}}).keep_below(leader) for top in (0, 1, 2, 3, 4)]
    assert bounds == [-math.inf, 20.0, 25.0, 30.0, math.inf]
    names = ["relu", "silu", "elu"]
    compared = best({"goal": "compare-activations", "space": {"activation": names}})
    assert [compared.keep_below(replace(leader, activation=name)) for name in names] == [30.0, 20.0, math.inf]


def test_a_torn_part_of_the_epochs_costs_curves_and_no_trial(copy, small_study):
    study, spec = copy
    damage(study.path / "epochs" / "part-00000.parquet")
    study = run_study(spec, extend=1)
    assert study.rows()[:6] == small_study.rows()
    assert study.rows()[6].state != "RUNNING"
    assert {row["trial"] for row in study.epochs().to_pylist()} == {6}


def test_a_part_that_is_no_parquet_at_all_is_set_aside(copy, small_study):
    study, spec = copy
    (study.path / "attempts" / "part-00001.parquet").write_bytes(b"")
    study = run_study(spec, extend=1)
    assert study.summary().is_complete
    assert not (study.path / "attempts" / "part-00001.parquet").exists() or read_table(study.path, "attempts").num_rows
    assert (study.path / "attempts" / "part-00001.parquet.damaged").exists()


# ---- what Optuna sees, and what it would see again


def test_after_a_study_with_early_stopping_optuna_has_pruned_trials_with_their_last_value(small_study, small_spec):
    rows = small_study.rows()
    curves: dict[int, dict[int, float]] = {}
    for row in small_study.epochs().to_pylist():
        curves.setdefault(row["trial"], {})[row["epoch"]] = row["val_nelbo"]
    study = Arm(small_spec, 0, rows, curves).study
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        row = rows[trial.number]
        assert max(trial.intermediate_values) == row.epochs
        assert trial.intermediate_values[row.epochs] == row.val_nelbo
    assert rows[study.best_trial.number].epochs == small_spec.budget.max_epochs
    best = small_study.summary().best
    assert best is not None
    assert study.best_trial.number == best.trial
    assert study.best_value == best.val_nelbo
    assert TrialState.RUNNING not in {trial.state for trial in study.trials}


def test_with_several_workers_the_recorded_order_replays_to_the_same_suggestions(small_spec, tmp_path):
    spec = with_(small_spec, resources={"concurrency": 2}, budget={"trials": 8, "max_epochs": 4})
    study = run_study(stored_in(spec, tmp_path))
    rows, space = study.rows(), Space(spec.space)
    curves: dict[int, dict[int, float]] = {}
    for row in study.epochs().to_pylist():
        curves.setdefault(row["trial"], {})[row["epoch"]] = row["val_nelbo"]
    overlaps = 0
    for row in rows[1:]:
        replayed = optuna.create_study(sampler=Arm(spec, 0, [], {}).sampler(row.trial))
        for earlier in rows[: row.trial]:
            assert earlier.ended_at is not None
            if earlier.ended_at <= row.suggested_at:
                replayed.add_trial(frozen_trial(space, earlier, curves[earlier.trial]))
                continue
            overlaps += 1
            params, distributions = space.chosen(earlier.params)
            replayed.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=distributions))
        trial = replayed.ask()
        space.suggest(trial)
        assert trial.params == space.chosen(row.params)[0]
    assert overlaps > 2


# ---- drivers


def test_the_lease_of_a_driver_that_died_is_taken_over_and_that_is_said(small_spec, tmp_path):
    spec = stored_in(with_(small_spec, budget={"trials": 1, "max_epochs": 2}), tmp_path)
    folder = tmp_path / spec.name
    folder.mkdir()
    (folder / "lease.json").write_text(f'{{"host": "elsewhere", "pid": 4711, "heartbeat": {time.time() - 3600}}}')
    said: list[str] = []
    run_study(spec, say=said.append)
    assert any("taken over" in text and "4711" in text and "elsewhere" in text for text in said)


def test_patience_and_retries_may_change_from_run_to_run(copy, small_study):
    _, spec = copy
    changed = with_(spec, budget={"max_retries": 9, "stall_timeout_s": 5.0}, storage={"patience_s": 1.0})
    assert run_study(changed).rows() == small_study.rows()


@pytest.mark.parametrize("max_retries", [0, 3])
def test_what_a_listener_raises_as_a_trial_ends_ends_the_study(small_spec, tmp_path, max_retries):
    class DiesWithATrial(StudyEvents):
        def trial_ended(self, row: TrialRow) -> None:
            raise Died

    spec = with_(stored_in(small_spec, tmp_path), budget={"max_retries": max_retries})
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesWithATrial()])


def test_a_study_that_was_moved_goes_on_where_it_is_now(small_spec, tmp_path):
    spec = stored_in(small_spec, tmp_path / "one")
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesAt(1, 2)])
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = StudySpec.load(tmp_path / "two" / spec.name / "study.toml", {"storage.path": str(tmp_path / "two")})
    study = run_study(moved)
    assert_whole(study)
    assert not (tmp_path / "one").exists()
    assert study.rows()[1].attempts == 2


def test_a_study_on_an_object_store_is_cut_off_goes_on_and_is_the_one_on_a_disk(
    small_spec, small_study, s3_url, tmp_path
):
    spec = with_(small_spec, storage={"path": s3_url})
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesAt(2, 2)])
    place = spec.folder
    assert not (place / "lease.json").exists()
    assert CheckpointStore(place / "checkpoints").trials()
    study = run_study(spec)
    assert_whole(study)
    ours, theirs = trials_and_epochs(study), trials_and_epochs(small_study)
    for table in (*ours, *theirs):
        for row in table:
            row.pop("attempts", None)
            row.pop("attempt", None)
    assert ours == theirs
    opened = open_study(f"{s3_url.partition('?')[0]}/{spec.name}?{s3_url.partition('?')[2]}")
    assert [folder.name for folder in opened.model_folders()] == [f.name for f in small_study.model_folders()]
    for here, there in zip(opened.model_folders(), small_study.model_folders(), strict=True):
        assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    said: list[str] = []
    run_study(spec, say=said.append)
    assert any("complete" in text for text in said)


def test_events_of_a_resumed_study_are_those_of_what_is_left(small_spec, tmp_path):
    spec = stored_in(small_spec, tmp_path)
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesAt(2, 2)])
    rows = Study(tmp_path / spec.name).rows()
    recorder = Recorder(tmp_path / spec.name)
    run_study(spec, events=[recorder])
    ended_before = {row.trial for row in rows if row.state != "RUNNING"}
    assert set(recorder.ended) == set(range(spec.budget.trials)) - ended_before
    assert replace(rows[0], attempts=0) == replace(Study(tmp_path / spec.name).rows()[0], attempts=0)
