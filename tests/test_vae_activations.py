"""Activations: shapes, the learned slope, and the gains against a table, a simulation and a stated map."""

import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate

from vae.activations import ACTIVATIONS, MovingAverage, PReLU, make_activation, variance_gain
from vae.config import ActivationName, ModelConfig

NAMES = sorted(ACTIVATIONS)
# Published to three digits: the reference table of variance gains for each activation.
TABLE = {
    "linear": 1.000,
    "tanh": 1.593,
    "sigmoid": 1.846,
    "relu": 1.414,
    "prelu": 1.372,
    "elu": 1.245,
    "selu": 1.000,
    "softplus": 1.042,
    "gelu": 1.534,
    "silu": 1.677,
    "mish": 1.487,
    "dropout": 1.000,
    "exponential": 0.35,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config(activation: str, **changes: object) -> ModelConfig:
    return ModelConfig(input_dim=5, activation=activation, **changes)


def test_every_activation_name_of_the_config_has_a_spec_of_that_name():
    assert set(ACTIVATIONS) == set(get_args(ActivationName))
    assert all(name == spec.name and spec.note for name, spec in ACTIVATIONS.items())


def test_own_parameters_are_fields_of_the_config_and_belong_to_one_activation():
    owned = [name for spec in ACTIVATIONS.values() for name in spec.own_parameters]
    assert len(owned) == len(set(owned))
    assert set(owned) <= {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("name", NAMES)
def test_learned_says_whether_there_are_parameters(name):
    assert ACTIVATIONS[name].learned == bool(list(make_activation(config(name), 7).parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 7), (3, 4, 7), (7, 7), (2, 1), (2, 3, 1)])
def test_every_activation_keeps_the_shape(name, shape):
    activation = make_activation(config(name, avg_pool_window=5), shape[-1])
    assert activation(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_samples_stacked_in_front_are_treated_like_single_batches(name):
    activation = make_activation(config(name), 7).eval()
    x = torch.randn(3, 7, 7)
    torch.testing.assert_close(activation(x), torch.stack([activation(batch) for batch in x]))


@pytest.mark.parametrize("name", NAMES)
def test_linear_says_whether_the_map_is_affine_in_evaluation(name):
    activation = make_activation(config(name), 7).double().eval()
    x, y = torch.randn(2, 4, 7, dtype=torch.float64) * 3
    difference = activation(0.3 * x + 0.7 * y) - (0.3 * activation(x) + 0.7 * activation(y))
    assert (difference.abs().max() < 1e-12) == ACTIVATIONS[name].linear


def test_prelu_has_a_slope_for_each_channel_when_batch_and_width_are_equal():
    prelu = PReLU(4).double()
    with torch.no_grad():
        prelu.slope.copy_(torch.tensor([0.1, 0.2, 0.3, 2.0]))
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = x.clone()
    for b in range(4):
        for h in range(4):
            if x[b, h] <= 0:
                expected[b, h] = x[b, h] * prelu.slope[h].item()
    torch.testing.assert_close(prelu(x), expected)


def test_prelu_gradients_match_finite_differences():
    prelu = PReLU(4).double()
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, slope: torch.func.functional_call(prelu, {"slope": slope}, (x,)), (x, prelu.slope)
    )


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_leaky_relu_takes_its_slope_from_the_config(slope):
    x = torch.tensor([-2.0, 0.0, 3.0])
    result = make_activation(config("leaky_relu", leaky_relu_slope=slope), 3)(x)
    torch.testing.assert_close(result, torch.tensor([-2.0 * slope, 0.0, 3.0]))


def test_moving_average_is_over_the_neighbours_that_exist():
    x = torch.tensor([[1.0, 2.0, 6.0, 7.0]])
    torch.testing.assert_close(MovingAverage(3)(x), torch.tensor([[1.5, 3.0, 5.0, 6.5]]))
    torch.testing.assert_close(MovingAverage(9)(x), torch.full((1, 4), 4.0))


def test_dropout_as_activation_drops_at_its_own_rate_in_training_only():
    dropout = make_activation(config("dropout", activation_dropout=0.4, dropout=0.0), 10_000)
    x = torch.ones(1, 10_000)
    assert (dropout(x) == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("name", TABLE)
def test_gain_matches_the_reference_table(name):
    assert variance_gain(config(name), 128) == pytest.approx(TABLE[name], abs=6e-4)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.5, 1.0])
