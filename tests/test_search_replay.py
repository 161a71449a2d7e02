"""Trials of each kind trained again from the tables: equal to the last bit; another training is told from them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
import typer
from test_search_faults import DiesAt
from test_search_study import stored_in

import search.interrupts
from search import cli_again
from search.replay import FIRST_TOLERANCE, TOLERANCE, replay, replay_lines
from search.results import Study, open_study
from search.spec import StudySpec
from search.status import end_with_status
from search.study import run_study
from search.tables import EPOCHS, TRIALS, EpochRow, TrialRow, read_table, to_rows, to_table
from vae.config import InputError
from vae.training import Trainer

pytestmark = pytest.mark.usefixtures("ray_here")

CUT_OFF = 2
"""The trial under way when the driver of `rough_study` died."""


@pytest.fixture(scope="module")
def rough_study(small_spec: StudySpec, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Healthy, collapsed and diverged trials, one of them in two attempts; none is stopped early."""
    values = stored_in(small_spec, tmp_path_factory.mktemp("rough")).dump()
    values["space"] = {
        "activation": ["tanh", "exponential"],
        "learning_rate": [3e-3, 10.0],
        "beta": [1.0, 1000.0],
        "latent_dim": 4,
    }
    values["budget"] |= {"trials": 12, "max_epochs": 6}
    values["sampler"] = {"kind": "random"}
    values["scheduler"] |= {"kind": "none"}
    spec = StudySpec.model_validate(values)
    with pytest.raises(Exception, match="Died"):
        run_study(spec, events=[DiesAt(CUT_OFF, 4)])
    return run_study(spec)


@pytest.fixture
def copy(small_study: Study, tmp_path: Path) -> Study:
    return copied(small_study, tmp_path)


def copied(study: Study, folder: Path) -> Study:
    shutil.copytree(study.path, folder / study.name)
    return open_study(folder / study.name)


def first_of(study: Study, state: str, status: str) -> TrialRow:
    return next(row for row in study.rows() if (row.state, row.status) == (state, status))


def rewrite(study: Study, trial: int, change: Callable[[TrialRow], TrialRow]) -> None:
    """The row of a trial, as if it had been written otherwise."""
    rows = [change(row) if row.trial == trial else row for row in study.rows()]
    overwrite(study, "trials", to_table(rows, TRIALS))


def rewrite_epochs(study: Study, change: Callable[[EpochRow], EpochRow | None]) -> None:
    rows = [changed for row in to_rows(study.epochs(), EpochRow) if (changed := change(row)) is not None]
    overwrite(study, "epochs", to_table(rows, EPOCHS))


def overwrite(study: Study, name: str, table: pa.Table) -> None:
    shutil.rmtree(study.path / name)
    (study.path / name).mkdir()
    pq.write_table(table, study.path / name / "part-00000.parquet")
    assert read_table(study.path, name).num_rows == table.num_rows


# ---- equal


@pytest.mark.parametrize(("state", "status"), [("COMPLETE", "ok"), ("COMPLETE", "collapsed"), ("PRUNED", "diverged")])
def test_a_trial_trained_again_is_equal_to_the_last_bit(rough_study, state, status):
    row = first_of(rough_study, state, status)
    replayed = replay(rough_study, row.trial)
    assert replayed.verdict == "equal"
    assert [epoch.epoch for epoch in replayed.epochs] == list(range(1, row.epochs + 1))
    assert replayed.differing == []
    assert replayed.ended_now == replayed.ended_then


def test_a_diverged_trial_diverges_again_at_the_same_step_in_the_same_layer(rough_study):
    row = first_of(rough_study, "PRUNED", "diverged")
    replayed = replay(rough_study, row.trial)
    assert replayed.ended_now == row.reason
    assert f"step {row.step}" in replayed.ended_now
    assert row.layer is not None
    assert row.layer in replayed.ended_now


def test_a_trial_that_was_stopped_early_is_equal_as_far_as_it_came(small_study):
    row = first_of(small_study, "PRUNED", "ok")
    replayed = replay(small_study, row.trial)
    assert (replayed.verdict, len(replayed.epochs)) == ("equal", row.epochs)
    assert row.epochs < row.max_epochs
    assert replay_lines(replayed) == [f"small, trial {row.trial} (PRUNED): equal bit for bit, {row.epochs} epochs"]


