"""Diagnostics: planted faults and closed forms, that nothing is left behind, and the digits on which ReLU dies."""

import dataclasses
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn

from vae.activations import ACTIVATIONS
from vae.config import ActivationName, DataConfig, LikelihoodName, ModelConfig, TrainConfig
from vae.data import Dataset, load_data
from vae.diagnostics import MIN_NET_RATIO, Diagnostics, LayerDiagnostics, diagnose, locate_non_finite
from vae.layers import Block
from vae.model import LOGVAR_MAX, LOGVAR_MIN, VAE
from vae.objective import elbo_terms, evaluate, fixed_noise, gaussian_kl
from vae.training import Trainer

ROWS = 64
SHUT = -1e3  # a bias that no input makes up for


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig(source="digits"))


def make(**changes: object) -> VAE:
    return VAE(ModelConfig(**{"input_dim": 16, "latent_dim": 3, "hidden_dims": (20, 10), **changes}))


def conv(**changes: object) -> VAE:
    return make(**{"body": "conv", "image_shape": (4, 4), "channels": (8, 12), "hidden_dims": (10,), **changes})


def probe(model: VAE, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(rows, model.config.input_dim, generator=generator)
    return x, torch.randn(rows, model.config.latent_dim, generator=generator)


def layer_of(figures: Diagnostics, net: str, index: int) -> LayerDiagnostics:
    (found,) = (layer for layer in figures.layers if (layer.net, layer.layer) == (net, index))
    return found


def block_of(model: VAE, net: str, index: int) -> Block:
    (found,) = (block for name, i, block in model.blocks() if (name, i) == (net, index))
    return found


def fix_posterior(model: VAE, mu: float, logvar: float) -> None:
    """q(z|x) = N(mu, exp(logvar)) in every dimension, whatever x."""
    centre, radius = (LOGVAR_MAX + LOGVAR_MIN) / 2, (LOGVAR_MAX - LOGVAR_MIN) / 2
    with torch.no_grad():
        for head, value in ((model.mu, mu), (model.logvar, centre + radius * math.atanh((logvar - centre) / radius))):
            head.weight.zero_()
            head.bias.fill_(value)


def linear_posterior(slope: float, logvar: float, likelihood: LikelihoodName = "gaussian") -> VAE:
    """q(z|x) = N(slope * x, exp(logvar)), Z = X = 2."""
    model = make(input_dim=2, latent_dim=2, hidden_dims=(), likelihood=likelihood)
    fix_posterior(model, 0.0, logvar)
    with torch.no_grad():
        model.mu.weight.copy_(slope * torch.eye(2))
    return model


# ---- hidden layers ----


def test_layers_come_in_the_order_of_the_data_with_their_widths():
    figures = diagnose(model := make(), *probe(model))
    found = [(layer.net, layer.layer, layer.width) for layer in figures.layers]
    assert found == [("encoder", 0, 20), ("encoder", 1, 10), ("decoder", 0, 10), ("decoder", 1, 20)]


@pytest.mark.parametrize(
    "activation", ["relu", "elu", "selu", "softplus", "gelu", "silu", "mish", "sigmoid", "exponential", "relu2", "apl"]
)
def test_units_with_a_bias_that_nothing_makes_up_for_are_dead(activation):
    model = make(activation=activation)
    healthy = layer_of(diagnose(model, *probe(model)), "encoder", 0)
    with torch.no_grad():
        linear = block_of(model, "encoder", 0).linear
        linear.weight[:5] = 0.01
        linear.bias[:5] = SHUT
    figures = diagnose(model, *probe(model))
    assert healthy.dead <= 0.05
    assert layer_of(figures, "encoder", 0).dead == pytest.approx(5 / 20 + 15 / 20 * healthy.dead, abs=0.05)
    assert "dead" in figures.flags


@pytest.mark.parametrize("activation", ["leaky_relu", "prelu", "pau", "mixture"])
def test_units_of_activations_with_a_slope_everywhere_do_not_die(activation):
    model = make(activation=activation)
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.bias[:5] = -30
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).dead == 0


