"""One page of a study, to keep, to mail or to print: a single HTML file that asks nothing of any network.

`search.figures` draws it, the templates lay it out. The page has every figure as static SVG too, for paper, for mail
programs and wherever scripts do not run; the light one has these alone. All text that comes from a study is escaped,
and the page's security policy runs no script but its own.
"""

import base64
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pyarrow as pa
from markupsafe import Markup

from search import figures
from search.comparison import Arm, Comparison, compare
from search.drawing import look_of
from search.events import Tell, untold
from search.leaderboard import ADVERSARIAL
from search.lease import Lease, LeaseHeld
from search.pictures import pictures
from search.progress import duration
from search.results import STUDY_FILE, ActivationSummary, Study, Summary
from search.storage import Location, location, reason_of, write_atomically
from search.svg import svg
from search.tables import FinalRow, TrialRow
from search.trial_table import outcome, text_of, trial_table
from vae.config import InputError

REPORT_FILE = "report.html"
STATIC_ROWS, STATIC_ROWS_LIGHT = 50, 200  # of the table of trials, where no script is there to turn its pages
MAX_REASON = 1500
MAX_REASONS = 25  # that differ

T = TypeVar("T")

PARTS = (
    "the comparison",
    "figures of activations",
    "figures of the search",
    "figures of parameters",
    "figures of models",
    "figures of cost",
    "the page",
)
"""In the order in which they are made."""


def write_report(
    study: Study, output: str | Location | None = None, *, light: bool = False, tell: Tell = untold
) -> Location:
    """Write the page, whole or not at all, and return where: by default the study's folder, or, where the study lies
    on remote storage, `<study>.html` in the working directory. Raises InputError if it cannot be written there.
    """
    target: Location
    if output is None:
        target = study.path / REPORT_FILE if isinstance(study.path, Path) else Path(f"{study.name}.html")
    else:
        target = location(output)
    if isinstance(target, Path) and target.is_dir():
        raise InputError(f"{target}: is a folder; name a file in it with -o")
    content = report_html(study, light=light, tell=tell).encode()
    try:
        write_atomically(target, content)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {reason_of(error)}; name another file with -o") from None
    return target


def report_html(study: Study, *, light: bool = False, tell: Tell = untold) -> str:
    """The page as text; light: without any script, and small."""
    study = Snapshot(study.path)
    tell(0, len(PARTS), PARTS[0])
    comparison = compare(study) if study.spec.train.objective == "elbo" else None
    rows, summary = study.rows(), study.summary()
    tell(1, len(PARTS), PARTS[1])
    sections = []
    for done, section in enumerate(_sections(study, comparison), start=2):
        sections.append(section)
        tell(done, len(PARTS), PARTS[done])
    table = trial_table(rows)
    shown, too_large = pictures(study, summary.leaders, light)
    scripts = [] if light else [_plotly(), _template_text("report.js")]
    data = {
        "figures": {part.id: part.plotly for section in sections for part in section.figures},
        "trials": table.document(),
    }
    return (
        _environment()
        .get_template("report.html")
        .render(
            study=study,
            spec=study.spec,
            provenance=study.provenance,
            study_file=(study.path / STUDY_FILE).read_text(encoding="utf-8"),
            written_at=datetime.now(UTC),
            status=_status(study, summary, comparison),
            sentence=_sentence(summary) if comparison is None else comparison.sentence,
            setting=None if comparison is None else comparison.setting,
            caveats=[ADVERSARIAL] if comparison is None else comparison.caveats,
            commands=() if comparison is None else comparison.commands,
            tiles=list(_tiles(summary, rows)),
            activations=_activations(summary, comparison),
            legend=[_Key(name) for name in sorted({row.activations for row in rows})],
            sections={section.id: section for section in sections},
            pictures=shown,
            too_large=too_large,
            without_pictures=_without(summary, [*(entry.row.activations for entry in shown), *too_large]),
            table=table,
            static_rows=[table.texts(row) for row in table.rows[: STATIC_ROWS_LIGHT if light else STATIC_ROWS]],
            outcomes=sorted({outcome(row) for row in rows}),
            failures=_failures(rows, study.final_rows()),
            interruptions=_interruptions(study.attempts()),
            costs=list(_costs(summary, rows, study.final_rows())),
            light=light,
            style=Markup(_template_text("report.css")),
            scripts=[Markup(script) for script in scripts],
            data=_in_script(data),
            policy=_policy(scripts),
        )
    )


