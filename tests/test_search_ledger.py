"""The Parquet tables: whoever reads them, whenever, and wherever the writer dies, sees each row once and whole."""

import json
import math
import os
import random
import subprocess
import sys
import time
import typing
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import NoneType
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import ledger as ledger_module
from search import storage as storage_module
from search.ledger import Ledger, TableWriter
from search.storage import write_atomically
from search.tables import (
    EPOCHS,
    SCHEMA_VERSION,
    TRIALS,
    EpochRow,
    TrialRow,
    part_files,
    read_table,
    read_trials,
    to_rows,
    to_table,
)

NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def trial_row(number: int, state: str = "COMPLETE", **values: Any) -> TrialRow:
    defaults: dict[str, Any] = {
        "study": "s",
        "status": None if state == "RUNNING" else "ok",
        "activation": "silu",
        "dropout": 0.1,
        "learning_rate": 1e-3,
        "latent_dim": 4,
        "hidden_dims": [8, 8],
        "batch_size": 32,
        "seed": number,
        "max_epochs": 3,
        "suggested_at": NOON,
        "ended_at": None if state == "RUNNING" else NOON,
    }
    return TrialRow(trial=number, state=state, **(defaults | values))


def epoch_row(trial: int, epoch: int, **values: Any) -> EpochRow:
    figures = {f.name: 1.0 for f in fields(EpochRow) if f.type in (float, "float")}
    counts = {"attempt": 1, "active_units": 2, "clipped_steps": 0, "skipped_steps": 0}
    known = {"study": "s", "trial": trial, "epoch": epoch, "reported_at": NOON}
    return EpochRow(**(figures | counts | known | values))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ledger_module, "ROWS_A_PART", 3)
    return 3


def rows_by_part(study: Path, table: str = "trials") -> list[list[int]]:
    return [pq.read_table(part)["trial"].to_pylist() for part in part_files(study, table)]


# ---- the schema

ARROW_OF = {
    str: [pa.string()],
    int: [pa.int32(), pa.int64()],
    float: [pa.float64()],
    datetime: [pa.timestamp("us", tz="UTC")],
    list[int]: [pa.list_(pa.int64())],
}


@pytest.mark.parametrize(("row_type", "schema"), [(TrialRow, TRIALS), (EpochRow, EPOCHS)])
def test_the_schema_is_that_of_the_row_by_name_order_type_and_nullability(row_type, schema):
    hints = typing.get_type_hints(row_type)
    assert [f.name for f in fields(row_type)] == schema.names
    for field in schema:
        kinds = typing.get_args(hints[field.name]) if NoneType in typing.get_args(hints[field.name]) else ()
        (kind,) = [k for k in kinds if k is not NoneType] or [hints[field.name]]
        assert field.nullable == (NoneType in kinds), field.name
        assert field.type in ARROW_OF[kind], field.name


@pytest.mark.parametrize("table", ["trials", "epochs"])
def test_a_file_carries_its_table_and_schema_version(table, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.start_trial(trial_row(0, "RUNNING"))
    ledger.add_epochs([epoch_row(0, 1)])
    ledger.flush()
    (part,) = part_files(tmp_path, table)
    metadata = pq.read_schema(part).metadata
    assert metadata[b"vaesearch.table"] == table.encode()
    assert metadata[b"vaesearch.schema_version"] == SCHEMA_VERSION.encode()


def test_a_study_without_rows_reads_as_an_empty_table(tmp_path):
    assert read_table(tmp_path, "trials").equals(TRIALS.empty_table())
    assert read_trials(tmp_path) == []


@settings(deadline=None, max_examples=100)
@given(
    value=st.none() | st.floats(allow_nan=False, width=64),
    hidden=st.lists(st.integers(1, 2**31 - 1), max_size=4),
    seed=st.integers(0, 2**63 - 1),
    text=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    when=st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),
)
def test_a_row_comes_back_bit_for_bit(value, hidden, seed, text, when):
    row = trial_row(1, val_nelbo=value, hidden_dims=hidden, seed=seed, reason=text, suggested_at=when, ended_at=None)
    sink = pa.BufferOutputStream()
    pq.write_table(to_table([row], TRIALS), sink, compression="zstd")
    (back,) = to_rows(pq.read_table(pa.BufferReader(sink.getvalue()), schema=TRIALS), TrialRow)
    assert back == row
    assert back.suggested_at.utcoffset() == timedelta(0)


