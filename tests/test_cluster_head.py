"""A head that is there and lets us in is told from all others in seconds, with what would do."""

import time

import pytest
from ray._private import services

from cluster.head import (
    ClusterUnreachable,
    _is_given_up,
    asks_for_token,
    find_head,
    host_and_port,
    is_loopback,
)


def test_a_head_that_lets_us_in_is_told_from_one_that_refuses_our_token(ray_here, monkeypatch):
    import ray

    address = ray.get_runtime_context().gcs_address
    assert find_head(address) == address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterUnreachable, match=r"refuses the token of RAY_AUTH_TOKEN\nset RAY_AUTH_TOKEN_PATH"):
        find_head(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterUnreachable, match="asks for a token and there is none here"):
        find_head(address)


def test_where_no_head_is_that_is_known_at_once(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=r"127\.0\.0\.1:1.* does not answer: .*\n.*ray start --head"):
        find_head("127.0.0.1:1")
    assert time.monotonic() - started < 60


def test_a_token_is_used_where_the_head_asks_for_one_alone(ray_here):
    import ray

    assert asks_for_token(ray.get_runtime_context().gcs_address)
    assert not asks_for_token("127.0.0.1:1")  # nobody is there


def test_a_machine_that_the_head_does_not_count_among_the_living_is_given_up(ray_here):
    import ray

    context = ray.get_runtime_context()
    assert not _is_given_up(context.gcs_address, context.get_node_id())
    assert _is_given_up(context.gcs_address, "0" * 56)
    assert not _is_given_up("127.0.0.1:1", "0" * 56)  # nobody answers, which is another matter


def test_a_private_ray_is_no_cluster_to_join(monkeypatch):
    with pytest.raises(ClusterUnreachable, match="local is no cluster to join"):
        find_head("local")


def test_the_dashboard_in_the_environment_is_not_taken_for_the_cluster_of_this_machine(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: "127.0.0.1:1")
    with pytest.raises(ClusterUnreachable, match=r"auto \(127.0.0.1:1\) does not answer"):
        find_head("auto")


@pytest.mark.parametrize(
    ("address", "expected"), [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("[fd00::1]:6379", ("fd00::1", 6379))]
)
def test_host_and_port_are_those_that_a_socket_takes(address, expected):
    assert host_and_port(address) == expected


def test_an_address_of_another_kind_is_refused_with_the_command_that_takes_it():
    for address in ("http://127.0.0.1:8265", "ray://127.0.0.1:10001"):
        with pytest.raises(ClusterUnreachable, match=r"HOST:PORT or auto.*\n.*vaesearch submit --address http"):
            find_head(address)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("head", False),
    ],
)
def test_only_this_machine_itself_is_loopback(host, expected):
    assert is_loopback(host) is expected