def test_a_dead_unit_of_glu_is_one_whose_gate_is_shut():
    model = make(activation="glu")
    with torch.no_grad():
        linear = block_of(model, "decoder", 1).linear
        linear.bias[:3] = SHUT  # the linear half, which can't be dead
        linear.bias[20 : 20 + 5] = SHUT
    layer = layer_of(diagnose(model, *probe(model)), "decoder", 1)
    assert (layer.width, layer.dead) == (20, 5 / 20)


@pytest.mark.parametrize("activation", ["relu_avgpool", "dynamic_relu"])
def test_a_whole_layer_that_mixes_units_can_be_dead(activation):
    model = make(activation=activation)
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).dead < 0.3
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.bias[:19] = SHUT
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).dead == 19 / 20
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.bias[:] = SHUT
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).dead == 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_saturation_of_tanh_counts_pairs_at_either_end(sign):
    model = make(activation="tanh")
    linear = block_of(model, "encoder", 1).linear
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(0.1)
        linear.bias[:6] = sign * 3.0  # |tanh| = 0.995, a slope of 0.0099: saturated, yet not dead
        linear.bias[6] = sign * math.atanh(0.97)  # of 0.059
    figures = diagnose(model, *probe(model))
    layer = layer_of(figures, "encoder", 1)
    assert (layer.saturated, layer.dead) == (0.6, 0.0)
    assert "saturated" in figures.flags


@pytest.mark.parametrize(("h", "saturated"), [(0.0126, 1.0), (0.0128, 0.0), (0.9872, 0.0), (0.9874, 1.0)])
def test_sigmoid_saturates_where_the_reference_says(h, saturated):
    model = make(activation="sigmoid", hidden_dims=(4,))
    linear = block_of(model, "encoder", 0).linear
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(math.log(h / (1 - h)))
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).saturated == saturated


def test_dormant_units_hardly_move_next_to_the_others():
    model = make(activation="tanh")
    linear = block_of(model, "encoder", 0).linear
    with torch.no_grad():
        linear.weight[:7] *= 1e-3
        linear.bias[:7] = 0
    figures = diagnose(model, *probe(model))
    assert layer_of(figures, "encoder", 0).dormant == 7 / 20
    assert layer_of(figures, "encoder", 0).dead == 0
    assert "dormant" in figures.flags


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "exponential"])
def test_a_unit_that_is_constant_but_not_zero_is_dormant(activation):
    model = make(activation=activation)
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.weight[:4] = 0
    assert layer_of(diagnose(model, *probe(model)), "encoder", 0).dormant == 4 / 20


@pytest.mark.parametrize("activation", [name for name, spec in ACTIVATIONS.items() if spec.linear])
def test_linear_activations_neither_die_nor_saturate(activation):
    model = make(activation=activation)
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.bias[:] = SHUT
    figures = diagnose(model, *probe(model))
    assert all(layer.dead == layer.saturated == 0 for layer in figures.layers)


def test_without_hidden_layers_there_are_no_layers_and_no_way_to_vanish_on():
    figures = diagnose(model := make(hidden_dims=()), *probe(model))
    assert figures.layers == []
    assert figures.encoder_gradient_ratio == figures.decoder_gradient_ratio == 1


