"""The hidden activations: how each is built, and the gain that keeps the second moment through depth.

The link of the output and the heads of the encoder are linear always; nothing here is applied to them.

Channels are the last dimension of dense layers, channel_dim = -1: (..., width). Those of images stand before height
and width, channel_dim = -3: (N, width, H, W). What is learned for each channel is a vector of one dimension, whatever
its meaning, because the trainer decays only what has two or more.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import ModelConfig

_DENSE = -1  # channel_dim of dense layers

_PRELU_INIT = 0.25  # He et al. 2015
_APL_SPREAD = 2.0  # hinges start within +- this, where 95 % of a standard normal lie

# Powers 0 to 5 and 1 to 4. Our least squares to leaky_relu(0.01) on a grid of step 0.01 in [-12, 12], residuals
# beyond +-3 weighted by 0.05: a fit to [-3, 3] alone is closer there and far off by -6. Odd powers in the denominator
# come out as 0. The tails are lines of one slope, 0.505, on either side, as they must be for degrees 5 and 4.
_PAU_NUMERATOR = (0.070654, 0.505, 0.783411, 0.443661, 0.090504, 0.005503)
_PAU_DENOMINATOR = (0.0, 0.878537, 0.0, 0.010898)

_DYNAMIC_REDUCTION = 8  # Chen et al. 2020, as are the two bounds
_DYNAMIC_SLOPE_BOUND = 1.0
_DYNAMIC_OFFSET_BOUND = 0.5

# A hidden exponential maps the second moment q of its input to g^2 exp(2q). Only for g^2 <= 1/(2e), g <= 0.429,
# is there a stable fixed point; q = 1, which the quadrature would aim at with g = 1/e, is an unstable one. Below
# the bound the signal settles at a small q, and the backward factor, which equals it, stays below 1/2.
_EXPONENTIAL_GAIN = 0.35

_QUADRATURE_LIMIT = 12.0  # the mass of a standard normal beyond it is below 1e-32
_QUADRATURE_NODES = 200  # on each side of 0
_PROBE_ROWS = 512
_CACHED_POWERS = 256


class Exponential(nn.Module):
    """exp(x), unclamped."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class SquaredReLU(nn.Module):
    """max(0, x)^2. So et al. 2021."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


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


class PReLU(nn.Module):
    """x where x > 0, slope * x elsewhere; one learned slope a channel. He et al. 2015.

    torch's own takes dimension 1 for the channels: wrong on (K, B, H), and without a word when B equals H.
    """

    def __init__(self, width: int, channel_dim: int = _DENSE) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.slope = nn.Parameter(torch.full((width,), _PRELU_INIT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, _along(self.slope, self.channel_dim) * x)


class Swish(nn.Module):
    """x * sigmoid(beta * x); one learned beta a channel, silu at the start. Ramachandran et al. 2017."""

    def __init__(self, width: int, channel_dim: int = _DENSE) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.beta = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (_along(self.beta, self.channel_dim) * x).sigmoid()


class AconC(nn.Module):
    """d x sigmoid(beta d x) + p2 x with d = p1 - p2; learned p1, p2 and beta a channel. Ma et al. 2021.

    A smooth maximum of p1 x and p2 x; silu at the start.
    """

    def __init__(self, width: int, channel_dim: int = _DENSE) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.p1 = nn.Parameter(torch.ones(width))
        self.p2 = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        p1, p2, beta = (_along(p, self.channel_dim) for p in (self.p1, self.p2, self.beta))
        scaled = (p1 - p2) * x
        return scaled * (beta * scaled).sigmoid() + p2 * x


class APL(nn.Module):
    """relu(x) + sum of slope_s relu(hinge_s - x); S learned slopes and hinges a channel. Agostinelli et al. 2015.

    Slopes start at 0, so this is relu at the start; hinges start apart from each other, or they would stay together.
    """

    def __init__(self, width: int, hinges: int, channel_dim: int = _DENSE) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.hinges = hinges
        middles = (torch.arange(hinges) + 0.5) / hinges  # of S equal parts of [0, 1]
        # (S * width,), the first hinge of every channel first
        self.slope = nn.Parameter(torch.zeros(hinges * width))
        self.hinge = nn.Parameter((_APL_SPREAD * (2 * middles - 1)).repeat_interleave(width))

    def forward(self, x: Tensor) -> Tensor:
        result = x.relu()
        for slope, hinge in zip(self.slope.chunk(self.hinges), self.hinge.chunk(self.hinges), strict=True):
            result = result + _along(slope, self.channel_dim) * (_along(hinge, self.channel_dim) - x).relu()
        return result


class PAU(nn.Module):
    """P(x) / (1 + |Q(x)|), degrees 5 and 4; 10 learned coefficients a layer. Molina et al. 2020, the safe version.

    leaky_relu(0.01) at the start, as near as such a fraction comes to it. In float32 at least: x^5 has no room in
    the lower precisions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(_PAU_NUMERATOR))  # (6,), of x^0 to x^5
        self.denominator = nn.Parameter(torch.tensor(_PAU_DENOMINATOR))  # (4,), of x^1 to x^4

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        q = wide * _polynomial(self.denominator, wide)
        return (_polynomial(self.numerator, wide) / (1 + q.abs())).to(x.dtype)


