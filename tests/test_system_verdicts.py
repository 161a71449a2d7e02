"""Verdicts on data whose answer is known: a planted difference is found, and none where there is none."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_system import assert_whole, driver, run
from test_system_faults import kill_with_family

from search.comparison import Comparison, compare
from search.results import open_study
from search.spec import StudySpec
from search.study import run_study

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

COMPARED = {
    "name": "study",
    "goal": "compare-activations",
    "budget.max_epochs": 40,
    "model.hidden_dims": [32],
    "space.learning_rate": {"low": 3e-3, "high": 2e-2, "log": True},
    "space.dropout": 0.0,
    "comparison.settings": 4,
    "finalists.importance_samples": 100,
}
CONTINUOUS = {"model.likelihood": "gaussian", "space.latent_dim": 2}


def compared(folder: Path, **overrides: Any) -> Comparison:
    """What is said of a comparison that was run to its end. Two underscores stand for a dot."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    study = run_study(StudySpec.load(overrides={**COMPARED, "storage.path": str(folder / "studies"), **values}))
    found = compare(study, importances=False)
    print(found.sentence)
    return found


def test_on_a_curved_manifold_tanh_is_found_to_be_better_than_linear(ray_here, tmp_path):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, size=(1200, 1))
    curve = np.concatenate([f(k * angle) for k in (1, 2, 3) for f in (np.cos, np.sin)], axis=1)
    curve[:, 0] *= 2  # a direction that a linear model can use
    np.save(tmp_path / "curve.npy", curve + 0.1 * rng.normal(size=curve.shape))
    data = {"data.source": str(tmp_path / "curve.npy"), **CONTINUOUS}
    found = compared(tmp_path, **data, space__activation=["linear", "tanh"])
    assert found.verdict is not None
    assert (found.verdict.kind, found.verdict.group) == ("best", ("tanh",))


def test_on_linear_gaussian_data_linear_does_not_lose(ray_here, tmp_path):
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(2, 6))
    np.save(tmp_path / "plane.npy", rng.normal(size=(1200, 2)) @ loadings + 0.3 * rng.normal(size=(1200, 6)))
    data = {"data.source": str(tmp_path / "plane.npy"), **CONTINUOUS}
    found = compared(tmp_path, **data, space__activation=["tanh", "linear"])
    assert found.verdict is not None
    assert "linear" in found.verdict.group


def test_an_activation_under_two_names_is_not_found_to_be_better_than_itself(ray_here, tmp_path):
    """The slope is too small to matter, and large enough for rounding to drive the two apart."""
    found = compared(tmp_path, space__activation=["relu", "leaky_relu"], space__leaky_relu_slope=1e-5)
    assert found.verdict is not None
    assert found.verdict.kind == "no_difference"


def num_finals_told(lines: list[str]) -> int:
    after_the_search = itertools.dropwhile(lambda line: not line.startswith("finalists: "), list(lines))
    return sum(line.startswith("[") for line in after_the_search)


def test_a_comparison_killed_among_its_finals_is_whole_in_the_end(tmp_path):
    space = ("--set", 'space.activation=["silu", "tanh", "elu"]', "--set", "space.learning_rate=0.005")
    short = ("--trials", "6", "--max-epochs", "20", "--set", "finalists.seeds=6", "--set", "model.hidden_dims=[32]")
    arguments = ("run", "--name", "study", "--goal", "compare-activations", *space, *short)
    with driver(*arguments, cwd=tmp_path) as running:
        running.wait_until(lambda: num_finals_told(running.stderr) > 3)
        assert not running.is_over
        kill_with_family(running)
    told = run("compare", "study", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "so far" in told.stdout
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / "study")
    assert_whole(study, trials=6)
    finals = study.final_rows()
    assert {final.state for final in finals} == {"COMPLETE"}
    assert len({final.key for final in finals}) == len(finals) > 0
    assert study.final_images().num_rows == 180 * len(finals)
    assert {final.run for final in finals} == set(range(6))
    assert "vaesearch report study" in done.stdout
    assert run("report", "study", cwd=tmp_path).returncode == 0
    assert (study.path / "report.html").is_file()
