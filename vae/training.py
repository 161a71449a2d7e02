"""The training loop: an epoch at a time, resumable to the bit, every step checked for finiteness.

A step whose loss or gradient is not finite changes nothing; too many in a row, and the training has diverged.

All that is random here (first weights, order, binarisation, noise, dropout) comes from torch's default
generator inside a fork of it, with a state of the trainer's own: two trainers in one process don't disturb
each other, nor whoever uses the generator outside.
"""

import copy
import functools
import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from vae.config import GaussianScale, LikelihoodName, LrSchedule, ModelConfig, Precision, TrainConfig
from vae.data import Dataset
from vae.diagnostics import Diagnostics, diagnose, locate_non_finite
from vae.draws import coins, limits
from vae.fused import PlainGradient, covers
from vae.likelihoods import make_likelihood
from vae.model import VAE
from vae.objective import Evaluation, evaluate, fixed_noise, free_bits_kl, gaussian_kl, kl_weight

LR_WARMUP_SHARE = 0.05  # of all steps, with lr_schedule = warmup_cosine
PROBE_ROWS = 256  # of the validation split, at the most, for the diagnostics

_PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE_STREAM = 2  # of binarising the training rows whose bound is taken for the gap

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
    skipped_steps: int  # their loss or gradient was not finite
    kl_weight: float  # at the epoch's end
    wall_s: float  # training and validation
    samples_per_s: float  # training alone
    objective: float  # what trials are chosen by, to be minimised: val_nelbo, where the training is by the bound


class Diverged(ArithmeticError):
    """The loss or the gradient stopped being finite; the weights are those before that step, still finite."""

    def __init__(self, epoch: int, step: int, reason: str, layer: str | None = None) -> None:
        super().__init__(epoch, step, reason, layer)  # all, so that it can be pickled
        self.epoch = epoch  # from 1, the one under way
        self.step = step  # from 1, over all epochs: the first of those in a row
        self.reason = reason
        self.layer = layer  # the first that is not finite, as `vae.diagnostics.locate_non_finite` names it

    def __str__(self) -> str:
        where = "" if self.layer is None else f", first in {self.layer}"
        return f"diverged in epoch {self.epoch}, step {self.step}: {self.reason}{where}"


