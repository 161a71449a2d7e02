"""Observation models: the decoder's last layer is linear, and each likelihood says what its outputs mean.

They are modules, since some learn a scale beside the outputs. Such parameters are 1-D: the trainer never decays them.
"""

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import LikelihoodName, ModelConfig

# Shapes: B batch, N rows of a split, X input features, K importance samples.

LOG_SIGMA_MIN = -6.0  # of a Gaussian: below it the fit of a few constant features outweighs all others
LOG_RATE_MAX = 30.0  # of counts, at size factor 1: exp of it and its gradient are far from overflow in float32

_START_ABOVE_MIN = 0.1  # a log sigma starts no nearer to its bound, where its gradient would be gone
_LOG_THETA_START = (-6.0, 9.0)  # from nearly all zeros to a Poisson distribution, as far as data can tell
_BLOCK_ROWS = 4096  # rows worked on at once in float64: bounds memory
_FIT_ROWS = 4096  # enough for two numbers a feature; a split is in random order, so that any rows would do
_HALF_LOG_2PI = math.log(2 * math.pi) / 2


class Likelihood(nn.Module):
    """p(x|z) given the decoder's outputs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def encoder_input(self, x: Tensor) -> Tensor:
        """x (..., X) as in the Dataset -> what the encoder reads, of the same shape."""
        return x

    def start(self, train: np.ndarray) -> Tensor:
        """train (N, X) -> (X,) outputs at which the model has its means; sets the scale beside them, too."""
        return self.fit(train).float()

    def fit(self, train: np.ndarray) -> Tensor:
        """train (N, X) -> (X,) float64 outputs of the family's best fit without a latent; sets its scale."""
        raise NotImplementedError

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """(..., B, X), (B, X) -> (..., B), summed over features, in nats."""
        raise NotImplementedError

    def mean(self, outputs: Tensor, x: Tensor | None = None) -> Tensor:
        """E[x|z], of the shape of `outputs`; x (B, X) gives counts their size factors, which are 1 without it."""
        raise NotImplementedError

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        """A draw from p(x|z), of the shape of `outputs`; x as in `mean`."""
        raise NotImplementedError

    @torch.no_grad()
    def no_latent_nelbo(self, train: np.ndarray, x: np.ndarray) -> float:
        """x (N, X) -> its mean -log p, in nats, under the fit to `train` without a latent: what collapse comes to."""
        fitted = copy.deepcopy(self).cpu().double()
        outputs = fitted.fit(train)
        total = 0.0
        for block in _blocks(x):
            rows = torch.from_numpy(block)
            total -= float(fitted.log_prob(outputs.expand_as(rows), rows).sum())
        return total / len(x)


class Bernoulli(Likelihood):
    """Independent Bernoulli variables; the outputs are logits.

    x between 0 and 1 is taken as a probability: log_prob is then its expectation over binarised x.
    """

    # Features that are constant in the training split would put the logit at infinity. Burda et al. 2015.
    min_mean = 1e-3

    def fit(self, train: np.ndarray) -> Tensor:
        return torch.from_numpy(self._clipped_mean(train)).logit()

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(outputs, x.expand_as(outputs), reduction="none")
        return -losses.sum(dim=-1)

    def mean(self, outputs: Tensor, x: Tensor | None = None) -> Tensor:
        return outputs.sigmoid()

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def no_latent_nelbo(self, train: np.ndarray, x: np.ndarray) -> float:
        p = self._clipped_mean(train)
        mean = x.mean(axis=0, dtype=np.float64)  # the log-likelihood is linear in x
        return float(-(mean * np.log(p) + (1 - mean) * np.log1p(-p)).sum())

    def _clipped_mean(self, train: np.ndarray) -> np.ndarray:
        return np.clip(train.mean(axis=0, dtype=np.float64), self.min_mean, 1 - self.min_mean)


