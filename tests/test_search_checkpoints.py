"""The store of trials' states: what was put last is what is read, whole, until it is dropped."""

import os
import subprocess
import sys
import threading

from search.checkpoints import CheckpointStore


def test_what_was_put_last_is_read_also_by_another_store_of_the_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.read(3) is None
    store.put(3, b"first")
    store.put(3, b"second, longer")
    store.put(12, b"")
    assert store.read(3) == b"second, longer"
    other = CheckpointStore(str(tmp_path / "checkpoints"))  # type: ignore[arg-type]  # Ray's actor is given either
    assert (other.read(3), other.read(12), other.read(4)) == (b"second, longer", b"", None)


def test_nothing_is_made_before_something_is_put(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.begin(0)
    store.drop(0)
    store.clear()
    assert store.trials() == []
    assert list(tmp_path.iterdir()) == []


def test_begin_counts_the_attempts_of_each_trial_and_hands_out_its_state(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.begin(0) == (1, None)
    store.put(0, b"rung")
    assert store.begin(0) == (2, b"rung")
    assert store.begin(1) == (1, None)
    assert store.begin(0) == (3, b"rung")
    assert CheckpointStore(tmp_path).begin(0) == (1, b"rung")


def test_a_dropped_state_is_gone_and_the_others_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    for trial in (0, 5, 123456):
        store.put(trial, str(trial).encode())
    assert store.trials() == [0, 5, 123456]
    store.drop(5)
    store.drop(5)
    assert store.trials() == [0, 123456]
    assert store.read(5) is None
    assert store.read(123456) == b"123456"


def test_files_of_other_names_are_no_states(tmp_path):
    store = CheckpointStore(tmp_path)
    store.put(1, b"x")
    for name in ("trial-00002.pt.tmp", "trial-x.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert store.trials() == [1]


def test_clear_removes_states_leftovers_and_the_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.put(0, b"x")
    (store.folder / "trial-00001.pt.tmp").write_bytes(b"half")
    store.clear()
    store.clear()
    assert list(tmp_path.iterdir()) == []
    store.put(0, b"again")
    assert store.read(0) == b"again"


def test_a_reader_sees_one_whole_state_or_the_other_at_every_instant(tmp_path):
    store, states = CheckpointStore(tmp_path), {b"a" * 200_000, b"b" * 300_000}
    store.put(0, next(iter(states)))
    over, seen = threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            seen.add(CheckpointStore(tmp_path).read(0))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(40):
        for state in states:
            store.put(0, state)
    over.set()
    reader.join()
    assert seen == states


FULL_DISK = """
import resource, sys
from pathlib import Path
from search.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
store.put(0, b"old" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    store.put(0, b"new" * 10_000)
except OSError as error:
    print(error.strerror)
"""


def test_a_put_that_fails_halfway_leaves_the_last_whole_state(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.strip() == os.strerror(27)
    store = CheckpointStore(tmp_path)
    assert store.read(0) == b"old" * 1000
    assert store.trials() == [0]