@dataclass(frozen=True, slots=True)
class Probed:
    """What `Trainer.diagnose` finds at some epoch."""

    epoch: int  # done; 0: before training
    diagnostics: Diagnostics
    generalization_gap: float  # validation nelbo minus that of as many training rows, both in evaluation, in nats
    precision_effect: float | None  # of bfloat16 on the validation nelbo, in nats; None where training is in float32


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
        self._has_statistics = model_config.normalization == "batch"
        if self._has_statistics and train_config.batch_size < 2:
            raise ValueError("batch normalisation needs a batch_size of at least 2")
        self.config = train_config
        self.device = torch.device(device)
        self.epoch = 0  # epochs done
        self.steps = 0  # taken or skipped; may be read from another thread, to see whether it moves
        self._skipped_in_a_row = 0
        self._spoiled: tuple[str, Tensor, Tensor] | None = None  # the last step that was skipped: reason, x, noise
        self._val_nelbo: float | None = None  # of the last epoch
        resident = _resident(data, self.device)
        self._train, self._validation, self._rows = resident.train, resident.validation, resident.rows
        self._steps_per_epoch = math.ceil(len(data.train) / train_config.batch_size)
        self._noise = fixed_noise(len(data.validation), model_config.latent_dim, data.config.seed).to(self.device)
        self._dynamic = data.config.binarize == "dynamic"
        self._seed_of_data = data.config.seed
        self._rng: dict[str, Tensor] = {}
        with self._own_rng(seed):
            self.model = VAE(model_config, data.train).to(self.device)
        self._averaged = copy.deepcopy(self.model) if train_config.ema_decay else None
        self.no_latent_nelbo = _no_latent_nelbo(data, model_config.likelihood, model_config.gaussian_scale)
        self.no_latent_objective = self.no_latent_nelbo  # the objective of a model that ignores its latents
        self._by_hand = self._gradient_by_hand()
        self._parameters = list(self.model.parameters())
        self.optimizer = _AdamW(
            parameter_groups(self.model, train_config.weight_decay), lr=train_config.learning_rate, fused=True
        )

    def __iter__(self) -> Iterator[EpochMetrics]:
        while not self._is_over:
            yield self.train_epoch()

    def train_epoch(self) -> EpochMetrics:
        """One pass over the training split, then the validation value. Raises Diverged."""
        start = time.perf_counter()
        num_rows, clipped_steps, skipped_steps = 0, 0, 0
        recon, kl, norms = 0.0, 0.0, []
        self.model.train()
        with self._own_rng():
            for rows in self._batches():
                taken = self._train_step(self._rows.index_select(0, rows))
                if taken is None:
                    skipped_steps += 1
                    continue
                batch_recon, batch_kl, norm = taken
                recon += batch_recon * len(rows)
                kl += batch_kl * len(rows)
                num_rows += len(rows)
                norms.append(norm)
                clipped_steps += norm > self.config.clip_grad_norm
        trained = time.perf_counter()
        if not norms:
            self._give_up()
        validation = self.evaluate()
        if not math.isfinite(validation.nelbo):
            raise Diverged(self.epoch + 1, self.steps, f"validation loss is {validation.nelbo}", self._where())
        self.epoch += 1
        self._val_nelbo = validation.nelbo
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
            skipped_steps=skipped_steps,
            kl_weight=self._kl_weight(),
            wall_s=time.perf_counter() - start,
            samples_per_s=len(self._train) / (trained - start),
            objective=self._objective(validation),
        )

    @property
    def _is_over(self) -> bool:
        return self.epoch >= self.config.max_epochs

    @property
    def result(self) -> VAE:
        """The model that is validated and exported: the one of the averaged weights, where there are such."""
        return self.model if self._averaged is None else self._averaged

    def evaluate(self) -> Evaluation:
        """The validation split with its fixed noise: same weights, same value, however trained."""
        return evaluate(self.result, self._validation, self._noise)

    def diagnose(self) -> Probed:
        """The model on fixed rows of the validation split; draws nothing from the trainer's own numbers."""
        validation = self.evaluate().nelbo if self._val_nelbo is None else self._val_nelbo
        rows = self._train[: len(self._validation)]
        if self._dynamic:
            generator = np.random.default_rng((self._seed_of_data, _PROBE_STREAM))
            draws = torch.from_numpy(generator.random(rows.shape, dtype=np.float32)).to(self.device)
            rows = (draws < rows).to(rows.dtype)
        effect = None
        if self.config.precision == "bfloat16":
            with self._autocast():
                effect = self.evaluate().nelbo - validation
        return Probed(
            epoch=self.epoch,
            diagnostics=diagnose(self.result, self._validation[:PROBE_ROWS], self._noise[:PROBE_ROWS]),
            generalization_gap=validation - evaluate(self.result, rows, self._noise[: len(rows)]).nelbo,
            precision_effect=effect,
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that training goes on from; fit for torch.save and torch.load(weights_only=True).

        Without the optimizer's part, two thirds of it, once training is over.
        """
        state = {
            "model": self.model.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "optimizer": None if self._is_over else self.optimizer.state_dict(),
            "rng": self._rng,
            "epoch": self.epoch,
            "step": self.steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer of the same configs and data stood.

        Raises ValueError for one that was done, and is to be trained for longer here: it has left its optimizer.
        """
        if state["optimizer"] is None and state["epoch"] < self.config.max_epochs:
            raise ValueError(f"a training that ended with {state['epoch']} epochs cannot go on: it has no optimizer")
        self.model.load_state_dict(state["model"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._rng = {kind: value.cpu() for kind, value in state["rng"].items()}
        self.epoch, self.steps = state["epoch"], state["step"]
        self._skipped_in_a_row, self._val_nelbo = state["skipped_in_a_row"], None

    def _batches(self) -> Iterator[Tensor]:
        """Indices of the training rows in a new order, a batch at a time."""
        for rows in torch.randperm(len(self._train), device=self.device).split(self.config.batch_size):
            if len(rows) > 1 or not self._has_statistics:  # one row has none
                yield rows

    def _train_step(self, x: Tensor) -> tuple[float, float, float] | None:
        """Some of self._rows -> means of recon and kl, norm of the gradient before clipping; None: not finite."""
        if self._dynamic:
            x = coins(x)
        noise = torch.randn(len(x), self.model.config.latent_dim, device=self.device)
        statistics = [value.clone() for value in self.model.buffers()] if self._has_statistics else []
        loss, recon, kl = self._backward(x, noise)
        total = self._gradient_norm()
        # One transfer a step, so that a GPU is waited for once.
        values = torch.stack((loss, recon, kl, total)).tolist()
        loss_value, recon_value, kl_value, norm = values
        self.steps += 1
        for name, value in (("loss", loss_value), ("gradient norm", norm)):
            if not math.isfinite(value):
                for kept, value_before in zip(self.model.buffers(), statistics, strict=False):
                    kept.copy_(value_before)
                self._skip(f"{name} is {value}", x, noise)
                return None
        self._skipped_in_a_row = 0
        if norm > self.config.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad_norm, total)
        factor = lr_factor(self.steps - 1, self.config.max_epochs * self._steps_per_epoch, self.config.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.learning_rate
        self.optimizer.step()
        if self._averaged is not None:
            average(self._averaged, self.model, ema_weight(self.steps, self.config.ema_decay))
        return recon_value, kl_value, norm

    def _where(self) -> str | None:
        """The layer that is not finite on the validation split; as many rows at a time as are diagnosed."""
        batches = zip(self._validation.split(PROBE_ROWS), self._noise.split(PROBE_ROWS), strict=True)
        layers = (locate_non_finite(self.result, rows, noise) for rows, noise in batches)
        return next((layer for layer in layers if layer is not None), None)

    def _objective(self, validation: Evaluation) -> float:
        """What trials are chosen by, after an epoch."""
        return validation.nelbo

    def _backward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, X), noise (B, Z) -> loss, recon and kl, detached means over the batch; fills in all gradients."""
        if self._by_hand is not None:
            return self._by_hand.backward(x, noise, self._kl_weight(), self.config.free_bits)
        for parameter in self._parameters:
            parameter.grad = None
        with self._autocast():
            outputs, mu, logvar = self.model(x, noise)
        recon = -self.model.likelihood.log_prob(outputs, x).mean()
        kl = gaussian_kl(mu, logvar).mean()
        free_bits = self.config.free_bits
        loss = recon + self._kl_weight() * (free_bits_kl(mu, logvar, free_bits) if free_bits else kl)
        loss.backward()
        return loss.detach(), recon.detach(), kl.detach()

    def _gradient_by_hand(self) -> PlainGradient | None:
        """None: autograd's."""
        return PlainGradient(self.model, _PRECISIONS[self.config.precision]) if covers(self.model) else None

    def _gradient_norm(self) -> Tensor:
        if self._by_hand is not None:
            return torch.dot(self._by_hand.gradient, self._by_hand.gradient).sqrt()
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _skip(self, reason: str, x: Tensor, noise: Tensor) -> None:
        """Leave a step out. Raises Diverged if it was one too many."""
        self._skipped_in_a_row += 1
        self._spoiled = (reason, x, noise)
        if self._skipped_in_a_row > self.config.max_skipped_steps:
            self._give_up()

    def _give_up(self) -> NoReturn:
        assert self._spoiled is not None
        reason, x, noise = self._spoiled
        first = self.steps - self._skipped_in_a_row + 1
        raise Diverged(self.epoch + 1, first, reason, locate_non_finite(self.model, x, noise))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _kl_weight(self) -> float:
        config, an_epoch = self.config, self._steps_per_epoch
        return kl_weight(
            self.steps,
            config.kl_warmup_epochs * an_epoch,
            config.beta,
            config.kl_schedule,
            config.max_epochs * an_epoch,
            config.kl_cycles,
        )

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


def ema_weight(step: int, decay: float) -> float:
    """The weight of what was averaged so far after `step` steps: `decay`, less while there is little to average."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, weight: float) -> None:
    """averaged <- weight * averaged + (1 - weight) * model; running statistics too, counters are copied."""
    pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(old, new) for old, new in pairs if old.is_floating_point()]
    torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], 1 - weight)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices, which decay, and the rest: decay has no business with biases and learned slopes."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class _AdamW(torch.optim.AdamW):
    """torch's, its step alone without what surrounds it there: checks, lists and a profiler's hook.

    And without the guards against torch.compile, for which torch (2.13) imports all of it at the first call: 1.6 s.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody has a closure
        """Moves all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] or self._begin(p) for p in parameters]
            steps = states[0]["step"].add_(1)
            for state in states:
                state["step"] = steps  # one for all, which move together: numbers of their own take as many kernels
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [steps] * len(parameters),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it, for a profiler

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


@functools.lru_cache(maxsize=1)  # one data set after the other; some likelihoods take seconds
def _no_latent_nelbo(data: Dataset, likelihood: LikelihoodName, gaussian_scale: GaussianScale) -> float:
    config = ModelConfig(input_dim=data.input_dim, likelihood=likelihood, gaussian_scale=gaussian_scale)
    return make_likelihood(config).no_latent_nelbo(data.train, data.validation)


class _Resident(NamedTuple):
    train: Tensor  # (N, X)
    validation: Tensor  # (M, X)
    rows: Tensor  # (N, X): what batches are taken from, which is `train` or what it is binarised by in each step


@functools.lru_cache(maxsize=1)  # one data set after the other: its trials find it on their device
def _resident(data: Dataset, device: torch.device) -> _Resident:
    train = _as_tensor(data.train, device)
    rows = limits(train) if data.config.binarize == "dynamic" else train
    return _Resident(train, _as_tensor(data.validation, device), rows)


def _as_tensor(rows: np.ndarray, device: torch.device) -> Tensor:
    # By DLPack, since from_numpy warns of arrays that are read-only, as those in shared memory are.
    return torch.from_dlpack(rows).to(device)
