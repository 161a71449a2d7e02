"""The evidence lower bound: its two terms in nats per example, the KL schedule, and the validation value.

`nelbo` is the negative bound, minimised; the value that selects models is at beta = 1 whatever was trained.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae.model import VAE, evaluating

# Shapes: B batch, N rows of a split, X input features, Z latent dimensions.

ACTIVE_VARIANCE = 0.01  # Var_x(E[z|x]) beyond which a latent dimension is in use. Burda et al. 2015
_NOISE_STREAM = 1  # apart from what else is drawn with the same seed: the split, the binarisation
_CHUNK_ROWS = 1024


class ElboTerms(NamedTuple):
    """nelbo = recon + kl, each (B,) in nats."""

    recon: Tensor  # -log p(x|z) at one z from q(z|x)
    kl: Tensor  # KL(q(z|x) || p(z)), the rate

    @property
    def nelbo(self) -> Tensor:
        return self.recon + self.kl


class Evaluation(NamedTuple):
    """Means over a split, in nats per example, at beta = 1."""

    nelbo: float
    recon: float
    kl: float
    active_units: int  # latent dimensions with Var_x(E[z|x]) > ACTIVE_VARIANCE


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats: (B, Z), (B, Z) -> (B,). Kingma & Welling 2014, app. B."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=-1)


def elbo_terms(model: VAE, x: Tensor, noise: Tensor) -> ElboTerms:
    """x (B, X), noise (B, Z) ~ N(0, I) -> the terms of the bound, with one sample of z an example."""
    outputs, mu, logvar = model(x, noise)
    return ElboTerms(-model.likelihood.log_prob(outputs, x), gaussian_kl(mu, logvar))


def kl_weight(step: int, warmup_steps: int, beta: float) -> float:
    """Weight of the KL term after `step` steps: linear from 0, `beta` from `warmup_steps` on."""
    return beta if step >= warmup_steps else beta * step / warmup_steps


def fixed_noise(rows: int, latent_dim: int, seed: int) -> Tensor:
    """(rows, latent_dim) ~ N(0, 1) that depends on the arguments alone.

    A smaller latent_dim gets the first columns of a larger one's noise, so models of different latent sizes
    are compared with what noise they can share.
    """
    rng = np.random.default_rng((seed, _NOISE_STREAM))
    columns = rng.standard_normal((latent_dim, rows), dtype=np.float32)
    return torch.from_numpy(columns.T.copy())


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, noise: Tensor, chunk: int = _CHUNK_ROWS) -> Evaluation:
    """x (N, X), noise (N, Z) -> means over the N rows, `chunk` rows at a time; draws nothing at random."""
    sums = x.new_zeros(2, dtype=torch.float64)  # recon, kl
    moments = x.new_zeros((2, noise.shape[-1]), dtype=torch.float64)  # of E[z|x]: sum, sum of squares
    with evaluating(model):
        for rows, eps in zip(x.split(chunk), noise.split(chunk), strict=True):
            outputs, mu, logvar = model(rows, eps)
            recon = -model.likelihood.log_prob(outputs, rows)
            mu = mu.double()
            sums += torch.stack((recon.double().sum(), gaussian_kl(mu, logvar.double()).sum()))
            moments += torch.stack((mu.sum(dim=0), mu.square().sum(dim=0)))
    mean, square = moments / len(x)
    active = (square - mean.square() > ACTIVE_VARIANCE).sum()
    recon_mean, kl_mean = (sums / len(x)).tolist()
    return Evaluation(recon_mean + kl_mean, recon_mean, kl_mean, int(active))
