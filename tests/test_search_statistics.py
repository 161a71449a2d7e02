"""Intervals, tests and verdicts against scipy, closed forms, published examples, and data whose truth is known."""

import math
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from search.statistics import (
    Interval,
    Verdict,
    expected_best,
    expected_best_band,
    holm,
    judge,
    mean_interval,
    mean_ranks,
    pareto_front,
    probability_better,
    seeds_to_be_significant,
    signed_rank,
    wilson,
)

BENCHMARKS = Path(__file__).parent / "benchmarks"
SURE = 0.9999  # level of the bounds on what is random here


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = spec_from_file_location("verdict", BENCHMARKS / "verdict.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(*offsets: float, seeds: int = 10, images: int = 40, sd: float = 0.05, seed: int = 0) -> dict[str, np.ndarray]:
    """Names a, b, ... with these means in nats over 90, seeds of this SD, and images that differ by much more."""
    rng = np.random.default_rng(seed)
    of_image = rng.normal(90, 5, images)
    return {
        chr(ord("a") + at): of_image + offset + rng.normal(0, sd, (seeds, 1)) + rng.normal(0, sd, (seeds, images))
        for at, offset in enumerate(offsets)
    }


# ---- the interval


def test_of_images_that_are_all_alike_the_interval_is_student_s_over_the_seeds():
    means = np.array([21.0, 22.0, 23.0, 24.0, 25.0, 26.0])  # no skewness to correct for
    found = mean_interval(np.repeat(means[:, None], 500, axis=1))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 5, 23.5, stats.sem(means)))


def test_of_one_seed_the_interval_is_student_s_over_the_images():
    images = np.arange(30.0)
    found = mean_interval(images[None], level=0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 29, images.mean(), stats.sem(images)))


def test_a_skewed_interval_ends_where_hall_s_transformation_of_t_meets_the_quantiles():
    seeds = np.array([0.1, 0.2, 0.3, 0.5, 0.9, 1.7, 3.3, 8.0])
    error = stats.sem(seeds)
    skewness = stats.moment(seeds, 3) / len(seeds) ** 2 / error**3

    def transformed(t):
        return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6

    low, high = (
        seeds.mean() - error * optimize.brentq(lambda t, at=at: transformed(t) - at, -50, 50)
        for at in stats.t.ppf([0.975, 0.025], len(seeds) - 1)
    )
    found = mean_interval(seeds[:, None])
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.high - seeds.mean() > 1.5 * (seeds.mean() - found.low)


@pytest.mark.parametrize(("of_seed", "of_image"), [(1.0, 1.0), (0.5, 4.0), (0.1, 1.0)])
def test_the_interval_has_the_variance_and_satterthwaite_s_degrees_of_crossed_random_effects(of_seed, of_image):
    """From the textbook's table: (MS_seeds + MS_images - MS_rest) / RN."""
    rng = np.random.default_rng(3)
    half, quarter = rng.normal(0, of_seed, (6, 1)), rng.normal(0, of_image, 50)
    both = rng.normal(0, 1, (12, 100))
    both -= both.mean(axis=0)
    both -= both.mean(axis=1, keepdims=True)
    values = np.vstack([half, -half]) + np.concatenate([quarter, -quarter]) + both  # whose mean has no skewness
    seeds, images = values.shape
    centred = values - values.mean()
    squares_of_seeds = images * np.sum(centred.mean(axis=1) ** 2)
    squares_of_images = seeds * np.sum(centred.mean(axis=0) ** 2)
    rest = np.sum(centred**2) - squares_of_seeds - squares_of_images
    free = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    means = np.array([squares_of_seeds, squares_of_images, rest]) / free / (seeds * images)
    variance = means[0] + means[1] - means[2]
    degrees = variance**2 / np.sum(means**2 / free)
    found = mean_interval(values)
    expected = stats.t.interval(0.95, degrees, values.mean(), math.sqrt(variance))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("regime", "effect", "seeds"),
    [
        ("seeds alone", "normal", 5),
        ("seeds alone", "normal", 10),
        ("seeds", "normal", 20),
        ("both", "normal", 10),
        ("images", "normal", 10),
        ("seeds alone", "gamma(4)", 10),
        ("seeds", "gamma(4)", 20),
        ("seeds alone", "exponential", 20),
    ],
)
def test_intervals_of_simulated_studies_have_the_truth_in_them_nineteen_times_in_twenty(
    benchmark, regime, effect, seeds
):
    """Not below 93 % nor above 97 %, as far as so many studies can tell."""
    count = 1200
    hits = benchmark.covered(regime, effect, seeds, count)
    interval = wilson(hits, count, SURE)
    print(f"{regime}, {effect}, {seeds} seeds: {benchmark.share(hits, count)}")
    assert interval.high > 0.93
    assert interval.low < 0.97


