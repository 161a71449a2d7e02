"""Which parameters decided how good a trial of the space-filling phase is: conditional PED-ANOVA.

Watanabe et al. 2023, arXiv:2304.10255; for parameters that not every trial has, arXiv:2601.20800. The evaluator is
Optuna's, which takes a second or two to import.
"""

import warnings
from collections.abc import Mapping, Sequence

from search.spec import StudySpec
from search.tables import TrialRow

FEWEST_TRIALS = 20
"""Of fewer the shares are noise."""

TOP_SHARE, FEWEST_TOP = 0.1, 5
"""It asks what the best trials have in common: this share of them, but not fewer than the evaluator advises."""


def importances(spec: StudySpec, rows: Sequence[TrialRow], values: Mapping[int, float]) -> Mapping[str, float] | None:
    """Parameter -> its share, all adding up to 1, largest first; activation is a parameter among the others.

    values: trial -> nats; trials that have none are left out. A parameter of one activation counts where it applies.
    None where there are too few trials, nothing to choose, or as many trials as good as the best as make no top.
    """
    scored = [row for row in rows if row.trial in values]
    if len(scored) < FEWEST_TRIALS:
        return None
    import optuna

    from search.space import Space

    space = Space(spec.space)
    if space.is_fixed:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    for row in scored:
        params, distributions = space.chosen(row.params)
        trial = optuna.trial.create_trial(params=params, distributions=distributions, value=values[row.trial])
        study.add_trial(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all alike, which the shares tell, too
        found = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(
                target_quantile=max(TOP_SHARE, FEWEST_TOP / len(scored))
            ),
            normalize=False,
        )
    total = sum(found.values())
    if total <= 0:
        return None
    shares = {name: value / total for name, value in found.items()}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))
