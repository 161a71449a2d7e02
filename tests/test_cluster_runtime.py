"""A private Ray, each in a process of its own: who can reach it, what it changes, what is left of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from cluster.runtime import environment, ray_runtime

PROBE = dedent(
    '''
    import json, os, re, subprocess, sys, time
    from pathlib import Path
    from cluster.runtime import ray_runtime

    def stat(pid):
        """Parent and state of a process."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[1]), fields[0]
        except (FileNotFoundError, ProcessLookupError):
            return None, None

    def below(root):
        """The living processes that descend from one."""
        parents = {int(p.name): stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
        found = {root}
        for _ in range(10):
            found |= {pid for pid, (parent, _) in parents.items() if parent in found}
        return {pid for pid in found if parents.get(pid, (0, "Z"))[1] != "Z"}

    def name(pid):
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\\0", b" ").decode()[:80]
        except FileNotFoundError:
            return "gone"

    def listening(pids):
        """(command, local address as /proc/net has it) of every TCP socket they listen on."""
        inodes = {}
        for pid in pids:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    target = os.readlink(fd)
                except FileNotFoundError:
                    continue
                if match := re.fullmatch(r"socket:\\[(\\d+)\\]", target):
                    inodes[match[1]] = pid
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append((name(inodes[fields[9]]), fields[1].rpartition(":")[0]))
        return found

    def failure(task):
        try:
            ray.get(task)
        except Exception as error:
            return error

    def connects(address, **variables):
        """Whether another process gets into that Ray with these variables."""
        code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print(ray.cluster_resources())"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        kept["RAY_gcs_server_port_wait_time_s"] = "2"  # tries; else 20
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True, timeout=200
        )
        return done.returncode == 0, done.stdout + done.stderr

    report = {}
    before = dict(os.environ)
    with ray_runtime(num_cpus=1, num_gpus=0) as runtime:
        import ray

        report["runtime"] = [runtime.address, runtime.num_cpus, runtime.num_gpus]
        report["modules_from"] = ray.get(ray.remote(lambda: sys.path).remote())  # now there is a worker
        mine = below(os.getpid())
        report["commands"] = [name(pid) for pid in mine]
        report["listening"] = listening(mine)
        died = ray.remote(lambda: os._exit(1)).options(max_retries=0).remote()
        report["died"] = isinstance(failure(died), ray.exceptions.WorkerCrashedError)
        time.sleep(1)  # in which Ray tells of it
        address = ray.get_runtime_context().gcs_address
        report["token_length"] = len(os.environ["RAY_AUTH_TOKEN"])
        right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
        report["right"] = connects(address, **right)
        report["wrong"] = connects(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
        report["none"] = connects(address, RAY_AUTH_MODE="disabled")
        with ray_runtime(num_cpus=7) as inner:
            report["inner"] = [inner.address == address, inner.num_cpus]
        report["connected_after_inner"] = ray.is_initialized()
    report["connected_after"] = ray.is_initialized()
    report["environment"] = {k: [before.get(k), os.environ.get(k)] for k in {**before, **os.environ}
                             if before.get(k) != os.environ.get(k)}
    deadline = time.monotonic() + 60
    while len(left := below(os.getpid())) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    report["left"] = [name(pid) for pid in (left | {p for p in mine if stat(p)[1] not in (None, "Z")}) - {os.getpid()}]
    print(json.dumps(report))
    '''
)

LOOPBACK = (
    "0100007F",
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # 127.0.0.1 in IPv6
)


def in_a_process(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a home of its own and without any of Ray's variables but these."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", dedent(code)],
        env={**kept, "HOME": str(home), **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    """What a process saw that held a private Ray."""
    done = in_a_process(PROBE, home)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stdout": done.stdout, "stderr": done.stderr}


def test_every_socket_of_a_private_ray_listens_on_loopback_alone(report):
    assert any("gcs_server" in command for command in report["commands"])
    assert any("raylet" in command for command in report["commands"])
    assert any("gcs_server" in command for command, _ in report["listening"])
    assert any("raylet" in command for command, _ in report["listening"])
    assert {address for _, address in report["listening"]} <= set(LOOPBACK), report["listening"]


def test_a_private_ray_starts_no_process_that_nobody_needs(report):
    spared = ("dashboard/dashboard.py", "monitor.py", "log_monitor.py")
    assert not [command for command in report["commands"] if any(name in command for name in spared)]


def test_a_private_ray_lets_nobody_in_without_its_token(report):
    entered, said = report["right"]
    assert entered, said  # else the refusals below would show nothing
    for entered, said in (report["wrong"], report["none"]):
        assert not entered
        assert "token" in said.lower()
    assert report["token_length"] >= 32


def test_a_private_ray_writes_nothing_into_the_home_of_its_user(report, home):
    assert report["runtime"][0] == "local"
    assert list(home.iterdir()) == []


def test_no_module_of_the_working_directory_is_taken_for_one_of_ours(report, home):
    assert str(home) not in report["modules_from"]
    assert "" not in report["modules_from"]


def test_a_private_ray_leaves_environment_and_processes_as_they_were(report):
    set_by_ray_itself = {"RAY_CLIENT_MODE"}  # ray 2.60 does so when it is imported
    assert set(report["environment"]) <= set_by_ray_itself
    assert report["left"] == []
    assert not report["connected_after"]


def test_a_private_ray_has_what_was_asked_for_and_says_nothing_even_where_a_worker_died(report):
    assert report["died"]
    assert report["runtime"] == ["local", 1.0, 0.0]
    assert len(report["stdout"].splitlines()) == 1  # the report
    assert report["stderr"] == ""


def test_a_running_connection_is_used_as_it_is_and_stays_open(report):
    assert report["inner"] == [True, 1.0]
    assert report["connected_after_inner"]


def test_a_private_ray_starts_in_a_process_that_had_imported_ray(home):
    done = in_a_process(
        """
        import ray
        from cluster.runtime import ray_runtime
        with ray_runtime(num_cpus=1) as runtime:
            print(runtime.address)
        """,
        home,
    )
    assert done.stdout.split() == ["local"], done.stderr[-2000:]


def test_one_process_can_have_private_rays_one_after_the_other(home):
    done = in_a_process(
        """
        from cluster.runtime import ray_runtime
        for _ in range(2):
            with ray_runtime(num_cpus=1) as runtime:
                print(runtime.address)
        """,
        home,
    )
    assert done.stdout.split() == ["local"] * 2, done.stderr[-2000:]


def test_a_private_ray_is_private_also_where_the_environment_names_a_cluster(home):
    done = in_a_process(
        """
        from cluster.runtime import ray_runtime
        with ray_runtime(num_cpus=1) as runtime:
            print(runtime.address)
        """,
        home,
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert done.stdout.split() == ["local"], done.stderr[-2000:]


def test_an_error_inside_still_shuts_the_private_ray_down(home):
    done = in_a_process(
        """
        import os
        from cluster.runtime import ray_runtime
        try:
            with ray_runtime(num_cpus=1):
                raise KeyError("ours")
        except KeyError as error:
            import ray
            print(error, ray.is_initialized(), "RAY_AUTH_TOKEN" in os.environ)
        """,
        home,
    )
    assert done.stdout.split() == ["'ours'", "False", "False"], done.stderr[-2000:]


def test_the_shared_ray_is_used_as_it_is(ray_here):
    import ray

    with ray_runtime() as runtime:
        assert runtime.num_cpus == ray_here.num_cpus
        assert runtime.address == ray.get_runtime_context().gcs_address
    assert ray.is_initialized()


def test_environment_restores_what_was_there_also_after_an_error(monkeypatch):
    monkeypatch.setenv("VAESEARCH_TEST_SET", "before")
    monkeypatch.delenv("VAESEARCH_TEST_UNSET", raising=False)

    def inside() -> None:
        with environment({"VAESEARCH_TEST_SET": "in", "VAESEARCH_TEST_UNSET": "in"}):
            assert os.environ["VAESEARCH_TEST_SET"] == os.environ["VAESEARCH_TEST_UNSET"] == "in"
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert os.environ["VAESEARCH_TEST_SET"] == "before"
    assert "VAESEARCH_TEST_UNSET" not in os.environ
