"""The whole program killed, starved and cut off, by all means that one machine has; then the same command again."""

import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from clusters import clean_environment, command_of, descendants, free_ports
from test_system import (
    STEADY,
    Driver,
    assert_retrains,
    assert_whole,
    driver,
    end,
    end_family,
    epochs_of,
    has_an_end,
    run,
    run_line,
    wait_until_gone,
)

from search.layout import part_files
from search.results import Study, open_study
from search.storage import location

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

KILLS = 8
SLOWER = ("--max-epochs", "40", "--set", "model.hidden_dims=[256, 256]", "--set", "scheduler.grace_epochs=2")
"""Trials of several seconds."""


def kill_with_family(running: Driver) -> None:
    """As a power cut does it to the driver; what Ray started is gone soon after."""
    family = descendants(running.process.pid)
    running.process.kill()
    assert running.end() == -signal.SIGKILL
    end_family(family, 200)  # a worker that was about to start takes a while to notice


def cut_the_power(running: Driver) -> None:
    """The driver and all that it started end at one moment."""
    family = descendants(running.process.pid)
    end({running.process.pid, *family})
    assert running.end() == -signal.SIGKILL
    wait_until_gone(family, 100)


def latest(table: Path) -> float:
    """When a part of a table was last written."""
    return max((part.stat().st_mtime for part in part_files(table.parent, table.name)), default=0.0)


def assert_consistent(study: Study) -> None:
    """What must hold of a study at any instant."""
    rows = study.rows()
    assert [row.trial for row in rows] == list(range(len(rows)))
    for trial, epochs in epochs_of(study).items():
        assert epochs == list(range(1, len(epochs) + 1)), trial


def worker_pids(study: Study) -> list[int]:
    """The processes in which trials are trained, as the ledger has them."""
    pids = [row["pid"] for row in study.attempts().to_pylist() if row["outcome"] is None and row["pid"] is not None]
    return sorted(pid for pid in pids if "ray::" in command_of(pid))


# ---- the driver


def test_a_driver_killed_again_and_again_at_random_moments_ends_with_every_trial_once(tmp_path):
    rng = random.Random(1)
    arguments = ("run", "--name", "killed", "--trials", "40", *SLOWER)
    path = tmp_path / "studies" / "killed"
    under_way = 0
    for kill in range(1, KILLS + 1):
        table = path / ("trials" if kill % 2 else "epochs")  # at the start, or among the epochs of the trials
        with driver(*arguments, cwd=tmp_path) as running:
            before = latest(table)
            running.wait_until(lambda t=table, b=before: latest(t) > b)
            time.sleep(rng.uniform(0.1, 3))
            assert not running.is_over, "the study is too short for this many kills"
            (kill_with_family if kill % 4 == 0 else cut_the_power)(running)
            states = [row.state for row in Study(path).rows()]
            under_way += states.count("RUNNING")
            print(f"kill {kill}: {len(states)} trials, {states.count('RUNNING')} under way")
            assert_consistent(Study(path))
    last = run(*arguments, cwd=tmp_path, timeout=900)
    assert last.returncode == 0, last.stderr
    study = open_study(path)
    assert_whole(study, trials=40)
    assert under_way > KILLS
    resumed = [row for row in study.rows() if row.attempts > 1]
    assert resumed
    for row in resumed[:2]:
        assert_retrains(study, row.trial)
    best = study.summary().best
    assert best is not None
    ((value,),) = duckdb.sql(
        f"SELECT min(val_nelbo) FROM '{path}/trials/*.parquet' WHERE state = 'COMPLETE' AND status = 'ok'"
    ).fetchall()
    assert best.val_nelbo == value
    outcomes = study.attempts()["outcome"].to_pylist()
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
    assert set(outcomes) == {"ended", "interrupted"}
    assert len(outcomes) == sum(row.attempts for row in study.rows())


