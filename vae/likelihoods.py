"""Observation models: the decoder's last layer is linear, and each likelihood says what its outputs mean."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B batch, X input features, K importance samples.


class Likelihood(Protocol):
    """p(x|z) given the decoder's outputs."""

    def output_bias(self, train_mean: np.ndarray) -> Tensor:
        """(X,) means of the training data -> (X,) outputs at which the model has those means."""

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """(..., B, X), (B, X) -> (..., B), summed over features, in nats."""

    def mean(self, outputs: Tensor) -> Tensor:
        """E[x|z], of the shape of `outputs`."""

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from p(x|z), of the shape of `outputs`."""

    def no_latent_nelbo(self, train_mean: np.ndarray, x: np.ndarray) -> float:
        """x (N, X) -> its mean -log p, in nats, under the family without a latent: what collapse comes to."""


class Bernoulli:
    """Independent Bernoulli variables; the outputs are logits.

    x between 0 and 1 is taken as a probability: log_prob is then its expectation over binarised x.
    """

    # Features that are constant in the training split would put the logit at infinity. Burda et al. 2015.
    min_mean = 1e-3

    def output_bias(self, train_mean: np.ndarray) -> Tensor:
        return torch.from_numpy(self._clipped(train_mean)).logit().float()

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(outputs, x.expand_as(outputs), reduction="none")
        return -losses.sum(dim=-1)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def no_latent_nelbo(self, train_mean: np.ndarray, x: np.ndarray) -> float:
        p = self._clipped(train_mean)
        mean = x.mean(axis=0, dtype=np.float64)  # the log-likelihood is linear in x
        return float(-(mean * np.log(p) + (1 - mean) * np.log1p(-p)).sum())

    def _clipped(self, train_mean: np.ndarray) -> np.ndarray:
        return np.clip(np.asarray(train_mean, dtype=np.float64), self.min_mean, 1 - self.min_mean)


LIKELIHOODS: dict[str, Likelihood] = {"bernoulli": Bernoulli()}
