"""One driver a study: of two, the second is told who the first is; of dead ones, none stands in the way."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from search import lease as lease_module
from search.lease import STALE_AFTER_S, Lease, LeaseHeld
from search.writer import BackgroundWriter
from vae.config import InputError

HOLD = """
import sys
from pathlib import Path
from search.lease import Lease
lease = Lease(Path(sys.argv[1]))
lease.acquire()
print("held", flush=True)
sys.stdin.readline()
"""
RACE = """
import multiprocessing, sys
from pathlib import Path
from search.lease import Lease, LeaseHeld

def take(folder, rounds, barrier, got):
    for number in range(rounds):
        study = Path(folder) / str(number)
        barrier.wait()
        try:
            Lease(study).acquire()
        except LeaseHeld:
            pass
        else:
            with got.get_lock():
                got[number] += 1
        barrier.wait()

if __name__ == "__main__":
    folder, rounds, processes = sys.argv[1], int(sys.argv[2]), 4
    context = multiprocessing.get_context("fork")
    barrier, got = context.Barrier(processes), context.Array("i", rounds)
    for number in range(rounds):
        (Path(folder) / str(number)).mkdir()
    workers = [context.Process(target=take, args=(folder, rounds, barrier, got)) for _ in range(processes)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    print(*got)
"""


def start_holder(study: Path) -> subprocess.Popen[str]:
    """Another process, which takes the lease and says so, or is refused."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(study)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def held_elsewhere(study: Path) -> Iterator[subprocess.Popen[str]]:
    """The lease of a study in the hands of another living process."""
    holder = start_holder(study)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def write_lease(study: Path, **values: object) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
    (study / "lease.json").write_text(json.dumps(holder | values))


def holder_of(study: Path) -> int:
    return int(json.loads((study / "lease.json").read_text())["pid"])


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_second_driver_is_refused_by_process_and_host(tmp_path):
    with held_elsewhere(tmp_path) as holder:
        for attempt in (Lease(tmp_path).check, Lease(tmp_path).acquire):
            with pytest.raises(LeaseHeld) as caught:
                attempt()
            message = str(caught.value)
            assert str(tmp_path) in message
            assert str(holder.pid) in message
            assert socket.gethostname() in message
            assert "--name" in message
        assert holder_of(tmp_path) == holder.pid  # the refused one has not touched it


def test_being_refused_is_an_input_error():
    assert issubclass(LeaseHeld, InputError)


def test_the_lease_of_a_killed_driver_is_taken_over(tmp_path):
    with held_elsewhere(tmp_path) as holder:
        holder.kill()
        holder.wait()
        Lease(tmp_path).acquire()
    assert holder_of(tmp_path) == os.getpid()


def test_a_dead_process_is_no_obstacle_however_fresh_its_heartbeat(tmp_path):
    write_lease(tmp_path, pid=dead_pid())
    Lease(tmp_path).acquire()
    assert holder_of(tmp_path) == os.getpid()


def test_another_host_holds_as_long_as_it_is_heard(tmp_path):
    write_lease(tmp_path, host="elsewhere", heartbeat=time.time() - STALE_AFTER_S / 2)
    with pytest.raises(LeaseHeld, match="elsewhere"):
        Lease(tmp_path).acquire()


def test_another_host_not_heard_for_long_is_taken_over(tmp_path):
    write_lease(tmp_path, host="elsewhere", heartbeat=time.time() - STALE_AFTER_S - 1)
    Lease(tmp_path).acquire()
    assert holder_of(tmp_path) == os.getpid()


@pytest.mark.parametrize("text", ["", "{", '{"host": "a"', "[]", "3", '{"host": "a", "pid": null}', "\x00\x00"])
def test_a_torn_lease_does_not_block(text, tmp_path):
    (tmp_path / "lease.json").write_text(text)
    Lease(tmp_path).acquire()
    assert holder_of(tmp_path) == os.getpid()


def test_a_process_may_take_its_own_lease_again(tmp_path):
    Lease(tmp_path).acquire()
    Lease(tmp_path).acquire()


def test_release_leaves_nothing_and_lets_the_next_one_in(tmp_path):
    lease = Lease(tmp_path)
    lease.acquire()
    lease.release()
    assert list(tmp_path.iterdir()) == []
    lease.release()
    with held_elsewhere(tmp_path):
        pass


def test_a_heartbeat_renews_now_and_then_and_keeps_the_file_whole(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    lease = Lease(tmp_path)
    lease.acquire()
    write_lease(tmp_path, heartbeat=1.0)
    assert not lease.is_due
    now[0] += lease_module.HEARTBEAT_EVERY_S
    assert lease.is_due
    writer = BackgroundWriter()
    writer.wait(writer.put([lease.heartbeat()]))
    assert not lease.is_due
    assert json.loads(lease.path.read_text())["heartbeat"] == pytest.approx(time.time(), abs=30)
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_heartbeat_comes_well_before_a_lease_is_stale():
    assert lease_module.HEARTBEAT_EVERY_S * 3 < STALE_AFTER_S


def test_of_two_that_meet_between_check_and_taking_exactly_one_gets_the_lease(tmp_path, monkeypatch):
    lease, check = Lease(tmp_path), Lease.check
    others: list[subprocess.Popen[str]] = []

    def check_then_lose_time() -> None:
        check(lease)
        if not others:
            others.append(start_holder(tmp_path))
            assert others[0].stdout is not None
            select.select([others[0].stdout], [], [], 1.5)  # until it has the lease, or for as long as we keep it out

    monkeypatch.setattr(lease, "check", check_then_lose_time)
    try:
        lease.acquire()
    except LeaseHeld:
        ours = False
    else:
        ours = True
    try:
        assert others[0].stdout is not None
        assert ours != (others[0].stdout.readline() == "held\n")
    finally:
        others[0].kill()
        others[0].communicate()


def test_of_four_processes_at_the_same_instant_exactly_one_gets_the_lease(tmp_path):
    script = tmp_path / "race.py"
    script.write_text(RACE)
    folder = tmp_path / "studies"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "300"], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) == {"1"}


def test_a_living_process_on_this_host_holds_however_long_it_was_stopped(tmp_path):
    with held_elsewhere(tmp_path) as holder:
        lease = json.loads((tmp_path / "lease.json").read_text())
        (tmp_path / "lease.json").write_text(json.dumps(lease | {"heartbeat": time.time() - 2 * STALE_AFTER_S}))
        with pytest.raises(LeaseHeld, match=str(holder.pid)):
            Lease(tmp_path).acquire()


def test_a_later_process_with_the_number_of_the_holder_does_not_hold(tmp_path):
    with held_elsewhere(tmp_path):
        lease = json.loads((tmp_path / "lease.json").read_text())
        if lease["started"] is None:
            pytest.skip("this system does not tell when a process began")
        (tmp_path / "lease.json").write_text(json.dumps(lease | {"started": "1"}))
        Lease(tmp_path).acquire()
        assert holder_of(tmp_path) == os.getpid()


def test_a_driver_whose_study_was_taken_hears_of_it_and_leaves_the_lease_alone(tmp_path):
    mine = Lease(tmp_path)
    mine.acquire()
    mine.path.unlink()
    with held_elsewhere(tmp_path) as holder:
        writer = BackgroundWriter()
        writer.put([mine.heartbeat()])
        with pytest.raises(LeaseHeld):
            writer.wait()
        with pytest.raises(LeaseHeld):  # nothing more is written by a driver that has lost its study
            writer.put([])
        mine.release()
        assert holder_of(tmp_path) == holder.pid
