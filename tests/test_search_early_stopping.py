"""ASHA: the same verdicts as Ray's scheduler, except where Ray's would let a NaN train on."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers.async_hyperband import _Bracket

from search.early_stopping import Asha, EarlyStopping
from search.spec import StudySpec

MAX_EPOCHS = 30
NOT_FINITE = [math.nan, math.inf, -math.inf]
FACTORS = st.sampled_from([2, 3, 4, 5, 1.5, 2.5])
VALUES = st.floats(-1e4, 1e4) | st.integers(-4, 4).map(float)
STREAMS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, MAX_EPOCHS + 5), VALUES), max_size=60)


def bracket_of(factor: float) -> tuple[_Bracket, list[int]]:
    """Ray's own bookkeeping and the rungs it made, ascending."""
    bracket = _Bracket(1, MAX_EPOCHS, factor, 0, stop_last_trials=False)
    return bracket, sorted(rung for rung, _ in bracket._rungs)


@settings(deadline=None, max_examples=300)
@given(factor=FACTORS, stream=STREAMS)
def test_every_verdict_is_that_of_rays_asynchronous_hyperband(factor, stream):
    """Ray maximises, so it is given the negated value. An exact tie may differ by the rounding of the percentile."""
    bracket, rungs = bracket_of(factor)
    asha = Asha(rungs, factor)
    stopped: dict[int, int] = {}
    for trial, epoch, value in stream:
        if trial in stopped:  # Ray's forgets whom it stopped
            assert asha.may_go_on(trial, epoch, value) == (epoch < stopped[trial])
            continue
        cutoffs = [bracket.cutoff(recorded) for rung, recorded in bracket._rungs if epoch >= rung]
        ray_goes_on = bracket.on_result(SimpleNamespace(trial_id=trial), epoch, -value) == "CONTINUE"
        goes_on = asha.may_go_on(trial, epoch, value)
        if not goes_on:
            stopped[trial] = max(rung for rung in rungs if rung <= epoch)
        if goes_on != ray_goes_on:
            assert -value == pytest.approx(cutoffs[0], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(factor=FACTORS, stream=STREAMS, bad=st.lists(st.sampled_from(NOT_FINITE), min_size=1, max_size=20))
def test_a_value_that_is_not_finite_never_goes_on_and_moves_no_ones_cutoff(factor, stream, bad):
    _, rungs = bracket_of(factor)
    clean, mixed = Asha(rungs, factor), Asha(rungs, factor)
    for index, (trial, epoch, value) in enumerate(stream):
        assert not mixed.may_go_on(100 + index, epoch, bad[index % len(bad)])
        assert mixed.may_go_on(trial, epoch, value) == clean.may_go_on(trial, epoch, value)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_value_that_is_not_finite_stops_a_trial_also_between_rungs(value):
    asha = Asha([3, 9], 3)
    assert asha.may_go_on(0, 3, 1.0)
    assert not asha.may_go_on(0, 4, value)


@pytest.mark.parametrize("value", [0.0, 1e300, -1e300])
def test_the_first_at_a_rung_goes_on(value):
    asha = Asha([1, 3, 9], 3)
    assert all(asha.may_go_on(trial, rung, value) for trial, rung in enumerate([1, 3, 9]))


def test_before_the_first_rung_every_trial_goes_on_and_none_is_recorded():
    asha = Asha([5], 2)
    assert all(asha.may_go_on(trial, 4, float(trial)) for trial in range(9))
    assert asha.may_go_on(100, 5, 1e9)


def test_without_rungs_every_trial_goes_on():
    assert all(Asha([], 3).may_go_on(trial, 100, float(trial)) for trial in range(5))


@settings(deadline=None, max_examples=100)
@given(factor=FACTORS, stream=STREAMS)
def test_asked_twice_at_one_rung_nothing_changes(factor, stream):
    _, rungs = bracket_of(factor)
    once, twice = Asha(rungs, factor), Asha(rungs, factor)
    for trial, epoch, value in stream:
        assert once.may_go_on(trial, epoch, value) == twice.may_go_on(trial, epoch, value)
        twice.may_go_on(trial, epoch, value - 1e6)


def test_lower_is_better_and_one_in_the_factor_goes_on():
    asha = Asha([1], 4)
    for trial, value in enumerate([10.0, 20.0, 30.0, 40.0]):
        asha.may_go_on(trial, 1, value)
    assert asha.may_go_on(8, 1, 17.0)  # the first quartile of 10, 20, 30, 40 is 17.5
    assert not asha.may_go_on(9, 1, 25.0)


def test_a_verdict_stands_also_where_it_was_not_carried_out():
    """A driver may be killed between the values of a rung and the row that says that the trial was stopped."""
    asha = Asha([2, 4], 2)
    assert asha.may_go_on(0, 2, 1.0)
    assert not asha.may_go_on(1, 2, 5.0)
    assert not asha.may_go_on(1, 2, 5.0)
    assert not asha.may_go_on(1, 3, 0.0)


def test_a_stopped_trial_that_begins_anew_is_stopped_where_it_was_and_not_before():
    """Its states may be gone by the time a driver is killed: epoch 4 is on record, and so must be all up to it."""
    asha = Asha([2, 4], 2)
    assert asha.may_go_on(0, 2, 1.0)
    assert asha.may_go_on(0, 4, 1.0)
    assert asha.may_go_on(1, 2, 0.5)
    assert not asha.may_go_on(1, 4, 2.0)
    assert asha.may_go_on(1, 1, 3.0)
    assert asha.may_go_on(1, 2, 0.5)
    assert asha.may_go_on(1, 3, 3.0)
    assert not asha.may_go_on(1, 4, 2.0)
    assert not asha.may_go_on(1, 5, 0.1)


def test_who_is_not_judged_goes_on_and_judges_others():
    asha = Asha([2], 2)
    assert asha.may_go_on(0, 2, 1.0, is_judged=False)
    assert asha.may_go_on(1, 2, 5.0, is_judged=False)
    assert asha.may_go_on(1, 3, 9.0, is_judged=False)
    assert not asha.may_go_on(2, 2, 4.0)


def comparison_of(*activations: str) -> StudySpec:
    values = {"goal": "compare-activations", "space": {"activation": list(activations)}}
    values |= {"comparison": {"settings": 1}, "budget": {"trials": 4 * len(activations), "max_epochs": 20}}
    return StudySpec.model_validate(values)


def test_an_activation_is_judged_by_its_own_kind_alone():
    spec = comparison_of("relu", "sigmoid")
    stopping, rung = EarlyStopping(spec), spec.rungs()[0]
    assert stopping.may_go_on(0, rung, 20.0)
    assert stopping.may_go_on(1, rung, 30.0)
    assert stopping.may_go_on(3, rung, 29.0)  # sigmoid: far behind every relu
    assert not stopping.may_go_on(2, rung, 21.0)  # relu: far ahead of every sigmoid


def test_trials_at_the_common_settings_are_never_stopped():
    spec = comparison_of("relu", "sigmoid")
    stopping, rung = EarlyStopping(spec), spec.rungs()[0]
    assert stopping.may_go_on(2, rung, 20.0)
    assert stopping.may_go_on(0, rung, 50.0)
    assert stopping.may_go_on(0, spec.rungs()[1], 50.0)


def test_without_asha_nobody_is_stopped():
    spec = StudySpec.model_validate({"scheduler": {"kind": "none"}})
    stopping = EarlyStopping(spec)
    assert all(stopping.may_go_on(trial, spec.rungs()[0], float(trial)) for trial in range(5))