def test_gain_of_leaky_relu_matches_its_closed_form(slope):
    gain = variance_gain(config("leaky_relu", leaky_relu_slope=slope), 128)
    assert gain == pytest.approx(math.sqrt(2 / (1 + slope**2)), rel=1e-10)


@pytest.mark.parametrize(("name", "function"), [("silu", lambda z: z / (1 + np.exp(-z))), ("tanh", np.tanh)])
def test_gain_matches_adaptive_quadrature(name, function):
    moment, _ = integrate.quad(
        lambda z: function(z) ** 2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), -12, 12, epsabs=1e-13
    )
    assert variance_gain(config(name), 128) == pytest.approx(moment**-0.5, rel=1e-10)


@pytest.mark.parametrize(("width", "window"), [(1, 3), (4, 3), (128, 5), (1100, 3)])
def test_gain_of_avg_pool_matches_its_matrix_written_out(width, window):
    matrix = np.zeros((width, width))
    for i in range(width):
        low, high = max(0, i - window // 2), min(width, i + window // 2 + 1)
        matrix[i, low:high] = 1 / (high - low)
    expected = math.sqrt(width / (matrix**2).sum())
    assert variance_gain(config("avg_pool", avg_pool_window=window), width) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "exponential"])
def test_second_moment_stays_at_one_through_six_layers(name):
    width, rows = 1024, 128
    generator = torch.Generator().manual_seed(0)
    activation = make_activation(config(name), width).eval()
    gain = variance_gain(config(name), width)
    pre = torch.randn(rows, width, generator=generator)
    for _ in range(6):
        weight = torch.randn(width, width, generator=generator) * gain / math.sqrt(width)
        pre = activation(pre).detach() @ weight
    assert 0.8 < pre.square().mean().item() < 1.25


def exponential_map(q: float, gain: float) -> float:
    """Second moment behind one wide layer, of E exp(2a), a ~ N(0, q)."""
    density = lambda z: math.exp(2 * math.sqrt(q) * z - z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    return gain**2 * integrate.quad(density, -40, 40)[0]


def test_exponential_maps_the_second_moment_as_stated():
    assert exponential_map(0.7, 0.35) == pytest.approx(0.35**2 * math.exp(2 * 0.7), rel=1e-9)


@pytest.mark.parametrize(("start", "explodes"), [(0.99, False), (1.01, True)])
def test_exponential_at_the_gain_of_the_quadrature_is_unstable_at_one(start, explodes):
    gain = math.exp(-1)  # 1/sqrt(E exp(2Z)): q = 1 is a fixed point, and not a stable one
    assert exponential_map(1.0, gain) == pytest.approx(1.0)
    q = start
    for _ in range(40):
        q = gain**2 * math.exp(min(2 * q, 700.0))
    assert q == pytest.approx(math.inf if explodes else 0.2032, abs=1e-3) or (explodes and q > 1e100)


def test_exponential_with_its_stated_gain_is_stable_and_its_gradient_vanishes():
    gain = variance_gain(config("exponential"), 128)
    assert gain**2 < 1 / (2 * math.e)
    q = 1.0
    for _ in range(200):
        q = exponential_map(q, gain)
    assert q == pytest.approx(exponential_map(q, gain), rel=1e-9)
    assert q < 0.5  # f' = f, so the factor of a layer's backward pass is g^2 E f'^2 = q