def test_values_that_are_all_the_same_have_a_point_and_a_single_one_no_bounds():
    same = mean_interval(np.full((4, 7), 28.3))
    assert (same.low, same.high) == pytest.approx((28.3, 28.3))
    assert mean_interval(np.array([[28.3]])) == Interval(-math.inf, math.inf)


# ---- tests and shares


def test_holm_s_adjusted_values_are_those_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    adjusted = holm([0.01, math.nan])
    assert adjusted[0] == 0.02
    assert math.isnan(adjusted[1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values, alpha):
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - step) >= alpha:
            break
        rejected.add(index)
    assert {index for index, p_value in enumerate(holm(p_values)) if p_value < alpha} == rejected


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 1000)])
def test_wilson_s_interval_is_scipy_s(count, total):
    found = wilson(count, total, 0.9)
    assert (found.low, found.high) == pytest.approx(stats.binomtest(count, total).proportion_ci(0.9, "wilson"))


def test_of_nothing_a_share_can_be_anything():
    assert wilson(0, 0) == Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="count must lie in"):
        wilson(3, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_the_probability_of_being_better_is_mann_and_whitney_s_u(a, b):
    u = stats.mannwhitneyu(b, a, method="asymptotic").statistic
    assert probability_better(np.array(a), np.array(b)) == pytest.approx(u / (len(a) * len(b)))


@pytest.mark.parametrize("seeds", [2, 5, 10, 13, 20, 29])
def test_the_smallest_p_of_the_signed_rank_test_halves_with_every_seed(seeds):
    differences = -np.linspace(1, 2, seeds)
    assert signed_rank(differences) == pytest.approx(2.0 ** (1 - seeds))
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_seeds_that_are_equal_tell_nothing_and_those_that_tie_are_counted_exactly():
    assert signed_rank(np.zeros(6)) == 1.0
    assert signed_rank(np.array([0.0, 1.0, 2.0, -3.0, 0.0])) == signed_rank(np.array([1.0, 2.0, -3.0]))
    assert math.isnan(signed_rank(np.array([1.0])))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)  # every way the test could have turned out
    ties = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, -3.0])
    ranks = stats.rankdata(np.abs(ties))
    found = np.abs(np.sign(ties) @ ranks) <= np.abs(signs.T @ ranks) + 1e-9
    assert signed_rank(ties) == pytest.approx(found.mean())


def test_seeds_needed_to_be_significant_are_six_for_two_activations_and_nine_for_thirteen():
    assert seeds_to_be_significant(1) == 6
    assert seeds_to_be_significant(12) == 9
    for comparisons in range(1, 25):
        needed = seeds_to_be_significant(comparisons)
        assert comparisons * stats.wilcoxon(np.arange(1, needed + 1)).pvalue < 0.05
        assert comparisons * stats.wilcoxon(np.arange(1, needed)).pvalue >= 0.05


