"""Which activation suits the data, and how sure one can be: what a study's tables say of it.

The verdict is `search.statistics`'s, over the finalists' fresh seeds on the test split. Beside it stands what the
search showed on the way, which answers other questions: how easily an activation is tuned, how often it fails, what
it costs. Reads only, also while a study runs.
"""

import statistics as middle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from search.comparison_words import Facts, caveats, commands, sentence, setting
from search.finalists import dropped, finalists, missing_runs
from search.importance import importances as shares_of
from search.output import plain
from search.results import PENALTY, Study, best_of_each, final_rows_of, no_latent_nelbo, ranked
from search.spec import StudySpec, values_of
from search.tables import FinalRow, TrialRow, whole_runs
from vae.config import InputError

if TYPE_CHECKING:
    from search.statistics import Interval, Pair, Verdict

# Shapes: A activations, R seeds, N rows of the test split, T trials.

ROBUST_NATS = 1.0
"""A setting within this of an activation's best one counts as one that works for it."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One activation. Losses are nats per example; failures count in every denominator, as a finite penalty."""

    activation: str
    trials: int  # ended
    failed: int  # of them: collapsed, diverged, out of memory, in error, lost
    failure_rate: "Interval"
    best: TrialRow | None  # healthy, with the full budget
    finalist: int | None  # trial; None: dropped, or none was healthy
    dropped: str | None  # why there is no finalist
    # from the space-filling phase alone, where every activation had the same settings; None where there was none
    screened: int
    screen_best: float | None
    screen_median: float | None
    screen_quartiles: "Interval | None"
    screen_gap: float | None  # median, over the settings, of the difference to the best activation at that setting
    robustness: float | None  # share of the settings within ROBUST_NATS of the activation's best
    learning_rates: "Interval | None"  # the smallest and the largest of those settings
    expected_best: tuple[float, ...]  # after 1, 2, ... of them
    expected_band: tuple[tuple[float, ...], tuple[float, ...]]  # its 95 % band: low, high
    # from the finalists
    runs: int  # ended
    failed_runs: int
    # cost, of the configuration of `best`
    num_parameters: int | None
    epoch_s: float | None  # seconds of an epoch, median over the activation's trials, of the common settings if any
    is_on_front: bool  # no other activation is both better and faster


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `vaesearch compare` tells of one study."""

    study: str
    goal: str
    is_complete: bool  # the search and the finalists
    setting: str  # for which data, network and budget it holds
    source: str  # of the data
    data_fingerprint: str | None
    no_latent_nelbo: float | None  # on the validation split
    arms: tuple[Arm, ...]  # best first: by the finals, where there are, then by the best trial
    runs: tuple[int, ...]  # numbers of the final runs that the verdict is of: each has ended for every finalist
    verdict: "Verdict | None"  # None: not two finals of the same seeds to compare
    sentence: str  # the verdict in words
    caveats: tuple[str, ...]  # a sentence each: unequal effort, too few seeds, failures, unfinished, ...
    commands: tuple[str, ...]  # what would finish or sharpen it, to be typed
    importances: Mapping[str, float] | None  # parameter -> share, by PED-ANOVA, over the space-filling trials
    importances_without_failures: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Finals:
    """The finalists' runs, held against each other."""

    trials: Mapping[str, int]  # activation -> the trial whose runs stand for it
    among: Mapping[str, int]  # activation -> of how many trials that one was chosen
    ended: Mapping[str, int]  # activation -> how many runs of that trial
    failed: Mapping[str, int]
    runs: tuple[int, ...]  # numbers of those that all of them have
    nll: Mapping[str, np.ndarray]  # activation -> (R, N); the penalty where a run failed
    unread: int  # ended well, but without the rows of the test split


