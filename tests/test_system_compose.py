"""docker-compose.yml itself, on podman with the real Compose v2: a stranger, a study, a lost worker, a stop, an end."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import requests
from clusters import BIN, command_of, free_ports
from podman_rig import ROOT, Project, missing, podman

from search.results import Study

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

STUDY = """
name = "{name}"
[model]
hidden_dims = [128, 128]
[budget]
trials = {trials}
max_epochs = {max_epochs}
[scheduler]
kind = "none"
[export]
top = 1
"""
NOTICED_WITHIN_S = 20  # with Ray's own values (2.60) it takes 65
EVERYWHERE = ("0.0.0.0", "::")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The head and two workers, up, behind a token that was made as docs/clusters.md says."""
    folder = tmp_path_factory.mktemp("compose")
    deploy = folder / "cluster" / "deploy"
    (deploy / "secrets").mkdir(parents=True)
    shutil.copy(ROOT / "cluster" / "deploy" / "make-token", deploy)
    subprocess.run([deploy / "make-token"], check=True, capture_output=True)
    with podman() as engine:
        engine.build_runtime()
        project = Project(engine, f"vaesearch-test-{os.getpid()}", folder, free_ports(1)[0])
        with project.health_checked():
            try:
                started = time.monotonic()
                project.up()
                wait_until(lambda: len(nodes(project)) == 3, 400, "two workers do not join")
                print(f"up with two workers in {time.monotonic() - started:.0f} s")
                yield project
            finally:
                project.down()


def test_without_a_token_compose_says_what_to_do(cluster: Project, tmp_path: Path):
    project = Project(cluster.engine, f"{cluster.name}-closed", tmp_path, free_ports(1)[0])
    done = project.compose("up", "--detach", "--no-build", "--pull", "never")
    assert done.returncode != 0
    assert "run cluster/deploy/make-token first" in done.stderr
    assert project.left() == []


def test_compose_takes_the_profiles_and_the_object_store_has_no_default_keys(cluster: Project):
    assert cluster.compose("--profile", "gpu", "config", "--quiet").returncode == 0
    refused = cluster.compose("--profile", "s3", "config", "--quiet")
    assert refused.returncode != 0
    assert "s3.env not found" in refused.stderr
    keys = cluster.folder / "cluster" / "deploy" / "secrets" / "s3.env"
    keys.write_text("AWS_ACCESS_KEY_ID=key\n")
    taken = cluster.compose("--profile", "s3", "config", "--format", "json")
    keys.unlink()
    services = json.loads(taken.stdout)["services"]
    assert {name for name, service in services.items() if "AWS_ACCESS_KEY_ID" in service["environment"]} == {
        "head",
        "s3",
    }


def test_the_token_opens_the_cluster_and_another_one_does_not(cluster: Project):
    url = f"{cluster.url}/api/jobs/"
    token = token_file(cluster).read_text().strip()
    assert requests.get(url, timeout=60).status_code == 401
    for wrong in ("wrong", token[:-1], "0" * 64):
        assert requests.get(url, headers=bearer(wrong), timeout=60).status_code == 403
        job = {"entrypoint": "touch /results/broken-in"}
        assert requests.post(url, json=job, headers=bearer(wrong), timeout=60).status_code == 403
    assert requests.get(url, headers=bearer(token), timeout=60).status_code == 200
    assert requests.get(f"{cluster.url}/api/gcs_healthz", timeout=60).status_code == 200  # what Kubernetes asks ...
    worker = inspected(cluster, "worker-1")["NetworkSettings"]["Networks"][f"{cluster.name}_cluster"]["IPAddress"]
    assert (
        requests.get(f"http://{worker}:52365/api/local_raylet_healthz", timeout=60).status_code == 200
    )  # ... has none

    join = "import ray; ray.init(address='head:6379', logging_level='ERROR'); print(len(ray.nodes()))"
    assert cluster.exec("worker-1", "python", "-c", join).endswith("3")
    # what ray.init connects with, and tries for 20 s
    refused = (
        "import ray\ntry:\n    ray._raylet.GcsClient(address='head:6379')\n"
        "except ray.exceptions.AuthenticationError as error: print(type(error).__name__)"
    )
    assert cluster.exec("worker-1", "python", "-c", refused, RAY_AUTH_TOKEN="wrong").endswith("AuthenticationError")
    assert cluster.exec("head-1", "ls", "/results") == ""


