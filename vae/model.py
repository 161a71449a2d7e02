"""The VAE: a Gaussian encoder and a decoder, both perceptrons over flat rows.

x -> [Linear -> activation -> Dropout] for each hidden width -> heads for mu and logvar -> z -> the mirror of
it -> outputs of the likelihood. Heads and outputs are linear and never dropped: dropout there would change
q(z|x) and with it the bound.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from vae.activations import make_activation, variance_gain
from vae.config import ModelConfig
from vae.likelihoods import LIKELIHOODS

# Shapes: B batch, X input features, Z latent dimensions, K importance samples.

# log variances beyond these are of no use and overflow in exp; the clamp is soft because a hard one has no
# gradient to come back by.
LOGVAR_MIN, LOGVAR_MAX = -8.0, 4.0

_LOGVAR_HEAD_GAIN = 0.1  # the posterior starts near unit variance for every x


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) p(x|z), and q(z|x) = N(mu, diag(exp(logvar))). Kingma & Welling 2014."""

    def __init__(self, config: ModelConfig, train_mean: np.ndarray | None = None) -> None:
        """`train_mean` (X,): means of the training data, where the outputs start; None: at zero.

        Weights are drawn from torch's default generator.
        """
        super().__init__()
        self.config = config
        self.likelihood = LIKELIHOODS[config.likelihood]
        widths = config.hidden_dims
        self.encoder = _hidden_layers(config, (config.input_dim, *widths))
        self.mu = _head(widths[-1] if widths else config.input_dim, config.latent_dim)
        self.logvar = _head(self.mu.in_features, config.latent_dim, gain=_LOGVAR_HEAD_GAIN)
        self.decoder = _hidden_layers(config, (config.latent_dim, *reversed(widths)))
        self.outputs = _head(widths[0] if widths else config.latent_dim, config.input_dim)
        if train_mean is not None:
            with torch.no_grad():
                self.outputs.bias.copy_(self.likelihood.output_bias(train_mean))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., B, X) in [0, 1] -> mu, logvar of q(z|x), each (..., B, Z)."""
        hidden = self.encoder(x)
        return self.mu(hidden), _soft_clamp(self.logvar(hidden))

    def decode(self, z: Tensor) -> Tensor:
        """z (..., B, Z) -> outputs of the likelihood (logits), (..., B, X)."""
        return self.outputs(self.decoder(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, X), noise (..., B, Z) ~ N(0, I) -> outputs (..., B, X), mu (B, Z), logvar (B, Z)."""
        mu, logvar = self.encode(x)
        return self.decode(mu + (logvar / 2).exp() * noise), mu, logvar

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, mean: bool = True) -> Tensor:
        """(n, X) from the prior: means of p(x|z), or draws from it. `generator` is on the model's device."""
        z = torch.randn(n, self.config.latent_dim, generator=generator, device=self.outputs.weight.device)
        with evaluating(self):
            outputs = self.decode(z)
        return self.likelihood.mean(outputs) if mean else self.likelihood.sample(outputs, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x (B, X) -> means of p(x|z) at z = E[z|x], (B, X)."""
        with evaluating(self):
            return self.likelihood.mean(self.decode(self.encode(x)[0]))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout), and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _hidden_layers(config: ModelConfig, widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, width in pairwise(widths):
        linear = nn.Linear(fan_in, width)
        nn.init.normal_(linear.weight, std=variance_gain(config, fan_in) / math.sqrt(fan_in))
        nn.init.zeros_(linear.bias)
        layers += [linear, make_activation(config, width), nn.Dropout(config.dropout)]
    return nn.Sequential(*layers)


def _head(fan_in: int, width: int, gain: float = 1.0) -> nn.Linear:
    linear = nn.Linear(fan_in, width)
    nn.init.xavier_normal_(linear.weight, gain=gain)
    nn.init.zeros_(linear.bias)
    return linear


def _soft_clamp(raw: Tensor) -> Tensor:
    """Into [LOGVAR_MIN, LOGVAR_MAX], with slope 1 in the middle and a gradient beyond the ends."""
    centre, radius = (LOGVAR_MAX + LOGVAR_MIN) / 2, (LOGVAR_MAX - LOGVAR_MIN) / 2
    return centre + radius * torch.tanh((raw - centre) / radius)