# ---- the best of so many


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=7))
def test_the_expected_best_is_the_mean_over_all_subsets(values):
    subsets = [[min(subset) for subset in combinations(values, k)] for k in range(1, len(values) + 1)]
    assert expected_best(np.array(values)) == pytest.approx([np.mean(lowest) for lowest in subsets], abs=1e-9)


def test_the_expected_best_of_a_thousand_evenly_spaced_values_is_that_of_order_statistics():
    """The lowest of k of 1..n, drawn without replacement, is (n + 1) / (k + 1) in expectation."""
    for count in (10, 1000, 5000):
        sizes = np.unique(np.geomspace(1, count, 40).astype(int))
        values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
        assert expected_best(values, sizes) == pytest.approx((count + 1) / (sizes + 1), rel=1e-10)


def test_the_expected_best_is_unbiased_for_new_draws_and_its_band_has_it_inside():
    rng = np.random.default_rng(0)
    found = np.array([expected_best(rng.random(8)) for _ in range(4000)])
    truth = 1 / (np.arange(1, 9) + 1)  # of k uniform values
    assert (np.abs(found.mean(axis=0) - truth) < 4 * found.std(axis=0) / math.sqrt(4000)).all()
    values = rng.random(30)
    low, high = expected_best_band(values, seed=1)
    assert (low <= high).all()
    assert (low[:10] < expected_best(values)[:10]).all()
    assert (expected_best(values) < high).all()
    mean, error = values.mean(), values.std() / math.sqrt(30)
    assert (low[0], high[0]) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    assert expected_best_band(values, seed=1)[0].tolist() == low.tolist()


def test_sizes_that_are_more_than_there_are_and_values_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"sizes must lie in 1\.\.2"):
        expected_best(np.array([1.0, 2.0]), [3])
    with pytest.raises(ValueError, match="at least one number"):
        expected_best(np.array([]))
    with pytest.raises(ValueError, match=r"finite, got nan at \(1,\)"):
        expected_best(np.array([1.0, math.nan]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_on_the_front_is_whom_nobody_dominates(points):
    front = pareto_front(np.array([cost for cost, _ in points]), np.array([value for _, value in points]))
    for (cost, value), is_on_it in zip(points, front, strict=True):
        dominated = any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in points)
        assert is_on_it == (not dominated)


# ---- several data sets

DEMSAR_AUC = """
    .763 .768 .771 .798  .599 .591 .590 .569  .954 .971 .968 .967  .628 .661 .654 .657  .882 .888 .886 .898
    .936 .931 .916 .931  .661 .668 .609 .685  .583 .583 .563 .625  .775 .838 .866 .875  1 1 1 1
    .940 .962 .965 .962  .619 .666 .614 .669  .972 .981 .9751 .975  .957 .978 .946 .970
"""  # Demsar 2006, table 6: C4.5, with m, with cf, with both; 14 data sets. .9751 is printed .975, and ranked above it


def test_mean_ranks_and_critical_difference_are_those_of_demsar_s_example():
    names = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
    losses = 1 - np.array(DEMSAR_AUC.split(), dtype=float).reshape(14, 4)
    found = mean_ranks(dict(zip(names, losses.T.tolist(), strict=True)))
    assert found.names == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    assert found.mean_ranks == pytest.approx((1.964, 2.000, 2.893, 3.143), abs=5e-4)
    assert found.critical_difference == pytest.approx(1.25, abs=0.01)
    assert found.groups == (found.names,)  # 3.143 - 1.964 < 1.25
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*losses.T).pvalue)
    assert found.data_sets == 14


def test_critical_values_are_those_of_demsar_s_table():
    for count, q in zip(
        range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), strict=True
    ):  # fmt: skip
        nll = {str(at): [float(at), float(at)] for at in range(count)}
        found = mean_ranks(nll).critical_difference / math.sqrt(count * (count + 1) / 12)
        assert found == pytest.approx(q, abs=1.5e-3)


