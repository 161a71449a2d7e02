"""What a study found, for a terminal and as plain values for JSON."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from search.output import plain
from search.progress import activation_text, duration, hidden_text, params_text, shapes_differ
from search.results import Study, Summary, storage_flag
from search.tables import TrialRow
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


def print_study(console: Console, study: Study) -> None:
    """Leaders, the best of each activation, what early stopping saved, and what to type next."""
    summary = study.summary()
    console.print(f"[bold]{summary.name}[/bold]: {_counts(summary)}")
    if summary.train_objective != "elbo":
        console.print(ADVERSARIAL, soft_wrap=True)
    if summary.best is None:
        console.print(_no_verdict(summary), soft_wrap=True)
    else:
        console.print(_verdict(summary), soft_wrap=True)
        console.print(_leaders_table(summary))
    if summary.activations:
        console.print(_activations_table(summary))
    console.print("\n".join(_costs(summary)))
    print_next(console, study, summary)


def print_next(console: Console, study: Study, summary: Summary) -> None:
    """Where the models are, and what to type next."""
    for folder in study.model_folders():
        console.print(f"model: {folder}", soft_wrap=True)
    console.print("\n".join(["next:", *next_commands(study, summary)]), soft_wrap=True, style="dim")


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
    yield (f'  vaesearch query "SELECT activation, min(val_nelbo) FROM trials GROUP BY 1 ORDER BY 2"{where}')
    if summary.best is not None:
        yield f"  vaesearch export {name}{where} --top 1 --to model"


def trials_table(rows: list[TrialRow]) -> Table:
    """Every trial, a line each."""
    table = _table("trial", "state", "status", "nelbo", "epochs", "parameters")
    with_shape = shapes_differ(rows)
    for row in rows:
        epochs, params = f"{row.epochs}/{row.max_epochs}", params_text(row, with_shape)
        table.add_row(str(row.trial), row.state, row.status or "", _nats(row.val_nelbo), epochs, params)
    return table


def studies_table(studies: list[Study]) -> Table:
    """The studies of a folder, a line each."""
    table = _table("study", "data", "trials", "best", "parameters")
    for study in studies:
        summary, source = study.summary(), study.spec.data.source
        done = f"{summary.ended}/{summary.trials}"
        best = summary.best if summary.train_objective == "elbo" else None
        table.add_row(
            study.name, source, done, _nats(best.val_nelbo if best else None), params_text(best) if best else ""
        )
    return table


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
        return f"best reconstructions: [bold green]{best.ranks_by:.3f}[/] squared error per example, trial {best.trial}"
    against = ""
    if summary.no_latent_nelbo is not None:
        gain = summary.no_latent_nelbo - best.val_nelbo
        against = f", {gain:.2f} below a model that ignores its latents ({summary.no_latent_nelbo:.2f})"
    return f"best: [bold green]{best.val_nelbo:.3f}[/] nats per example, trial {best.trial}{against}"


def _no_verdict(summary: Summary) -> str:
    text = "no healthy trial has trained to its last epoch"
    if summary.lowest is None or summary.no_latent_nelbo is None:
        return text
    text += f"; the lowest value seen is {summary.lowest:.3f}, a model that ignores its latents has "
    text += f"{summary.no_latent_nelbo:.3f}"
    return text + ("; more epochs may help" if summary.is_complete else "")


def _leaders_table(summary: Summary) -> Table:
    leaders = summary.leaders[:LEADERS_SHOWN]
    figures = {
        "rank": lambda rank, row: str(rank),
        "trial": lambda rank, row: str(row.trial),
        "error": lambda rank, row: _nats(row.ranks_by),
        "nelbo": lambda rank, row: _nats(row.val_nelbo),
        "recon": lambda rank, row: _nats(row.val_recon),
        "kl": lambda rank, row: _nats(row.val_kl),
        "active": lambda rank, row: f"{row.active_units}/{row.latent_dim}",
        "activation": lambda rank, row: activation_text(row),
        "lr": lambda rank, row: f"{row.learning_rate:.1e}",
        "dropout": lambda rank, row: f"{row.dropout:.2f}",
    }
    if summary.train_objective == "elbo":
        del figures["error"]
    if len({tuple(row.hidden_dims) for row in leaders}) > 1:
        figures["hidden"] = lambda rank, row: hidden_text(row)
    if len({row.batch_size for row in leaders}) > 1:
        figures["batch"] = lambda rank, row: str(row.batch_size)
    table = _table(*figures)
    for rank, row in enumerate(leaders, start=1):
        table.add_row(*(figure(rank, row) for figure in figures.values()))
    return table


def _activations_table(summary: Summary) -> Table:
    table = _table("activation", "trials", "full", "stopped", "failed", "best", "trial", "lr")
    for entry in summary.activations:
        best = entry.best
        figures = (str(entry.trials), str(entry.full), str(entry.stopped), str(entry.failed))
        if best is None:
            table.add_row(entry.activation, *figures, "", "", "")
        else:
            table.add_row(
                entry.activation, *figures, _nats(best.ranks_by), str(best.trial), f"{best.learning_rate:.1e}"
            )
    return table


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


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for column in columns:
        left = column in TEXT_COLUMNS
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=column != "parameters")
    return table


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