@pytest.mark.parametrize("kind", [make, conv])
def test_gradient_ratios_are_those_of_a_backward_pass(kind: Callable[..., VAE]):
    model = kind(activation="tanh", dropout=0.5)
    x, noise = probe(model)
    figures = diagnose(model, x, noise)
    model.eval()
    elbo_terms(model, x, noise).nelbo.mean().backward()
    ratios = [float(b.linear.weight.grad.norm() / b.linear.weight.detach().norm()) for _, _, b in model.blocks()]
    assert [layer.gradient_ratio for layer in figures.layers] == pytest.approx(ratios, rel=1e-5)
    outputs = model.outputs if kind is make else model.outputs.conv
    last = [float(linear.weight.grad.norm() / linear.weight.detach().norm()) for linear in (model.mu, outputs)]
    first = [layer.gradient_ratio for layer in figures.layers if layer.layer == 0]
    nets = [figures.encoder_gradient_ratio, figures.decoder_gradient_ratio]
    assert nets == pytest.approx([a / b for a, b in zip(first, last, strict=True)], rel=1e-5)


def test_second_moments_are_those_before_the_activation():
    model = make(normalization="layer")  # which makes them 1
    assert [layer.second_moment for layer in diagnose(model, *probe(model)).layers] == pytest.approx([1] * 4, abs=1e-3)
    model = make(activation="relu")
    with torch.no_grad():
        block_of(model, "encoder", 1).linear.bias += 20
    figures = diagnose(model, *probe(model))
    assert layer_of(figures, "encoder", 1).second_moment > 300
    assert "moment drift" in figures.flags


def test_the_weights_of_a_mixture_are_told_in_its_order():
    model = make(activation="mixture", decoder_activation="relu")
    with torch.no_grad():
        block_of(model, "encoder", 0).activation.logits.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    figures = diagnose(model, *probe(model))
    assert layer_of(figures, "encoder", 0).mixture == pytest.approx([0.2, 0.5, 0.3])
    assert layer_of(figures, "encoder", 1).mixture == pytest.approx([1 / 3] * 3)
    assert layer_of(figures, "decoder", 0).mixture is None


def test_each_net_is_judged_by_its_own_activation():
    model = make(activation="relu", decoder_activation="leaky_relu", leaky_relu_slope=0.2)
    with torch.no_grad():
        for _, _, block in model.blocks():
            block.linear.bias[:] = SHUT
    assert [layer.dead for layer in diagnose(model, *probe(model)).layers] == [1, 1, 0, 0]


def test_a_channel_is_dead_only_if_it_is_so_everywhere():
    model = conv(activation="relu")
    with torch.no_grad():
        block_of(model, "encoder", 0).linear.bias[:2] = SHUT
        projection = block_of(model, "decoder", 1).linear  # 12 channels at one position
        projection.bias[:6] = SHUT
    figures = diagnose(model, *probe(model))
    assert [layer.width for layer in figures.layers] == [8, 12, 10, 10, 12, 8]
    assert layer_of(figures, "encoder", 0).dead == 2 / 8
    assert layer_of(figures, "decoder", 1).dead == 6 / 12


def test_one_living_position_keeps_a_channel_alive():
    model = conv(activation="relu")
    linear = block_of(model, "encoder", 0).linear
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0, 1, 1] = 1  # the pixel itself
        linear.bias.fill_(-0.5)
    x, noise = probe(model)
    x = x.clamp(max=0.4)
    assert layer_of(diagnose(model, x, noise), "encoder", 0).dead == 1
    x[3, 2] = 1.0  # row 0, column 2, where a window has its middle
    layer = layer_of(diagnose(model, x, noise), "encoder", 0)
    assert layer.dead == 0
    assert layer.saturated == pytest.approx(1 - 1 / (4 * ROWS))


@pytest.mark.parametrize("kind", [make, conv])
@pytest.mark.parametrize("activation", get_args(ActivationName))
def test_every_activation_has_finite_figures(activation, kind: Callable[..., VAE]):
    model = kind(activation=activation, normalization="batch", dropout=0.2)
    figures = diagnose(model, *probe(model))
    for layer in figures.layers:
        assert all(0 <= share <= 1 for share in (layer.dead, layer.dormant, layer.saturated))
        assert layer.dead < 1
        assert math.isfinite(layer.gradient_ratio)
        assert math.isfinite(layer.second_moment)
    assert "not finite" not in figures.flags


