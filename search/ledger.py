"""The Parquet tables of a study: their schemas, the single writer, the readers.

A table is a folder of `part-*.parquet`. Only the last part grows: its rows stay in memory and the file is
written anew under another extension, synced, and renamed over the old one. So whoever reads the plain glob
sees every row exactly once, at any instant, and a crash leaves the last whole state. A part that cannot be
read, which takes a fault of the disk, is set aside, and the rest goes on without its rows.
"""

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from operator import attrgetter
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from search.storage import Location
from search.writer import BackgroundWriter, Write

SCHEMA_VERSION = "1"
ROWS_A_PART = 65_536
EPOCHS_FLUSH_EVERY_S = 2.0
TRIALS_FLUSH_EVERY_S = 0.5
MAX_CHUNKS = 64  # of the settled rows in memory, before they are copied together
START_WAIT_S = 1.0  # how long a suggestion is waited for to be on disk, before other things are done meanwhile
DAMAGED = ".damaged"  # the ending of a part that was set aside

log = logging.getLogger(__name__)

_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One configuration and what became of it. Losses are nats per example; None: not known (yet)."""

    study: str
    trial: int
    state: str  # RUNNING | COMPLETE | PRUNED | FAIL, as Optuna has it
    status: str | None = None  # ok | collapsed | diverged | oom | error | lost | timeout
    reason: str | None = None  # what ended a trial that is not ok
    activation: str
    leaky_relu_slope: float | None = None
    dropout: float
    learning_rate: float
    latent_dim: int
    hidden_dims: list[int]
    batch_size: int
    seed: int
    objective: float | None = None  # what the sampler was told: val_nelbo, or a penalty if it diverged
    val_nelbo: float | None = None  # of the last epoch, at beta = 1
    val_recon: float | None = None
    val_kl: float | None = None
    active_units: int | None = None
    train_nelbo: float | None = None
    no_latent_nelbo: float | None = None  # of a model that ignores z: what val_nelbo must beat
    epochs: int = 0
    max_epochs: int
    num_parameters: int | None = None
    train_wall_s: float = 0.0
    samples_per_s: float | None = None
    attempts: int = 0
    host: str | None = None
    pid: int | None = None
    device: str | None = None
    suggested_at: datetime
    ended_at: datetime | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by the names of the space, each only where it applies."""
        uniform = len(set(self.hidden_dims)) == 1
        params = {
            "activation": self.activation,
            "leaky_relu_slope": self.leaky_relu_slope,
            "dropout": self.dropout,
            "learning_rate": self.learning_rate,
            "latent_dim": self.latent_dim,
            "hidden_width": self.hidden_dims[0] if uniform else None,
            "hidden_layers": len(self.hidden_dims) if uniform else None,
            "batch_size": self.batch_size,
        }
        return {name: value for name, value in params.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRow:
    """One epoch of one trial. The same terms as `vae.training.EpochMetrics`, in nats per example."""

    study: str
    trial: int
    epoch: int
    attempt: int
    train_nelbo: float
    train_recon: float
    train_kl: float
    val_nelbo: float
    val_recon: float
    val_kl: float
    active_units: int
    grad_norm: float
    clipped_steps: int
    kl_weight: float
    wall_s: float
    samples_per_s: float
    reported_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One start of one trial in a worker. A trial whose worker was lost has more than one."""

    study: str
    trial: int
    attempt: int  # from 1
    outcome: str | None = None  # ended | lost | timeout | oom | interrupted (the driver left); None: under way
    reason: str | None = None  # what took the worker away
    from_epoch: int | None = None  # the epoch of the stored state it went on from, 0 for none; None: never began
    damaged: str | None = None  # what was wrong with newer stored states
    epochs: int = 0  # the last epoch it reported
    host: str | None = None
    pid: int | None = None
    started_at: datetime
    ended_at: datetime | None = None  # None also where the driver was killed


def _schema(table: str, columns: Iterable[tuple[str, pa.DataType, bool]]) -> pa.Schema:
    schema = pa.schema([pa.field(name, kind, nullable=nullable) for name, kind, nullable in columns])
    return schema.with_metadata({"vaesearch.table": table, "vaesearch.schema_version": SCHEMA_VERSION})


TRIALS = _schema(
    "trials",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("state", pa.string(), False),
        ("status", pa.string(), True),
        ("reason", pa.string(), True),
        ("activation", pa.string(), False),
        ("leaky_relu_slope", pa.float64(), True),
        ("dropout", pa.float64(), False),
        ("learning_rate", pa.float64(), False),
        ("latent_dim", pa.int32(), False),
        ("hidden_dims", pa.list_(pa.int64()), False),
        ("batch_size", pa.int32(), False),
        ("seed", pa.int64(), False),
        ("objective", pa.float64(), True),
        ("val_nelbo", pa.float64(), True),
        ("val_recon", pa.float64(), True),
        ("val_kl", pa.float64(), True),
        ("active_units", pa.int32(), True),
        ("train_nelbo", pa.float64(), True),
        ("no_latent_nelbo", pa.float64(), True),
        ("epochs", pa.int32(), False),
        ("max_epochs", pa.int32(), False),
        ("num_parameters", pa.int64(), True),
        ("train_wall_s", pa.float64(), False),
        ("samples_per_s", pa.float64(), True),
        ("attempts", pa.int32(), False),
        ("host", pa.string(), True),
        ("pid", pa.int64(), True),
        ("device", pa.string(), True),
        ("suggested_at", _TIME, False),
        ("ended_at", _TIME, True),
    ],
)
EPOCHS = _schema(
    "epochs",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("epoch", pa.int32(), False),
        ("attempt", pa.int32(), False),
        ("train_nelbo", pa.float64(), False),
        ("train_recon", pa.float64(), False),
        ("train_kl", pa.float64(), False),
        ("val_nelbo", pa.float64(), False),
        ("val_recon", pa.float64(), False),
        ("val_kl", pa.float64(), False),
        ("active_units", pa.int32(), False),
        ("grad_norm", pa.float64(), False),
        ("clipped_steps", pa.int32(), False),
        ("kl_weight", pa.float64(), False),
        ("wall_s", pa.float64(), False),
        ("samples_per_s", pa.float64(), False),
        ("reported_at", _TIME, False),
    ],
)
ATTEMPTS = _schema(
    "attempts",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("attempt", pa.int32(), False),
        ("outcome", pa.string(), True),
        ("reason", pa.string(), True),
        ("from_epoch", pa.int32(), True),
        ("damaged", pa.string(), True),
        ("epochs", pa.int32(), False),
        ("host", pa.string(), True),
        ("pid", pa.int64(), True),
        ("started_at", _TIME, False),
        ("ended_at", _TIME, True),
    ],
)

SCHEMAS = {"epochs": EPOCHS, "attempts": ATTEMPTS, "trials": TRIALS}
"""Table -> schema, in the order in which they are written: what a trial's row sums up is there before it."""

ROW_TYPES: Mapping[str, type[Any]] = {"epochs": EpochRow, "attempts": AttemptRow, "trials": TrialRow}

Row = TypeVar("Row", TrialRow, EpochRow, AttemptRow)


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
        self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self, parts: Mapping[int, pa.Table], is_open: Callable[[pa.Table], pa.ChunkedArray]) -> None:
        """Go on with the parts that are on disk, by number. `is_open` tells the rows that may be replaced yet."""
        resumed: list[_Part[Row]] = []
        for number, table in sorted(parts.items()):
            may_change = is_open(table)
            rows = to_rows(table.filter(may_change), ROW_TYPES[self.table])
            if rows or number == max(parts):
                settled = table.filter(pc.invert(may_change))
                resumed.append(_Part(number, settled, open={_key(row): row for row in rows}))
        if resumed:
            self._parts = resumed
        self._home = {key: part for part in self._parts for key in part.open}

    @property
    def open_rows(self) -> list[Row]:
        return [row for part in self._parts for row in part.open.values()]

    def put(self, row: Row) -> None:
        """Add a row that may be replaced, or replace it."""
        part = self._home.setdefault(_key(row), self._growing())
        part.open[_key(row)] = row
        part.dirty = True

    def settle(self, row: Row) -> None:
        """Add or replace a row for good."""
        part = self._home.pop(_key(row), None) or self._growing()
        part.open.pop(_key(row), None)
        part.pending.append(row)
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
    return Write(folder / f"part-{number:05d}.parquet", rank, functools.partial(_encoded, table))


