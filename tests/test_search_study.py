"""Whole studies through Ray, on the digits with tiny budgets: what is on disk, what is repeated, what is refused."""

import contextlib
import glob
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import search.checks
import search.study
from search.checkpoints import CheckpointStore
from search.events import StudyEvents
from search.results import Study
from search.spec import StudySpec
from search.study import StudyFailed, run_study
from search.tables import EpochRow, TrialRow
from vae.config import InputError
from vae.data import Dataset, load_data
from vae.training import Trainer

CLOCK_AND_PLACE = ("train_wall_s", "wall_s", "samples_per_s", "suggested_at", "ended_at", "reported_at", "pid")

pytestmark = pytest.mark.usefixtures("ray_here")


def with_(spec: StudySpec, **sections: Any) -> StudySpec:
    values = spec.dump()
    for section, value in sections.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    return StudySpec.model_validate(values)


def stored_in(spec: StudySpec, folder: Path) -> StudySpec:
    return with_(spec, storage={"path": str(folder)})


@pytest.fixture
def copy(small_study: Study, small_spec: StudySpec, tmp_path: Path) -> tuple[Path, StudySpec]:
    """The finished study's folder at another place, and the spec that means it there."""
    shutil.copytree(small_study.path, tmp_path / "copy" / small_study.name)
    return tmp_path / "copy" / small_study.name, stored_in(small_spec, tmp_path / "copy")


