"""What the hidden layers and the posterior of a model are up to, measured on a fixed probe batch.

Nothing is drawn at random and nothing is left behind: mode, gradients and generators are as they were. A model
that isn't finite raises nothing either: the figures it spoils are nan or inf, and its flag is "not finite".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae.activations import ACTIVATIONS, Mixture
from vae.config import ActivationName
from vae.layers import Block, ImageHead
from vae.model import LOGVAR_MAX, LOGVAR_MIN, VAE, evaluating
from vae.objective import ACTIVE_VARIANCE, elbo_terms, gaussian_kl, kl_per_dimension

# Shapes: B rows of the probe, X input features, Z latent dimensions, U units of a layer (or channels), E examples
# of a unit (rows, or all positions of all rows), ... the positions of a channel, which dense layers haven't got.

# What each figure means.
DEAD_SLOPE = 1e-3  # |f'| up to this share of its supremum, for every example. After Lu et al. 2019, for ReLU there
SATURATED_SLOPE = 0.05  # |f'| below this share: |tanh| beyond 0.975. After Glorot & Bengio 2010; the value is ours
DORMANT_SCORE = 0.025  # E|h| up to this share of the layer's mean. Sokar et al. 2023
KL_ACTIVE = 0.01  # mean nats beyond which a latent dimension is in use
COLLAPSE_EPSILON, COLLAPSE_DELTA = 0.01, 0.01  # KL below epsilon nats but for a share delta of x. Lucas et al. 2019
CLAMPED_MARGIN = 0.01  # of the range of logvar, from either end

# Beyond what it is flagged. Heuristics of ours, set from runs on the digits.
MAX_DEAD, MAX_DORMANT, MAX_SATURATED = 0.2, 0.3, 0.5  # of any layer
MIN_NET_RATIO = 0.03  # gradient ratio of a net's first layer to its last. After Glorot & Bengio 2010
MAX_GRADIENT_RATIO = 50.0  # of any hidden layer
MIN_DRIFT, MAX_DRIFT = 0.1, 10.0  # second moment to that of the net's first layer; constant in mean-field theory
MIN_ACTIVE_SHARE = 0.5  # active units to latent dimensions
MIN_RATE = 0.1  # nats
MAX_AGGREGATED_KL = 1.0  # nats; beyond it samples from the prior are poor. Hoffman & Johnson 2016
INIT_FLAGS = ("exploding", "moment drift")  # are about the first weights; in training they may come and mean nothing

# E|h| of a unit that sits at a constant is no sign of life, so these are centred: dopamine's sub_mean_score.
_CENTRED = ("sigmoid", "softplus", "exponential")
_MIXING = ("relu_avgpool", "dynamic_relu")  # units depend on their neighbours; of avg_pool too, but it is linear
_LEARNED_BY_UNIT = ("prelu", "swish", "acon_c", "apl")
# |f'| has its supremum within _REACH of 0. Where it has none, what it reaches a standard deviation out stands in.
_UNBOUNDED = ("exponential", "relu2")
_REACH, _REACH_UNBOUNDED = 8.0, 1.0
_GRID_POINTS = 1001
_CHUNK_PAIRS = 2**22  # of a z and a component of the mixture at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class LayerDiagnostics:
    """A hidden layer h = f(a); units are channels where it is convolutional, and every position is an example."""

    net: str  # encoder | decoder
    layer: int  # from 0, in the order of the data
    width: int  # units, or channels; of glu those that come out
    dead: float  # share of units; of glu those whose gate is shut; 0 for a linear activation
    dormant: float  # share of units
    saturated: float  # share of (example, unit); 0 for a linear activation, around a half by nature for ReLU
    gradient_ratio: float  # |dL/dW| / |W|, L the mean nelbo at beta = 1
    second_moment: float  # E a^2
    mixture: list[float] | None  # weights of activation = mixture, in the order of Mixture.PARTS


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Of a model on a probe batch; rates and information in nats per example.

    rate = mutual_information + aggregated_kl, and q(z) is the mean of the probe's own posteriors. A z meets its own
    among them, so the information is log B at most, and once it comes near that it is too low and aggregated_kl
    too high by as much. With its own left out the error is the other way; so the two estimates enclose the truth,
    but for the noise of the sample. Hoffman & Johnson 2016.
    """

    layers: list[LayerDiagnostics]
    rate: float  # E KL(q(z|x) || p(z))
    distortion: float  # -E log p(x|z)
    active_units: int  # Var_x(E[z|x]) > ACTIVE_VARIANCE
    kl_active_units: int
    collapsed_share: float  # of latent dimensions
    mutual_information: float
    aggregated_kl: float  # KL(q(z) || p(z)), z's own posterior in q(z)
    aggregated_kl_low: float  # the same, its own left out: a low estimate, and the one that is flagged
    logvar_clamped: float  # share of (x, latent dimension)
    encoder_gradient_ratio: float  # that of the first hidden layer to that of the head for mu
    decoder_gradient_ratio: float  # that of the first hidden layer to that of the outputs
    flags: list[str]  # the thresholds that are crossed; see INIT_FLAGS