def test_nothing_but_the_dashboard_on_loopback_can_be_reached_from_outside(cluster: Project):
    port = int(cluster.url.rpartition(":")[2])
    published = [
        (inner, binding["HostIp"], int(binding["HostPort"]))
        for container in ("head-1", "worker-1", "worker-2")
        for inner, bindings in inspected(cluster, container)["NetworkSettings"]["Ports"].items()
        for binding in bindings or []
    ]
    assert published == [("8265/tcp", "127.0.0.1", port)]
    # and the host's own word for it: no process of podman's listens elsewhere, but for names within the network
    listening = {
        (address, owner)
        for address, owner in host_listeners()
        if re.search(r"conmon|podman|netavark|aardvark|ray", owner) and "--address" not in owner
    }
    gateway = inspected(cluster, "head-1")["NetworkSettings"]["Networks"][f"{cluster.name}_cluster"]["Gateway"]
    assert {address for address, owner in listening if "aardvark" in owner} <= {f"{gateway}:53"}
    of_ours = {address for address, owner in listening if any(each in owner for each in cluster.containers)}
    assert of_ours <= {f"127.0.0.1:{port}"}
    assert not [entry for entry in listening if entry[0].endswith(f":{port}") and entry[0].startswith(EVERYWHERE)]
    rules = subprocess.run(["iptables", "-t", "nat", "-S"], capture_output=True, text=True, check=True).stdout
    forwarded = [rule for rule in rules.splitlines() if "-j DNAT" in rule and f"--dport {port} " in rule]
    assert forwarded
    assert all("-d 127.0.0.1/32" in rule for rule in forwarded)


def test_containers_have_no_root_no_capabilities_and_the_token_is_for_their_user_alone(cluster: Project):
    for container in ("head-1", "worker-1", "worker-2"):
        status = cluster.exec(container, "cat", "/proc/1/status", "/proc/self/status")
        assert set(re.findall(r"^Uid:\t(\d+)\t(\d+)\t", status, re.MULTILINE)) == {("1000", "1000")}
        assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\t(\w+)", status, re.MULTILINE)) == {"0" * 16}
        assert set(re.findall(r"^NoNewPrivs:\t(\d)", status, re.MULTILINE)) == {"1"}
        assert cluster.exec(container, "stat", "-L", "-c", "%a %u", "/run/secrets/ray_token") == "600 1000"
        token = token_file(cluster).read_text().strip()
        assert token not in cluster.exec(container, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/1/environ")
    shm = int(cluster.exec("worker-1", "stat", "-f", "-c", "%b", "/dev/shm")) * 4096
    assert shm == 2**30
    assert resources(cluster)["object_store_memory"] == pytest.approx(3 * shm, rel=0.01)


def test_a_worker_that_dies_is_started_again_and_joins(cluster: Project):
    before = {node["raylet"]["nodeId"] for node in nodes(cluster)}
    os.kill(inspected(cluster, "worker-1")["State"]["Pid"], signal.SIGKILL)
    wait_until(
        lambda: len(nodes(cluster)) == 3 and {node["raylet"]["nodeId"] for node in nodes(cluster)} != before,
        180,
        "no new worker",
    )


def test_a_study_goes_on_without_a_killed_worker_and_its_results_come_home(cluster: Project, tmp_path: Path):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(name="lost-worker", trials=4, max_epochs=200))
    hostnames = {container: cluster.exec(container, "hostname") for container in ("worker-1", "worker-2")}
    submitted = vaesearch(cluster, "submit", str(study), cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: busy_hosts(cluster, "lost-worker") == set(hostnames.values()), 400, "one worker has no trial")
    cluster.engine("kill", f"{cluster.name}-worker-2")
    killed = time.time()

    followed = vaesearch(cluster, "logs", "-f", "lost-worker", cwd=tmp_path, timeout=700)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    fetched = vaesearch(cluster, "fetch", "lost-worker", cwd=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    trials = rows(tmp_path, "SELECT trial, state FROM trials ORDER BY trial")
    assert [row["trial"] for row in trials] == list(range(4))
    assert {row["state"] for row in trials} == {"COMPLETE"}
    attempts = rows(tmp_path, "SELECT * FROM attempts ORDER BY trial, attempt")
    assert Counter(row["trial"] for row in attempts if row["outcome"] == "ended") == dict.fromkeys(range(4), 1)
    lost = [row for row in attempts if row["outcome"] == "lost"]
    assert [row["host"] for row in lost] == [hostnames["worker-2"]]
    assert {row["host"] for row in attempts} == set(hostnames.values())
    noticed_s = datetime.fromisoformat(lost[0]["ended_at"]).timestamp() - killed
    print(f"the loss of a worker was noticed after {noticed_s:.1f} s")
    assert noticed_s < NOTICED_WITHIN_S
    assert Study(tmp_path / "studies" / "lost-worker").model_folders()
    assert token_file(cluster).read_text().strip() not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )


