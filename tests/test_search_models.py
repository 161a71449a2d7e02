"""Searches over every kind of model and data, end to end: what the ledger says of them, and what people are handed."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from rich.console import Console
from test_search_study import assert_epochs_fit_states
from typer.testing import CliRunner

import vae
from search.arm import Arm
from search.cli import app
from search.leaderboard import ADVERSARIAL, print_study, studies_table
from search.results import Study, open_study
from search.space import Space
from search.spec import StudySpec
from search.sql import query
from search.study import run_study
from vae.config import InputError

pytestmark = pytest.mark.usefixtures("ray_here")

SMALL = {
    "budget.trials": 2,
    "budget.max_epochs": 4,
    "model.hidden_dims": [16],
    "space.learning_rate": 3e-3,
    "space.latent_dim": 3,
    "scheduler.kind": "none",
    "export.top": 2,
    "resources.concurrency": 1,
}


def searched(tmp_path: Path, said: list[str] | None = None, **keys: Any) -> Study:
    """A small study with these keys, `__` for the dots, run to its end and checked for what holds of any."""
    overrides = SMALL | {"storage.path": str(tmp_path / "studies")}
    overrides |= {key.replace("__", "."): value for key, value in keys.items()}
    study = run_study(StudySpec.load(overrides=overrides), say=[].append if said is None else said.append)
    assert study.summary().is_complete
    assert_epochs_fit_states(study)
    assert {row.status for row in study.rows()} <= {"ok", "collapsed"}, [row.reason for row in study.rows()]
    ends = {(row.trial, row.epochs) for row in study.rows()}
    probed = {(row["trial"], row["epoch"]) for row in study.diagnostics().to_pylist()}
    assert probed >= ends | {(row.trial, 0) for row in study.rows()}
    return study


def table_of(file: Path) -> tuple[list[str], np.ndarray]:
    with file.open(newline="") as stream:
        names, *lines = csv.reader(stream)
    return names, np.array(lines, dtype=float)


def evaluated(study: Study, **more: Any) -> dict[str, Any]:
    """What `vaesearch evaluate` says of the best model."""
    arguments = [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    folder = str(study.model_folders()[0])
    done = CliRunner().invoke(app, ["evaluate", folder, "--importance-samples", "200", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_table_of_measurements_is_searched_in_standard_scores_and_comes_back_in_its_units(tmp_path):
    source = sklearn.datasets.load_breast_cancer()
    columns = [name.replace(" ", "_") for name in source.feature_names[:8]]
    file = tmp_path / "cells.csv"
    np.savetxt(file, source.data[:, :8], delimiter=",", header=",".join(columns), comments="")
    study = searched(
        tmp_path,
        data__source=str(file),
        model__likelihood="gaussian",
        space__activation=["mixture", "apl"],
        space__apl_hinges=[1, 3],
        budget__trials=4,
        budget__max_epochs=20,
    )
    rows = study.rows()
    assert {row.activation for row in rows} == {"mixture", "apl"}
    assert all((row.apl_hinges is None) == (row.activation == "mixture") for row in rows)
    best = study.summary().best
    assert best is not None
    assert best.no_latent_nelbo is not None
    assert best.val_nelbo < best.no_latent_nelbo - 0.5

    for layer in study.layers().to_pylist():  # the learned mixture tells what it came to
        is_mixture = rows[layer["trial"]].activation == "mixture"
        assert (layer["mixture"] is not None) == is_mixture
        assert not is_mixture or sum(layer["mixture"]) == pytest.approx(1, abs=1e-5)
    sizes = {row.activation: row.num_parameters for row in rows if row.apl_hinges in (None, 3)}
    assert sizes["apl"] - sizes["mixture"] == 2 * (2 * 3 * 16 - 3)  # learned activations are not praised for size

    folder = Path(str(study.model_folders()[0]))
    names, samples = table_of(folder / "samples.csv")
    assert names == columns
    own = source.data[:, :8]
    assert (abs(samples.mean(axis=0) - own.mean(axis=0)) < 2 * own.std(axis=0)).all()
    assert (samples.std(axis=0) > own.std(axis=0) / 10).all()
    units = vae.read_units(folder)
    assert abs((units.restore(units.scale(own)) - own) / own.std(axis=0)).max() < 1e-5
    worth = evaluated(study, split="validation")
    assert worth["nelbo"] == pytest.approx(best.val_nelbo, abs=5 * worth["nll_se"])
    assert worth["nll"] <= worth["nelbo"]


def test_a_table_of_counts_is_searched_with_size_factors_and_its_samples_are_counts(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.gamma(1.0, 5.0, (2, 10))
    rates = kinds[rng.integers(0, 2, 300)] * rng.lognormal(0, 0.5, (300, 1))
    counts = rng.poisson(rates * rng.gamma(5.0, 0.2, rates.shape))
    np.save(tmp_path / "counts.npy", counts)
    said: list[str] = []
    study = searched(
        tmp_path,
        said,
        data__source=str(tmp_path / "counts.npy"),
        model__likelihood="negative_binomial",
        space__activation=["silu", "relu"],
        space__dropout=0.0,
        train__batch_size=16,
        budget__max_epochs=30,
    )
    assert not any("warning" in text for text in said)
    best = study.summary().best
    assert best is not None
    assert best.val_nelbo < best.no_latent_nelbo
    _, samples = table_of(Path(str(study.model_folders()[0])) / "samples.csv")
    assert (samples >= 0).all()
    assert (samples == samples.round()).all()
    assert math.isfinite(evaluated(study)["nll"])
    np.save(tmp_path / "halves.npy", counts + 0.5)
    with pytest.raises(InputError, match="gaussian"):
        searched(tmp_path, data__source=str(tmp_path / "halves.npy"), model__likelihood="poisson")


def test_convolutions_and_options_of_training_are_searched_and_their_effects_are_in_the_ledger(tmp_path):
    said: list[str] = []
    study = searched(
        tmp_path,
        said,
        data__binarize="none",
        model__body="conv",
        model__channels=[8, 16],
        model__attention="squeeze_excitation",
        model__activation_scope="separate",
        space__activation=["silu", "leaky_relu"],
        space__lr_schedule=["constant", "warmup_cosine"],
        space__normalization=["batch", "group"],
        space__precision="bfloat16",
        space__ema_decay=[0.9, 0.99],
        space__learning_rate=0.01,
        space__dropout=0.0,
        train__kl_schedule="cyclical",
        train__batch_size=32,
        budget__trials=4,
        budget__max_epochs=8,
    )
    (warning,) = [text for text in said if text.startswith("warning: ")]
    assert "continuous_bernoulli" in warning  # grey values have no likelihood under bernoulli
    rows = study.rows()
    assert {row.decoder_activation for row in rows} <= {"silu", "leaky_relu"}
    assert {row.lr_schedule for row in rows} == {"constant", "warmup_cosine"}
    for row in rows:
        assert (row.leaky_relu_slope is None) == ("leaky_relu" not in (row.activation, row.decoder_activation))
        assert row.precision == "bfloat16"
    for probe in study.diagnostics().to_pylist():
        assert probe["precision_effect"] is not None
        assert math.isfinite(probe["generalization_gap"])
    nets = query("SELECT net, count(DISTINCT layer) AS n FROM layers GROUP BY 1 ORDER BY 1", tmp_path / "studies")
    assert nets.to_pylist() == [{"net": "decoder", "n": 3}, {"net": "encoder", "n": 3}]
    space = Space(study.spec.space)
    replayed = Arm(study.spec, 0, rows, {}).study
    assert [trial.params for trial in replayed.trials] == [space.chosen(row.params)[0] for row in rows]
    exported = vae.load(Path(str(study.model_folders()[0]))).vae.config
    leader = study.summary().best
    assert leader is not None
    assert exported.activations == (leader.activation, leader.decoder_activation)


def test_convolutions_over_a_table_are_refused_before_anything_is_written(tmp_path):
    np.save(tmp_path / "flat.npy", np.random.default_rng(0).random((60, 6)))
    with pytest.raises(InputError, match="image_shape"):
        searched(tmp_path, data__source=str(tmp_path / "flat.npy"), model__body="conv")
    assert not (tmp_path / "studies").exists()


def test_adversarial_training_is_chosen_by_reconstructions_and_kept_out_of_rankings_by_nats(tmp_path):
    study = searched(tmp_path, train__objective="vae_gan", space__activation=["silu", "tanh"], budget__trials=3)
    rows = study.rows()
    assert {row.train_objective for row in rows} == {"vae_gan"}
    leaders = study.summary().leaders
    assert [row.objective for row in leaders] == sorted(row.objective for row in leaders)
    assert all(row.objective != row.val_nelbo for row in leaders)
    last = {row["trial"]: row["objective"] for row in study.epochs().sort_by("epoch").to_pylist()}
    assert {row.trial: row.objective for row in rows} == last
    console = Console(width=200, record=True)
    print_study(console, study)
    console.print(studies_table([study]))
    shown = console.export_text()
    assert ADVERSARIAL[:40] in shown
    assert not any(line.startswith("best: ") for line in shown.splitlines())
    assert open_study(study.path).model_folders()


def test_batches_of_one_row_under_batch_normalisation_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="at least 2 rows"):
        searched(tmp_path, space__batch_size=[1, 32], model__normalization="batch")
    assert not (tmp_path / "studies").exists()