def _key(row: TrialRow | EpochRow | AttemptRow) -> Hashable:
    if isinstance(row, AttemptRow):
        return row.trial, row.attempt
    return (row.trial, row.epoch) if isinstance(row, EpochRow) else row.trial


def _encoded(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True)
class Contents:
    """What is on disk of a study's tables, by part. `set_aside`: parts that could not be read."""

    parts: Mapping[str, dict[int, pa.Table]]
    set_aside: list[Location]

    @property
    def trials(self) -> list[TrialRow]:
        """In the order of their numbers; some may be missing where a part was set aside."""
        return to_rows(_joined("trials", self.parts["trials"]).sort_by("trial"), TrialRow)

    @property
    def epochs(self) -> pa.Table:
        return _joined("epochs", self.parts["epochs"])


def take_stock(study_path: Location) -> Contents:
    """Read all tables, for the driver that holds the study: a part that is damaged gets another name."""
    parts: dict[str, dict[int, pa.Table]] = {}
    set_aside: list[Location] = []
    for table, schema in SCHEMAS.items():
        parts[table] = {}
        for path in part_files(study_path, table):
            try:
                parts[table][_part_number(path)] = read_part(path, schema)
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
        self._attempts = TableWriter[AttemptRow](study_path, "attempts")
        self._seen: dict[int, set[int]] = {}  # trial -> the epochs that are there, of the unfinished trials
        self._starting: dict[int, int] = {}  # trial -> the writer's ticket of its suggestion
        self._trials_at = self._epochs_at = 0.0  # time.monotonic() of the last write
        self._resume(take_stock(study_path) if contents is None else contents)

    def _resume(self, contents: Contents) -> None:
        self._drop_orphans(contents)
        self._trials.resume(contents.parts["trials"], lambda table: pc.equal(table["state"], "RUNNING"))
        self._epochs.resume(contents.parts["epochs"], lambda table: pc.is_null(table["trial"]))  # none
        self._attempts.resume(contents.parts["attempts"], lambda table: pc.is_null(table["outcome"]))
        for attempt in self._attempts.open_rows:
            self._attempts.settle(replace(attempt, outcome="interrupted"))
        unfinished = pa.array([row.trial for row in self._trials.open_rows], pa.int32())
        for table in contents.parts["epochs"].values():
            theirs = table.filter(pc.is_in(table["trial"], unfinished))
            for trial, epoch in zip(theirs["trial"].to_pylist(), theirs["epoch"].to_pylist(), strict=True):
                self._seen.setdefault(trial, set()).add(epoch)

    def _drop_orphans(self, contents: Contents) -> None:
        """Remove what is left of trials that went with a damaged part: their numbers will be tried anew."""
        known = _joined("trials", contents.parts["trials"])["trial"].combine_chunks()
        for writer in (self._epochs, self._attempts):
            parts = contents.parts[writer.table]
            for number, table in parts.items():
                is_known = pc.is_in(table["trial"], known)
                if not pc.all(is_known, min_count=0).as_py():
                    parts[number] = table.filter(is_known)
                    self.writer.put([_write_of(writer.folder, number, parts[number])])

    @property
    def error(self) -> str | None:
        """Why the tables could not be written the last time; None if they could."""
        return self.writer.error

    def start_trial(self, row: TrialRow) -> bool:
        """Put a suggestion on disk; False if it is not there yet: ask again."""
        if row.trial not in self._starting:
            self._trials.put(row)
            self._starting[row.trial] = self._flush()
        if not self.writer.wait(self._starting[row.trial], START_WAIT_S):
            return False
        del self._starting[row.trial]
        return True

    def update_trial(self, row: TrialRow) -> None:
        """What is known by now of a trial under way."""
        self._trials.put(row)

    def update_attempt(self, row: AttemptRow) -> None:
        """What is known by now of an attempt; for good where it has an outcome."""
        if row.outcome is None:
            self._attempts.put(row)
        else:
            self._attempts.settle(row)

    def add_epochs(self, rows: Iterable[EpochRow]) -> list[EpochRow]:
        """Add the rows that are not there yet: a trial that went on from a rung reports some epochs again."""
        new = [row for row in rows if row.epoch not in self._seen.get(row.trial, ())]
        for row in new:
            self._epochs.settle(row)
            self._seen.setdefault(row.trial, set()).add(row.epoch)
        return new

    def end_trial(self, row: TrialRow) -> None:
        """Record what became of a trial; on disk by the next `tick`, at most half a second later."""
        self._trials.settle(row)
        self._seen.pop(row.trial, None)

    def tick(self) -> None:
        """Called often: has written what has waited long enough, as soon as the last writing is done."""
        if not self.writer.is_idle:
            return
        now = time.monotonic()
        if now - self._trials_at >= TRIALS_FLUSH_EVERY_S:
            self._flush()
        elif now - self._epochs_at >= EPOCHS_FLUSH_EVERY_S:
            self._flush_epochs()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Write everything; False if that did not succeed in time."""
        return self.writer.wait(self._flush(), timeout_s)

    def _flush(self) -> int:
        """Epochs go along: an ended trial has all of its."""
        others = [*self._attempts.changed(), *self._trials.changed()]
        if others:
            self._trials_at = time.monotonic()
        return self._flush_epochs(others)

    def _flush_epochs(self, others: Iterable[Write] = ()) -> int:
        epochs = self._epochs.changed()
        if epochs:
            self._epochs_at = time.monotonic()
        return self.writer.put([*epochs, *others])


class DamagedPart(ValueError):
    """A part that is no Parquet, or only half of one."""


def read_part(path: Location, schema: pa.Schema) -> pa.Table:
    """The rows of one part, opened once: it may be replaced meanwhile. Raises DamagedPart."""
    content = path.read_bytes()
    try:
        return pq.read_table(pa.BufferReader(content), schema=schema)
    except (pa.ArrowException, OSError, ValueError) as error:  # the bytes are in memory: it is they
        raise DamagedPart(f"{path}: damaged: {' '.join(str(error).split())}") from None


def to_table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Rows of one dataclass as a table. `from_pylist` would drop unknown keys and fill missing ones."""
    if not rows:
        return schema.empty_table()
    columns = zip(*map(attrgetter(*schema.names), rows), strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def to_rows(table: pa.Table, row_type: type[Row]) -> list[Row]:
    return [row_type(**values) for values in table.to_pylist()]


def part_files(study_path: Location, table: str) -> list[Location]:
    """The parts of a table, oldest first; [] if there is none yet."""
    return sorted((study_path / table).glob("part-*.parquet"), key=lambda path: path.name)


def read_table(study_path: Location, table: str) -> pa.Table:
    """A whole table of a study, also while it is being written. A damaged part is left out, which is logged."""
    parts = {}
    for path in part_files(study_path, table):
        try:
            parts[_part_number(path)] = read_part(path, SCHEMAS[table])
        except FileNotFoundError:  # set aside just now
            continue
        except DamagedPart as error:
            log.warning("%s; its rows are left out, and the next run of the study sets it aside", error)
    return _joined(table, parts)


def read_trials(study_path: Location) -> list[TrialRow]:
    """The trials of a study in the order of their numbers."""
    return to_rows(read_table(study_path, "trials").sort_by("trial"), TrialRow)


def _joined(table: str, parts: Mapping[int, pa.Table]) -> pa.Table:
    return pa.concat_tables([SCHEMAS[table].empty_table(), *(parts[number] for number in sorted(parts))])


def _part_number(path: Location) -> int:
    return int(path.name.removeprefix("part-").removesuffix(".parquet"))


for _table, _row_type in ROW_TYPES.items():
    assert [f.name for f in fields(_row_type)] == SCHEMAS[_table].names