@pytest.mark.parametrize("likelihood", get_args(LikelihoodName))
def test_rate_and_distortion_are_those_of_evaluate(likelihood):
    model = make(likelihood=likelihood)
    x, noise = probe(model)
    x = (9 * x).round() if "bernoulli" not in likelihood else x
    figures, expected = diagnose(model, x, noise), evaluate(model, x, noise)
    assert figures.rate == pytest.approx(expected.kl)
    assert figures.distortion == pytest.approx(expected.recon, rel=1e-6)
    assert figures.active_units == expected.active_units
    mu, logvar = model.encode(x)
    assert figures.rate == pytest.approx(gaussian_kl(mu, logvar).mean().item())


# ---- the posterior ----


def test_a_posterior_that_ignores_x_has_no_information():
    model = make()
    fix_posterior(model, 0.7, 0.0)
    figures = diagnose(model, *probe(model))
    assert figures.mutual_information == pytest.approx(0, abs=1e-9)
    assert figures.aggregated_kl == pytest.approx(3 * 0.7**2 / 2)
    assert figures.aggregated_kl_low == pytest.approx(figures.aggregated_kl)
    assert (figures.active_units, figures.kl_active_units, figures.collapsed_share) == (0, 3, 0)
    assert {"collapsed", "latent too large"} <= set(figures.flags)
    assert "aggregate far from prior" not in figures.flags


def test_the_aggregate_is_flagged_where_it_is_surely_far_from_the_prior():
    model = make()
    fix_posterior(model, 2.0, 0.0)
    assert "aggregate far from prior" in diagnose(model, *probe(model)).flags


def test_a_posterior_equal_to_the_prior_is_collapsed_in_every_dimension():
    model = make()
    fix_posterior(model, 0.0, 0.0)
    figures = diagnose(model, *probe(model))
    assert (figures.collapsed_share, figures.kl_active_units, figures.logvar_clamped) == (1, 0, 0)
    assert figures.rate == pytest.approx(0, abs=1e-9)


def test_collapse_allows_a_share_delta_of_examples_and_not_more():
    model = linear_posterior(slope=1.0, logvar=0.0)
    x, noise = torch.zeros(1000, 2), fixed_noise(1000, 2, 0)
    x[:10, 0] = 1.0
    x[:11, 1] = 1.0
    assert diagnose(model, x, noise).collapsed_share == 0.5


def test_well_separated_posteriors_tell_the_row():
    model = linear_posterior(slope=1e4, logvar=-4.0)
    x, noise = torch.randn(50, 2), fixed_noise(50, 2, 0)
    figures = diagnose(model, x, noise)
    assert figures.mutual_information == pytest.approx(math.log(50))
    assert figures.aggregated_kl_low < figures.aggregated_kl


def test_information_and_aggregate_of_a_linear_gaussian_model():
    """x ~ N(0, I), q(z|x) = N(a x, s^2): q(z) = N(0, a^2 + s^2)."""
    model = linear_posterior(slope=1.5, logvar=math.log(0.5))
    rows = 3000
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 2, generator=generator)
    figures = diagnose(model, x, fixed_noise(rows, 2, 0))
    variance = 1.5**2 + 0.5
    assert figures.mutual_information == pytest.approx(math.log(variance / 0.5), abs=0.06)
    exact = variance - 1 - math.log(variance)
    assert figures.aggregated_kl == pytest.approx(exact, abs=0.1)
    assert figures.aggregated_kl_low < figures.aggregated_kl