def compare(study: Study, *, importances: bool = True) -> Comparison:
    """What a study says of its activations; sensible also with one trial, with none, with failures alone.

    importances: also compute them, which takes seconds to import. Raises InputError for adversarial training.
    """
    spec, rows, finals_table = study.spec, study.rows(), study.finals()
    if spec.train.objective != "elbo":
        raise InputError(
            f"{study.path}: trained adversarially (train.objective = {spec.train.objective}): its nats are not what "
            f"was trained for and compare nothing; `vaesearch show` ranks by the error of reconstructions"
        )
    final_rows = whole = final_rows_of(finals_table)
    images = None
    if final_rows:
        images = study.final_images()
        whole = final_rows_of(whole_runs(finals_table, images))
    baseline = no_latent_nelbo(rows)
    out = dropped(rows)
    finals = _finals(rows, [final for final in final_rows if final.activation not in out], images, baseline)
    verdict = _verdict(finals)
    values = _values(rows, baseline)
    arms = _arms(spec, rows, values, finals, out, verdict)
    missing = missing_runs(spec, rows, whole)
    ended = sum(row.state != "RUNNING" for row in rows)
    screen = [row for row in rows if row.phase == "screen"] if importances else []
    with_failures = shares_of(spec, screen, values)
    healthy = [row for row in screen if row.status == "ok"]
    provenance = study.provenance
    comparison = Comparison(
        study=study.name,
        goal=spec.goal,
        is_complete=ended >= spec.budget.trials and not missing,
        setting=setting(spec),
        source=spec.data.source,
        data_fingerprint=provenance.get("data_fingerprint"),
        no_latent_nelbo=baseline,
        arms=arms,
        runs=finals.runs,
        verdict=verdict,
        sentence="",
        caveats=(),
        commands=(),
        importances=with_failures,
        importances_without_failures=(
            shares_of(spec, healthy, values) if any(map(_is_failed, screen)) else with_failures
        ),
    )
    facts = Facts(
        spec=spec,
        path=study.path,
        rows=rows,
        final_rows=final_rows,
        ended=ended,
        missing_runs=len(missing),
        unread_runs=finals.unread,
        chosen_among=finals.among,
    )
    typed = tuple(commands(comparison, facts))
    comparison = replace(comparison, commands=typed)
    return replace(comparison, sentence=sentence(comparison, facts), caveats=tuple(caveats(comparison, facts)))


def comparison_lines(comparison: Comparison) -> list[str]:
    """For people: the verdict, the caveats, and what would sharpen it."""
    typed = ["next:", *(f"  {command}" for command in comparison.commands)] if comparison.commands else []
    return [comparison.sentence, *comparison.caveats, *typed]


def pair(comparison: Comparison, a: str, b: str) -> "Pair":
    """Two activations of a comparison held against each other. Raises InputError if one of them has no finals."""
    arms = {arm.activation: arm for arm in comparison.arms}
    for name in (a, b):
        if name not in arms:
            raise InputError(f"{comparison.study}: {name} is not among its activations: {', '.join(arms)}")
    if a == b:
        raise InputError(f"{a} against itself: name two activations, --a and --b")
    estimated = [] if comparison.verdict is None else [estimate.name for estimate in comparison.verdict.estimates]
    for name in (a, b):
        if name not in estimated:
            why = arms[name].dropped or "none that others have, too"
            have = f"; these have some: {', '.join(estimated)}" if estimated else ""
            raise InputError(f"{comparison.study}: {name} has no finals to compare: {why}{have}")
    assert comparison.verdict is not None
    for found in comparison.verdict.pairs:
        if (found.a, found.b) == (a, b):
            return found
        if (found.a, found.b) == (b, a):
            return _turned(found)
    raise AssertionError((a, b))


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON."""
    return dict(as_plain(asdict(comparison)))


def as_plain(value: Any) -> Any:
    """The value in JSON's terms, numpy's scalars, too."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return plain(value.item() if isinstance(value, np.generic) else value)


def finals_of(study: Study, finalists: Sequence[TrialRow]) -> Mapping[str, np.ndarray]:
    """activation -> (R, N) nll of its finalist's runs on the test split; the penalty where a run failed."""
    rows = list(finalists)
    baseline = no_latent_nelbo(rows)
    of_these = {row.trial for row in rows}
    final_rows = [final for final in study.final_rows() if final.trial in of_these]
    return _finals(rows, final_rows, study.final_images(), baseline).nll


# ---- the finalists


