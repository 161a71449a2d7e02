"""What the differences between activations are worth: intervals, paired tests, and the verdict on a comparison.

The unit of replication is the seed. Each seed scores the same images, and all activations share seeds and images:
both are crossed with the activations, so everything here is of paired values. Numbers in, numbers out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# Shapes: A activations, R seeds, N images, D draws, n values, K sizes, M data sets.

ROPE_FLOOR = 0.1  # nats that nobody would choose an activation for
ROPE_SPREAD = 0.5  # of a seed's standard deviation
POWER = 0.8
MAX_SEEDS = 1000  # more than anyone will train

_MAD_TO_SD = 1.4826  # of a normal distribution
_TIE = 1e-9  # nats by which rounding alone may tell two means apart
_CHUNK_VALUES = 2**20  # held at once by what is drawn or tabulated

Kind = Literal["best", "best_group", "no_difference"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one activation, in nats per example."""

    name: str
    mean: float
    interval: Interval  # of the mean over all seeds and images there could be: see mean_interval
    median: float  # this and the next two over the seeds' means
    iqm: float  # interquartile mean: of the middle half. Agarwal et al. 2021
    sd: float  # NaN for one seed
    first: float  # share of the bootstrap's draws in which its mean is the lowest; a tie is shared


@dataclass(frozen=True, slots=True)
class Pair:
    """a against b, seed by seed, in nats per example."""

    a: str
    b: str
    difference: float  # mean of a minus mean of b; negative: a is better
    interval: Interval
    better: float  # see probability_better
    better_interval: Interval  # percentiles of the bootstrap over seeds
    p_value: float  # see signed_rank
    p_holm: float  # of a pair with the leader: adjusted for all these; else for all pairs there are
    in_rope: bool  # the whole interval lies in the region of practical equivalence


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `judge` finds."""

    kind: Kind
    group: tuple[str, ...]  # leader first
    estimates: tuple[Estimate, ...]  # lowest mean first
    pairs: tuple[Pair, ...]  # (leader, other) in the order of the estimates, then all others in the same order
    rope: float  # differences in [-rope, rope] nats are of no practical interest
    seeds: int
    images: int
    draws: int
    smallest_p: float  # that the test can give with so many seeds, after Holm over the pairs with the leader
    seeds_to_be_significant: int  # the least number with which that is below 1 - level
    seeds_to_decide: int | None  # leader against runner-up; see there. None: decided, or beyond MAX_SEEDS
    is_equivalent: bool  # every pair's interval lies in the rope; False for one activation


@dataclass(frozen=True, slots=True)
class Ranks:
    """Activations over several data sets; 1 is the lowest value. Demsar 2006."""

    names: tuple[str, ...]  # lowest mean rank first
    mean_ranks: tuple[float, ...]
    data_sets: int
    friedman_p: float
    critical_difference: float  # of mean ranks. Nemenyi
    groups: tuple[tuple[str, ...], ...]  # the largest sets whose mean ranks are all less than that apart


# ---- the verdict


def judge(
    nll: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    draws: int = 10_000,
    rope_floor: float = ROPE_FLOOR,
    level: float = 0.95,
) -> Verdict:
    """nll: activation -> (R, N), -log p(x) in nats of N images under the models of R seeds; row r is seed r for all.

    The leader has the lowest mean; of several the first in the mapping. Another activation is out where both hold:
    the interval of the difference leader - other lies wholly below -rope, and the signed-rank test of it, Holm-adjusted
    over all pairs with the leader, gives less than 1 - level. So a difference must be sure and large enough to care
    for, and one that grows never brings an activation back. Those not out are the group. It is the leader alone:
    "best"; everybody: "no_difference", which with `is_equivalent` has been shown, and without says that these data
    can't tell; else "best_group", as is a lone activation.

    rope = max(rope_floor, ROPE_SPREAD * SD over seeds). The SD comes from the median absolute deviation of all
    seeds' means from their activation's median, so that failed runs, which come in as rows of some penalty, don't make
    all activations equivalent.

    `seed` and `draws` are the bootstrap's, which `first` and `better_interval` come from and the verdict doesn't.
    Raises ValueError for no activation, values that are not finite, or shapes that are not one (R, N).
    """
    if not nll:
        raise ValueError("nothing to judge: no activation was given")
    if not 0 < level < 1 or draws < 1 or rope_floor < 0:
        raise ValueError(f"level {level} must lie in (0, 1), draws {draws} from 1, rope_floor {rope_floor} from 0")
    of = {name: _checked(values, repr(name)) for name, values in nll.items()}
    shapes = {name: values.shape for name, values in of.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all activations need the same seeds and images, got shapes {shapes}")
    names = sorted(of, key=lambda name: float(of[name].mean()))  # stable: a tie keeps the mapping's order
    values = [of[name] for name in names]
    seeds, images = values[0].shape
    means = np.stack([each.mean(axis=1) for each in values])
    counts, first = _bootstrap(values, draws, seed)
    rope = max(rope_floor, ROPE_SPREAD * _spread(means))

    comparisons = len(names) - 1
    indices = list(combinations(range(len(names)), 2))  # those of the leader, 0, come first
    tests = [signed_rank(means[a] - means[b]) for a, b in indices]
    adjusted = holm(tests[:comparisons]) + holm(tests)[comparisons:]
    pairs = []
    for (a, b), p_value, p_holm in zip(indices, tests, adjusted, strict=True):
        interval = mean_interval(values[a] - values[b], level)
        pair = Pair(
            a=names[a],
            b=names[b],
            difference=float((values[a] - values[b]).mean()),
            interval=interval,
            better=probability_better(means[a], means[b]),
            better_interval=_better_interval(means[a], means[b], counts, level),
            p_value=p_value,
            p_holm=p_holm,
            in_rope=-rope <= interval.low and interval.high <= rope,
        )
        pairs.append(pair)

    alpha = 1 - level
    out = {pair.b for pair in pairs[:comparisons] if pair.interval.high < -rope and pair.p_holm < alpha}
    group = tuple(name for name in names if name not in out)
    kind: Kind = "best_group"
    if comparisons and len(group) in (1, len(names)):
        kind = "best" if len(group) == 1 else "no_difference"
    needed = seeds_to_be_significant(comparisons, level)
    undecided = comparisons > 0 and names[1] in group and not pairs[0].in_rope
    return Verdict(
        kind=kind,
        group=group,
        estimates=tuple(
            _estimate(name, each, share, level) for name, each, share in zip(names, values, first, strict=True)
        ),
        pairs=tuple(pairs),
        rope=rope,
        seeds=seeds,
        images=images,
        draws=draws,
        smallest_p=min(1.0, max(comparisons, 1) * 2.0 ** (1 - seeds)),
        seeds_to_be_significant=needed,
        seeds_to_decide=seeds_to_decide(values[0] - values[1], rope, needed, level) if undecided else None,
        is_equivalent=comparisons > 0 and all(pair.in_rope for pair in pairs),
    )


def seeds_to_be_significant(comparisons: int, level: float = 0.95) -> int:
    """The least number of seeds whose smallest two-sided signed-rank p, 2^(1 - R), passes Holm over `comparisons`."""
    return next(seeds for seeds in range(1, 10_000) if max(comparisons, 1) * 2.0 ** (1 - seeds) < 1 - level)


def seeds_to_decide(difference: np.ndarray, rope: float, at_least: int, level: float = 0.95) -> int | None:
    """(R, N) differences of two activations -> seeds with which they would be told apart, with a chance of POWER.

    Told apart: the interval lies beyond the rope, and the signed-rank test can be significant (`at_least`). Where the
    difference observed is itself in the rope: the interval lies within. An estimate, as if the difference and the
    spread observed were the true ones; what the images leave unsure, no seed makes sure. More than R; None beyond
    MAX_SEEDS, or for one seed, whose spread is not known.
    """
    seeds = len(difference)
    if seeds < 2:
        return None
    parts = _variance(difference)
    of_images = max(0.0, parts.images - parts.both)
    distance = abs(abs(float(difference.mean())) - rope)
    is_apart = abs(float(difference.mean())) > rope
    count = np.arange(max(seeds + 1, at_least if is_apart else 2), MAX_SEEDS + 1)
    error = np.sqrt(parts.seeds * seeds / count + of_images)
    enough = distance >= (stats.t.ppf((1 + level) / 2, count - 1) + stats.norm.ppf(POWER)) * error
    return int(count[enough][0]) if enough.any() else None


# ---- means and their intervals


@dataclass(frozen=True, slots=True)
class _Variance:
    """Of the mean of a matrix (R, N) whose rows and columns are both samples: the mean squares over R N.

    In expectation, with s2 of row effects, i2 of column effects and e2 of what belongs to both or is noise:
    seeds = s2 / R + e2 / RN, images = i2 / N + e2 / RN, both = e2 / RN. Without a second row or column: 0.
    """

    seeds: float
    images: float
    both: float
    degrees: float  # of freedom, of `total`. Satterthwaite 1946
    third_moment: float  # of the mean

    @property
    def total(self) -> float:
        return _total(self.seeds, self.images, self.both)


def _total(seeds: float, images: float, both: float) -> float:
    return max(seeds, images, seeds + images - both)


def _variance(values: Floats) -> _Variance:
    (rows, columns), mean = values.shape, values.mean()
    of_row, of_column = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - of_row[:, None] - of_column
    free = (rows - 1, columns - 1, (rows - 1) * (columns - 1))
    parts = [
        float(np.square(part).mean()) / degrees if degrees else 0.0
        for part, degrees in zip((of_row, of_column, rest), free, strict=True)
    ]
    doubt = sum(part**2 / degrees for part, degrees in zip(parts, free, strict=True) if degrees)
    seeds, images, both = parts
    return _Variance(
        seeds=seeds,
        images=images,
        both=both,
        degrees=max(1.0, _total(*parts) ** 2 / doubt) if doubt else 1.0,
        third_moment=float((of_row**3).mean() / rows**2 + (of_column**3).mean() / columns**2),
    )


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """(R, N) of R seeds and N images -> an interval of the mean over all the seeds and images there could be.

    Student's interval with the standard error of crossed random effects, degrees of freedom by Satterthwaite over the
    seeds' and the images' part, and Hall's correction for skewness (1992, "On the removal of skewness by
    transformation"). So it is about as wide as that of R values where seeds differ, of N where images do. From images
    alone for one seed, and boundless for one value.

    No percentiles of a bootstrap: plain they fall short with any number of seeds there will be, expanded as in
    Hesterberg 2015 with five, and his bootstrap t knows no bounds where one seed failed (`rivals` in
    tests/benchmarks/verdict.py). Resampling seeds and images together would count what belongs to both three times
    (Owen 2007). Coverage falls short with ten seeds or fewer that are as skewed as an exponential distribution.
    """
    values = _checked(values, "the matrix")
    mean, parts = float(values.mean()), _variance(values)
    if values.size == 1:
        return Interval(-math.inf, math.inf)
    error = math.sqrt(parts.total)
    if error**3 == 0:
        return Interval(mean, mean)
    skewness = parts.third_moment / error**3
    quantile = float(stats.t.ppf((1 + level) / 2, parts.degrees))
    low, high = (mean - error * _unskew(at, skewness) for at in (quantile, -quantile))
    return Interval(low, high)


def _unskew(at: float, skewness: float) -> float:
    """t with t + s t^2 / 3 + s^2 t^3 / 27 + s / 6 = at, which of a mean of skewness s is near symmetric. Hall 1992."""
    shifted = at - skewness / 6
    root = float(np.cbrt(1 + skewness * shifted))
    return 3 * shifted / (root**2 + root + 1)  # = 3 (root - 1) / skewness, also where that is 0


def _estimate(name: str, values: Floats, first: float, level: float) -> Estimate:
    means = values.mean(axis=1)
    return Estimate(
        name=name,
        mean=float(values.mean()),
        interval=mean_interval(values, level),
        median=float(np.median(means)),
        iqm=float(stats.trim_mean(means, 0.25)),
        sd=float(means.std(ddof=1)) if len(means) > 1 else math.nan,
        first=first,
    )


def _spread(means: Floats) -> float:
    """(A, R) -> the SD of seeds within an activation, which runs that failed don't widen; 0 for one seed."""
    seeds = means.shape[1]
    if seeds < 2:
        return 0.0
    away = np.abs(means - np.median(means, axis=1, keepdims=True))
    return _MAD_TO_SD * math.sqrt(seeds / (seeds - 1)) * float(np.median(away))