def test_a_trial_of_two_attempts_that_went_on_from_a_stored_rung_is_equal(rough_study):
    row = rough_study.rows()[CUT_OFF]
    assert row.attempts == 2
    last = rough_study.attempts().filter(pa.compute.equal(rough_study.attempts()["trial"], CUT_OFF)).to_pylist()[-1]
    assert last["from_epoch"] > 0
    replayed = replay(rough_study, CUT_OFF)
    assert (replayed.verdict, replayed.attempts, len(replayed.epochs)) == ("equal", 2, row.epochs)


@pytest.mark.parametrize(("state", "status"), [("FAIL", "error"), ("PRUNED", "oom")])
def test_a_trial_that_something_else_ended_is_trained_as_far_as_the_ledger_goes(copy, state, status):
    row = first_of(copy, "COMPLETE", "ok")
    rewrite_epochs(copy, lambda epoch: None if (epoch.trial, epoch.epoch) > (row.trial, 3) else epoch)
    rewrite(copy, row.trial, lambda row: replace(row, state=state, status=status, reason="no more room", epochs=3))
    replayed = replay(copy, row.trial)
    assert (replayed.verdict, len(replayed.epochs)) == ("equal", 3)
    assert "no more room" in replayed.notes[0]


def test_threads_are_those_of_the_trial_and_afterwards_those_of_before(small_study):
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        replayed = replay(small_study, 0, tell=lambda done, total, metrics: seen.append(torch.get_num_threads()))
        assert set(seen) == {replayed.threads} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ---- not equal


def test_a_last_bit_is_seen_and_is_within_the_tolerance(copy):
    def nudged(epoch: EpochRow) -> EpochRow:
        if (epoch.trial, epoch.epoch) != (0, 2):
            return epoch
        return replace(epoch, val_nelbo=math.nextafter(epoch.val_nelbo, math.inf))

    rewrite_epochs(copy, nudged)
    replayed = replay(copy, 0)
    assert replayed.verdict == "close"
    assert [(epoch.epoch, epoch.differing) for epoch in replayed.differing] == [(2, ["val_nelbo"])]
    assert "1 of" in replay_lines(replayed)[0]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"learning_rate": 4e-4}, {"activation": "gelu"}])
def test_another_training_is_told_by_its_first_epoch(copy, changed):
    row = first_of(copy, "COMPLETE", "ok")
    rewrite(copy, row.trial, lambda row: replace(row, **changed))
    replayed = replay(copy, row.trial)
    assert replayed.verdict == "different"
    assert not replayed.epochs[0].is_close


def test_a_trial_that_does_not_diverge_again_is_different(copy):
    row = first_of(copy, "COMPLETE", "ok")
    diverged = {
        "state": "PRUNED",
        "status": "diverged",
        "reason": "diverged in epoch 9, step 9: loss is nan",
        "step": 9,
    }
    rewrite(copy, row.trial, lambda row: replace(row, **diverged))
    replayed = replay(copy, row.trial)
    assert (replayed.verdict, replayed.differing) == ("different", [])
    assert f"then: {diverged['reason']}" in replay_lines(replayed)


def test_another_digit_in_the_reason_of_a_collapse_is_close(rough_study, tmp_path):
    copy = copied(rough_study, tmp_path)
    trial = first_of(copy, "COMPLETE", "collapsed").trial
    rewrite(copy, trial, lambda row: replace(row, reason="no better than a model without latents (99.99 nats)"))
    replayed = replay(copy, trial)
    assert (replayed.verdict, replayed.differing) == ("close", [])
    assert "then: collapsed: no better than a model without latents (99.99 nats)" in replay_lines(replayed)


def test_divergence_at_another_step_of_the_epoch_is_close_and_in_another_epoch_different(rough_study, tmp_path):
    copy = copied(rough_study, tmp_path)
    row = first_of(copy, "PRUNED", "diverged")
    assert row.step is not None
    rewrite(copy, row.trial, lambda row: replace(row, step=row.step + 1, layer="elsewhere"))
    assert replay(copy, row.trial).verdict == "close"
    rewrite(copy, row.trial, lambda row: replace(row, epochs=row.epochs + 1))  # whose figures are lost
    assert replay(copy, row.trial).verdict == "different"


def test_epochs_that_the_ledger_has_lost_are_passed_over_and_counted(copy):
    row = first_of(copy, "COMPLETE", "ok")
    rewrite_epochs(copy, lambda epoch: None if (epoch.trial, epoch.epoch) == (row.trial, 2) else epoch)
    replayed = replay(copy, row.trial)
    assert (replayed.verdict, len(replayed.epochs)) == ("equal", row.epochs - 1)
    assert replayed.notes[0].startswith("1 of its epochs")


