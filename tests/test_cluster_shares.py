"""Several studies on one cluster: none starves, nothing is left idle, and a driver that is gone is forgotten."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import shares
from cluster.shares import Claim, Shares, shared_out


def claims(*many: tuple[int, int]) -> dict[str, Claim]:
    return {f"study-{i}": Claim(slots, wanted) for i, (slots, wanted) in enumerate(many)}


@pytest.mark.parametrize(
    ("many", "given"),
    [
        ([(8, 100)], [8]),
        ([(8, 3)], [3]),
        ([(8, 100), (8, 100)], [4, 4]),
        ([(8, 100), (8, 1)], [7, 1]),  # what one does not need is the other's
        ([(8, 100), (8, 0)], [8, 0]),
        ([(4, 9), (4, 9), (4, 9)], [2, 1, 1]),
        ([(2, 9), (2, 9), (2, 9)], [1, 1, 0]),
        ([(8, 100), (2, 100)], [4, 1]),  # trials of the one are four times as large
        ([(1, 5), (8, 5)], [1, 0]),
    ],
)
def test_the_cluster_is_shared_out_evenly_among_those_who_need_it(many, given):
    assert list(shared_out(claims(*many)).values()) == given


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.builds(Claim, st.integers(1, 9), st.integers(0, 9)), max_size=6))
def test_nobody_gets_more_than_he_can_use_and_all_together_no_more_than_there_is(many):
    given_ = shared_out(many)
    taken = sum(count / many[name].slots for name, count in given_.items())
    assert taken <= 1 + 1e-6
    for name, claim in many.items():
        assert 0 <= given_[name] <= min(claim.wanted, claim.slots)
        is_short = given_[name] < min(claim.wanted, claim.slots)
        assert not (is_short and taken + 1 / claim.slots <= 1 - 1e-6), "a slot stands idle"


def test_a_slot_that_not_all_can_have_goes_round():
    """Three studies, each long enough, on a cluster that holds one trial: by the time that each had."""
    used = Counter({"a": 0.0, "b": 0.0, "c": 0.0})
    for _ in range(30):
        given_ = shared_out({name: Claim(1, 5, used_s) for name, used_s in used.items()})
        (turn,) = [name for name, count in given_.items() if count]
        used[turn] += 2.0
    assert set(used.values()) == {20.0}


def test_drivers_hear_of_each_other_on_a_real_cluster_and_forget_who_is_gone(ray_here, monkeypatch):
    monkeypatch.setattr(shares, "BEAT_S", 0.0)
    big, small = Shares("big", 4, 4), Shares("small", 4, 4)
    assert big.slots_for(100, 0) == 4
    assert small.slots_for(1, 0) == 1
    assert big.slots_for(100, 4) == 3
    assert small.slots_for(100, 1) == 2
    assert big.slots_for(100, 3) == 2
    small.leave()
    assert big.slots_for(100, 2) == 4
    killed = Shares("killed", 4, 4)
    assert killed.slots_for(100, 0) == 2
    assert big.slots_for(100, 4) == 2
    monkeypatch.setattr(shares, "GONE_AFTER_S", 0.2)
    deadline = time.monotonic() + 60
    while big.slots_for(100, 2) != 4:  # its entry stands still
        assert time.monotonic() < deadline
        time.sleep(0.05)
    big.leave()
    killed.leave()


def test_who_comes_late_does_not_catch_up_on_what_he_missed(ray_here, monkeypatch):
    monkeypatch.setattr(shares, "BEAT_S", 0.0)
    first = Shares("first", 1, 1)
    first.slots_for(9, 0)
    time.sleep(0.3)
    first.slots_for(9, 1)
    late = Shares("late", 1, 1)
    late.slots_for(9, 0)
    time.sleep(0.05)
    assert late._claim.used_s >= 0.25
    first.leave()
    late.leave()


def test_a_study_with_a_limit_of_its_own_leaves_the_rest_to_the_others(ray_here, monkeypatch):
    monkeypatch.setattr(shares, "BEAT_S", 0.0)
    limited, free = Shares("limited", 16, 4), Shares("free", 16, 16)
    assert limited.slots_for(100, 0) == 4
    assert free.slots_for(100, 0) == 12
    assert limited.slots_for(100, 4) == 4
    limited.leave()
    free.leave()
