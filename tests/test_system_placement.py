"""Trials on nodes and devices: GPUs shared and never oversold, a cluster that grows, several studies side by side."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest
from clusters import clean_environment, ray_head
from test_system import QUICK, assert_whole, driver, run

from search.results import Study, open_study

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for node in sys.argv[1:]:
    cpus, gpus = map(int, node.split(","))
    cluster.add_node(num_cpus=cpus, num_gpus=gpus)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


FAKE_PROVIDER_PORT = 6379  # where the nodes of Ray's provider for tests look for their head
GROWING = {
    "cluster_name": "growing",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "provider": {"type": "fake_multinode"},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    **{key: {} for key in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
    **{f"{key}_commands": [] for key in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{key}_start_ray_commands": [] for key in ("head", "worker")},
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}
"""Of Ray's autoscaler: no node but the head, and up to two workers of one CPU, which are processes here."""


class Nodes:
    """A Ray of several nodes on this machine, without token, on loopback; as long as the block lasts."""

    def __init__(self, *nodes: str) -> None:
        """nodes: "CPUs,GPUs" of each, of which Ray only keeps count; the head has none."""
        variables = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self.environment = clean_environment() | variables
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, *nodes],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = next((line.strip() for line in self._process.stdout if ":" in line), "")
        assert self.address, "the cluster does not start"

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=200)


def assert_never_oversold(study: Study) -> tuple[int, int]:
    """Shares of a device, added up over whoever was on it at one time. Returns the devices, and trials at once."""
    events, devices = [], set()
    for attempt in study.attempts().to_pylist():
        assert len(attempt["gpu_ids"]) == 1, attempt  # exactly one device is seen
        device = f"{attempt['node_id']}:{attempt['gpu_ids'][0]}"
        devices.add(device)
        events += [(attempt["placed_at"], attempt["gpus"], device), (attempt["ended_at"], -attempt["gpus"], device)]
    taken, under_way, most = Counter[str](), 0, 0
    for _, change, device in sorted(events):
        taken[device] += change
        assert taken[device] <= 1, device
        under_way += 1 if change > 0 else -1
        most = max(most, under_way)
    return len(devices), most


def test_gpus_of_two_nodes_are_shared_by_two_trials_each_and_never_oversold(tmp_path):
    """Logical GPUs: Ray keeps count of them, and tells each worker which is his."""
    arguments = ("run", "--name", "shared", "--trials", "10", *QUICK[2:], "--set", "scheduler.kind=none")
    long_enough = ("--max-epochs", "150")  # that the first is under way still when the eighth has its worker
    with Nodes("4,2", "4,2") as nodes:
        at = ("--gpus-per-trial", "0.5", "--address", nodes.address)
        done = run(*arguments, *long_enough, *at, cwd=tmp_path, extra=nodes.environment)
    assert done.returncode == 0, done.stderr
    assert "10 trials of up to 150 epochs, 8 at once" in done.stderr
    study = open_study(tmp_path / "studies" / "shared")
    assert_whole(study, trials=10)
    assert assert_never_oversold(study) == (4, 8)
    assert {attempt["gpus"] for attempt in study.attempts().to_pylist()} == {0.5}


def test_three_studies_at_once_share_a_cluster_and_the_small_ones_do_not_starve(tmp_path):
    big = ("--trials", "400", "--max-epochs", "6", "--set", "model.hidden_dims=[64]", "--set", "scheduler.kind=none")
    with Nodes("2,0") as nodes:
        at = ("--address", nodes.address)
        with driver("run", "--name", "big", *big, *at, cwd=tmp_path, extra=nodes.environment) as first:
            first.wait_for("[4/400]")
            small = [
                driver("run", "--name", name, "--trials", "3", *QUICK, *at, cwd=tmp_path, extra=nodes.environment)
                for name in ("small-one", "small-two")
            ]
            with small[0] as one, small[1] as two:
                assert one.end() == 0, one.stderr
                assert two.end() == 0, two.stderr
            assert not first.is_over, "the big study was over before the small ones had to share with it"
            ended = len([row for row in Study(tmp_path / "studies" / "big").rows() if row.ended_at is not None])
            first.wait_for(f"[{ended + 3}/400]")  # it goes on
            first.process.terminate()
            assert first.end(300) == 143
    for name in ("small-one", "small-two"):
        assert_whole(open_study(tmp_path / "studies" / name), trials=3)
    assert sorted(os.listdir(tmp_path / "studies")) == ["big", "small-one", "small-two"]


def test_a_cluster_without_workers_grows_for_the_trials_that_wait(tmp_path):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", FAKE_PROVIDER_PORT)) == 0:
            pytest.skip(f"something else listens on port {FAKE_PROVIDER_PORT}")
    config = tmp_path / "growing.json"
    config.write_text(json.dumps(GROWING))
    scaling = (f"--autoscaling-config={config}", f"--port={FAKE_PROVIDER_PORT}")
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(num_cpus=0, extra=variables, options=scaling) as head:
        arguments = ("run", "--name", "grown", "--trials", "4", *QUICK, "--address", f"127.0.0.1:{FAKE_PROVIDER_PORT}")
        more = ("--concurrency", "2", "--set", "resources.autoscaling=true")
        done = run(*arguments, *more, cwd=tmp_path, extra=head.environment())
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / "grown")
    assert_whole(study, trials=4)
