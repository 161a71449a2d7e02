"""The Parquet tables of a study: their schemas, the single writer, the readers.

A table is a folder of `part-*.parquet`. Only the last part grows: its rows stay in memory and the file is
written anew under another extension, synced, and renamed over the old one. So whoever reads the plain glob
sees every row exactly once, at any instant, and a crash leaves the last whole state.
"""

import os
import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SCHEMA_VERSION = "1"
ROWS_A_PART = 65_536
EPOCHS_FLUSH_EVERY_S = 2.0
TRIALS_FLUSH_EVERY_S = 0.5
MAX_CHUNKS = 64  # of the settled rows in memory, before they are copied together

_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One configuration and what became of it. Losses are nats per example; None: not known (yet)."""

    study: str
    trial: int
    state: str  # RUNNING | COMPLETE | PRUNED | FAIL, as Optuna has it
    status: str | None = None  # ok | collapsed | diverged | oom | error | lost
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

SCHEMAS = {"trials": TRIALS, "epochs": EPOCHS}

Row = TypeVar("Row", TrialRow, EpochRow)


def write_atomically(path: Path, content: bytes | pa.Buffer) -> None:
    """Put a file in place whole: written beside it, synced, renamed, and the rename synced."""
    temporary = path.with_name(f".{path.name}.tmp")  # readers of the whole folder pass over a leading dot
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self._parts: list[_Part[Row]] = [_Part(0, schema.empty_table())]
        self._home: dict[Hashable, _Part[Row]] = {}  # of the open rows
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self, parts: Iterable[tuple[int, pa.Table, dict[Hashable, Row]]]) -> None:
        """Go on with parts that are on disk: number, settled rows, open rows; the last one grows."""
        self._parts = [_Part(number, settled, open=rows) for number, settled, rows in parts]
        self._home = {key: part for part in self._parts for key in part.open}

    def put(self, key: Hashable, row: Row) -> None:
        """Add a row that may be replaced, or replace it."""
        part = self._home.setdefault(key, self._growing())
        part.open[key] = row
        part.dirty = True

    def settle(self, key: Hashable, row: Row) -> None:
        """Add or replace a row for good."""
        part = self._home.pop(key, None) or self._growing()
        part.open.pop(key, None)
        part.pending.append(row)
        part.dirty = True

    def flush(self) -> bool:
        """Write what changed; False if nothing did."""
        dirty = [part for part in self._parts if part.dirty]
        for part in dirty:
            part.settled = pa.concat_tables([part.settled, to_table(part.pending, self.schema)])
            if part.settled.column(0).num_chunks > MAX_CHUNKS:
                part.settled = part.settled.combine_chunks()
            part.pending = []
            sink = pa.BufferOutputStream()
            whole = pa.concat_tables([part.settled, to_table(list(part.open.values()), self.schema)])
            pq.write_table(whole, sink, compression="zstd")
            write_atomically(self.folder / f"part-{part.number:05d}.parquet", sink.getvalue())
            part.dirty = False
        self._parts = [part for part in self._parts[:-1] if part.open or part.dirty] + self._parts[-1:]
        return bool(dirty)

    def _growing(self) -> _Part[Row]:
        last = self._parts[-1]
        if last.num_rows >= ROWS_A_PART:
            last = _Part(last.number + 1, self.schema.empty_table())
            self._parts.append(last)
        return last


class Ledger:
    """Both tables of a study, for the one driver that writes them."""

    def __init__(self, study_path: Path) -> None:
        self._trials = TableWriter[TrialRow](study_path / "trials", TRIALS)
        self._epochs = TableWriter[EpochRow](study_path / "epochs", EPOCHS)
        self._last_epoch: dict[int, int] = {}
        self._trials_at = self._epochs_at = 0.0  # time.monotonic() of the last write
        self._resume(study_path)

    def _resume(self, study_path: Path) -> None:
        reopened: list[tuple[int, pa.Table, dict[Hashable, TrialRow]]] = []
        for file in (files := part_files(study_path, "trials")):
            table = pq.read_table(file, schema=TRIALS)
            running = pc.equal(table["state"], "RUNNING")
            rows: dict[Hashable, TrialRow] = {r.trial: r for r in to_rows(table.filter(running), TrialRow)}
            if rows or file == files[-1]:
                reopened.append((_part_number(file), table.filter(pc.invert(running)), rows))
        if reopened:
            self._trials.resume(reopened)
        if files := part_files(study_path, "epochs"):
            self._epochs.resume([(_part_number(files[-1]), pq.read_table(files[-1], schema=EPOCHS), {})])
            seen = read_table(study_path, "epochs").group_by("trial").aggregate([("epoch", "max")])
            self._last_epoch = dict(zip(seen["trial"].to_pylist(), seen["epoch_max"].to_pylist(), strict=True))

    def start_trial(self, row: TrialRow) -> None:
        """Put a suggestion on disk. Returns when it is there."""
        self._trials.put(row.trial, row)
        self._flush_trials()

    def add_epochs(self, rows: Iterable[EpochRow]) -> list[EpochRow]:
        """Add the rows that are not there yet: a trial that went on from a rung reports some epochs again."""
        new = [row for row in rows if row.epoch > self._last_epoch.get(row.trial, 0)]
        for row in new:
            self._epochs.settle((row.trial, row.epoch), row)
            self._last_epoch[row.trial] = row.epoch
        return new

    def end_trial(self, row: TrialRow) -> None:
        """Record what became of a trial; on disk by the next `tick`, at most half a second later."""
        self._trials.settle(row.trial, row)
        self._last_epoch.pop(row.trial, None)

    def tick(self) -> None:
        """Called often: writes what has waited long enough. Epochs go first: an ended trial has all of its."""
        now = time.monotonic()
        if now - self._epochs_at >= EPOCHS_FLUSH_EVERY_S:
            self._flush_epochs()
        if now - self._trials_at >= TRIALS_FLUSH_EVERY_S:
            self._flush_trials()

    def flush(self) -> None:
        self._flush_trials()

    def _flush_trials(self) -> None:
        self._flush_epochs()
        if self._trials.flush():
            self._trials_at = time.monotonic()

    def _flush_epochs(self) -> None:
        if self._epochs.flush():
            self._epochs_at = time.monotonic()


def to_table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Rows of one dataclass as a table. `from_pylist` would drop unknown keys and fill missing ones."""
    if not rows:
        return schema.empty_table()
    columns = zip(*map(attrgetter(*schema.names), rows), strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def to_rows(table: pa.Table, row_type: type[Row]) -> list[Row]:
    return [row_type(**values) for values in table.to_pylist()]


def part_files(study_path: Path, table: str) -> list[Path]:
    """The parts of a table, oldest first; [] if there is none yet."""
    return sorted((study_path / table).glob("part-*.parquet"))


def read_table(study_path: Path, table: str) -> pa.Table:
    """A whole table of a study, also while it is being written."""
    parts = part_files(study_path, table)
    schema = SCHEMAS[table]
    return pa.concat_tables([schema.empty_table(), *(pq.read_table(part, schema=schema) for part in parts)])


def read_trials(study_path: Path) -> list[TrialRow]:
    """The trials of a study in the order of their numbers."""
    return to_rows(read_table(study_path, "trials").sort_by("trial"), TrialRow)


def _part_number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


assert [f.name for f in fields(TrialRow)] == TRIALS.names
assert [f.name for f in fields(EpochRow)] == EPOCHS.names