def fingerprints(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below: when it was changed, and what it holds."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def timeless(table: pa.Table, *keys: str) -> list[dict[str, Any]]:
    kept = table.drop_columns([name for name in table.column_names if name in CLOCK_AND_PLACE])
    return kept.sort_by([(key, "ascending") for key in keys]).to_pylist()


def trials_and_epochs(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return timeless(study.trials(), "trial"), timeless(study.epochs(), "trial", "epoch")


def curves(study: Study) -> dict[int, list[int]]:
    """trial -> its epochs as they are in the table."""
    epochs = defaultdict(list)
    for row in study.epochs().sort_by([("trial", "ascending"), ("epoch", "ascending")]).to_pylist():
        epochs[row["trial"]].append(row["epoch"])
    return epochs


def assert_epochs_fit_states(study: Study) -> None:
    spec, epochs = study.spec, curves(study)
    for row in study.rows():
        assert epochs[row.trial] == list(range(1, row.epochs + 1)), row
        if row.state == "COMPLETE":
            assert row.epochs == spec.budget.max_epochs
        elif row.state == "PRUNED" and row.status == "ok":
            assert row.epochs in spec.rungs()


def retrained(spec: StudySpec, row: TrialRow, data: Dataset) -> list[float]:
    """The validation values of a trial trained here, in one process, by what the ledger says of it."""
    trainer = Trainer(
        spec.model_config_for(row.params, data.row_shape), spec.train_config_for(row.params), data, seed=row.seed
    )
    return [metrics.val_nelbo for metrics in itertools.islice(trainer, row.epochs)]


def recorded(study: Study, trial: int) -> list[float]:
    table = study.epochs().sort_by("epoch")
    return table.filter(pa.compute.equal(table["trial"], trial))["val_nelbo"].to_pylist()


class Recorder(StudyEvents):
    """What was heard, in order; and that a suggestion is on disk by then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[tuple[str, int]] = []
        self.epochs: dict[int, list[int]] = defaultdict(list)
        self.ended: dict[int, TrialRow] = {}

    def search_started(self, spec: StudySpec, rows: list[TrialRow]) -> None:
        self.heard.append(("search", len(rows)))

    def trial_started(self, row: TrialRow) -> None:
        assert row.trial in pq.read_table(self.path / "trials")["trial"].to_pylist()
        assert row.state == "RUNNING"
        self.heard.append(("started", row.trial))

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert {epoch.trial for epoch in epochs} <= {row.trial}
        assert not epochs or epochs[-1].val_nelbo == row.val_nelbo
        self.heard.append(("epochs", row.trial))
        self.epochs[row.trial] += [epoch.epoch for epoch in epochs]

    def trial_ended(self, row: TrialRow) -> None:
        self.heard.append(("ended", row.trial))
        self.ended[row.trial] = row


def read_again_if_replaced(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[int, ...]]:
    """DuckDB opens a file by its name three times for one answer, and errs if it was replaced in between."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(duckdb.Error):
            return connection.sql(sql).fetchall()
        time.sleep(0.02)
    return connection.sql(sql).fetchall()


@contextmanager
def polling(path: Path) -> Iterator[list[str]]:
    """Somebody else's SQL over plain globs for as long as the block lasts; faults are listed."""
    faults: list[str] = []
    polls = [0]
    stop = threading.Event()

    def check(connection: duckdb.DuckDBPyConnection, last: dict[str, int]) -> None:
        for table, key in (("trials", "trial"), ("epochs", "trial, epoch")):
            pattern = f"{path}/{table}/*.parquet"
            if not glob.glob(pattern):
                continue
            rows = read_again_if_replaced(connection, f"SELECT {key} FROM read_parquet('{pattern}') ORDER BY ALL")
            polls[0] += 1
            if len(rows) != len(set(rows)):
                faults.append(f"a row of {table} is there twice: {rows}")
            if len(rows) < last[table]:
                faults.append(f"{table} had {last[table]} rows and now has {len(rows)}")
            last[table] = len(rows)
            if table == "trials" and rows != [(number,) for number in range(len(rows))]:
                faults.append(f"a trial is missing: {rows}")
            if table == "epochs":
                for trial, its_rows in itertools.groupby(rows, key=lambda row: row[0]):
                    if [epoch for _, epoch in its_rows] != list(range(1, sum(row[0] == trial for row in rows) + 1)):
                        faults.append(f"an epoch of trial {trial} is missing: {rows}")

    def poll() -> None:
        connection, last = duckdb.connect(), defaultdict[str, int](int)
        try:
            while not stop.is_set():
                check(connection, last)
                time.sleep(0.005)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield faults
    finally:
        stop.set()
        thread.join()
    assert polls[0] > 20


# ---- one study, seen from all sides


def test_a_study_has_every_trial_once_and_all_have_ended(small_study, small_spec):
    rows = small_study.rows()
    assert [row.trial for row in rows] == list(range(small_spec.budget.trials))
    assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"}
    assert {row.study for row in rows} == {small_spec.name}
    assert {row.attempts for row in rows} == {1}
    assert len({row.seed for row in rows}) == len(rows)
    assert all(row.ended_at > row.suggested_at for row in rows)
    summary = small_study.summary()
    assert summary.is_complete
    assert summary.best is not None
    assert summary.states["PRUNED"] > 0  # else the tests below would show little
    assert summary.epochs_trained == small_study.epochs().num_rows


def test_epochs_have_no_gap_and_trials_stop_at_rungs_alone(small_study):
    assert_epochs_fit_states(small_study)


def test_a_finished_study_leaves_its_results_and_nothing_else(small_study, small_spec):
    files = set(fingerprints(small_study.path))
    models = {file for file in files if file.startswith("models/")}
    assert files - models == {
        "study.toml",
        *(f"{table}/part-00000.parquet" for table in ("trials", "epochs", "diagnostics", "layers", "attempts")),
    }
    assert len(small_study.model_folders()) == small_spec.export.top
    assert sorted(path.name for path in small_study.path.iterdir()) == [
        "attempts",
        "diagnostics",
        "epochs",
        "layers",
        "models",
        "study.toml",
        "trials",
    ]
    assert [path.name for path in small_study.path.parent.iterdir()] == [small_study.name]


def test_the_stored_study_file_loads_as_the_spec_that_was_run(small_study, small_spec):
    assert StudySpec.load(small_study.path / "study.toml") == small_spec
    provenance = small_study.provenance
    assert provenance["data_fingerprint"] == load_data(small_spec.data_config()).fingerprint
    assert {"ray", "torch", "optuna"} <= set(provenance["versions"])


def test_the_ledger_tells_enough_to_train_a_trial_again_to_the_bit(small_study, small_spec):
    data = load_data(small_spec.data_config())
    for row in (small_study.summary().best, small_study.rows()[-1]):
        assert retrained(small_spec, row, data) == recorded(small_study, row.trial)


# ---- the same again


def test_a_study_run_twice_is_the_same_to_the_bit_while_others_read_it_and_events_come_in_order(
    small_study, small_spec, tmp_path
):
    spec = stored_in(small_spec, tmp_path / "again")
    recorder, said = Recorder(tmp_path / "again" / spec.name), list[str]()
    with polling(recorder.path) as faults:
        study = run_study(spec, events=[recorder], say=said.append)
    assert faults == []
    assert trials_and_epochs(study) == trials_and_epochs(small_study)

    assert recorder.heard[0] == ("search", 0)
    assert [event for event, _ in recorder.heard].count("search") == 1
    for row in study.rows():
        mine = [event for event, trial in recorder.heard[1:] if trial == row.trial]
        assert mine[0] == "started"
        assert mine[-1] == "ended"
        assert set(mine[1:-1]) == {"epochs"}
        assert recorder.epochs[row.trial] == list(range(1, row.epochs + 1))
        assert recorder.ended[row.trial] == row
    assert said
    assert str(spec.budget.trials) in " ".join(said)


def test_another_seed_is_another_study(small_study, small_spec, tmp_path):
    spec = stored_in(with_(small_spec, seed=1, budget={"trials": 2}), tmp_path)
    other = run_study(spec)
    for one, two in zip(small_study.rows(), other.rows(), strict=False):
        assert one.seed != two.seed
        assert one.val_nelbo != two.val_nelbo
    assert small_study.rows()[1].params != other.rows()[1].params


def test_a_complete_study_is_not_touched_by_running_it_again(copy):
    path, spec = copy
    before = fingerprints(path)
    recorder = Recorder(path)
    assert run_study(spec, events=[recorder]).summary().is_complete
    assert fingerprints(path) == before
    assert recorder.heard == []


# ---- going on


class Stop(Exception):
    """The driver's end, staged."""


class StopsAt(StudyEvents):
    def __init__(self, trial: int) -> None:
        self.trial = trial

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        if row.trial == self.trial:
            raise Stop


def test_an_extension_adds_trials_keeps_the_old_and_goes_on_by_the_first_command(copy, small_study):
    path, spec = copy
    old_trials, old_epochs = small_study.trials(), small_study.epochs()
    with pytest.raises(Exception, match="Stop"):
        run_study(spec, extend=2, events=[StopsAt(6)])
    assert not (path / "lease.json").exists()
    assert Study(path).summary().trials == 8
    assert [row.state for row in Study(path).rows()[6:]] == ["RUNNING"]
    with pytest.raises(InputError, match="extend"):
        run_study(spec, extend=2)

    study = run_study(spec)  # which asks for 6 trials, as at first
    assert [row.trial for row in study.rows()] == list(range(8))
    assert study.trials().sort_by("trial").slice(0, 6) == old_trials.sort_by("trial")
    new_epochs = study.epochs().sort_by([("trial", "ascending"), ("epoch", "ascending")])
    assert new_epochs.filter(pa.compute.less(new_epochs["trial"], 6)) == old_epochs.sort_by(
        [("trial", "ascending"), ("epoch", "ascending")]
    )
    assert study.summary().is_complete
    assert_epochs_fit_states(study)
    assert study.rows()[6].attempts == 2
    assert recorded(study, 6) == retrained(spec, study.rows()[6], load_data(spec.data_config()))
    assert len(study.model_folders()) == spec.export.top
    assert not (path / "checkpoints").exists()
    before = fingerprints(path)
    run_study(spec)
    assert fingerprints(path) == before


def test_a_search_cut_off_at_its_end_is_published_by_the_next_run(copy, monkeypatch):
    path, spec = copy
    shutil.rmtree(path / "models")
    shutil.rmtree(path / "epochs")
    shutil.rmtree(path / "trials")
    (path / "study.toml").unlink()

    def dies(*args: object) -> None:
        raise Stop

    short = with_(spec, budget={"trials": 2})
    with monkeypatch.context() as patch:
        patch.setattr("search.publish.publish_best", dies)
        with pytest.raises(Stop):
            run_study(short)
    assert not (path / "models").exists()
    ended = trials_and_epochs(Study(path))
    study = run_study(short)
    assert study.model_folders()
    assert not (path / "checkpoints").exists()
    assert trials_and_epochs(study) == ended


# ---- refusals, which change nothing


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"budget": {"max_epochs": 9}}, ["budget.max_epochs", "8", "9"]),
        ({"space": {"activation": ["tanh"]}}, ["space.activation", "tanh"]),
        ({"seed": 5}, ["seed", "0", "5"]),
        ({"budget": {"trials": 7}}, ["budget.trials", "6", "7", "--extend"]),
        ({"data": {"binarize": "threshold"}}, ["data.binarize", "dynamic", "threshold"]),
    ],
)
def test_a_changed_spec_is_refused_with_what_differs(copy, change, told):
    path, spec = copy
    before = fingerprints(path)
    with pytest.raises(InputError) as caught:
        run_study(with_(spec, **change))
    assert all(text in str(caught.value) for text in [str(path), *told])
    assert fingerprints(path) == before


