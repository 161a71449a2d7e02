"""The gradient of the bound by hand, for plain perceptrons with a Bernoulli likelihood: what most studies train.

autograd's own bookkeeping, gradients in memory of their own and a slow cross-entropy take a good part of a step of
small layers, and the two heads are one product here. Whatever else a model has (normalisation, convolutions,
activations that learn, other likelihoods) is autograd's, which is also the oracle that this is tested against.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.config import ActivationName, ModelConfig
from vae.draws import mask_like
from vae.model import LOGVAR_MAX, LOGVAR_MIN, VAE

# Shapes: B batch, X input features, Z latent dimensions, U units of a layer, V of the one before it.

_ALIGNED = 16  # numbers in float32: a line of the cache, a vector of AVX-512
_FACTORS = 16  # from 0.5 to 1, in the products whose logarithms are taken
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017
_CENTRE, _RADIUS = (LOGVAR_MAX + LOGVAR_MIN) / 2, (LOGVAR_MAX - LOGVAR_MIN) / 2
# Tensors, since a sum with one and a factor takes a third of the time of a sum and a product with numbers.
_SHIFT, _HALF_CENTRE, _MINUS_HALF = (torch.tensor(value) for value in (-_CENTRE / _RADIUS, _CENTRE / 2, -0.5))

_aten = torch.ops.aten


class _Elementwise(NamedTuple):
    """h = f(a), which may take the place of a where `by_value`, and dL/da from dL/dh and h (or else a)."""

    forward: Callable[[Tensor, ModelConfig], Tensor]
    backward: Callable[[Tensor, Tensor, ModelConfig], Tensor]
    by_value: bool = False  # f' is a function of h


_ELEMENTWISE: dict[ActivationName, _Elementwise] = {
    "linear": _Elementwise(lambda a, _: a, lambda g, h, _: g, by_value=True),
    "exponential": _Elementwise(lambda a, _: a.exp_(), lambda g, h, _: g * h, by_value=True),
    "tanh": _Elementwise(lambda a, _: a.tanh_(), lambda g, h, _: _aten.tanh_backward(g, h), by_value=True),
    "sigmoid": _Elementwise(lambda a, _: a.sigmoid_(), lambda g, h, _: _aten.sigmoid_backward(g, h), by_value=True),
    "relu": _Elementwise(lambda a, _: a.relu_(), lambda g, h, _: _aten.threshold_backward(g, h, 0), by_value=True),
    "leaky_relu": _Elementwise(
        lambda a, config: _aten.leaky_relu(a, config.leaky_relu_slope),
        lambda g, a, config: _aten.leaky_relu_backward(g, a, config.leaky_relu_slope, False),
    ),
    "elu": _Elementwise(lambda a, _: _aten.elu(a), lambda g, a, _: _aten.elu_backward(g, 1, 1, 1, False, a)),
    "selu": _Elementwise(
        lambda a, _: _aten.selu(a), lambda g, a, _: _aten.elu_backward(g, _SELU_ALPHA, _SELU_SCALE, 1, False, a)
    ),
    "softplus": _Elementwise(lambda a, _: _aten.softplus(a), lambda g, a, _: _aten.softplus_backward(g, a, 1, 20)),
    "gelu": _Elementwise(lambda a, _: _aten.gelu(a), lambda g, a, _: _aten.gelu_backward(g, a)),
    "silu": _Elementwise(lambda a, _: _aten.silu(a), lambda g, a, _: _aten.silu_backward(g, a)),
    "mish": _Elementwise(lambda a, _: _aten.mish(a), lambda g, a, _: _aten.mish_backward(g, a)),
    "hardswish": _Elementwise(lambda a, _: _aten.hardswish(a), lambda g, a, _: _aten.hardswish_backward(g, a)),
}


def covers(model: VAE) -> bool:
    """Whether `PlainGradient` knows such a model."""
    config = model.config
    return (
        type(model) is VAE  # others may have another forward
        and config.body == "mlp"
        and config.likelihood == "bernoulli"
        and config.normalization == "none"
        and all(name in _ELEMENTWISE for name in config.activations)
    )


class PlainGradient:
    """Gradients of a model that it `covers`, whose parameters from now on lie one behind the other in memory.

    bfloat16 is for matrix products and what hidden layers pass on, as under torch.autocast; all else is float32.
    """

    def __init__(self, model: VAE, precision: torch.dtype = torch.float32) -> None:
        assert covers(model)
        self._config, self._precision = model.config, precision
        layers: list[tuple[nn.Module, ...]] = [(block.linear,) for _, _, block in model.blocks()]
        num_encoder = sum(net == "encoder" for net, _, _ in model.blocks())
        layers.insert(num_encoder, (model.mu, model.logvar))  # one layer of 2 Z units
        layers.append((model.outputs,))
        pieces = [[getattr(linear, name) for linear in layer] for layer in layers for name in ("weight", "bias")]
        values = torch.zeros(sum(_room(piece) for piece in pieces), device=model.device)
        self._values, self._factors = values, values if precision == values.dtype else values.to(precision)
        self.gradient = torch.zeros_like(values)
        """Of all parameters, in one piece."""
        self._products = self.gradient if precision == values.dtype else self.gradient.to(precision)
        self._parameters: list[tuple[nn.Parameter, Tensor]] = []  # and their gradients
        self._end = 0
        affine = [_Affine(*self._place(pieces[i]), *self._place(pieces[i + 1])) for i in range(0, len(pieces), 2)]
        self._encoder, self._heads = affine[:num_encoder], affine[num_encoder]
        self._decoder, self._outputs = affine[num_encoder + 1 : -1], affine[-1]

    def backward(
        self, x: Tensor, noise: Tensor, kl_weight: float, free_bits: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, X), noise (B, Z) -> loss, recon and kl, means over the batch; fills in all gradients."""
        if self._factors is not self._values:
            self._factors.copy_(self._values)
        encoder, decoder = self._config.activations
        hidden, encoded = self._hidden(x.to(self._precision), self._encoder, encoder)
        mu, raw = self._heads.forward(hidden).float().chunk(2, dim=1)
        bend = torch.add(_SHIFT, raw, alpha=1 / _RADIUS).tanh_()  # logvar is _CENTRE + _RADIUS * bend
        log_deviation = torch.add(_HALF_CENTRE, bend, alpha=_RADIUS / 2)
        deviation = log_deviation.exp()
        z = torch.addcmul(mu, deviation, noise)
        before_outputs, decoded = self._hidden(z.to(self._precision), self._decoder, decoder)
        recon, grad = _cross_entropy(self._outputs.forward(before_outputs).float(), x)

        grad = grad.to(self._precision)
        self._outputs.backward(grad, before_outputs)
        lowest, grad = self._back(self._outputs, grad, decoded, decoder)
        z_grad = (grad @ lowest.weight).float()
        variance = deviation.square()
        kl_mean = torch.addcmul(variance, mu, mu).sub_(log_deviation, alpha=2).mean(dim=0)
        kl_mean = torch.add(_MINUS_HALF, kl_mean, alpha=0.5)
        paid = kl = kl_mean.sum()
        weights = torch.full_like(kl_mean, kl_weight / len(x))
        if free_bits:
            paid = kl_mean.clamp(min=free_bits).sum()
            weights *= kl_mean >= free_bits
        mu_grad = torch.addcmul(z_grad, mu, weights)
        log_deviation_grad = (z_grad * noise).mul_(deviation).addcmul_(variance.sub_(1), weights)
        raw_grad = _aten.tanh_backward(log_deviation_grad, bend).div_(2)
        heads_grad = torch.cat((mu_grad, raw_grad), dim=1).to(self._precision)
        self._heads.backward(heads_grad, hidden)
        self._back(self._heads, heads_grad, encoded, encoder)
        if self._products is not self.gradient:
            self.gradient.copy_(self._products)
        for parameter, gradient in self._parameters:
            parameter.grad = gradient
        return recon + kl_weight * paid, recon, kl

    def _hidden(self, x: Tensor, layers: Sequence["_Affine"], name: ActivationName) -> tuple[Tensor, list["_Passed"]]:
        """x (B, V) through hidden layers -> (B, U), and what the way back takes."""
        activation, dropout, passed = _ELEMENTWISE[name], self._config.dropout, []
        for layer in layers:
            a = layer.forward(x)
            h = activation.forward(a, self._config)
            mask = (mask_like(h, 1 - dropout) / (1 - dropout)).to(h.dtype) if dropout else None
            passed.append(_Passed(layer, x, h if activation.by_value else a, mask))
            x = h if mask is None else h * mask
        return x, passed

    def _back(
        self, layer: "_Affine", grad: Tensor, passed: Sequence["_Passed"], name: ActivationName
    ) -> tuple["_Affine", Tensor]:
        """From dL/dy of the layer behind these hidden ones -> the first of them, and dL/dy of that."""
        for below, x, seen, mask in reversed(passed):
            grad = grad @ layer.weight
            grad = _ELEMENTWISE[name].backward(grad if mask is None else grad * mask, seen, self._config)
            below.backward(grad, x)
            layer = below
        return layer, grad

    def _place(self, piece: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Moves parameters to the end of what is placed -> all of them as one factor, and the gradient of that."""
        start = self._end
        for parameter in piece:
            where, shape = slice(start, start + parameter.numel()), parameter.shape
            self._values[where] = parameter.detach().flatten()
            parameter.data = self._values[where].view(shape)
            self._parameters.append((parameter, self.gradient[where].view(shape)))
            start = where.stop
        whole = slice(self._end, start)
        self._end += _room(piece)
        return self._factors[whole].view(-1, *shape[1:]), self._products[whole].view(-1, *shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class _Affine:
    """y = x W^T + b, and its gradients, all in one precision."""

    weight: Tensor  # (U, V)
    weight_grad: Tensor
    bias: Tensor  # (U,)
    bias_grad: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())

    def backward(self, grad: Tensor, x: Tensor) -> None:
        """dL/dy (B, U), x (B, V) -> the gradients of weight and bias."""
        torch.mm(grad.t(), x, out=self.weight_grad)
        torch.sum(grad, 0, out=self.bias_grad)


class _Passed(NamedTuple):
    """What a hidden layer leaves for the way back."""

    layer: _Affine
    x: Tensor
    seen: Tensor  # h or a
    mask: Tensor | None


def _cross_entropy(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, X), which are used up, and (B, X) -> -log p(x|z) in nats, a mean over B of sums over X; its gradient (B, X).

    The sum of max(logit, 0) - x logit + log(1 + exp(-|logit|)), whose last term is -log max(p, 1 - p) of what the
    gradient takes anyhow, p = sigmoid(logit); logarithms are of products.
    """
    p = logits.sigmoid()
    likelier = (p - 0.5).abs_().add_(0.5)
    factors = _FACTORS if likelier.numel() % _FACTORS == 0 else 1
    likelier = likelier.view(factors, -1).prod(dim=0)
    expected = torch.dot(x.flatten(), logits.flatten())
    recon = logits.relu_().sum() - expected - likelier.log_().sum()
    return recon / len(x), p.sub_(x).div_(len(x))


def _room(piece: Sequence[nn.Parameter]) -> int:
    return -(-sum(parameter.numel() for parameter in piece) // _ALIGNED) * _ALIGNED
