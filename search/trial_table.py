"""Every trial as a table for a page: which columns, and how their values are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from search.output import plain
from search.progress import hidden_text
from search.results import ranked
from search.tables import PARAMS, TrialRow

Kind = Literal["text", "count", "nats", "number", "seconds"]

ACTIVATIONS = ("activation", "decoder_activation")  # one column for both
FIRST = ("learning_rate", "dropout", "latent_dim")  # of the parameters
MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    label: str
    kind: Kind
    value: Callable[[TrialRow], Any]


@dataclass(frozen=True, slots=True)
class TrialTable:
    """`rows` are plain values in the order of `columns`: the ranked trials first, best first, then by number."""

    columns: tuple[Column, ...]
    rows: list[list[Any]]

    def texts(self, row: Sequence[Any]) -> list[str]:
        return [text_of(value, column.kind) for column, value in zip(self.columns, row, strict=True)]

    def document(self) -> dict[str, Any]:
        """For a script that sorts and filters them."""
        columns = [{"key": c.key, "label": c.label, "kind": c.kind} for c in self.columns]
        return {"columns": columns, "rows": self.rows}


def trial_table(rows: Sequence[TrialRow]) -> TrialTable:
    """Columns in which nothing differs or nothing is known are left out."""
    columns = [
        Column("trial", "trial", "count", lambda row: row.trial),
        Column("phase", "phase", "text", lambda row: row.phase),
        Column("activation", "activation", "text", lambda row: row.activations),
        Column("outcome", "outcome", "text", outcome),
        Column("loss", "loss", "nats", lambda row: row.ranks_by),
        Column("recon", "recon", "nats", lambda row: row.val_recon),
        Column("kl", "KL", "nats", lambda row: row.val_kl),
        Column("active_units", "active", "count", lambda row: row.active_units),
        *map(_parameter, (*FIRST, *(name for name in PARAMS if name not in (*FIRST, *ACTIVATIONS)))),
        Column("hidden", "hidden", "text", hidden_text),
        Column("epochs", "epochs", "count", lambda row: row.epochs),
        Column("seconds", "seconds", "seconds", lambda row: row.train_wall_s),
        Column("weights", "weights", "count", lambda row: row.num_parameters),
        Column("reason", "why it ended", "text", lambda row: row.reason and row.reason[:MAX_REASON]),
    ]
    leaders = ranked(list(rows))
    leading = {row.trial for row in leaders}
    ordered = [*leaders, *(row for row in rows if row.trial not in leading)]
    if any(row.train_objective != "elbo" for row in rows):
        columns.insert(5, Column("nelbo", "nelbo", "nats", lambda row: row.val_nelbo))
    values = {column.key: [_compact(column.value(row)) for row in ordered] for column in columns}
    always = {"trial", "activation", "outcome", "loss"}
    told = ("learning_rate", "dropout", "latent_dim", "recon", "kl", "active_units", "epochs", "seconds")
    kept = [c for c in columns if c.key in always or _tells(values[c.key], len(ordered) < 2 and c.key in told)]
    return TrialTable(tuple(kept), [list(row) for row in zip(*(values[c.key] for c in kept), strict=True)])


def outcome(row: TrialRow) -> str:
    """What became of a trial, in a word or two."""
    if row.state == "RUNNING":
        return "unfinished"
    if row.status not in (None, "ok"):
        return str(row.status)
    return {"COMPLETE": "in full", "PRUNED": "stopped early"}.get(row.state, row.state.lower())


def text_of(value: Any, kind: Kind) -> str:
    """As the page's script writes it, too."""
    if value is None or value == "":
        return ""
    if kind == "nats":
        return f"{value:.3f}"
    if kind == "count":
        return f"{value:,}"
    if kind == "seconds":
        return f"{value:.1f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _parameter(name: str) -> Column:
    return Column(name, name.replace("_", " "), "number", lambda row: getattr(row, name))


def _compact(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value := plain(value), float) else value


def _tells(values: Sequence[Any], alone: bool) -> bool:
    known = {value for value in values if value is not None and value != ""}
    return len(known) > 1 or (bool(known) and (alone or None in values or "" in values))
