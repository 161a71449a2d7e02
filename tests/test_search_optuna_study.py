"""A study handed to Optuna is what Optuna's own study was, and its dashboard sees it on loopback."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import optuna
import pytest

from search.optuna_study import _mirror
from search.results import Study

pytestmark = pytest.mark.usefixtures("ray_here")


def test_optuna_sees_what_the_ledger_has(small_study: Study) -> None:
    study = small_study.to_optuna()
    best = small_study.summary().best
    assert best is not None
    assert study.study_name == small_study.name
    assert study.best_value == best.val_nelbo
    assert study.best_trial.user_attrs["trial"] == best.trial
    for trial, row in zip(study.trials, small_study.rows(), strict=True):
        assert trial.state.name == row.state
        assert trial.params.items() <= row.params.items()
        assert trial.params["activation"] == row.activation
        assert max(trial.intermediate_values) == row.epochs
        assert trial.user_attrs["status"] == row.status
        json.dumps(trial.user_attrs)  # what storages on disk ask for


def test_optunas_own_tools_take_it(small_study: Study, tmp_path: Path) -> None:
    study = small_study.to_optuna(f"sqlite:///{tmp_path}/study.db")
    again = optuna.load_study(study_name=small_study.name, storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.values for trial in again.trials] == [trial.values for trial in study.trials]
    assert [trial.intermediate_values for trial in again.trials] == [t.intermediate_values for t in study.trials]
    figure = optuna.visualization.plot_intermediate_values(study)
    assert len(figure.data) == len(small_study.rows())
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        small_study.to_optuna(f"sqlite:///{tmp_path}/study.db")


def test_the_mirror_takes_what_has_ended_since_and_nothing_twice(small_study: Study) -> None:
    target, known = optuna.create_study(), {0, 1}
    for _ in range(2):
        _mirror(small_study, target, known)
    assert [trial.user_attrs["trial"] for trial in target.trials] == [row.trial for row in small_study.rows()][2:]


def test_the_dashboard_shows_it_on_loopback(small_study: Study) -> None:
    pytest.importorskip("optuna_dashboard", reason="the extra dashboard is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    storage = str(small_study.path.parent)
    command = [sys.executable, "-m", "search.cli", "dashboard", small_study.name, "--storage", storage]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}/" in process.stderr.readline()
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10) as answer:
                    shown = json.load(answer)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert small_study.name in json.dumps(shown)
        taken = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2
        assert f"port {port}" in taken.stderr
    finally:
        process.kill()
        process.communicate()
