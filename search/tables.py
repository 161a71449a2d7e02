"""The tables of a study: rows, their schemas, and how they are read, also while a study runs.

A table is a folder of `part-*.parquet`, which `search.ledger` alone writes. Every row stands in it exactly once,
at any instant. A part that cannot be read, which takes a fault of the disk, is left out, and that is logged.
"""

import logging
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from search.layout import SCHEMA_VERSION, TABLES, part_files
from search.storage import Location, read_buffer
from vae.config import InputError

log = logging.getLogger(__name__)

_TIME = pa.timestamp("us", tz="UTC")


PARAMS = (
    "activation",
    "decoder_activation",
    "leaky_relu_slope",
    "avg_pool_window",
    "activation_dropout",
    "apl_hinges",
    "dropout",
    "learning_rate",
    "latent_dim",
    "normalization",
    "batch_size",
    "lr_schedule",
    "beta",
    "free_bits",
    "weight_decay",
    "ema_decay",
    "precision",
)
"""The columns of a trial that are parameters of the space, by the same names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One configuration and what became of it. Losses are nats per example; None: not known (yet)."""

    study: str
    trial: int
    phase: str = "search"  # search | screen (at a setting common to all activations) | refine
    state: str  # RUNNING | COMPLETE | PRUNED | FAIL, as Optuna has it
    status: str | None = None  # ok | collapsed | diverged | oom | error | lost | timeout
    reason: str | None = None  # what ended a trial that is not ok
    step: int | None = None  # of training, from 1, at which it diverged
    layer: str | None = None  # the first one that was not finite then
    activation: str
    decoder_activation: str | None = None  # None: that of the encoder
    leaky_relu_slope: float | None = None
    avg_pool_window: int | None = None
    activation_dropout: float | None = None
    apl_hinges: int | None = None
    dropout: float
    learning_rate: float
    latent_dim: int
    hidden_dims: list[int]
    normalization: str = "none"
    batch_size: int
    lr_schedule: str | None = None
    beta: float | None = None
    free_bits: float | None = None
    weight_decay: float | None = None
    ema_decay: float | None = None
    precision: str | None = None
    seed: int
    train_objective: str = "elbo"  # vae_gan: val_nelbo is not what was trained for, and ranks with no other's
    objective: float | None = None  # what the sampler was told at the end, a penalty if it diverged
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
    def key(self) -> Hashable:
        return self.trial

    @property
    def ranks_by(self) -> float | None:
        """What a trial that has trained to its end is ranked by: nats, or the error that adversarial training is by."""
        return self.val_nelbo if self.train_objective == "elbo" else self.objective

    @property
    def activations(self) -> str:
        """That of the encoder, and that of the decoder where it has one of its own."""
        return self.activation if self.decoder_activation is None else f"{self.activation}/{self.decoder_activation}"

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by the names of the space, each only where it applies."""
        uniform = len(set(self.hidden_dims)) == 1
        params = {name: getattr(self, name) for name in PARAMS} | {
            "hidden_width": self.hidden_dims[0] if uniform else None,
            "hidden_layers": len(self.hidden_dims) if uniform else None,
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
    skipped_steps: int
    kl_weight: float
    wall_s: float
    samples_per_s: float
    objective: float  # what the sampler and early stopping were told
    reported_at: datetime

    @property
    def key(self) -> Hashable:
        return self.trial, self.epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosticsRow:
    """A model on fixed validation rows at an epoch: the terms of `vae.diagnostics.Diagnostics`, in nats an example."""

    study: str
    trial: int
    epoch: int  # 0: before training
    rate: float
    distortion: float
    active_units: int
    kl_active_units: int
    collapsed_share: float
    mutual_information: float
    aggregated_kl: float
    aggregated_kl_low: float
    logvar_clamped: float
    encoder_gradient_ratio: float | None
    decoder_gradient_ratio: float | None
    generalization_gap: float
    precision_effect: float | None
    flags: list[str]

    @property
    def key(self) -> Hashable:
        return self.trial, self.epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """A hidden layer of a model at an epoch. The same terms as `vae.diagnostics.LayerDiagnostics`."""

    study: str
    trial: int
    epoch: int
    net: str  # encoder | decoder
    layer: int
    width: int
    dead: float
    dormant: float
    saturated: float
    gradient_ratio: float
    second_moment: float
    mixture: list[float] | None

    @property
    def key(self) -> Hashable:
        return self.trial, self.epoch, self.net, self.layer


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
    node_id: str | None = None  # Ray's, hexadecimal
    pid: int | None = None
    gpus: float | None = None  # asked for: of each device where it is below 1
    gpu_ids: list[str] | None = None  # the devices that the worker saw, by their names on its node
    started_at: datetime  # when it was asked for
    placed_at: datetime | None = None  # when it had a worker
    ended_at: datetime | None = None  # None also where the driver was killed

    @property
    def key(self) -> Hashable:
        return self.trial, self.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalRow:
    """One finalist, trained once more from a fresh seed and scored on the test split. Losses are nats per example."""

    study: str
    trial: int  # whose configuration it is
    activation: str
    run: int  # from 0; runs of one number share their seed, whatever the finalist
    seed: int
    state: str  # RUNNING | COMPLETE | FAIL
    status: str | None = None  # as of trials
    reason: str | None = None
    nll: float | None = None  # importance-weighted, on the test split
    nelbo: float | None = None
    effective_samples: float | None = None  # median over the rows
    importance_samples: int
    no_latent_nelbo: float | None = None  # on the test split
    val_nelbo: float | None = None
    active_units: int | None = None
    epochs: int = 0
    num_parameters: int | None = None
    train_wall_s: float = 0.0
    score_wall_s: float | None = None
    attempts: int = 0
    host: str | None = None
    pid: int | None = None
    device: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def is_settled(self) -> bool:
        """True where the run need not be made, or made again."""
        return self.state != "RUNNING" and self.status not in MADE_AGAIN

    @property
    def key(self) -> Hashable:
        return self.trial, self.run


MADE_AGAIN = ("lost", "timeout", "error")
"""Statuses of a finalist's run that say nothing of its configuration: the next driver makes such a run again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalImageRow:
    """What one row of the test split has under one finalist's run."""

    study: str
    trial: int
    run: int
    row: int  # of the test split, from 0
    nll: float
    nelbo: float

    @property
    def key(self) -> Hashable:
        return self.trial, self.run, self.row


