"""The store of trials' states: the newest whole one is what is read, until it is dropped, also from a dying disk."""

import json
import os
import subprocess
import sys
import threading
import time

from search.checkpoints import CheckpointStore, StoreServer


def files_of(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_was_put_last_is_read_also_by_another_store_of_the_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest(3) == (0, None, "")
    store.put(3, 2, b"first")
    store.put(3, 4, b"second, longer")
    store.put(12, 1, b"")
    assert store.newest(3) == (4, b"second, longer", "")
    other = CheckpointStore(str(tmp_path / "checkpoints"))  # type: ignore[arg-type]  # Ray's actor is given either
    assert (other.newest(3).state, other.newest(12).state, other.newest(4).state) == (b"second, longer", b"", None)


def test_nothing_is_made_before_something_is_put(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.newest(0)
    store.drop(0)
    store.clear()
    assert store.trials() == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_the_stores_stays_as_it_is_cleared(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.put(0, 1, b"one")
    (store.folder / ".trial-00000.epoch-00002.pt.tmp").write_bytes(b"cut o")
    (store.folder / "epoch=3.ckpt").write_bytes(b"mine")
    (store.folder / "trial-00000").mkdir()
    store.clear()
    assert files_of(store) == ["epoch=3.ckpt", "trial-00000"]


def test_the_newest_state_and_the_one_before_are_kept_and_no_more(tmp_path):
    store = CheckpointStore(tmp_path)
    for epoch in (3, 9, 27, 60):
        store.put(1, epoch, str(epoch).encode())
    assert files_of(store) == ["trial-00001.epoch-00027.pt", "trial-00001.epoch-00060.pt"]
    again = CheckpointStore(tmp_path)
    again.put(1, 60, b"again")  # a trial that went on from an older state comes by once more
    assert again.newest(1) == (60, b"again", "")
    assert len(files_of(store)) == 2


def test_a_state_that_is_not_what_was_written_is_passed_over_for_the_one_before_and_that_is_told(tmp_path):
    store = CheckpointStore(tmp_path)
    store.put(0, 3, b"three" * 100)
    store.put(0, 9, b"nine" * 100)
    older, newest = sorted(tmp_path.iterdir())
    whole = newest.read_bytes()
    for damage in (whole[:200], whole[:-1] + b"x", b"", b"x" + whole[1:]):
        newest.write_bytes(damage)
        found = CheckpointStore(tmp_path).newest(0)
        assert (found.epoch, found.state) == (3, b"three" * 100)
        assert "epoch 9" in found.damaged
        assert "checksum" in found.damaged
    older.write_bytes(b"")
    found = CheckpointStore(tmp_path).newest(0)
    assert (found.epoch, found.state) == (0, None)
    assert "epoch 9" in found.damaged
    assert "epoch 3" in found.damaged
    newest.unlink()
    assert "epoch 9" in store.newest(0).damaged  # also one that somebody took away


def test_a_state_that_is_of_no_use_can_be_removed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.put(0, 3, b"three")
    store.put(0, 9, b"nine")
    store.remove(0, 9)
    store.remove(0, 9)
    assert store.newest(0) == (3, b"three", "")


def test_a_dropped_state_is_gone_and_the_others_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    for trial in (0, 5, 123456):
        store.put(trial, 1, str(trial).encode())
        store.put(trial, 2, str(trial).encode())
    assert store.trials() == [0, 5, 123456]
    store.drop(5)
    store.drop(5)
    assert store.trials() == [0, 123456]
    assert store.newest(5).state is None
    assert store.newest(123456).state == b"123456"
    assert not any("00005" in name for name in files_of(store))


def test_files_of_other_names_are_no_states(tmp_path):
    CheckpointStore(tmp_path).put(1, 1, b"x")
    for name in ("trial-00002.epoch-00001.pt.tmp", "trial-x.epoch-1.pt", "trial-00003.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert CheckpointStore(tmp_path).trials() == [1]


def test_clear_removes_states_leftovers_and_the_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.put(0, 1, b"x")
    (store.folder / ".trial-00001.epoch-00001.pt.tmp").write_bytes(b"half")  # type: ignore[union-attr]
    store.clear()
    store.clear()
    assert list(tmp_path.iterdir()) == []
    store.put(0, 1, b"again")
    assert store.newest(0).state == b"again"


def test_a_reader_sees_one_whole_state_or_the_other_at_every_instant(tmp_path):
    store, states = CheckpointStore(tmp_path), {b"a" * 200_000, b"b" * 300_000}
    store.put(0, 1, next(iter(states)))
    over, seen = threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            seen.add(CheckpointStore(tmp_path).newest(0)[1:])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(40):
        for state in states:
            store.put(0, 1, state)
    over.set()
    reader.join()
    assert seen == {(state, "") for state in states}


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from search.checkpoints import CheckpointStore

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

store, found = CheckpointStore(Path(sys.argv[1])), {}
store.put(0, 3, b"old" * 1000)
limit(10_000)
store.put(0, 9, b"new" * 10_000)
found["error"] = store.error
found["on disk"] = CheckpointStore(store.folder).newest(0).epoch
found["here"] = store.newest(0).epoch
store.retry()
found["still"] = store.error
limit(resource.RLIM_INFINITY)
store.retry()
found["then"] = store.error
found["on disk then"] = CheckpointStore(store.folder).newest(0).epoch
print(json.dumps(found))
"""


def test_a_state_that_the_disk_refuses_is_kept_and_written_when_there_is_room(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    full = os.strerror(27)
    assert json.loads(done.stdout) == {
        "error": full,
        "on disk": 3,
        "here": 9,
        "still": full,
        "then": None,
        "on disk then": 9,
    }
    assert CheckpointStore(tmp_path).newest(0).state == b"new" * 10_000


def test_an_older_state_that_is_tried_again_does_not_take_the_place_of_a_newer_one(tmp_path):
    store = CheckpointStore(tmp_path / "not yet" / "checkpoints")
    (tmp_path / "not yet").write_bytes(b"")  # a file where the folder should be: nothing can be written
    store.put(0, 9, b"nine")
    store.put(0, 3, b"three")  # as a retry that was under way when the newer one came
    assert store.error is not None
    assert store.newest(0) == (9, b"nine", "")
    (tmp_path / "not yet").unlink()
    store.put(0, 3, b"three")
    assert store.newest(0) == (9, b"nine", "")
    store.retry()
    assert store.error is None
    assert CheckpointStore(store.folder).newest(0) == (9, b"nine", "")


def test_the_server_tells_for_how_long_a_worker_was_not_heard(tmp_path):
    server = StoreServer(tmp_path)
    assert server.report().silent_s == {}
    server.newest(3)
    server.put(4, 1, b"x")
    time.sleep(0.05)
    server.beat(4)
    report = server.report()
    assert report.error is None
    assert report.silent_s[3] - report.silent_s[4] >= 0.05
    assert report.silent_s[4] >= 0
    server.drop(3)
    assert set(server.report().silent_s) == {4}