def diagnose(model: VAE, probe: Tensor, noise: Tensor) -> Diagnostics:
    """probe (B, X) as in the Dataset, of a split not trained on; noise (B, Z) ~ N(0, I)."""
    blocks = model.blocks()
    encoder = [block.linear for net, _, block in blocks if net == "encoder"]
    decoder = [block.linear for net, _, block in blocks if net == "decoder"]
    outputs_linear = model.outputs.conv if isinstance(model.outputs, ImageHead) else model.outputs
    weights = [linear.weight for linear in (*encoder, model.mu, *decoder, outputs_linear)]
    with evaluating(model), torch.enable_grad(), _requiring_grad(weights):
        with _watching(blocks) as seen:
            outputs, mu, logvar = model(probe, noise)
        recon = -model.likelihood.log_prob(outputs, probe)
        ratios = _gradient_ratios((recon + gaussian_kl(mu, logvar)).mean(), weights)
        heads = len(encoder), len(weights) - 1
        hidden = [ratio for index, ratio in enumerate(ratios) if index not in heads]
        layers = [
            _layer(net, index, model.config.activations[net == "decoder"], block, a, h, ratio)
            for (net, index, block), (a, h), ratio in zip(blocks, seen, hidden, strict=True)
        ]
    mu, logvar = mu.detach().double(), logvar.detach().double()
    kl = kl_per_dimension(mu, logvar)
    rate = kl.sum(dim=-1).mean().item()
    information, information_high = _mutual_information(mu, logvar, noise.double())
    margin = CLAMPED_MARGIN * (LOGVAR_MAX - LOGVAR_MIN)
    figures = Diagnostics(
        layers=layers,
        rate=rate,
        distortion=recon.detach().double().mean().item(),
        active_units=int((mu.var(dim=0, correction=0) > ACTIVE_VARIANCE).sum()),
        kl_active_units=int((kl.mean(dim=0) > KL_ACTIVE).sum()),
        collapsed_share=_share((kl < COLLAPSE_EPSILON).double().mean(dim=0) >= 1 - COLLAPSE_DELTA, kl),
        mutual_information=information,
        aggregated_kl=rate - information,
        aggregated_kl_low=rate - information_high,
        logvar_clamped=_share((logvar < LOGVAR_MIN + margin) | (logvar > LOGVAR_MAX - margin), logvar),
        encoder_gradient_ratio=_quotient(ratios[0], ratios[heads[0]]),
        decoder_gradient_ratio=_quotient(ratios[heads[0] + 1], ratios[heads[1]]),
        flags=[],
    )
    figures.flags.extend(_flags(figures, model.config.latent_dim))
    return figures


