"""How far things are, on stderr: a study as a live picture in a terminal, and one line a trial elsewhere; what else
takes a while as a bar, or a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.events import StudyEvents
from search.results import ranked
from search.spec import StudySpec
from search.tables import AttemptRow, EpochRow, FinalRow, TrialRow
from vae.config import OWN_PARAMETERS

REFRESH_PER_S = 4
QUIET_S = 2.0  # what takes no longer shows no bar
LINE_EVERY_S = 10.0  # where no terminal is
STATE_STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class Progress(StudyEvents):
    """Use as a context manager round `run_study`, and pass it as one of its events."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._trials = self._ended = self._ended_before = 0
        self._best: TrialRow | None = None
        self._with_shape = False
        self._running: dict[int, TrialRow] = {}
        self._first_start: float | None = None
        self._finals_running: dict[tuple[int, int], FinalRow] = {}  # by trial and run
        self._is_confirming = False
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._picture, console=self.console, refresh_per_second=REFRESH_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line for people, above the picture if there is one."""
        self.console.print(Text(text), soft_wrap=True)

    def where(self) -> str:
        """How far the study is, in words."""
        if self._is_confirming:
            return f"with {self._ended} of the finalists' {self._trials} runs done"
        return f"with {self._ended} of {self._trials} trials done" if self._trials else "before the first trial"

    def search_started(self, spec: StudySpec, rows: list[TrialRow]) -> None:
        self._trials = spec.budget.trials
        self._ended = self._ended_before = sum(row.state != "RUNNING" for row in rows)
        self._best = next(iter(ranked(rows)), None)
        space = spec.space
        self._with_shape = any(
            entry is not None for entry in (space.hidden_width, space.hidden_layers, space.batch_size)
        )

    def trial_started(self, row: TrialRow) -> None:
        self._first_start = self._first_start or time.monotonic()
        self._running[row.trial] = row

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        self._running[row.trial] = row

    def worker_lost(self, row: TrialRow, attempt: AttemptRow) -> None:
        self.say(
            f"trial {row.trial}: attempt {attempt.attempt} {attempt.outcome} at epoch {row.epochs}: {attempt.reason}"
        )

    def state_damaged(self, row: TrialRow, attempt: AttemptRow) -> None:
        self.say(f"trial {row.trial}: {attempt.damaged}; it goes on from epoch {attempt.from_epoch}")

    def trial_ended(self, row: TrialRow) -> None:
        self._running.pop(row.trial, None)
        self._ended += 1
        self._best = next(iter(ranked([row, *([self._best] if self._best else [])])), None)
        if self._live is None:
            best = f"; best {self._best.ranks_by:.3f} (trial {self._best.trial})" if self._best else ""
            self.say(f"[{self._ended}/{self._trials}] {trial_line(row, self._with_shape)}{best}")

    def confirmation_started(self, total: int, ended: int) -> None:
        self._is_confirming = True
        self._trials, self._ended, self._ended_before, self._first_start = total, ended, ended, None
        if ended < total:
            self.say(f"finalists: {total} runs from fresh seeds, scored on the test split")

    def final_started(self, row: FinalRow) -> None:
        self._first_start = self._first_start or time.monotonic()
        self._finals_running[row.trial, row.run] = row
        if row.status is not None:
            self.say(
                f"trial {row.trial} as a finalist, run {row.run}: attempt {row.attempts - 1} {row.status}: {row.reason}"
            )

    def final_ended(self, row: FinalRow) -> None:
        self._finals_running.pop((row.trial, row.run), None)
        self._ended += 1
        if self._live is None:
            value = "no value" if row.nll is None else f"{row.nll:.3f} nats on the test split"
            what = row.state if row.status == "ok" else f"{row.state} ({row.status})"
            where = f"{row.activation} (trial {row.trial}), run {row.run}"
            self.say(f"[{self._ended}/{self._trials}] {where} {what}: {value}")

    def _seconds_left(self) -> float | None:
        done = self._ended - self._ended_before
        if not done or self._first_start is None:
            return None
        under_way = sum(row.epochs / row.max_epochs for row in self._running.values())
        return (time.monotonic() - self._first_start) / (done + under_way) * (self._trials - self._ended - under_way)

    def _picture(self) -> RenderableType:
        left = self._seconds_left()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{self._ended} of {self._trials} {'runs of finalists' if self._is_confirming else 'trials'}"),
            ProgressBar(total=self._trials, completed=self._ended, width=min(30, self.console.width // 3)),
            Text("" if left is None else f"about {duration(left)} left", style="dim"),
        )
        best = Text("best so far: ", style="bold")
        if self._best is None:
            best.append("none has trained to its last epoch yet", style="dim")
        else:
            best.append(f"{self._best.ranks_by:.3f} {unit_of(self._best)}", style="bold green")
            best.append(f"  trial {self._best.trial}: {params_text(self._best, self._with_shape)}")
        running = Table.grid(padding=(0, 2))
        for row in sorted(self._running.values(), key=lambda row: row.trial):
            value = f"{row.val_nelbo:.3f}" if row.val_nelbo is not None else "starting"
            running.add_row(
                f"  trial {row.trial}",
                f"epoch {row.epochs}/{row.max_epochs}",
                value,
                Text(params_text(row, self._with_shape), style="dim"),
            )
        for final in sorted(self._finals_running.values(), key=lambda final: (final.run, final.trial)):
            running.add_row(f"  trial {final.trial}", f"run {final.run}", final.activation)
        return Group(head, best, running)


class Counter(Protocol):
    """Hears that so many of a total are done, and what else may be said of it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def counting(unit: str, console: Console | None = None) -> Iterator[Counter]:
    """A bar in a terminal, and elsewhere a line now and then, once it takes a while. `unit`: what is counted."""
    console = console or Console(stderr=True, highlight=False)
    start = said = time.monotonic()
    first: tuple[float, int] | None = None
    bar: Bar | None = None

    def tell(done: int, total: int, note: str = "") -> None:
        nonlocal first, said, bar
        now = time.monotonic()
        first = first or (now, done)
        if now - start < QUIET_S:
            return
        since, before = first
        left = f"about {duration((now - since) / (done - before) * (total - done))} left" if done > before else ""
        text = ", ".join(part for part in (note, left) if part)
        if console.is_terminal:
            if bar is None:
                columns = unit, MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("{task.description}")
                bar = Bar(*columns, console=console, transient=True)
                bar.add_task("", total=total)
                bar.start()
            bar.update(bar.task_ids[0], completed=done, description=text)
        elif now - said >= LINE_EVERY_S and done < total:
            said = now
            console.print(Text(f"vaesearch: {done:,} of {total:,} {unit}: {text}"), soft_wrap=True)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.stop()


