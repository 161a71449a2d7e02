"""A comparison in sentences: the verdict, what to keep in mind, what would sharpen it. Always for which data."""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from search.results import storage_flag
from search.spec import StudySpec
from search.storage import Location
from search.tables import FinalRow, TrialRow

if TYPE_CHECKING:
    from search.comparison import Comparison
    from search.statistics import Estimate, Interval, Pair, Verdict

SIGNIFICANT = 0.05

TO_DECIDE = 29
"""Paired seeds with which a probability of 0.75 of being better is found, at 5 % and 5 %. Noether 1987."""

MANY_SEEDS = 100
"""More than this many are not asked for, though an estimate of what it takes may be larger."""

FEW_ROWS = 100
"""Of the test split, below which its rows are too few to stand for the data."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the words need to know beyond the comparison itself."""

    spec: StudySpec
    path: Location
    rows: Sequence[TrialRow]
    final_rows: Sequence[FinalRow]
    ended: int  # trials
    missing_runs: int  # of finalists
    unread_runs: int  # that ended well and whose rows of the test split are not there
    chosen_among: Mapping[str, int]  # activation -> of how many finalists one stands for it


def setting(spec: StudySpec) -> str:
    """For which data, network and budget a comparison holds."""
    source = spec.data.source
    name = Path(source).name or source
    space = spec.space
    if space.hidden_width is None and space.hidden_layers is None:
        hidden = (
            f"hidden layers {'-'.join(map(str, spec.model.hidden_dims))}" if spec.model.hidden_dims else "no layers"
        )
    else:
        hidden = "hidden layers searched, too"
    binarized = "" if spec.data.binarize == "none" else f", binarize {spec.data.binarize}"
    each = spec.budget.trials // spec.num_arms
    trials = (
        f"{_count(spec.budget.trials, 'trial')} in all"
        if spec.goal == "best-model"
        else f"{_count(each, 'trial')} of each activation"
    )
    return (
        f"{name} ({spec.model.likelihood}{binarized}), {spec.model.body} with {hidden}, {trials}, "
        f"up to {_count(spec.budget.max_epochs, 'epoch')} each"
    )


def sentence(comparison: "Comparison", facts: Facts) -> str:
    """The verdict, or why there is none."""
    where = f"for {comparison.setting}"
    if comparison.verdict is not None:
        return _verdict(comparison.verdict, where)
    tried = [arm for arm in comparison.arms if arm.trials]
    if not tried:
        return f"no verdict: no trial has ended yet, {where}"
    leader = comparison.arms[0]
    if leader.best is None:
        failed, ended = sum(arm.failed for arm in tried), sum(arm.trials for arm in tried)
        why = f"; {failed} of {_count(ended, 'trial')} failed" if failed else ""
        return f"no verdict: no healthy trial has trained to its last epoch{why}, {where}"
    leads = f"{leader.activation} has {leader.best.val_nelbo:.2f} nats an example on the validation split"
    if len(comparison.arms) == 1:
        return (
            f"no verdict: {leader.activation} is the only activation, and there is nothing to compare it with; "
            f"{leads}, {where}"
        )
    scored = [arm for arm in comparison.arms if arm.runs]
    if len(scored) == 1 and not facts.missing_runs and scored[0].failed_runs < scored[0].runs:
        return (
            f"no verdict: {scored[0].activation} alone was confirmed, the others were left behind before: {leads}, "
            f"{where}"
        )
    if scored and all(arm.failed_runs == arm.runs for arm in scored):
        return f"no verdict: all final runs failed; {leads}, the lowest in the search, {where}"
    if scored:
        return f"no verdict yet: the final runs so far have no seed in common; {leads}, the lowest so far, {where}"
    others = [arm for arm in comparison.arms[1:] if arm.best is not None]
    if not others:
        return (
            f"no verdict: {leader.activation} alone has a trial that trained well to its last epoch: {leads}, {where}"
        )
    assert others[0].best is not None
    assert others[0].best.val_nelbo is not None
    assert leader.best.val_nelbo is not None
    behind = others[0].best.val_nelbo - leader.best.val_nelbo
    return (
        f"no verdict: {leader.activation} leads so far, {where}: {leads}, "
        f"{f'{behind:.2f}' if behind >= 0.005 else 'no'} less than {others[0].activation}, the next. The best of "
        f"several trials is chosen for its luck, too, and the more trials, the more of it; fresh seeds and the test "
        f"split tell more"
    )


