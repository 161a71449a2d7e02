"""What a study found, for a terminal and as plain values for JSON."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from search.output import plain
from search.progress import activation_text, duration, hidden_text, params_text, shapes_differ
from search.results import Study, Summary, storage_flag
from search.tables import TrialRow
from search.terminal import Column, Table, print_text
from vae.data import SourceStatus

LEADERS_SHOWN = 5
ADVERSARIAL = (
    "trained adversarially: ranked by the squared error of reconstructions; the bounds in nats are not what was "
    "trained for and compare with no other study"
)
TEXT_COLUMNS = (
    "parameters",
    "activation",
    "state",
    "status",
    "study",
    "data",
)
LONG_COLUMN = "parameters"  # below its row where it does not fit

T = TypeVar("T")


def print_study(console: Console, study: Study) -> None:
    """Leaders, the best of each activation, what early stopping saved, and what to type next."""
    summary = study.summary()
    print_text(console, f"{summary.name}: {_counts(summary)}", marks={summary.name: "bold"})
    if summary.train_objective != "elbo":
        print_text(console, ADVERSARIAL)
    if summary.best is None:
        print_text(console, _no_verdict(summary))
    else:
        print_text(console, _verdict(summary), marks={f"{summary.best.ranks_by:.3f}": "bold green"})
        console.print(_leaders_table(summary), soft_wrap=True)
    if summary.activations:
        table = replace(_activations_table(summary), is_next=summary.best is not None)
        console.print(table, soft_wrap=True)
    for line in _costs(summary):
        print_text(console, line)
    print_next(console, study, summary)


def print_next(console: Console, study: Study, summary: Summary) -> None:
    """Where the models are, and what to type next: whole, to be copied."""
    for folder in study.model_folders():
        console.print(Text(f"model: {folder}"), soft_wrap=True)
    console.print(Text("\n".join(["next:", *next_commands(study, summary)]), style="dim"), soft_wrap=True)


def as_json(study: Study) -> dict[str, Any]:
    """The same as one JSON document."""
    summary = study.summary()
    values = asdict(summary) | {
        "path": str(study.path),
        "is_complete": summary.is_complete,
        "best": None if summary.best is None else asdict(summary.best),
        "models": [str(folder) for folder in study.model_folders()],
    }
    return {key: plain(value) for key, value in values.items()}


def next_commands(study: Study, summary: Summary) -> Iterator[str]:
    where = storage_flag(study.path)
    name = shlex.quote(study.name)
    yield f"  vaesearch show {name}{where} --trials"
    if summary.train_objective == "elbo":
        yield f"  vaesearch compare {name}{where}"
    yield f"  vaesearch report {name}{where}"
    of_study = f"WHERE study = '{study.name}' AND state = 'COMPLETE'"
    sql = f"SELECT activation, min(val_nelbo) FROM trials {of_study} GROUP BY 1 ORDER BY 2"
    yield f'  vaesearch query "{sql}"{where}'
    if summary.best is not None:
        yield f"  vaesearch export {name}{where} --top 1 --to model"


def trials_table(rows: Sequence[TrialRow]) -> Table:
    """Every trial, a line each."""
    with_shape = shapes_differ(rows)
    return _table(
        rows,
        {
            "trial": lambda row: str(row.trial),
            "state": lambda row: row.state,
            "status": lambda row: row.status or "",
            "nelbo": lambda row: _nats(row.val_nelbo),
            "epochs": lambda row: f"{row.epochs}/{row.max_epochs}",
            "parameters": lambda row: params_text(row, with_shape),
        },
    )


def studies_table(studies: Sequence[Study]) -> Table:
    """The studies of a folder, a line each."""

    def best_of(summary: Summary) -> TrialRow | None:
        return summary.best if summary.train_objective == "elbo" else None

    return _table(
        [(study, study.summary()) for study in studies],
        {
            "study": lambda of: of[0].name,
            "data": lambda of: of[0].spec.data.source,
            "trials": lambda of: f"{of[1].ended}/{of[1].trials}",
            "best": lambda of: _nats(best.val_nelbo if (best := best_of(of[1])) else None),
            "parameters": lambda of: params_text(best) if (best := best_of(of[1])) else "",
        },
    )


def source_lines(sources: list[SourceStatus]) -> Iterator[str]:
    """The data sets that are known by name: what is there, and how to get the rest."""
    for source in sources:
        if source.found:
            yield f"{source.name}: {source.description}, {source.where}"
        else:
            yield f"{source.name}: not found; {source.how_to_get}"
    yield "or the path of a .npy, .npz, .csv or .parquet file"


def _verdict(summary: Summary) -> str:
    best = summary.best
    assert best is not None
    assert best.val_nelbo is not None
    if best.train_objective != "elbo":
        return f"best reconstructions: {best.ranks_by:.3f} squared error per example, trial {best.trial}"
    against = ""
    if summary.no_latent_nelbo is not None:
        gain = summary.no_latent_nelbo - best.val_nelbo
        against = f", {gain:.2f} below a model that ignores its latents ({summary.no_latent_nelbo:.2f})"
    return f"best: {best.val_nelbo:.3f} nats per example, trial {best.trial}{against}"


def _no_verdict(summary: Summary) -> str:
    text = "no healthy trial has trained to its last epoch"
    if summary.lowest is None or summary.no_latent_nelbo is None:
        return text
    text += f"; the lowest value seen is {summary.lowest:.3f}, a model that ignores its latents has "
    text += f"{summary.no_latent_nelbo:.3f}"
    return text + ("; more epochs may help" if summary.is_complete else "")


def _leaders_table(summary: Summary) -> Table:
    leaders = summary.leaders[:LEADERS_SHOWN]
    ranks = {row.trial: str(rank) for rank, row in enumerate(leaders, start=1)}
    figures: dict[str, Callable[[TrialRow], str]] = {
        "rank": lambda row: ranks[row.trial],
        "trial": lambda row: str(row.trial),
        "error": lambda row: _nats(row.ranks_by),
        "nelbo": lambda row: _nats(row.val_nelbo),
        "recon": lambda row: _nats(row.val_recon),
        "kl": lambda row: _nats(row.val_kl),
        "active": lambda row: f"{row.active_units}/{row.latent_dim}",
        "activation": activation_text,
        "lr": lambda row: f"{row.learning_rate:.1e}",
        "dropout": lambda row: f"{row.dropout:.2f}",
    }
    if summary.train_objective == "elbo":
        del figures["error"]
    if len({tuple(row.hidden_dims) for row in leaders}) > 1:
        figures["hidden"] = hidden_text
    if len({row.batch_size for row in leaders}) > 1:
        figures["batch"] = lambda row: str(row.batch_size)
    return _table(leaders, figures)


def _activations_table(summary: Summary) -> Table:
    return _table(
        summary.activations,
        {
            "activation": lambda entry: entry.activation,
            "trials": lambda entry: str(entry.trials),
            "full": lambda entry: str(entry.full),
            "stopped": lambda entry: str(entry.stopped),
            "failed": lambda entry: str(entry.failed),
            "best": lambda entry: _nats(entry.best.ranks_by if entry.best else None),
            "trial": lambda entry: str(entry.best.trial) if entry.best else "",
            "lr": lambda entry: f"{entry.best.learning_rate:.1e}" if entry.best else "",
        },
    )


def counts(summary: Summary) -> dict[str, int]:
    """What became of the trials, in words, and of how many."""
    return {
        "in full": len(summary.leaders),
        "stopped early": summary.stopped,
        **{status: n for status, n in summary.statuses.items() if status != "ok"},
        "unfinished": summary.states.get("RUNNING", 0),
    }


def _counts(summary: Summary) -> str:
    parts = [f"{count} {word}" for word, count in counts(summary).items() if count]
    return f"{summary.ended} of {summary.trials} trials, {', '.join(parts) or 'none begun'}"


def _costs(summary: Summary) -> Iterator[str]:
    total = summary.epochs_trained + summary.epochs_saved
    if summary.epochs_saved:
        share = summary.epochs_saved / total
        yield f"early stopping saved {summary.epochs_saved} of {total} epochs ({share:.0%})"
    yield f"training took {duration(summary.train_wall_s)} of worker time"
    if summary.restarts:
        yield f"{summary.restarts} times a trial was started again; the attempts table says why"


def _table(rows: Sequence[T], figures: Mapping[str, Callable[[T], str]]) -> Table:
    """A line a row. figures: what stands in the columns, by their headers."""
    columns = [
        Column(name, [figure(row) for row in rows], is_text=name in TEXT_COLUMNS, is_long=name == LONG_COLUMN)
        for name, figure in figures.items()
    ]
    return Table(columns)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
