"""Training as a VAE-GAN: the features of a discriminator judge reconstructions. Larsen et al. 2016.

Three networks, each moved by losses of its own alone (algorithm 1 there):

encoder        kl_weight * KL(q(z|x) || p(z)) + feature error
decoder        FEATURE_WEIGHT * feature error - log D(reconstruction) - log D(sample)
discriminator  -log D(x) - log(1 - D(reconstruction)) - log(1 - D(sample))

D reads reconstructions and samples as means of p(x|z). These losses don't see what scale p(x|z) has beside its
means, so that is fitted by -log p(x|z) with the means held still.

An epoch's values remain those of the ELBO, and are bounds on -log p(x) like any other, but nobody trained for
them: they tell whether the latents are in use, and nothing of what the decoder was trained for. A sharp stroke a
pixel beside the original is right here and costs hundreds of nats there: on the digits the bound stays worse than
that without latents while reconstructions come near to x. So it must not be ranked with an NLL. Nor do the losses
rank trainings: each has a discriminator of its own. What trials are chosen by is the squared error of
reconstructions of the validation split, which no discriminator has a say in.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import SUPPORTS, ModelConfig, TrainConfig
from vae.data import Dataset
from vae.layers import head, make_encoder
from vae.objective import CHUNK_ROWS, Evaluation, free_bits_kl, gaussian_kl
from vae.optimizer import parameter_groups
from vae.training import Trainer

FEATURE_WEIGHT = 1.0  # gamma of Larsen et al.; at 0.1 the squared error on the digits is half as large again
MOMENTUM = 0.5  # beta1 of Adam, for all: at 0.9 the networks chase each other. Radford et al. 2016

# Shapes: N rows, B batch, X input features, Z latent dimensions, U features of the discriminator.


class Discriminator(nn.Module):
    """An encoder's body with one output: is a row data? The layer before that output is the feature space.

    There is no dropout, since two masks would be taken for a feature error. With body = conv the dense layers are
    left out: the features are those of the last convolution, as in the paper, for dense ones forget the place.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_dims = () if config.body == "conv" else config.hidden_dims
        body = dataclasses.replace(config, hidden_dims=hidden_dims, dropout=0.0, activation_dropout=0.0)
        self.body, width = make_encoder(body)
        self.logit = head(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, X) -> features (N, U) and logits of being data (N,), in float32."""
        features = self.body(x)
        return features.float(), self.logit(features).squeeze(-1).float()


class Losses(NamedTuple):
    """What moves each network, and two of the terms; means over the batch, each ()."""

    encoder: Tensor
    decoder: Tensor
    discriminator: Tensor
    likelihood: Tensor  # -log p(x|z) in nats
    kl: Tensor  # in nats
    feature_error: Tensor  # -log N(features of x; those of its reconstruction, I) in nats, without the constant


class AdversarialTrainer(Trainer):
    """Trains a VAE with a discriminator beside it, which goes into states but not into `result`.

    The norm of the gradient, and its clipping, is that of all networks together.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        data: Dataset,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if SUPPORTS[model_config.likelihood] == "counts":
            # Means that pass for data have the data's noise in them, and p(x|z) of counts would add it once more:
            # its variance is at least its mean. A Bernoulli or Gaussian variable can do without.
            raise ValueError(
                "objective = vae_gan makes means of p(x|z) pass for data, which those of counts can't; "
                f"with likelihood = {model_config.likelihood} set objective = elbo"
            )
        super().__init__(model_config, train_config, data, seed=seed, device=device)
        with self._own_rng():
            self.discriminator = Discriminator(model_config).to(self.device)
        model = self.model
        self._moved_by: dict[str, list[nn.Parameter]] = {  # field of Losses -> parameters, each of them once
            "encoder": [*model.encoder.parameters(), *model.mu.parameters(), *model.logvar.parameters()],
            "decoder": [*model.decoder.parameters(), *model.outputs.parameters()],
            "discriminator": list(self.discriminator.parameters()),
            "likelihood": list(model.likelihood.parameters()),
        }
        self._parameters += self._moved_by["discriminator"]
        if self._has_statistics:
            self._buffers += self.discriminator.buffers()
        for group in parameter_groups(self.discriminator, train_config.weight_decay):
            self.optimizer.add_param_group(group)
        mean = data.train.mean(axis=0, dtype=np.float64)
        self.no_latent_objective = float(np.square(data.validation - mean).sum(axis=1).mean())
        for group in self.optimizer.param_groups:
            group["betas"] = (MOMENTUM, group["betas"][1])

    def losses(self, x: Tensor, noise: Tensor, prior: Tensor) -> Losses:
        """x (B, X) -> its losses; noise and z of the samples (both (B, Z) ~ N(0, I)) are given.

        A field has gradients for other networks' parameters, too, which are not meant.
        """
        likelihood = self.model.likelihood
        with self._autocast():
            mu, logvar = self.model.encode(x)
            # In one pass each, so that under batch normalisation all are seen with the same statistics.
            outputs = self.model.decode(torch.cat((mu + (logvar / 2).exp() * noise, prior)))
            features, logits = self.discriminator(torch.cat((x, likelihood.mean(outputs))))
        of_x, of_recon, _ = features.chunk(3)
        feature_error = 0.5 * (of_x - of_recon).square().sum(dim=-1).mean()
        x_logits, recon_logits, sample_logits = logits.chunk(3)
        kl, free_bits = gaussian_kl(mu, logvar).mean(), self.config.free_bits
        return Losses(
            encoder=self._kl_weight() * (free_bits_kl(mu, logvar, free_bits) if free_bits else kl) + feature_error,
            decoder=FEATURE_WEIGHT * feature_error + _is_data(recon_logits, 1) + _is_data(sample_logits, 1),
            discriminator=_is_data(x_logits, 1) + _is_data(recon_logits, 0) + _is_data(sample_logits, 0),
            likelihood=-likelihood.log_prob(outputs[: len(x)].detach(), x).mean(),
            kl=kl,
            feature_error=feature_error,
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"discriminator": copy.deepcopy(self.discriminator.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.discriminator.load_state_dict(state["discriminator"])

    def _gradient_by_hand(self) -> None:
        return None  # that is one of the bound

    def _objective(self, validation: Evaluation) -> float:
        """Squared error of reconstructions, summed over features, mean over the validation split."""
        errors = [
            (self.result.reconstruct(rows) - rows).square().sum(dim=-1) for rows in self._validation.split(CHUNK_ROWS)
        ]
        return float(torch.cat(errors).double().mean())

    def _backward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses = self.losses(x, noise, torch.randn_like(noise))
        total = torch.zeros((), device=self.device)  # of use for being finite or not
        for name, parameters in self._moved_by.items():
            loss = getattr(losses, name)
            total += loss.detach()
            if parameters:
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    # Those of convolutions on a GPU may come in another order of memory than the weights that the
                    # optimizer goes through beside them.
                    parameter.grad = gradient.contiguous()
        return total, losses.likelihood.detach(), losses.kl.detach()


def make_trainer(
    model_config: ModelConfig,
    train_config: TrainConfig,
    data: Dataset,
    *,
    seed: int,
    device: str | torch.device = "cpu",
) -> Trainer:
    """The trainer of train_config.objective. Raises ValueError for configs and data that don't go together."""
    trainer = AdversarialTrainer if train_config.objective == "vae_gan" else Trainer
    return trainer(model_config, train_config, data, seed=seed, device=device)


def _is_data(logits: Tensor, truth: float) -> Tensor:
    """(B,) -> (), the mean cross-entropy in nats: -log D for a truth of 1, -log(1 - D) for one of 0."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))
