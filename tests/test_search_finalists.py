"""Comparisons through Ray on the digits: equal effort for each activation, fresh seeds, rows nobody looked at."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from clusters import command_of, descendants
from test_search_ledger import trial_row

from search.comparison import compare
from search.events import StudyEvents
from search.finalists import DROP_NATS, dropped, final_seed, finalists, missing_runs
from search.ledger import Ledger
from search.plan import plan_study
from search.publish import export_best
from search.results import Study, exported
from search.sampler import trial_seed
from search.spec import StudySpec
from search.study import StudyFailed, run_study
from search.tables import SCHEMAS, FinalRow, TrialRow, read_table
from vae.config import InputError
from vae.data import Dataset, load_data
from vae.objective import importance_weighted
from vae.training import Trainer

NAMES = ["relu", "tanh", "leaky_relu"]
SETTINGS, REFINED, RUNS = 2, 2, 2
MODEL = {
    "model": {"hidden_dims": [24]},
    "train": {"kl_warmup_epochs": 0, "lr_schedule": "constant", "batch_size": 32},
}
SPACE = {
    "activation": NAMES,
    "learning_rate": {"low": 3e-3, "high": 1e-2, "log": True},
    "dropout": {"low": 0.0, "high": 0.1},
    "latent_dim": {"low": 4, "high": 8},
}


def make_spec(folder: Path, **more: Any) -> StudySpec:
    values: dict[str, Any] = {
        **MODEL,
        "name": "compared",
        "goal": "compare-activations",
        "space": SPACE,
        "budget": {"trials": len(NAMES) * (SETTINGS + REFINED), "max_epochs": 6, "max_retries": 2},
        "scheduler": {"grace_epochs": 1, "reduction_factor": 4},
        "finalists": {"seeds": RUNS, "importance_samples": 20},
        "resources": {"concurrency": 1},  # so that suggestions depend on no clock
        "storage": {"path": str(folder)},
    }
    for section, value in more.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    return StudySpec.model_validate(values)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    return make_spec(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def compared(ray_here: object, spec: StudySpec) -> Study:
    """A whole comparison. To be read only."""
    return run_study(spec)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(StudySpec().data_config())


# ---- which, and how often


def test_a_plan_counts_the_runs_that_are_missing(compared, spec):
    plan = plan_study(spec)
    assert (plan.final_runs, plan.epochs_at_most, plan.seconds_at_most) == (0, 0, 0)
    num_finalists = len(finalists(spec, compared.rows()))
    more = spec.model_copy(update={"finalists": spec.finalists.model_copy(update={"seeds": RUNS + 3})})
    plan = plan_study(more)
    assert num_finalists > 1
    assert (plan.final_runs, plan.epochs_at_most) == (3 * num_finalists, 3 * num_finalists * spec.budget.max_epochs)


def row(number: int, activation: str, value: float | None, **more: Any) -> TrialRow:
    return trial_row(number, activation=activation, val_nelbo=value, objective=value, **more)


def test_the_best_of_each_activation_in_the_running_are_finalists_best_first():
    rows = [
        row(0, "relu", 24.0),
        row(1, "tanh", 23.0),
        row(2, "relu", 23.5),
        row(3, "tanh", 22.9),
        row(4, "elu", 23.0 + DROP_NATS),
        row(5, "gelu", 22.0, state="PRUNED"),
        row(6, "silu", 23.0),
        row(7, "silu", None, state="PRUNED", status="diverged"),
        row(8, "silu", None, state="FAIL", status="error"),
        row(9, "mish", None, state="RUNNING"),
        row(10, "selu", 23.1),
        row(11, "selu", None, state="PRUNED", status="oom"),  # half of them is not yet too many
    ]
    spec = StudySpec.model_validate({"goal": "compare-activations"})
    assert [found.trial for found in finalists(spec, rows)] == [3, 10, 2]
    reasons = dropped(rows)
    assert set(reasons) == {"elu", "gelu", "silu"}
    assert "2.1 nats" in reasons["elu"]
    assert "2 of 3" in reasons["silu"]
    two = StudySpec.model_validate({"goal": "compare-activations", "finalists": {"per_activation": 2}})
    assert [found.trial for found in finalists(two, rows)] == [3, 1, 10, 2, 0]


def test_the_leader_keeps_a_rival_however_far_behind_it_is_or_often_it_fails():
    rows = [row(0, "tanh", 20.0), row(1, "linear", 29.0), row(2, "relu", 31.0)]
    assert dropped(rows) == {"relu": "its best trial is 11.0 nats behind"}
    failing = [row(number, "linear", None, state="PRUNED", status="diverged") for number in (3, 4)]
    assert dropped([*rows, *failing]) == {"linear": "2 of 3 trials failed"}
    assert dropped([row for row in [*rows, *failing] if row.activation != "relu"]) == {}


def test_runs_of_one_seed_come_before_those_of_the_next_and_ended_ones_do_not_come_again():
    rows = [row(0, "relu", 23.0), row(1, "tanh", 23.1)]
    spec = StudySpec.model_validate({"goal": "compare-activations", "finalists": {"seeds": 2}})
    assert [(found.trial, run) for found, run in missing_runs(spec, rows, [])] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    final = FinalRow(study="s", trial=0, activation="relu", run=0, seed=1, state="FAIL", importance_samples=1)
    open_one = replace(final, trial=1, state="RUNNING")
    assert [(found.trial, run) for found, run in missing_runs(spec, rows, [final, open_one])] == [
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    assert missing_runs(StudySpec(), rows, []) == []


def test_no_seed_of_a_run_is_one_of_the_search():
    searched = {trial_seed(0, number) for number in range(5000)}
    fresh = [final_seed(0, run) for run in range(1000)]
    assert len(set(fresh)) == 1000
    assert searched.isdisjoint(fresh)


def test_without_any_trial_there_is_no_finalist_and_nobody_is_dropped():
    assert finalists(StudySpec(), []) == []
    assert dropped([]) == {}


# ---- the whole


def test_every_activation_has_the_same_settings_and_seeds_before_it_is_refined(compared, spec):
    rows = compared.rows()
    assert [found.activation for found in rows] == NAMES * (SETTINGS + REFINED)
    for turn in range(SETTINGS + REFINED):
        turns = rows[turn * len(NAMES) : (turn + 1) * len(NAMES)]
        assert len({found.seed for found in turns}) == 1
        assert {found.phase for found in turns} == {"screen" if turn < SETTINGS else "refine"}
        settings = {(found.learning_rate, found.dropout, found.latent_dim) for found in turns}
        assert (len(settings) == 1) == (turn < SETTINGS)
    assert len({found.seed for found in rows}) == SETTINGS + REFINED
    assert all((found.leaky_relu_slope is None) == (found.activation != "leaky_relu") for found in rows)


def test_no_trial_at_a_common_setting_is_stopped_and_others_are(compared, spec):
    rows = compared.rows()
    assert {found.epochs for found in rows if found.phase == "screen"} == {spec.budget.max_epochs}
    refined = [found for found in rows if found.phase == "refine"]
    assert any(found.state == "PRUNED" for found in refined)


def test_finals_are_what_a_process_of_ones_own_gets_with_the_same_seed(compared, spec, digits):
    finals = compared.final_rows()
    chosen = finalists(spec, compared.rows())
    assert {(final.trial, final.run) for final in finals} == {(r.trial, run) for r in chosen for run in range(RUNS)}
    assert {final.state for final in finals} == {"COMPLETE"}
    of_run = {final.run: final.seed for final in finals}
    assert len(set(of_run.values())) == RUNS
    assert all(final.seed == of_run[final.run] for final in finals)
    final = finals[0]
    source = compared.rows()[final.trial]
    trainer = Trainer(
        spec.model_config_for(source.params, digits.row_shape),
        spec.train_config_for(source.params),
        digits,
        seed=final.seed,
    )
    last = list(trainer)[-1]
    assert final.val_nelbo == last.val_nelbo
    scores = importance_weighted(trainer.result, torch.tensor(digits.test), 20, spec.seed)
    assert final.nll == scores.nll
    assert final.nelbo == scores.nelbo
    images = compared.final_images()
    its = images.filter((pc.field("trial") == final.trial) & (pc.field("run") == final.run)).sort_by("row")
    assert its["row"].to_pylist() == list(range(len(digits.test)))
    assert np.array_equal(its["nll"], -scores.log_likelihood)
    assert np.array_equal(its["nelbo"], -scores.elbo)


def test_the_best_model_of_each_activation_is_exported_and_no_state_stays(compared, spec, digits, tmp_path):
    kept = exported(spec, compared.rows())
    assert len({found.activation for found in kept}) == len(kept) > 1
    assert [folder.name for folder in compared.model_folders()] == [
        f"{rank}-trial-{found.trial}" for rank, found in enumerate(kept, start=1)
    ]
    assert not list(compared.path.glob("*checkpoints*"))
    folders = export_best(compared, digits, top=2, to=tmp_path)
    assert [folder.name for folder in folders] == [folder.name for folder in compared.model_folders()[:2]]


def test_a_comparison_that_is_complete_does_nothing_and_more_seeds_are_run_alone(compared, spec, tmp_path):
    shutil.copytree(compared.path, tmp_path / "compared")
    spec = make_spec(tmp_path)
    heard: list[str] = []
    run_study(spec, say=heard.append)
    assert "complete" in heard[0]
    before = compared.final_rows()
    more = run_study(make_spec(tmp_path, finalists={"seeds": RUNS + 1}))
    after = more.final_rows()
    assert [final for final in after if final.run < RUNS] == before
    assert len(after) == len(before) // RUNS * (RUNS + 1)
    with pytest.raises(InputError, match="importance_samples"):
        run_study(make_spec(tmp_path, finalists={"importance_samples": 30}))
    with pytest.raises(InputError, match="shared out evenly"):
        run_study(make_spec(tmp_path), extend=2)


# ---- what may befall it


@pytest.fixture
def searched(compared: Study, tmp_path: Path) -> Path:
    """A folder with the comparison as it was before its finals. Its spec is `make_spec` of the folder."""
    shutil.copytree(compared.path, tmp_path / "compared")
    for table in ("finals", "final_images"):
        shutil.rmtree(tmp_path / "compared" / table)
    return tmp_path


class Died(Exception):
    """The driver's end, staged."""