def test_changed_resources_and_export_are_the_same_study(copy):
    _, spec = copy
    changed = with_(spec, resources={"concurrency": 2}, export={"top": 1})
    assert run_study(changed).summary().is_complete


def test_changed_data_are_refused(tmp_path, small_spec):
    rows = np.random.default_rng(0).random((80, 5)).astype(np.float32)
    np.save(tmp_path / "mine.npy", rows)
    spec = with_(small_spec, data={"source": str(tmp_path / "mine.npy")}, budget={"trials": 1, "max_epochs": 2})
    spec = stored_in(with_(spec, scheduler={"grace_epochs": 1}), tmp_path / "studies")
    study = run_study(spec)
    before = fingerprints(study.path)
    rows[3, 3] = 0.5
    np.save(tmp_path / "mine.npy", rows)
    with pytest.raises(InputError, match="data"):
        run_study(spec)
    with pytest.raises(InputError, match="data"):
        run_study(spec, extend=1)
    assert fingerprints(study.path) == before


@pytest.mark.parametrize(
    ("resources", "told"),
    [({"gpus_per_trial": 1}, "gpus_per_trial"), ({"cpus_per_trial": 64}, "cpus_per_trial")],
)
def test_more_than_the_machine_has_is_refused_and_nothing_is_written(small_spec, tmp_path, resources, told):
    with pytest.raises(InputError, match=told):
        run_study(stored_in(with_(small_spec, resources=resources), tmp_path / "studies"))
    assert list(tmp_path.iterdir()) == []