def _verdict(verdict: "Verdict", where: str) -> str:
    leader = verdict.estimates[0]
    of_leader = f"{leader.name} has {nats(leader)} nats an example on the test split"
    over = f"over {_count(verdict.seeds, 'seed')}"
    against = [_seen_from(pair, leader.name) for pair in verdict.pairs if leader.name in (pair.a, pair.b)]
    if verdict.kind == "best":
        name, less, interval = min(against, key=lambda entry: entry[1])
        text = (
            f"best: {leader.name}, {where}. It has {nats(leader)} nats an example on the test split, "
            f"{less:.2f} ({span(interval)}) less than {name}, the nearest, {over}"
        )
    elif verdict.kind == "best_group":
        worse = [estimate.name for estimate in verdict.estimates if estimate.name not in verdict.group]
        text = (
            f"best group: {_listed(verdict.group)}, {where}. {of_leader}; {over} {_are(verdict.group[1:])} not shown "
            f"to be worse by more than {verdict.rope:.2f} nats, and {_are(worse)}"
        )
    elif verdict.is_equivalent:
        text = (
            f"no detectable difference, {where}: {_listed([e.name for e in verdict.estimates])} are all within "
            f"{verdict.rope:.2f} nats of one another, {over}"
        )
    else:
        others = [estimate.name for estimate in verdict.estimates[1:]]
        text = (
            f"no detectable difference, {where}. {of_leader}, the lowest mean; {over} {_are(others)} not shown to be "
            f"worse by more than {verdict.rope:.2f} nats"
        )
    return f"{text}. {_too_few(verdict)}" if _has_too_few_seeds(verdict) else text


def _has_too_few_seeds(verdict: "Verdict") -> bool:
    return verdict.seeds < verdict.seeds_to_be_significant


def _too_few(verdict: "Verdict") -> str:
    return (
        f"With {_count(verdict.seeds, 'seed')} no difference can be significant, however large: the smallest p that "
        f"Wilcoxon's test can give for {len(verdict.estimates)} activations is {verdict.smallest_p:.2g}; it takes "
        f"{verdict.seeds_to_be_significant} seeds"
    )


def _seeds_to_decide(verdict: "Verdict") -> int | None:
    """Runs of each finalist to go on with; None where nothing is open, or hardly any number would do."""
    leader, group = verdict.estimates[0].name, verdict.group
    is_open = [pair for pair in verdict.pairs if pair.a == leader and pair.b in group and not pair.in_rope]
    if not is_open:
        return None
    if _is_beyond_seeds(verdict):
        return None
    estimate = verdict.seeds_to_decide
    wanted = TO_DECIDE if estimate is None or estimate > MANY_SEEDS else estimate
    wanted = max(wanted, verdict.seeds_to_be_significant)
    return wanted if wanted > verdict.seeds else None


def _is_beyond_seeds(verdict: "Verdict") -> bool:
    """True where leader and runner-up are not told apart, and would not be by as many seeds as one can train."""
    runner_up = verdict.pairs[0]
    is_open = runner_up.b in verdict.group and not runner_up.in_rope
    return is_open and verdict.seeds > 1 and verdict.seeds_to_decide is None