# ---- the bootstrap


def _bootstrap(values: Sequence[Floats], draws: int, seed: int) -> tuple[Floats, list[float]]:
    """A matrices (R, N) -> (D, R) how often each seed is in a draw, A shares of the draws in which each is first.

    A draw resamples seeds and images, the same for all activations, which keeps them paired. Its mean is the sum of
    what the seeds and what the images drawn change, either widened to its unbiased variance, sqrt(n / (n - 1)).
    """
    rng = np.random.default_rng(seed)
    (seeds, images), activations = values[0].shape, len(values)
    mean = np.array([each.mean() for each in values])
    of_seed = np.stack([each.mean(axis=1) for each in values], axis=1) - mean
    of_image = np.stack([each.mean(axis=0) for each in values], axis=1) - mean
    shift, wide_seed, wide_image = mean - mean.min(), _widening(seeds), _widening(images)
    counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(np.float64)
    first = np.zeros(activations)
    chunk = max(1, _CHUNK_VALUES // max(images, activations))
    for start in range(0, draws, chunk):
        some = counts[start : start + chunk]
        picked = rng.integers(images, size=(len(some), images), dtype=np.int32)
        of_images = np.stack([np.bincount(each, minlength=images) for each in picked]).astype(np.float64)
        drawn = shift + wide_seed / seeds * (some @ of_seed) + wide_image / images * (of_images @ of_image)
        lowest = drawn <= drawn.min(axis=1, keepdims=True) + _TIE
        first += (lowest / lowest.sum(axis=1, keepdims=True)).sum(axis=0)
    return counts, (first / draws).tolist()


def _widening(count: int) -> float:
    return math.sqrt(count / (count - 1)) if count > 1 else 0.0


def _better_interval(a: Floats, b: Floats, counts: Floats, level: float) -> Interval:
    """(R,), (R,), counts (D, R) of the seeds in each draw -> percentiles of the share of pairs with a below b."""
    if len(a) < 2:
        return Interval(0.0, 1.0)
    shares = np.einsum("dr,dr->d", counts @ _below(a, b), counts) / len(a) ** 2
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


# ---- tests and shares


def signed_rank(differences: np.ndarray) -> float:
    """(R,) -> two-sided p of Wilcoxon's signed-rank test, exact for few; NaN for fewer than 2, 1 where all are 0."""
    if len(differences) < 2:
        return math.nan
    different = differences[np.abs(differences) > _TIE]
    return float(stats.wilcoxon(different).pvalue) if len(different) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all of them, in their order; a NaN counts as one and stays. Holm 1979."""
    count = len(p_values)
    adjusted, highest = [math.nan] * count, 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda at: (math.isnan(p_values[at]), p_values[at]))):
        if not math.isnan(p_values[index]):
            highest = max(highest, min(1.0, (count - rank) * p_values[index]))
            adjusted[index] = highest
    return adjusted


def wilson(count: int, total: int, level: float = 0.95) -> Interval:
    """Of the probability behind `count` of `total`. Wilson 1927."""
    if not 0 <= count <= total:
        raise ValueError(f"count must lie in 0..total, got {count} of {total}")
    if total == 0:
        return Interval(0.0, 1.0)
    z2, share = float(stats.norm.ppf((1 + level) / 2)) ** 2, count / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    radius = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    low = 0.0 if count == 0 else max(0.0, centre - radius)
    return Interval(low, 1.0 if count == total else min(1.0, centre + radius))


def probability_better(a: np.ndarray, b: np.ndarray) -> float:
    """(n,), (m,) -> share of the n m pairs in which a's value is below b's; ties count half. Agarwal et al. 2021.

    What rliable calls the probability of improvement: U / nm of Mann and Whitney. For a seed of each, drawn alone.
    """
    return float(_below(np.asarray(a), np.asarray(b)).mean())


def _below(a: np.ndarray, b: np.ndarray) -> Floats:
    """(n,), (m,) -> (n, m): 1 where a < b, 1/2 where they are equal."""
    return (1 + np.sign(b - a[:, None])) / 2


# ---- the best of so many


def expected_best(values: np.ndarray, sizes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """(n,) of independent draws -> (K,) expected lowest of k of them without replacement; None: k = 1..n.

    The unbiased estimate of the lowest of k new draws. Tang et al. 2020 (arXiv 2004.13705).
    """
    return _expected_best(_checked_list(values)[None], sizes)[0]


def expected_best_band(
    values: np.ndarray, seed: int, draws: int = 1000, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) -> low and high of `expected_best`, each (n,): percentiles of the bootstrap, for each k by itself.

    Too narrow towards k = n: what was not seen can't be drawn.
    """
    values = _checked_list(values)
    drawn = np.random.default_rng(seed).choice(values, size=(draws, len(values)))
    low, high = np.quantile(_expected_best(drawn, None), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _expected_best(values: Floats, sizes: Sequence[int] | np.ndarray | None) -> Floats:
    """(D, n) -> (D, K)."""
    count = values.shape[1]
    sizes = np.arange(1, count + 1) if sizes is None else np.asarray(sizes)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > count):
        raise ValueError(f"sizes must lie in 1..{count}, got {sizes.min()}..{sizes.max()}")
    ordered = np.sort(values, axis=1)
    gaps = np.diff(ordered, axis=1)
    chunk = max(1, _CHUNK_VALUES // count)
    parts = [gaps @ _all_above(count, sizes[start : start + chunk]) for start in range(0, len(sizes), chunk)]
    return ordered[:, :1] + np.concatenate(parts, axis=1) if parts else np.empty((len(values), 0))


def _all_above(count: int, sizes: NDArray[np.int_]) -> Floats:
    """(K,) -> (n - 1, K): P(none of the i lowest is among k of n) = C(n - i, k) / C(n, k), i = 1..n - 1.

    As a product of factors in [0, 1], which neither overflows nor cancels.
    """
    left = count - np.arange(count - 1)[:, None]
    return np.cumprod(np.maximum(left - sizes, 0) / left, axis=0)


def pareto_front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n,), (n,), both to be minimised -> (n,) bool: no other is as good in both and better in one."""
    points = np.stack([np.asarray(costs, dtype=float), np.asarray(values, dtype=float)], axis=1)
    as_good = (points[:, None] <= points).all(axis=2)
    better = (points[:, None] < points).any(axis=2)
    return np.asarray(~(as_good & better).any(axis=0))


# ---- several data sets


def mean_ranks(nll: Mapping[str, Sequence[float]], level: float = 0.95) -> Ranks:
    """nll: activation -> M values, one a data set, which are compared within a data set alone. Demsar 2006.

    Friedman's chi-squared, corrected for ties, and Nemenyi's critical difference. Both are for many data sets: with
    fewer than ten they are rough. Raises ValueError for fewer than two activations or data sets.
    """
    columns = {name: _checked_list(np.asarray(values)) for name, values in nll.items()}
    lengths = {len(values) for values in columns.values()}
    if len(columns) < 2 or len(lengths) > 1 or min(lengths) < 2:
        raise ValueError(
            f"ranks need two or more activations with as many data sets each, got {len(columns)}, {lengths}"
        )
    ranks = stats.rankdata(np.stack(list(columns.values()), axis=1), axis=1)
    data_sets, count = ranks.shape
    mean, middle = ranks.mean(axis=0), (count + 1) / 2
    order = np.argsort(mean, kind="stable")
    names, ordered = [list(columns)[at] for at in order], mean[order]
    variance = np.square(ranks - middle).sum() / (data_sets * (count - 1))  # k (k + 1) / 12 without ties
    chi2 = data_sets * np.square(mean - middle).sum() / variance if variance else 0.0
    quantile = float(stats.studentized_range.ppf(level, count, np.inf)) / math.sqrt(2)
    difference = quantile * math.sqrt(count * (count + 1) / (6 * data_sets))
    ends = [int(np.searchsorted(ordered, low + difference)) for low in ordered]
    groups = [tuple(names[at:end]) for at, end in enumerate(ends) if at == 0 or end > ends[at - 1]]
    return Ranks(
        names=tuple(names),
        mean_ranks=tuple(ordered.tolist()),
        data_sets=data_sets,
        friedman_p=float(stats.chi2.sf(chi2, count - 1)),
        critical_difference=difference,
        groups=tuple(groups),
    )


# ---- checks


def _checked(values: np.ndarray, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{what}: values must be (seeds, images), at least one of each, got shape {array.shape}")
    _check_finite(array, what)
    return array


def _checked_list(values: np.ndarray) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values must be a list of at least one number, got shape {array.shape}")
    _check_finite(array, "the list")
    return array


def _check_finite(array: Floats, what: str) -> None:
    if not np.isfinite(array).all():
        place = tuple(int(at) for at in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{what}: values must be finite, got {array[place]} at {place}")