def test_information_is_that_of_torchs_own_mixture(monkeypatch):
    model = make()
    x, noise = probe(model)
    with torch.no_grad():
        mu, logvar = (t.double() for t in model.encode(x))
    posterior = distributions.Independent(distributions.Normal(mu, (logvar / 2).exp()), 1)
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(ROWS, dtype=torch.float64)), posterior
    )
    z = mu + (logvar / 2).exp() * noise.double()
    expected = (posterior.log_prob(z) - mixture.log_prob(z)).mean().item()
    figures = diagnose(model, x, noise)
    assert figures.mutual_information == pytest.approx(expected, abs=1e-9)
    assert figures.aggregated_kl == pytest.approx(figures.rate - expected, abs=1e-9)
    monkeypatch.setattr("vae.diagnostics._CHUNK_PAIRS", 5 * ROWS)  # 12 pieces of 5 rows and one of 4
    in_pieces = diagnose(model, x, noise)
    assert in_pieces.mutual_information == pytest.approx(expected, abs=1e-9)
    assert in_pieces.aggregated_kl_low == pytest.approx(figures.aggregated_kl_low, abs=1e-9)


@pytest.mark.parametrize(("logvar", "share"), [(-7.9, 1), (-7.8, 0), (3.8, 0), (3.9, 1)])
def test_log_variances_within_a_hundredth_of_a_bound_are_clamped(logvar, share):
    model = make()
    fix_posterior(model, 0.0, logvar)
    assert diagnose(model, *probe(model)).logvar_clamped == share


def test_a_probe_of_one_row_raises_nothing():
    figures = diagnose(model := make(), *probe(model, rows=1))
    assert figures.mutual_information == pytest.approx(0, abs=1e-12)
    assert figures.active_units == 0


# ---- nothing is left behind ----


@pytest.mark.parametrize("function", [diagnose, locate_non_finite])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(function, training):
    model = make(activation="dropout", dropout=0.5, normalization="batch").train(training)
    x, noise = probe(model)
    elbo_terms(model.eval(), x, noise).nelbo.sum().backward()
    model.train(training)
    model.mu.weight.requires_grad_(False)
    model.outputs.weight.requires_grad_(False)
    model.encoder[0].linear.weight.grad = None
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        function(model, x, noise)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training is training
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert not x.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, p in model.named_parameters():
        assert (p.grad is None) == (grads[name] is None), name
        assert p.grad is None or torch.equal(p.grad, grads[name])


def test_it_repeats_itself_whatever_the_mode():
    model = make(dropout=0.5)
    assert diagnose(model.train(), *probe(model)) == diagnose(model.eval(), *probe(model))


# ---- what is not finite ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["encoder.1", "mu", "logvar", "decoder.0", "outputs"])
@pytest.mark.parametrize("activation", ["exponential", "relu", "tanh", "glu", "relu_avgpool"])
def test_a_model_that_is_not_finite_has_figures_all_the_same(activation, where, bad):
    model = make(activation=activation)
    with torch.no_grad():
        _linear(model, where).weight.fill_(bad)
    figures = diagnose(model, *probe(model))
    for field in dataclasses.fields(figures):
        assert isinstance(getattr(figures, field.name), float | int | list)
    if math.isnan(bad):
        assert math.isnan(figures.distortion)
        assert figures.flags == ["not finite"]


def test_a_layer_that_is_not_finite_has_no_shares():
    model = make(activation="relu")
    with torch.no_grad():
        block_of(model, "decoder", 0).linear.bias[2] = math.nan
    figures = diagnose(model, *probe(model))
    before, broken = layer_of(figures, "encoder", 0), layer_of(figures, "decoder", 0)
    assert before.dead <= 0.1
    assert math.isnan(before.gradient_ratio)
    assert all(math.isnan(v) for v in (broken.dead, broken.dormant, broken.saturated, broken.second_moment))


@pytest.mark.parametrize("kind", [make, conv])
@pytest.mark.parametrize("where", ["encoder.0", "encoder.1", "mu", "logvar", "decoder.0", "decoder.1", "outputs"])
def test_the_first_layer_that_is_not_finite_is_found(where, kind: Callable[..., VAE]):
    model = kind()
    assert locate_non_finite(model, *probe(model)) is None
    with torch.no_grad():
        _linear(model, where).bias[0] = math.nan
    assert locate_non_finite(model, *probe(model)) == where