def _schema(table: str, columns: Iterable[tuple[str, pa.DataType, bool]]) -> pa.Schema:
    schema = pa.schema([pa.field(name, kind, nullable=nullable) for name, kind, nullable in columns])
    return schema.with_metadata({"vaesearch.table": table, "vaesearch.schema_version": SCHEMA_VERSION})


TRIALS = _schema(
    "trials",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("phase", pa.string(), False),
        ("state", pa.string(), False),
        ("status", pa.string(), True),
        ("reason", pa.string(), True),
        ("step", pa.int64(), True),
        ("layer", pa.string(), True),
        ("activation", pa.string(), False),
        ("decoder_activation", pa.string(), True),
        ("leaky_relu_slope", pa.float64(), True),
        ("avg_pool_window", pa.int32(), True),
        ("activation_dropout", pa.float64(), True),
        ("apl_hinges", pa.int32(), True),
        ("dropout", pa.float64(), False),
        ("learning_rate", pa.float64(), False),
        ("latent_dim", pa.int32(), False),
        ("hidden_dims", pa.list_(pa.int64()), False),
        ("normalization", pa.string(), False),
        ("batch_size", pa.int32(), False),
        ("lr_schedule", pa.string(), True),
        ("beta", pa.float64(), True),
        ("free_bits", pa.float64(), True),
        ("weight_decay", pa.float64(), True),
        ("ema_decay", pa.float64(), True),
        ("precision", pa.string(), True),
        ("seed", pa.int64(), False),
        ("train_objective", pa.string(), False),
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
        ("skipped_steps", pa.int32(), False),
        ("kl_weight", pa.float64(), False),
        ("wall_s", pa.float64(), False),
        ("samples_per_s", pa.float64(), False),
        ("objective", pa.float64(), False),
        ("reported_at", _TIME, False),
    ],
)
DIAGNOSTICS = _schema(
    "diagnostics",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("epoch", pa.int32(), False),
        ("rate", pa.float64(), False),
        ("distortion", pa.float64(), False),
        ("active_units", pa.int32(), False),
        ("kl_active_units", pa.int32(), False),
        ("collapsed_share", pa.float64(), False),
        ("mutual_information", pa.float64(), False),
        ("aggregated_kl", pa.float64(), False),
        ("aggregated_kl_low", pa.float64(), False),
        ("logvar_clamped", pa.float64(), False),
        ("encoder_gradient_ratio", pa.float64(), True),
        ("decoder_gradient_ratio", pa.float64(), True),
        ("generalization_gap", pa.float64(), False),
        ("precision_effect", pa.float64(), True),
        ("flags", pa.list_(pa.string()), False),
    ],
)
LAYERS = _schema(
    "layers",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("epoch", pa.int32(), False),
        ("net", pa.string(), False),
        ("layer", pa.int32(), False),
        ("width", pa.int32(), False),
        ("dead", pa.float64(), False),
        ("dormant", pa.float64(), False),
        ("saturated", pa.float64(), False),
        ("gradient_ratio", pa.float64(), False),
        ("second_moment", pa.float64(), False),
        ("mixture", pa.list_(pa.float64()), True),
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
        ("node_id", pa.string(), True),
        ("pid", pa.int64(), True),
        ("gpus", pa.float64(), True),
        ("gpu_ids", pa.list_(pa.string()), True),
        ("started_at", _TIME, False),
        ("placed_at", _TIME, True),
        ("ended_at", _TIME, True),
    ],
)