def locate_non_finite(model: VAE, x: Tensor, noise: Tensor) -> str | None:
    """x (B, X), noise (B, Z) -> where loss or gradient cease to be finite: "encoder.1", "mu", "outputs", "loss", ...

    It is the first part, from "input" on, whose values aren't finite in a forward pass; else the first on the way
    back from the loss with such a gradient; None if there is neither. In evaluation mode: what a dropout mask or
    the statistics of a batch bring about isn't found.
    """
    blocks = [(f"{net}.{index}", block) for net, index, block in model.blocks()]
    parts: dict[str, nn.Module] = {
        **{name: block for name, block in blocks if name.startswith("encoder")},
        "mu": model.mu,
        "logvar": model.logvar,
        **{name: block for name, block in blocks if name.startswith("decoder")},
        "outputs": model.outputs,
    }
    found: list[str] = [] if model.likelihood.encoder_input(x).isfinite().all() else ["input"]

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    handles = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    try:
        with evaluating(model), torch.enable_grad():
            loss = elbo_terms(model, x, noise).nelbo.mean()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not loss.isfinite():
        return "loss"
    backwards = {"likelihood": model.likelihood, **dict(reversed(parts.items()))}
    owners = [(name, p) for name, part in backwards.items() for p in part.parameters() if p.requires_grad]
    if not owners:
        return None
    gradients = torch.autograd.grad(loss, [p for _, p in owners], allow_unused=True)
    broken = (
        name
        for (name, _), gradient in zip(owners, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    )
    return next(broken, None)


def _layer(
    net: str, index: int, name: ActivationName, block: Block, a: Tensor, h: Tensor, gradient_ratio: float
) -> LayerDiagnostics:
    """a, h (B, U, ...): what goes into the activation and what comes out; the a of glu has 2 U."""
    dead = saturated = 0.0
    if not ACTIVATIONS[name].linear:
        slopes = _slopes(block.activation, a)[:, : h.shape[1]]  # of glu by the linear half: the gates
        bound = _supremum(name, block.activation, slopes)
        slopes = _by_unit(slopes)
        dead = _share(slopes.amax(dim=0) <= DEAD_SLOPE * bound, a)
        saturated = _share(slopes < SATURATED_SLOPE * bound, a)
    values = _by_unit(h)
    size = (values - values.mean(dim=0) if name in _CENTRED else values).abs().mean(dim=0)
    return LayerDiagnostics(
        net=net,
        layer=index,
        width=h.shape[1],
        dead=dead,
        dormant=_share(size <= DORMANT_SCORE * size.mean(), size),
        saturated=saturated,
        gradient_ratio=gradient_ratio,
        second_moment=_norm(a).square().div(a.numel()).item(),
        mixture=list(block.activation.weights.values()) if isinstance(block.activation, Mixture) else None,
    )


def _slopes(activation: nn.Module, a: Tensor) -> Tensor:
    """a (B, U, ...) -> |f'(a)|, of its shape, by autograd of the sum.

    Where an activation mixes units these are column sums of its Jacobian: what a unit moves in all of the layer.
    """
    a = a.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(activation(a).sum(), a)
    return slopes.abs()


def _supremum(name: ActivationName, activation: nn.Module, slopes: Tensor) -> Tensor:
    """slopes (B, U, ...) -> sup|f'|, (U,) where each unit learns its own f, else (1,) or ().

    Over a grid; where f mixes units, the largest of `slopes`.
    """
    if name == "glu":
        return slopes.new_ones(())  # that of the gate, a sigmoid
    if name in _MIXING:
        return slopes.max()
    reach = _REACH_UNBOUNDED if name in _UNBOUNDED else _REACH
    grid = torch.linspace(-reach, reach, _GRID_POINTS, dtype=slopes.dtype, device=slopes.device)
    units = slopes.shape[1] if name in _LEARNED_BY_UNIT else 1
    positions = [1] * (slopes.ndim - 2)
    points = grid.reshape(-1, 1, *positions).expand(-1, units, *positions)
    return _by_unit(_slopes(activation, points)).amax(dim=0)


def _by_unit(values: Tensor) -> Tensor:
    """(B, U, ...) -> (E, U)."""
    return values.movedim(1, -1).flatten(0, -2)


def _share(hits: Tensor, source: Tensor) -> float:
    """Mean of booleans; nan where what they are about isn't finite."""
    return hits.double().mean().item() if source.isfinite().all() else math.nan


def _norm(values: Tensor) -> Tensor:
    """In float64, whose squares don't overflow."""
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def _gradient_ratios(loss: Tensor, weights: Sequence[Tensor]) -> list[float]:
    gradients = torch.autograd.grad(loss, weights)
    return [(_norm(grad) / _norm(weight.detach())).item() for grad, weight in zip(gradients, weights, strict=True)]


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan


def _mutual_information(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[float, float]:
    """mu, logvar, noise (B, Z) in float64 -> E log q(z|x)/q(z) with and without z's own posterior in q(z)."""
    num_rows = len(mu)
    mu = mu - mu.mean(dim=0)  # changes nothing but the rounding in the products below
    z = mu + (logvar / 2).exp() * noise
    # log N(z; mu, exp(logvar)) but for a constant, multiplied out: memory for (B, B), not (B, B, Z).
    precision = (-logvar).exp()
    constant = -0.5 * (mu.square() * precision + logvar).sum(dim=-1)
    sums = z.new_zeros(2)
    for rows in torch.arange(num_rows, device=z.device).split(max(1, _CHUNK_PAIRS // num_rows)):
        log_q = z[rows] @ (mu * precision).T - 0.5 * z[rows].square() @ precision.T + constant
        own = log_q.gather(1, rows[:, None])
        others = log_q.scatter(1, rows[:, None], -math.inf)
        mixtures = torch.stack((log_q.logsumexp(dim=-1), others.logsumexp(dim=-1)), dim=-1)
        sums += (own - mixtures).sum(dim=0)
    with_own, without = (sums / num_rows).tolist()
    return with_own + math.log(num_rows), without + math.log(max(1, num_rows - 1))


def _flags(figures: Diagnostics, latent_dim: int) -> list[str]:
    if not math.isfinite(figures.rate + figures.distortion):
        return ["not finite"]  # and the counts mean nothing
    layers = figures.layers
    first = {layer.net: layer.second_moment for layer in reversed(layers)}
    drifts = [_quotient(layer.second_moment, first[layer.net]) for layer in layers]
    net_ratios = (figures.encoder_gradient_ratio, figures.decoder_gradient_ratio)
    crossed = {
        "dead": any(layer.dead > MAX_DEAD for layer in layers),
        "dormant": any(layer.dormant > MAX_DORMANT for layer in layers),
        "saturated": any(layer.saturated > MAX_SATURATED for layer in layers),
        "vanishing": any(ratio < MIN_NET_RATIO for ratio in net_ratios),
        "exploding": any(layer.gradient_ratio > MAX_GRADIENT_RATIO for layer in layers),
        "moment drift": any(drift < MIN_DRIFT or drift > MAX_DRIFT for drift in drifts),
        "collapsed": figures.active_units == 0 or figures.rate < MIN_RATE,
        "latent too large": figures.active_units < MIN_ACTIVE_SHARE * latent_dim,
        "aggregate far from prior": figures.aggregated_kl_low > MAX_AGGREGATED_KL,
    }
    return [name for name, is_crossed in crossed.items() if is_crossed]


@contextmanager
def _requiring_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Frozen ones too, while this lasts."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _watching(blocks: Sequence[tuple[str, int, Block]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what goes into each activation and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].detach(), output.detach()))

    handles = [block.activation.register_forward_hook(note) for _, _, block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