def test_an_extension_of_nothing_is_refused(small_spec, tmp_path):
    with pytest.raises(InputError, match="extend"):
        run_study(stored_in(small_spec, tmp_path / "studies"), extend=3)
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_a_living_process_works_on_is_refused(copy):
    path, spec = copy
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        lease = {"host": socket.gethostname(), "pid": other.pid, "heartbeat": time.time()}
        (path / "lease.json").write_text(json.dumps(lease))
        CheckpointStore(path / "checkpoints").put(0, 1, b"state")  # so that there is something left to do
        before = fingerprints(path)
        with pytest.raises(InputError, match=str(other.pid)):
            run_study(spec)
        assert fingerprints(path) == before
    finally:
        other.communicate(b"\n")
    run_study(spec)  # it is dead: nobody has to remove its lease
    assert not (path / "lease.json").exists()
    assert not (path / "checkpoints").exists()


# ---- trials that go wrong


def test_a_space_without_choice_is_allowed_and_told(small_spec, tmp_path):
    fixed = {"activation": "tanh", "dropout": 0.0, "learning_rate": 5e-3, "latent_dim": 4}
    spec = stored_in(with_(small_spec, space=fixed, budget={"trials": 2}, scheduler={"kind": "none"}), tmp_path)
    said: list[str] = []
    study = run_study(spec, say=said.append)
    one, two = study.rows()
    assert one.params == two.params
    assert one.seed != two.seed
    assert one.val_nelbo != two.val_nelbo
    assert {one.epochs, two.epochs} == {spec.budget.max_epochs}  # nobody stops trials
    assert any("nothing to choose" in text for text in said)


def test_a_study_whose_trials_all_fail_stops_early_shows_the_first_reason_and_can_go_on(
    small_spec, tmp_path, monkeypatch
):
    spec = stored_in(with_(small_spec, budget={"trials": 3}), tmp_path)

    def broken(config: Any) -> Dataset:
        data = load_data(config)
        return replace(data, validation=np.ascontiguousarray(data.validation[:, :10]))

    with monkeypatch.context() as patch:
        patch.setattr(search.checks, "load_data", broken)
        with pytest.raises(StudyFailed) as caught:
            run_study(spec)
    study = Study(tmp_path / spec.name)
    rows = study.rows()
    assert [(row.state, row.status) for row in rows] == [("FAIL", "error")] * spec.budget.max_consecutive_failures
    assert rows[0].reason.splitlines()[-1] in str(caught.value)
    assert not (study.path / "lease.json").exists()
    assert not (study.path / "models").exists()

    study = run_study(spec)  # the data are whole again
    assert [row.state for row in study.rows()][:2] == ["FAIL", "FAIL"]
    assert study.rows()[2].state == "COMPLETE"
    assert study.summary().is_complete


