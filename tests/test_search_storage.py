"""Local folders and object storage answer alike. The remote side is a real S3 server on loopback."""

import os
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_search_ledger import trial_row

import search.writer
from search.lease import Lease, LeaseHeld
from search.ledger import Ledger
from search.storage import (
    Location,
    RemotePath,
    StorageFailed,
    check_writable,
    fetch_tree,
    free_bytes,
    location,
    reason_of,
    replace_tree,
    restore_tree,
    write_atomically,
)
from search.tables import read_trials
from search.writer import BackgroundWriter, Patience, Write
from vae.config import InputError


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A place with nothing in it."""
    if request.param == "local":
        return tmp_path / "place"
    return location(request.getfixturevalue("s3_url")) / request.node.name


def put(path: Location, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def test_a_file_is_written_read_replaced_and_removed(place):
    file = place / "a.bin"
    assert not file.exists()
    assert not file.is_file()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    for content in (b"", b"first", b"x" * 300_000):
        put(file, content)
        assert file.read_bytes() == content
    assert file.is_file()
    assert (file.name, file.parent) == ("a.bin", place)
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    assert not file.exists()


def test_globs_go_level_by_level(place):
    for name in ("one/study.toml", "two/study.toml", "two/trials/part-1.parquet", "three/other.txt", "study.toml"):
        put(place / name, b"x")
    assert sorted(str(path.parent.name) for path in place.glob("*/study.toml")) == ["one", "two"]
    assert [path.name for path in (place / "two").glob("trials/part-*.parquet")] == ["part-1.parquet"]
    assert list((place / "nowhere").glob("*")) == []
    assert sorted(path.name for path in place.iterdir()) == ["one", "study.toml", "three", "two"]
    assert (place / "two").is_dir()


def test_a_file_is_renamed(place):
    put(place / "a", b"x")
    (place / "a").rename(place / "b")  # type: ignore[arg-type]
    assert not (place / "a").exists()
    assert (place / "b").read_text() == "x"


def test_a_tree_replaces_another_and_is_fetched(place, tmp_path):
    target = place / "models"
    for number in (1, 2):
        source = tmp_path / f"source-{number}"
        for name in ("1-trial-7", f"2-trial-{number}"):
            (source / name).mkdir(parents=True)
            (source / name / "config.json").write_text(f"config {number}")
            (source / name / "weights").write_text(f"weights {number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_tree(source, target, last="config.json")
        assert sorted(path.parent.name for path in target.glob("*/config.json")) == ["1-trial-7", f"2-trial-{number}"]
        assert (target / "1-trial-7" / "weights").read_text() == f"weights {number}"
    assert [path.name for path in place.iterdir()] == ["models"]
    here = fetch_tree(target / "1-trial-7", tmp_path / "fetched")
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "weights"]
    assert (here / "config.json").read_text() == "config 2"
    (tmp_path / "nothing").mkdir()
    replace_tree(tmp_path / "nothing", target, last="config.json")
    restore_tree(target)
    assert list(target.glob("*/config.json")) == []


def test_a_tree_would_outlast_a_power_cut(tmp_path, monkeypatch):
    fsync, synced = os.fsync, set[int]()

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    source, target = tmp_path / "source", tmp_path / "place" / "models"
    (source / "1-trial-7").mkdir(parents=True)
    (source / "1-trial-7" / "weights").write_text("weights")
    target.parent.mkdir()
    replace_tree(source, target, last="config.json")
    assert {path.stat().st_ino for path in (target.parent, target, *target.rglob("*"))} <= synced


def test_a_place_that_can_be_written_is_left_as_it_was(place):
    check_writable(place)
    assert not place.exists()


def test_the_ledger_and_the_lease_work_there(place):
    ledger = Ledger(place)
    assert ledger.start_trial(trial_row(0, "RUNNING"))
    ledger.end_trial(trial_row(0))
    assert ledger.flush(timeout_s=100)
    assert [row.state for row in read_trials(place)] == ["COMPLETE"]
    lease = Lease(place)
    assert lease.acquire() is None
    assert lease.path.is_file()
    lease.release()
    assert not lease.path.exists()


# ---- the remote side alone


def test_of_two_drivers_that_take_a_remote_lease_at_once_one_is_refused(s3_url, monkeypatch):
    """There is no lock there: who wrote last has it, and the other finds that out before it begins."""
    place = location(s3_url) / "contested"
    leases = [Lease(place), Lease(place)]
    for host, lease in zip(("one", "two"), leases, strict=True):
        monkeypatch.setattr(lease, "_me", type(lease._me)(host, 1, time.time()))
    got: dict[str, str] = {}

    def take(lease: Lease) -> None:
        try:
            lease.acquire()
            got[lease._me.host] = "taken"
        except LeaseHeld as error:
            got[lease._me.host] = str(error)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text == "taken" for text in got.values()) == [False, True]
    (loser,) = (text for text in got.values() if text != "taken")
    assert "another --name" in loser


def test_a_remote_path_travels_to_another_process_as_its_url(s3_url):
    path = location(s3_url) / "a" / "b"
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert str(again).split("?")[0].endswith("/a/b")
    assert str(location(str(path))) == str(path)
    assert len({path, again}) == 1
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in pickle.dumps(path).decode("latin-1")


def test_a_bucket_that_is_not_there_is_an_input_error_in_one_line(s3_url):
    other = location(s3_url.replace("s3://bucket", "s3://no-such-bucket"))
    with pytest.raises(InputError, match="NO_SUCH_BUCKET") as caught:
        check_writable(other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/studies", "s3://bucket/studies?access_key=key&secret_key=secret"]
)
def test_keys_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID") as caught:
        location(url)
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


def test_an_unknown_kind_of_storage_is_an_input_error():
    with pytest.raises(InputError, match="s4"):
        location("s4://bucket/studies")


def test_a_file_url_is_a_local_path(tmp_path):
    assert location(f"file://{tmp_path}") == tmp_path
    assert location(tmp_path) is tmp_path or location(tmp_path) == tmp_path
    assert not isinstance(location("studies"), RemotePath)


def test_how_much_room_is_left_is_known_of_disks_alone(tmp_path, s3_url):
    assert free_bytes(tmp_path / "not" / "yet") > 0  # type: ignore[operator]
    assert free_bytes(location(s3_url)) is None


# ---- the writer in the background


def write_of(path: Path, content: bytes, rank: int = 0) -> Write:
    return Write(path, rank, lambda: content)


def test_lower_ranks_are_written_first_and_the_newest_content_wins(tmp_path):
    order: list[str] = []
    go = threading.Event()

    def content(name: str, text: bytes) -> bytes:
        if name == "gate":
            go.wait()
        order.append(name)
        return text

    def write(name: str, rank: int, text: bytes) -> Write:
        return Write(tmp_path / name, rank, lambda: content(name, text))

    writer = BackgroundWriter()
    writer.put([write("gate", 0, b"")])
    time.sleep(0.05)
    writer.put([write("trials", 2, b"old"), write("epochs", 1, b"old")])
    last = writer.put([write("trials", 2, b"new"), write("epochs", 1, b"new")])
    assert not writer.wait(last, timeout_s=0.05)
    assert not writer.is_idle
    go.set()
    assert writer.wait(last, timeout_s=100)
    assert writer.is_idle
    assert order == ["gate", "epochs", "trials"]
    assert (tmp_path / "trials").read_bytes() == b"new"


def test_what_cannot_be_written_is_tried_until_it_can_and_the_main_thread_waits_no_longer_than_it_wants(tmp_path):
    writer = BackgroundWriter()
    writer._retry_every_s = 0.02
    missing = tmp_path / "not yet"
    ticket = writer.put([write_of(missing / "a", b"first", rank=0), write_of(tmp_path / "b", b"first", rank=1)])
    assert not writer.wait(ticket, timeout_s=0.1)
    deadline = time.monotonic() + 100
    while writer.error is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert writer.error == os.strerror(2)
    assert not (tmp_path / "b").exists()  # what is of a lower rank must be there before it
    newer = writer.put([write_of(missing / "a", b"second", rank=0)])
    missing.mkdir()
    assert writer.wait(newer, timeout_s=100)
    assert writer.error is None
    assert (missing / "a").read_bytes() == b"second"
    assert (tmp_path / "b").read_bytes() == b"first"


def test_a_writer_that_was_closed_writes_nothing_more_also_when_the_storage_is_there_again(tmp_path):
    """Another driver may have gone on meanwhile: what was old then would take its place."""
    writer = BackgroundWriter()
    writer._retry_every_s = 0.05
    writer.put([write_of(tmp_path / "not yet" / "a", b"old")])
    assert not writer.wait(timeout_s=0.1)
    writer.close()
    (tmp_path / "not yet").mkdir()
    (tmp_path / "not yet" / "a").write_bytes(b"new")
    time.sleep(0.3)
    assert (tmp_path / "not yet" / "a").read_bytes() == b"new"


def test_a_fault_that_is_not_the_storages_is_raised_to_who_waits(tmp_path):
    def broken() -> bytes:
        raise KeyError("a bug")

    writer = BackgroundWriter()
    ticket = writer.put([Write(tmp_path / "a", 0, broken)])
    with pytest.raises(KeyError, match="a bug"):
        writer.wait(ticket)
    with pytest.raises(KeyError, match="a bug"):
        writer.put([])


def test_patience_says_so_once_says_when_it_works_again_and_gives_up_in_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    said: list[str] = []
    patience = Patience(tmp_path, 60.0, said.append)
    patience.look([None, None])
    assert said == []
    for _ in range(3):
        patience.look([None, "No space left on device"])
    assert len(said) == 1
    assert "No space left on device" in said[0]
    patience.look([None, None])
    assert len(said) == 2
    patience.look(["again", None])
    now[0] += 59.0
    patience.look(["again", None])
    now[0] += 1.0
    with pytest.raises(StorageFailed, match="again") as caught:
        patience.look(["again", None])
    assert "the same command" in str(caught.value)


def test_reasons_are_one_line():
    assert reason_of(OSError(28, "No space left on device", "/somewhere")) == "No space left on device"
    assert reason_of(OSError("first\nsecond")) == "first second"
    assert reason_of(OSError()) == "OSError"
