"""A study as it lies on disk: who leads, what was saved, and what is said where there is none."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search_ledger import epoch_row, start_writer, trial_row

from search.ledger import Ledger, take_stock
from search.results import (
    Study,
    list_studies,
    open_study,
    ranked,
    readable_studies,
    summarise,
    write_study_file,
)
from search.spec import StudySpec
from search.tables import TRIALS, read_trials
from vae.config import InputError

PROVENANCE = {"created_at": datetime(2026, 3, 1, tzinfo=UTC), "data_fingerprint": "f00", "versions": {"ray": "2"}}


def make_study(path: Path, **spec: Any) -> Study:
    path.mkdir(parents=True)
    write_study_file(path, StudySpec.model_validate({"name": path.name, **spec}), PROVENANCE)
    return Study(path)


# ---- ranking and summing up


def test_only_healthy_trials_with_the_full_budget_may_lead():
    rows = [
        trial_row(0, val_nelbo=9.0),
        trial_row(1, "PRUNED", val_nelbo=1.0, epochs=1),
        trial_row(2, status="collapsed", val_nelbo=2.0),
        trial_row(3, "RUNNING", val_nelbo=3.0),
        trial_row(4, "FAIL", status="error"),
        trial_row(5, "PRUNED", status="diverged", val_nelbo=4.0),
        trial_row(6, val_nelbo=None),
        trial_row(7, val_nelbo=8.0),
    ]
    assert [row.trial for row in ranked(rows)] == [7, 0]


@settings(deadline=None)
@given(st.permutations([(0, 5.0), (1, 4.0), (2, 5.0), (3, 4.0), (4, 4.5)]))
def test_lower_leads_and_of_equals_the_earlier_in_whatever_order_they_come(order):
    rows = [trial_row(number, val_nelbo=value) for number, value in order]
    assert [row.trial for row in ranked(rows)] == [1, 3, 4, 0, 2]


ROWS = [
    trial_row(0, activation="relu", val_nelbo=9.0, epochs=30, max_epochs=30, train_wall_s=3.0, no_latent_nelbo=20.0),
    trial_row(1, "PRUNED", activation="relu", val_nelbo=12.0, epochs=10, max_epochs=30, train_wall_s=1.0),
    trial_row(2, activation="silu", val_nelbo=8.0, epochs=30, max_epochs=30, train_wall_s=3.0),
    trial_row(3, activation="silu", status="collapsed", val_nelbo=20.0, epochs=30, max_epochs=30),
    trial_row(4, "PRUNED", activation="elu", status="diverged", epochs=4, max_epochs=30),
    trial_row(5, "FAIL", activation="elu", status="error", reason="x", max_epochs=30),
    trial_row(6, "RUNNING", activation="elu", epochs=5, max_epochs=30),
]


def test_the_summary_counts_states_statuses_epochs_and_time():
    summary = summarise("s", 9, ROWS)
    assert dict(summary.states) == {"COMPLETE": 3, "PRUNED": 2, "FAIL": 1, "RUNNING": 1}
    assert dict(summary.statuses) == {"ok": 3, "collapsed": 1, "diverged": 1, "error": 1}
    assert [row.trial for row in summary.leaders] == [2, 0]
    assert summary.best is not None
    assert (summary.best.trial, summary.ended, summary.is_complete) == (2, 6, False)
    assert summary.epochs_trained == 30 + 10 + 30 + 30 + 4 + 5
    assert summary.train_wall_s == 7.0
    assert summary.no_latent_nelbo == 20.0


def test_only_trials_that_were_stopped_for_their_value_count_as_epochs_saved():
    assert summarise("s", 9, ROWS).epochs_saved == 30 - 10  # not those of the diverged, failed or unfinished


def test_the_activations_stand_best_first_with_their_counts():
    entries = summarise("s", 9, ROWS).activations
    assert [entry.activation for entry in entries] == ["silu", "relu", "elu"]
    counts = {e.activation: (e.trials, e.full, e.stopped, e.failed) for e in entries}
    assert counts == {"silu": (2, 1, 0, 1), "relu": (2, 1, 1, 0), "elu": (3, 0, 0, 2)}
    assert [entry.best.trial if entry.best else None for entry in entries] == [2, 0, None]


def test_a_study_is_complete_when_as_many_have_ended_as_were_asked_for():
    assert summarise("s", 6, ROWS).is_complete
    assert not summarise("s", 7, ROWS).is_complete


def test_nothing_yet_is_summed_up_too():
    summary = summarise("s", 3, [])
    assert (summary.best, summary.leaders, summary.activations, summary.ended) == (None, [], [], 0)


# ---- on disk


def test_a_stored_spec_and_its_provenance_come_back_equal(tmp_path):
    spec = {"budget": {"max_epochs": 6}, "space": {"dropout": [0.1, 0.2]}, "data": {"source": "a b/ü.npy"}}
    study = make_study(tmp_path / "mine", **spec)
    assert study.spec == StudySpec.model_validate({"name": "mine", **spec})
    assert study.provenance == PROVENANCE
    assert StudySpec.load(tmp_path / "mine" / "study.toml") == study.spec


def test_a_study_is_opened_by_its_folder(tmp_path):
    make_study(tmp_path / "mine")
    for path in (tmp_path / "mine", str(tmp_path / "mine")):
        assert open_study(path).name == "mine"


def test_a_missing_study_is_refused_with_the_names_of_the_others(tmp_path):
    make_study(tmp_path / "digits")
    make_study(tmp_path / "faces")
    with pytest.raises(InputError) as caught:
        open_study(tmp_path / "facs")
    assert all(word in str(caught.value) for word in ("facs", "digits", "faces"))


def test_a_missing_study_among_none_says_so(tmp_path):
    with pytest.raises(InputError, match="none"):
        open_study(tmp_path / "nowhere" / "x")


def test_only_folders_with_a_study_file_are_studies(tmp_path):
    make_study(tmp_path / "b")
    make_study(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert [study.name for study in list_studies(tmp_path)] == ["a", "b"]
    assert list_studies(tmp_path / "none") == []


def test_the_tables_have_what_the_ledger_wrote(tmp_path):
    study = make_study(tmp_path / "s")
    assert (study.rows(), study.epochs().num_rows) == ([], 0)
    ledger = Ledger(study.path)
    ledger.add_epochs([epoch_row(0, 1), epoch_row(0, 2)])
    ledger.end_trial(ROWS[1])
    ledger.end_trial(ROWS[0])
    ledger.flush()
    assert study.rows() == ROWS[:2]  # by number
    assert study.trials().num_rows == 2
    assert study.epochs()["epoch"].to_pylist() == [1, 2]
    assert study.summary() == summarise("s", study.spec.budget.trials, ROWS[:2])


def test_exported_models_stand_in_the_order_of_their_rank(tmp_path):
    study = make_study(tmp_path / "s")
    assert study.model_folders() == []
    for name in ("10-trial-3", "2-trial-11", "1-trial-7"):
        (study.path / "models" / name).mkdir(parents=True)
        (study.path / "models" / name / "config.json").touch()
    assert [folder.name for folder in study.model_folders()] == ["1-trial-7", "2-trial-11", "10-trial-3"]


def test_a_study_reads_while_it_is_written(tmp_path):
    study, seen, polls = make_study(tmp_path / "s", budget={"trials": 50}), 0, 0
    writer = start_writer(study.path, 50, rows_a_part=20)
    try:
        while writer.poll() is None:
            summary = study.summary()
            assert sum(summary.states.values()) >= seen
            assert [row.val_nelbo for row in summary.leaders] == sorted(row.val_nelbo for row in summary.leaders)
            seen, polls = sum(summary.states.values()), polls + 1
    finally:
        writer.kill()
        writer.communicate()
    assert polls > 5
    assert study.summary().is_complete


def test_a_study_that_is_watched_hears_of_its_extension(tmp_path):
    study = make_study(tmp_path / "s", budget={"trials": 3})
    assert study.summary().trials == 3
    write_study_file(study.path, StudySpec.model_validate({"name": "s", "budget": {"trials": 5}}), PROVENANCE)
    assert study.summary().trials == 5


@pytest.mark.parametrize("text", ["[budget", "[budget]\ntrials = 0\n[provenance]\n", 'later = "x"\n[provenance]\n'])
def test_a_study_file_that_cannot_be_read_is_an_input_error_that_names_it(text, tmp_path):
    make_study(tmp_path / "s")
    (tmp_path / "s" / "study.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "s"))):
        _ = open_study(tmp_path / "s").spec


def test_a_study_that_cannot_be_read_is_left_out_of_lists_and_that_is_told(tmp_path, caplog):
    make_study(tmp_path / "good")
    make_study(tmp_path / "old")
    file = tmp_path / "old" / "study.toml"
    file.write_text(file.read_text().replace("[model]", "[model]\navg_pool_window = 3"))
    assert [study.name for study in readable_studies(tmp_path)] == ["good"]
    assert "model.avg_pool_window: is space.avg_pool_window now" in caplog.text


def test_tables_of_another_version_are_refused_and_not_taken_for_damaged(tmp_path):
    schema = TRIALS.with_metadata({"vaesearch.schema_version": "1"})
    (tmp_path / "trials").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / "trials" / "part-00000.parquet")
    for read in (read_trials, take_stock):
        with pytest.raises(InputError, match="version 1"):
            read(tmp_path)
    assert (tmp_path / "trials" / "part-00000.parquet").exists()
