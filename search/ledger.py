"""The single writer of a study's tables.

Of the parts of a table only the last one grows: its rows stay in memory and the file is written anew under
another extension, synced, and renamed over the old one. So whoever reads the plain glob sees every row exactly
once, at any instant, and a crash leaves the last whole state. A part that cannot be read is set aside, and the
study goes on without its rows.
"""

import functools
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from search.storage import Location
from search.tables import (
    MADE_AGAIN,
    ROW_TYPES,
    SCHEMAS,
    AttemptRow,
    DamagedPart,
    DiagnosticsRow,
    EpochRow,
    FinalImageRow,
    FinalRow,
    LayerRow,
    Row,
    TrialRow,
    joined,
    part_files,
    part_number,
    read_part,
    run_keys,
    to_rows,
    to_table,
    whole_runs,
)
from search.writer import BackgroundWriter, Write

ROWS_A_PART = 65_536
EPOCHS_FLUSH_EVERY_S = 2.0
TRIALS_FLUSH_EVERY_S = 0.5
MAX_CHUNKS = 64  # of the settled rows in memory, before they are copied together
START_WAIT_S = 1.0  # how long a suggestion is waited for to be on disk, before other things are done meanwhile
DAMAGED = ".damaged"  # the ending of a part that was set aside


@dataclass
class _Part(Generic[Row]):
    """A part file that may still change. Settled rows are Arrow: writing costs their bytes, not their count."""

    number: int
    settled: pa.Table
    pending: list[Row] = field(default_factory=list)  # settled since the last flush
    open: dict[Hashable, Row] = field(default_factory=dict)  # may be replaced yet
    dirty: bool = False

    @property
    def num_rows(self) -> int:
        return self.settled.num_rows + len(self.pending) + len(self.open)


class TableWriter(Generic[Row]):
    """Writes one table. A row belongs to one part for good; a full part stays in memory while it has open rows."""

    def __init__(self, study_path: Location, table: str) -> None:
        self.table, self.folder, self.schema = table, study_path / table, SCHEMAS[table]
        self._parts: list[_Part[Row]] = [_Part(0, self.schema.empty_table())]
        self._home: dict[Hashable, _Part[Row]] = {}  # of the open rows
        study_path.mkdir(parents=True, exist_ok=True)

    def resume(self, parts: Mapping[int, pa.Table], is_open: Callable[[pa.Table], pa.ChunkedArray]) -> None:
        """Go on with the parts that are on disk, by number. `is_open` tells the rows that may be replaced yet."""
        resumed: list[_Part[Row]] = []
        for number, table in sorted(parts.items()):
            may_change = is_open(table)
            rows = to_rows(table.filter(may_change), ROW_TYPES[self.table])
            if rows or number == max(parts):
                settled = table.filter(pc.invert(may_change))
                resumed.append(_Part(number, settled, open={row.key: row for row in rows}))
        if resumed:
            self._parts = resumed
        self._home = {key: part for part in self._parts for key in part.open}

    @property
    def open_rows(self) -> list[Row]:
        return [row for part in self._parts for row in part.open.values()]

    @property
    def is_dirty(self) -> bool:
        """True when there is something that `changed` would tell."""
        return any(part.dirty for part in self._parts)

    def put(self, row: Row) -> None:
        """Add a row that may be replaced, or replace it."""
        part = self._home.setdefault(row.key, self._growing())
        part.open[row.key] = row
        part.dirty = True

    def settle(self, row: Row) -> None:
        """Add or replace a row for good."""
        part = self._home.pop(row.key, None) or self._growing()
        part.open.pop(row.key, None)
        part.pending.append(row)
        part.dirty = True

    def add(self, table: pa.Table) -> None:
        """Add rows for good."""
        part = self._growing()
        part.settled = pa.concat_tables([part.settled, table])
        part.dirty = True

    def changed(self) -> list[Write]:
        """The files to be written: the parts that changed since the last call."""
        writes = []
        for part in (part for part in self._parts if part.dirty):
            part.settled = pa.concat_tables([part.settled, to_table(part.pending, self.schema)])
            if part.settled.column(0).num_chunks > MAX_CHUNKS:
                part.settled = part.settled.combine_chunks()
            part.pending = []
            whole = pa.concat_tables([part.settled, to_table(list(part.open.values()), self.schema)])
            writes.append(_write_of(self.folder, part.number, whole))
            part.dirty = False
        self._parts = [part for part in self._parts[:-1] if part.open] + self._parts[-1:]
        return writes

    def _growing(self) -> _Part[Row]:
        last = self._parts[-1]
        if last.num_rows >= ROWS_A_PART:
            last = _Part(last.number + 1, self.schema.empty_table())
            self._parts.append(last)
        return last


def _write_of(folder: Location, number: int, table: pa.Table) -> Write:
    rank = list(SCHEMAS).index(folder.name)
    return Write(folder / f"part-{number:05d}.parquet", rank, functools.partial(_encoded, folder, table))