class Killer(StudyEvents):
    """Kills the worker of a trial, as often as told, each time it has reported."""

    def __init__(self, times: dict[int, int]) -> None:
        self.times = times
        self.killed: list[int] = []

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        if self.times.get(row.trial, 0) and row.pid not in self.killed:
            self.times[row.trial] -= 1
            self.killed.append(row.pid)
            command = Path(f"/proc/{row.pid}/cmdline").read_bytes()
            assert b"ray::" in command
            os.kill(row.pid, signal.SIGKILL)


def test_a_killed_worker_costs_its_trial_an_attempt_and_one_killed_too_often_fails_as_lost(small_spec, tmp_path):
    spec = with_(small_spec, resources={"concurrency": 2}, scheduler={"kind": "none"}, budget={"trials": 4})
    spec = stored_in(spec, tmp_path)
    killer = Killer({1: 1, 2: 2})
    recorder = Recorder(tmp_path / spec.name)
    study = run_study(spec, events=[recorder, killer])
    assert len(killer.killed) == 3
    rows = study.rows()
    assert [(row.state, row.status) for row in rows] == [
        ("COMPLETE", rows[0].status),
        ("COMPLETE", rows[1].status),
        ("FAIL", "lost"),
        ("COMPLETE", rows[3].status),
    ]
    assert [row.attempts for row in rows] == [1, 2, 2, 1]
    assert_epochs_fit_states(study)
    data = load_data(spec.data_config())
    for row in rows:  # also those that went on in another worker
        assert recorded(study, row.trial) == retrained(spec, row, data)
        assert recorder.epochs[row.trial] == list(range(1, row.epochs + 1))
    attempts = defaultdict(set)
    for row in study.epochs().to_pylist():
        attempts[row["trial"]].add(row["attempt"])
    assert attempts[1] == {1, 2}
    assert "retries" in rows[2].reason
    assert "\n" not in rows[2].reason


def test_layers_of_unequal_width_are_searched_and_exported(ray_here, small_spec, tmp_path):
    sections = {"model": {"hidden_dims": [24, 16]}, "budget": {"trials": 2, "max_epochs": 6}}
    values = small_spec.dump() | sections | {"storage": {"path": str(tmp_path)}, "scheduler": {"kind": "none"}}
    values["space"] = {"activation": "silu", "learning_rate": 0.01, "dropout": 0.0}
    study = run_study(StudySpec.model_validate(values))
    (folder, *_) = study.model_folders()
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["hidden_dims"] == config["params"]["hidden_dims"] == [24, 16]


def test_states_of_stopped_trials_do_not_stay_on_disk_during_the_run(ray_here, small_spec, tmp_path):
    class Looker(StudyEvents):
        def __init__(self) -> None:
            self.stopped: list[int] = []
            self.seen: list[set[int]] = []

        def trial_started(self, row: TrialRow) -> None:
            deadline = time.monotonic() + 30  # nobody waits for what the store is to drop
            while (left := self.left()) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.seen.append(left)

        def left(self) -> set[int]:
            there = CheckpointStore(tmp_path / small_spec.name / "checkpoints").trials()
            return set(there) & set(self.stopped[:-1])  # the end of the last one may not be on disk yet

        def trial_ended(self, row: TrialRow) -> None:
            if row.state == "PRUNED":
                self.stopped.append(row.trial)

    looker = Looker()
    run_study(stored_in(small_spec, tmp_path), events=[looker])
    assert looker.stopped
    assert looker.seen == [set()] * len(looker.seen)


def test_a_complete_study_says_so_and_how_to_go_on(small_study, small_spec):
    said: list[str] = []
    run_study(small_spec, say=said.append)
    assert any("complete" in text and "--extend" in text for text in said)


def test_the_same_data_in_another_place_are_the_same_study(ray_here, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "points.npy", (rng.random((200, 6)) > 0.5).astype(np.float32))
    sections = {"budget": {"trials": 1, "max_epochs": 1}, "storage": {"path": str(tmp_path / "st")}, "name": "points"}
    first = StudySpec.model_validate({"data": {"source": str(tmp_path / "points.npy")}, **sections})
    study = run_study(first)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "points.npy").rename(tmp_path / "elsewhere" / "moved.npy")
    again = StudySpec.model_validate({"data": {"source": str(tmp_path / "elsewhere" / "moved.npy")}, **sections})
    assert run_study(again).rows() == study.rows()
