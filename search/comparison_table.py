"""A comparison in a terminal: the verdict in a sentence, the figures, and what to keep in mind."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from search.across import AcrossStudies
from search.comparison import Arm, Comparison
from search.comparison_words import p_text, pair_lines, span
from search.importance import FEWEST_TRIALS
from search.terminal import Column, Table, print_text

if TYPE_CHECKING:
    from search.statistics import Estimate, Pair

IMPORTANCES_SHOWN = 0.01
"""Of all; parameters with less are not named."""


def print_comparison(console: Console, comparison: Comparison, *, with_importances: bool = False) -> None:
    """The verdict first, then the figures, then what to keep in mind and what to type next."""
    _print(console, comparison.sentence, style="bold")
    console.print(Table(_columns(comparison)), soft_wrap=True)
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
        Column("activation", across.activations, is_text=True),
        Column("mean\nrank", [f"{across.mean_ranks[name]:.2f}" for name in across.activations]),
    ]
    for study, ranks in across.ranks.items():
        columns.append(Column(study, [f"{ranks[name]:g}" for name in across.activations]))
    console.print(Table(columns), soft_wrap=True)
    for text in across.caveats:
        _print(console, f"- {text}")


def _columns(comparison: Comparison) -> list[Column]:
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
        Column("activation", of_arm(lambda arm: arm.activation), is_text=True),
        Column("test\nnll", of_estimate(lambda estimate: f"{estimate.mean:.2f}")),
        Column("95 %\ninterval", of_estimate(lambda estimate: span(estimate.interval))),
        Column("behind\nleader", of_pair(lambda pair, is_a: f"{_signed(pair, is_a)[0]:.2f}")),
        Column("95 %\ninterval", of_pair(lambda pair, is_a: "{1:.2f} to {2:.2f}".format(*_signed(pair, is_a)))),
        Column("P of\nbetter", of_pair(lambda pair, is_a: f"{pair.better if is_a else 1 - pair.better:.2f}")),
        Column("p by\nHolm", of_pair(lambda pair, is_a: "" if math.isnan(pair.p_holm) else p_text(pair.p_holm))),
        Column("P of\nfirst", of_estimate(lambda estimate: f"{estimate.first:.2f}")),
        Column("runs\nfailed", of_arm(lambda arm: f"{arm.failed_runs}/{arm.runs}" if arm.failed_runs else "")),
        Column("best\nval", of_arm(lambda arm: _nats(None if arm.best is None else arm.best.val_nelbo))),
        Column("trials\nfailed", of_arm(lambda arm: f"{arm.failed}/{arm.trials}")),
        Column("95 %\ninterval", of_arm(_failure_interval)),
        Column("screen\nmedian", of_arm(lambda arm: _nats(arm.screen_median))),
        Column("gap", of_arm(lambda arm: _nats(arm.screen_gap))),
        Column("within\n1 nat", of_arm(lambda arm: "" if arm.robustness is None else f"{arm.robustness:.0%}")),
        Column("ms an\nepoch", of_arm(lambda arm: "" if arm.epoch_s is None else _milliseconds(arm.epoch_s))),
        Column("para-\nmeters", of_arm(lambda arm: "" if arm.num_parameters is None else _short(arm.num_parameters))),
        Column("front", of_arm(lambda arm: "yes" if arm.is_on_front else "")),
        Column("at learning\nrates", of_arm(_rates), is_extra=True),
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
    print_text(console, text, style=style, hang=2 if text.startswith("- ") else 0)