def _encoded(folder: Location, table: pa.Table) -> pa.Buffer:
    folder.mkdir(exist_ok=True)  # only now: a table without rows has none
    sink = pa.BufferOutputStream()
    strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=strings)  # of floats it costs four times the time
    return sink.getvalue()


@dataclass(frozen=True)
class Contents:
    """What is on disk of a study's tables, by part. `set_aside`: parts that could not be read.

    A `Ledger` that is opened on it drops from it what was left of trials that went with such a part.
    """

    parts: Mapping[str, dict[int, pa.Table]]
    set_aside: list[Location]

    @property
    def trials(self) -> list[TrialRow]:
        """In the order of their numbers; some may be missing where a part was set aside."""
        return to_rows(joined("trials", self.parts["trials"]).sort_by("trial"), TrialRow)

    @property
    def finals(self) -> list[FinalRow]:
        return to_rows(joined("finals", self.parts["finals"]), FinalRow)

    @property
    def epochs(self) -> pa.Table:
        return joined("epochs", self.parts["epochs"])


def take_stock(study_path: Location) -> Contents:
    """Read all tables, for the driver that holds the study: a part that is damaged gets another name."""
    parts: dict[str, dict[int, pa.Table]] = {}
    set_aside: list[Location] = []
    for table, schema in SCHEMAS.items():
        parts[table] = {}
        for path in part_files(study_path, table):
            try:
                parts[table][part_number(path)] = read_part(path, schema)
            except DamagedPart:
                set_aside.append(path.rename(path.parent / f"{path.name}{DAMAGED}"))  # type: ignore[arg-type]
    return Contents(parts, set_aside)


