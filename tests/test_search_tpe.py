"""TPE of a long study: the same as Optuna's own up to a limit, and beyond it from a part that stands for the whole."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import FrozenTrial, TrialState, create_trial
from test_search_sampler import Desk, make_spec, play

from search import tpe
from search.arm import CONSTRAINTS, Arm
from search.tpe import GOOD, BoundedTPESampler, Past, rank_of

OPTIONS: dict[str, Any] = {"n_startup_trials": 4, "multivariate": True, "group": True, "constant_liar": True}


def make_sampler(past: Past | None, seed: int) -> optuna.samplers.TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if past is None:
            return optuna.samplers.TPESampler(**OPTIONS, seed=seed)
        return BoundedTPESampler(past, **OPTIONS, seed=seed)


def study_of(ended: int, running: int = 0, seed: int = 0) -> Arm:
    """Trials that came to every kind of end, with ties among them, and some that run among the older ones."""
    arm, rng = Arm(make_spec(), 0, [], {}), random.Random(seed)
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    at_work = set(rng.sample(range(ended + running), running))
    for number in range(ended + running):
        params, distributions = arm.space.chosen(arm.space.suggest(draws.ask()))
        curve = {epoch: round(rng.uniform(22, 25), 1) for epoch in range(1, rng.choice((1, 3, 6, 7)))}
        end = TrialState.COMPLETE if len(curve) == 6 else TrialState.PRUNED
        broken = rng.choice(CONSTRAINTS) if rng.random() < 0.2 else None
        is_running = number in at_work
        arm.study.add_trial(
            create_trial(
                state=TrialState.RUNNING if is_running else end,
                value=curve[6] if end == TrialState.COMPLETE and not is_running else None,
                params=params,
                distributions=distributions,
                intermediate_values=curve,
                constraints={} if is_running else {name: float(name == broken) for name in CONSTRAINTS},
            )
        )
    return arm


def suggested(arm: Arm, past: Past | None, seed: int) -> dict[str, Any]:
    arm.study.sampler = make_sampler(past, seed)
    trial = arm.study.ask()
    params = arm.space.suggest(trial)
    arm.study.tell(trial, state=TrialState.FAIL)  # as if nobody had asked
    return params


def numbers(trials: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


@pytest.mark.parametrize("ended", [0, 3, 4, 30, 60])
def test_up_to_the_limit_suggestions_are_those_of_optunas_own_bit_for_bit(ended, monkeypatch):
    monkeypatch.setattr(tpe, "LIMIT", 60)
    arm, past = study_of(ended, running=3), Past()
    for seed in range(8):
        assert suggested(arm, past, seed) == suggested(arm, None, seed)


def test_a_whole_search_up_to_the_limit_is_that_of_optunas_own(tmp_path, monkeypatch):
    def searched(path: Path) -> list[dict[str, Any]]:
        desk = Desk(path, make_spec(budget={"trials": 40, "max_consecutive_failures": 40}))
        play(desk, random.Random(0), trials=30)
        return [trial.params for trial in desk.searcher.arms[0].study.get_trials()]

    bounded = searched(tmp_path / "bounded")
    monkeypatch.setattr("search.arm.BoundedTPESampler", lambda past, **given: optuna.samplers.TPESampler(**given))
    assert searched(tmp_path / "whole") == bounded


def test_the_order_of_ended_trials_is_tpes():
    arm = study_of(80)
    trials = arm.study.get_trials(deepcopy=False)
    in_order = sorted(trials, key=lambda trial: (rank_of(trial), trial.number))
    for count in range(1, len(trials)):
        good, _ = _split_trials(arm.study, trials, count)
        assert sorted(numbers(in_order[:count])) == numbers(good)


def test_optuna_takes_no_more_trials_for_good_than_we_keep():
    assert {default_gamma(count) for count in range(250, 10_000)} == {GOOD}


def test_beyond_the_limit_tpe_is_shown_all_that_is_good_all_that_runs_and_some_of_every_age(monkeypatch):
    monkeypatch.setattr(tpe, "LIMIT", 300)
    arm = study_of(900, running=5)
    trials = arm.study.get_trials(deepcopy=False)
    shown = Past().part_of(trials)
    assert len(shown) == 300 + 5
    assert numbers(shown) == sorted(numbers(shown))
    assert {trial.number for trial in trials if trial.state == TrialState.RUNNING} <= set(numbers(shown))
    good, others = _split_trials(arm.study, shown, GOOD)
    assert numbers(good) == numbers(_split_trials(arm.study, trials, GOOD)[0])
    assert [len([n for n in numbers(others) if third * 300 <= n < (third + 1) * 300]) for third in range(3)] == (
        pytest.approx([92, 92, 92], abs=6)
    )
    assert max(numbers(shown)) == max(trial.number for trial in trials if trial.state != TrialState.FAIL)


def test_beyond_the_limit_a_suggestion_depends_on_the_history_alone(monkeypatch):
    monkeypatch.setattr(tpe, "LIMIT", 50)
    arm, kept_up = study_of(120, running=4), Past()
    trials = arm.study.get_trials(deepcopy=False)
    for count in (10, 60, 90):
        kept_up.part_of([copy.copy(trial) for trial in trials[:count]])
    for number in random.Random(0).sample(range(90, 110), 20):  # not in the order in which they began
        begun = [copy.copy(trial) for trial in trials[:110]]
        for trial in begun[90:]:
            trial.state = trial.state if trial.number == number else TrialState.RUNNING
        kept_up.part_of(begun)
    for seed in range(4):
        assert suggested(arm, kept_up, seed) == suggested(arm, Past(), seed)
    assert suggested(arm, kept_up, 0) != suggested(arm, kept_up, 1)


def test_a_long_study_rebuilt_from_the_ledger_suggests_the_same_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tpe, "LIMIT", 8)
    desk = Desk(tmp_path / "live", make_spec(budget={"trials": 40, "max_consecutive_failures": 40}))
    play(desk, random.Random(3), trials=24)
    again = desk.reborn(tmp_path / "again")
    for trial in again.searcher.arms[0].study.get_trials():
        if trial.state == TrialState.WAITING:  # what was under way comes first
            assert again.ask()[1]["trial"] == trial.number
    for _ in range(3):
        assert desk.ask()[1] == again.ask()[1]


def test_a_parameter_that_few_trials_have_is_modelled_with_the_others_beyond_the_limit_too(monkeypatch):
    monkeypatch.setattr(tpe, "LIMIT", 30)
    arm = study_of(150)
    trials = arm.study.get_trials(deepcopy=False)
    first = next(trial.number for trial in trials if "leaky_relu_slope" in trial.params)
    for trial in trials:
        if trial.number != first and "leaky_relu_slope" in trial.params:
            trial.state = TrialState.FAIL
    space = make_sampler(Past(), 0).infer_relative_search_space(arm.study, trials[-1])
    assert "leaky_relu_slope" in space
    assert space.keys() == arm.space.distributions.keys()