def caveats(comparison: "Comparison", facts: Facts) -> Iterator[str]:
    """What to keep in mind, a sentence each."""
    spec, verdict = facts.spec, comparison.verdict
    if not comparison.is_complete and facts.rows:
        left = f"{facts.ended} of {_count(spec.budget.trials, 'trial')} ended"
        if spec.finalists.confirm:
            runs = sum(row.state != "RUNNING" for row in facts.final_rows)
            left += f", {_count(runs, 'final run')} so far and {facts.missing_runs} to come"
        yield f"unfinished: {left}; this is what there is so far"
    if verdict is not None or any(arm.runs for arm in comparison.arms):
        yield from _about_finals(comparison, facts)
    tried = [arm for arm in comparison.arms if arm.trials]
    if comparison.goal == "best-model" and len(comparison.arms) > 1 and tried:
        counts = [f"{arm.activation} {_count(arm.trials, 'trial')}" for arm in tried]
        untried = [arm.activation for arm in comparison.arms if not arm.trials]
        yield (
            f"tuning effort was unequal, since the search spent its trials where they paid: {', '.join(counts)}"
            f'{f", none {_listed(untried)}" if untried else ""}; equal effort is goal = "compare-activations"'
        )
    if failed := sum(arm.failed for arm in tried):
        statuses = Counter(row.status for row in facts.rows if row.state != "RUNNING" and row.status != "ok")
        kinds = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items(), key=lambda kind: -kind[1]))
        ended = sum(arm.trials for arm in tried)
        yield (
            f"{failed} of {_count(ended, 'trial')} failed ({kinds}); each counts as one nat worse than a model that "
            f"ignores its latents"
        )
    left_behind = [f"{arm.activation} ({arm.dropped})" for arm in comparison.arms if arm.dropped]
    if left_behind and len(left_behind) < len(tried) and (spec.finalists.confirm or facts.final_rows):
        yield f"without finalist: {'; '.join(left_behind)}"
    devices = {row.device for row in facts.rows if row.device is not None}
    if len(devices) > 1:
        yield f"seconds an epoch were measured on different devices: {', '.join(sorted(devices))}"


def _about_finals(comparison: "Comparison", facts: Facts) -> Iterator[str]:
    verdict = comparison.verdict
    ended = {arm.activation: arm.runs for arm in comparison.arms if arm.runs}
    most = max(ended.values(), default=0)
    if verdict is not None and len(comparison.runs) < most:
        yield (
            f"{len(comparison.runs)} of {most} final runs count: those whose seed every finalist has been through; "
            f"ended are {', '.join(f'{name} {count}' for name, count in ended.items())}"
        )
    waiting = [arm.activation for arm in comparison.arms if arm.finalist is not None and not arm.runs]
    if waiting:
        yield f"without a final run yet: {_listed(waiting)}"
    failed = {arm.activation: (arm.failed_runs, arm.runs) for arm in comparison.arms if arm.failed_runs}
    if failed:
        counts = ", ".join(f"{name} {some} of {runs}" for name, (some, runs) in failed.items())
        yield f"final runs failed: {counts}; each counts as one nat worse than a model that ignores its latents"
    if facts.unread_runs:
        yield (
            f"{_count(facts.unread_runs, 'final run')} left out: what the rows of the test split have under it is "
            f"not there; the next run of the study makes it again"
        )
    if several := [name for name, count in facts.chosen_among.items() if count > 1]:
        yield (
            f"of several finalists of {_listed(several)} the one stands for its activation whose final runs are best "
            f"on the validation split, not on the test split"
        )
    samples = sorted({row.importance_samples for row in facts.final_rows if row.status == "ok"})
    if len(samples) > 1:
        yield (
            f"final runs were scored with {_listed(list(map(str, samples)))} importance samples: more give lower nats, "
            f"so this is no fair comparison"
        )
    if verdict is not None and verdict.seeds_to_decide is not None:
        first, second = verdict.estimates[0].name, verdict.estimates[1].name
        yield f"by what these seeds show, it takes about {verdict.seeds_to_decide} to settle {first} against {second}"
    if verdict is not None and _is_beyond_seeds(verdict):
        first, second = verdict.estimates[0].name, verdict.estimates[1].name
        yield (
            f"more seeds would hardly settle {first} against {second}: the difference is close to what counts as "
            f"none, or depends on which {_count(verdict.images, 'row')} the test split has"
        )
    if verdict is not None and verdict.images < FEW_ROWS:
        yield f"the test split has {_count(verdict.images, 'row')} only: other rows may tell otherwise"