class Snapshot(Study):
    """A study of which every table is read once: all that is made of it tells of one moment."""

    def __init__(self, path: Location) -> None:
        super().__init__(path)
        self._read: dict[str, Any] = {}

    def _table(self, name: str) -> pa.Table:
        return self._once(name, lambda: super(Snapshot, self)._table(name))

    def rows(self) -> list[TrialRow]:
        return self._once("rows", super().rows)

    def final_rows(self) -> list[FinalRow]:
        return self._once("final_rows", super().final_rows)

    def _once(self, name: str, read: Callable[[], T]) -> T:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]


# ---- figures


@dataclass(frozen=True)
class _Figure:
    id: str
    title: str
    note: str
    static: Markup  # SVG
    plotly: dict[str, Any]
    is_wide: bool


@dataclass(frozen=True)
class _Section:
    id: str
    figures: tuple[_Figure, ...]
    missing: tuple[str, ...]  # what there is nothing to draw for, and why


def _sections(study: Study, comparison: Comparison | None) -> Iterator[_Section]:
    verdict, expected, shares, costs = [], [], [], []
    if comparison is not None:
        verdict = [figures.forest(comparison), figures.differences(comparison)]
        expected, shares = [figures.expected_best(comparison)], [figures.importances(comparison)]
        costs = [figures.cost_front(comparison)]
    parameters = [figures.parameter_slice(study, name) for name in figures.searched(study.rows())]
    yield _section("activations", *verdict)
    yield _section("search", figures.learning_curves(study), *expected)
    yield _section("parameters", figures.learning_rates(study), *shares, *parameters)
    yield _section(
        "models",
        figures.rate_distortion(study),
        figures.dead_units(study),
        figures.active_units(study),
        figures.gradient_ratios(study, "encoder"),
        figures.gradient_ratios(study, "decoder"),
    )
    yield _section("cost", *costs, beside=1)


def _section(id: str, *all_figures: Any, beside: int = 0) -> _Section:
    """Figures stand two by two; of an odd number the first takes the page's width. beside: other cards with them."""
    drawn = [figure for figure in all_figures if figure.data]
    missing = [figure for figure in all_figures if not figure.data]
    is_odd = (len(drawn) + beside) % 2 == 1
    return _Section(
        id,
        tuple(_figure(f"{id}-{number}", figure, number == 0 and is_odd) for number, figure in enumerate(drawn)),
        tuple(f"{figure.layout.title.text}: {figure.layout.meta['note']}" for figure in missing),
    )


def _figure(id: str, figure: Any, is_wide: bool) -> _Figure:
    title, note = figure.layout.title.text, figure.layout.meta["note"]
    static = Markup(svg(figure, f"{title}. {note}"))
    figure.update_layout(title=None, showlegend=False, margin={"t": 12}, height=figure.layout.height - 32)
    return _Figure(id, title, note, static, json.loads(figure.to_json()), is_wide)