def _finals(
    rows: Sequence[TrialRow], final_rows: Sequence[FinalRow], images: pa.Table | None, baseline: float | None
) -> Finals:
    of_trial: dict[int, list[FinalRow]] = defaultdict(list)
    for final in final_rows:
        if final.state != "RUNNING":
            of_trial[final.trial].append(final)
    names = {row.trial: row.activations for row in rows}
    candidates: dict[str, list[int]] = defaultdict(list)
    for trial, its_runs in of_trial.items():
        candidates[names.get(trial, its_runs[0].activation)].append(trial)
    places = {row.trial: place for place, row in enumerate(ranked(list(rows)))}
    chosen = {}
    for activation, trials in candidates.items():
        most = max(len(of_trial[trial]) for trial in trials)
        full = [trial for trial in trials if len(of_trial[trial]) == most]
        chosen[activation] = min(
            full, key=lambda trial: (_validation(of_trial[trial], baseline), places.get(trial, len(places)), trial)
        )
    scores = {} if images is None else _scores(images, set(chosen.values()))
    size = max((len(nll) for nll in scores.values()), default=0)
    usable: dict[str, dict[int, FinalRow]] = {}
    unread = 0
    for activation, trial in chosen.items():
        usable[activation] = {}
        for final in of_trial[trial]:
            if final.status == "ok" and (not size or len(scores.get((trial, final.run), ())) != size):
                unread += 1
            else:
                usable[activation][final.run] = final
    shared = sorted(set.intersection(*map(set, usable.values()))) if usable else []
    penalty = _test_penalty(final_rows, scores.values())
    runs = tuple(shared) if size and penalty is not None else ()
    nll = {}
    for activation, its_finals in usable.items():
        if runs:
            is_ok = {run: its_finals[run].status == "ok" for run in runs}
            lines = [scores[chosen[activation], run] if is_ok[run] else np.full(size, penalty) for run in runs]
            nll[activation] = np.stack(lines)
    return Finals(
        trials=chosen,
        among={activation: len(trials) for activation, trials in candidates.items()},
        ended={activation: len(of_trial[trial]) for activation, trial in chosen.items()},
        failed={
            activation: sum(final.status != "ok" for final in of_trial[trial]) for activation, trial in chosen.items()
        },
        runs=runs,
        nll=nll,
        unread=unread,
    )


def _validation(finals: Sequence[FinalRow], baseline: float | None) -> float:
    """Mean validation value of a finalist's runs. It chooses among finalists, which the test split must not."""
    worst = max((final.val_nelbo for final in finals if final.val_nelbo is not None), default=0.0)
    penalty = (worst if baseline is None else baseline) + PENALTY
    return middle.fmean(
        final.val_nelbo if final.status == "ok" and final.val_nelbo is not None else penalty for final in finals
    )


