"""Finalists: the best configurations of each activation, to be trained anew and scored on the test split.

The best of many trials looks better than it is, since it was chosen for its luck, too. So finalists are trained from
seeds that the search never saw, the same ones for all, and scored on rows that nobody has looked at.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from search.results import best_of_each, ranked
from search.spec import StudySpec
from search.tables import FinalRow, TrialRow

DROP_NATS = 2.0
"""An activation whose best trial is worse than the best of all by more than this has no finalist, but is listed."""

DROP_FAILING = 0.5
"""So has one of whose trials more than this share failed."""


def finalists(spec: StudySpec, rows: list[TrialRow]) -> list[TrialRow]:
    """The trials whose configurations are confirmed, best first: a few of each activation that is in the running."""
    out = dropped(rows)
    taken: dict[str, int] = defaultdict(int)
    chosen = []
    for row in ranked(rows):
        if row.activations not in out and taken[row.activations] < spec.finalists.per_activation:
            taken[row.activations] += 1
            chosen.append(row)
    return chosen


def dropped(rows: list[TrialRow]) -> Mapping[str, str]:
    """Activation -> why it has no finalist. Two always have, if two have a healthy trial: one has no rival."""
    best = best_of_each(rows)
    ended: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        if row.state != "RUNNING":
            ended[row.activations].append(row)
    failed = {name: sum(row.status != "ok" for row in its_rows) for name, its_rows in ended.items()}
    fails = {name: failed[name] > DROP_FAILING * len(ended[name]) for name in best}
    order = sorted(best, key=lambda name: (fails[name], _value(best[name])))
    reasons = {name: "no healthy trial has trained to its last epoch" for name in ended if name not in best}
    for name in order[2:]:
        behind = _value(best[name]) - _value(best[order[0]])
        if fails[name]:
            reasons[name] = f"{failed[name]} of {len(ended[name])} trials failed"
        elif behind > DROP_NATS:
            reasons[name] = f"its best trial is {behind:.1f} nats behind"
    return reasons


def missing_runs(spec: StudySpec, rows: list[TrialRow], finals: list[FinalRow]) -> list[tuple[TrialRow, int]]:
    """The finalists' runs that are to be made, all of one seed before the next: so they can be compared soon.

    finals: those of which nothing is missing (`Study.whole_final_rows`).
    """
    if not spec.finalists.confirm:
        return []
    settled = {final.key for final in finals if final.is_settled}
    chosen = finalists(spec, rows)
    runs = [(row, run) for run in range(spec.finalists.seeds) for row in chosen]
    return [(row, run) for row, run in runs if (row.trial, run) not in settled]


def final_seed(study_seed: int, run: int) -> int:
    """The seed of a run: of initial weights, order and noise. None that a trial of the search had."""
    return int(np.random.SeedSequence([study_seed, run, 2]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _value(row: TrialRow) -> float:
    assert row.ranks_by is not None
    return row.ranks_by