def test_groups_are_the_largest_sets_within_the_critical_difference():
    rng = np.random.default_rng(0)
    nll = {name: rng.normal(mean, 1, 30).tolist() for name, mean in zip("abcdef", (0, 0.3, 1, 1.3, 9, 20), strict=True)}
    found = mean_ranks(nll)
    rank = dict(zip(found.names, found.mean_ranks, strict=True))

    def is_within(names):
        return max(rank[name] for name in names) - min(rank[name] for name in names) < found.critical_difference

    sets = [set(names) for size in range(1, 7) for names in combinations(found.names, size) if is_within(names)]
    largest = [names for names in sets if not any(names < other for other in sets)]
    assert sorted(map(sorted, largest)) == sorted(map(sorted, found.groups))
    assert len(found.groups) > 1


def test_of_two_activations_friedman_is_the_sign_test_s_approximation_and_ties_everywhere_say_nothing():
    better = mean_ranks({"a": [1.0] * 9 + [3.0], "b": [2.0] * 10})
    assert better.friedman_p == pytest.approx(stats.chi2.sf((9 - 1) ** 2 / 10, 1))
    assert mean_ranks({"a": [1.0, 2.0], "b": [1.0, 2.0]}).friedman_p == 1.0


def test_ranks_of_one_activation_or_of_one_data_set_are_refused():
    for nll in ({"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}, {"a": [1.0, 2.0], "b": [2.0]}, {}):
        with pytest.raises(ValueError, match="two or more activations"):
            mean_ranks(nll)


# ---- the verdict


def test_one_that_is_better_by_far_is_best_and_pairs_come_in_the_order_of_the_estimates():
    found = judge(study(1.0, 0.0, 2.0))
    assert (found.kind, found.group) == ("best", ("b",))
    assert [each.name for each in found.estimates] == ["b", "a", "c"]
    assert [(pair.a, pair.b) for pair in found.pairs] == [("b", "a"), ("b", "c"), ("a", "c")]
    assert (found.seeds, found.images, found.draws) == (10, 40, 10_000)
    assert found.smallest_p == 2 * 2.0**-9
    assert [pair.p_holm for pair in found.pairs] == pytest.approx([2 * 2.0**-9, 2 * 2.0**-9, 3 * 2.0**-9])
    assert found.seeds_to_decide is None
    assert not found.is_equivalent


def test_those_that_are_near_the_leader_are_its_group():
    found = judge(study(0.0, 0.02, 1.0))
    assert found.kind == "best_group"
    assert sorted(found.group) == ["a", "b"]
    assert found.group[0] == found.estimates[0].name


def test_those_within_the_rope_have_no_difference_and_those_of_unsure_seeds_are_not_shown_to_have_none():
    shown = judge(study(0.0, 0.0, 0.0, sd=0.02))
    assert (shown.kind, shown.is_equivalent, len(shown.group)) == ("no_difference", True, 3)
    assert all(pair.in_rope for pair in shown.pairs)
    unsure = judge(study(0.0, 0.4, sd=0.5))
    assert (unsure.kind, unsure.is_equivalent) == ("no_difference", False)
    assert unsure.seeds_to_decide is None or unsure.seeds_to_decide > 10


def test_a_difference_that_is_sure_but_within_the_rope_makes_nobody_best():
    found = judge(study(0.0, 0.05, sd=0.005))
    assert found.pairs[0].p_holm < 0.05
    assert found.pairs[0].interval.high < 0
    assert found.pairs[0].in_rope
    assert (found.kind, found.is_equivalent) == ("no_difference", True)


def test_five_seeds_can_make_nobody_best_whatever_the_difference():
    found = judge(study(0.0, 9.0, seeds=5))
    assert found.kind == "no_difference"
    assert not found.is_equivalent
    assert found.smallest_p == 0.0625 == found.pairs[0].p_value
    assert (found.seeds_to_be_significant, found.seeds_to_decide) == (6, 6)


def test_one_seed_has_an_interval_from_the_images_and_no_test():
    found = judge(study(0.0, 9.0, seeds=1))
    assert found.kind == "no_difference"
    assert math.isnan(found.pairs[0].p_value)
    assert math.isnan(found.pairs[0].p_holm)
    assert math.isnan(found.estimates[0].sd)
    assert found.pairs[0].interval.high < -8
    assert found.pairs[0].better_interval == Interval(0.0, 1.0)
    assert (found.rope, found.smallest_p, found.seeds_to_decide) == (0.1, 1.0, None)
    assert judge({"a": np.array([[1.0]]), "b": np.array([[2.0]])}).kind == "no_difference"


def test_one_image_will_do_and_one_activation_is_a_group_of_its_own():
    means = {"a": np.array([[1.0], [1.1], [1.2], [1.1], [1.0], [1.1]]), "b": np.full((6, 1), 5.0)}
    assert judge(means).kind == "best"
    alone = judge({"a": means["a"]})
    assert (alone.kind, alone.group, alone.pairs, alone.is_equivalent) == ("best_group", ("a",), (), False)
    assert alone.estimates[0].first == 1.0


def test_the_same_values_twice_share_everything_and_the_first_of_the_mapping_leads():
    values = study(0.0)["a"]
    found = judge({"z": values, "a": values.copy()})
    assert (found.kind, found.group, found.is_equivalent) == ("no_difference", ("z", "a"), True)
    (pair,) = found.pairs
    assert (pair.difference, pair.p_value, pair.better) == (0.0, 1.0, 0.5)
    assert pair.interval == Interval(0.0, 0.0)
    assert [each.first for each in found.estimates] == [0.5, 0.5]


def test_seeds_that_failed_neither_break_the_verdict_nor_widen_the_rope_for_the_others():
    values = study(0.0, 0.5, 0.0)
    before = judge(values)
    values["c"][:4] = 130.0
    found = judge(values)
    assert (found.kind, found.group) == ("best_group", ("a", "c"))  # six seeds of ten are as good
    assert found.rope == before.rope == 0.1
    values["c"][:] = 130.0
    found = judge(values)
    assert (found.kind, found.group) == ("best", ("a",))
    assert found.estimates[-1].sd == pytest.approx(0)
    assert all(map(math.isfinite, (found.pairs[1].interval.low, found.pairs[1].interval.high)))


def test_the_rope_is_half_a_seed_s_sd_where_that_is_more_than_its_floor():
    values = study(0.0, 0.3, seeds=400, images=2, sd=2.0)
    pooled = np.sqrt(np.mean([each.mean(axis=1).var(ddof=1) for each in values.values()]))
    found = judge(values, draws=10)
    assert found.rope == pytest.approx(0.5 * pooled, rel=0.1)
    assert judge(values, draws=10, rope_floor=7.0).rope == 7.0


def test_estimates_are_plain_statistics_of_the_seeds_means():
    values = study(0.0, seeds=8)["a"]
    (found,) = judge({"a": values}).estimates
    means = np.sort(values.mean(axis=1))
    assert (found.mean, found.median) == pytest.approx((values.mean(), means[3:5].mean()))
    assert (found.iqm, found.sd) == pytest.approx((means[2:6].mean(), np.std(means, ddof=1)))


def test_the_share_of_draws_in_which_one_is_first_is_that_of_the_normal_distribution_of_crossed_effects():
    rng = np.random.default_rng(1)
    seeds, images, draws = 60, 200, 20_000
    rows, columns = rng.normal(0, 1, (seeds, 1)), rng.normal(0, 2, images)
    rows, columns = (each - each.mean() for each in (rows, columns))
    variance = np.var(rows, ddof=1) / seeds + np.var(columns, ddof=1) / images
    for steps in (0.0, 0.5, 1.5):
        difference = rows + columns + steps * math.sqrt(variance)
        base = rng.normal(90, 5, (seeds, images))
        found = {each.name: each.first for each in judge({"a": base, "b": base + difference}, draws=draws).estimates}
        assert found["a"] == pytest.approx(stats.norm.cdf(steps), abs=0.015)
        assert found["a"] + found["b"] == pytest.approx(1)


def test_the_interval_of_the_probability_of_being_better_is_the_bootstrap_s_over_seeds():
    values = study(0.0, 0.03, seeds=12, images=3)
    (pair,) = judge(values).pairs
    means = {name: each.mean(axis=1) for name, each in values.items()}
    drawn = np.random.default_rng(5).integers(12, size=(4000, 12))
    shares = [probability_better(means[pair.a][rows], means[pair.b][rows]) for rows in drawn]
    low, high = np.quantile(shares, [0.025, 0.975])
    assert (pair.better_interval.low, pair.better_interval.high) == pytest.approx((low, high), abs=0.03)
    assert pair.better == probability_better(means[pair.a], means[pair.b])


def test_seeds_to_decide_would_decide_four_times_in_five():
    values = study(0.0, 0.4, seeds=7, sd=0.3, images=30, seed=4)
    found = judge(values)
    assert found.seeds_to_decide is not None
    rng, count, decided = np.random.default_rng(0), 300, 0
    difference = values[found.group[1]] - values[found.group[0]]
    means = difference.mean(axis=1)
    for _ in range(count):  # of studies as the estimate imagines them
        drawn = rng.normal(means.mean(), means.std(ddof=1), (found.seeds_to_decide, 1))
        again = judge({"a": np.zeros_like(drawn), "b": drawn}, draws=1, rope_floor=found.rope)
        decided += again.pairs[0].interval.high < -found.rope and again.pairs[0].p_holm < 0.05
    assert wilson(decided, count, SURE).high > 0.8
    assert decided / count < 0.95


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12), st.floats(0, 3), st.floats(0, 3))
def test_one_that_is_out_stays_out_if_it_gets_worse(seed, seeds, size, more):
    values = study(0.0, size, 0.5, seeds=seeds, images=5, sd=0.4, seed=seed)
    leader = judge(values, draws=1).group[0]
    worse = {name: each + more * (name == "b" != leader) for name, each in values.items()}
    before, after = judge(values, draws=1).group, judge(worse, draws=1).group
    assert set(after) <= set(before)
    assert set(before) - set(after) <= {"b"} or "b" not in after


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(-1000, 1000), st.permutations(range(3)))
def test_neither_what_all_have_in_common_nor_names_nor_the_order_of_seeds_and_images_change_a_verdict(
    seed, shift, order
):
    values = study(0.0, 0.1, 0.3, seeds=8, images=6, sd=0.1, seed=seed)
    found = judge(values, draws=200)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(8), rng.permutation(6)
    names = dict(zip("abc", ("x", "y", "z"), strict=True))
    changed = {names["abc"[at]]: values["abc"[at]][np.ix_(rows, columns)] + shift for at in order}
    again = judge(changed, draws=200)
    assert again.kind == found.kind
    assert again.group == tuple(names[name] for name in found.group)
    assert again.rope == pytest.approx(found.rope, abs=1e-9)
    for one, other in zip(found.pairs, again.pairs, strict=True):
        assert (names[one.a], names[one.b], one.in_rope) == (other.a, other.b, other.in_rope)
        assert (one.difference, one.p_holm, one.better) == pytest.approx((other.difference, other.p_holm, other.better))
        assert (one.interval.low, one.interval.high) == pytest.approx((other.interval.low, other.interval.high))