class DiesAtFinal(StudyEvents):
    def __init__(self, number: int) -> None:
        self.left = number

    def final_ended(self, row: FinalRow) -> None:
        self.left -= 1
        if self.left == 0:
            raise Died


def test_a_driver_that_dies_among_the_finals_goes_on_and_nothing_is_doubled(compared, searched):
    spec = make_spec(searched)
    with pytest.raises(Died):
        run_study(spec, events=[DiesAtFinal(3)])
    cut = Study(searched / "compared")
    assert 2 <= sum(final.state == "COMPLETE" for final in cut.final_rows()) < len(compared.final_rows())
    study = run_study(spec)
    assert values(study) == values(compared)
    assert images(study) == images(compared)


class KillsRuns(StudyEvents):
    """Kills the worker of a run once it is at work, so often."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.attempts: list[tuple[int, str | None]] = []

    def final_started(self, row: FinalRow) -> None:
        self.attempts.append((row.attempts, row.status))
        if self.times:
            self.times -= 1
            threading.Thread(target=kill_a_run).start()


def kill_a_run() -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            if "train_and_score" in command_of(pid):
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.005)


def test_a_run_whose_worker_is_killed_is_made_again_with_the_same_value(compared, searched):
    killer = KillsRuns(1)
    study = run_study(make_spec(searched), events=[killer])
    assert (2, "lost") in killer.attempts
    assert sorted(final.attempts for final in study.final_rows())[-2:] == [1, 2]
    assert values(study) == values(compared)
    assert images(study) == images(compared)


def test_runs_that_are_lost_too_often_fail_and_end_the_study_clearly(searched):
    killer = KillsRuns(1000)
    more: dict[str, Any] = {"budget": {"max_retries": 0, "max_consecutive_failures": 2}}
    more["finalists"] = {"importance_samples": 10_000}  # so that none is done before it is found
    with pytest.raises(StudyFailed, match="2 finalists' runs failed in a row"):
        run_study(make_spec(searched, **more), events=[killer])
    failed = [final for final in Study(searched / "compared").final_rows() if final.state == "FAIL"]
    assert {final.status for final in failed} == {"lost"}
    killer.times = 0


def test_the_best_of_an_ordinary_search_are_confirmed_afterwards(tmp_path):
    values = {**MODEL, "name": "plain", "space": SPACE, "storage": {"path": str(tmp_path)}}
    values |= {"budget": {"trials": 4, "max_epochs": 4}, "finalists": {"seeds": 2, "importance_samples": 5}}
    before = run_study(StudySpec.model_validate(values))
    assert before.final_rows() == []
    values["finalists"]["confirm"] = True
    study = run_study(StudySpec.model_validate(values))
    assert study.rows() == before.rows()
    chosen = finalists(study.spec, study.rows())
    assert {final.trial for final in study.final_rows()} == {found.trial for found in chosen}
    assert len(study.final_rows()) == 2 * len(chosen)
    assert study.model_folders()


def test_an_extension_refines_each_activation_further(compared, tmp_path):
    shutil.copytree(compared.path, tmp_path / "compared")
    study = run_study(make_spec(tmp_path), extend=len(NAMES))
    rows = study.rows()
    assert rows[: len(compared.rows())] == compared.rows()
    new = rows[len(compared.rows()) :]
    assert [found.activation for found in new] == NAMES
    assert {found.phase for found in new} == {"refine"}
    assert missing_runs(study.spec, rows, study.final_rows()) == []


# ---- the tables


def test_a_run_is_on_disk_with_all_its_images_or_it_is_made_again(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.end_trial(trial_row(0))
    done = FinalRow(study="s", trial=0, activation="relu", run=0, seed=1, state="COMPLETE", importance_samples=1)
    for run in range(3):
        table = [{"study": "s", "trial": 0, "run": run, "row": n, "nll": 1.0, "nelbo": 2.0} for n in range(4)]
        ledger.end_final(replace(done, run=run), pa.Table.from_pylist(table, SCHEMAS["final_images"]))
    ledger.end_final(replace(done, run=3, state="FAIL"), SCHEMAS["final_images"].empty_table())
    ledger.update_final(replace(done, run=4, state="RUNNING"))
    ledger.flush()
    ledger.close()
    finals, its_images = tmp_path / "finals" / "part-00000.parquet", tmp_path / "final_images" / "part-00000.parquet"
    pq.write_table(pq.read_table(finals).filter(pc.field("run") != 1), finals)
    pq.write_table(pq.read_table(its_images).filter(pc.field("run") != 2), its_images)
    again = Ledger(tmp_path)
    again.flush()
    again.close()
    assert sorted(read_table(tmp_path, "finals")["run"].to_pylist()) == [0, 3, 4]
    assert read_table(tmp_path, "final_images")["run"].to_pylist() == [0] * 4


def values(study: Study) -> list[tuple[Any, ...]]:
    return [(f.trial, f.run, f.state, f.nll, f.nelbo, f.val_nelbo, f.epochs) for f in study.final_rows()]


def images(study: Study) -> list[dict[str, Any]]:
    return study.final_images().sort_by([(key, "ascending") for key in ("trial", "run", "row")]).to_pylist()


def damage(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:100])


def test_images_lost_with_a_damaged_part_are_noticed_and_made_again(compared, tmp_path):
    shutil.copytree(compared.path, tmp_path / "compared")
    study = Study(tmp_path / "compared")
    damage(study.path / "final_images" / "part-00000.parquet")
    told = compare(study, importances=False)
    assert not told.is_complete
    assert any("left out" in caveat for caveat in told.caveats)
    study = run_study(make_spec(tmp_path))
    assert values(study) == values(compared)
    assert images(study) == images(compared)
    assert compare(study, importances=False).is_complete


def test_a_run_that_was_lost_for_good_is_made_again_by_the_next_driver(compared, tmp_path):
    shutil.copytree(compared.path, tmp_path / "compared")
    study = Study(tmp_path / "compared")
    table, part = study.finals(), study.path / "finals" / "part-00000.parquet"
    rows = table.to_pylist()
    victim = (rows[1]["trial"], rows[1]["run"])
    rows[1] |= {"state": "FAIL", "status": "lost", "reason": "its node is gone", "nll": None}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    of_victim = (pc.field("trial") == victim[0]) & (pc.field("run") == victim[1])
    pq.write_table(study.final_images().filter(~of_victim), study.path / "final_images" / "part-00000.parquet")
    study = run_study(make_spec(tmp_path))
    assert values(study) == values(compared)
    assert images(study) == images(compared)
    again = next(final for final in study.final_rows() if final.key == victim)
    assert again.reason is None
    assert again.attempts == 2


def test_what_was_confirmed_stays_so_whatever_the_next_command_asks_for(compared, tmp_path):
    shutil.copytree(compared.path, tmp_path / "compared")
    spec = make_spec(tmp_path, finalists={"seeds": 1, "confirm": False})
    study = run_study(spec, extend=len(NAMES))
    assert (study.spec.finalists.confirm, study.spec.finalists.seeds) == (True, RUNS)
    assert missing_runs(study.spec, study.rows(), study.whole_final_rows()) == []
    with_total = make_spec(tmp_path, budget={"trials": study.spec.budget.trials})
    values_given = with_total.dump()
    del values_given["comparison"]  # follows from the trials
    heard: list[str] = []
    run_study(StudySpec.model_validate(values_given), say=heard.append)
    assert "complete" in heard[0]