def unit_of(row: TrialRow) -> str:
    """Of what trials are ranked by."""
    return "nats" if row.train_objective == "elbo" else "squared error"


def trial_line(row: TrialRow, with_shape: bool = False) -> str:
    """One line on a trial that has ended."""
    if row.train_objective != "elbo" and row.objective is not None:
        value = f"{row.objective:.3f} {unit_of(row)}"
    else:
        value = f"{row.val_nelbo:.3f} nats" if row.val_nelbo is not None else "no value"
    what = row.state if row.status == "ok" else f"{row.state} ({row.status})"
    return f"trial {row.trial} {what} at epoch {row.epochs}/{row.max_epochs}: {value}, {params_text(row, with_shape)}"


def params_text(row: TrialRow, with_shape: bool = False) -> str:
    """The parameters in the space of a line; `with_shape` where hidden layers or batches differ between trials."""
    shape = f", hidden {hidden_text(row)}, batch {row.batch_size}" if with_shape else ""
    return (
        f"{activation_text(row)}, lr {row.learning_rate:.1e}, dropout {row.dropout:.2f}, latent {row.latent_dim}{shape}"
    )


def shapes_differ(rows: list[TrialRow]) -> bool:
    return len({(tuple(row.hidden_dims), row.batch_size) for row in rows}) > 1


def activation_text(row: TrialRow) -> str:
    """With the parameters of its own that were searched or set."""
    own = [getattr(row, name) for name in OWN_PARAMETERS]
    values = ", ".join(f"{value:.2g}" for value in own if value is not None)
    return f"{row.activations}({values})" if values else row.activations


def hidden_text(row: TrialRow) -> str:
    return "x".join(map(str, row.hidden_dims)) or "none"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
