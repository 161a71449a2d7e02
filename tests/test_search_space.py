"""The space: what Optuna is offered is what the study file says, and no parameter exists where it means nothing."""

from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search.space import INTEGERS, Space
from search.spec import SpaceSpec
from vae.config import OWN_PARAMETERS

BOUNDS = {  # inside what each parameter may be
    "leaky_relu_slope": (0.01, 0.5),
    "dropout": (0.1, 0.4),
    "learning_rate": (1e-4, 1e-2),
    "latent_dim": (3, 40),
    "hidden_width": (16, 300),
    "hidden_layers": (1, 4),
    "batch_size": (8, 200),
    "beta": (0.1, 4),
    "free_bits": (0.01, 0.5),
    "weight_decay": (1e-6, 1e-2),
    "ema_decay": (0.5, 0.99),
}


def space_of(**entries: Any) -> Space:
    return Space(SpaceSpec.model_validate(entries))


def draws(space: Space, count: int, seed: int = 0) -> list[tuple[optuna.Trial, dict[str, Any]]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trials = [study.ask() for _ in range(count)]
    return [(trial, space.suggest(trial)) for trial in trials]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_slope_exists_under_leaky_relu_and_nowhere_else():
    drawn = [params for _, params in draws(Space(SpaceSpec()), 200)]
    assert {params["activation"] for params in drawn} == set(SpaceSpec().activation)
    for params in drawn:
        assert ("leaky_relu_slope" in params) == (params["activation"] == "leaky_relu")


def test_a_fixed_slope_too_exists_under_leaky_relu_alone():
    drawn = [params for _, params in draws(space_of(activation=["relu", "leaky_relu"], leaky_relu_slope=0.3), 40)]
    assert {(p["activation"], p.get("leaky_relu_slope")) for p in drawn} == {("relu", None), ("leaky_relu", 0.3)}


def test_without_leaky_relu_there_is_no_slope_to_choose():
    space = space_of(activation=["relu", "silu"])
    assert "leaky_relu_slope" not in {*space.distributions, *space.constants}


@pytest.mark.parametrize("name", OWN_PARAMETERS)
def test_parameters_of_activations_exist_where_the_encoder_or_the_decoder_has_such_a_one(name):
    names = [*OWN_PARAMETERS[name], "relu"]
    values = {"avg_pool_window": [3, 5], "apl_hinges": [1, 4]}.get(name, [0.1, 0.3])
    space = space_of(activation=names, decoder_activation=names, **{name: values})
    drawn = [params for _, params in draws(space, 100)]
    assert {params["decoder_activation"] for params in drawn} == set(names)
    for params in drawn:
        applies = not {params["activation"], params["decoder_activation"]}.isdisjoint(OWN_PARAMETERS[name])
        assert (name in params) == applies


def test_options_of_training_are_searched_like_any_other_parameter():
    space = space_of(
        lr_schedule=["constant", "cosine"], normalization=["none", "batch"], precision=["float32", "bfloat16"]
    )
    drawn = [params for _, params in draws(space, 60)]
    assert {params["lr_schedule"] for params in drawn} == {"constant", "cosine"}
    assert {params["normalization"] for params in drawn} == {"none", "batch"}
    assert {params["precision"] for params in drawn} == {"float32", "bfloat16"}


@pytest.mark.parametrize("activation", ["leaky_relu", ["leaky_relu"]])
def test_with_leaky_relu_alone_the_slope_is_in_every_draw(activation):
    space = space_of(activation=activation)
    assert all("leaky_relu_slope" in params for _, params in draws(space, 20))
    assert space.constants["activation"] == "leaky_relu"


@pytest.mark.parametrize("name", BOUNDS)
def test_a_value_fixes_any_parameter(name):
    low, _ = BOUNDS[name]
    space = space_of(activation="leaky_relu", **{name: low})
    assert name not in space.distributions
    for trial, params in draws(space, 5):
        assert params[name] == low
        assert name not in trial.params  # nothing was asked of the sampler


@pytest.mark.parametrize("name", BOUNDS)
def test_a_list_enumerates_any_parameter(name):
    values = list(BOUNDS[name])
    space = space_of(activation="leaky_relu", **{name: values})
    assert space.distributions[name] == CategoricalDistribution(values)
    assert {params[name] for _, params in draws(space, 40)} == set(values)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_list_of_one_is_a_constant(name):
    space = space_of(activation="leaky_relu", **{name: [BOUNDS[name][1]]})
    assert space.constants[name] == BOUNDS[name][1]
    assert name not in space.distributions


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_range_of_any_parameter_is_kept_and_whole_numbers_stay_whole(name, log):
    low, high = BOUNDS[name]
    space = space_of(activation="leaky_relu", **{name: {"low": low, "high": high, "log": log}})
    kind = IntDistribution if name in INTEGERS else FloatDistribution
    assert space.distributions[name] == kind(low, high, log=log)
    drawn = [params[name] for _, params in draws(space, 100)]
    assert all(low <= value <= high for value in drawn)
    assert {type(value) for value in drawn} == {int if name in INTEGERS else float}
    assert len(set(drawn)) > 1


def test_a_range_written_with_floats_is_whole_for_a_whole_parameter():
    space = space_of(latent_dim={"low": 2.0, "high": "64", "log": True})
    assert space.distributions["latent_dim"] == IntDistribution(2, 64, log=True)


def test_a_log_range_of_whole_numbers_gives_each_octave_its_share():
    space = space_of(latent_dim={"low": 2, "high": 64, "log": True})
    drawn = [params["latent_dim"] for _, params in draws(space, 400)]
    assert 0.3 < sum(value <= 11 for value in drawn) / 400 < 0.7  # sqrt(2 * 64) = 11.3; uniformly it were 0.15


FIXED = {
    "activation": "leaky_relu",
    "leaky_relu_slope": 0.2,
    "dropout": [0.1],
    "learning_rate": 1e-3,
    "latent_dim": 8,
    "batch_size": [32],
}


def test_a_fixed_space_draws_its_constants():
    space = space_of(**FIXED)
    assert space.is_fixed
    assert not Space(SpaceSpec()).is_fixed
    wanted = {**FIXED, "dropout": 0.1, "batch_size": 32}
    for trial, params in draws(space, 3):
        assert params == wanted
        assert trial.params == {}
    assert space.start() == {}


def test_a_slope_that_cannot_occur_leaves_a_space_fixed():
    assert space_of(**{**FIXED, "activation": "relu", "leaky_relu_slope": {"low": 0.1, "high": 0.2}}).is_fixed


def test_the_chosen_part_of_a_draw_is_what_optuna_recorded():
    space = space_of(dropout=0.1, hidden_width=[32, 64], batch_size={"low": 8, "high": 64})
    for trial, params in draws(space, 60):
        values, distributions = space.chosen(params)
        assert values == trial.params
        assert distributions == trial.distributions


def test_a_chosen_part_can_be_given_back_to_optuna():
    space = Space(SpaceSpec())
    study = optuna.create_study()
    for number, (_, params) in enumerate(draws(space, 20)):
        values, distributions = space.chosen(params)
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=float(number)))
    assert [trial.params for trial in study.trials] == [space.chosen(p)[0] for _, p in draws(space, 20)]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"activation": ["tanh", "relu"]},
        {"latent_dim": {"low": 20, "high": 30}, "learning_rate": {"low": 1e-5, "high": 1e-4, "log": True}},
        {"latent_dim": {"low": 2, "high": 3}, "dropout": {"low": 0.2, "high": 0.3}, "batch_size": [16, 32]},
        {"activation": ["leaky_relu", "prelu"], "hidden_layers": [1, 2], "dropout": [0.1, 0.3]},
    ],
)
def test_the_start_lies_in_the_space(entries):
    space = space_of(**entries)
    start = space.start()
    assert set(start) <= set(space.distributions)
    for name, value in start.items():
        assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value)), name


