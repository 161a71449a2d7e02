"""A cluster of hosts that share nothing but a network: one loses its power, one its cable, one was the head."""

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from clusters import clean_environment
from hosts import HOME, Host, Network, network, unavailable
from test_system import assert_whole, epochs_of

from search.results import Study

T = TypeVar("T")

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

TRIALS = 3
MIDDLE, LATE = 10, 40  # epochs of a trial, with a state stored before
LONG = (
    *("--trials", str(TRIALS), "--max-epochs", "100", "--set", "model.hidden_dims=[256, 256]"),
    *("--set", "train.kl_warmup_epochs=0", "--set", "scheduler.kind=none", "--set", "scheduler.grace_epochs=2"),
)
"""Trials of several seconds, which all go to their ends."""

QUICK_TO_NOTICE = {
    # Read by the head: a host that is silent is given up after some 12 s; with Ray's own values (2.60) it takes 65.
    # Shorter still, and hosts that wait for one of few cores are given up, too.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    # Read by all: who waits for an answer of a host that fell silent for a while would wait for seven minutes. They
    # must be the same everywhere: a server with Ray's own values hangs up on a client that asks this often.
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
NOTICED_WITHIN_S = 30.0
URL = "http://127.0.0.1:8265"


class Cluster:
    """A head without CPUs and two workers with one each, behind a token that each host has in its home."""

    def __init__(self, net: Network) -> None:
        self.net, self._token = net, secrets.token_hex(32)
        self.environment = clean_environment() | QUICK_TO_NOTICE
        self.environment |= {"HOME": HOME, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment |= {"RAY_raylet_start_wait_time_s": "120"}  # two cores are few for three hosts
        self.head = self.host("head")
        self.workers = [self.host("worker1"), self.host("worker2")]
        self.start()

    def host(self, name: str) -> Host:
        made = self.net.host(name)
        token = made.disk / ".ray" / "auth_token"
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(self._token)
        return made

    def start(self) -> None:
        self._ray(self.head, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, self.workers))

    def worker_named(self, name: str) -> Host:
        (worker,) = (worker for worker in self.workers if worker.name == name)
        return worker

    def join(self, host: Host, num_cpus: int = 1) -> None:
        self._ray(host, f"--address={self.head.address}:6379", f"--num-cpus={num_cpus}")

    def run(self, host: Host, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """`vaesearch` on a host, to its end."""
        return host.run("vaesearch", *arguments, env=self.environment, timeout=timeout)

    @contextlib.contextmanager
    def without_power(self, worker: Host) -> Iterator[None]:
        """For the length of a block; then it joins again."""
        worker.power_off()
        try:
            yield
        finally:
            worker.power_on()
            self.join(worker)

    @contextlib.contextmanager
    def without_cable(self, worker: Host) -> Iterator[None]:
        """For the length of a block; then it joins anew, as the cluster has given up what it was."""
        self.net.pull_the_cable(worker)
        try:
            yield
        finally:
            self.net.plug_in(worker)
            with self.without_power(worker):
                pass

    def submit(self, name: str, *more: str) -> None:
        done = self.run(self.head, "submit", "--address", URL, "--name", name, *LONG, *more)
        assert done.returncode == 0, done.stderr

    def logs(self, name: str) -> str:
        return self.run(self.head, "logs", name, "--address", URL).stdout

    def wait_for_end(self, name: str) -> None:
        """Of a submitted study, which is to end well."""
        done = self.run(self.head, "logs", "-f", name, "--address", URL)
        assert done.returncode == 0, done.stdout + done.stderr

    def _ray(self, host: Host, *arguments: str) -> None:
        options = (f"--node-ip-address={host.address}", "--object-store-memory=100000000")
        done = host.run("ray", "start", *arguments, *options, env=self.environment, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with network(tmp_path_factory.mktemp("hosts")) as net:
        started = time.monotonic()
        made = Cluster(net)
        print(f"three hosts are a cluster after {time.monotonic() - started:.1f} s")
        yield made


def test_hosts_share_no_files(cluster):
    here, there = cluster.workers
    places = [f"{folder}/here" for folder in (HOME, "/tmp", "/dev/shm", "/run")]
    assert here.run("touch", *places, env=cluster.environment).returncode == 0
    assert here.run("ls", *places, env=cluster.environment).stdout.split() == sorted(places)
    assert there.run("ls", *places, env=cluster.environment).stdout == ""
    assert (here.disk / "here").exists()
    for place in ("/usr", "/etc", str(Path(__file__).parent)):
        assert here.run("touch", f"{place}/here", env=cluster.environment).returncode != 0
    names = [host.run("uname", "-n", env=cluster.environment).stdout.strip() for host in (here, there)]
    assert names == ["worker1", "worker2"]


def test_a_laptop_that_joined_drives_a_study_and_keeps_it_while_a_worker_loses_its_power(cluster):
    laptop = cluster.host("laptop")
    cluster.join(laptop, num_cpus=0)
    path = laptop.disk / "studies" / "driven"
    command = laptop.command("vaesearch", "run", "--address", "auto", "--name", "driven", *LONG)
    said = laptop.disk / "driver.log"
    with said.open("w") as log, subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log) as driver:
        try:
            victim = in_the_middle(path, said.read_text)
            lost_at = datetime.now(UTC)
            with cluster.without_power(cluster.worker_named(victim["host"])):
                assert driver.wait(900) == 0, said.read_text()
        finally:
            laptop.power_off()
    assert_went_on(path, victim, lost_at, "its power")
    assert_has_nothing(cluster, cluster.workers)
    assert not list(cluster.head.disk.rglob("driven"))


def test_a_cable_that_is_cut_costs_seconds_and_its_trials_go_on_elsewhere(cluster):
    path = cluster.head.disk / "vaesearch-studies" / "cut"
    cluster.submit("cut")
    victim = in_the_middle(path, lambda: cluster.logs("cut"))
    lost_at = datetime.now(UTC)
    with cluster.without_cable(cluster.worker_named(victim["host"])):
        cluster.wait_for_end("cut")
        assert_has_nothing(cluster, cluster.workers)
    assert_went_on(path, victim, lost_at, "its cable")


def test_a_finalists_run_whose_host_falls_silent_goes_on_elsewhere(cluster):
    path = cluster.head.disk / "vaesearch-studies" / "confirmed"
    finals = ("--confirm", "--set", "finalists.seeds=3", "--set", "finalists.importance_samples=10")
    cluster.submit("confirmed", "--trials", "1", "--set", 'space.activation=["relu"]', *finals)

    def at_work() -> list[Host]:
        command = ("pgrep", "-f", "^ray::_Worker.train_and_score")
        return [host for host in cluster.workers if host.run(*command, env=cluster.environment).stdout]

    host, *_ = wait_for(at_work, lambda: cluster.logs("confirmed"))
    lost_at = time.monotonic()
    with cluster.without_cable(host):
        wait_for(lambda: [r for r in Study(path).final_rows() if r.attempts > 1], lambda: cluster.logs("confirmed"))
        again = time.monotonic() - lost_at
        print(f"a host lost its cable: the run of a finalist there was started again after {again:.1f} s")
        cluster.wait_for_end("confirmed")
    rows = Study(path).final_rows()
    assert [(row.run, row.state) for row in rows] == [(run, "COMPLETE") for run in range(3)]
    assert host.name not in [row.host for row in rows if row.attempts > 1], rows
    assert again < NOTICED_WITHIN_S


def test_a_study_whose_head_is_lost_goes_on_with_the_same_submit_on_a_new_cluster(cluster):
    path = cluster.head.disk / "vaesearch-studies" / "beheaded"
    cluster.submit("beheaded")
    victim = in_the_middle(path, lambda: cluster.logs("beheaded"))
    hosts = [cluster.head, *cluster.workers]
    for host in hosts:  # the head first
        host.power_off()
    before = {row.trial: row for row in Study(path).rows()}
    epochs = Study(path).epochs().num_rows
    assert before[victim["trial"]].state == "RUNNING"
    for host in hosts:
        host.power_on()
    cluster.start()
    cluster.submit("beheaded")
    cluster.wait_for_end("beheaded")
    study = Study(path)
    assert_whole(study, TRIALS)
    after = {row.trial: row for row in study.rows()}
    assert epochs < study.epochs().num_rows
    assert all(after[number].params == row.params for number, row in before.items())
    assert all(after[number] == row for number, row in before.items() if row.state == "COMPLETE")
    last = attempts_of(path, victim["trial"])[-1]
    assert last["outcome"] == "ended"
    assert last["from_epoch"] > 0


def wait_for(condition: Callable[[], T], said: Callable[[], str]) -> T:
    """What the condition returns when that is true."""
    deadline = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < deadline, f"the driver said\n{said()}"
        time.sleep(0.1)
    return found


def in_the_middle(path: Path, said: Callable[[], str]) -> dict[str, Any]:
    """An attempt that is: so far into its trial that a state of it is stored, and far from its end."""

    def found() -> dict[str, Any] | None:
        if not (path / "attempts").is_dir():
            return None
        study = Study(path)
        epochs = epochs_of(study)
        for attempt in study.attempts().to_pylist():
            if attempt["outcome"] is None and attempt["host"] and MIDDLE <= len(epochs[attempt["trial"]]) < LATE:
                return attempt
        return None

    attempt = wait_for(found, said)
    assert attempt is not None
    return attempt


def attempts_of(path: Path, trial: int) -> list[dict[str, Any]]:
    return [row for row in Study(path).attempts().sort_by("attempt").to_pylist() if row["trial"] == trial]


def assert_went_on(path: Path, victim: dict[str, Any], lost_at: datetime, what: str) -> None:
    """The trial whose host was lost is whole all the same, trained on from its stored state on another host."""
    assert_whole(Study(path), TRIALS)
    first, second, *more = attempts_of(path, victim["trial"])
    noticed, again = ((at - lost_at).total_seconds() for at in (first["ended_at"], second["started_at"]))
    print(f"a host lost {what}: noticed after {noticed:.1f} s, its trial was started again after {again:.1f} s")
    assert first["outcome"] == "lost"
    assert [second, *more][-1]["outcome"] == "ended"
    assert second["host"] not in (None, first["host"])
    assert second["from_epoch"] > 0
    assert again < NOTICED_WITHIN_S


def assert_has_nothing(cluster: Cluster, hosts: list[Host]) -> None:
    """No state of a trial and no table is on these hosts."""
    for host in hosts:
        places = [HOME, "/tmp", "/dev/shm", "/run"]
        patterns = ["(", "-name", "*.pt", "-o", "-name", "*.parquet", ")"]
        found = host.run("find", *places, "-xdev", *patterns, env=cluster.environment)
        assert (found.returncode, found.stdout) == (0, ""), found.stderr