def test_a_second_signal_leaves_at_once_and_the_study_goes_on(tmp_path):
    with driver("run", "--name", "study", "--trials", "6", *STEADY, cwd=tmp_path) as running:
        running.wait_for("[1/6]")
        family = descendants(running.process.pid)
        while not running.is_over:  # two that it has not handled yet are one
            running.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert running.end() == 130
        assert not any("go on with" in line for line in running.stderr)  # which the orderly end says
        end_family(family, 200)
    assert run("resume", "study", cwd=tmp_path).returncode == 0
    assert_whole(open_study(tmp_path / "studies" / "study"), trials=6)


def test_a_second_driver_is_refused_and_names_the_first_which_is_not_disturbed(tmp_path):
    arguments = ("run", "--name", "study", "--trials", "12", *STEADY)
    with driver(*arguments, cwd=tmp_path) as running:
        running.wait_for("[1/12]")
        second = run(*arguments, cwd=tmp_path)
        assert second.returncode == 2
        assert f"process {running.process.pid}" in second.stderr
        assert len(second.stderr.strip().splitlines()) <= 3
        assert running.end() == 0
    assert_whole(open_study(tmp_path / "studies" / "study"), trials=12)


def test_resume_finds_the_spec_in_the_studys_folder_and_is_the_same_as_run_again(tmp_path):
    with driver("run", "--name", "study", "--trials", "5", *STEADY, cwd=tmp_path) as running:
        running.wait_for("[1/5]")
        kill_with_family(running)
    done = run("resume", "study", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "taken over from process" in done.stderr
    assert_whole(open_study(tmp_path / "studies" / "study"), trials=5)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "studies").rglob("*")}
    for again in (run("resume", "study", cwd=tmp_path), run("resume", "study", "--json", cwd=tmp_path)):
        assert again.returncode == 0
        assert "complete" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "studies").rglob("*")} == files
    more = run("resume", "study", "--extend", "2", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert_whole(open_study(tmp_path / "studies" / "study"), trials=7)
    other = run("resume", "study", "--set", "budget.max_epochs=3", cwd=tmp_path)
    assert other.returncode == 2
    assert "budget.max_epochs: 40 -> 3" in other.stderr
    unknown = run("resume", "nothing", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "study" in unknown.stderr


# ---- workers


def test_a_soak_with_a_killer_of_workers_loses_and_doubles_nothing(tmp_path):
    """Every 2 seconds, with probability 0.15, a random worker is killed: some of them twice, none for good."""
    rng = random.Random(1)  # strikes five times in the first 40 seconds
    kills = 0
    budget = ("--trials", "40", "--set", "scheduler.kind=none", "--set", "budget.max_retries=10")
    with driver("run", "--name", "soak", *SLOWER, *budget, "--max-epochs", "20", cwd=tmp_path) as running:
        running.wait_for("[1/40]")
        deadline = time.monotonic() + 1600
        while not running.is_over:
            assert time.monotonic() < deadline, running.stderr[-5:]
            time.sleep(2)
            workers = worker_pids(Study(tmp_path / "studies" / "soak"))
            if workers and rng.random() < 0.15:
                try:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    pass
        assert running.end() == 0, running.stderr
    print(f"{kills} workers were killed")
    assert kills >= 2
    study = open_study(tmp_path / "studies" / "soak")
    assert_whole(study, trials=40)
    outcomes = study.attempts()["outcome"].to_pylist()
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
    assert outcomes.count("ended") == 40
    assert 1 <= outcomes.count("lost") <= kills  # one between two trials costs nobody an attempt
    again = [row for row in study.rows() if row.attempts > 1]
    assert_retrains(study, again[0].trial)


NODES = """
import json, os, sys, threading, time
from ray.cluster_utils import Cluster
from search.events import StudyEvents
from search.spec import StudySpec
from search.study import run_study

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
spec = StudySpec.load(None, json.loads(sys.argv[1]))

class Fate(StudyEvents):
    told = []
    def strike(self):
        victim = nodes.pop()
        cluster.remove_node(victim, allow_graceful=False)
        time.sleep(3)
        nodes.append(cluster.add_node(num_cpus=1))
    def trial_started(self, row):
        if row.trial == 1 and row.attempts == 1:
            threading.Timer(2.0, self.strike).start()
    def worker_lost(self, row, attempt):
        self.told.append([row.trial, attempt.outcome, attempt.reason])

fate = Fate()
try:
    study = run_study(spec, address=cluster.address, events=[fate], say=lambda text: print(text, file=sys.stderr))
    print(json.dumps({"lost": fate.told, "path": str(study.path)}))
finally:
    cluster.shutdown()
"""


def test_a_node_that_is_lost_as_trials_begin_costs_an_attempt_at_most(tmp_path):
    """One that is lost later, with all its host, is in tests/test_system_hosts.py."""
    keys = {
        "name": "nodes",
        "storage.path": str(tmp_path / "studies"),
        "budget.trials": 4,
        "budget.max_epochs": 40,
        "scheduler.kind": "none",
        "model.hidden_dims": [192, 192],
    }
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, json.dumps(keys)],
        cwd=tmp_path,
        env=clean_environment() | token,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family: set[int] = set()
    try:
        stdout, stderr = process.communicate(timeout=900)
    finally:
        family = descendants(process.pid)
        process.kill()
        end(family & descendants(os.getpid()))
    assert process.returncode == 0, stderr[-3000:]
    told = json.loads(stdout.splitlines()[-1])
    study = open_study(told["path"])
    assert_whole(study, trials=4)
    print(told["lost"])
    assert {outcome for _, outcome, _ in told["lost"]} <= {"lost"}
    for trial, _, _ in told["lost"]:
        assert study.rows()[trial].attempts >= 2
        assert_retrains(study, trial)


def test_a_cluster_that_dies_as_a_whole_costs_no_trial_once_there_is_another(tmp_path):
    """The head is gone, and with it every worker; a new one, the same command."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    environment = clean_environment() | token
    port = free_ports(1)[0]
    address = f"127.0.0.1:{port}"
    has_cpus = f"import ray; ray.init({address!r}, log_to_driver=False); assert ray.cluster_resources()['CPU'] == 2"
    start = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--num-cpus=2", "--object-store-memory=200000000", "--include-dashboard=false",
    ]  # fmt: skip
    arguments = ("run", "--name", "head", "--trials", "8", "--address", address, *STEADY)
    path = tmp_path / "studies" / "head"

    def head() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while subprocess.run([sys.executable, "-c", has_cpus], env=environment, capture_output=True).returncode:
            assert time.monotonic() < deadline
        return process

    def stop(process: subprocess.Popen[bytes]) -> None:
        family = descendants(process.pid)
        process.kill()
        process.wait()
        end({pid for pid in family if Path(f"/proc/{pid}").exists()})
        wait_until_gone(family, 100)

    first = head()
    try:
        with driver(*arguments, cwd=tmp_path, extra=token) as running:
            running.wait_for("[1/8]")
            stop(first)
            died = time.monotonic()
            code = running.end(400)
            print(f"the driver ended with {code} after {time.monotonic() - died:.0f} s: {running.stderr[-3:]}")
            assert code == 1
            assert any("is gone" in line and "the same command" in line for line in running.stderr)
    finally:
        if first.poll() is None:
            stop(first)
    assert_consistent(Study(path))
    ended = {row.trial: row for row in Study(path).rows() if row.state != "RUNNING"}
    assert ended
    second = head()
    try:
        done = run(*arguments, cwd=tmp_path, extra=token)
        assert done.returncode == 0, done.stderr
    finally:
        stop(second)
    study = open_study(path)
    assert_whole(study, trials=8)
    assert all(study.rows()[number] == row for number, row in ended.items())


# ---- the storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many MiB."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full(disk: Path, leave_bytes: int = 0) -> Iterator[None]:
    """All the room of a disk is taken but some, and so is what others set free: states that are dropped, say."""
    filler, is_full, is_over = disk / "filler", threading.Event(), threading.Event()

    def take() -> None:
        with open(filler, "wb") as file:
            while not is_over.wait(0.002):
                found = os.statvfs(disk)
                free = found.f_bavail * found.f_frsize - leave_bytes
                try:
                    if free > 0:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
                    is_full.set()
                except OSError as error:  # others write, too
                    if error.errno != errno.ENOSPC:
                        raise

    taker = threading.Thread(target=take)
    taker.start()
    try:
        assert is_full.wait(120)
        yield
    finally:
        is_over.set()
        taker.join()
        filler.unlink()


def test_a_disk_that_is_full_for_a_while_holds_nothing_up_and_loses_nothing(tmp_path, small_disk):
    disk = small_disk(40)
    storage = ("--storage", str(disk / "studies"))
    with driver("run", "--name", "full", "--trials", "12", *storage, *STEADY, cwd=tmp_path) as running:
        running.wait_for("[2/12]")
        with full(disk):
            running.wait_for("cannot be written")
            assert os.strerror(28) in "".join(running.stderr)
            assert_consistent(open_study(disk / "studies" / "full"))
            time.sleep(5)
        assert running.end() == 0, running.stderr
    assert any("is written again" in line for line in running.stderr)
    assert_whole(open_study(disk / "studies" / "full"), trials=12)


def test_a_disk_that_stays_full_ends_the_study_clearly_and_with_room_the_same_command_goes_on(tmp_path, small_disk):
    disk = small_disk(40)
    path = disk / "studies" / "full"
    arguments = ("run", "--name", "full", "--trials", "12", "--storage", str(disk / "studies"), *STEADY)
    with driver(*arguments, "--set", "storage.patience_s=3", cwd=tmp_path) as running:
        running.wait_for("[2/12]")
        running.wait_until(lambda: has_an_end(path))
        with full(disk):
            assert running.end() == 1
            last = [line for line in running.stderr if line.startswith("vaesearch: ") or "the same command" in line]
            assert str(path) in last[0]
            assert os.strerror(28) in last[0]
            assert "the same command" in last[-1]
            assert not any("Traceback" in line for line in running.stderr)
            assert_consistent(Study(path))
            ended = {row.trial: row for row in Study(path).rows() if row.state != "RUNNING"}
            epochs = {(row["trial"], row["epoch"]): row["val_nelbo"] for row in Study(path).epochs().to_pylist()}
            assert ended

            refused = run(*arguments, cwd=tmp_path)  # there is still no room
            assert refused.returncode in (1, 2)
            assert str(disk) in refused.stderr
            assert len(refused.stderr.strip().splitlines()) <= 6

    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(path)
    assert_whole(study, trials=12)
    assert all(study.rows()[number] == row for number, row in ended.items())
    now = {(row["trial"], row["epoch"]): row["val_nelbo"] for row in study.epochs().to_pylist()}
    assert all(now[key] == value for key, value in epochs.items())


def test_states_that_find_no_room_wait_while_the_tables_go_on(tmp_path, small_disk):
    """Room for rows and not for the weights of a wide model."""
    disk = small_disk(160)
    path = disk / "studies" / "wide"
    wide = ("--max-epochs", "12", "--set", "model.hidden_dims=[700, 700]", "--set", "scheduler.kind=none")
    arguments = ("run", "--name", "wide", "--trials", "4", "--storage", str(disk / "studies"), *wide)
    with driver(*arguments, "--set", "export.top=1", cwd=tmp_path) as running:
        running.wait_until(lambda: (path / "checkpoints").is_dir())
        with full(disk, leave_bytes=1_000_000):
            running.wait_for("cannot be written")
            before = Study(path).epochs().num_rows
            running.wait_until(lambda: Study(path).epochs().num_rows > before + 1)
        assert running.end() == 0, running.stderr
    assert any("is written again" in line for line in running.stderr)
    study = open_study(path)
    assert_whole(study, trials=4)
    assert len(study.model_folders()) == 1


def test_a_study_on_an_object_store_survives_a_kill_and_a_store_that_does_not_answer(tmp_path, s3_server):
    url, server = s3_server
    arguments = ("run", "--name", "far", "--trials", "10", "--storage", url, *STEADY)
    with driver(*arguments, cwd=tmp_path) as running:
        running.wait_for("[1/10]")
        kill_with_family(running)
    place = location(url) / "far"
    assert_consistent(Study(place))
    with driver(*arguments, cwd=tmp_path) as running:
        running.wait_for("taken over")
        running.wait_for("/10]")
        os.kill(server, signal.SIGSTOP)
        try:
            time.sleep(2)
            sent = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            assert running.end(60) == 130  # the store does not answer before the end of this block
            print(f"gone after {time.monotonic() - sent:.1f} s while the store did not answer")
        finally:
            os.kill(server, signal.SIGCONT)
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = Study(place)
    assert_whole(study, trials=10)
    count = "SELECT count(*) AS n FROM trials WHERE study = 'far'"
    answer = run("query", count, "--storage", url, "--format", "json", cwd=tmp_path)
    assert json.loads(answer.stdout) == [{"n": 10}]
    shown = run("show", "far", "--storage", url, cwd=tmp_path)
    commands = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  vaesearch ")]
    assert commands
    for command in commands:
        printed = run_line(command, tmp_path)
        assert printed.returncode == 0, (command, printed.stderr)
    assert list(tmp_path.glob("model/*/model.safetensors"))
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("storage", ["local", "s3"])
def test_storage_that_cannot_be_written_is_refused_by_name_before_a_trial(tmp_path, s3_url, storage):
    place = "/proc/nowhere" if storage == "local" else s3_url.replace("s3://bucket", "s3://no-such-bucket")
    done = run("run", "--storage", place, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "searching" not in done.stderr
    assert place in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


# ---- long runs


TRIALS = 1000
GROWTH_LIMIT_BYTES = 50_000

LONG = """
import json, sys, time
import numpy as np
from search import StudySpec, run_study
from search.events import StudyEvents

np.save("points.npy", (np.random.default_rng(0).random((60, 4)) > 0.5).astype(np.float32))
spec = StudySpec.load(None, json.loads(sys.argv[1]))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

class Watch(StudyEvents):
    ended, seen = 0, [(0, time.process_time(), resident())]
    def trial_ended(self, row):
        Watch.ended += 1
        if Watch.ended % 100 == 0:
            Watch.seen.append((Watch.ended, time.process_time(), resident()))

run_study(spec, events=[Watch()])
print(json.dumps(Watch.seen))
"""


def test_a_thousand_trials_cost_little_memory_few_files_and_steady_work_of_the_driver(tmp_path):
    keys = {
        "name": "long",
        "data.source": "points.npy",
        "model.hidden_dims": [4],
        "train.batch_size": 16,
        "budget.trials": TRIALS,
        "budget.max_epochs": 1,
        "export.top": 1,
    }
    done = subprocess.run(
        [sys.executable, "-c", LONG, json.dumps(keys)],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    at = {ended: (cpu_s, memory) for ended, cpu_s, memory in seen}
    before_end = TRIALS - 100  # with the last trials comes torch
    growth = (at[before_end][1] - at[200][1]) / (before_end - 200)
    first, last = (at[end][0] - at[end - 100][0] for end in (200, before_end))  # without the start
    files = [path for path in (tmp_path / "studies" / "long").rglob("*") if path.is_file()]
    print(f"{growth / 1000:.1f} KB a trial; {len(files)} files; a trial takes {last / first:.2f} times the work")
    print(f"{at[TRIALS][1] / 2**20:.0f} MiB at the end")
    assert growth < GROWTH_LIMIT_BYTES
    assert len(files) < 20
    assert last < 2.5 * first  # a suggestion looks at all trials before it
    study = open_study(tmp_path / "studies" / "long")
    assert [row.trial for row in study.rows()] == list(range(TRIALS))
    assert len(part_files(study.path, "trials")) == 1
    assert pa.compute.all(pa.compute.not_equal(study.trials()["state"], "RUNNING")).as_py()
    assert not re.search("warning", done.stderr, re.I)
