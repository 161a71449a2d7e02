"""Optuna's side of a study: the space that is searched, or each of the spaces searched side by side, rebuilt from the
ledger. Nothing here knows Ray."""

import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import optuna
import pyarrow as pa
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.space import Space
from search.spec import Params, StudySpec
from search.tables import TrialRow
from search.tpe import BoundedTPESampler, Past

CONSTRAINTS = ("collapsed", "diverged", "oom")
"""Statuses the sampler learns to avoid; each is an Optuna constraint, violated at 1."""

Curve = Mapping[int, float]
"""Epoch -> validation value."""


class Arm:
    """A space that is searched and Optuna's study of it, in which a trial's number is its turn (`StudySpec.place`)."""

    def __init__(self, spec: StudySpec, index: int, rows: list[TrialRow], curves: Mapping[int, Curve]) -> None:
        """Rebuilt from the ledger. Unfinished trials wait, with their parameters; so do those whose row was lost."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec = spec
        self.space = Space(spec.arms()[index])
        self._past = Past(spec.sampler.startup_trials)
        self.study = optuna.create_study(direction="minimize", sampler=self.sampler(0))
        is_comparison = spec.goal == "compare-activations"
        self._settings = Space(spec.space).settings(spec.comparison.settings, spec.seed) if is_comparison else []
        known = {turn: row for row in rows for arm, turn in [spec.place(row.trial)] if arm == index}
        for turn in range(max(known, default=-1) + 1):
            if turn in known:
                self.study.add_trial(frozen_trial(self.space, known[turn], curves.get(known[turn].trial, {})))
            else:
                self.study.add_trial(_waiting(self._given(turn)))

    def ask(self, turn: int) -> tuple[optuna.Trial, Params]:
        """The next suggestion, or a trial that waits for its turn."""
        if turn >= len(self.study.get_trials(deepcopy=False)) and (given := self._given(turn)):
            self.study.add_trial(_waiting(given))
        self.study.sampler = self.sampler(turn)
        trial = self.study.ask()
        assert trial.number == turn
        return trial, self.space.suggest(trial)

    def sampler(self, turn: int) -> optuna.samplers.BaseSampler:
        """That of one suggestion. A new one each time: a sampler's own state would not survive a crash."""
        kind, startup = self.spec.sampler.kind, self.spec.sampler.startup_trials
        seed = int(np.random.SeedSequence([self.spec.seed, turn]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if kind == "tpe":
                # group: without it the conditional slope falls out of the joint model and is drawn on its own
                return BoundedTPESampler(
                    self._past, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
                )
            if kind == "gp":
                return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed)
            return optuna.samplers.RandomSampler(seed=seed)

    def _given(self, turn: int) -> Params:
        """What is not left to the sampler: the defaults of the first trial, and what was asked to be tried next; or the
        settings common to all arms."""
        given = self._settings or [self.space.start(), *self.spec.sampler.first]
        if turn >= len(given):
            return {}
        return {name: value for name, value in given[turn].items() if name in self.space.distributions}


def frozen_trial(space: Space, row: TrialRow, curve: Curve) -> FrozenTrial:
    """A ledger row as Optuna's trial, equal to what the study held when it was written."""
    params, distributions = space.chosen(row.params)
    if row.state == "RUNNING":
        return _waiting(params)
    values = dict(curve)
    if row.epochs and row.ranks_by is not None and row.status not in ("diverged", "oom"):
        values.setdefault(row.epochs, row.ranks_by)  # where the epochs went with a damaged part
    if row.status in ("diverged", "oom") and row.objective is not None:
        values[beyond(row, values)] = row.objective
    pruned_at = values[max(values)] if values else None
    return create_trial(
        state=TrialState[row.state],
        value=row.objective if row.state == "COMPLETE" else pruned_at if row.state == "PRUNED" else None,
        params=params,
        distributions=distributions,
        intermediate_values=values,
        constraints=constraints_of(row),
    )


def beyond(row: TrialRow, told: Iterable[int]) -> int:
    """The epoch at which the sampler hears of a trial's penalty: behind all that it was told of."""
    return max((row.epochs, *told)) + 1


def _waiting(params: Params) -> FrozenTrial:
    return create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": params})


def curves_of(epochs: pa.Table) -> Mapping[int, Curve]:
    """trial -> epoch -> what the sampler was told."""
    curves: dict[int, dict[int, float]] = {}
    for trial, epoch, value in told_of(epochs):
        curves.setdefault(trial, {})[epoch] = value
    return curves


def told_of(epochs: pa.Table) -> Iterator[tuple[int, int, float]]:
    """Trial, epoch and the value that sampler and early stopping were told, of each row of the table `epochs`."""
    columns = (epochs[name].to_pylist() for name in ("trial", "epoch", "objective"))
    return zip(*columns, strict=True)


def constraints_of(row: TrialRow) -> dict[str, float]:
    return {name: float(row.status == name) for name in CONSTRAINTS}