class Ledger:
    """The tables of a study, for the one driver that writes them."""

    def __init__(self, study_path: Location, contents: Contents | None = None) -> None:
        """contents: what `take_stock` found; None: look now."""
        self.writer = BackgroundWriter()
        self._trials = TableWriter[TrialRow](study_path, "trials")
        self._epochs = TableWriter[EpochRow](study_path, "epochs")
        self._diagnostics = TableWriter[DiagnosticsRow](study_path, "diagnostics")
        self._layers = TableWriter[LayerRow](study_path, "layers")
        self._attempts = TableWriter[AttemptRow](study_path, "attempts")
        self._finals = TableWriter[FinalRow](study_path, "finals")
        self._final_images = TableWriter[FinalImageRow](study_path, "final_images")
        self._settled = (self._epochs, self._diagnostics, self._layers)  # whose rows are never replaced
        # of the unfinished trials: table -> trial -> the epochs that are there
        self._seen: dict[str, dict[int, set[int]]] = {writer.table: {} for writer in self._settled}
        self._never_placed: dict[int, int] = {}  # trial -> its attempt that a former driver had no worker for
        self._starting: dict[int, int] = {}  # trial -> the writer's ticket of its suggestion
        self._trials_at = self._epochs_at = 0.0  # time.monotonic() of the last write
        self._resume(take_stock(study_path) if contents is None else contents)

    def _resume(self, contents: Contents) -> None:
        self._drop_orphans(contents)
        self._trials.resume(contents.parts["trials"], lambda table: pc.equal(table["state"], "RUNNING"))
        self._finals.resume(
            contents.parts["finals"],
            lambda table: pc.or_(
                pc.equal(table["state"], "RUNNING"), pc.is_in(table["status"], pa.array(MADE_AGAIN, pa.string()))
            ),
        )
        for writer in (*self._settled, self._final_images):
            writer.resume(contents.parts[writer.table], lambda table: pc.is_null(table["trial"]))  # none
        self._attempts.resume(contents.parts["attempts"], lambda table: pc.is_null(table["outcome"]))
        for attempt in self._attempts.open_rows:
            if attempt.placed_at is None and attempt.from_epoch is None:
                self._never_placed[attempt.trial] = attempt.attempt
            else:
                self._attempts.settle(replace(attempt, outcome="interrupted"))
        unfinished = pa.array([row.trial for row in self._trials.open_rows], pa.int32())
        for name, seen in self._seen.items():
            for table in contents.parts[name].values():
                theirs = table.filter(pc.is_in(table["trial"], unfinished))
                for trial, epoch in zip(theirs["trial"].to_pylist(), theirs["epoch"].to_pylist(), strict=True):
                    seen.setdefault(trial, set()).add(epoch)

    def _drop_orphans(self, contents: Contents) -> None:
        """Remove what is left of trials that went with a damaged part: their numbers will be tried anew.

        So with a finalist's run of which a crash or a damaged part left only the row, or only what its images have.
        """
        known = joined("trials", contents.parts["trials"])["trial"].combine_chunks()
        for writer in (*self._settled, self._attempts, self._finals, self._final_images):
            self._keep(contents, writer, lambda table: table.filter(pc.is_in(table["trial"], known)))
        images = joined("final_images", contents.parts["final_images"])
        self._keep(contents, self._finals, lambda table: whole_runs(table, images))
        finals = joined("finals", contents.parts["finals"])
        complete = pc.unique(run_keys(finals.filter(pc.equal(finals["state"], "COMPLETE"))))
        self._keep(contents, self._final_images, lambda table: table.filter(pc.is_in(run_keys(table), complete)))

    def _keep(self, contents: Contents, writer: TableWriter[Any], kept: Callable[[pa.Table], pa.Table]) -> None:
        """Drop the other rows of a table, in `contents` and on disk."""
        parts = contents.parts[writer.table]
        for number, table in parts.items():
            parts[number] = kept(table)
            if parts[number].num_rows < table.num_rows:
                self.writer.put([_write_of(writer.folder, number, parts[number])])

    @property
    def error(self) -> str | None:
        """Why the tables could not be written the last time; None if they could."""
        return self.writer.error

    @property
    def is_written(self) -> bool:
        """True when all that is known of trials is on disk."""
        return self.writer.is_idle and not self._trials.is_dirty and not self._finals.is_dirty

    def announce_trial(self, row: TrialRow) -> None:
        """Have a suggestion written, which is to start soon."""
        if row.trial not in self._starting:
            self._trials.put(row)
            self._starting[row.trial] = self._flush()

    def start_trial(self, row: TrialRow) -> bool:
        """Put a suggestion on disk; False if it is not there yet: ask again."""
        self.announce_trial(row)
        if not self.writer.wait(self._starting[row.trial], START_WAIT_S):
            return False
        del self._starting[row.trial]
        return True

    def update_trial(self, row: TrialRow) -> None:
        """What is known by now of a trial under way."""
        self._trials.put(row)

    def next_attempt(self, row: TrialRow) -> int:
        """The number of a trial's next attempt: that of one which a former driver left without a worker, if it did."""
        return self._never_placed.pop(row.trial, row.attempts + 1)

    def update_attempt(self, row: AttemptRow) -> None:
        """What is known by now of an attempt; for good where it has an outcome."""
        if row.outcome is None:
            self._attempts.put(row)
        else:
            self._attempts.settle(row)

    def add_epochs(self, rows: Iterable[EpochRow]) -> list[EpochRow]:
        """Add the rows that are not there yet: a trial that went on from a rung reports some epochs again."""
        return self._add(self._epochs, rows)

    def add_diagnostics(self, rows: Iterable[DiagnosticsRow], layers: Iterable[LayerRow]) -> None:
        """Add the rows of epochs that are not there yet."""
        self._add(self._diagnostics, rows)
        self._add(self._layers, layers)

    def _add(self, writer: TableWriter[Any], rows: Iterable[Any]) -> list[Any]:
        seen = self._seen[writer.table]
        new = [row for row in rows if row.epoch not in seen.get(row.trial, ())]
        for row in new:
            writer.settle(row)
        for row in new:
            seen.setdefault(row.trial, set()).add(row.epoch)
        return new

    def end_trial(self, row: TrialRow) -> None:
        """Record what became of a trial; on disk by the next `tick`, at most half a second later."""
        self._trials.settle(row)
        for seen in self._seen.values():
            seen.pop(row.trial, None)

    def update_final(self, row: FinalRow) -> None:
        """What is known by now of a finalist's run under way."""
        self._finals.put(row)

    def end_final(self, row: FinalRow, images: pa.Table) -> None:
        """Record what became of a finalist's run, with what each row of the test split has under it."""
        self._final_images.add(images)
        self._finals.settle(row)

    def tick(self) -> None:
        """Called often: has written what has waited long enough, as soon as the last writing is done."""
        if not self.writer.is_idle:
            return
        now = time.monotonic()
        if self._trials.is_dirty or self._attempts.is_dirty or self._finals.is_dirty:
            if now - self._trials_at >= TRIALS_FLUSH_EVERY_S:
                self._flush()
        elif now - self._epochs_at >= EPOCHS_FLUSH_EVERY_S:
            self._flush_epochs()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Write everything; False if that did not succeed in time."""
        return self.writer.wait(self._flush(), timeout_s)

    def close(self) -> None:
        """Write nothing more, also not what could not be written: another driver may go on from here."""
        self.writer.close()

    def _flush(self) -> int:
        """Epochs go along: an ended trial has all of its."""
        others = [*self._attempts.changed(), *self._trials.changed()]
        others += [*self._final_images.changed(), *self._finals.changed()]
        if others:
            self._trials_at = time.monotonic()
        return self._flush_epochs(others)

    def _flush_epochs(self, others: Iterable[Write] = ()) -> int:
        epochs = [write for writer in self._settled for write in writer.changed()]
        if epochs:
            self._epochs_at = time.monotonic()
        return self.writer.put([*epochs, *others])
