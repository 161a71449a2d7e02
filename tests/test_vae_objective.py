"""The bound's terms against references we did not write, the KL schedule, and the validation value."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae.config import ModelConfig
from vae.model import VAE
from vae.objective import elbo_terms, evaluate, fixed_noise, gaussian_kl, kl_weight


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(ModelConfig(input_dim=6, latent_dim=3, hidden_dims=(8,), dropout=0.5))


def test_gaussian_kl_matches_torch_distributions():
    mu, logvar = torch.randn(2, 5, 3, dtype=torch.float64) * 2
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(gaussian_kl(mu, logvar), expected)


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