FINALS = _schema(
    "finals",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("activation", pa.string(), False),
        ("run", pa.int32(), False),
        ("seed", pa.int64(), False),
        ("state", pa.string(), False),
        ("status", pa.string(), True),
        ("reason", pa.string(), True),
        ("nll", pa.float64(), True),
        ("nelbo", pa.float64(), True),
        ("effective_samples", pa.float64(), True),
        ("importance_samples", pa.int32(), False),
        ("no_latent_nelbo", pa.float64(), True),
        ("val_nelbo", pa.float64(), True),
        ("active_units", pa.int32(), True),
        ("epochs", pa.int32(), False),
        ("num_parameters", pa.int64(), True),
        ("train_wall_s", pa.float64(), False),
        ("score_wall_s", pa.float64(), True),
        ("attempts", pa.int32(), False),
        ("host", pa.string(), True),
        ("pid", pa.int64(), True),
        ("device", pa.string(), True),
        ("started_at", _TIME, True),
        ("ended_at", _TIME, True),
    ],
)
FINAL_IMAGES = _schema(
    "final_images",
    [
        ("study", pa.string(), False),
        ("trial", pa.int32(), False),
        ("run", pa.int32(), False),
        ("row", pa.int32(), False),
        ("nll", pa.float64(), False),
        ("nelbo", pa.float64(), False),
    ],
)

SCHEMAS = {
    "epochs": EPOCHS,
    "diagnostics": DIAGNOSTICS,
    "layers": LAYERS,
    "attempts": ATTEMPTS,
    "final_images": FINAL_IMAGES,
    "finals": FINALS,
    "trials": TRIALS,
}
assert tuple(SCHEMAS) == TABLES

ROW_TYPES: Mapping[str, type[Any]] = {
    "epochs": EpochRow,
    "diagnostics": DiagnosticsRow,
    "layers": LayerRow,
    "attempts": AttemptRow,
    "final_images": FinalImageRow,
    "finals": FinalRow,
    "trials": TrialRow,
}

Row = TypeVar("Row", TrialRow, EpochRow, DiagnosticsRow, LayerRow, AttemptRow, FinalRow, FinalImageRow)


class DamagedPart(ValueError):
    """A part that is no Parquet, or only half of one."""


def read_part(path: Location, schema: pa.Schema) -> pa.Table:
    """The rows of one part, opened once: it may be replaced meanwhile.

    Raises DamagedPart; InputError if another version of this program wrote it.
    """
    content = read_buffer(path)
    try:
        found = (pq.read_schema(pa.BufferReader(content)).metadata or {}).get(b"vaesearch.schema_version")
        if found is not None and found.decode() != SCHEMA_VERSION:
            raise InputError(
                f"{path}: its tables have version {found.decode()} and this program reads {SCHEMA_VERSION}; "
                f"use the version of vaesearch that wrote it"
            )
        return pq.read_table(pa.BufferReader(content), schema=schema, use_threads=False)
    except InputError:
        raise
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


def read_table(study_path: Location, table: str) -> pa.Table:
    """A whole table of a study, also while it is being written. A damaged part is left out, which is logged."""
    parts = {}
    for path in part_files(study_path, table):
        try:
            parts[part_number(path)] = read_part(path, SCHEMAS[table])
        except FileNotFoundError:  # set aside just now
            continue
        except DamagedPart as error:
            log.warning("%s; its rows are left out, and the next run of the study sets it aside", error)
    return joined(table, parts)


def read_trials(study_path: Location) -> list[TrialRow]:
    """The trials of a study in the order of their numbers."""
    return to_rows(read_table(study_path, "trials").sort_by("trial"), TrialRow)


def whole_runs(finals: pa.Table, images: pa.Table) -> pa.Table:
    """The finals without runs that ended well and of which there are no images: those went with a damaged part."""
    is_there = pc.is_in(run_keys(finals), pc.unique(run_keys(images)))
    return finals.filter(pc.or_(is_there, pc.not_equal(finals["state"], "COMPLETE")))


def run_keys(table: pa.Table) -> pa.Array:
    """One number for each run of a finalist, from its trial and its run."""
    trial = pc.multiply(table["trial"].cast(pa.int64()), 2**32)
    return pc.add(trial, table["run"].cast(pa.int64())).combine_chunks()


def joined(table: str, parts: Mapping[int, pa.Table]) -> pa.Table:
    return pa.concat_tables([SCHEMAS[table].empty_table(), *(parts[number] for number in sorted(parts))])


def part_number(path: Location) -> int:
    return int(path.name.removeprefix("part-").removesuffix(".parquet"))


for _table, _row_type in ROW_TYPES.items():
    assert [f.name for f in fields(_row_type)] == SCHEMAS[_table].names
