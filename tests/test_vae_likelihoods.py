"""Bernoulli on logits, against torch.distributions and sums written out."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from vae.config import LikelihoodName
from vae.likelihoods import LIKELIHOODS

BERNOULLI = LIKELIHOODS["bernoulli"]


def test_every_likelihood_name_of_the_config_is_there():
    assert set(LIKELIHOODS) == set(get_args(LikelihoodName))


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_bernoulli_log_prob_matches_torch_distributions(shape):
    logits = torch.randn(shape, dtype=torch.float64) * 3
    x = torch.randint(0, 2, (4, 6)).double()
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(dim=-1)
    torch.testing.assert_close(BERNOULLI.log_prob(logits, x), expected)


def test_bernoulli_log_prob_is_finite_and_exact_at_extreme_logits():
    logits = torch.tensor([[1000.0, -1000.0], [1000.0, -1000.0]], requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    result = BERNOULLI.log_prob(logits, x)
    assert result.tolist() == [0.0, -1000.0]
    result.sum().backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))


def test_log_prob_of_grey_values_is_the_expectation_over_binarised_ones():
    logits, grey = torch.randn(1, 1, dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    one, zero = (BERNOULLI.log_prob(logits, torch.full_like(grey, value)) for value in (1.0, 0.0))
    torch.testing.assert_close(BERNOULLI.log_prob(logits, grey), 0.3 * one + 0.7 * zero)


def test_output_bias_gives_the_training_mean_back_within_the_clip():
    mean = np.array([0.0, 0.2, 0.5, 1.0])
    bias = BERNOULLI.output_bias(mean)
    assert bias.dtype == torch.float32
    np.testing.assert_allclose(BERNOULLI.mean(bias).numpy(), [1e-3, 0.2, 0.5, 1 - 1e-3], rtol=1e-5)


def test_samples_are_binary_with_the_mean_and_follow_the_generator():
    logits = torch.tensor([-1.0, 0.0, 2.0]).expand(20_000, 3)
    draws = [BERNOULLI.sample(logits, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert set(draws[0].unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(draws[0].mean(dim=0), BERNOULLI.mean(logits[0]), atol=0.02)


def test_no_latent_baseline_is_the_mean_of_the_losses_written_out():
    mean, x = np.array([0.0, 0.25, 0.9]), np.array([[0, 1, 1], [1, 0, 1]], dtype=np.float32)
    total = 0.0
    for row in x:
        for p, value in zip(np.clip(mean, 1e-3, 1 - 1e-3), row, strict=True):
            total -= math.log(p if value == 1 else 1 - p)
    assert BERNOULLI.no_latent_nelbo(mean, x) == pytest.approx(total / 2, rel=1e-12)


def test_no_latent_baseline_of_its_own_data_is_their_entropy():
    rng = np.random.default_rng(0)
    x = (rng.random((500, 4)) < [0.1, 0.4, 0.5, 0.8]).astype(np.float32)
    p = x.mean(axis=0, dtype=np.float64)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    assert BERNOULLI.no_latent_nelbo(p, x) == pytest.approx(entropy, rel=1e-12)
