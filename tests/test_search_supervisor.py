"""The entry point of a submitted study: what ends a driver, and what becomes of it then."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from report_studies import made_up_study

import search.supervisor
from search.supervisor import MAX_FRUITLESS_ENDS, storage_on_cluster

SUPERVISOR = """
import os, sys
from pathlib import Path
import search.supervisor as supervisor
supervisor.VAESEARCH = (sys.executable, {script!r})
supervisor.RESTART_AFTER_S = 0.01
supervisor.FORWARD_AFTER_S = {forward_after_s}
say = lambda text: print(text, flush=True)
sys.exit(supervisor.supervise(Path({study!r}), {storage!r}, {extend}, say))
"""
DIES = "import os, signal; print('at work', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
COUNTS_SIGNALS = """
import os, signal, sys, time
counted = []
signal.signal(signal.SIGTERM, lambda *_: counted.append(1))
print("at work", flush=True)
while not counted:
    time.sleep(0.01)
time.sleep(0.6)
print("interrupted by", len(counted), flush=True)
sys.exit(143)
"""


class Place(NamedTuple):
    study_file: Path
    script: Path
    storage: Path

    def start(self, script: str, extend: int = 0, forward_after_s: float = 60) -> subprocess.Popen[str]:
        """The supervisor, in a process of its own, of a driver that is this script."""
        self.script.write_text(script)
        code = SUPERVISOR.format(
            script=str(self.script),
            study=str(self.study_file),
            storage=str(self.storage),
            extend=extend,
            forward_after_s=forward_after_s,
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    def end(self, script: str, extend: int = 0) -> tuple[int, list[str]]:
        process = self.start(script, extend)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said.splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    study_file = tmp_path / "study.toml"
    study_file.write_text('name = "study"')
    return Place(study_file, tmp_path / "driver.py", tmp_path / "there")


@pytest.fixture
def running(place: Place) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_the_results_lie_where_the_study_says_else_where_the_cluster_does_else_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("VAESEARCH_STORAGE", raising=False)
    assert storage_on_cluster(None) == "/home/somebody/vaesearch-studies"
    monkeypatch.setenv("VAESEARCH_STORAGE", "/results")
    assert storage_on_cluster(None) == "/results"
    assert storage_on_cluster("s3://bucket/studies") == "s3://bucket/studies"


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_drivers_own_end_is_that_of_the_supervisor(place, code):
    assert place.end(f"print('at work'); raise SystemExit({code})") == (code, ["at work"])


def test_the_driver_is_run_with_the_study_its_storage_and_the_address_of_its_cluster(place):
    code, (said,) = place.end(
        "import os, sys; print(*sys.argv[1:], os.environ['VAESEARCH_SUPERVISED'] == str(os.getppid()))"
    )
    assert code == 0
    assert said == f"run {place.study_file} --storage {place.storage} --address auto True"


def test_a_killed_driver_is_started_again_until_it_is_plain_that_it_gets_nowhere(place):
    code, said = place.end(DIES)
    assert code == 128 + signal.SIGKILL
    assert said.count("at work") == MAX_FRUITLESS_ENDS
    assert said.count("the driver was ended by SIGKILL; starting it again") == MAX_FRUITLESS_ENDS - 1
    assert "giving up" in said[-1]


def test_trials_that_ended_meanwhile_give_it_all_its_starts_again(place, tmp_path):
    made_up_study(tmp_path / "made" / "study", trials=3, compared=False)
    made_up_study(tmp_path / "more" / "study", trials=6, compared=False)
    script = f"""
import os, shutil
starts = {str(tmp_path / "starts")!r}
with open(starts, "a") as file:
    file.write("x")
number = os.path.getsize(starts)
made = {{2: "/made", 4: "/more"}}.get(number)
if made is not None:
    shutil.copytree({str(tmp_path)!r} + made, {str(place.storage)!r}, dirs_exist_ok=True)
{DIES}
"""
    code, said = place.end(script)
    assert code == 128 + signal.SIGKILL
    assert said.count("at work") == 3 + MAX_FRUITLESS_ENDS  # the fourth start was the last that brought anything


def test_a_signal_that_somebody_sent_the_driver_on_purpose_ends_it(place):
    code, said = place.end(DIES.replace("SIGKILL", "SIGTERM"))
    assert code == 128 + signal.SIGTERM
    assert said == ["at work", "interrupted before the driver was at work"]


def test_of_the_signals_that_ray_sends_to_both_the_driver_hears_one(place, running):
    process = place.start(COUNTS_SIGNALS)
    running.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    for pid in (process.pid, child_of(process.pid)):
        os.kill(pid, signal.SIGTERM)
    assert process.stdout.read() == "interrupted by 1\n"
    assert process.wait(30) == 143


def test_a_signal_to_the_supervisor_alone_is_passed_on_after_a_while(place, running):
    process = place.start(COUNTS_SIGNALS, forward_after_s=0.2)
    running.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.read() == "interrupted by 1\n"
    assert process.wait(30) == 143
    assert time.monotonic() - sent >= 0.7


def test_a_driver_that_needs_long_to_write_all_it_knows_is_given_a_minute():
    assert search.supervisor.FORWARD_AFTER_S >= 60


@pytest.mark.parametrize("when", ["before it was at work", "at work"])
def test_a_driver_whose_supervisor_was_killed_ends_as_after_one_signal(place, running, when):
    waits = "while os.getppid() == supervisor: time.sleep(0.01)" if when == "before it was at work" else ""
    script = f"""
import os, time
supervisor = os.getppid()
import search.supervisor
print("started", flush=True)
{waits}
{COUNTS_SIGNALS.replace('print("at work"', 'search.supervisor.end_with_supervisor(); print("at work"')}
"""
    process = place.start(script)
    running.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    if when == "at work":
        assert process.stdout.readline() == "at work\n"
    process.kill()
    assert process.stdout.read().splitlines()[-1] == "interrupted by 1"  # and nobody holds the pipe any more


def test_an_extension_is_asked_for_until_the_study_has_noted_it(place, tmp_path):
    made_up_study(place.storage / "study", trials=6, compared=False)
    noted = made_up_study(tmp_path / "more" / "study", trials=6, asked=10, compared=False).path / "study.toml"
    script = f"""
import os, shutil, sys
print(*sys.argv[1:][5:], flush=True)
starts = {str(tmp_path / "starts")!r}
with open(starts, "a") as file:
    file.write("x")
if os.path.getsize(starts) == 3:
    raise SystemExit(0)
if os.path.getsize(starts) == 2:
    shutil.copyfile({str(noted)!r}, {str(place.storage / "study" / "study.toml")!r})
os.kill(os.getpid(), 9)
"""
    code, said = place.end(script, extend=4)
    assert code == 0
    assert [line for line in said if "ended by" not in line] == ["auto --extend 4", "auto --extend 4", "auto"]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