class _Key:
    """An entry of the legend."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.colour, self.symbol = look_of(activation)


# ---- what the page says in words and tables


def _status(study: Study, summary: Summary, comparison: Comparison | None) -> tuple[str, str]:
    """(a word for the style sheet, the words for people)."""
    done = f"{summary.ended:,} of {summary.trials:,} trials"
    if summary.is_complete if comparison is None else comparison.is_complete:
        return "complete", f"complete, {done}"
    try:
        Lease(study.path).check()
    except LeaseHeld:
        return "running", f"still running: {done} when this was written"
    return "unfinished", f"unfinished: {done}; nobody is at work on it"


def _sentence(summary: Summary) -> str:
    """For studies whose losses compare nothing but their own trials."""
    best = summary.best
    if best is None or best.ranks_by is None:
        return "No healthy trial has trained to its last epoch yet."
    return f"The best reconstructions have a squared error of {best.ranks_by:.3f} per example: {best.activations}."


def _tiles(summary: Summary, rows: Sequence[TrialRow]) -> Iterator[tuple[str, str, str]]:
    """(what, the figure, what it means)."""
    best = summary.best
    if best is not None and best.ranks_by is not None:
        unit = "nats per example" if best.train_objective == "elbo" else "squared error"
        yield "best trial", f"{best.ranks_by:.3f}", f"{unit}, validation; trial {best.trial}, {best.activations}"
        if summary.no_latent_nelbo is not None and best.train_objective == "elbo":
            gain = summary.no_latent_nelbo - best.ranks_by
            yield "gain", f"{gain:.2f}", f"nats below a model without latents ({summary.no_latent_nelbo:.2f})"
    failed = sum(count for status, count in summary.statuses.items() if status != "ok")
    kinds = [f"{len(summary.leaders)} in full", f"{summary.stopped} stopped early"]
    yield "trials", f"{summary.ended:,}", ", ".join([*kinds, f"{failed} failed"] if failed else kinds)
    if summary.epochs_saved:
        share = summary.epochs_saved / (summary.epochs_trained + summary.epochs_saved)
        yield "epochs saved", f"{share:.0%}", f"{summary.epochs_saved:,}, by stopping trials early"
    yield "training", duration(summary.train_wall_s), "of worker time"


def _activations(summary: Summary, comparison: Comparison | None) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of the table; columns without a value are left out."""
    if comparison is None:
        header = ["activation", "trials", "in full", "stopped early", "failed", "best", "trial"]
        return header, [_summed_up(entry) for entry in summary.activations]
    estimates = {} if comparison.verdict is None else {e.name: e for e in comparison.verdict.estimates}
    columns: dict[str, Callable[[Arm], str]] = {
        "activation": lambda arm: arm.activation,
        "test loss": lambda arm: f"{estimates[arm.activation].mean:.3f}" if arm.activation in estimates else "",
        "95 % interval": lambda arm: _interval(estimates.get(arm.activation)),
        "sd of seeds": lambda arm: _unless_nan(estimates[arm.activation].sd) if arm.activation in estimates else "",
        "first": lambda arm: f"{estimates[arm.activation].first:.0%}" if arm.activation in estimates else "",
        "best trial": lambda arm: "" if arm.best is None else text_of(arm.best.val_nelbo, "nats"),
        "trial": lambda arm: "" if arm.best is None else str(arm.best.trial),
        "learning rate": lambda arm: "" if arm.best is None else f"{arm.best.learning_rate:.1e}",
        "trials": lambda arm: str(arm.trials),
        "failed": lambda arm: str(arm.failed) if any(a.failed for a in comparison.arms) else "",
        "failed runs": lambda arm: f"{arm.failed_runs} of {arm.runs}" if arm.failed_runs else "",
        "screen median": lambda arm: text_of(arm.screen_median, "nats"),
        "gap": lambda arm: text_of(arm.screen_gap, "nats"),
        "settings in 1 nat": lambda arm: "" if arm.robustness is None else f"{arm.robustness:.0%}",
        "parameters": lambda arm: text_of(arm.num_parameters, "count"),
        "s an epoch": lambda arm: "" if arm.epoch_s is None else f"{arm.epoch_s:.3g}",
    }
    cells = {name: [show(arm) for arm in comparison.arms] for name, show in columns.items()}
    kept = [name for name in columns if any(cells[name])]
    return kept, [list(row) for row in zip(*(cells[name] for name in kept), strict=True)]


