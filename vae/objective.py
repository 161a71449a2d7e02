"""The evidence lower bound: its two terms in nats per example, the KL schedules, and what models are judged by.

`nelbo` is the negative bound, minimised; the value that selects models is at beta = 1 whatever was trained.
`nll` is the importance-weighted estimate of -log p(x): a bound, too, which more samples tighten.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae.config import KlSchedule
from vae.model import VAE, evaluating

# Shapes: B batch, N rows of a split, X input features, Z latent dimensions, K importance samples, S of them at once.

ACTIVE_VARIANCE = 0.01  # Var_x(E[z|x]) beyond which a latent dimension is in use. Burda et al. 2015
_NOISE_STREAM = 1  # apart from what else is drawn with the same seed: the split, the binarisation
_IMPORTANCE_STREAM = 3
CHUNK_ROWS = 1024  # at once through a model whose gradient nobody asks for: bounds memory
_CHUNK_SAMPLES = 1024  # of one row, weighed at once though decoded in parts: spares small operations
# Values of the decoder's widest layer at once. On a CPU they stay in the second-level cache from the matrix product
# to log p(x|z); a GPU wants large kernels.
_CHUNK_VALUES = {"cpu": 3 * 2**16, "cuda": 2**26}


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


@dataclass(frozen=True, eq=False, slots=True)
class ImportanceEstimate:
    """Importance-weighted bounds on log p(x) of N rows, in nats, each (N,) float64. Burda et al. 2015.

    The means below are per example. `nll` falls with num_samples, by half a nat between 500 and 5,000 on MNIST:
    compare models at the same number and seed, row by row.
    """

    log_likelihood: np.ndarray  # log of the mean weight, w = p(x, z) / q(z|x)
    elbo: np.ndarray  # mean of log w over the same samples
    effective_samples: np.ndarray  # (sum w)^2 / sum w^2, in [1, num_samples]; a few: the bound is loose
    num_samples: int

    @property
    def nll(self) -> float:
        return -float(self.log_likelihood.mean())

    @property
    def nll_se(self) -> float:
        """Standard error of `nll` over the rows; NaN for one row."""
        rows = len(self.log_likelihood)
        return float(self.log_likelihood.std(ddof=1)) / math.sqrt(rows) if rows > 1 else math.nan

    @property
    def nelbo(self) -> float:
        return -float(self.elbo.mean())

    @property
    def inference_gap(self) -> float:
        """What q(z|x) costs: the bound's distance from the estimate. Cremer et al. 2018."""
        return self.nelbo - self.nll


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats: (B, Z), (B, Z) -> (B, Z). Kingma & Welling 2014, app. B."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """`kl_per_dimension`, summed: KL(q(z|x) || p(z)) in nats, (B, Z), (B, Z) -> (B,)."""
    return kl_per_dimension(mu, logvar).sum(dim=-1)


def free_bits_kl(mu: Tensor, logvar: Tensor, free_bits: float) -> Tensor:
    """What training pays for the KL: (B, Z), (B, Z) -> () in nats. Kingma et al. 2016, app. C.8.

    A dimension's mean over the batch counts as `free_bits` nats at the least, and has no gradient below.
    """
    return kl_per_dimension(mu, logvar).mean(dim=0).clamp(min=free_bits).sum()


def elbo_terms(model: VAE, x: Tensor, noise: Tensor) -> ElboTerms:
    """x (B, X), noise (B, Z) ~ N(0, I) -> the terms of the bound, with one sample of z an example."""
    outputs, mu, logvar = model(x, noise)
    return ElboTerms(-model.likelihood.log_prob(outputs, x), gaussian_kl(mu, logvar))


def kl_weight(
    step: int,
    warmup_steps: int,
    beta: float,
    schedule: KlSchedule = "linear",
    total_steps: int = 0,
    cycles: int = 1,
) -> float:
    """Weight of the KL term after `step` steps: linear from 0, `beta` from `warmup_steps` on.

    cyclical: so again in each of `cycles` equal parts of `total_steps`, which the warm-up fills if it is
    longer. Fu et al. 2019. After the last step the last part goes on.
    """
    if schedule == "cyclical":
        if step >= total_steps:
            return beta
        # In whole numbers times `cycles`, so that parts of a fraction of a step don't drift.
        step, warmup_steps = step * cycles % total_steps, min(warmup_steps * cycles, total_steps)
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
def evaluate(model: VAE, x: Tensor, noise: Tensor, chunk: int = CHUNK_ROWS) -> Evaluation:
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


@torch.no_grad()
def importance_weighted(
    model: VAE,
    x: Tensor,
    num_samples: int,
    seed: int,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ImportanceEstimate:
    """x (N, X) on the model's device -> bounds on log p(x) with `num_samples` z from q(z|x) for each row.

    `chunk` z are decoded at once: the samples of some rows, or a part of one row's; None: as fits the device.
    Beyond a few (N, Z), memory is that of `chunk` examples in the decoder or a thousand in the encoder, whatever K
    is. Chunks change results by rounding alone, since a row's noise follows from the seed, its index and Z: models
    of one latent size share it, and fewer samples or rows are the first of more. `progress` is told the rows done.
    Raises ValueError for no sample or no row.
    """
    if num_samples < 1 or not len(x):
        raise ValueError(f"importance weighting takes at least one sample of one row, not {num_samples} of {len(x)}")
    if chunk is None:
        values = _CHUNK_VALUES.get(x.device.type, _CHUNK_VALUES["cpu"])
        chunk = max(1, values // max(x.shape[-1], *model.config.hidden_dims, 1))
    num_rows = max(1, chunk // num_samples)
    weighed = []
    with evaluating(model):
        encoded = [model.encode(rows) for rows in x.split(CHUNK_ROWS)]
        mu, logvar = (torch.cat(each) for each in zip(*encoded, strict=True))
        for start in range(0, len(x), num_rows):
            rows = slice(start, min(start + num_rows, len(x)))
            noise = _row_noise(range(len(x))[rows], num_samples, mu.shape[-1], seed, max(chunk, _CHUNK_SAMPLES))
            posterior = mu[rows], logvar[rows]
            weighed.append(weigh(_log_weights(model, x[rows], *posterior, eps.to(mu), chunk) for eps in noise))
            if progress is not None:
                progress(rows.stop)
    log_likelihood, elbo, effective_samples = torch.cat(weighed, dim=1).cpu().numpy()
    return ImportanceEstimate(log_likelihood, elbo, effective_samples, num_samples)


def weigh(log_weights: Iterable[Tensor]) -> Tensor:
    """log w of B rows, (S, B) float64 at a time -> (3, B): log of the mean w, mean of log w, effective samples."""
    count = 0
    # w is summed as a multiple of the greatest so far, which starts as low as a number that is no infinity can.
    log_max = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    total = sum_w = sum_w2 = torch.tensor(0.0, dtype=torch.float64)
    for log_w in log_weights:
        count += len(log_w)
        total = total + log_w.sum(dim=0)
        before, log_max = log_max, torch.maximum(log_max, log_w.amax(dim=0))
        rescale, w = (before - log_max).exp(), (log_w - log_max).exp()
        sum_w = sum_w * rescale + w.sum(dim=0)
        sum_w2 = sum_w2 * rescale.square() + w.square().sum(dim=0)
    return torch.stack((log_max + (sum_w / count).log(), total / count, sum_w.square() / sum_w2))


def _log_weights(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, chunk: int) -> Tensor:
    """x (B, X), mu and logvar (B, Z), eps (S, B, Z) -> log p(x|z) + log p(z) - log q(z|x), (S, B) float64."""
    z = mu + (logvar / 2).exp() * eps
    log_prior_ratio = 0.5 * (logvar.double() + eps.double().square() - z.double().square()).sum(dim=-1)
    log_likelihood = [model.likelihood.log_prob(model.decode(some), x) for some in z.split(max(1, chunk // len(x)))]
    return torch.cat(log_likelihood).double() + log_prior_ratio


def _row_noise(rows: range, num_samples: int, latent_dim: int, seed: int, at_once: int) -> Iterator[Tensor]:
    """(num_samples, B, Z) ~ N(0, 1) for these rows, at most `at_once` samples at a time; each row has its generator."""
    generators = [np.random.default_rng((seed, _IMPORTANCE_STREAM, row)) for row in rows]
    for done in range(0, num_samples, at_once):
        shape = (min(at_once, num_samples - done), latent_dim)
        drawn = [generator.standard_normal(shape, dtype=np.float32) for generator in generators]
        yield torch.from_numpy(np.stack(drawn, axis=1))
