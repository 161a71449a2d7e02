"""Every likelihood against torch.distributions, scipy and sums written out."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor
from torch.nn import functional as F

from vae.config import LikelihoodName, ModelConfig
from vae.likelihoods import LOG_RATE_MAX, LOG_SIGMA_MIN, Likelihood, make_likelihood

NAMES: tuple[LikelihoodName, ...] = get_args(LikelihoodName)
COUNTS = ("poisson", "negative_binomial")
X = 6


def make(name: str, input_dim: int = X, **settings: str) -> Likelihood:
    return make_likelihood(ModelConfig(input_dim=input_dim, likelihood=name, **settings))  # type: ignore[arg-type]


def make_varied(name: str, **settings: str) -> Likelihood:
    """In float64, with a scale of its own for each feature."""
    likelihood = make(name, **settings).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if name in COUNTS:
            likelihood.mean_total.fill_(7.0)
    return likelihood


def rows_of(name: str, n: int = 4, input_dim: int = X, seed: int = 0) -> np.ndarray:
    """(n, input_dim) float32 that the likelihood speaks of; features differ in mean and spread."""
    rng = np.random.default_rng(seed)
    level = np.linspace(0.2, 0.9, input_dim)
    if name == "bernoulli":
        rows = rng.random((n, input_dim)) < level
    elif name == "continuous_bernoulli":
        rows = rng.beta(3 * level, 1.5, (n, input_dim))
    elif name == "gaussian":
        rows = 5 * level + level * rng.standard_normal((n, input_dim))
    else:
        sizes = rng.lognormal(0, 0.4, (n, 1))
        gamma = rng.gamma(2, 0.5, (n, input_dim)) if name == "negative_binomial" else 1
        rows = rng.poisson(8 * level * sizes * gamma)
    return rows.astype(np.float32)


def reference(name: str, likelihood: Likelihood, outputs: Tensor, x: Tensor) -> Tensor:
    """log_prob by torch.distributions, not yet summed."""
    distributions = torch.distributions
    if name == "bernoulli":
        return distributions.Bernoulli(logits=outputs).log_prob(x)
    if name == "continuous_bernoulli":
        return distributions.ContinuousBernoulli(logits=outputs, lims=(0.4999, 0.5001)).log_prob(x)
    if name == "gaussian":
        sigma = (LOG_SIGMA_MIN + F.softplus(likelihood.raw_log_sigma - LOG_SIGMA_MIN)).exp()
        return distributions.Normal(outputs, sigma).log_prob(x)
    rate = outputs.exp() * x.sum(-1, keepdim=True) / likelihood.mean_total
    if name == "poisson":
        return distributions.Poisson(rate).log_prob(x)
    theta = likelihood.log_theta.exp()
    values = stats.nbinom.logpmf(x.numpy(), theta.detach().numpy(), (theta / (theta + rate)).detach().numpy())
    return torch.from_numpy(values)


# ---- log p


@pytest.mark.parametrize("shape", [(4, X), (3, 4, X)])
@pytest.mark.parametrize("scale", ["shared", "per_dimension"])
@pytest.mark.parametrize("name", NAMES)
def test_log_prob_matches_an_independent_one(name, scale, shape):
    likelihood = make_varied(name, gaussian_scale=scale)
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    x = torch.from_numpy(rows_of(name)).double()
    result = likelihood.log_prob(outputs, x)
    assert result.shape == shape[:-1]
    expected = reference(name, likelihood, outputs, x).sum(dim=-1)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_in_float32_is_that_of_float64_to_its_last_digits(name):
    exact = make_varied(name)
    single = copy.deepcopy(exact).float()
    outputs = torch.randn((4, X), generator=torch.Generator().manual_seed(1))
    x = torch.from_numpy(rows_of(name))
    result = single.log_prob(outputs, x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact.log_prob(outputs.double(), x.double()), rtol=2e-6, atol=2e-6)


def test_large_counts_lose_nothing_in_float32():
    counts = np.full((1, 2), 2.0**20)
    for name in COUNTS:
        likelihood = make(name, 2)
        outputs = torch.from_numpy(likelihood.start(np.tile(counts, (3, 1))).numpy()).expand(1, 2)
        with torch.no_grad():
            result = likelihood.log_prob(outputs, torch.from_numpy(counts).float())
        rate = np.exp(outputs.double().numpy())
        if name == "poisson":
            expected = stats.poisson.logpmf(counts, rate)
        else:
            theta = likelihood.log_theta.detach().double().exp().numpy()
            expected = stats.nbinom.logpmf(counts, theta, theta / (theta + rate))
        assert result.item() == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("output", [-300.0, -4.0, -1e-3, 0.0, 1e-9, 0.5, 30.0])
@pytest.mark.parametrize("name", ["continuous_bernoulli", "gaussian"])
def test_a_density_integrates_to_one(name, output):
    likelihood = make_varied(name)
    outputs = torch.full((1, 1), output, dtype=torch.float64)

    def density(value: float) -> float:
        with torch.no_grad():
            log_sum = likelihood.log_prob(outputs, torch.full((1, 1), value, dtype=torch.float64))
            return log_sum.exp().item()

    if name == "gaussian":
        sigma = likelihood.log_sigma.exp().item()
        low, high, peak = output - 12 * sigma, output + 12 * sigma, output
    else:
        low, high = 0.0, 1.0
        peak = min(1.0, 5 / abs(output)) if output else 0.5
        peak = 1 - peak if output > 0 else peak
    total, _ = integrate.quad(density, low, high, points=[peak], limit=200, epsabs=1e-12)
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("output", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("name", COUNTS)
def test_probabilities_of_counts_sum_to_one(name, output):
    likelihood = make(name, 1).double()
    counts = torch.arange(4000, dtype=torch.float64)
    log_size = torch.log(counts.clamp(min=1))[:, None]  # so that every row has the same rate
    with torch.no_grad():
        log_prob = likelihood.log_prob(output - log_size, counts[:, None])
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_log_prob_of_grey_values_is_the_expectation_over_binarised_ones():
    bernoulli = make("bernoulli", 1)
    logits, grey = torch.randn(1, 1, dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    one, zero = (bernoulli.log_prob(logits, torch.full_like(grey, value)) for value in (1.0, 0.0))
    torch.testing.assert_close(bernoulli.log_prob(logits, grey), 0.3 * one + 0.7 * zero)


# ---- extremes


def test_bernoulli_log_prob_is_finite_and_exact_at_extreme_logits():
    logits = torch.tensor([[1000.0, -1000.0], [1000.0, -1000.0]], requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    result = make("bernoulli", 2).log_prob(logits, x)
    assert result.tolist() == [0.0, -1000.0]
    result.sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_finite_at_extreme_outputs_in_float32(name):
    likelihood = make(name)
    likelihood.start(rows_of(name, 50))
    edges = [0.0, 1e-30, 1e-7, 0.1, 1.0, 50.0, 89.0, 1e3, 1e4]
    outputs = torch.tensor([[sign * edge] * X for edge in edges for sign in (1, -1)], requires_grad=True)
    for x in torch.from_numpy(rows_of(name)):
        result = likelihood.log_prob(outputs, x.expand_as(outputs))
        gradients = torch.autograd.grad(result.sum(), [outputs, *likelihood.parameters()])
        assert all(torch.isfinite(values).all() for values in (result, *gradients))
    assert torch.isfinite(likelihood.mean(outputs, x)).all()


def test_continuous_bernoulli_is_smooth_where_its_two_formulas_meet():
    likelihood = make("continuous_bernoulli", 1)
    around = 0.5 + np.linspace(-1e-6, 1e-6, 21)
    for logits in (around, -around, np.linspace(-1e-8, 1e-8, 21)):
        outputs = torch.tensor(logits[:, None], requires_grad=True)
        log_prob = likelihood.log_prob(outputs, torch.full_like(outputs, 0.3))
        (slope,) = torch.autograd.grad(log_prob.sum(), outputs)
        # d/dlogit log p = x - mean, which `mean` has by formulas of its own
        torch.testing.assert_close(slope, 0.3 - likelihood.mean(outputs), rtol=0, atol=1e-12)
        assert np.abs(np.diff(slope.detach().numpy()[:, 0])).max() < 1e-7


def test_continuous_bernoulli_mean_and_constant_are_those_of_exact_arithmetic():
    import mpmath

    likelihood = make("continuous_bernoulli", 1)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        for value in (1e-20, 1e-5, 0.01, 0.3, 0.499, 0.501, 3.0, 40.0, 900.0):
            for sign in (1, -1):
                outputs = torch.full((1, 1), sign * value, dtype=dtype)
                with mpmath.workdps(60):
                    logit = mpmath.mpf(outputs.item())
                    mean = 1 / (1 - mpmath.exp(-logit)) - 1 / logit
                    log_p = -mpmath.log(mpmath.expm1(logit) / logit)  # at x = 0
                assert likelihood.mean(outputs).item() == pytest.approx(float(mean), rel=tolerance, abs=tolerance)
                at_0 = likelihood.log_prob(outputs, torch.zeros_like(outputs)).item()
                assert at_0 == pytest.approx(float(log_p), rel=tolerance, abs=tolerance)


def test_log_sigma_is_bounded_below_and_can_come_back():
    gaussian = make("gaussian")
    with torch.no_grad():
        gaussian.raw_log_sigma.fill_(-20.0)
    assert gaussian.log_sigma.item() >= LOG_SIGMA_MIN
    optimizer = torch.optim.Adam(gaussian.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        (-gaussian.log_prob(torch.zeros(1, X), torch.ones(1, X)).sum()).backward()
        optimizer.step()
    assert gaussian.log_sigma.item() > -1


def test_rates_of_counts_stop_short_of_overflow_and_keep_a_gradient():
    outputs = torch.tensor([[LOG_RATE_MAX + 3]], requires_grad=True)
    for name in COUNTS:
        likelihood = make(name, 1)
        log_mean = likelihood.mean(outputs).log()
        assert LOG_RATE_MAX - 1 < log_mean.item() < LOG_RATE_MAX
        (gradient,) = torch.autograd.grad(likelihood.log_prob(outputs, torch.ones(1, 1)).sum(), outputs)
        assert gradient.item() < 0


# ---- means and draws


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean_the_spread_and_the_generator_s_order(name):
    likelihood = make_varied(name).float()
    outputs = torch.tensor([-2.0, -0.1, 0.0, 1e-7, 0.1, 2.0])
    expanded = outputs.expand(40_000, X)
    x = torch.from_numpy(rows_of(name, 1)) if name in COUNTS else None
    draws, again = (likelihood.sample(expanded, torch.Generator().manual_seed(1), x) for _ in range(2))
    assert torch.equal(draws, again)
    assert draws.dtype == torch.float32
    mean = likelihood.mean(outputs[None], x)[0]
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert (torch.abs(draws.mean(dim=0) - mean) < 5 * error + 1e-6).all()
    if name == "bernoulli":
        assert set(draws.unique().tolist()) == {0.0, 1.0}
    if name in COUNTS:
        assert torch.equal(draws, draws.round())
        assert (draws >= 0).all()
        extra = 0 if name == "poisson" else mean.square() / likelihood.log_theta.exp()
        torch.testing.assert_close(draws.var(dim=0), mean + extra, rtol=0.15, atol=0.02)


def test_continuous_bernoulli_samples_follow_its_distribution_function():
    likelihood = make("continuous_bernoulli", 1)
    for logit in (-900.0, -3.0, 0.0, 1e-6, 0.2, 12.0, 900.0):
        draws = likelihood.sample(torch.full((5000, 1), logit), torch.Generator().manual_seed(0))[:, 0].double()
        assert 0 <= draws.min() <= draws.max() <= 1

        def cdf(values: np.ndarray, logit: float = logit) -> np.ndarray:
            if logit == 0:
                return values
            return 1 - np.expm1(-logit * (1 - values)) / np.expm1(-logit) if logit > 0 else (
                np.expm1(logit * values) / np.expm1(logit)
            )  # fmt: skip

        assert stats.kstest(draws.numpy(), cdf).pvalue > 1e-4


def test_size_factors_scale_the_means_of_counts_and_leave_the_encoder_the_same_input():
    for name in COUNTS:
        likelihood = make(name, 3)
        train = np.array([[1, 2, 3], [3, 6, 9]], dtype=np.float32)
        likelihood.start(train)
        assert likelihood.mean_total.item() == 12
        x, outputs = torch.from_numpy(train), torch.zeros(2, 3)
        np.testing.assert_allclose(likelihood.mean(outputs, x), [[0.5] * 3, [1.5] * 3], rtol=1e-6)
        np.testing.assert_allclose(likelihood.mean(outputs), np.ones((2, 3)), rtol=1e-6)
        np.testing.assert_allclose(likelihood.encoder_input(x)[0], np.log1p([2, 4, 6]), rtol=1e-6)
        np.testing.assert_allclose(likelihood.encoder_input(x[None])[0, 1], likelihood.encoder_input(x)[0])


def test_a_row_without_counts_is_as_one_with_a_single_one():
    for name in COUNTS:
        likelihood = make(name, 3)
        likelihood.start(np.array([[2, 0, 0], [0, 0, 4]], dtype=np.float32))
        empty = torch.zeros(1, 3)
        assert torch.equal(likelihood.encoder_input(empty), empty)
        np.testing.assert_allclose(likelihood.mean(torch.zeros(1, 3), empty), np.full((1, 3), 1 / 3), rtol=1e-6)
        assert torch.isfinite(likelihood.log_prob(torch.zeros(1, 3), empty)).all()
        nothing_at_all = np.zeros((3, 3), dtype=np.float32)
        assert math.isfinite(make(name, 3).no_latent_nelbo(nothing_at_all, nothing_at_all))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COUNTS])
def test_other_families_give_the_encoder_what_they_get(name):
    x = torch.from_numpy(rows_of(name))
    assert make(name).encoder_input(x) is x


# ---- the start


@pytest.mark.parametrize("name", NAMES)
def test_the_model_starts_at_the_training_means(name):
    likelihood, train = make(name), rows_of(name, 5000)
    bias = likelihood.start(train)
    assert bias.dtype == torch.float32
    np.testing.assert_allclose(likelihood.mean(bias[None]).numpy()[0], train.mean(axis=0), rtol=2e-5)


def test_means_at_the_ends_are_clipped():
    train = np.array([[0.0, 0.0, 1.0], [0.0, 0.4, 1.0]], dtype=np.float32)
    for name, least in (("bernoulli", 1e-3), ("continuous_bernoulli", 1e-2)):
        likelihood = make(name, 3)
        mean = likelihood.mean(likelihood.start(train))
        np.testing.assert_allclose(mean, [least, 0.2, 1 - least], rtol=1e-5)


def test_a_gaussian_starts_at_the_spread_of_the_data():
    train = np.random.default_rng(0).normal([0, 5, -3], [0.1, 1, 20], (9000, 3)).astype(np.float32)
    train[:, 0] = 7
    variance = train.astype(np.float64).var(axis=0)
    shared, single = make("gaussian", 3), make("gaussian", 3, gaussian_scale="per_dimension")
    for likelihood in (shared, single):
        likelihood.start(train)
    assert shared.log_sigma.item() == pytest.approx(np.log(variance.mean()) / 2, rel=1e-5)
    np.testing.assert_allclose(single.log_sigma.detach()[1:], np.log(variance[1:]) / 2, rtol=0, atol=1e-6)
    assert LOG_SIGMA_MIN < single.log_sigma[0].item() < LOG_SIGMA_MIN + 0.2


def test_negative_binomial_starts_near_the_theta_of_the_data():
    rng = np.random.default_rng(0)
    theta, mean, sizes = np.array([0.3, 1, 5, 30]), np.array([2, 10, 4, 50]), rng.lognormal(0, 0.5, (20_000, 1))
    filler = rng.poisson(100 * sizes, (20_000, 20))  # makes totals tell the sizes
    counts = rng.poisson(sizes * mean * rng.gamma(theta, 1 / theta, (20_000, 4)))
    train = np.concatenate((counts, filler), axis=1).astype(np.float32)
    likelihood = make("negative_binomial", 24)
    likelihood.start(train)
    np.testing.assert_allclose(likelihood.log_theta.detach()[:4].exp(), theta, rtol=0.2)
    assert (likelihood.log_theta[4:] > math.log(100)).all()
    likelihood.double().fit(train)
    np.testing.assert_allclose(likelihood.log_theta.detach()[:4].exp(), theta, rtol=0.2)


# ---- without a latent


def test_no_latent_baseline_is_the_mean_of_the_losses_written_out():
    train = np.tile([[0.0, 0.25, 0.9]], (4, 1)).astype(np.float32)
    mean, x = train.mean(axis=0, dtype=np.float64), np.array([[0, 1, 1], [1, 0, 1]], dtype=np.float32)
    total = 0.0
    for row in x:
        for p, value in zip(np.clip(mean, 1e-3, 1 - 1e-3), row, strict=True):
            total -= math.log(p if value == 1 else 1 - p)
    assert make("bernoulli", 3).no_latent_nelbo(train, x) == pytest.approx(total / 2, rel=1e-12)


def test_no_latent_baseline_of_its_own_data_is_their_entropy():
    rng = np.random.default_rng(0)
    x = (rng.random((500, 4)) < [0.1, 0.4, 0.5, 0.8]).astype(np.float32)
    p = x.mean(axis=0, dtype=np.float64)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    assert make("bernoulli", 4).no_latent_nelbo(x, x) == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize("scale", ["shared", "per_dimension"])
def test_no_latent_gaussian_is_scipy_s(scale):
    train, x = rows_of("gaussian", 5000), rows_of("gaussian", 300, seed=1)
    sigma = train.std(axis=0, dtype=np.float64)
    if scale == "shared":
        sigma = np.sqrt(np.mean(sigma**2))
    expected = -stats.norm.logpdf(x, train.mean(axis=0, dtype=np.float64), sigma).sum(axis=1).mean()
    result = make("gaussian", gaussian_scale=scale).no_latent_nelbo(train, x)
    assert result == pytest.approx(expected, rel=1e-9)


def test_no_latent_poisson_is_scipy_s():
    train, x = rows_of("poisson", 500), rows_of("poisson", 300, seed=1)
    sizes = x.sum(axis=1, keepdims=True) / train.sum(axis=1).mean()
    expected = -stats.poisson.logpmf(x, sizes * train.mean(axis=0, dtype=np.float64)).sum(axis=1).mean()
    assert make("poisson").no_latent_nelbo(train, x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["continuous_bernoulli", "negative_binomial"])
def test_no_latent_fit_is_the_best_that_direct_optimisation_finds(name):
    train = rows_of(name, 300)
    result = make(name).no_latent_nelbo(train, train)
    likelihood, x = make(name).double(), torch.from_numpy(train).double()
    likelihood.start(train)
    sizes = (x.sum(dim=1) / x.sum(dim=1).mean()).numpy()
    best = 0.0
    for i in range(X):

        def loss(point: np.ndarray, i: int = i) -> float:
            if name == "continuous_bernoulli":
                values = torch.distributions.ContinuousBernoulli(logits=torch.tensor(point[0])).log_prob(x[:, i])
                return -values.mean().item()
            rate, theta = sizes * np.exp(point[0]), np.exp(point[1])
            return -stats.nbinom.logpmf(train[:, i], theta, theta / (theta + rate)).mean()

        start = np.zeros(1 if name == "continuous_bernoulli" else 2)
        best += optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}).fun
    assert result == pytest.approx(best, abs=2e-5)


def test_no_latent_values_stay_finite_for_features_that_training_does_not_have():
    for name in NAMES:
        train, x = rows_of(name, 40), rows_of(name, 40, seed=1)
        train[:, 0] = 0
        assert math.isfinite(make(name).no_latent_nelbo(train, x))


@pytest.mark.parametrize("name", NAMES)
def test_the_baseline_changes_no_parameter_and_reads_only(name):
    likelihood, train = make(name), rows_of(name, 100)
    train.flags.writeable = False
    before = copy.deepcopy(likelihood.state_dict())
    likelihood.no_latent_nelbo(train, train)
    assert all(torch.equal(before[key], value) for key, value in likelihood.state_dict().items())
    likelihood.start(train)


@pytest.mark.parametrize("name", NAMES)
def test_a_likelihood_can_be_built_without_memory_and_its_parameters_do_not_decay(name):
    with torch.device("meta"):
        likelihood = make(name, gaussian_scale="per_dimension")
    assert all(p.is_meta and p.ndim == 1 for p in likelihood.parameters())
    assert {p.numel() for p in likelihood.parameters()} <= {X}