def test_a_time_of_another_zone_is_the_same_instant_in_utc():
    there = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    (back,) = to_rows(to_table([trial_row(0, suggested_at=there)], TRIALS), TrialRow)
    assert back.suggested_at == NOON
    assert back.suggested_at.utcoffset() == timedelta(0)


def test_figures_that_are_not_finite_are_kept_apart_from_unknown_ones(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add_epochs([epoch_row(0, 1, train_nelbo=math.nan, val_nelbo=math.inf)])
    ledger.end_trial(trial_row(0, val_nelbo=math.nan, objective=None))
    ledger.flush()
    row, epoch = read_trials(tmp_path)[0], read_table(tmp_path, "epochs").to_pylist()[0]
    assert math.isnan(row.val_nelbo)
    assert row.objective is None
    assert math.isnan(epoch["train_nelbo"])
    assert epoch["val_nelbo"] == math.inf


def test_pandas_duckdb_and_pyarrow_read_the_files_without_this_package(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(4):
        ledger.end_trial(trial_row(number, val_nelbo=number / 3, leaky_relu_slope=None, hidden_dims=[8] * number))
    ledger.flush()
    folder = tmp_path / "trials"
    glob = str(folder / "*.parquet")
    of_duckdb = duckdb.sql(f"SELECT trial, val_nelbo, hidden_dims FROM read_parquet('{glob}') ORDER BY 1").fetchall()
    assert of_duckdb == [(n, n / 3, [8] * n) for n in range(4)]
    of_pandas = pd.read_parquet(folder)
    assert of_pandas["val_nelbo"].tolist() == [n / 3 for n in range(4)]
    assert of_pandas["leaky_relu_slope"].isna().all()
    assert of_pandas["suggested_at"][0] == pd.Timestamp(NOON)
    assert pq.read_table(folder).column_names == TRIALS.names


# ---- one writer


def test_a_suggestion_is_on_disk_when_start_trial_returns(tmp_path):
    Ledger(tmp_path).start_trial(trial_row(0, "RUNNING"))
    assert [row.state for row in read_trials(tmp_path)] == ["RUNNING"]


def test_a_trial_that_ends_replaces_its_suggestion(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.start_trial(trial_row(0, "RUNNING"))
    ledger.end_trial(trial_row(0, "PRUNED"))
    ledger.flush()
    assert [row.state for row in read_trials(tmp_path)] == ["PRUNED"]


def test_a_tick_writes_what_has_waited_long_enough_and_no_sooner(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    ledger = Ledger(tmp_path)
    ledger.start_trial(trial_row(0, "RUNNING"))
    ledger.add_epochs([epoch_row(0, 1)])
    ledger.tick()
    now[0] += 1e-3
    ledger.end_trial(trial_row(0))
    ledger.tick()
    assert ledger.writer.wait()
    assert [row.state for row in read_trials(tmp_path)] == ["RUNNING"]
    now[0] += ledger_module.TRIALS_FLUSH_EVERY_S
    ledger.tick()
    assert ledger.writer.wait()
    assert [row.state for row in read_trials(tmp_path)] == ["COMPLETE"]
    assert read_table(tmp_path, "epochs").num_rows == 1


def test_epochs_that_are_there_already_are_not_added_again(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.start_trial(trial_row(0, "RUNNING"))
    assert len(ledger.add_epochs([epoch_row(0, 1), epoch_row(0, 2)])) == 2
    new = ledger.add_epochs([epoch_row(0, 2, attempt=2), epoch_row(0, 3, attempt=2)])
    assert [row.epoch for row in new] == [3]
    ledger.flush()
    reopened = Ledger(tmp_path)
    new = reopened.add_epochs([epoch_row(0, epoch, attempt=3) for epoch in (1, 2, 3, 4)])
    assert [row.epoch for row in new] == [4]
    reopened.flush()
    table = read_table(tmp_path, "epochs")
    assert list(zip(table["epoch"].to_pylist(), table["attempt"].to_pylist(), strict=True)) == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 3),
    ]


def test_parts_roll_over_when_full(tmp_path, small_parts):
    ledger = Ledger(tmp_path)
    for number in range(8):
        ledger.end_trial(trial_row(number))
        ledger.flush()
    assert rows_by_part(tmp_path) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_epoch_parts_roll_over_also_within_one_flush(tmp_path, small_parts):
    ledger = Ledger(tmp_path)
    ledger.add_epochs([epoch_row(0, epoch) for epoch in range(1, 9)])
    ledger.flush()
    assert [len(part) for part in rows_by_part(tmp_path, "epochs")] == [3, 3, 2]
    assert sorted(read_table(tmp_path, "epochs")["epoch"].to_pylist()) == list(range(1, 9))


def test_an_open_row_of_a_full_part_is_replaced_in_its_own_part(tmp_path, small_parts):
    ledger = Ledger(tmp_path)
    ledger.start_trial(trial_row(0, "RUNNING"))
    for number in range(1, 7):
        ledger.start_trial(trial_row(number, "RUNNING"))
        ledger.end_trial(trial_row(number))
        ledger.flush()
    before = [sorted(part) for part in rows_by_part(tmp_path)]
    assert before == [[0, 1, 2], [3, 4, 5], [6]]
    ledger.end_trial(trial_row(0, val_nelbo=5.0))
    ledger.flush()
    assert [sorted(part) for part in rows_by_part(tmp_path)] == before
    assert [row.state for row in read_trials(tmp_path)] == ["COMPLETE"] * 7
    assert read_trials(tmp_path)[0].val_nelbo == 5.0


def test_a_reopened_ledger_replaces_an_open_row_in_its_own_part(tmp_path, small_parts):
    first = Ledger(tmp_path)
    for number in range(7):
        first.start_trial(trial_row(number, "RUNNING"))
    for number in (1, 2, 3, 6):
        first.end_trial(trial_row(number))
    first.flush()
    second = Ledger(tmp_path)
    for number in (4, 0, 5):
        second.start_trial(trial_row(number, "RUNNING", attempts=1))
        second.end_trial(trial_row(number, attempts=2))
    second.end_trial(trial_row(7))
    second.flush()
    assert [sorted(part) for part in rows_by_part(tmp_path)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert {row.trial: row.attempts for row in read_trials(tmp_path)} == dict.fromkeys(range(8), 0) | {0: 2, 4: 2, 5: 2}


def test_a_part_without_open_rows_is_never_written_again(tmp_path, small_parts):
    ledger = Ledger(tmp_path)
    for number in range(3):
        ledger.end_trial(trial_row(number))
    ledger.flush()
    sealed = part_files(tmp_path, "trials")[0]
    before = sealed.stat()
    for reopen in (False, True):
        ledger = Ledger(tmp_path) if reopen else ledger
        ledger.end_trial(trial_row(3 + reopen))
        ledger.flush()
    after = sealed.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_many_small_flushes_leave_one_file_that_reads_back_in_order(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(ledger_module.MAX_CHUNKS * 2 + 5):
        ledger.end_trial(trial_row(number))
        ledger.flush()
    ((*numbers,),) = rows_by_part(tmp_path)
    assert numbers == list(range(ledger_module.MAX_CHUNKS * 2 + 5))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "settle", "replace", "flush", "reopen"]), st.integers(0, 11)), max_size=40
)


@settings(deadline=None, max_examples=60)
@given(operations=OPERATIONS)
def test_the_writer_agrees_with_a_dict_through_any_order_of_operations(operations, tmp_path_factory):
    """put, settle, flush and reopen at random; after each flush the disk holds what a dict would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "ROWS_A_PART", 3)
        patch.setattr(storage_module.os, "fsync", lambda fd: None)
        study = tmp_path_factory.mktemp("model")
        ledger, writer = Ledger(study), None
        model: dict[int, TrialRow] = {}
        home: dict[int, int] = {}
        for count, (operation, number) in enumerate([*operations, ("flush", 0)]):
            writer = ledger._trials
            is_open = number in model and model[number].state == "RUNNING"
            row = trial_row(number, "RUNNING", seed=count)
            if (operation == "put" and number not in model) or (operation == "replace" and is_open):
                writer.put(row)
                model[number] = row
            elif operation == "settle" and (number not in model or is_open):
                model[number] = trial_row(number, seed=count)
                writer.settle(model[number])
            elif operation in ("flush", "reopen"):
                ledger.flush()
                assert {r.trial: r for r in read_trials(study)} == model
                assert read_table(study, "trials").num_rows == len(model)
                parts = rows_by_part(study)
                assert all(len(part) == 3 for part in parts[:-1])
                for index, part in enumerate(parts):
                    assert all(home.setdefault(trial, index) == index for trial in part)
                assert not writer.changed()
                ledger = Ledger(study) if operation == "reopen" else ledger


def test_two_tables_of_one_writer_type_do_not_share_parts(tmp_path):
    one, other = TableWriter[TrialRow](tmp_path / "a", "trials"), TableWriter[TrialRow](tmp_path / "b", "trials")
    one.settle(trial_row(0))
    assert [write.path for write in one.changed()] == [tmp_path / "a" / "trials" / "part-00000.parquet"]
    assert not other.changed()


# ---- readers in another process, and crashes

WRITER = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from search import ledger as module
from search.tables import read_trials
sys.path.insert(0, {tests!r})
from test_search_ledger import epoch_row, trial_row

module.ROWS_A_PART = {rows_a_part}
module.EPOCHS_FLUSH_EVERY_S = module.TRIALS_FLUSH_EVERY_S = 0
study = Path({study!r})
done = {{row.trial: row.state for row in read_trials(study)}}
ledger = module.Ledger(study)

def say(text):
    os.write(1, (text + chr(10)).encode())

for number in range({count}):
    if done.get(number) == "COMPLETE":
        continue
    ledger.start_trial(trial_row(number, "RUNNING"))
    say(f"started {{number}}")
    if number % 4 == 0 and number + 1 < {count}:
        continue  # stays open while others end: the next round, or the next writer, ends it
    for ending in (number, number - 1):
        if ending < 0 or (ending != number and ending % 4) or done.get(ending) == "COMPLETE":
            continue
        for epoch in (1, 2, 3):
            ledger.add_epochs([epoch_row(ending, epoch)])
            ledger.tick()
            ledger.writer.wait()
        ledger.end_trial(trial_row(ending, epochs=3, val_nelbo=float(ending)))
        ledger.tick()
        ledger.writer.wait()
        say(f"ended {{ending}}")
        done[ending] = "COMPLETE"
ledger.flush()
say("finished")
"""


def start_writer(study: Path, count: int, rows_a_part: int) -> subprocess.Popen[bytes]:
    code = WRITER.format(study=str(study), count=count, rows_a_part=rows_a_part, tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_reader_polling_while_hundreds_of_updates_are_written_sees_every_row_once_and_whole(tmp_path):
    """DuckDB 2.0 opens a path thrice, so a file replaced in between may be an error to it; an answer is never wrong."""
    count, polls, refusals, seen = 100, 0, 0, 0
    trials, epochs = (f"read_parquet('{tmp_path / table / '*.parquet'}')" for table in ("trials", "epochs"))
    writer = start_writer(tmp_path, count, rows_a_part=20)
    connection = duckdb.connect()
    try:
        while writer.poll() is None:
            if not (part_files(tmp_path, "trials") and part_files(tmp_path, "epochs")):
                time.sleep(0.01)
                continue
            try:  # trials first: the epochs of one that has ended are there already
                rows = connection.execute(f"SELECT trial, state, epochs FROM {trials}").fetchall()
                pairs = connection.execute(f"SELECT trial, epoch FROM {epochs}").fetchall()
            except duckdb.Error:
                refusals += 1
                continue
            assert len({row[0] for row in rows}) == len(rows) >= seen
            assert len(set(pairs)) == len(pairs)
            for number, state, num_epochs in rows:
                if state == "COMPLETE":
                    assert sum(trial == number for trial, _ in pairs) == num_epochs == 3
            seen, polls = len(rows), polls + 1
        assert writer.returncode == 0, writer.stderr.read().decode()  # type: ignore[union-attr]
    finally:
        writer.kill()
        writer.communicate()
    assert polls > 10
    assert refusals < polls / 5
    assert [(row.trial, row.state) for row in read_trials(tmp_path)] == [(n, "COMPLETE") for n in range(count)]


def test_our_own_reader_is_never_refused_while_hundreds_of_updates_are_written(tmp_path):
    polls, seen = 0, 0
    writer = start_writer(tmp_path, 60, rows_a_part=20)
    try:
        while writer.poll() is None:
            rows = read_trials(tmp_path)
            pairs = read_table(tmp_path, "epochs").select(["trial", "epoch"]).to_pylist()
            assert [row.trial for row in rows] == list(range(len(rows)))
            assert len(rows) >= seen
            ended = {row.trial for row in rows if row.state == "COMPLETE"}
            assert ended <= {pair["trial"] for pair in pairs if pair["epoch"] == 3}
            seen, polls = len(rows), polls + 1
    finally:
        writer.kill()
        writer.communicate()
    assert polls > 10


def test_nothing_acknowledged_is_lost_or_doubled_by_kill_9_at_random_moments(tmp_path):
    count, random_ = 400, random.Random(3)
    started: set[int] = set()
    ended: set[int] = set()
    for _ in range(12):
        writer = start_writer(tmp_path, count, rows_a_part=5)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(random_.uniform(0, 0.4))
        writer.kill()
        said, complaint = writer.communicate()
        words = [line.split() for line in (first + said).decode().splitlines() if line.count(" ") == 1]
        assert words or first == b"finished\n", complaint.decode()
        started |= {int(number) for what, number in words if what == "started"}
        ended |= {int(number) for what, number in words if what == "ended"}

        rows = {row.trial: row for row in read_trials(tmp_path)}
        assert len(rows) == read_table(tmp_path, "trials").num_rows
        assert started <= set(rows)
        assert ended <= {number for number, row in rows.items() if row.state == "COMPLETE"}
        table = read_table(tmp_path, "epochs")
        pairs = list(zip(table["trial"].to_pylist(), table["epoch"].to_pylist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        for number, row in rows.items():
            epochs = sorted(epoch for trial, epoch in pairs if trial == number)
            assert epochs == ([1, 2, 3] if row.state == "COMPLETE" else [1, 2, 3][: len(epochs)])
    assert len(ended) > 12
    assert len(part_files(tmp_path, "trials")) > 1


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from search.ledger import Ledger
from search.tables import read_trials
from search.storage import write_atomically
sys.path.insert(0, {tests!r})
from test_search_ledger import trial_row

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

study = Path({study!r})
found = {{}}
file = study / "state.bin"
write_atomically(file, b"old" * 1000)
limit(10_000)
try:
    write_atomically(file, b"new" * 10_000)
except OSError as error:
    found["error"] = error.strerror
found["whole"] = file.read_bytes() == b"old" * 1000
limit(resource.RLIM_INFINITY)

ledger = Ledger(study)
ledger.end_trial(trial_row(0))
ledger.flush()
limit(100)
ledger.end_trial(trial_row(1))
for _ in range(2):
    if not ledger.flush(timeout_s=0.2):
        found["failed"] = ledger.error
found["after failure"] = [row.trial for row in read_trials(study)]
limit(resource.RLIM_INFINITY)
ledger.end_trial(trial_row(2))
ledger.flush()
found["after room was made"] = [row.trial for row in read_trials(study)]
print(json.dumps(found))
"""


def test_a_write_that_fails_leaves_the_old_file_whole_and_is_made_up_for_later(tmp_path):
    """The system itself refuses to let the file grow, halfway through the write."""
    code = FULL_DISK.format(study=str(tmp_path), tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "error": os.strerror(27),
        "whole": True,
        "failed": os.strerror(27),
        "after failure": [0],
        "after room was made": [0, 1, 2],
    }


def test_what_a_failed_write_leaves_behind_does_not_spoil_the_folder_for_pandas(tmp_path):
    code = FULL_DISK.format(study=str(tmp_path), tests=str(Path(__file__).parent))
    code = code[: code.index('found["after failure"]')]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert pd.read_parquet(tmp_path / "trials")["trial"].tolist() == [0]


def test_a_half_written_file_left_by_a_crash_is_no_part(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.end_trial(trial_row(0))
    ledger.flush()
    part = part_files(tmp_path, "trials")[0]
    part.with_name(part.name + ".tmp").write_bytes(part.read_bytes()[:100])
    assert [row.trial for row in read_trials(tmp_path)] == [0]
    reopened = Ledger(tmp_path)
    reopened.end_trial(trial_row(1))
    reopened.flush()
    assert [row.trial for row in read_trials(tmp_path)] == [0, 1]


def test_a_file_put_in_place_replaces_the_one_that_was_there(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"", b"first", b"x" * 100_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
