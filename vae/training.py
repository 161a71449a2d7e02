"""The training loop: an epoch at a time, resumable to the bit, every step checked for finiteness.

All that is random here (first weights, order, binarisation, noise, dropout) comes from torch's default
generator inside a fork of it, with a state of the trainer's own: two trainers in one process don't disturb
each other, nor whoever uses the generator outside.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae.config import LrSchedule, ModelConfig, TrainConfig
from vae.data import Dataset
from vae.model import VAE
from vae.objective import Evaluation, elbo_terms, evaluate, fixed_noise, kl_weight

LR_WARMUP_SHARE = 0.05  # of all steps, with lr_schedule = warmup_cosine

# Shapes: N rows of a split, B batch, X input features, Z latent dimensions.


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """One epoch. Losses in nats per example at beta = 1; those of training are means over its rows."""

    epoch: int  # from 1
    train_nelbo: float
    train_recon: float
    train_kl: float
    val_nelbo: float
    val_recon: float
    val_kl: float
    active_units: int
    grad_norm: float  # mean over the steps, before clipping
    clipped_steps: int
    kl_weight: float  # at the epoch's end
    wall_s: float  # training and validation
    samples_per_s: float  # training alone


class Diverged(ArithmeticError):
    """The loss or the gradient stopped being finite; the weights are those before that step, still finite."""

    def __init__(self, epoch: int, step: int, reason: str) -> None:
        super().__init__(epoch, step, reason)  # all three, so that it can be pickled
        self.epoch = epoch  # from 1, the one under way
        self.step = step  # from 1, over all epochs
        self.reason = reason

    def __str__(self) -> str:
        return f"diverged in epoch {self.epoch}, step {self.step}: {self.reason}"


class Trainer:
    """Trains one VAE on one data set; iterate for epochs, stop iterating to stop training."""

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        data: Dataset,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if model_config.input_dim != data.input_dim:
            raise ValueError(f"the model takes {model_config.input_dim} features and the data have {data.input_dim}")
        self.config = train_config
        self.device = torch.device(device)
        self.epoch = 0  # epochs done
        self.steps = 0  # done; may be read from another thread, to see whether it moves
        self._train = _as_tensor(data.train, self.device)
        self._steps_per_epoch = math.ceil(len(data.train) / train_config.batch_size)
        self._validation = _as_tensor(data.validation, self.device)
        self._noise = fixed_noise(len(data.validation), model_config.latent_dim, data.config.seed).to(self.device)
        self._dynamic = data.config.binarize == "dynamic"
        self._rng: dict[str, Tensor] = {}
        with self._own_rng(seed):
            self.model = VAE(model_config, data.train_mean).to(self.device)
        self.no_latent_nelbo = self.model.likelihood.no_latent_nelbo(data.train_mean, data.validation)
        self._parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train_config.weight_decay), lr=train_config.learning_rate, fused=True
        )

    def __iter__(self) -> Iterator[EpochMetrics]:
        while self.epoch < self.config.max_epochs:
            yield self.train_epoch()

    def train_epoch(self) -> EpochMetrics:
        """One pass over the training split, then the validation value. Raises Diverged."""
        start = time.perf_counter()
        num_rows, clipped_steps = len(self._train), 0
        recon, kl, norms = 0.0, 0.0, []
        self.model.train()
        with self._own_rng():
            for rows in torch.randperm(num_rows, device=self.device).split(self.config.batch_size):
                batch_recon, batch_kl, norm = self._train_step(self._train.index_select(0, rows))
                recon += batch_recon * len(rows)
                kl += batch_kl * len(rows)
                norms.append(norm)
                clipped_steps += norm > self.config.clip_grad_norm
        trained = time.perf_counter()
        validation = self.evaluate()
        if not math.isfinite(validation.nelbo):
            raise Diverged(self.epoch + 1, self.steps, f"validation loss is {validation.nelbo}")
        self.epoch += 1
        return EpochMetrics(
            epoch=self.epoch,
            train_nelbo=(recon + kl) / num_rows,
            train_recon=recon / num_rows,
            train_kl=kl / num_rows,
            val_nelbo=validation.nelbo,
            val_recon=validation.recon,
            val_kl=validation.kl,
            active_units=validation.active_units,
            grad_norm=math.fsum(norms) / len(norms),
            clipped_steps=clipped_steps,
            kl_weight=self._kl_weight(),
            wall_s=time.perf_counter() - start,
            samples_per_s=num_rows / (trained - start),
        )

    def evaluate(self) -> Evaluation:
        """The validation split with its fixed noise: same weights, same value, however trained."""
        return evaluate(self.model, self._validation, self._noise)

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that training goes on from; fit for torch.save and torch.load(weights_only=True)."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self._rng,
            "epoch": self.epoch,
            "step": self.steps,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer of the same configs and data stood."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._rng = {kind: value.cpu() for kind, value in state["rng"].items()}
        self.epoch, self.steps = state["epoch"], state["step"]

    def _train_step(self, x: Tensor) -> tuple[float, float, float]:
        """x (B, X) -> means of recon and kl, and the norm of the gradient before clipping."""
        if self._dynamic:
            x = torch.rand_like(x).lt_(x)  # in place: 0 and 1 as float32, without a copy
        noise = torch.randn(len(x), self.model.config.latent_dim, device=self.device)
        recon, kl = (term.mean() for term in elbo_terms(self.model, x, noise))
        loss = recon + self._kl_weight() * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        # One transfer a step, so that a GPU is waited for once.
        values = torch.stack((loss.detach(), recon.detach(), kl.detach(), total)).tolist()
        loss_value, recon_value, kl_value, norm = values
        for name, value in (("loss", loss_value), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise Diverged(self.epoch + 1, self.steps + 1, f"{name} is {value}")
        if norm > self.config.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad_norm, total)
        factor = lr_factor(self.steps, self.config.max_epochs * self._steps_per_epoch, self.config.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.learning_rate
        self.optimizer.step()
        self.steps += 1
        return recon_value, kl_value, norm

    def _kl_weight(self) -> float:
        return kl_weight(self.steps, self.config.kl_warmup_epochs * self._steps_per_epoch, self.config.beta)

    @contextmanager
    def _own_rng(self, seed: int | None = None) -> Iterator[None]:
        """torch's default generators in this trainer's state (or newly seeded); afterwards as they were."""
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            # Not torch.manual_seed and its like: they reach the generators of every device.
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                if cuda:
                    with torch.cuda.device(self.device):
                        torch.cuda.manual_seed(seed)
            else:
                torch.set_rng_state(self._rng["cpu"])
                if cuda and "cuda" in self._rng:  # not after a state that was saved on a CPU
                    torch.cuda.set_rng_state(self._rng["cuda"], self.device)
            yield
            self._rng = {"cpu": torch.get_rng_state()}
            if cuda:
                self._rng["cuda"] = torch.cuda.get_rng_state(self.device)


def lr_factor(step: int, total_steps: int, schedule: LrSchedule) -> float:
    """What the learning rate is multiplied by in step `step` (from 0) of a training of `total_steps`."""
    if schedule == "constant":
        return 1.0
    warmup = LR_WARMUP_SHARE * total_steps if schedule == "warmup_cosine" else 0.0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total_steps - warmup))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices, which decay, and the rest: decay has no business with biases and learned slopes."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _as_tensor(rows: np.ndarray, device: torch.device) -> Tensor:
    # By DLPack, since from_numpy warns of arrays that are read-only, as those in shared memory are.
    return torch.from_dlpack(rows).to(device)
