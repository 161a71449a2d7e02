"""Asynchronous successive halving on epochs: which trial may go on at each rung.

The rule is that of Li et al. 2020 (A System for Massively Parallel Hyperparameter Tuning) in the stopping
form of Ray's AsyncHyperBandScheduler, which the tests hold it against. It is written out here because ours
is rebuilt from the ledger after a crash, and takes a non-finite value for the worst one: `nan < cutoff` is
false, so Ray's lets a NaN trial run to its last epoch.
"""

import math

import numpy as np

from search.spec import StudySpec


class Asha:
    """Remembers the value of every trial at every rung it reached; lower is better."""

    def __init__(self, rungs: list[int], reduction_factor: float) -> None:
        self._keep_percent = 100 / reduction_factor
        self._recorded: dict[int, dict[int, float]] = {rung: {} for rung in rungs}
        self._stopped_at: dict[int, int] = {}  # trial -> rung: a verdict stands, also where it was not carried out

    def may_go_on(self, trial: int, epoch: int, value: float, *, is_judged: bool = True) -> bool:
        """Judge and record a trial at the highest rung it has reached; False if it should stop there.

        is_judged: False for one that goes on whatever its value is, and that others are judged by.
        """
        if not math.isfinite(value):
            return False
        if trial in self._stopped_at:
            return epoch < self._stopped_at[trial]
        reached = [rung for rung in self._recorded if rung <= epoch]
        if not reached or trial in self._recorded[reached[-1]]:
            return True
        recorded = self._recorded[reached[-1]]
        keep = not recorded or value <= float(np.percentile(list(recorded.values()), self._keep_percent))
        recorded[trial] = value
        if is_judged and not keep:
            self._stopped_at[trial] = reached[-1]
        return keep or not is_judged


class EarlyStopping:
    """A study's: an `Asha` for each of its arms, so that slow starters are judged by their own kind alone.

    Trials at the settings common to all arms are never stopped: what they show is to be compared.
    """

    def __init__(self, spec: StudySpec) -> None:
        rungs = spec.rungs() if spec.scheduler.kind == "asha" else []
        self._spec = spec
        self._of_arm = [Asha(rungs, spec.scheduler.reduction_factor) for _ in range(spec.num_arms)]

    def may_go_on(self, trial: int, epoch: int, value: float) -> bool:
        arm, _ = self._spec.place(trial)
        return self._of_arm[arm].may_go_on(trial, epoch, value, is_judged=self._spec.phase(trial) != "screen")