def test_the_verdict_is_not_a_matter_of_the_bootstrap_s_seed_and_the_same_seed_gives_the_same_numbers():
    values = study(0.0, 0.01, 0.02, 0.5)
    one, other = judge(values, seed=1, draws=50), judge(values, seed=2, draws=1000)
    assert judge(values, seed=1, draws=50) == one
    assert (one.kind, one.group, one.rope) == (other.kind, other.group, other.rope)
    assert [pair.interval for pair in one.pairs] == [pair.interval for pair in other.pairs]
    assert [each.first for each in one.estimates] != [each.first for each in other.estimates]


@pytest.mark.parametrize(
    ("nll", "message"),
    [
        ({}, "no activation"),
        ({"a": np.ones((2, 3)), "b": np.ones((3, 3))}, "same seeds and images"),
        ({"a": np.ones(3)}, r"'a'.*shape \(3,\)"),
        ({"a": np.ones((0, 3))}, "at least one of each"),
        ({"a": np.ones((2, 2)), "b": np.array([[1, 1], [1, math.nan]])}, r"'b'.*got nan at \(1, 1\)"),
        ({"a": np.array([[math.inf]])}, r"'a'.*got inf at \(0, 0\)"),
    ],
)
def test_what_cannot_be_judged_is_refused_and_why_is_said(nll, message):
    with pytest.raises(ValueError, match=message):
        judge(nll)


