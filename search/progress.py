"""How far things are, on stderr: a study as a live picture in a terminal, and one line a trial elsewhere; what else
takes a while as a bar, or a line now and then."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress as Bar
from rich.progress import ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.events import StudyEvents
from search.results import ranked
from search.spec import StudySpec
from search.tables import AttemptRow, EpochRow, FinalRow, TrialRow
from search.terminal import fitting, make_console
from vae.config import OWN_PARAMETERS

REFRESH_PER_S = 4
QUIET_S = 2.0  # what takes no longer shows no bar
LINE_EVERY_S = 10.0  # where no terminal is
BAR_WIDTHS = 8, 30  # the shortest and the longest


class Progress(StudyEvents):
    """Use as a context manager round `run_study`, and pass it as one of its events."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console(stderr=True)
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
        """As wide as the terminal is just now: what does not fit is left out, piece by piece."""
        if not self._trials:
            return Text("starting", style="dim")
        width = self.console.width
        what = f"{self._ended} of {self._trials} {'runs of finalists' if self._is_confirming else 'trials'}"
        left = self._seconds_left()
        rest = [] if left is None else [f"about {duration(left)} left"]
        return Group(
            _bar_line(what, self._ended, self._trials, rest, width), self._best_so_far(width), *self._running_now(width)
        )

    def _best_so_far(self, width: int) -> Text:
        best = Text.assemble(("best so far: ", "bold"))
        if self._best is None:
            return best.append(fitting(["none has trained to its last epoch yet"], width - len(best)), style="dim")
        best.append(f"{self._best.ranks_by:.3f} {unit_of(self._best)}", style="bold green")
        params = f"trial {self._best.trial}: {params_text(self._best, self._with_shape)}".split(", ")
        return best.append(f"  {fitting(params, width - len(best) - 2)}")

    def _running_now(self, width: int) -> Iterator[Text]:
        """A line for each trial, or run of a finalist, that is under way."""
        running = sorted(self._running.values(), key=lambda row: row.trial)
        lines = [
            (
                f"  trial {row.trial}",
                f"epoch {row.epochs}/{row.max_epochs}",
                "starting" if row.val_nelbo is None else f"{row.val_nelbo:.3f}",
                params_text(row, self._with_shape),
            )
            for row in running
        ]
        finals = sorted(self._finals_running.values(), key=lambda final: (final.run, final.trial))
        lines += [(f"  trial {final.trial}", f"run {final.run}", "", final.activation) for final in finals]
        widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
        for *figures, params in lines:
            line = Text(no_wrap=True)
            for text, its_width in zip(figures, widths, strict=False):
                if len(line) + its_width <= width:
                    line.append(text.ljust(its_width + 2 * (its_width > 0)))
            yield line.append(fitting(params.split(", "), width - len(line)), style="dim")


class Counter(Protocol):
    """Hears that so many of a total are done, and what else may be said of it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def counting(unit: str, console: Console | None = None, *, is_even: bool = True) -> Iterator[Counter]:
    """A bar in a terminal, and elsewhere a line now and then, once it takes a while. `unit`: what is counted.

    is_even: each takes about as long as any other, so that the time left can be told. A KeyboardInterrupt that passes
    through takes along as a note how far it was.
    """
    count = _Count(unit, console or make_console(stderr=True), is_even)
    try:
        yield count.tell
    except KeyboardInterrupt as interrupt:
        if count.how_far:
            interrupt.add_note(count.how_far)
        raise
    finally:
        count.end()


class _Count:
    """Of one thing: `tell` is its Counter."""

    def __init__(self, unit: str, console: Console, is_even: bool) -> None:
        self._unit, self._console, self._is_even = unit, console, is_even
        self._start = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._told: tuple[int, int, str] | None = None  # done, total, text
        self._bar: Bar | None = None
        self._lock, self._is_over = threading.Lock(), False
        self._timer = threading.Timer(QUIET_S, self._show)  # also where nothing is told for long
        self._timer.daemon = True
        if console.is_terminal:
            self._timer.start()

    @property
    def how_far(self) -> str:
        """In words; nothing to be said of what is one piece."""
        if self._told is None or self._told[1] == 1:
            return ""
        return f"with {self._told[0]:,} of {self._told[1]:,} {self._unit} done"

    def tell(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        since, before = self._first = self._first or (now, done)
        is_told = self._is_even and before < done < total
        left = f"about {duration((now - since) / (done - before) * (total - done))} left" if is_told else ""
        text = ", ".join(part for part in (note, left) if part)
        self._told = done, total, text
        if now - self._start < QUIET_S:
            return
        if self._console.is_terminal:
            self._show()
        elif now - self._said >= LINE_EVERY_S and done < total:
            self._said = now
            what = f"{done:,} of {total:,} {self._unit}" if total > 1 else ""
            line = Text(": ".join(part for part in ("vaesearch", what, text) if part))
            self._console.print(line, soft_wrap=True)

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_over = True
            if self._bar is not None:
                self._bar.stop()

    def _show(self) -> None:
        with self._lock:
            if self._told is None or self._is_over:
                return
            done, total, text = self._told
            if self._bar is None:
                bar = Bar(_Line(self._unit, self._console, self._start), console=self._console, transient=True)
                bar.add_task(text, total=total)
                bar.start()
                self._bar = bar
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)


class _Line(ProgressColumn):
    """All that there is to see of a `_Count`, in one line."""

    def __init__(self, unit: str, console: Console, start: float) -> None:
        super().__init__()
        self._unit, self._console, self._start = unit, console, start

    def render(self, task: Task) -> RenderableType:
        done, total = int(task.completed), int(task.total or 0)
        rest = task.description.split(", ")
        if not rest[-1].endswith(" left"):
            rest.append(f"{duration(time.monotonic() - self._start)} so far")
        if total == 1:
            return Text(fitting(rest, self._console.width), no_wrap=True)
        return _bar_line(f"{self._unit} {done:,}/{total:,}", done, total, rest, self._console.width)


def _bar_line(what: str, done: int, total: int, rest: Iterable[str], width: int) -> RenderableType:
    """What is counted, a bar where there is room for one, and of the rest what fits."""
    said = fitting(rest, width - len(what) - 2)
    shortest, longest = BAR_WIDTHS
    left = min(longest, width - len(what) - 2 - (len(said) + 2 if said else 0))
    cells: list[RenderableType] = [Text(what)]
    if left >= shortest:
        cells.append(ProgressBar(total=total, completed=done, width=left))
    if said:
        cells.append(Text(said, style="dim"))
    line = Table.grid(padding=(0, 2))
    line.add_row(*cells)
    return line


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


def shapes_differ(rows: Sequence[TrialRow]) -> bool:
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
