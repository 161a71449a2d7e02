"""Optuna's TPE at a cost that does not grow with the study.

For one suggestion `TPESampler` (Optuna 5.0) goes through all trials a dozen times: it works out the space from them,
tells good from bad, and puts a kernel on each. Of a long study it is shown a part here: all that it takes for good,
all that run, and of the others evenly many of every age, so that the density that it makes of them stays the same.
"""

import bisect
from collections.abc import Container
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

LIMIT = 500
"""Ended trials that TPE is shown, where it may begin with so many. From 250 on it takes the best `GOOD` for good,
however many there are."""

GOOD = 25  # as many as `optuna.samplers._tpe.sampler.default_gamma` has at most

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)  # what TPE learns from


class Past:
    """What is known of the ended trials of a study. They don't change: each is looked at once."""

    def __init__(self, startup_trials: int = 0) -> None:
        """startup_trials: as many are drawn at random before TPE begins, so no fewer must be seen."""
        self._limit = max(LIMIT, startup_trials)
        self._num_seen = 0
        self._open: list[int] = []  # numbers of trials that may end yet
        self._ended: list[int] = []  # ascending
        self._good: list[tuple[tuple[float, ...], int]] = []  # rank, number; ascending
        self._kinds: dict[frozenset[str], int] = {}  # parameters that go together -> the first trial that had them

    def part_of(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """trials: a whole study's, by number. The same, or where too many have ended those that TPE is shown."""
        not_ended = [*self._open, *range(self._num_seen, len(trials))]
        self._num_seen, self._open = len(trials), []
        for number in not_ended:
            if trials[number].state in ENDED:
                self._look_at(number, trials[number])
            elif not trials[number].state.is_finished():
                self._open.append(number)
        if len(self._ended) <= self._limit:
            return trials
        kept = {number for _, number in self._good} | set(self._kinds.values())
        others = [number for number in self._ended if number not in kept]
        count = max(0, self._limit - len(kept))
        kept.update(others[-1 - index * len(others) // count] for index in range(count))
        kept.update(self._open)
        return [trials[number] for number in sorted(kept)]

    def _look_at(self, number: int, trial: FrozenTrial) -> None:
        bisect.insort(self._ended, number)
        bisect.insort(self._good, (rank_of(trial), number))
        del self._good[GOOD:]
        kind = frozenset(trial.params)
        self._kinds[kind] = min(number, self._kinds.get(kind, number))


def rank_of(trial: FrozenTrial) -> tuple[float, ...]:
    """How TPE orders ended trials, lower is better: complete, stopped early, and those that violate a constraint."""
    violation = sum(value for value in trial.constraints.values() if value > 0)
    if violation > 0:
        return 2, violation
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return 0, trial.value
    if not trial.intermediate_values:
        return 1, 1, 0
    step, value = max(trial.intermediate_values.items())
    return 1, -step, value


class BoundedTPESampler(optuna.samplers.TPESampler):
    """TPE for one suggestion, from a part of a long study's trials; up to `LIMIT` of them it is TPE itself."""

    def __init__(self, past: Past, **options: Any) -> None:
        super().__init__(**options)
        self._past = past
        self._shown: optuna.Study | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return super().infer_relative_search_space(self._part_of(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(self._part_of(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(self._part_of(study), trial, param_name, param_distribution)

    def _part_of(self, study: optuna.Study) -> optuna.Study:
        if self._shown is None:
            trials = study.get_trials(deepcopy=False)
            shown = self._past.part_of(trials)
            self._shown = study if shown is trials else _Part(study, shown)
        return self._shown


class _Part(optuna.Study):
    """A study as a sampler sees it: with some of its trials. `HyperbandPruner` does likewise."""

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        assert not deepcopy
        return [trial for trial in self._trials if states is None or trial.state in states]