class ContinuousBernoulli(Likelihood):
    """p(x) proportional to exp(logit * x) on [0, 1]; the outputs are logits. Loaiza-Ganem & Cunningham 2019.

    A density: its log may be positive, and grows without end where all of a feature's values are 0, or 1.
    """

    min_mean = 1e-2  # a mean of m needs a logit of about 1 / m, and at 1000 one grey pixel costs hundreds of nats

    # log(sinh(h) / h) = sum of these * h^2, h^4, ...: to 1e-15 below the bound, where the closed form cancels
    _series = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250)
    _series_below = 0.25

    def fit(self, train: np.ndarray) -> Tensor:
        mean = torch.from_numpy(train.mean(axis=0, dtype=np.float64)).clamp(self.min_mean, 1 - self.min_mean)
        low = torch.full_like(mean, -2 / self.min_mean)
        high = -low
        for _ in range(64):  # halvings: to the last bit of float64
            middle = (low + high) / 2
            below = self.mean(middle) < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        half, near, safe = self._halves(outputs)
        # log of the integral of exp(logit * x) over [0, 1], less logit / 2 that the even form leaves out
        far_value = safe.abs() + torch.log1p(-torch.exp(-2 * safe.abs())) - torch.log(2 * safe.abs())
        square = torch.where(near, half, 0).square()
        near_value = torch.zeros_like(half)
        for coefficient in reversed(self._series):
            near_value = (near_value + coefficient) * square
        return (outputs * (x - 0.5) - torch.where(near, near_value, far_value)).sum(dim=-1)

    def mean(self, outputs: Tensor, x: Tensor | None = None) -> Tensor:
        half, near, safe = self._halves(outputs)
        far_value = 1 / torch.tanh(safe) - 1 / safe
        near_value = torch.zeros_like(half)
        for power, coefficient in reversed(list(enumerate(self._series, start=1))):
            near_value = near_value * half.square() + 2 * power * coefficient
        return (1 + torch.where(near, near_value * half, far_value)) / 2

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        u = torch.rand(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        steep = outputs.abs().clamp(min=torch.finfo(outputs.dtype).tiny)
        # The inverse of the distribution function at -|logit|, where nothing overflows, and its mirror image.
        value = (-torch.log1p(u * torch.expm1(-steep)) / steep).clamp(0, 1)
        return torch.where(outputs > 0, 1 - value, value)

    def _halves(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logit / 2, whether it is near 0, and the same with 1 there: a branch not taken must not give NaN."""
        half = outputs / 2
        near = half.abs() < self._series_below
        return half, near, torch.where(near, 1, half)


class Gaussian(Likelihood):
    """Independent Gaussian variables; the outputs are means. Log sigma is learned, one or one a feature.

    It is bounded below by a softplus, which leaves a gradient to come back by. Rybkin et al. 2021 (sigma-VAE).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.shared = config.gaussian_scale == "shared"
        self.raw_log_sigma = nn.Parameter(torch.zeros(1 if self.shared else config.input_dim))

    @property
    def log_sigma(self) -> Tensor:
        """(1,) or (X,), above LOG_SIGMA_MIN."""
        return LOG_SIGMA_MIN + F.softplus(self.raw_log_sigma - LOG_SIGMA_MIN)

    @torch.no_grad()
    def fit(self, train: np.ndarray) -> Tensor:
        mean = train.mean(axis=0, dtype=np.float64)
        variance = np.zeros_like(mean)
        for block in _blocks(train):
            variance += ((block - mean) ** 2).sum(axis=0) / len(train)
        if self.shared:
            variance = variance.mean(keepdims=True)
        lowest = math.exp(LOG_SIGMA_MIN + _START_ABOVE_MIN)
        log_sigma = np.log(np.maximum(np.sqrt(variance), lowest))
        above = torch.from_numpy(log_sigma - LOG_SIGMA_MIN)
        self.raw_log_sigma.copy_(LOG_SIGMA_MIN + above + torch.log(-torch.expm1(-above)))  # inverse of softplus
        return torch.from_numpy(mean)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        log_sigma = self.log_sigma
        deviations = (x - outputs) * torch.exp(-log_sigma)
        return -(deviations.square() / 2 + log_sigma + _HALF_LOG_2PI).sum(dim=-1)

    def mean(self, outputs: Tensor, x: Tensor | None = None) -> Tensor:
        return outputs

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + self.log_sigma.exp() * noise


class Counts(Likelihood):
    """Counts of mean (size factor) * exp(output). The output bends towards LOG_RATE_MAX, so that exp can't overflow.

    A row's size factor is its total over the mean total of the training rows, and is taken as given, as scvi-tools
    does with an observed library size. A row without any counts is treated as if it had one.
    """

    mean_total: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean_total", torch.ones(()))

    def encoder_input(self, x: Tensor) -> Tensor:
        """log(1 + x / size factor): counts span decades."""
        return torch.log1p(x / self._size(x).to(x.dtype))

    @torch.no_grad()
    def fit(self, train: np.ndarray) -> Tensor:
        self.mean_total.fill_(np.maximum(train.sum(axis=1, dtype=np.float64), 1).mean())
        # The mean of the size factors is 1. A feature without counts in training may have them elsewhere.
        mean = np.maximum(train.mean(axis=0, dtype=np.float64), 0.5 / len(train))
        return torch.from_numpy(np.log(mean))

    def mean(self, outputs: Tensor, x: Tensor | None = None) -> Tensor:
        return self._log_rate(outputs, x).exp().to(outputs.dtype)

    def _size(self, x: Tensor) -> Tensor:
        """(..., X) -> (..., 1) float64."""
        return x.sum(dim=-1, keepdim=True, dtype=torch.float64).clamp(min=1) / self.mean_total

    def _log_rate(self, outputs: Tensor, x: Tensor | None) -> Tensor:
        """In float64: terms of log p that cancel are as large as the counts times their logarithms."""
        log_rate = outputs.double()
        log_rate = log_rate - F.softplus(log_rate - LOG_RATE_MAX)
        return log_rate if x is None else log_rate + self._size(x).log()


class Poisson(Counts):
    """Independent Poisson variables; the outputs are log rates at size factor 1."""

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        log_rate, counts = self._log_rate(outputs, x), x.double()
        return (counts * log_rate - log_rate.exp() - torch.lgamma(counts + 1)).sum(dim=-1).to(outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        return torch.poisson(self.mean(outputs, x), generator=generator)


class NegativeBinomial(Counts):
    """Counts of variance mean + mean^2 / theta, theta learned for each feature; the outputs are log means."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.log_theta = nn.Parameter(torch.zeros(config.input_dim))

    @torch.no_grad()
    def start(self, train: np.ndarray) -> Tensor:
        """Theta by its moments, which take two passes over the rows."""
        outputs = super().fit(train)
        self.log_theta.copy_(torch.from_numpy(self._log_theta_by_moments(train, outputs.exp().numpy())))
        return outputs.float()

    @torch.no_grad()
    def fit(self, train: np.ndarray) -> Tensor:
        """By maximum likelihood, on no more than _FIT_ROWS of the rows."""
        means = super().fit(train).exp().numpy()
        log_means, log_thetas = np.log(means), self._log_theta_by_moments(train, means)
        rows = np.array(train[:_FIT_ROWS], dtype=np.float64)
        log_sizes = self._size(torch.from_numpy(rows)).log().numpy()[:, 0]
        for i, counts in enumerate(np.ascontiguousarray(rows.T)):
            if counts.any():
                log_means[i], log_thetas[i] = _fit_negative_binomial(counts, log_sizes, log_means[i], log_thetas[i])
        self.log_theta.copy_(torch.from_numpy(log_thetas))
        return torch.from_numpy(log_means)

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        counts, log_theta = x.double(), self.log_theta.double()
        theta = log_theta.exp()
        logits = self._log_rate(outputs, x) - log_theta
        log_choices = torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
        log_p = log_choices + counts * F.logsigmoid(logits) + theta * F.logsigmoid(-logits)
        return log_p.sum(dim=-1).to(outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None, x: Tensor | None = None) -> Tensor:
        rate, theta = self.mean(outputs, x), self.log_theta.exp().to(outputs.dtype)
        # What torch.distributions.Gamma calls, which takes no generator.
        gamma = torch._standard_gamma(theta.expand_as(rate).contiguous(), generator=generator)
        return torch.poisson(rate * gamma / theta, generator=generator)

    def _log_theta_by_moments(self, train: np.ndarray, means: np.ndarray) -> np.ndarray:
        """(N, X), (X,) -> (X,): that which explains the variance beyond the mean; at the upper end if there is none."""
        squares, beyond = np.zeros_like(means), np.zeros_like(means)
        for block in _blocks(train):
            rates = self._size(torch.from_numpy(block)).numpy() * means
            squares += (rates**2).sum(axis=0)
            beyond += ((block - rates) ** 2 - rates).sum(axis=0)
        low, high = _LOG_THETA_START
        theta = np.divide(squares, beyond, where=beyond > 0, out=np.full_like(means, math.exp(high)))
        return np.log(theta.clip(math.exp(low), math.exp(high)))


_FAMILIES: dict[LikelihoodName, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}


def make_likelihood(config: ModelConfig) -> Likelihood:
    return _FAMILIES[config.likelihood](config)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """(N, X) -> the same in pieces, as float64 of their own."""
    for first in range(0, len(rows), _BLOCK_ROWS):
        yield np.array(rows[first : first + _BLOCK_ROWS], dtype=np.float64)


def _fit_negative_binomial(
    counts: np.ndarray, log_sizes: np.ndarray, log_mean: float, log_theta: float
) -> tuple[float, float]:
    """counts (N,), log_sizes (N,), and where to begin -> log mean at size factor 1 and log theta, most likely."""
    from scipy.optimize import minimize
    from scipy.special import digamma, gammaln

    values, repeats = np.unique(counts, return_counts=True)  # of gamma functions, the dear part
    num_rows = len(counts)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        theta = math.exp(point[1])
        logits = point[0] + log_sizes - point[1]
        small = np.exp(-np.abs(logits))
        p = np.where(logits > 0, 1, small) / (1 + small)
        log_failure = -np.maximum(logits, 0) - np.log1p(small)
        log_choices = repeats @ gammaln(values + theta) - num_rows * gammaln(theta)
        log_p = log_choices + counts @ (logits + log_failure) + theta * log_failure.sum()
        by_mean = counts @ (1 - p) - theta * p.sum()
        by_choices = repeats @ digamma(values + theta) - num_rows * digamma(theta)
        by_theta = theta * (by_choices + log_failure.sum() + p.sum()) - counts @ (1 - p)
        return -log_p / num_rows, -np.array([by_mean, by_theta]) / num_rows

    found = minimize(
        loss,
        np.array([log_mean, log_theta]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, LOG_RATE_MAX), _LOG_THETA_START],
        options={"ftol": 1e-12, "gtol": 1e-7},
    )
    return float(found.x[0]), float(found.x[1])