def test_levels_draws_and_ropes_that_mean_nothing_are_refused():
    for wrong in ({"level": 1.0}, {"draws": 0}, {"rope_floor": -1.0}):
        with pytest.raises(ValueError, match="must lie in"):
            judge(study(0.0), **wrong)


# ---- on models that were trained


def test_of_one_activation_under_two_names_neither_is_called_best(benchmark):
    """With a rope of half a seed's SD alone, too; the floor of the default would hide what there is."""
    count = 200
    pool = benchmark.read_pool()["relu"]
    for rope_floor in (0.1, 0.0):
        best, out = benchmark.same_called_best(pool, 2, 10, count, rope_floor)
        print(f"rope floor {rope_floor}: best {benchmark.share(best, count)}, any out {benchmark.share(out, count)}")
        assert best == out
        assert wilson(best, count).high < 0.05


def test_a_shift_of_two_sd_is_mostly_found_with_ten_seeds_and_never_with_five(benchmark):
    pool = benchmark.read_pool()["relu"]
    sd = pool.mean(axis=1).std(ddof=1)
    none, some, much = benchmark.power(pool, [0.0, sd, 3 * sd], 10, 60, 0.0)
    assert none <= some <= much
    assert much > 50
    assert benchmark.power(pool, [9.0], 5, 5, 0.0) == [0]


