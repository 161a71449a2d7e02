"""Studies on a Ray cluster that is reached over HTTP alone: started, watched, killed, stopped, gone on with, fetched.

The cluster is real, with a dashboard and a token; what is the user's machine shares no folder with it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from clusters import BIN, Head, command_of, descendants, ray_head
from test_system import QUICK, STEADY, assert_whole

from search.results import Study, open_study

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

STARTED = re.compile(r"^study: (searching:|going on at)", re.MULTILINE)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster for all tests of this module, with results in a folder of its own."""
    with ray_head(num_cpus=2) as started:
        yield started


class Laptop:
    """A folder in which `vaesearch` is used on the cluster, with the token in a file."""

    def __init__(self, head: Head, folder: Path) -> None:
        self.head, self.folder = head, folder
        self.environment = head.environment() | {"RAY_ADDRESS": head.url}

    def __call__(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "vaesearch", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def done(self, *arguments: object, **variables: str) -> str:
        """What a command says on stdout, which must go well."""
        done = self(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def interrupted_after(self, line: str, *arguments: str) -> tuple[int, str]:
        """The exit status and stderr of a command that got Ctrl-C once it had said a line that begins so."""
        command = [BIN / "vaesearch", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes) as process:
            assert process.stdout is not None
            assert any(each.startswith(line) for each in process.stdout)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=300)
        return process.returncode, said

    def wait_for(self, study: str, text: str) -> None:
        """Until a driver has said it, read where Ray writes it: a command in a loop would slow down the study."""
        log = self.head.folder / "ray" / "session_latest" / "logs" / f"job-driver-{study}.log"
        deadline = time.monotonic() + 400
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture
def laptop(head: Head, tmp_path: Path) -> Laptop:
    return Laptop(head, tmp_path)


def drivers(head: Head) -> set[int]:
    return {pid for pid in descendants(head.pid) if "search.cli run" in command_of(pid)}


def said_by_us_alone(lines: list[str]) -> bool:
    return not any(re.search(r"traceback|\.cc:|warning|\[20\d\d|ray::", line, re.IGNORECASE) for line in lines)


# ---- refused


def test_a_wrong_token_is_told_in_one_line_without_it_and_without_a_word_of_rays(laptop):
    for arguments in (["status"], ["submit", "--trials", "1"], ["fetch", "study"]):
        refused = laptop(*arguments, RAY_AUTH_TOKEN="0123456789abcdef-wrong")
        assert refused.returncode == 1
        assert refused.stdout == ""
        address, line = refused.stderr.splitlines()
        assert address == f"vaesearch: cluster {laptop.head.url}"
        assert "refuses the token of RAY_AUTH_TOKEN" in line
        assert "0123456789abcdef" not in refused.stderr


def test_without_a_token_and_over_open_http_nothing_is_sent(laptop):
    without = laptop("status", RAY_AUTH_TOKEN_PATH="", HOME=str(laptop.folder))
    assert (without.returncode, without.stdout) == (1, "")
    assert "asks for a token" in without.stderr
    port = laptop.head.url.rpartition(":")[2]
    plain = laptop("submit", RAY_ADDRESS=f"http://{socket.gethostname()}.example.org:{port}")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert "ssh -N -L" in plain.stderr


def test_a_study_that_can_never_fit_is_refused_with_the_reason_while_one_waits(laptop):
    started = time.monotonic()
    refused = laptop("submit", "--name", "impossible", "--cpus-per-trial", "1000", *QUICK)
    print(f"refused after {time.monotonic() - started:.1f} s")
    assert refused.returncode == 2, refused.stderr
    assert "1000 CPUs" in refused.stderr
    assert not (laptop.head.results / "impossible").exists()
    status = laptop("status", "impossible")
    assert status.returncode == 1
    assert "FAILED (2)" in status.stdout


# ---- the life of a study


def test_a_study_survives_its_driver_is_stopped_goes_on_and_comes_home_with_every_trial_once(laptop):
    head, flags = laptop.head, ("--name", "study", "--trials", "16", *STEADY)
    submitted = laptop("submit", *flags)
    assert submitted.returncode == 0, submitted.stderr
    assert STARTED.search(submitted.stderr)
    assert said_by_us_alone(submitted.stderr.splitlines())
    commands = [line.strip() for line in submitted.stdout.splitlines()]
    assert commands == [f"vaesearch {command} study" for command in ("status", "logs -f", "stop", "fetch")]
    assert "study: RUNNING" in laptop.done("status", "study")
    assert head.token not in " ".join(map(command_of, descendants(head.pid)))

    again = laptop("submit", *flags)
    assert again.returncode == 0
    assert "is there already, RUNNING" in again.stderr
    other = laptop("submit", *flags, "--seed", "1")
    assert other.returncode == 2
    assert "another one" in other.stderr

    (driver,) = drivers(head)
    os.kill(driver, signal.SIGKILL)
    laptop.wait_for("study", "ended by SIGKILL; starting it again")
    laptop.wait_for("study", "going on at")

    code, said = laptop.interrupted_after("[1/16]", "logs", "-f", "study")
    assert code == 130
    assert "study goes on without us; vaesearch stop study ends it" in said

    stopped = laptop.done("stop", "study")
    assert "all that it found is on disk" in stopped
    assert not drivers(head)
    assert "interrupted with" in laptop.done("logs", "study")
    assert "STOPPED" in laptop.done("status", "study")
    study = open_study(head.results / "study")
    assert not (study.path / "lease.json").exists()
    ended = {row.trial: row for row in study.rows() if row.state != "RUNNING"}
    assert ended
    assert {row.trial for row in study.rows()} - set(ended)
    under_way = {row["trial"] for row in study.attempts().to_pylist() if row["placed_at"] and row["outcome"] != "ended"}
    assert "had ended before" in laptop.done("stop", "study")

    assert re.search(r"^study: going on at", laptop("submit", *flags).stderr, re.MULTILINE)
    live = Path(laptop.done("fetch", "study", "--to", "early").strip())
    assert live == Path("early/study")
    assert {row.trial for row in open_study(laptop.folder / live).rows()} >= set(ended)

    followed = laptop("logs", "-f", "study")
    assert followed.returncode == 0
    assert "[16/16]" in followed.stdout
    assert "study: SUCCEEDED" in followed.stderr
    assert json.loads(laptop.done("status", "study", "--json"))["state"] == "SUCCEEDED"

    laptop.done("fetch", "study")
    fetched = Study(laptop.folder / "studies" / "study")
    assert_whole(fetched, trials=16)
    assert all(fetched.rows()[number] == row for number, row in ended.items())
    interrupted = {row["trial"] for row in fetched.attempts().to_pylist() if row["outcome"] == "interrupted"}
    assert interrupted >= under_way
    counted = laptop.done("query", "SELECT count(*), count(DISTINCT trial) FROM trials", "--format", "csv")
    assert counted.splitlines()[1] == "16,16"
    assert "16 of 16 trials" in laptop.done("show", "study")

    token = head.token.encode()
    kept = [*head.results.rglob("*"), *laptop.folder.rglob("*"), *(head.folder / "ray").rglob("*")]
    assert [file for file in kept if file.is_file() and not file.is_symlink() and token in file.read_bytes()] == []
    assert head.token not in laptop.done("list", "--address", head.url, "--json")


def test_data_of_this_machine_go_with_the_study_and_a_broken_connection_is_made_again(laptop):
    np.save(laptop.folder / "points.npy", np.random.default_rng(0).random((400, 6)).astype(np.float32))
    flags = ("--data", "points.npy", "--trials", "4", *STEADY)
    laptop.done("submit", *flags, "--no-wait")
    with cut_after(laptop.head, lambda: laptop.wait_for("points", "[1/4]")) as url:
        followed = laptop("logs", "-f", "points", RAY_ADDRESS=url)
    assert followed.returncode == 0, followed.stderr
    assert followed.stderr.count("trying again") == 1
    lines = followed.stdout.splitlines()
    assert [line.split("]")[0] for line in lines if line.startswith("[")] == [f"[{n}/4" for n in range(1, 5)]
    assert lines == laptop.done("logs", "points").splitlines()
    assert_whole(open_study(laptop.head.results / "points"), trials=4)


def test_doctor_looks_at_the_cluster_from_outside_and_from_its_head(laptop):
    checked = laptop("doctor", "--json")
    assert checked.returncode == 0, checked.stderr + checked.stdout
    checks = json.loads(checked.stdout)
    assert {check["verdict"] for check in checks} <= {"ok", "warning"}
    assert {"ray", "cluster.versions", "cluster.placement"} <= {check["name"] for check in checks}
    assert said_by_us_alone(checked.stderr.splitlines())
    refused = laptop("doctor", "--json", RAY_AUTH_TOKEN="0123456789abcdef-wrong")
    assert refused.returncode == 1
    assert "0123456789abcdef" not in refused.stdout + refused.stderr


@contextmanager
def cut_after(head: Head, wait: Callable[[], None]) -> Iterator[str]:
    """The cluster's address through a tunnel, which after the wait is cut until that was noticed."""
    port = int(head.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = server.getsockname()[1]
        tunnel = Tunnel(server, port)
        tunnel.start()

        def cut() -> None:
            wait()
            tunnel.is_cut = True
            deadline = time.monotonic() + 300
            while not tunnel.num_refused and time.monotonic() < deadline:
                time.sleep(0.05)
            tunnel.is_cut = False

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            yield f"http://127.0.0.1:{own}"
        finally:
            cutter.join()
            tunnel.is_over = True
            tunnel.join()


class Tunnel(threading.Thread):
    """Hands connections on to a port, each in a thread, as `ssh -L` does; breaks them all while it is cut."""

    def __init__(self, server: socket.socket, port: int) -> None:
        super().__init__()
        self.server, self.port, self.is_cut, self.is_over = server, port, False, False
        self.num_refused = 0

    def run(self) -> None:
        self.server.settimeout(0.1)
        pumps: list[threading.Thread] = []
        while not self.is_over:
            try:
                connection, _ = self.server.accept()
            except TimeoutError:
                continue
            if self.is_cut:
                connection.close()
                self.num_refused += 1
                continue
            target = socket.create_connection(("127.0.0.1", self.port))
            for source, sink in ((connection, target), (target, connection)):
                pumps.append(threading.Thread(target=self.pump, args=(source, sink)))
                pumps[-1].start()
        for pump in pumps:
            pump.join()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(0.1)
        while not self.is_over and not self.is_cut:
            try:
                block = source.recv(2**16)
            except TimeoutError:
                continue
            except OSError:
                break
            if not block:
                break
            sink.sendall(block)
        for end in (source, sink):
            end.close()
