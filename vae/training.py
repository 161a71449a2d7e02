"""The training loop: an epoch at a time, resumable to the bit, every step checked for finiteness.

A step whose loss or gradient is not finite changes nothing; too many in a row, and the training has diverged.
On a CPU that is looked up in each step. A GPU decides it by itself, and is asked for the figures of many steps
at once, which are then gone through as if they had been read one by one.

All that is random here (first weights, order, binarisation, noise, dropout) comes from torch's default
generator inside a fork of it, with a state of the trainer's own: two trainers in one process don't disturb
each other, nor whoever uses the generator outside.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from vae.config import (
    CompileMode,
    GaussianScale,
    InputError,
    LikelihoodName,
    ModelConfig,
    Precision,
    TrainConfig,
)
from vae.data import Dataset
from vae.diagnostics import Diagnostics, diagnose, locate_non_finite
from vae.draws import coins, limits
from vae.fused import PlainGradient, covers
from vae.likelihoods import make_likelihood
from vae.model import VAE
from vae.objective import Evaluation, evaluate, fixed_noise, free_bits_kl, gaussian_kl, kl_weight
from vae.optimizer import AdamW, average, ema_weight, lr_factor, parameter_groups

PROBE_ROWS = 256  # of the validation split, at the most, for the diagnostics
_STEPS_A_READ, _VALUES_KEPT = 32, 2**24  # at the most, on a GPU: one wait for so many steps, whose batches are kept

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


class _Step(NamedTuple):
    """A step whose figures are still where they were computed."""

    figures: Tensor  # (4,): loss, recon and kl, means over the batch, and the norm of the gradient before clipping
    x: Tensor  # (B, X)
    noise: Tensor  # (B, Z)


@dataclass(slots=True)
class _Tally:
    """What is known of the epoch under way, sums over rows and lists over the steps that were taken."""

    num_rows: int = 0
    recon: float = 0.0
    kl: float = 0.0
    norms: list[float] = field(default_factory=list)
    clipped_steps: int = 0
    skipped_steps: int = 0
    unread: list[_Step] = field(default_factory=list)


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
        self._fewest_rows = 2 if self._has_statistics else 1  # of a batch: one row has no statistics
        if train_config.batch_size < self._fewest_rows:
            raise ValueError("batch normalisation needs a batch_size of at least 2")
        self.config = train_config
        self.device = torch.device(device)
        self.epoch = 0  # epochs done
        self.steps = 0  # taken or skipped; may be read from another thread, to see whether it moves
        self._steps_a_read = 1
        if self.device.type != "cpu":
            kept = _VALUES_KEPT // (train_config.batch_size * data.input_dim)
            self._steps_a_read = max(1, min(_STEPS_A_READ, kept))
        self._tally = _Tally()
        self._skipped_in_a_row = 0
        self._skipped_there = torch.zeros((), device=self.device)  # the same, as the device knows it
        self._spoiled: tuple[str, Tensor, Tensor] | None = None  # the last step that was skipped: reason, x, noise
        self._val_nelbo: float | None = None  # of the last epoch
        resident = _resident(data, self.device)
        self._train, self._validation, self._rows = resident.train, resident.validation, resident.rows
        whole, rest = divmod(len(data.train), train_config.batch_size)
        self._steps_per_epoch = max(1, whole + (rest >= self._fewest_rows))
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
        self._buffers = list(self.model.buffers()) if self._has_statistics else []  # that a step changes
        self.optimizer = AdamW(
            parameter_groups(self.model, train_config.weight_decay), lr=train_config.learning_rate, fused=True
        )

    def __iter__(self) -> Iterator[EpochMetrics]:
        while not self._is_over:
            yield self.train_epoch()

    def train_epoch(self) -> EpochMetrics:
        """One pass over the training split, then the validation value. Raises Diverged."""
        start = time.perf_counter()
        self._tally = tally = _Tally()
        self._skipped_there.fill_(self._skipped_in_a_row)
        self.model.train()
        with self._own_rng():
            for rows in self._batches():
                self._train_step(self._rows.index_select(0, rows))
            self._read()
        trained = time.perf_counter()
        if not tally.norms:
            self._give_up()
        validation = self.evaluate()
        if not math.isfinite(validation.nelbo):
            raise Diverged(self.epoch + 1, self.steps, f"validation loss is {validation.nelbo}", self._where())
        self.epoch += 1
        self._val_nelbo = validation.nelbo
        return EpochMetrics(
            epoch=self.epoch,
            train_nelbo=(tally.recon + tally.kl) / tally.num_rows,
            train_recon=tally.recon / tally.num_rows,
            train_kl=tally.kl / tally.num_rows,
            val_nelbo=validation.nelbo,
            val_recon=validation.recon,
            val_kl=validation.kl,
            active_units=validation.active_units,
            grad_norm=math.fsum(tally.norms) / len(tally.norms),
            clipped_steps=tally.clipped_steps,
            skipped_steps=tally.skipped_steps,
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
            if len(rows) >= self._fewest_rows:
                yield rows

    def _train_step(self, x: Tensor) -> None:
        """Some of self._rows. Raises Diverged, for this step or one that was not read yet."""
        if self._dynamic:
            x = coins(x)
        noise = torch.randn(len(x), self.model.config.latent_dim, device=self.device)
        statistics = [value.clone() for value in self._buffers]
        loss, recon, kl = self._backward(x, noise)
        norm = self._gradient_norm()
        self.steps += 1
        factor = lr_factor(self.steps - 1, self.config.max_epochs * self._steps_per_epoch, self.config.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.learning_rate
        step = _Step(torch.stack((loss, recon, kl, norm)), x, noise)
        if self._steps_a_read == 1:
            values = step.figures.tolist()
            self._move(values[0], values[3], norm, statistics)
            self._count(step, self.steps, *values)
            return
        self._move_unseen(step.figures, statistics)
        self._tally.unread.append(step)
        if len(self._tally.unread) == self._steps_a_read:
            self._read()

    def _move(self, loss: float, norm: float, norm_there: Tensor, statistics: list[Tensor]) -> None:
        """By the gradient, if that and the loss are finite; else the buffers go back to `statistics`."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            for kept, before in zip(self._buffers, statistics, strict=True):
                kept.copy_(before)
            return
        if norm > self.config.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad_norm, norm_there)
        self.optimizer.step()
        if self._averaged is not None:
            average(self._averaged, self.model, 1 - ema_weight(self.steps, self.config.ema_decay))

    def _move_unseen(self, figures: Tensor, statistics: list[Tensor]) -> None:
        """As `_move`, without a look at the figures; and after one skipped step too many nothing moves any more."""
        loss, _, _, norm = figures
        has_diverged = self._skipped_there > self.config.max_skipped_steps
        skipped = ((loss.isfinite() & norm.isfinite()).logical_not_() | has_diverged).float()  # 0 or 1
        self._skipped_there.add_(1).mul_(skipped)
        for kept, before in zip(self._buffers, statistics, strict=True):
            kept.copy_(torch.where(skipped.bool(), before, kept))
        limit = self.config.clip_grad_norm
        nn.utils.clip_grads_with_norm_(self._parameters, limit, norm * (norm > limit))  # of 0: by a factor of 1
        self.optimizer.step(skipped)
        if self._averaged is not None:
            average(self._averaged, self.model, (1 - skipped) * (1 - ema_weight(self.steps, self.config.ema_decay)))

    def _read(self) -> None:
        """Counts the steps that were not read yet, once they are done. Raises Diverged in one too many to be skipped.

        Then `steps` are those up to that one: nothing has moved after it.
        """
        unread, self._tally.unread = self._tally.unread, []
        if not unread:
            return
        figures = torch.stack([step.figures for step in unread]).tolist()  # the one transfer
        first = self.steps - len(unread) + 1
        for number, (step, values) in enumerate(zip(unread, figures, strict=True), first):
            self._count(step, number, *values)

    def _count(self, step: _Step, number: int, loss: float, recon: float, kl: float, norm: float) -> None:
        tally, num_rows = self._tally, len(step.x)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                tally.skipped_steps += 1
                self._skipped_in_a_row += 1
                self._spoiled = (f"{name} is {value}", step.x, step.noise)
                if self._skipped_in_a_row > self.config.max_skipped_steps:
                    self.steps = number
                    self._give_up()
                return
        self._skipped_in_a_row = 0
        tally.num_rows += num_rows
        tally.recon += recon * num_rows
        tally.kl += kl * num_rows
        tally.norms.append(norm)
        tally.clipped_steps += norm > self.config.clip_grad_norm

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
        # Another shape would be compiled for as long again: the last batch of an epoch is not worth that.
        is_compiled = self.config.compile != "none" and len(x) == self.config.batch_size
        terms = self._compiled_terms if is_compiled else self._terms
        recon, kl, paid = terms(x, noise)
        loss = recon + self._kl_weight() * paid
        loss.backward()
        return loss.detach(), recon.detach(), kl.detach()

    def _terms(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, X), noise (B, Z) -> recon, kl and what is paid for kl, means over the batch."""
        with self._autocast():
            outputs, mu, logvar = self.model(x, noise)
        recon = -self.model.likelihood.log_prob(outputs, x).mean()
        kl = gaussian_kl(mu, logvar).mean()
        free_bits = self.config.free_bits
        return recon, kl, free_bits_kl(mu, logvar, free_bits) if free_bits else kl

    @functools.cached_property
    def _compiled_terms(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """`_terms`, by torch.compile. Raises InputError where nothing can be compiled."""
        mode = self.config.compile
        assert mode != "none"
        require_compiler(mode, self.device.type)
        torch.compiler.reset()  # forgets earlier trainers: torch compiles eight versions of a function and no more
        options = torch._inductor.list_mode_options(mode) | {
            "fallback_random": True,  # dropout as without compiling; on a CPU it is faster than the compiler's own
            "compile_threads": torch.get_num_threads(),  # and not a process for each of the machine's cores
        }
        return torch.compile(self._terms, options=options, dynamic=False)

    def _gradient_by_hand(self) -> PlainGradient | None:
        """None: autograd's."""
        if self.config.compile != "none" and self.device.type != "cpu":  # on a CPU it is faster than what is compiled
            return None
        return PlainGradient(self.model, _PRECISIONS[self.config.precision]) if covers(self.model) else None

    def _gradient_norm(self) -> Tensor:
        if self._by_hand is not None:
            return torch.dot(self._by_hand.gradient, self._by_hand.gradient).sqrt()
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

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


def require_compiler(mode: CompileMode, device_type: str) -> None:
    """Raises InputError where this machine cannot compile in such a mode."""
    import torch._inductor.cpp_builder  # with all that compiles: 2 s
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            f"train.compile = {mode} needs a C++ compiler: install g++, or name one in CXX; or set train.compile = none"
        ) from None
    if device_type == "cuda" and not has_triton():
        raise InputError(f"train.compile = {mode} needs Triton for this GPU; or set train.compile = none")


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