def test_real_activations_are_told_apart_and_linear_is_no_leader(benchmark):
    pool = benchmark.read_pool()
    assert {name: len(values) for name, values in pool.items()}["relu"] >= 100
    found = judge({name: values[:20] for name, values in pool.items()}, draws=500)
    assert isinstance(found, Verdict)
    assert found.kind == "best_group"
    assert not {"linear", "sigmoid"} & set(found.group)


def test_the_benchmark_prints_its_tables():
    small = ["--studies", "2", "--matrices", "2"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "verdict.py", *small], capture_output=True, text=True, check=True
    )  # fmt: skip
    for words in ("under several names", "differ by a shift", "Coverage of the 95%", "bootstrap t", "40 seeds of each"):
        assert words in done.stdout


@pytest.mark.system
def test_a_row_of_the_table_is_trained_again_to_much_the_same_values():
    """The last bits of a matrix product are another machine's affair, and grow."""
    assert (BENCHMARKS / "seeds.parquet").stat().st_size < 1_000_000
    code = (
        "import numpy as np, pyarrow.parquet as pq, make_seeds as m\n"
        "row = pq.read_table(m.TABLE).to_pylist()[-1]\n"
        "print(np.mean(row['nll']) - np.mean(m.train(row['activation'], row['seed'])['nll']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert abs(float(done.stdout)) < 0.1


def test_statistics_load_numpy_and_scipy_alone():
    code = "import sys, search.statistics; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "optuna", "pyarrow", "vae"} & set(done.stdout.split())
