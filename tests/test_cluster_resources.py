"""What fits on a cluster: as many trials as Ray can place, never more, and a word on what would do if none fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.resources import HEADROOM, Packing, PlacementError, fitting_trials, packing
from cluster.runtime import Node, Runtime


def runtime(*nodes: tuple[float, float], address: str = "local") -> Runtime:
    """With a node for each pair of CPUs and GPUs."""
    return Runtime(address, tuple(Node(f"{i}", f"host-{i}", "10.0.0.1", *node) for i, node in enumerate(nodes)))


def fits(
    cpus: float, gpus: float, cpus_per_trial: int = 1, gpus_per_trial: float = 0, wanted: int | None = None
) -> int:
    return fitting_trials(
        runtime((cpus, gpus)), cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, wanted=wanted
    )


def refused(address: str, **asked: float) -> str:
    with pytest.raises(PlacementError) as caught:
        fitting_trials(
            runtime((4.0, asked.pop("gpus", 0)), address=address),
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


@settings(deadline=None)
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


def test_a_trial_fits_on_one_node_or_not_at_all():
    three = runtime((0, 0), (3, 0), (5, 2))
    assert fitting_trials(three, cpus_per_trial=2, gpus_per_trial=0) == 3
    assert fitting_trials(three, cpus_per_trial=1, gpus_per_trial=0.5) == 4
    assert fitting_trials(three, cpus_per_trial=2, gpus_per_trial=1) == 2
    with pytest.raises(PlacementError, match="6 CPUs and this machine has 5 on one node"):
        fitting_trials(three, cpus_per_trial=6, gpus_per_trial=0)  # of 8 in all
    apart = runtime((8, 0), (1, 4))
    with pytest.raises(PlacementError, match="no node of this machine has both"):
        fitting_trials(apart, cpus_per_trial=2, gpus_per_trial=1)


def test_a_cluster_that_grows_is_asked_for_all_that_is_wanted():
    asked = {"cpus_per_trial": 2, "gpus_per_trial": 1, "wanted": 30, "is_growing": True}
    assert fitting_trials(runtime((0, 0), address="10.0.0.5:6379"), **asked) == 30
    with pytest.raises(PlacementError):  # a Ray of this machine alone does not grow
        fitting_trials(runtime((2, 0)), **asked)


@pytest.mark.parametrize(
    ("peak_gib", "cpus_per_gpu", "cpus_per_trial", "trials"),
    [
        (1.0, 64, 1, 16),  # no more than that, whatever the memory
        (4.0, 64, 1, 16),
        (10.0, 64, 1, 6),  # 80 / 12
        (10.0, 4, 1, 4),  # no more than the cores feed
        (10.0, 4, 2, 2),
        (10.0, 1, 2, 1),
        (70.0, 64, 1, 1),  # with head-room it is more than there is
    ],
)
def test_as_many_share_a_gpu_as_memory_and_cores_allow(peak_gib, cpus_per_gpu, cpus_per_trial, trials):
    found = packing(int(peak_gib * 2**30), 80 * 2**30, cpus_per_gpu, cpus_per_trial)
    assert found.trials == trials
    assert trials == 1 or trials * HEADROOM * peak_gib <= 80


@settings(deadline=None)
@given(st.integers(1, 64))
def test_the_shares_of_a_packing_fit_on_a_device_and_one_more_would_not(trials):
    share = Packing(trials).share
    assert trials * round(share * 1e4) <= 1e4 < (trials + 1) * round(share * 1e4)
    assert fits(1000, 1, gpus_per_trial=share) == trials


def test_a_packing_that_was_too_dense_is_halved_down_to_a_whole_gpu():
    dense = Packing(6)
    sizes = [dense.trials]
    while dense.trials > 1:
        dense = dense.with_fewer()
        sizes.append(dense.trials)
    assert sizes == [6, 3, 1]
    assert dense.with_fewer() == Packing(1)
    assert dense.share == 1.0