class Mixture(nn.Module):
    """Identity, relu and tanh, weighted by the softmax of 3 learned logits a layer. Manessi & Rozza 2019."""

    PARTS = ("identity", "relu", "tanh")

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(self.PARTS)))

    def forward(self, x: Tensor) -> Tensor:
        identity, relu, tanh = self.logits.softmax(0)
        return identity * x + relu * x.relu() + tanh * x.tanh()

    @property
    def weights(self) -> dict[str, float]:
        """Part -> its weight; they add up to 1."""
        return dict(zip(self.PARTS, self.logits.detach().softmax(0).tolist(), strict=True))


class DynamicReLU(nn.Module):
    """max over two pieces of a_k(x) x + b_k(x), a_k and b_k a channel; relu at the start. DY-ReLU-B, Chen et al. 2020.

    a = (1, 0) and b = (0, 0) plus bounded residuals that two learned linear maps take from the layer's input: from
    all its units, or for images from the mean of each channel.
    """

    def __init__(self, width: int, channel_dim: int = _DENSE) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        narrow = max(1, width // _DYNAMIC_REDUCTION)
        self.squeeze = nn.Linear(width, narrow)
        self.coefficients = nn.Linear(narrow, 4 * width)
        nn.init.zeros_(self.coefficients.weight)
        nn.init.zeros_(self.coefficients.bias)

    def forward(self, x: Tensor) -> Tensor:
        summary = x if self.channel_dim == _DENSE else x.mean(dim=(-2, -1))
        residuals = 2 * self.coefficients(self.squeeze(summary).relu()).sigmoid() - 1
        a1, a2, b1, b2 = (_along(r, self.channel_dim) for r in residuals.chunk(4, dim=-1))
        a1, a2 = 1 + _DYNAMIC_SLOPE_BOUND * a1, _DYNAMIC_SLOPE_BOUND * a2
        b1, b2 = _DYNAMIC_OFFSET_BOUND * b1, _DYNAMIC_OFFSET_BOUND * b2
        return torch.maximum(a1 * x + b1, a2 * x + b2)


@dataclass(frozen=True, slots=True)
class Activation:
    """What is known of one activation."""

    name: str
    build: Callable[[ModelConfig, int, int], nn.Module]  # (config, width, channel_dim); see make_activation
    note: str  # formula; what is learned; source
    linear: bool = False  # in evaluation the whole network is an affine map with it
    learned: bool = False  # has parameters of its own that are trained
    expansion: int = 1  # it takes so many times the width that it gives
    gain: float | None = None  # None: from the second moment, see variance_gain
    # (config, width, is_conv) -> E f(Z)^2; None: by quadrature, of what is element-wise
    moment: Callable[[ModelConfig, int, bool], float] | None = None


def _plain(module: Callable[[], nn.Module]) -> Callable[[ModelConfig, int, int], nn.Module]:
    """Builds what depends on nothing."""
    return lambda config, width, channel_dim: module()


_SPECS = (
    Activation("linear", _plain(nn.Identity), "x; the model is a linear VAE", linear=True, gain=1.0),
    Activation(
        "exponential",
        _plain(Exponential),
        "e^x; can't be stable and keep gradients at once, mostly collapses or diverges",
        gain=_EXPONENTIAL_GAIN,
    ),
    Activation("tanh", _plain(nn.Tanh), "hyperbolic tangent; saturates on both sides"),
    Activation("sigmoid", _plain(nn.Sigmoid), "1 / (1 + e^-x); saturates, never centred"),
    Activation("relu", _plain(nn.ReLU), "max(0, x); units can die at high learning rates"),
    Activation(
        "leaky_relu",
        lambda config, width, channel_dim: nn.LeakyReLU(config.leaky_relu_slope),
        "x where x > 0, slope * x elsewhere, with a fixed slope",
    ),
    Activation(
        "prelu",
        lambda config, width, channel_dim: PReLU(width, channel_dim),
        "leaky_relu with a slope learned for each channel, never decayed; He et al. 2015",
        learned=True,
    ),
    Activation(
        "avg_pool",
        lambda config, width, channel_dim: _average(config, channel_dim),
        "moving average over neighbouring units or pixels; a linear map, so the model is a linear VAE",
        linear=True,
        moment=lambda config, width, is_conv: _average_moment(config, width, is_conv),
    ),
    Activation(
        "dropout",
        lambda config, width, channel_dim: (nn.Dropout if channel_dim == _DENSE else nn.Dropout2d)(
            config.activation_dropout
        ),
        "dropout in the place of an activation, of units or channels; a linear VAE with noise in training",
        linear=True,
        gain=1.0,
    ),
    Activation("elu", _plain(nn.ELU), "x where x > 0, e^x - 1 elsewhere"),
    Activation("selu", _plain(nn.SELU), "scaled elu; its gain is 1 by construction"),
    Activation("softplus", _plain(nn.Softplus), "log(1 + e^x), a smooth relu"),
    Activation("gelu", _plain(nn.GELU), "x times the normal distribution function of x"),
    Activation("silu", _plain(nn.SiLU), "x * sigmoid(x), also called Swish"),
    Activation("mish", _plain(nn.Mish), "x * tanh(softplus(x))"),
    Activation("hardswish", _plain(nn.Hardswish), "x * min(max(0, x + 3), 6) / 6, a cheap silu; Howard et al. 2019"),
    Activation(
        "relu2",
        _plain(SquaredReLU),
        "max(0, x)^2; q -> q^2 for the second moment, so depth wants normalisation; So et al. 2021",
    ),
    Activation(
        "relu_avgpool",
        lambda config, width, channel_dim: nn.Sequential(nn.ReLU(), _average(config, channel_dim)),
        "moving average of max(0, x) over neighbouring units or pixels",
        moment=lambda config, width, is_conv: _relu_average_moment(config, width, is_conv),
    ),
    Activation(
        "glu",
        lambda config, width, channel_dim: nn.GLU(channel_dim),
        "a * sigmoid(b), halves of a linear map twice as wide; Dauphin et al. 2017",
        expansion=2,
        # E a^2 sigmoid(b)^2 for independent a and b
        moment=lambda config, width, is_conv: _elementwise_moment("sigmoid", config),
    ),
    Activation(
        "swish",
        lambda config, width, channel_dim: Swish(width, channel_dim),
        "x * sigmoid(beta x) with a beta learned for each channel; Ramachandran et al. 2017",
        learned=True,
    ),
    Activation(
        "acon_c",
        lambda config, width, channel_dim: AconC(width, channel_dim),
        "(p1 - p2) x sigmoid(beta (p1 - p2) x) + p2 x with p1, p2 and beta learned for each channel; Ma et al. 2021",
        learned=True,
    ),
    Activation(
        "apl",
        lambda config, width, channel_dim: APL(width, config.apl_hinges, channel_dim),
        "max(0, x) + sum of a_s max(0, b_s - x) with every a and b learned for each channel; Agostinelli et al. 2015",
        learned=True,
    ),
    Activation(
        "pau",
        _plain(PAU),
        "P5(x) / (1 + |Q4(x)|) with 10 coefficients learned for each layer; Molina et al. 2020",
        learned=True,
    ),
    Activation(
        "mixture",
        _plain(Mixture),
        "w1 x + w2 max(0, x) + w3 tanh(x) with the softmax weights learned for each layer; Manessi & Rozza 2019",
        learned=True,
    ),
    Activation(
        "dynamic_relu",
        lambda config, width, channel_dim: DynamicReLU(width, channel_dim),
        "max of a1 x + b1 and a2 x + b2, which two learned linear maps take from the input; Chen et al. 2020",
        learned=True,
        # it starts as relu, and in the quadrature would mix what are independent values
        moment=lambda config, width, is_conv: _elementwise_moment("relu", config),
    ),
)
ACTIVATIONS: dict[str, Activation] = {spec.name: spec for spec in _SPECS}


def make_activation(name: str, config: ModelConfig, width: int, channel_dim: int = _DENSE) -> nn.Module:
    """The activation `name` of a layer of `width` units or channels, which stand along channel_dim: -1 or -3.

    Keeps the shape of what has input_width(name, width) channels, but for the channels: `width`. Raises ValueError
    for a name that is not known.
    """
    return _spec(name).build(config, width, channel_dim)


def input_width(name: str, width: int) -> int:
    """The channels that the layer before it must give for `width` behind it. Raises ValueError as make_activation."""
    return _spec(name).expansion * width


def variance_gain(name: str, config: ModelConfig, width: int, is_conv: bool = False) -> float:
    """g = 1/sqrt(E f(Z)^2), Z ~ N(0, 1): weights N(0, g^2/fan_in) behind f keep the second moment at 1.

    `width` is that of f; only what mixes the units of a dense layer, and so has ends, depends on it. Learned ones
    are taken as they start. Raises ValueError as make_activation.
    """
    spec = _spec(name)
    if spec.gain is not None:
        return spec.gain
    with torch.device("cpu"), torch.no_grad():  # whichever device the model is being built on, or none
        moment = _elementwise_moment(name, config) if spec.moment is None else spec.moment(config, width, is_conv)
    return 1 / math.sqrt(moment)


def _spec(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _along(values: Tensor, channel_dim: int) -> Tensor:
    """(..., width) -> a view that broadcasts with width along channel_dim."""
    return values[(..., *(None,) * (-1 - channel_dim))]


def _polynomial(coefficients: Iterable[Tensor], x: Tensor) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ..., shaped as x. Horner's rule."""
    result = torch.zeros_like(x)
    for coefficient in reversed(list(coefficients)):
        result = result * x + coefficient
    return result


def _average(config: ModelConfig, channel_dim: int) -> nn.Module:
    """Over neighbouring units, or for images over neighbouring pixels."""
    window = config.avg_pool_window
    if channel_dim == _DENSE:
        return MovingAverage(window)
    return nn.AvgPool2d(window, stride=1, padding=window // 2, count_include_pad=False)


def _elementwise_moment(name: str, config: ModelConfig) -> float:
    """E f(Z)^2 by Gauss-Legendre quadrature, split at 0 where most of these functions have their kink."""
    z, weights, density = _quadrature()
    f = make_activation(name, config, width=1).double()
    values = f(torch.from_numpy(z)[:, None])[:, 0].numpy()
    return float(np.sum(_QUADRATURE_LIMIT / 2 * weights * density * values**2))


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, their weights for an interval of length 2, and the density of a standard normal there."""
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    half = _QUADRATURE_LIMIT * (nodes + 1) / 2
    z = np.concatenate((-half, half))
    return z, np.tile(weights, 2), np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _average_moment(config: ModelConfig, width: int, is_conv: bool) -> float:
    return _average_power(config.avg_pool_window, width, is_conv)


def _relu_average_moment(config: ModelConfig, width: int, is_conv: bool) -> float:
    """Var relu(Z) |A|_F^2 / width + (E relu(Z))^2: rows of A add up to 1, so the mean goes through unchanged."""
    mean_square = 1 / (2 * math.pi)
    return (1 / 2 - mean_square) * _average_power(config.avg_pool_window, width, is_conv) + mean_square


@lru_cache(_CACHED_POWERS)
def _average_power(window: int, width: int, is_conv: bool) -> float:
    """E |A Z|^2 / width = |A|_F^2 / width for the moving average A and Z of independent values of variance 1.

    In images 1/k^2 for a window of k x k: that of interior pixels, and more than this at the edges.
    """
    if is_conv:
        return 1 / window**2
    average = MovingAverage(window)
    total = 0.0
    for start in range(0, width, _PROBE_ROWS):  # A is found by pushing the identity through in pieces
        rows = torch.zeros(min(_PROBE_ROWS, width - start), width, dtype=torch.float64)
        rows.diagonal(offset=start).fill_(1)
        total += float(average(rows).square().sum())
    return total / width
