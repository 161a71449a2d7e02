"""Verdicts on data whose answer is known: a planted difference is found, and none where there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_system import assert_whole, driver, run
from test_system_faults import kill_with_family

from search.results import open_study

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

COMPARED = ("--goal", "compare-activations", "--max-epochs", "40", "--set", "model.hidden_dims=[32]")
SMALL = ("--set", "comparison.settings=3", "--set", "finalists.seeds=7", "--set", "finalists.importance_samples=100")
CONTINUOUS = ("--set", "model.likelihood=gaussian", "--set", "space.latent_dim=2")
RATES = ("--set", "space.learning_rate={low=3e-3, high=2e-2, log=true}", "--set", "space.dropout=0.0")


def compared(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What `compare` says of a comparison that is run to its end."""
    done = run("run", "--name", "study", *COMPARED, *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = run("compare", "study", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    answer: dict[str, Any] = json.loads(told.stdout)
    print(answer["sentence"])
    return answer


def test_on_a_curved_manifold_tanh_is_found_to_be_better_than_linear(tmp_path):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, size=(1200, 1))
    curve = np.concatenate([f(k * angle) for k in (1, 2, 3) for f in (np.cos, np.sin)], axis=1)
    curve[:, 0] *= 2  # a direction that a linear model can use
    np.save(tmp_path / "curve.npy", curve + 0.1 * rng.normal(size=curve.shape))
    activations = ("--set", 'space.activation=["linear", "tanh"]')
    answer = compared(tmp_path, "--data", "curve.npy", *CONTINUOUS, *RATES, *activations)
    assert answer["verdict"]["kind"] == "best"
    assert answer["verdict"]["group"] == ["tanh"]


def test_on_linear_gaussian_data_linear_does_not_lose(tmp_path):
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(2, 6))
    np.save(tmp_path / "plane.npy", rng.normal(size=(1200, 2)) @ loadings + 0.3 * rng.normal(size=(1200, 6)))
    activations = ("--set", 'space.activation=["tanh", "linear"]')
    answer = compared(tmp_path, "--data", "plane.npy", *CONTINUOUS, *RATES, *activations)
    assert "linear" in answer["verdict"]["group"]


def test_an_activation_under_two_names_is_not_found_to_be_better_than_itself(tmp_path):
    """The slope is too small to matter, and large enough for rounding to drive the two apart."""
    activations = ("--set", 'space.activation=["relu", "leaky_relu"]', "--set", "space.leaky_relu_slope=1e-5")
    answer = compared(tmp_path, *RATES, *activations, "--max-epochs", "20")
    assert answer["verdict"]["kind"] == "no_difference"


def test_a_comparison_killed_in_its_search_and_among_its_finals_is_whole_in_the_end(tmp_path):
    activations = ("--set", 'space.activation=["silu", "tanh", "elu"]', "--set", "finalists.seeds=6")
    arguments = (
        "run",
        "--name",
        "study",
        *COMPARED,
        *SMALL,
        *RATES,
        *activations,
        "--trials",
        "12",
        "--max-epochs",
        "20",
    )
    for stage in ("[5/12]", "[4/"):
        with driver(*arguments, cwd=tmp_path) as running:
            if stage == "[4/":
                running.wait_for("finalists: ")
            running.wait_for(stage)
            kill_with_family(running)
    told = run("compare", "study", cwd=tmp_path)  # what there is so far
    assert told.returncode == 0, told.stderr
    assert "so far" in told.stdout
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / "study")
    assert_whole(study, trials=12)
    finals = study.final_rows()
    assert {final.state for final in finals} == {"COMPLETE"}
    assert len({final.key for final in finals}) == len(finals) > 0
    assert study.final_images().num_rows == 180 * len(finals)
    assert {final.run for final in finals} == set(range(6))
    for line in (line.strip() for line in done.stdout.splitlines() if line.startswith("  vaesearch ")):
        printed = run(*line.split()[1:], cwd=tmp_path) if '"' not in line else None
        assert printed is None or printed.returncode == 0, (line, printed.stderr)
    assert (study.path / "report.html").is_file()