def test_a_study_that_was_stopped_goes_on_with_the_same_submit(cluster: Project, tmp_path: Path):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(name="stopped", trials=10, max_epochs=60))
    assert vaesearch(cluster, "submit", str(study), cwd=tmp_path).returncode == 0
    wait_until(lambda: finished(cluster, "stopped") >= 1, 400, "no trial ends")
    stopped = vaesearch(cluster, "stop", "stopped", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert "all that it found is on disk" in stopped.stdout
    before = finished(cluster, "stopped")
    assert 1 <= before < 10

    again = vaesearch(cluster, "submit", str(study), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert vaesearch(cluster, "logs", "-f", "stopped", cwd=tmp_path, timeout=700).returncode == 0
    attempts = on_head(cluster, "SELECT trial, outcome FROM attempts WHERE study = 'stopped'")
    assert Counter(row["trial"] for row in attempts if row["outcome"] == "ended") == dict.fromkeys(range(10), 1)
    assert {row["outcome"] for row in attempts} <= {"ended", "interrupted"}


def test_down_leaves_nothing(cluster: Project):
    assert len(cluster.left()) > 3
    cluster.down()
    assert cluster.left() == []


def vaesearch(cluster: Project, *arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command on the user's machine, which has the token and the address and shares nothing else."""
    return subprocess.run(
        [BIN / "vaesearch", *arguments],
        cwd=cwd,
        env=cluster.engine.environment | {"RAY_ADDRESS": cluster.url, "RAY_AUTH_TOKEN_PATH": str(token_file(cluster))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def rows(folder: Path, sql: str) -> list[dict]:
    done = subprocess.run(
        [BIN / "vaesearch", "query", sql, "--format", "json"], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def on_head(cluster: Project, sql: str) -> list[dict]:
    """The answer on the head, also while the study runs; none where there is no table yet."""
    try:
        return json.loads(cluster.exec("head-1", "vaesearch", "query", sql, "--format", "json"))
    except AssertionError:
        return []


def busy_hosts(cluster: Project, study: str) -> set[str]:
    sql = f"SELECT host FROM attempts WHERE study = '{study}' AND outcome IS NULL AND epochs > 0"
    return {row["host"] for row in on_head(cluster, sql)}


def finished(cluster: Project, study: str) -> int:
    return len(on_head(cluster, f"SELECT trial FROM trials WHERE study = '{study}' AND state = 'COMPLETE'"))


def nodes(cluster: Project) -> list[dict]:
    return [node for node in from_dashboard(cluster, "/nodes?view=summary")["data"]["summary"] if is_alive(node)]


def is_alive(node: dict) -> bool:
    return node["raylet"]["state"] == "ALIVE"


def resources(cluster: Project) -> dict[str, float]:
    ask = (
        "import json, ray; ray.init(address='auto', logging_level='ERROR'); print(json.dumps(ray.cluster_resources()))"
    )
    return json.loads(cluster.exec("head-1", "python", "-c", ask).splitlines()[-1])


def from_dashboard(cluster: Project, path: str) -> dict:
    token = token_file(cluster).read_text().strip()
    try:
        return requests.get(cluster.url + path, headers=bearer(token), timeout=10).json()
    except requests.RequestException:
        return {"data": {"summary": []}}


def inspected(cluster: Project, container: str) -> dict:
    return json.loads(cluster.engine("inspect", f"{cluster.name}-{container}"))[0]


def token_file(cluster: Project) -> Path:
    return cluster.folder / "cluster" / "deploy" / "secrets" / "ray_token"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def wait_until(condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(1)


def host_listeners() -> list[tuple[str, str]]:
    """Each address of the machine itself that a process listens on, and the command of that process."""
    inodes = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for descriptor in _links(process / "fd"):
                inodes[descriptor] = command_of(int(process.name))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/1/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                host, _, port = fields[1].rpartition(":")
                found.append((f"{_address(host)}:{int(port, 16)}", inodes.get(f"socket:[{fields[9]}]", "")))
    return found


def _links(folder: Path) -> list[str]:
    try:
        return [os.readlink(path) for path in folder.iterdir()]
    except OSError:
        return []


def _address(hexadecimal: str) -> str:
    if len(hexadecimal) == 8:
        return ".".join(str(byte) for byte in reversed(bytes.fromhex(hexadecimal)))
    return "::" if set(hexadecimal) == {"0"} else hexadecimal