def test_an_exponential_is_found_where_it_overflows():
    model = make(activation="exponential", hidden_dims=(8, 8, 8))
    with torch.no_grad():
        block_of(model, "encoder", 1).linear.bias.fill_(100.0)
    assert locate_non_finite(model, *probe(model)) == "encoder.1"


def test_an_input_that_is_not_finite_is_found():
    model = make()
    x, noise = probe(model)
    x[1, 2] = math.nan
    assert locate_non_finite(model, x, noise) == "input"


def test_a_loss_that_alone_is_not_finite_is_found():
    model = make(likelihood="gaussian")
    with torch.no_grad():
        model.outputs.weight.zero_()
        model.outputs.bias.fill_(1e30)  # its square is beyond float32
    assert locate_non_finite(model, *probe(model)) == "loss"


def test_a_gradient_that_alone_is_not_finite_is_found_nearest_to_the_loss():
    class Root(nn.Module):
        """sqrt at 0: finite, with a slope that isn't."""

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).abs().sqrt()

    model = make(activation="relu")
    block_of(model, "decoder", 1).activation = Root()
    block_of(model, "encoder", 0).activation = Root()
    assert locate_non_finite(model, *probe(model)) == "decoder.1"


def _linear(model: VAE, where: str) -> nn.Module:
    net, _, index = where.partition(".")
    return block_of(model, net, int(index)).linear if index else getattr(model, where)


# ---- the real thing ----


def test_sigmoid_starts_with_a_gradient_that_vanishes_and_tanh_does_not(digits):
    x, noise = torch.from_numpy(np.array(digits.validation)), fixed_noise(len(digits.validation), 10, 0)
    figures = {}
    for activation in ("sigmoid", "tanh"):
        torch.manual_seed(0)
        config = ModelConfig(input_dim=64, latent_dim=10, hidden_dims=(128, 128), activation=activation)
        figures[activation] = diagnose(VAE(config, digits.train), x, noise)
    assert figures["sigmoid"].encoder_gradient_ratio < MIN_NET_RATIO
    assert figures["tanh"].encoder_gradient_ratio > 3 * MIN_NET_RATIO
    assert "vanishing" in figures["sigmoid"].flags
    assert "vanishing" not in figures["tanh"].flags


def trained(data: Dataset, activation: str, epochs: int) -> Diagnostics:
    model = ModelConfig(
        input_dim=64, latent_dim=10, hidden_dims=(128, 128), activation=activation, leaky_relu_slope=0.2
    )
    train = TrainConfig(learning_rate=3e-3, lr_schedule="constant", kl_warmup_epochs=0, max_epochs=epochs)
    trainer = Trainer(model, train, data, seed=0)
    for _ in trainer:
        pass
    x = torch.from_numpy(np.array(data.validation))
    return diagnose(trainer.model, x, fixed_noise(len(x), 10, 0))


def test_relu_dies_on_the_digits_at_a_high_learning_rate_and_a_leaky_one_does_not(digits):
    relu, leaky = (trained(digits, activation, epochs=15) for activation in ("relu", "leaky_relu"))
    assert all(layer_of(relu, net, 1).dead > 0.3 for net in ("encoder", "decoder"))
    assert "dead" in relu.flags
    assert all(layer.dead == layer.dormant == 0 for layer in leaky.layers)
    assert not {"dead", "dormant"} & set(leaky.flags)


@pytest.mark.system
def test_dead_units_cost_latent_dimensions_on_the_digits(digits):
    relu, leaky = (trained(digits, activation, epochs=60) for activation in ("relu", "leaky_relu"))
    assert all(layer_of(relu, net, 1).dead > 0.3 for net in ("encoder", "decoder"))
    assert relu.active_units < 5
    assert "latent too large" in relu.flags
    assert leaky.active_units >= 8
    assert leaky.flags == []