def _scores(images: pa.Table, trials: set[int]) -> dict[tuple[int, int], np.ndarray]:
    """(trial, run) -> (N,) nll, in the order of the rows of the test split; what is not whole is left out."""
    trial, run, row, nll = (images[name].to_numpy() for name in ("trial", "run", "row", "nll"))
    wanted = np.isin(trial, list(trials))
    trial, run, row, nll = (column[wanted] for column in (trial, run, row, nll))
    if not len(trial):
        return {}
    size = int(row.max()) + 1
    group = trial.astype(np.int64) * (int(run.max()) + 1) + run
    order = np.argsort(group * size + row, kind="stable")
    group, row, nll = group[order], row[order], nll[order]
    starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
    found = {}
    for start, end in zip(starts, [*starts[1:], len(group)], strict=True):
        if end - start == size:
            key = int(group[start] // (int(run.max()) + 1)), int(group[start] % (int(run.max()) + 1))
            found[key] = nll[start:end]
    return found


def _test_penalty(finals: Sequence[FinalRow], scores: Iterable[np.ndarray]) -> float | None:
    """What a failed run counts as on the test split; None if nothing at all was scored there."""
    known = no_latent_nelbo(finals)
    if known is None:
        known = max((float(nll.mean()) for nll in scores), default=None)
    return None if known is None else known + PENALTY


def _verdict(finals: Finals) -> "Verdict | None":
    if len(finals.nll) < 2:
        return None
    from search.statistics import judge

    return judge(finals.nll)


# ---- the search


def _values(rows: Sequence[TrialRow], baseline: float | None) -> Mapping[int, float]:
    """trial -> its validation value, the penalty where it failed; those that have neither are left out."""
    healthy = {row.trial: row.val_nelbo for row in ranked(list(rows)) if row.val_nelbo is not None}
    if baseline is None:
        baseline = max(healthy.values(), default=None)
    if baseline is None:
        return healthy
    failed = {row.trial: baseline + PENALTY for row in rows if _is_failed(row)}
    return failed | healthy


def _is_failed(row: TrialRow) -> bool:
    return row.state != "RUNNING" and row.status != "ok"


def _arms(
    spec: StudySpec,
    rows: Sequence[TrialRow],
    values: Mapping[int, float],
    finals: Finals,
    out: Mapping[str, str],
    verdict: "Verdict | None",
) -> tuple[Arm, ...]:
    from search.statistics import pareto_front

    of_activation: dict[str, list[TrialRow]] = {}
    if spec.model.activation_scope == "shared":
        of_activation = {str(name): [] for name in values_of(spec.space.activation)}
    for row in rows:
        of_activation.setdefault(row.activations, []).append(row)
    leaders = best_of_each(list(rows))
    chosen: dict[str, int] = {}
    for row in finalists(spec, list(rows)):
        chosen.setdefault(row.activations, row.trial)
    chosen |= finals.trials
    gaps = _gaps(spec, rows, values)
    arms = [
        _arm(name, its_rows, values, leaders.get(name), chosen.get(name), out.get(name), gaps.get(name), finals)
        for name, its_rows in of_activation.items()
    ]
    scores = {} if verdict is None else {estimate.name: estimate.mean for estimate in verdict.estimates}
    order = {name: place for place, name in enumerate(scores)}
    arms.sort(
        key=lambda arm: (
            order.get(arm.activation, len(order)),
            arm.best is None,
            0.0 if arm.best is None else arm.best.val_nelbo,
        )
    )
    if verdict is None:
        scores = {arm.activation: arm.best.val_nelbo for arm in arms if arm.best and arm.best.val_nelbo is not None}
    timed = [arm for arm in arms if arm.epoch_s is not None and arm.activation in scores]
    front = pareto_front(np.array([arm.epoch_s for arm in timed]), np.array([scores[arm.activation] for arm in timed]))
    on_front = {arm.activation for arm, is_on in zip(timed, front, strict=True) if is_on}
    return tuple(replace(arm, is_on_front=arm.activation in on_front) for arm in arms)


def _arm(
    activation: str,
    rows: Sequence[TrialRow],
    values: Mapping[int, float],
    best: TrialRow | None,
    finalist: int | None,
    why: str | None,
    gap: float | None,
    finals: Finals,
) -> Arm:
    from search.statistics import Interval, expected_best, expected_best_band, wilson

    ended = [row for row in rows if row.state != "RUNNING"]
    failed = sum(_is_failed(row) for row in ended)
    screen = [row for row in ended if row.phase == "screen" and row.trial in values]
    screen_values = [values[row.trial] for row in screen]
    healthy = [values[row.trial] for row in screen if row.status == "ok"]
    lowest = min(healthy, default=None)
    works = [row for row in screen if lowest is not None and values[row.trial] <= lowest + ROBUST_NATS]
    rates = [row.learning_rate for row in works]
    quartiles = np.quantile(screen_values, (0.25, 0.5, 0.75)).tolist() if screen_values else []
    low, high = expected_best_band(np.array(screen_values), seed=0) if screen else (np.empty(0), np.empty(0))
    seconds = [row.train_wall_s / row.epochs for row in screen or rows if row.epochs and row.train_wall_s]
    return Arm(
        activation=activation,
        trials=len(ended),
        failed=failed,
        failure_rate=wilson(failed, len(ended)),
        best=best,
        finalist=finalist,
        dropped=why,
        screened=len(screen),
        screen_best=lowest,
        screen_median=quartiles[1] if quartiles else None,
        screen_quartiles=Interval(quartiles[0], quartiles[2]) if quartiles else None,
        screen_gap=gap,
        robustness=len(works) / len(screen) if screen else None,
        learning_rates=Interval(min(rates), max(rates)) if rates else None,
        expected_best=tuple(expected_best(np.array(screen_values)).tolist()) if screen else (),
        expected_band=(tuple(low.tolist()), tuple(high.tolist())),
        runs=finals.ended.get(activation, 0),
        failed_runs=finals.failed.get(activation, 0),
        num_parameters=None if best is None else best.num_parameters,
        epoch_s=middle.median(seconds) if seconds else None,
        is_on_front=False,
    )


def _gaps(spec: StudySpec, rows: Sequence[TrialRow], values: Mapping[int, float]) -> Mapping[str, float]:
    """activation -> median difference to the best activation, over the common settings that all have been through."""
    at_setting: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.phase == "screen" and row.trial in values:
            at_setting[spec.place(row.trial)[1]][row.activations] = values[row.trial]
    num_arms = len(spec.arms())
    whole = [found for found in at_setting.values() if len(found) == num_arms]
    gaps: dict[str, list[float]] = defaultdict(list)
    for found in whole:
        lowest = min(found.values())
        for activation, value in found.items():
            gaps[activation].append(value - lowest)
    return {activation: middle.median(its_gaps) for activation, its_gaps in gaps.items()}


def _turned(found: "Pair") -> "Pair":
    """The same pair, seen from the other side."""
    from search.statistics import Interval

    return replace(
        found,
        a=found.b,
        b=found.a,
        difference=-found.difference,
        interval=Interval(-found.interval.high, -found.interval.low),
        better=1 - found.better,
        better_interval=Interval(1 - found.better_interval.high, 1 - found.better_interval.low),
    )
