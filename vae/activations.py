"""The hidden activations: how each is built, and the gain that keeps the second moment through depth.

The link of the output and the heads of the encoder are linear always; nothing here is applied to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import ModelConfig

_PRELU_INIT = 0.25  # He et al. 2015

# A hidden exponential maps the second moment q of its input to g^2 exp(2q). Only for g^2 <= 1/(2e), g <= 0.429,
# is there a stable fixed point; q = 1, which the quadrature would aim at with g = 1/e, is an unstable one. Below
# the bound the signal settles at a small q, and the backward factor, which equals it, stays below 1/2.
_EXPONENTIAL_GAIN = 0.35

_QUADRATURE_LIMIT = 12.0  # the mass of a standard normal beyond it is below 1e-32
_QUADRATURE_NODES = 200  # on each side of 0
_PROBE_ROWS = 512


class Exponential(nn.Module):
    """exp(x), unclamped."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class PReLU(nn.Module):
    """x where x > 0, slope * x elsewhere; one learned slope for each channel of the last dimension.

    torch's own takes dimension 1 for the channels: wrong on (K, B, H), and without a word when B equals H.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((width,), _PRELU_INIT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


class MovingAverage(nn.Module):
    """Mean over a window along the last dimension, stride 1; at the ends over what of the window exists."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        pooled = F.avg_pool1d(rows, self.window, 1, self.window // 2, count_include_pad=False)
        return pooled.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"window={self.window}"


@dataclass(frozen=True, slots=True)
class Activation:
    """What is known of one activation."""

    name: str
    build: Callable[[ModelConfig, int], nn.Module]  # (config, width) -> a module that keeps shapes (..., width)
    note: str
    linear: bool = False  # in evaluation the whole network is an affine map with it
    learned: bool = False  # has parameters of its own that are trained
    own_parameters: tuple[str, ...] = ()  # fields of ModelConfig that no other activation reads
    gain: float | None = None  # None: from the activation itself, see variance_gain


_SPECS = (
    Activation("linear", lambda config, width: nn.Identity(), "x; the model is a linear VAE", linear=True),
    Activation(
        "exponential",
        lambda config, width: Exponential(),
        "e^x; can't be stable and keep gradients at once, mostly collapses or diverges",
        gain=_EXPONENTIAL_GAIN,
    ),
    Activation("tanh", lambda config, width: nn.Tanh(), "hyperbolic tangent; saturates on both sides"),
    Activation("sigmoid", lambda config, width: nn.Sigmoid(), "1 / (1 + e^-x); saturates, never centred"),
    Activation("relu", lambda config, width: nn.ReLU(), "max(0, x); units can die at high learning rates"),
    Activation(
        "leaky_relu",
        lambda config, width: nn.LeakyReLU(config.leaky_relu_slope),
        "x where x > 0, slope * x elsewhere, with a fixed slope",
        own_parameters=("leaky_relu_slope",),
    ),
    Activation(
        "prelu",
        lambda config, width: PReLU(width),
        "leaky_relu with a slope learned for each unit; never decayed",
        learned=True,
    ),
    Activation(
        "avg_pool",
        lambda config, width: MovingAverage(config.avg_pool_window),
        "moving average over neighbouring units; a linear map, so the model is a linear VAE",
        linear=True,
        own_parameters=("avg_pool_window",),
    ),
    Activation(
        "dropout",
        lambda config, width: nn.Dropout(config.activation_dropout),
        "dropout in the place of an activation; the model is a linear VAE with noise in training",
        linear=True,
        own_parameters=("activation_dropout",),
    ),
    Activation("elu", lambda config, width: nn.ELU(), "x where x > 0, e^x - 1 elsewhere"),
    Activation("selu", lambda config, width: nn.SELU(), "scaled elu; its gain is 1 by construction"),
    Activation("softplus", lambda config, width: nn.Softplus(), "log(1 + e^x), a smooth relu"),
    Activation("gelu", lambda config, width: nn.GELU(), "x times the normal distribution function of x"),
    Activation("silu", lambda config, width: nn.SiLU(), "x * sigmoid(x), also called Swish"),
    Activation("mish", lambda config, width: nn.Mish(), "x * tanh(softplus(x))"),
)
ACTIVATIONS: dict[str, Activation] = {spec.name: spec for spec in _SPECS}


def make_activation(config: ModelConfig, width: int) -> nn.Module:
    """The activation `config` names, for a layer of `width` units: (..., width) -> (..., width)."""
    return ACTIVATIONS[config.activation].build(config, width)


def variance_gain(config: ModelConfig, width: int) -> float:
    """g = 1/sqrt(E f(Z)^2), Z ~ N(0, 1): weights N(0, g^2/fan_in) behind f keep the second moment at 1.

    `width` is that of f; only avg_pool, which mixes units and has ends, depends on it.
    """
    spec = ACTIVATIONS[config.activation]
    if spec.gain is not None:
        return spec.gain
    moment = _linear_moment(config, width) if spec.linear else _elementwise_moment(config)
    return 1 / math.sqrt(moment)


@torch.no_grad()
def _elementwise_moment(config: ModelConfig) -> float:
    """E f(Z)^2 by Gauss-Legendre quadrature, split at 0 where most of these functions have their kink."""
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    half = _QUADRATURE_LIMIT * (nodes + 1) / 2
    z = np.concatenate((-half, half))
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    f = make_activation(config, width=1).double()
    values = f(torch.from_numpy(z)[:, None])[:, 0].numpy()
    return float(np.sum(_QUADRATURE_LIMIT / 2 * np.tile(weights, 2) * density * values**2))


@torch.no_grad()
def _linear_moment(config: ModelConfig, width: int) -> float:
    """E |A Z|^2 / width = |A|_F^2 / width; A is found by pushing the identity through in pieces."""
    f = make_activation(config, width).double().eval()
    total = 0.0
    for start in range(0, width, _PROBE_ROWS):
        rows = torch.zeros(min(_PROBE_ROWS, width - start), width, dtype=torch.float64)
        rows.diagonal(offset=start).fill_(1)
        total += float(f(rows).square().sum())
    return total / width
