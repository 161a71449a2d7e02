"""What trackers are told is what the ledger has; one that fails is left out, and the study goes on."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_search_faults import DiesAt
from test_search_study import stored_in, with_

import search.trackers
from search.results import Study
from search.spec import StudySpec
from search.study import run_study
from search.tables import EpochRow, TrialRow
from search.trackers import METRICS, tracking
from vae.config import InputError

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first import of a client may take a while on a busy machine."""
    monkeypatch.setattr(search.trackers, "LAST_S", 300.0)


@pytest.fixture
def spec(small_spec: StudySpec, tmp_path: Path) -> StudySpec:
    return with_(stored_in(small_spec, tmp_path), name="tracked", budget={"trials": 3, "max_epochs": 4})


def run(spec: StudySpec, names: list[str], **how: Any) -> tuple[Study, list[str]]:
    said: list[str] = []
    with tracking(names, spec, said.append) as trackers:
        return run_study(spec, events=trackers, **how), said


def recorded(study: Study) -> dict[int, dict[str, dict[int, float]]]:
    """Trial -> metric -> epoch -> value, by the ledger."""
    found: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for epoch in study.epochs().to_pylist():
        for name in METRICS:
            found[epoch["trial"]][name][epoch["epoch"]] = float(epoch[name])
    return found


def assert_same(told: dict[int, dict[str, dict[int, float]]], study: Study, rel: float = 0.0) -> None:
    expected = recorded(study)
    assert told.keys() == expected.keys()
    for trial, metrics in expected.items():
        assert told[trial].keys() == metrics.keys()
        for name, curve in metrics.items():
            assert told[trial][name] == pytest.approx(curve, rel=rel, abs=0)


def in_tensorboard(study: Study) -> dict[int, dict[str, dict[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: dict[int, dict[str, dict[int, float]]] = {}
    for folder in Path(str(study.path), "tensorboard").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        told[int(folder.name.removeprefix("trial-"))] = {
            name: {event.step: event.value for event in events.Scalars(name)}
            for name in events.Tags()["scalars"]
            if name in METRICS
        }
    return told


def in_mlflow(study: Study) -> dict[int, dict[str, dict[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{study.path}/mlflow.db")
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    told: dict[int, dict[str, dict[int, float]]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED"
        trial = int(run.info.run_name.removeprefix("trial-"))
        assert trial not in told  # one run a trial, also of a study that went on
        told[trial] = {
            name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
            for name in METRICS
        }
        row = study.rows()[trial]
        assert run.data.params["activation"] == row.activation
        assert float(run.data.params["learning_rate"]) == row.learning_rate
    return told


Tracker = tuple[str, Callable[[Study], Any], float]
"""Its name, what reads it, and how far its numbers may be from the ledger's: event files have float32."""


@pytest.fixture(params=[("tensorboard", in_tensorboard, 1e-6), ("mlflow", in_mlflow, 0.0)], ids=lambda of: of[0])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    name = request.param[0]
    pytest.importorskip(search.trackers.BACKENDS[name][0], reason=f"the extra {name} is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return request.param


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's use of sqlalchemy
def test_a_trial_that_goes_on_goes_on_in_its_run(
    spec: StudySpec, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, read, rel = tracker
    monkeypatch.setattr(search.trackers, "INTERRUPTED_S", search.trackers.LAST_S)
    longer = with_(spec, budget={"trials": 1, "max_epochs": 8})
    with pytest.raises(Exception, match="Died"), tracking([name], longer, print) as trackers:
        run_study(longer, events=[*trackers, DiesAt(0, longer.rungs()[0])])
    study, said = run(longer, [name])
    assert said == []
    assert study.rows()[0].attempts == 2
    assert_same(read(study), study, rel)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tracker_is_told_what_the_ledger_has(spec: StudySpec, tracker: Tracker) -> None:
    name, read, rel = tracker
    study, said = run(spec, [name, name])
    assert said == []
    assert_same(read(study), study, rel)
    study, said = run(spec, [name], extend=1)
    assert said == []
    assert_same(read(study), study, rel)


def test_wandb_is_told_without_a_network(spec: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    study, said = run(with_(spec, budget={"trials": 1}), ["wandb"])
    assert said == []
    (folder,) = Path(str(study.path), "wandb").glob("offline-run-*")
    assert f"tracked-0-{study.rows()[0].suggested_at.timestamp():.0f}" in folder.name
    content = next(folder.glob("*.wandb")).read_bytes()
    assert b"val_nelbo" in content
    assert study.rows()[0].activation.encode() in content


def test_one_that_fails_is_left_out_and_the_study_goes_on(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[int] = []

    class Failing:
        def __init__(self, spec: StudySpec) -> None: ...

        def begin(self, row: TrialRow) -> None: ...

        def log(self, row: TrialRow, epochs: list[EpochRow]) -> None:
            told.append(row.trial)
            raise ConnectionError("no route to it\nand more")

        def end(self, row: TrialRow) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(search.trackers.BACKENDS, "failing", ("json", Failing))
    study, said = run(spec, ["failing"])
    assert [row.state == "RUNNING" for row in study.rows()] == [False] * 3
    assert said == ["failing: no route to it; nothing more is sent there, the ledger has it"]
    assert told == [0]


def test_unknown_and_missing_ones_are_refused_before_anything_begins(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    for name, why in (("clearml", "known are tensorboard, mlflow, wandb"), ("wandb", "pip install 'vaesearch.wandb.'")):
        monkeypatch.setattr(search.trackers.importlib.util, "find_spec", lambda module: None)
        with pytest.raises(InputError, match=why), tracking([name], spec, print):
            raise AssertionError
    monkeypatch.undo()
    away = with_(spec, storage={"path": s3_url})
    with pytest.raises(InputError, match="use a folder"), tracking(["tensorboard"], away, print):
        raise AssertionError
