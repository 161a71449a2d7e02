"""The bodies of encoder and decoder: blocks of a linear map, normalisation and activation, dense or convolutional.

Everything here takes one leading dimension; `vae.model` flattens the others and restores them. Channels of images
are dimension 1, units of dense layers the last.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.activations import input_width, make_activation, variance_gain
from vae.config import ActivationName, ModelConfig

# Shapes: N rows, X features, C channels, H and W height and width of an image.

CONV_CHANNEL_DIM = -3
DENSE_CHANNEL_DIM = -1

_KERNEL = 3
_GROUPS = 8  # at most, of normalization = group
_SQUEEZE = 4  # by which squeeze-and-excitation narrows. Hu et al. 2018 have 16, for many more channels
_QUERY_SHARE = 8  # channels of a query and a key of self-attention: one in so many. Zhang et al. 2019


class Block(nn.Module):
    """A hidden layer: linear map -> normalisation -> activation -> attention -> dropout."""

    def __init__(
        self,
        linear: nn.Linear | nn.Conv2d,
        norm: nn.Module,
        activation: nn.Module,
        attention: nn.Module,
        dropout: nn.Module,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm
        self.activation = activation
        self.attention = attention
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.attention(self.activation(self.norm(self.linear(x)))))


class UpConv(nn.Conv2d):
    """(N, C, h, w) -> (N, C', H, W): enlarged by nearest neighbours, then convolved. Odena et al. 2016."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__(in_channels, out_channels, _KERNEL, padding=_KERNEL // 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[-2:] == self.size else F.interpolate(x, self.size))


class Projection(nn.Linear):
    """(N, features) -> (N, C, h, w)."""

    def __init__(self, in_features: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__(in_features, channels * math.prod(size))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (-1, *self.size))


class ToImage(nn.Module):
    """Rows (N, X) of images (H, W, C) -> (N, C, H, W)."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.height, self.width, self.channels = hwc(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.height, self.width, self.channels)).permute(0, 3, 1, 2)


class ImageHead(nn.Module):
    """(N, C', h, w) -> outputs as rows (N, X): an UpConv and a bias for each feature. Linear."""

    def __init__(self, in_channels: int, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        height, width, channels = hwc(image_shape)
        self.conv = UpConv(in_channels, channels, (height, width))
        _xavier_normal(self.conv.weight)
        self.conv.bias = None  # in favour of the one below
        self.bias = nn.Parameter(torch.zeros(height * width * channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1).flatten(1) + self.bias


class SqueezeExcitation(nn.Module):
    """Channels scaled by what all of the image says: (N, C, H, W) -> the same. Hu et al. 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // _SQUEEZE)
        self.squeeze = nn.Linear(channels, narrow)
        self.excite = nn.Linear(narrow, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.excite(self.squeeze(x.mean(dim=(-2, -1))).relu()).sigmoid()
        return x * scale[..., None, None]


class SelfAttention(nn.Module):
    """Every pixel looks at every other: (N, C, H, W) -> the same; nothing at the start. Zhang et al. 2019."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // _QUERY_SHARE)
        self.query, self.key = nn.Conv2d(channels, narrow, 1), nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (head(x).flatten(2).transpose(1, 2) for head in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.weight * seen.transpose(1, 2).reshape(x.shape)


def make_encoder(config: ModelConfig) -> tuple[nn.Sequential, int]:
    """(N, X) -> (N, width), and that width."""
    activation = config.activations[0]
    layers: list[nn.Module] = []
    fan_in = config.input_dim
    if config.body == "conv":
        assert config.image_shape is not None
        sizes, strides = _sizes(config), _strides(config)
        in_channels = hwc(config.image_shape)[2]
        layers.append(ToImage(config.image_shape))
        for index, (channels, stride) in enumerate(zip(config.channels, strides, strict=True)):
            wide = input_width(activation, channels)
            conv = nn.Conv2d(in_channels, wide, _KERNEL, stride=stride, padding=_KERNEL // 2)
            is_last = index == len(strides) - 1
            layers.append(_block(config, activation, conv, channels, is_deepest=is_last))
            in_channels = channels
        layers.append(nn.Flatten())
        fan_in = in_channels * math.prod(sizes[-1])
    layers += _dense_blocks(config, activation, (fan_in, *config.hidden_dims), is_from_image=config.body == "conv")
    return nn.Sequential(*layers), config.hidden_dims[-1] if config.hidden_dims else fan_in


def make_decoder(config: ModelConfig) -> nn.Sequential:
    """(N, Z) -> what `make_outputs` takes."""
    activation = config.activations[1]
    widths = (config.latent_dim, *reversed(config.hidden_dims))
    layers = _dense_blocks(config, activation, widths)
    if config.body == "conv":
        sizes = _sizes(config)
        deepest = config.channels[-1]
        projection = Projection(widths[-1], input_width(activation, deepest), sizes[-1])
        layers.append(_block(config, activation, projection, deepest, is_deepest=True))
        for index in range(len(config.channels) - 1, 0, -1):
            channels = config.channels[index - 1]
            conv = UpConv(config.channels[index], input_width(activation, channels), sizes[index - 1])
            layers.append(_block(config, activation, conv, channels))
    return nn.Sequential(*layers)


def make_outputs(config: ModelConfig) -> nn.Linear | ImageHead:
    """The linear head of the decoder -> (N, X), with a bias (X,)."""
    if config.body == "conv":
        assert config.image_shape is not None
        return ImageHead(config.channels[0], config.image_shape)
    return head(config.hidden_dims[0] if config.hidden_dims else config.latent_dim, config.input_dim)


def head(fan_in: int, width: int, gain: float = 1.0) -> nn.Linear:
    linear = nn.Linear(fan_in, width)
    _xavier_normal(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def _xavier_normal(weight: Tensor, gain: float = 1.0) -> None:
    if not weight.is_meta:  # there torch.normal_ first imports all of torch.compile
        nn.init.xavier_normal_(weight, gain=gain)


def hwc(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(H, W) or (H, W, C) -> height, width, channels."""
    height, width, *channels = image_shape
    return height, width, channels[0] if channels else 1


def _dense_blocks(
    config: ModelConfig, activation: ActivationName, widths: Sequence[int], is_from_image: bool = False
) -> list[nn.Module]:
    """is_from_image: the first of them reads channels of an image that were flattened."""
    return [
        _block(
            config,
            activation,
            nn.Linear(fan_in, input_width(activation, width)),
            width,
            is_from_image=is_from_image and index == 0,
        )
        for index, (fan_in, width) in enumerate(pairwise(widths))
    ]


def _block(
    config: ModelConfig,
    activation: ActivationName,
    linear: nn.Linear | nn.Conv2d,
    width: int,
    is_deepest: bool = False,
    is_from_image: bool = False,
) -> Block:
    """A hidden layer of `width` units or channels behind `linear`, whose weights are drawn anew here."""
    is_conv = isinstance(linear, nn.Conv2d | Projection)
    wide = input_width(activation, width)
    fan_in = linear.weight[0].numel()
    if not linear.weight.is_meta:  # where a model is only counted, gains would cost more than all the rest
        is_from_image = is_from_image or isinstance(linear, nn.Conv2d)  # of the activation before it
        gain = variance_gain(activation, config, fan_in, is_from_image)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(fan_in))
    assert linear.bias is not None
    nn.init.zeros_(linear.bias)
    return Block(
        linear,
        _norm(config, wide, is_conv),
        make_activation(activation, config, width, CONV_CHANNEL_DIM if is_conv else DENSE_CHANNEL_DIM),
        _attention(config, width, is_deepest) if is_conv else nn.Identity(),
        nn.Dropout2d(config.dropout) if is_conv else nn.Dropout(config.dropout),
    )


def _norm(config: ModelConfig, width: int, is_conv: bool) -> nn.Module:
    if config.normalization == "batch":
        return nn.BatchNorm2d(width) if is_conv else nn.BatchNorm1d(width)
    if config.normalization == "none" or (config.normalization == "group" and not is_conv):
        return nn.Identity()
    if not is_conv:
        return nn.LayerNorm(width)
    groups = 1 if config.normalization == "layer" else max(g for g in range(1, _GROUPS + 1) if width % g == 0)
    return nn.GroupNorm(groups, width)


def _attention(config: ModelConfig, channels: int, is_deepest: bool) -> nn.Module:
    if config.attention == "squeeze_excitation":
        return SqueezeExcitation(channels)
    return SelfAttention(channels) if config.attention == "self_attention" and is_deepest else nn.Identity()


def _strides(config: ModelConfig) -> tuple[int, ...]:
    return config.strides or (2,) * len(config.channels)


def _sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """(height, width) behind each convolution of the encoder."""
    assert config.image_shape is not None
    height, width, _ = hwc(config.image_shape)
    sizes = []
    for stride in _strides(config):
        height, width = -(-height // stride), -(-width // stride)
        sizes.append((height, width))
    return sizes