def _summed_up(entry: ActivationSummary) -> list[str]:
    best = ["", ""] if entry.best is None else [text_of(entry.best.ranks_by, "nats"), str(entry.best.trial)]
    return [entry.activation, *map(str, (entry.trials, entry.full, entry.stopped, entry.failed)), *best]


def _unless_nan(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _interval(estimate: Any) -> str:
    return "" if estimate is None else f"{estimate.interval.low:.3f} to {estimate.interval.high:.3f}"


def _without(summary: Summary, there: Sequence[str]) -> list[str]:
    """The activations of which no model has been exported."""
    return [entry.activation for entry in summary.activations if entry.activation not in there]


@dataclass(frozen=True)
class _Failure:
    what: str
    count: int
    activations: str
    trials: str
    reason: str


def _failures(rows: Sequence[TrialRow], finals: Sequence[FinalRow]) -> list[_Failure]:
    """The trials and runs that failed, those of the same cause together, the most frequent first."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        if row.status not in (None, "ok"):
            where = f" at step {row.step:,}" if row.step is not None else ""
            where += f" in {row.layer}" if row.layer else ""
            first = (row.reason or "").split("\n")[0]
            groups[str(row.status), first].append((row.activations, f"{row.trial}{where}"))
    for final in finals:
        if final.state != "RUNNING" and final.status not in (None, "ok"):
            first = (final.reason or "").split("\n")[0]
            groups[f"final run: {final.status}", first].append((final.activation, f"{final.trial}, run {final.run}"))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        _Failure(
            what=what,
            count=len(members),
            activations=", ".join(f"{name} ({n})" for name, n in Counter(name for name, _ in members).most_common()),
            trials="; ".join(trial for _, trial in members[:8]) + ("; ..." if len(members) > 8 else ""),
            reason=reason[:MAX_REASON],
        )
        for (what, reason), members in ordered[:MAX_REASONS]
    ]


def _interruptions(attempts: pa.Table) -> list[tuple[str, int, str]]:
    """(outcome, how often, an example's reason) of attempts that were cut off and made again."""
    groups: dict[str, list[str]] = defaultdict(list)
    for what, reason in zip(attempts["outcome"].to_pylist(), attempts["reason"].to_pylist(), strict=True):
        if what not in (None, "ended"):
            groups[what].append((reason or "").split("\n")[0][:MAX_REASON])
    return [(what, len(reasons), max(reasons, key=len)) for what, reasons in sorted(groups.items())]


def _costs(summary: Summary, rows: Sequence[TrialRow], finals: Sequence[FinalRow]) -> Iterator[tuple[str, str]]:
    yield "epochs trained", f"{summary.epochs_trained:,}"
    if summary.epochs_saved:
        yield "epochs saved by early stopping", f"{summary.epochs_saved:,}"
    yield "time of workers, search", duration(summary.train_wall_s)
    finals = [final for final in finals if final.state != "RUNNING"]
    if finals:
        spent = sum(final.train_wall_s + (final.score_wall_s or 0.0) for final in finals)
        yield f"time of workers, {len(finals)} final runs", duration(spent)
    ends = [row.ended_at for row in rows if row.ended_at is not None]
    ends += [final.ended_at for final in finals if final.ended_at is not None]
    if ends:
        begun = min(row.suggested_at for row in rows)
        yield "from the first suggestion to the last end", duration((max(ends) - begun).total_seconds())
    if summary.restarts:
        yield "times a trial was started again", f"{summary.restarts:,}"
    devices = Counter(row.device for row in rows if row.device)
    if devices:
        yield "trained on", ", ".join(f"{device} ({count:,} trials)" for device, count in devices.most_common(5))
    hosts = {row.host for row in rows if row.host}
    if len(hosts) > 1:
        yield "machines", f"{len(hosts):,}"


# ---- the page


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["duration"] = duration
    return environment


def _template_text(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _in_script(value: Any) -> Markup:
    """JSON that is safe within a script element, whatever its texts are."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched from anywhere, and no script runs but those of the page."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    sources = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