def commands(comparison: "Comparison", facts: Facts) -> Iterator[str]:
    """What would finish or sharpen it."""
    resume = f"vaesearch resume {shlex.quote(comparison.study)}{storage_flag(facts.path)}"
    verdict, confirmed = comparison.verdict, facts.spec.finalists.confirm
    if not comparison.is_complete:
        yield resume
        return
    if len(comparison.arms) < 2 or comparison.arms[0].best is None:
        return
    confirm = "" if confirmed else " --confirm"
    if verdict is None:
        if not confirmed and sum(arm.best is not None for arm in comparison.arms) > 1:
            yield resume + confirm
        return
    wanted = _seeds_to_decide(verdict)
    if wanted is not None and wanted > facts.spec.finalists.seeds:
        yield f"{resume}{confirm} --set finalists.seeds={wanted}"


def pair_lines(comparison: "Comparison", pair: "Pair") -> Iterator[str]:
    """Two activations against each other, with all figures."""
    verdict = comparison.verdict
    assert verdict is not None
    means = {estimate.name: estimate for estimate in verdict.estimates}
    is_lower, interval = pair.difference <= 0, pair.interval
    size = _turned(interval) if is_lower else interval
    leader = verdict.estimates[0].name
    is_of_leader = leader in (pair.a, pair.b)
    corrected = _count(len(verdict.estimates) - 1 if is_of_leader else len(verdict.pairs), "pair")
    corrected += f" with {leader}, the leader" if is_of_leader else ""
    yield (
        f"{pair.a} against {pair.b}, for {comparison.setting}: {pair.a} has {abs(pair.difference):.2f} nats an example "
        f"{'less' if is_lower else 'more'} on the test split (95 % interval of that {span(size)})"
    )
    for name in (pair.a, pair.b):
        mean = means[name]
        yield f"{name}: mean {nats(mean)}, median {mean.median:.2f}, sd of the seeds {sd_text(mean)}"
    yield (
        f"{_count(verdict.seeds, 'paired seed')}, {_count(verdict.images, 'row')}: {pair.a} is better with "
        f"probability {pair.better:.2f} ({span(pair.better_interval)}); Wilcoxon's p is {p_text(pair.p_value)}, "
        f"{p_text(pair.p_holm)} after Holm's correction over {corrected}"
    )
    rope = f"{verdict.rope:.2f} nats, which count as no difference"
    is_beyond = interval.low > verdict.rope or interval.high < -verdict.rope
    if pair.in_rope:
        yield f"the whole interval lies within ±{rope}: no difference"
    elif is_beyond and pair.p_holm < SIGNIFICANT:
        yield f"the whole interval lies beyond ±{rope}, and p is below {SIGNIFICANT}: told apart"
    elif is_beyond:
        yield f"the whole interval lies beyond ±{rope}, but p is not below {SIGNIFICANT}: not told apart"
    else:
        yield f"the interval reaches into ±{rope}, and beyond: not told apart"
    if _has_too_few_seeds(verdict):
        yield _too_few(verdict)


def nats(estimate: "Estimate") -> str:
    return f"{estimate.mean:.2f} ({span(estimate.interval)})"


def span(interval: "Interval") -> str:
    return f"{interval.low:.2f} to {interval.high:.2f}"


def p_text(p: float) -> str:
    return "not known" if math.isnan(p) else "<.001" if p < 0.001 else f"{p:.3f}"


def sd_text(estimate: "Estimate") -> str:
    return f"{estimate.sd:.2f}" if math.isfinite(estimate.sd) else "not known"


def _seen_from(pair: "Pair", leader: str) -> "tuple[str, float, Interval]":
    """The other one of a pair, and by how much the leader is below it."""
    if pair.a == leader:
        return pair.b, -pair.difference, _turned(pair.interval)
    return pair.a, pair.difference, pair.interval


def _turned(interval: "Interval") -> "Interval":
    """Of a difference the other way round."""
    return replace(interval, low=-interval.high, high=-interval.low)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def _are(names: Sequence[str]) -> str:
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