def change_study_file(study: Study, section: str, **values: Any) -> None:
    content = study.spec.dump() | {"provenance": study.provenance}
    content[section] = content[section] | values
    (study.path / "study.toml").write_text(tomli_w.dumps(content))


def test_what_is_known_to_be_unlike_then_is_told(copy):
    change_study_file(copy, "provenance", versions={"torch": "1.0.0", "numpy": "2"})
    rewrite(copy, 0, lambda row: replace(row, host="elsewhere", device="cuda"))
    changed = replay(copy, 0).changed
    assert [what.split(" then")[0] for what in changed] == ["torch 1.0.0", "numpy 2", "on elsewhere", "on cuda"]


# ---- refused


def test_other_data_and_lost_data_and_unknown_trials_are_refused_with_what_would_do(copy):
    with pytest.raises(InputError, match=r"no trial 77; it has trials 0 to 5"):
        replay(copy, 77)
    change_study_file(copy, "data", source=str(copy.path / "gone.npy"))
    with pytest.raises(InputError, match=r"gone\.npy: no such file(.|\n)*--data FILE"):
        replay(copy, 0)
    assert replay(copy, 0, data="digits").verdict == "equal"
    change_study_file(copy, "provenance", data_fingerprint="0" * 64)
    with pytest.raises(InputError, match=r"other data.*000000000000"):
        replay(copy, 0, data="digits")


def test_a_trial_of_which_nothing_is_recorded_is_refused(copy):
    rewrite_epochs(copy, lambda epoch: None if epoch.trial == 0 else epoch)
    rewrite(copy, 0, lambda row: replace(row, state="FAIL", status="error", epochs=0))
    with pytest.raises(InputError, match=r"no epoch of trial 0 \(FAIL, error\)"):
        replay(copy, 0)


# ---- the command


def vaesearch(*arguments: str) -> int:
    """The exit status."""
    app = typer.Typer()
    app.command()(cli_again.replay)
    app.command()(cli_again.refit)
    with pytest.raises(SystemExit) as end:
        end_with_status(lambda: app(args=[*arguments]))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_says_equal_in_a_line_and_shows_what_differs(copy, capsys):
    where = ("--storage", str(copy.path.parent))
    assert vaesearch("replay", copy.name, "0", *where) == 0
    assert capsys.readouterr().out.count("\n") == 1
    rewrite(copy, 0, lambda row: replace(row, seed=1))
    assert vaesearch("replay", copy.name, "0", *where) == 1
    out = capsys.readouterr().out
    assert "different" in out
    assert "difference" in out.splitlines()[-1 - copy.rows()[0].epochs]
    assert vaesearch("replay", copy.name, "77", *where) == 2
    assert vaesearch("replay", copy.name, "0", *where, "--json") == 1
    assert '"verdict": "different"' in capsys.readouterr().out


def test_a_curve_within_the_tolerance_ends_with_0_and_says_which_tolerance(copy, capsys):
    rewrite_epochs(copy, lambda epoch: replace(epoch, val_nelbo=math.nextafter(epoch.val_nelbo, math.inf)))
    where = ("--storage", str(copy.path.parent))
    assert vaesearch("replay", copy.name, "0", *where) == 0
    out = capsys.readouterr().out
    assert "equal within the tolerance" in out
    assert f"(tolerance {TOLERANCE:g}, of training in the first epoch {FIRST_TOLERANCE:g})" in out
    assert f"now 1 thread on cpu, {torch.backends.cpu.get_cpu_capability()}; " in out
    assert vaesearch("replay", copy.name, "0", *where, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["tolerance"]) == ("close", TOLERANCE)
    assert 0 < document["deviation"] <= TOLERANCE


def test_another_kind_of_cpu_is_within_the_tolerance(copy):
    """torch's and MKL's kernels of one that has no vector instructions of today."""
    trial = first_of(copy, "COMPLETE", "ok").trial
    older = os.environ | {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    command = [sys.executable, "-c", "from search.start import main; main()", "replay", copy.name, str(trial)]
    command += ["--storage", str(copy.path.parent), "--json"]
    done = subprocess.run(command, env=older, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(done.stdout)
    assert document["cpu"] == "DEFAULT"
    assert document["verdict"] in ("close", "equal")
    print(document["verdict"], document["deviation"])


def test_ctrl_c_ends_the_command_with_a_line(small_study, monkeypatch, capsys):
    def interrupted(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    monkeypatch.setattr(search.interrupts, "_swallowed", [])  # or it would end the next study of this process
    assert vaesearch("replay", small_study.name, "0", "--storage", str(small_study.path.parent)) == 130
    assert "vaesearch: interrupted: nothing was written" in capsys.readouterr().err
