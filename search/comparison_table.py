"""A comparison in a terminal: the verdict in a sentence, the figures, and what to keep in mind.

Columns that do not fit stand in a second table below the first, each activation in the same line.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search.across import AcrossStudies
from search.comparison import Arm, Comparison
from search.comparison_words import p_text, pair_lines, span
from search.importance import FEWEST_TRIALS

if TYPE_CHECKING:
    from search.statistics import Estimate, Pair

IMPORTANCES_SHOWN = 0.01
"""Of all; parameters with less are not named."""


@dataclass(frozen=True)
class _Column:
    header: str  # its lines are apart
    cells: Sequence[str]
    is_extra: bool = False  # left out where it would not fit

    @property
    def width(self) -> int:
        return max(cell_len(line) for text in (self.header, *self.cells) for line in text.split("\n"))


def print_comparison(console: Console, comparison: Comparison, *, with_importances: bool = False) -> None:
    """The verdict first, then the figures, then what to keep in mind and what to type next."""
    _print(console, comparison.sentence, style="bold")
    for table in tables(_columns(comparison), console.width):
        console.print(table)
    for line in (*_legend(comparison), *(_importance_lines(comparison) if with_importances else ())):
        _print(console, line)
    for text in comparison.caveats:
        _print(console, f"- {text}")
    if comparison.commands:
        console.print(
            Text("\n".join(["next:", *(f"  {command}" for command in comparison.commands)]), style="dim"),
            soft_wrap=True,
        )


def print_pair(console: Console, comparison: Comparison, pair: "Pair") -> None:
    for line in pair_lines(comparison, pair):
        _print(console, line)


def print_across(console: Console, across: AcrossStudies) -> None:
    """Several studies: the ranks in a sentence, then a line an activation."""
    _print(console, across.sentence, style="bold")
    columns = [
        _Column("activation", across.activations),
        _Column("mean\nrank", [f"{across.mean_ranks[name]:.2f}" for name in across.activations]),
    ]
    for study, ranks in across.ranks.items():
        columns.append(_Column(study, [f"{ranks[name]:g}" for name in across.activations]))
    for table in tables(columns, console.width):
        console.print(table)
    for text in across.caveats:
        _print(console, f"- {text}")


def tables(columns: Sequence[_Column], width: int) -> Iterator[Table]:
    """The first column with as many others as fit, then again with the next ones."""
    name, *others = columns
    rest, extra = ([column for column in others if column.is_extra is which] for which in (False, True))
    while True:
        taken, used = [name], name.width + 2
        while rest and (len(taken) == 1 or used + 1 + rest[0].width <= width):
            used += 1 + rest[0].width
            taken.append(rest.pop(0))
        if not rest:
            taken += [column for column in extra if used + 1 + column.width <= width]
        yield _table(taken)
        if not rest:
            return


def _table(columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for place, column in enumerate(columns):
        table.add_column(Text(column.header), justify="right" if place else "left", no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _columns(comparison: Comparison) -> list[_Column]:
    """Those that have something to say, that of the activation first."""
    verdict = comparison.verdict
    estimates = {} if verdict is None else {estimate.name: estimate for estimate in verdict.estimates}
    leader = None if verdict is None else verdict.estimates[0].name
    pairs: dict[str, Pair] = {}
    for pair in () if verdict is None else verdict.pairs:
        if leader in (pair.a, pair.b):
            pairs[pair.b if pair.a == leader else pair.a] = pair

    def of_estimate(show: Callable[["Estimate"], str]) -> list[str]:
        return [show(estimates[arm.activation]) if arm.activation in estimates else "" for arm in comparison.arms]

    def of_pair(show: Callable[["Pair", bool], str]) -> list[str]:
        found = [(arm.activation, pairs.get(arm.activation)) for arm in comparison.arms]
        return ["" if pair is None else show(pair, pair.a == name) for name, pair in found]

    def of_arm(show: Callable[[Arm], str]) -> list[str]:
        return [show(arm) for arm in comparison.arms]

    columns = [
        _Column("activation", of_arm(lambda arm: arm.activation)),
        _Column("test\nnll", of_estimate(lambda estimate: f"{estimate.mean:.2f}")),
        _Column("95 %\ninterval", of_estimate(lambda estimate: span(estimate.interval))),
        _Column("behind\nleader", of_pair(lambda pair, is_a: f"{_signed(pair, is_a)[0]:.2f}")),
        _Column("95 %\ninterval", of_pair(lambda pair, is_a: "{1:.2f} to {2:.2f}".format(*_signed(pair, is_a)))),
        _Column("P of\nbetter", of_pair(lambda pair, is_a: f"{pair.better if is_a else 1 - pair.better:.2f}")),
        _Column("p by\nHolm", of_pair(lambda pair, is_a: "" if math.isnan(pair.p_holm) else p_text(pair.p_holm))),
        _Column("P of\nfirst", of_estimate(lambda estimate: f"{estimate.first:.2f}")),
        _Column("runs\nfailed", of_arm(lambda arm: f"{arm.failed_runs}/{arm.runs}" if arm.failed_runs else "")),
        _Column("best\nval", of_arm(lambda arm: _nats(None if arm.best is None else arm.best.val_nelbo))),
        _Column("trials\nfailed", of_arm(lambda arm: f"{arm.failed}/{arm.trials}")),
        _Column("95 %\ninterval", of_arm(_failure_interval)),
        _Column("screen\nmedian", of_arm(lambda arm: _nats(arm.screen_median))),
        _Column("gap", of_arm(lambda arm: _nats(arm.screen_gap))),
        _Column("within\n1 nat", of_arm(lambda arm: "" if arm.robustness is None else f"{arm.robustness:.0%}")),
        _Column("ms an\nepoch", of_arm(lambda arm: "" if arm.epoch_s is None else _milliseconds(arm.epoch_s))),
        _Column("para-\nmeters", of_arm(lambda arm: "" if arm.num_parameters is None else _short(arm.num_parameters))),
        _Column("front", of_arm(lambda arm: "yes" if arm.is_on_front else "")),
        _Column("at learning\nrates", of_arm(_rates), is_extra=True),
    ]
    return [column for column in columns if any(column.cells)]


def _legend(comparison: Comparison) -> Iterator[str]:
    if comparison.verdict is not None:
        yield (
            "test nll: nats an example, mean over the seeds; behind leader: paired by seed and row; P of better: than "
            "the leader, with a seed of its own; P of first: of having the lowest mean"
        )
    if any(arm.screened for arm in comparison.arms):
        yield (
            "screen median, gap, within 1 nat: over the settings common to all, failures as a penalty; gap: median "
            "difference to the best activation at the same setting; within 1 nat of its best: share of the settings"
        )
    if any(arm.is_on_front for arm in comparison.arms):
        yield "front: no other activation is both better and faster"


def _importance_lines(comparison: Comparison) -> Iterator[str]:
    shares, healthy = comparison.importances, comparison.importances_without_failures
    if shares is None:
        yield (
            f"what decided: not known; it takes {FEWEST_TRIALS} trials at the settings common to all activations, and "
            f"some that are better than others"
        )
    else:
        yield f"what decided at the common settings (PED-ANOVA): {_shares(shares)}"
    if healthy is not None and healthy != shares:
        yield f"  the same without failed trials: {_shares(healthy)}"


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= IMPORTANCES_SHOWN)


def _signed(pair: "Pair", is_a: bool) -> tuple[float, float, float]:
    """How far one of a pair is behind the other, and the interval of it."""
    if is_a:
        return pair.difference, pair.interval.low, pair.interval.high
    return -pair.difference, -pair.interval.high, -pair.interval.low


def _failure_interval(arm: Arm) -> str:
    return f"{arm.failure_rate.low:.0%} to {arm.failure_rate.high:.0%}" if arm.trials else ""


def _rates(arm: Arm) -> str:
    rates = arm.learning_rates
    return "" if rates is None or rates.low == rates.high else f"{rates.low:.0e} to {rates.high:.0e}"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _short(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _print(console: Console, text: str, style: str = "") -> None:
    indent = "  " if text.startswith("- ") else ""
    lines = textwrap.wrap(text, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)