def test_the_start_prefers_silu_and_the_defaults_of_the_model():
    start = Space(SpaceSpec()).start()
    assert start["activation"] == "silu"
    assert start["latent_dim"] == 16
    assert "leaky_relu_slope" not in start
    assert space_of(latent_dim={"low": 20, "high": 30}).start()["latent_dim"] == 20


def test_optuna_takes_the_start_for_the_first_trial():
    space = Space(SpaceSpec())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(space.start())
    params = space.suggest(study.ask())
    assert {name: params[name] for name in space.start()} == space.start()


def test_a_list_starts_at_its_value_nearest_to_the_default():
    assert space_of(learning_rate=[1e-5, 2.9e-3, 1.0]).start()["learning_rate"] == 2.9e-3


def test_common_settings_fill_every_parameter_evenly():
    """A scrambled Sobol sequence has one point in each of 2^m equal parts of every axis."""
    space = space_of(batch_size=[16, 32, 64, 128], latent_dim={"low": 1, "high": 8})
    settings = space.settings(16, seed=3)
    assert len(settings) == 16
    assert all(set(setting) == set(space.distributions) - {"activation"} for setting in settings)
    rates = sorted(np.log([setting["learning_rate"] for setting in settings]))
    low, high = np.log([1e-4, 1e-2])
    assert [int((rate - low) / (high - low) * 16) for rate in rates] == list(range(16))
    assert sorted(int(setting["dropout"] / 0.5 * 16) for setting in settings) == list(range(16))
    assert Counter(setting["batch_size"] for setting in settings) == dict.fromkeys([16, 32, 64, 128], 4)
    assert Counter(setting["latent_dim"] for setting in settings) == dict.fromkeys(range(1, 9), 2)


def test_common_settings_depend_on_the_seed_and_fewer_are_the_first_of_more():
    space = Space(SpaceSpec())
    assert space.settings(5, seed=1) == space.settings(8, seed=1)[:5]
    assert space.settings(8, seed=1) != space.settings(8, seed=2)
    assert space.settings(1, seed=1) == space.settings(2, seed=1)[:1]
    for setting in space.settings(64, seed=1):
        for name, value in setting.items():
            assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value)), name


def test_a_space_of_activations_alone_has_one_setting():
    fixed = {"dropout": 0.0, "learning_rate": 1e-3, "latent_dim": 4, "activation": ["relu", "tanh"]}
    assert space_of(**fixed).settings(3, seed=0) == [{}, {}, {}]
