"""What a model, its training and its data are made of: frozen, checked when built, and free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
    "hardswish",
    "relu2",
    "relu_avgpool",
    "glu",
    "swish",
    "acon_c",
    "apl",
    "pau",
    "mixture",
    "dynamic_relu",
]
ActivationScope = Literal["shared", "separate"]
Body = Literal["mlp", "conv"]
Normalization = Literal["none", "layer", "batch", "group"]
Attention = Literal["none", "squeeze_excitation", "self_attention"]
LikelihoodName = Literal["bernoulli", "continuous_bernoulli", "gaussian", "poisson", "negative_binomial"]
GaussianScale = Literal["shared", "per_dimension"]
LrSchedule = Literal["constant", "cosine", "warmup_cosine"]
TrainObjective = Literal["elbo", "vae_gan"]
KlSchedule = Literal["linear", "cyclical"]
Precision = Literal["float32", "bfloat16"]
CompileMode = Literal["none", "default", "reduce-overhead", "max-autotune"]
Scale = Literal["auto", "none", "minmax", "standard"]
Binarize = Literal["none", "threshold", "static", "dynamic"]
Support = Literal["unit", "real", "counts"]

OWN_PARAMETERS: Mapping[str, tuple[ActivationName, ...]] = {
    "leaky_relu_slope": ("leaky_relu",),
    "avg_pool_window": ("avg_pool", "relu_avgpool"),
    "activation_dropout": ("dropout",),
    "apl_hinges": ("apl",),
}
"""Field of ModelConfig -> the activations that read it; for all others it means nothing."""

SUPPORTS: Mapping[LikelihoodName, Support] = {
    "bernoulli": "unit",
    "continuous_bernoulli": "unit",
    "gaussian": "real",
    "poisson": "counts",
    "negative_binomial": "counts",
}
"""Likelihood -> the values it speaks of: [0, 1], any real number, or whole numbers from 0."""


class InputError(ValueError):
    """Something the user can mend: a file, a value, a flag. The text says where, what, and what would do."""


def printable(text: str, but: str = "") -> str:
    """`text`, of which nothing steers a terminal: what prints nothing is escaped, except for what is in `but`."""
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


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
    body: Body = "mlp"
    hidden_dims: tuple[int, ...] = (128, 128)  # encoder's order; the decoder mirrors it; an mlp with () is a linear VAE
    activation: ActivationName = "silu"
    decoder_activation: ActivationName | None = None  # None: that of the encoder
    leaky_relu_slope: float = 0.01
    avg_pool_window: int = 3  # units, or pixels each way; odd
    activation_dropout: float = 0.2  # rate of activation = dropout
    apl_hinges: int = 2
    dropout: float = 0.0  # after every hidden activation, whichever it is
    normalization: Normalization = "none"  # before every hidden activation; group: of body = conv alone
    likelihood: LikelihoodName = "bernoulli"
    gaussian_scale: GaussianScale = "shared"  # of likelihood = gaussian alone: one sigma, or one a feature
    image_shape: tuple[int, ...] | None = None  # (H, W) or (H, W, C) of a row; needed by body = conv
    channels: tuple[int, ...] = (32, 64)  # of body = conv: its convolutions stand before the layers of hidden_dims
    strides: tuple[int, ...] | None = None  # of body = conv, one a convolution; None: 2 each
    attention: Attention = "none"  # of body = conv: behind each convolution, or for self_attention the last

    def __post_init__(self) -> None:
        for name in ("hidden_dims", "channels", "strides", "image_shape"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _require(self.input_dim >= 1, f"input_dim must be at least 1, got {self.input_dim}")
        _require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        for name in ("hidden_dims", "channels"):
            value = getattr(self, name)
            _require(all(width >= 1 for width in value), f"{name} must be positive, got {value}")
        choices = {
            "body": Body,
            "activation": ActivationName,
            "normalization": Normalization,
            "likelihood": LikelihoodName,
            "gaussian_scale": GaussianScale,
            "attention": Attention,
        }
        for name, literal in choices.items():
            _require_choice(name, getattr(self, name), literal)
        if self.decoder_activation is not None:
            _require_choice("decoder_activation", self.decoder_activation, ActivationName)
        _require(0 <= self.leaky_relu_slope <= 1, f"leaky_relu_slope must lie in [0, 1], got {self.leaky_relu_slope}")
        _require(
            self.avg_pool_window >= 1 and self.avg_pool_window % 2 == 1,
            f"avg_pool_window must be odd and positive, got {self.avg_pool_window}",
        )
        _require(
            0 <= self.activation_dropout < 1, f"activation_dropout must lie in [0, 1), got {self.activation_dropout}"
        )
        _require(self.apl_hinges >= 1, f"apl_hinges must be at least 1, got {self.apl_hinges}")
        _require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        if self.body == "conv":
            self._check_conv()
        else:
            _require(self.normalization != "group", "normalization = group needs body = conv")
            _require(self.attention == "none", f"attention = {self.attention} needs body = conv")

    def _check_conv(self) -> None:
        shape = self.image_shape
        _require(shape is not None, "body = conv needs images: an image_shape of (H, W) or (H, W, C)")
        assert shape is not None
        _require(
            len(shape) in (2, 3) and math.prod(shape) == self.input_dim,
            f"image_shape {shape} must be (H, W) or (H, W, C) and make input_dim = {self.input_dim} values",
        )
        _require(bool(self.channels), "body = conv needs channels, one number a convolution")
        if self.strides is not None:
            _require(
                len(self.strides) == len(self.channels) and all(stride >= 1 for stride in self.strides),
                f"strides {self.strides} must be positive, one for each of the channels {self.channels}",
            )

    @property
    def activations(self) -> tuple[ActivationName, ActivationName]:
        """That of the encoder and that of the decoder."""
        return self.activation, self.decoder_activation or self.activation


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained. Rates are per step of Adam, lengths are epochs."""

    objective: TrainObjective = "elbo"  # vae_gan: a discriminator's features judge reconstructions. Larsen et al. 2016
    learning_rate: float = 3e-3  # the peak, where the schedule varies it
    lr_schedule: LrSchedule = "cosine"  # over max_epochs, to 0; warmup_cosine rises for a twentieth of the steps first
    batch_size: int = 64
    max_epochs: int = 60
    beta: float = 1.0  # weight of the KL term once warm; the selection metric is at 1 whatever it is
    kl_warmup_epochs: int = 5  # linear from 0 to beta, step by step
    kl_schedule: KlSchedule = "linear"  # cyclical: the warm-up comes again, kl_cycles times over max_epochs
    kl_cycles: int = 4
    free_bits: float = 0.0  # nats of each latent dimension that cost nothing in training. Kingma et al. 2016
    weight_decay: float = 0.0  # decoupled (AdamW); never on biases or learned slopes
    clip_grad_norm: float = 100.0  # a safety net: the global norm beyond which a gradient is scaled down
    max_skipped_steps: int = 10  # in a row, for a loss or gradient that is not finite; one more and it has diverged
    ema_decay: float = 0.0  # of the averaged weights, which are then what is validated and exported; 0: no averaging
    precision: Precision = "float32"  # of the matrix products in training; validation is in float32 always
    compile: CompileMode = "none"  # torch.compile's modes, of training alone; on a CPU plain perceptrons don't need it

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < math.inf, f"learning_rate must be positive, got {self.learning_rate}")
        _require_choice("objective", self.objective, TrainObjective)
        _require_choice("lr_schedule", self.lr_schedule, LrSchedule)
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        _require(self.max_epochs >= 1, f"max_epochs must be at least 1, got {self.max_epochs}")
        _require(0 <= self.beta < math.inf, f"beta must be at least 0, got {self.beta}")
        _require(self.kl_warmup_epochs >= 0, f"kl_warmup_epochs must be at least 0, got {self.kl_warmup_epochs}")
        _require(0 <= self.weight_decay < math.inf, f"weight_decay must be at least 0, got {self.weight_decay}")
        _require_choice("kl_schedule", self.kl_schedule, KlSchedule)
        _require(self.kl_cycles >= 1, f"kl_cycles must be at least 1, got {self.kl_cycles}")
        _require(0 <= self.free_bits < math.inf, f"free_bits must be at least 0, got {self.free_bits}")
        _require(self.clip_grad_norm > 0, f"clip_grad_norm must be positive, got {self.clip_grad_norm}")
        _require(self.max_skipped_steps >= 0, f"max_skipped_steps must be at least 0, got {self.max_skipped_steps}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        _require_choice("precision", self.precision, Precision)
        _require_choice("compile", self.compile, CompileMode)
        _require(self.compile == "none" or self.objective == "elbo", f"compile = {self.compile} needs objective = elbo")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the data are and how they become a training, a validation and a test split."""

    source: str = "digits"  # digits | mnist | fashion-mnist | the path of a .npy, .npz, .csv or .parquet file
    data_dir: str | None = None  # where the idx files of mnist and fashion-mnist are
    key: str | None = None  # the array of a .npz file that holds more than one
    columns: tuple[str, ...] | None = None  # the columns of a .csv or .parquet file to use; None: all
    image_shape: tuple[int, ...] | None = None  # (H, W) or (H, W, C) of flat rows that are images
    support: Support = "unit"  # what the rows must be for the likelihood: see SUPPORTS
    scale: Scale = "auto"  # auto: 8-bit integers / 255, else as they are, but standard for tables on support = real
    binarize: Binarize = "dynamic"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1  # of sources without a test split of their own
    seed: int = 0  # of the split, of static binarisation and of the noise the validation value is taken with

    def __post_init__(self) -> None:
        for name in ("columns", "image_shape"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _require(bool(self.source), "source must not be empty")
        _require_choice("support", self.support, Support)
        _require_choice("scale", self.scale, Scale)
        _require_choice("binarize", self.binarize, Binarize)
        if self.support != "unit":
            _require(self.binarize == "none", f"binarize = {self.binarize} is for data in [0, 1]; set binarize = none")
        if self.support == "counts":
            _require(self.scale in ("auto", "none"), f"scale = {self.scale} would spoil counts; set scale = none")
        if self.support == "unit":
            _require(self.scale != "standard", "scale = standard leaves [0, 1], where a Bernoulli likelihood lives")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"{name} must lie between 0 and 1, got {value}")
        _require(
            self.validation_fraction + self.test_fraction < 1,
            "validation_fraction and test_fraction must leave rows to train on",
        )
        _require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
