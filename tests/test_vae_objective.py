"""The bound's terms and estimates against references we did not write, the KL schedules, and the validation value."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import vae.objective
from vae.config import ModelConfig
from vae.model import LOGVAR_MAX, LOGVAR_MIN, VAE
from vae.objective import (
    ImportanceEstimate,
    elbo_terms,
    evaluate,
    fixed_noise,
    free_bits_kl,
    gaussian_kl,
    importance_weighted,
    kl_per_dimension,
    kl_weight,
    weigh,
)


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(ModelConfig(input_dim=6, latent_dim=3, hidden_dims=(8,), dropout=0.5))


def test_gaussian_kl_matches_torch_distributions():
    mu, logvar = torch.randn(2, 5, 3, dtype=torch.float64) * 2
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(gaussian_kl(mu, logvar), expected)


def test_gaussian_kl_is_to_the_bit_what_stored_learning_curves_were_trained_with():
    mu, logvar = torch.randn(2, 64, 37)
    mu.requires_grad_()
    kl = gaussian_kl(mu, logvar)
    before = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=-1)
    assert torch.equal(kl, before)
    gradients = [torch.autograd.grad(value.mean(), mu)[0] for value in (kl, before)]
    assert torch.equal(*gradients)


def test_kl_per_dimension_adds_up_to_gaussian_kl():
    mu, logvar = torch.randn(2, 5, 3)
    assert kl_per_dimension(mu, logvar).shape == (5, 3)
    assert torch.equal(kl_per_dimension(mu, logvar).sum(dim=-1), gaussian_kl(mu, logvar))


def test_free_bits_are_a_floor_of_each_dimension_s_mean_over_the_batch():
    mu = torch.tensor([[2.0, 0.5], [0.0, 0.5]])  # KL of the first: 2 and 0, mean 1; of the second 1/8
    assert free_bits_kl(mu, torch.zeros(2, 2), 0.25).item() == 1.25
    assert free_bits_kl(mu, torch.zeros(2, 2), 1.5).item() == 3.0


def test_free_bits_leave_no_gradient_below_the_floor():
    mu = torch.tensor([[2.0, 0.5], [0.0, 0.5]], requires_grad=True)
    free_bits_kl(mu, torch.zeros(2, 2), 0.25).backward()
    assert mu.grad is not None
    assert mu.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_no_free_bits_are_the_mean_kl():
    mu, logvar = torch.randn(2, 64, 16)
    torch.testing.assert_close(free_bits_kl(mu, logvar, 0.0), gaussian_kl(mu, logvar).mean())


def test_gaussian_kl_matches_monte_carlo():
    mu, logvar = torch.tensor([0.7, -1.2]), torch.tensor([-1.0, 0.5])
    q, p = Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)
    z = mu + (logvar / 2).exp() * torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(dim=-1).double()
    error = estimate.std() / len(z) ** 0.5
    assert abs(estimate.mean() - gaussian_kl(mu, logvar)) < 4 * error


def test_the_terms_are_per_example_and_add_up(model):
    model.eval()
    x, noise = torch.randint(0, 2, (5, 6)).float(), torch.randn(5, 3)
    terms = elbo_terms(model, x, noise)
    assert terms.recon.shape == terms.kl.shape == (5,)
    torch.testing.assert_close(terms.nelbo, terms.recon + terms.kl)
    logits, mu, logvar = model(x, noise)
    log_prob = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(dim=-1)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(terms.recon, -log_prob)
    torch.testing.assert_close(terms.kl, kl)


def test_kl_weight_rises_linearly_and_stays():
    assert [kl_weight(step, 4, 2.0) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_kl_weight_without_warm_up_is_beta_from_the_start():
    assert [kl_weight(step, 0, 0.7) for step in range(3)] == [0.7] * 3


def cyclical(steps: int, total: int, cycles: int, warmup: int, beta: float = 1.0) -> list[float]:
    return [kl_weight(step, warmup, beta, "cyclical", total, cycles) for step in range(steps)]


def test_a_cyclical_kl_weight_warms_up_in_every_part_and_ends_warm():
    assert cyclical(10, total=8, cycles=2, warmup=2) == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1, 1]
    assert cyclical(4, total=8, cycles=2, warmup=4, beta=2.0) == [0, 0.5, 1, 1.5]


def test_a_warm_up_longer_than_the_part_fills_it():
    assert cyclical(9, total=8, cycles=2, warmup=100) == [0, 0.25, 0.5, 0.75] * 2 + [1]


def test_parts_of_a_fraction_of_a_step_do_not_drift():
    parts_of_two_and_a_half = [0, 0.5, 1, 0.25, 0.75]
    assert cyclical(10, total=10, cycles=4, warmup=2) == parts_of_two_and_a_half * 2


def test_a_cyclical_kl_weight_without_warm_up_is_beta_throughout():
    assert cyclical(9, total=8, cycles=4, warmup=0, beta=0.7) == [0.7] * 9


def test_one_cycle_is_the_linear_schedule():
    assert cyclical(20, total=15, cycles=1, warmup=6) == [kl_weight(step, 6, 1.0) for step in range(20)]


def test_fixed_noise_of_a_smaller_latent_is_the_first_columns_of_a_larger_one():
    large = fixed_noise(50, 16, seed=3)
    for size in (1, 2, 7, 15):
        assert torch.equal(fixed_noise(50, size, seed=3), large[:, :size])


def test_fixed_noise_is_standard_normal_and_follows_its_seed():
    noise = fixed_noise(20_000, 8, seed=0)
    assert noise.dtype == torch.float32
    assert noise.is_contiguous()
    assert noise.mean().abs() < 0.02
    np.testing.assert_allclose(torch.cov(noise.T), np.eye(8), atol=0.04)
    assert not torch.equal(noise, fixed_noise(20_000, 8, seed=1))


def test_fixed_noise_does_not_repeat_the_stream_of_its_bare_seed():
    bare = np.random.default_rng(0).standard_normal((8, 50), dtype=np.float32).T
    assert not np.array_equal(fixed_noise(50, 8, seed=0).numpy(), bare)


def test_evaluate_is_the_mean_of_the_terms_and_restores_the_mode(model):
    x, noise = torch.randint(0, 2, (25, 6)).float(), fixed_noise(25, 3, seed=0)
    for training in (True, False):
        result = evaluate(model.train(training), x, noise)
        assert model.training is training
    terms = elbo_terms(model.eval(), x, noise)
    assert result.recon == pytest.approx(terms.recon.mean().item(), rel=1e-6)
    assert result.kl == pytest.approx(terms.kl.mean().item(), rel=1e-5)
    assert result.nelbo == result.recon + result.kl


def test_evaluate_does_not_depend_on_the_chunk(model):
    model.double()
    x, noise = torch.randint(0, 2, (103, 6)).double(), fixed_noise(103, 3, seed=0).double()
    whole = evaluate(model, x, noise, chunk=1000)
    for chunk in (1, 7, 103):
        assert evaluate(model, x, noise, chunk=chunk) == pytest.approx(whole, rel=1e-12)


def test_evaluate_does_not_depend_on_the_chunk_in_single_precision_either():
    torch.manual_seed(0)
    model = VAE(ModelConfig(input_dim=784, latent_dim=16))
    x, noise = torch.randint(0, 2, (1000, 784)).float(), fixed_noise(1000, 16, seed=0)
    whole = evaluate(model, x, noise, chunk=1000)
    for chunk in (64, 333):
        assert evaluate(model, x, noise, chunk=chunk) == pytest.approx(whole, rel=1e-8)


def test_evaluate_draws_nothing_at_random(model):
    x, noise = torch.randint(0, 2, (25, 6)).float(), fixed_noise(25, 3, seed=0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert evaluate(model, x, noise) == evaluate(model, x, noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_active_units_are_those_whose_mean_moves_with_x():
    model = VAE(ModelConfig(input_dim=4, latent_dim=4, hidden_dims=()))
    x = torch.eye(4).repeat(25, 1)  # each feature has variance 3/16
    with torch.no_grad():
        model.mu.weight.copy_(torch.diag(torch.tensor([1.0, 0.3, 0.2, 0.0])))  # variances .19, .017, .0075, 0
        model.mu.bias.fill_(100.0)  # a constant mean is not activity
    assert evaluate(model, x, torch.zeros(100, 4)).active_units == 2


# ---- importance weighting


X, Z, SIGMA = 5, 2, 0.6


def linear_vae(wrong: float = 0.0) -> VAE:
    """x = W z + b + noise, of orthogonal columns, so that the posterior is diagonal; q(z|x) is that, or off by `wrong`.

    W's columns are 3 and 1 long.
    """
    model = VAE(ModelConfig(input_dim=X, latent_dim=Z, hidden_dims=(), likelihood="gaussian")).double().eval()
    loadings = np.linalg.qr(np.random.default_rng(1).standard_normal((X, Z)))[0] * [3.0, 1.0]
    weight, bias = torch.from_numpy(loadings), torch.linspace(-2, 3, X, dtype=torch.float64)
    variance = 1 / (1 + weight.square().sum(dim=0) / SIGMA**2)
    inverse = variance[:, None] * weight.T / SIGMA**2
    centre, radius = (LOGVAR_MAX + LOGVAR_MIN) / 2, (LOGVAR_MAX - LOGVAR_MIN) / 2
    logvar = variance.log() + wrong
    with torch.no_grad():
        model.outputs.weight.copy_(weight)
        model.outputs.bias.copy_(bias)
        model.mu.weight.copy_(inverse)
        model.mu.bias.copy_(-inverse @ bias + wrong / 4)
        model.logvar.weight.zero_()
        model.logvar.bias.copy_(centre + radius * torch.atanh((logvar - centre) / radius))
        model.likelihood.fit(np.array([[-SIGMA] * X, [SIGMA] * X]))
    return model


def marginal(model: VAE) -> stats.rv_continuous:
    """p(x) of a linear model, in closed form."""
    weight = model.outputs.weight.detach().double().numpy()
    variance = (2 * model.likelihood.log_sigma).exp().item()
    return stats.multivariate_normal(model.outputs.bias.detach().numpy(), weight @ weight.T + variance * np.eye(X))


def rows_of(model: VAE, n: int) -> Tensor:
    return torch.from_numpy(marginal(model).rvs(n, random_state=2))


def test_a_linear_model_with_its_exact_posterior_has_its_exact_likelihood_from_a_single_sample():
    model = linear_vae()
    x = rows_of(model, 40)
    for num_samples in (1, 7):
        estimate = importance_weighted(model, x, num_samples, seed=0)
        np.testing.assert_allclose(estimate.log_likelihood, marginal(model).logpdf(x), rtol=1e-10)
        np.testing.assert_allclose(estimate.elbo, marginal(model).logpdf(x), rtol=1e-10)
        np.testing.assert_allclose(estimate.effective_samples, num_samples)
    assert estimate.inference_gap == pytest.approx(0, abs=1e-10)


def test_a_linear_model_with_a_wrong_posterior_comes_to_its_exact_likelihood_with_many_samples():
    model = linear_vae(wrong=0.8)
    x = rows_of(model, 200)
    estimate = importance_weighted(model, x, 4000, seed=0)
    assert estimate.nll == pytest.approx(-marginal(model).logpdf(x).mean(), abs=0.02)
    assert estimate.inference_gap > 0.3
    assert (estimate.effective_samples < 4000).all()


def test_the_bound_rises_with_the_number_of_samples_in_expectation():
    model = linear_vae(wrong=2.5)
    x = rows_of(model, 500)
    bounds = [importance_weighted(model, x, num_samples, seed=0).log_likelihood for num_samples in (1, 4, 16, 64)]
    for looser, tighter in pairwise([*bounds, marginal(model).logpdf(x)]):
        gain = tighter - looser
        assert gain.mean() > 3 * stats.sem(gain)


def test_a_trained_linear_vae_reaches_the_exact_likelihood_of_ppca():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, Z)) @ rng.standard_normal((Z, X)) * 1.5 + 0.4 * rng.standard_normal((1000, X)) + 1
    torch.manual_seed(0)
    config = ModelConfig(input_dim=X, latent_dim=Z, hidden_dims=(), activation="linear", likelihood="gaussian")
    model = VAE(config, rows)
    x = torch.from_numpy(rows).float()
    steps = 1500
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = elbo_terms(model, x, torch.randn(len(x), Z)).nelbo.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    exact = PCA(n_components=Z).fit(rows).score(rows)
    estimate = importance_weighted(model, x, 200, seed=0)
    assert -estimate.nll == pytest.approx(exact, abs=0.05)
    np.testing.assert_allclose(estimate.log_likelihood, marginal(model).logpdf(rows), atol=0.05)


def split_in(parts: int, log_w: Tensor) -> Tensor:
    return weigh(log_w.chunk(parts))


@pytest.mark.parametrize("parts", [1, 2, 9, 100])
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_weights_are_summed_as_scipy_does_and_never_overflow(parts, offset):
    log_w = offset + 30 * torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_mean, mean_log, effective = split_in(parts, log_w)
    log_sum = special.logsumexp(log_w, axis=0)
    np.testing.assert_allclose(log_mean, log_sum - math.log(100), rtol=1e-13)
    np.testing.assert_allclose(mean_log, log_w.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(effective, np.exp(2 * log_sum - special.logsumexp(2 * log_w, axis=0)), rtol=1e-6)


def test_weights_may_be_zero():
    low = -torch.inf
    log_w = torch.tensor([[low, low, 0.0], [0.0, low, low], [low, low, 1.0]], dtype=torch.float64)
    for parts in (1, 3):
        log_mean, mean_log, _ = split_in(parts, log_w)
        np.testing.assert_allclose(log_mean, special.logsumexp(log_w, axis=0) - math.log(3))
        assert mean_log.tolist() == [low] * 3


def test_a_weight_that_is_no_number_is_not_lost():
    log_w = torch.zeros(6, 2, dtype=torch.float64)
    log_w[2, 1] = torch.nan
    for parts in (1, 6):
        assert split_in(parts, log_w).isnan().any(dim=0).tolist() == [False, True]


def test_chunks_change_nothing(model, monkeypatch):
    monkeypatch.setattr(vae.objective, "_CHUNK_SAMPLES", 4)
    model.double()
    x = torch.randint(0, 2, (11, 6)).double()
    whole = importance_weighted(model, x, 23, seed=3, chunk=10_000)
    for chunk in (1, 5, 22, 23, 50, None):
        parts = importance_weighted(model, x, 23, seed=3, chunk=chunk)
        for name in ("log_likelihood", "elbo", "effective_samples"):
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)


def test_fewer_rows_are_the_first_of_more_and_another_seed_is_other_noise(model):
    x = torch.randint(0, 2, (9, 6)).float()
    whole = importance_weighted(model, x, 20, seed=0)
    assert whole.log_likelihood.dtype == np.float64
    np.testing.assert_allclose(
        importance_weighted(model, x[:4], 20, seed=0).log_likelihood, whole.log_likelihood[:4], rtol=1e-6
    )
    assert not np.allclose(importance_weighted(model, x, 20, seed=1).elbo, whole.elbo, rtol=1e-4)


def test_models_of_one_latent_size_share_the_noise_and_rows_do_not(monkeypatch):
    drawn = []
    for hidden in ((8,), (4, 4)):
        torch.manual_seed(hidden[0])
        model = VAE(ModelConfig(input_dim=6, latent_dim=3, hidden_dims=hidden)).double()
        x = torch.randint(0, 2, (2, 6)).double()
        latents: list[Tensor] = []
        decode = model.decode
        monkeypatch.setattr(model, "decode", lambda z, decode=decode, into=latents: into.append(z) or decode(z))
        importance_weighted(model, x, 4000, seed=0, chunk=300)
        mu, logvar = model.encode(x)
        z = torch.cat(latents).reshape(2, 4000, 3).transpose(0, 1)  # row after row
        drawn.append((z - mu) / (logvar / 2).exp())
    torch.testing.assert_close(*drawn)
    noise = drawn[0].detach()
    np.testing.assert_allclose(torch.cov(noise.flatten(1).T), np.eye(6), atol=0.1)
    assert noise.mean().abs() < 0.03


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization": "batch", "dropout": 0.5},
        {"body": "conv", "image_shape": (4, 4), "channels": (4,), "hidden_dims": (8,), "normalization": "group"},
        {"likelihood": "continuous_bernoulli"},
        {"likelihood": "gaussian", "gaussian_scale": "per_dimension"},
        {"likelihood": "negative_binomial"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_kind_of_model_is_estimated_in_evaluation_mode(settings):
    torch.manual_seed(0)
    train = np.random.default_rng(0).integers(0, 2, (50, 16)).astype(np.float32)
    model = VAE(ModelConfig(**{"input_dim": 16, "latent_dim": 3, "hidden_dims": (8,)} | settings), train).train()
    before = torch.get_rng_state()
    first, second = (importance_weighted(model, torch.from_numpy(train[:6]), 30, seed=0) for _ in range(2))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first.log_likelihood, second.log_likelihood)
    assert first.nll < first.nelbo < math.inf
    assert ((first.effective_samples >= 1) & (first.effective_samples <= 30.001)).all()


def test_an_estimate_is_summed_up_by_means_and_the_standard_error_over_rows():
    values = np.array([-3.0, -5.0, -10.0])
    estimate = ImportanceEstimate(values, values - [1, 2, 0], np.ones(3), 10)
    assert (estimate.nll, estimate.nelbo, estimate.inference_gap) == (6.0, 7.0, 1.0)
    assert estimate.nll_se == pytest.approx(stats.sem(values))
    assert math.isnan(ImportanceEstimate(values[:1], values[:1], np.ones(1), 10).nll_se)


def test_progress_is_told_the_rows_done(model):
    told: list[int] = []
    importance_weighted(model, torch.zeros(7, 6), 10, seed=0, chunk=30, progress=told.append)
    assert told == [3, 6, 7]


@pytest.mark.parametrize(("rows", "samples"), [(3, 0), (0, 3)])
def test_nothing_to_estimate_from_is_refused(rows, samples, model):
    with pytest.raises(ValueError, match="at least one"):
        importance_weighted(model, torch.zeros(rows, 6), samples, seed=0)
