"""What fits on a cluster: as many trials as Ray can place, never more, and a word on what would do if none fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.resources import PlacementError, fitting_trials
from cluster.runtime import Runtime


def fits(
    cpus: float, gpus: float, cpus_per_trial: int = 1, gpus_per_trial: float = 0, wanted: int | None = None
) -> int:
    return fitting_trials(
        Runtime("local", cpus, gpus), cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, wanted=wanted
    )


def refused(address: str, **asked: float) -> str:
    with pytest.raises(PlacementError) as caught:
        fitting_trials(
            Runtime(address, 4.0, asked.pop("gpus", 0)),
            cpus_per_trial=int(asked.get("cpus_per_trial", 1)),
            gpus_per_trial=asked.get("gpus_per_trial", 0),
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("cpus", "gpus", "cpus_per_trial", "gpus_per_trial", "count"),
    [
        (8, 0, 1, 0, 8),
        (8, 0, 3, 0, 2),
        (8, 4, 1, 1, 4),
        (3, 4, 1, 1, 3),  # cores are the shorter
        (8, 4, 1, 2, 2),
        (8, 3, 1, 2, 1),
        (8, 1, 1, 0.25, 4),
        (99, 2, 1, 0.1, 20),
        (99, 2, 1, 0.4, 4),  # twice on each, not five times in all
        (99, 3, 1, 0.6, 3),
        (99, 2, 1, 1 / 3, 6),
        (2.5, 0, 1, 0, 2),
    ],
)
def test_as_many_trials_as_fit(cpus, gpus, cpus_per_trial, gpus_per_trial, count):
    assert fits(cpus, gpus, cpus_per_trial, gpus_per_trial) == count


@given(
    cpus=st.integers(1, 64),
    gpus=st.integers(1, 8),
    cpus_per_trial=st.integers(1, 8),
    percent=st.integers(1, 100) | st.sampled_from([100, 200, 300, 400]),
)
def test_the_count_is_that_of_placing_one_trial_after_the_other(cpus, gpus, cpus_per_trial, percent):
    """The oracle fills devices in whole percents; a share stays on one device, whole devices are taken whole."""
    free, cores, placed = [100] * gpus, cpus, 0
    while cores >= cpus_per_trial:
        if percent <= 100:
            device = next((i for i, left in enumerate(free) if left >= percent), None)
            taken = [] if device is None else [device]
        else:
            taken = [i for i, left in enumerate(free) if left == 100][: percent // 100]
        if len(taken) < max(1, percent // 100):
            break
        for i in taken:
            free[i] -= min(percent, 100)
        cores -= cpus_per_trial
        placed += 1
    if placed == 0:
        with pytest.raises(PlacementError):
            fits(cpus, gpus, cpus_per_trial, percent / 100)
    else:
        assert fits(cpus, gpus, cpus_per_trial, percent / 100) == placed


@pytest.mark.parametrize(("wanted", "count"), [(1, 1), (5, 5), (8, 8), (100, 8)])
def test_no_more_than_wanted_and_no_more_than_fit(wanted, count):
    assert fits(8, 0, wanted=wanted) == count


def test_too_many_cores_are_refused_with_the_number_that_would_do():
    message = refused("local", cpus_per_trial=5)
    assert "this machine" in message
    assert "5 CPUs" in message
    assert "resources.cpus_per_trial = 4" in message


def test_a_gpu_where_there_is_none_is_refused_with_0_as_the_remedy():
    message = refused("10.0.0.5:6379", gpus_per_trial=0.5)
    assert "the cluster at 10.0.0.5:6379" in message
    assert "none" in message
    assert "resources.gpus_per_trial = 0" in message


def test_more_gpus_than_there_are_are_refused_with_their_number():
    message = refused("local", gpus_per_trial=4, gpus=2)
    assert "4 GPU" in message
    assert "resources.gpus_per_trial = 2" in message
