"""Several data sets, one study each: how the same activations rank on them. Demšar 2006, JMLR 7."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from search.comparison import Comparison, as_plain
from search.comparison import document as of_one
from vae.config import InputError

if TYPE_CHECKING:
    from search.statistics import Ranks

FEW_DATA_SETS = 5
"""Below this, ranks over data sets can hardly tell anything apart."""


@dataclass(frozen=True, slots=True)
class AcrossStudies:
    """The activations that all of the studies have, best mean rank first; 1 is the best rank."""

    studies: tuple[str, ...]
    activations: tuple[str, ...]
    mean_ranks: Mapping[str, float]
    ranks: Mapping[str, Mapping[str, float]]  # study -> activation -> rank; equals share theirs
    friedman_p: float
    critical_difference: float  # of mean ranks, by Nemenyi's test
    sentence: str
    caveats: tuple[str, ...]


def across(comparisons: Sequence[Comparison]) -> AcrossStudies:
    """Mean ranks over the studies. Raises InputError if one stands twice or they share fewer than two activations."""
    names = [comparison.study for comparison in comparisons]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{twice[0]} stands twice; name each study once")
    found = {comparison.study: _standing(comparison) for comparison in comparisons}
    shared = [name for name in next(iter(found.values())) if all(name in standing for standing in found.values())]
    if len(shared) < 2:
        have = "; ".join(f"{study}: {', '.join(standing) or 'none'}" for study, standing in found.items())
        raise InputError(f"the studies share fewer than two activations that have been tried: {have}")
    from search.statistics import mean_ranks

    # of places, so that a study's nats, whose scale is its own, do not matter
    ranked = mean_ranks({name: [_place(standing, name, shared) for standing in found.values()] for name in shared})
    of_name = dict(zip(ranked.names, ranked.mean_ranks, strict=True))
    return AcrossStudies(
        studies=tuple(names),
        activations=ranked.names,
        mean_ranks=of_name,
        ranks={study: {name: _place(standing, name, shared) for name in shared} for study, standing in found.items()},
        friedman_p=ranked.friedman_p,
        critical_difference=ranked.critical_difference,
        sentence=_sentence(ranked, of_name),
        caveats=tuple(_caveats(comparisons, shared)),
    )


def document(across: AcrossStudies, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """As plain values for JSON, with each study's own comparison."""
    return {**as_plain(asdict(across)), "comparisons": [of_one(comparison) for comparison in comparisons]}


def _standing(comparison: Comparison) -> Mapping[str, tuple[int, float]]:
    """Activation -> what it is ranked by: finalists by their test nll, then the others by their best trial, if any."""
    standing: dict[str, tuple[int, float]] = {}
    for estimate in () if comparison.verdict is None else comparison.verdict.estimates:
        standing[estimate.name] = (0, float(estimate.mean))
    for arm in comparison.arms:
        if arm.trials and arm.activation not in standing:
            value = None if arm.best is None else arm.best.val_nelbo
            standing[arm.activation] = (2, 0.0) if value is None else (1, value)
    return standing


def _place(standing: Mapping[str, tuple[int, float]], name: str, among: Sequence[str]) -> float:
    """The rank of one, from 1; equals share the mean of theirs."""
    below = sum(standing[other] < standing[name] for other in among)
    equal = sum(standing[other] == standing[name] for other in among)
    return below + (equal + 1) / 2


def _sentence(ranked: "Ranks", of_name: Mapping[str, float]) -> str:
    first, *others = ranked.names
    lead = (
        f"{first} has the lowest mean rank, {of_name[first]:.2f} among {len(of_name)} activations, over "
        f"{ranked.data_sets} studies"
    )
    apart = [name for name in others if of_name[name] - of_name[first] >= ranked.critical_difference]
    told = f"mean ranks that differ by less than {ranked.critical_difference:.2f} are not told apart"
    if not apart:
        return f"no detectable difference: {lead}; {told}, which none exceeds"
    return f"{lead}; {told}: it is ahead of {', '.join(apart)} (Friedman's p {ranked.friedman_p:.2g})"


def _caveats(comparisons: Sequence[Comparison], shared: Sequence[str]) -> list[str]:
    texts = []
    if len(comparisons) < FEW_DATA_SETS:
        texts.append(
            f"{len(comparisons)} data sets are few: at least {FEW_DATA_SETS} are needed before mean ranks say much"
        )
    of_data: dict[str, list[str]] = {}
    for comparison in comparisons:
        of_data.setdefault(comparison.data_fingerprint or comparison.study, []).append(comparison.study)
    texts += [
        f"{' and '.join(studies)} are of the same data and count as {len(studies)} data sets"
        for studies in of_data.values()
        if len(studies) > 1
    ]
    if unconfirmed := [comparison.study for comparison in comparisons if comparison.verdict is None]:
        texts.append(f"without final runs, ranked by the best trial of each activation: {', '.join(unconfirmed)}")
    for comparison in comparisons:
        names = {arm.activation for arm in comparison.arms if arm.trials}
        if others := sorted(names - set(shared)):
            texts.append(f"left out, since not every study has them: {', '.join(others)} of {comparison.study}")
        if not comparison.is_complete:
            texts.append(f"{comparison.study} is unfinished")
    return texts
