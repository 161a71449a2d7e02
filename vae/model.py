"""The VAE: a Gaussian encoder and a decoder over flat rows.

x -> hidden layers (`vae.layers`) -> heads for mu and logvar -> z -> the mirror of it -> outputs of the likelihood.
Heads and outputs are linear and never dropped: dropout there would change q(z|x) and with it the bound.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vae.config import ModelConfig
from vae.layers import Block, head, make_decoder, make_encoder, make_outputs
from vae.likelihoods import make_likelihood

# Shapes: B batch, N rows of a split, X input features, Z latent dimensions, K importance samples.

# log variances beyond these are of no use and overflow in exp; the clamp is soft because a hard one has no
# gradient to come back by.
LOGVAR_MIN, LOGVAR_MAX = -8.0, 4.0

_LOGVAR_HEAD_GAIN = 0.1  # the posterior starts near unit variance for every x


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) p(x|z), and q(z|x) = N(mu, diag(exp(logvar))). Kingma & Welling 2014."""

    def __init__(self, config: ModelConfig, train: np.ndarray | None = None) -> None:
        """train (N, X): the training data, at whose means the outputs start; None: at zero.

        Weights are drawn from torch's default generator.
        """
        super().__init__()
        self.config = config
        self.likelihood = make_likelihood(config)
        self.encoder, width = make_encoder(config)
        self.mu = head(width, config.latent_dim)
        self.logvar = head(width, config.latent_dim, gain=_LOGVAR_HEAD_GAIN)
        self.decoder = make_decoder(config)
        self.outputs = make_outputs(config)
        if train is not None:
            with torch.no_grad():
                self.outputs.bias.copy_(self.likelihood.start(train))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., B, X) as in the Dataset -> mu, logvar of q(z|x), each (..., B, Z)."""
        hidden = self.encoder(self.likelihood.encoder_input(x).flatten(0, -2))
        mu, logvar = (_full(h(hidden)).unflatten(0, x.shape[:-1]) for h in (self.mu, self.logvar))
        return mu, _soft_clamp(logvar)

    def decode(self, z: Tensor) -> Tensor:
        """z (..., B, Z) -> outputs of the likelihood (..., B, X): logits, means or log rates.

        Raises ValueError in training with batch normalisation where B is not the only leading dimension: its
        statistics are of data, and would be of importance samples.
        """
        if self.training and self.config.normalization == "batch" and z.ndim > 2:
            raise ValueError("batch normalisation takes its statistics from (B, Z) alone; evaluate, or train on (B, Z)")
        return _full(self.outputs(self.decoder(z.flatten(0, -2)))).unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, X), noise (..., B, Z) ~ N(0, I) -> outputs (..., B, X), mu (B, Z), logvar (B, Z)."""
        mu, logvar = self.encode(x)
        return self.decode(mu + (logvar / 2).exp() * noise), mu, logvar

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, mean: bool = True) -> Tensor:
        """(n, X) from the prior: means of p(x|z), or draws from it. `generator` is on the model's device."""
        z = torch.randn(n, self.config.latent_dim, generator=generator, device=self.device)
        with evaluating(self):
            outputs = self.decode(z)
        return self.likelihood.mean(outputs) if mean else self.likelihood.sample(outputs, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x (B, X) -> means of p(x|z) at z = E[z|x], (B, X)."""
        with evaluating(self):
            return self.likelihood.mean(self.decode(self.encode(x)[0]), x)

    def blocks(self) -> list[tuple[str, int, Block]]:
        """The hidden layers in the order of the data: "encoder" or "decoder", index from 0 in it, block."""
        nets = {"encoder": self.encoder, "decoder": self.decoder}
        return [
            (name, index, block)
            for name, net in nets.items()
            for index, block in enumerate(module for module in net if isinstance(module, Block))
        ]

    @property
    def device(self) -> torch.device:
        return self.outputs.bias.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def num_parameters(config: ModelConfig) -> int:
    """That of the model which `config` describes, which is not built."""
    with torch.device("meta"):
        return VAE(config).num_parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout), and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _full(values: Tensor) -> Tensor:
    """In float32 what autocast left in bfloat16."""
    return values.float() if values.dtype == torch.bfloat16 else values


def _soft_clamp(raw: Tensor) -> Tensor:
    """Into [LOGVAR_MIN, LOGVAR_MAX], with slope 1 in the middle and a gradient beyond the ends."""
    centre, radius = (LOGVAR_MAX + LOGVAR_MIN) / 2, (LOGVAR_MAX - LOGVAR_MIN) / 2
    return centre + radius * torch.tanh((raw - centre) / radius)
