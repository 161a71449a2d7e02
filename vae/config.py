"""What a model, its training and its data are made of: frozen, checked when built, and free of torch."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

ActivationName = Literal[
    "linear",
    "exponential",
    "tanh",
    "sigmoid",
    "relu",
    "leaky_relu",
    "prelu",
    "avg_pool",
    "dropout",
    "elu",
    "selu",
    "softplus",
    "gelu",
    "silu",
    "mish",
]
LikelihoodName = Literal["bernoulli"]
LrSchedule = Literal["constant", "cosine", "warmup_cosine"]
Scale = Literal["auto", "none", "minmax"]
Binarize = Literal["none", "threshold", "static", "dynamic"]


class InputError(ValueError):
    """Something the user can mend: a file, a value, a flag. The text says where, what, and what would do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: str, literal: object) -> None:
    _require(value in get_args(literal), f"unknown {name} {value!r}; known: {', '.join(get_args(literal))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture. Every value is what `config.json` of an exported model holds."""

    input_dim: int
    latent_dim: int = 16
    hidden_dims: tuple[int, ...] = (128, 128)  # encoder's order; the decoder mirrors it; () is a linear VAE
    activation: ActivationName = "silu"
    leaky_relu_slope: float = 0.01  # of activation = leaky_relu alone
    avg_pool_window: int = 3  # of activation = avg_pool alone; odd
    activation_dropout: float = 0.2  # rate of activation = dropout alone
    dropout: float = 0.0  # after every hidden activation, whichever it is
    likelihood: LikelihoodName = "bernoulli"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        _require(self.input_dim >= 1, f"input_dim must be at least 1, got {self.input_dim}")
        _require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        _require(all(w >= 1 for w in self.hidden_dims), f"hidden_dims must be positive, got {self.hidden_dims}")
        _require_choice("activation", self.activation, ActivationName)
        _require_choice("likelihood", self.likelihood, LikelihoodName)
        _require(0 <= self.leaky_relu_slope <= 1, f"leaky_relu_slope must lie in [0, 1], got {self.leaky_relu_slope}")
        _require(
            self.avg_pool_window >= 1 and self.avg_pool_window % 2 == 1,
            f"avg_pool_window must be odd and positive, got {self.avg_pool_window}",
        )
        _require(
            0 <= self.activation_dropout < 1, f"activation_dropout must lie in [0, 1), got {self.activation_dropout}"
        )
        _require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def num_weights(self) -> int:
        """Weights and biases of the model, known without building it; learned slopes come on top."""
        encoder = (self.input_dim, *self.hidden_dims)
        decoder = (self.latent_dim, *reversed(self.hidden_dims))
        layers = [*pairwise(encoder), *pairwise(decoder)]
        layers += [(encoder[-1], 2 * self.latent_dim), (decoder[-1], self.input_dim)]
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained. Rates are per step of Adam, lengths are epochs."""

    learning_rate: float = 3e-3  # the peak, where the schedule varies it
    lr_schedule: LrSchedule = "cosine"  # over max_epochs, to 0; warmup_cosine rises for a twentieth of the steps first
    batch_size: int = 64
    max_epochs: int = 60
    beta: float = 1.0  # weight of the KL term once warm; the selection metric is at 1 whatever it is
    kl_warmup_epochs: int = 5  # linear from 0 to beta, step by step
    weight_decay: float = 0.0  # decoupled (AdamW); never on biases or learned slopes
    clip_grad_norm: float = 100.0  # a safety net: the global norm beyond which a gradient is scaled down

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < math.inf, f"learning_rate must be positive, got {self.learning_rate}")
        _require_choice("lr_schedule", self.lr_schedule, LrSchedule)
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        _require(self.max_epochs >= 1, f"max_epochs must be at least 1, got {self.max_epochs}")
        _require(0 <= self.beta < math.inf, f"beta must be at least 0, got {self.beta}")
        _require(self.kl_warmup_epochs >= 0, f"kl_warmup_epochs must be at least 0, got {self.kl_warmup_epochs}")
        _require(0 <= self.weight_decay < math.inf, f"weight_decay must be at least 0, got {self.weight_decay}")
        _require(self.clip_grad_norm > 0, f"clip_grad_norm must be positive, got {self.clip_grad_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the data are and how they become a training, a validation and a test split in [0, 1]."""

    source: str = "digits"  # digits | mnist | fashion-mnist | the path of a .npy, .npz, .csv or .parquet file
    data_dir: str | None = None  # where the idx files of mnist and fashion-mnist are
    key: str | None = None  # the array of a .npz file that holds more than one
    columns: tuple[str, ...] | None = None  # the columns of a .csv or .parquet file to use; None: all
    image_shape: tuple[int, ...] | None = None  # (H, W) or (H, W, C) of flat rows that are images
    scale: Scale = "auto"  # auto: integers of 8 bits / 255, floats as they are; minmax: by the training split
    binarize: Binarize = "dynamic"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1  # of sources without a test split of their own
    seed: int = 0  # of the split, of static binarisation and of the noise the validation value is taken with

    def __post_init__(self) -> None:
        for name in ("columns", "image_shape"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _require(bool(self.source), "source must not be empty")
        _require_choice("scale", self.scale, Scale)
        _require_choice("binarize", self.binarize, Binarize)
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"{name} must lie between 0 and 1, got {value}")
        _require(
            self.validation_fraction + self.test_fraction < 1,
            "validation_fraction and test_fraction must leave rows to train on",
        )
        _require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
