"""Activations: shapes, learned parameters, and the gains against a table, a simulation and a stated map."""

import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy import integrate, optimize
from torch import Tensor, nn
from torch.nn import functional as F

from vae.activations import (
    ACTIVATIONS,
    PAU,
    Mixture,
    MovingAverage,
    PReLU,
    input_width,
    make_activation,
    variance_gain,
)
from vae.config import OWN_PARAMETERS, ActivationName, ModelConfig

NAMES = sorted(ACTIVATIONS)
LEARNED = [name for name in NAMES if ACTIVATIONS[name].learned]
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
    "hardswish": 1.737,
    "dropout": 1.000,
    "exponential": 0.35,
}
MIXES_PIXELS = {"avg_pool", "relu_avgpool", "dynamic_relu"}
# Name -> parameters of its own for a width H.
COUNTS = {
    "prelu": lambda h: h,
    "swish": lambda h: h,
    "acon_c": lambda h: 3 * h,
    "apl": lambda h: 2 * 2 * h,  # of 2 hinges
    "pau": lambda h: 10,
    "mixture": lambda h: 3,
    "dynamic_relu": lambda h: (h + 1) * max(1, h // 8) + (max(1, h // 8) + 1) * 4 * h,
}
DENSE, CONV = -1, -3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config(**changes: object) -> ModelConfig:
    return ModelConfig(input_dim=5, **changes)


def shaken(activation: nn.Module) -> nn.Module:
    """With its parameters away from where they start, each somewhere else."""
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return activation


def inputs(name: str, shape: tuple[int, ...], channel_dim: int = DENSE) -> Tensor:
    """For a result of that shape."""
    wide = list(shape)
    wide[channel_dim] = input_width(name, shape[channel_dim])
    return torch.randn(wide)


def test_every_activation_name_of_the_config_has_a_spec_of_that_name():
    assert set(ACTIVATIONS) == set(get_args(ActivationName))
    assert all(name == spec.name and spec.note for name, spec in ACTIVATIONS.items())


def test_an_unknown_name_is_refused_with_the_known_ones():
    for call in (
        lambda: make_activation("Flatten", config(), 7),
        lambda: input_width("Flatten", 7),
        lambda: variance_gain("Flatten", config(), 7),
    ):
        with pytest.raises(ValueError, match="unknown activation 'Flatten'; known: linear, exponential, tanh"):
            call()


def test_own_parameters_are_fields_of_the_config_and_name_known_activations():
    assert set(OWN_PARAMETERS) <= {field.name for field in fields(ModelConfig)}
    assert {name for names in OWN_PARAMETERS.values() for name in names} <= set(ACTIVATIONS)


@pytest.mark.parametrize("field", OWN_PARAMETERS)
def test_own_parameters_change_their_activations_and_no_other(field):
    value = {"leaky_relu_slope": 0.3, "avg_pool_window": 5, "activation_dropout": 0.6, "apl_hinges": 3}[field]
    x = torch.randn(4, 16)

    def result(name: str, setting: ModelConfig) -> Tensor:
        torch.manual_seed(0)
        activation = make_activation(name, setting, 8)
        with torch.no_grad():
            for parameter in activation.parameters():
                parameter.fill_(0.2)
        return activation(x[:, : input_width(name, 8)])

    assert getattr(config(), field) != value
    changed = {
        name for name in NAMES if not torch.equal(result(name, config()), result(name, config(**{field: value})))
    }
    assert changed == set(OWN_PARAMETERS[field])


@pytest.mark.parametrize("name", NAMES)
def test_learned_says_whether_there_are_parameters(name):
    assert ACTIVATIONS[name].learned == bool(list(make_activation(name, config(), 7).parameters()))


@pytest.mark.parametrize("name", LEARNED)
def test_number_of_learned_parameters(name):
    for width in (1, 7, 20):
        for channel_dim in (DENSE, CONV):
            activation = make_activation(name, config(), width, channel_dim)
            assert sum(p.numel() for p in activation.parameters()) == COUNTS[name](width)


def test_learned_parameters_are_vectors_so_that_they_are_never_decayed():
    for name in set(LEARNED) - {"dynamic_relu"}:
        assert {p.ndim for p in make_activation(name, config(), 7, CONV).parameters()} == {1}


def test_only_that_with_matrices_draws_from_the_generator_when_built():
    for name in NAMES:
        before = torch.get_rng_state()
        for channel_dim in (DENSE, CONV):
            make_activation(name, config(), 7, channel_dim)
        assert torch.equal(torch.get_rng_state(), before) == (name != "dynamic_relu")


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_keeps_the_shape(name):
    for shape in ((4, 7), (3, 4, 7), (7, 7), (7, 7, 7), (2, 1), (2, 3, 1)):
        activation = make_activation(name, config(avg_pool_window=5), shape[DENSE])
        assert activation(inputs(name, shape)).shape == shape
    for shape in ((4, 7, 5, 3), (7, 7, 7, 7), (2, 1, 1, 1), (1, 9, 2, 2)):
        activation = make_activation(name, config(avg_pool_window=5), shape[CONV], CONV)
        assert activation(inputs(name, shape, CONV)).shape == shape


def test_only_glu_asks_for_more_than_its_width():
    assert {name: input_width(name, 7) for name in NAMES} == {name: 14 if name == "glu" else 7 for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_samples_stacked_in_front_are_treated_like_single_batches(name):
    activation = shaken(make_activation(name, config(), 7).eval())
    x = inputs(name, (3, 7, 7))
    torch.testing.assert_close(activation(x), torch.stack([activation(batch) for batch in x]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MIXES_PIXELS])
def test_on_images_it_is_the_dense_one_on_every_pixel(name):
    on_images = shaken(make_activation(name, config(), 6, CONV).double().eval())
    dense = make_activation(name, config(), 6).double().eval()
    dense.load_state_dict(on_images.state_dict())
    x = inputs(name, (6, 6, 6, 5), CONV).double()
    torch.testing.assert_close(on_images(x), dense(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_linear_says_whether_the_map_is_affine_in_evaluation(name):
    activation = make_activation(name, config(), 7).double().eval()
    x, y = torch.randn(2, 4, input_width(name, 7), dtype=torch.float64) * 3
    difference = activation(0.3 * x + 0.7 * y) - (0.3 * activation(x) + 0.7 * activation(y))
    assert (difference.abs().max() < 1e-12) == ACTIVATIONS[name].linear


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("channel_dim", [DENSE, CONV])
def test_gradients_match_finite_differences(name, channel_dim):
    activation = shaken(make_activation(name, config(), 3, channel_dim).double())
    names, parameters = zip(*activation.named_parameters(), strict=True)
    shape = (2, 3, 3) if channel_dim == DENSE else (2, 3, 2, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(activation, dict(zip(names, values, strict=True)), (x,)),
        (x, *parameters),
    )


@pytest.mark.parametrize("name", NAMES)
def test_comes_back_bit_for_bit_from_safetensors(name):
    activation = shaken(make_activation(name, config(), 7).eval())
    x = inputs(name, (4, 7))
    again = make_activation(name, config(), 7).eval()
    again.load_state_dict(load(save(activation.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(activation.parameters(), again.parameters(), strict=True))
    assert torch.equal(activation(x), again(x))


@pytest.mark.parametrize("channel_dim", [DENSE, CONV])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("swish", F.silu),
        ("acon_c", F.silu),
        ("apl", F.relu),
        ("dynamic_relu", F.relu),
        ("mixture", lambda x: (x + x.relu() + x.tanh()) / 3),
    ],
)
def test_learned_ones_start_as_a_known_function(name, start, channel_dim):
    x = 3 * torch.randn(8, 8, 8, 8)
    torch.testing.assert_close(make_activation(name, config(), 8, channel_dim)(x), start(x))


def test_dynamic_relu_starts_as_relu_to_the_bit():
    x = 3 * torch.randn(100, 16)
    assert torch.equal(make_activation("dynamic_relu", config(), 16)(x), x.relu())


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_learned_parameter_gets_a_gradient_within_two_steps(name, precision):
    activation = make_activation(name, config(), 16)
    optimizer = torch.optim.SGD(activation.parameters(), lr=0.1)
    x, target = 2 * torch.randn(256, 16), torch.randn(256, 16)
    for _ in range(2):  # what is multiplied by what starts at 0 has none in the first
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            result = activation(x.to(precision))
        (result.float() - target).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in activation.parameters())
    assert all(bool(p.isfinite().all()) for p in activation.parameters())


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


def test_prelu_of_images_is_that_of_torch():
    ours, theirs = shaken(PReLU(6, CONV)), nn.PReLU(6)
    theirs.weight = ours.slope
    x = torch.randn(6, 6, 6, 6)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_leaky_relu_takes_its_slope_from_the_config(slope):
    x = torch.tensor([-2.0, 0.0, 3.0])
    result = make_activation("leaky_relu", config(leaky_relu_slope=slope), 3)(x)
    torch.testing.assert_close(result, torch.tensor([-2.0 * slope, 0.0, 3.0]))


def test_moving_average_is_over_the_neighbours_that_exist():
    x = torch.tensor([[1.0, 2.0, 6.0, 7.0]])
    torch.testing.assert_close(MovingAverage(3)(x), torch.tensor([[1.5, 3.0, 5.0, 6.5]]))
    torch.testing.assert_close(MovingAverage(9)(x), torch.full((1, 4), 4.0))


def test_average_of_images_is_over_the_neighbouring_pixels_that_exist():
    x = torch.tensor([[[[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]]]])
    expected = torch.tensor([[[[2.5, 4.0, 5.0], [2.5, 4.0, 5.0]]]])
    torch.testing.assert_close(make_activation("avg_pool", config(), 1, CONV)(x), expected)


@pytest.mark.parametrize("channel_dim", [DENSE, CONV])
def test_relu_avgpool_is_the_average_of_the_relu(channel_dim):
    x = torch.randn(2, 5, 5, 5)
    average = make_activation("avg_pool", config(), 5, channel_dim)
    assert torch.equal(make_activation("relu_avgpool", config(), 5, channel_dim)(x), average(x.relu()))


def test_dropout_as_activation_drops_at_its_own_rate_in_training_only():
    dropout = make_activation("dropout", config(activation_dropout=0.4, dropout=0.0), 10_000)
    x = torch.ones(1, 10_000)
    assert (dropout(x) == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_images_drops_whole_channels():
    dropped = make_activation("dropout", config(activation_dropout=0.4), 1000, CONV)(torch.ones(5, 1000, 2, 2)) == 0
    assert torch.equal(dropped.all(dim=(-2, -1)), dropped.any(dim=(-2, -1)))
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_glu_gates_the_first_half_with_the_second():
    x = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    expected = torch.tensor([[0.5, -2.0 / (1 + math.exp(-3.0))]])
    torch.testing.assert_close(make_activation("glu", config(), 2)(x), expected)


def test_acon_c_is_its_formula():
    acon = shaken(make_activation("acon_c", config(), 3).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    p1, p2, beta = acon.p1, acon.p2, acon.beta
    expected = (p1 - p2) * x / (1 + torch.exp(-beta * (p1 - p2) * x)) + p2 * x
    torch.testing.assert_close(acon(x), expected)


def test_apl_is_its_sum_written_out_for_every_channel():
    apl = shaken(make_activation("apl", config(apl_hinges=3), 2).double())
    x = 3 * torch.randn(4, 2, dtype=torch.float64)
    slope, hinge = (p.detach().unflatten(0, (3, 2)) for p in (apl.slope, apl.hinge))
    for b in range(4):
        for c in range(2):
            value = x[b, c].item()
            parts = [slope[s, c].item() * max(0.0, hinge[s, c].item() - value) for s in range(3)]
            assert apl(x)[b, c].item() == pytest.approx(max(0.0, value) + sum(parts))


@pytest.mark.parametrize("hinges", [1, 2, 5])
def test_apl_hinges_start_apart_and_around_zero(hinges):
    start = make_activation("apl", config(apl_hinges=hinges), 4).hinge.detach().unflatten(0, (hinges, 4))
    assert len(start[:, 0].unique()) == hinges
    assert start.sum().item() == pytest.approx(0, abs=1e-6)
    assert start.abs().max() < 2


@pytest.mark.parametrize(("limit", "error"), [(3, 0.071), (12, 0.32)])
def test_pau_starts_near_leaky_relu(limit, error):
    x = torch.linspace(-limit, limit, 4001, dtype=torch.float64)
    assert (PAU().double()(x) - F.leaky_relu(x, 0.01)).abs().max().item() < error


def test_pau_starts_at_its_least_squares_fit():
    x = np.linspace(-12, 12, 2401)
    weight = np.where(abs(x) <= 3, 1, 0.05)

    def fraction(c: np.ndarray) -> np.ndarray:
        return np.polyval(c[5::-1], x) / (1 + np.abs(np.polyval([*c[:5:-1], 0], x)))

    pau = PAU().double()
    start = torch.cat((pau.numerator, pau.denominator)).detach().numpy()
    fit = optimize.least_squares(lambda c: weight * (fraction(c) - np.where(x > 0, x, 0.01 * x)), start)
    np.testing.assert_allclose(fraction(start), fraction(fit.x), atol=1e-3)


def test_pau_starts_with_tails_that_are_lines_below_the_identity():
    pau = PAU()
    x = torch.tensor([-1e4, -1e3, -100.0, -30.0, 30.0, 100.0, 1e3, 1e4])
    assert bool((pau(x).abs() < x.abs()).all())
    slopes = torch.func.vmap(torch.func.grad(pau))(x)
    torch.testing.assert_close(slopes[[0, 1, -2, -1]], torch.full((4,), 0.505), atol=0.01, rtol=0)
    inner = torch.func.vmap(torch.func.grad(pau))(torch.linspace(-12, 12, 4001))
    assert -0.1 < inner.min() < inner.max() < 1.1  # leaky_relu: 0.01 and 1


def test_pau_is_its_fraction_and_has_no_pole():
    pau = shaken(PAU().double())
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    a, b = pau.numerator.detach().numpy(), pau.denominator.detach().numpy()
    expected = np.polyval(a[::-1], x) / (1 + np.abs(np.polyval([*b[::-1], 0], x)))
    np.testing.assert_allclose(pau(x).detach().numpy(), expected)
    with torch.no_grad():
        pau.denominator.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))  # without the absolute value: infinite at 1
    assert bool(pau(torch.ones(1)).isfinite().all())


def test_pau_computes_in_float32_and_answers_in_the_precision_of_its_input():
    pau = PAU()
    x = torch.linspace(-3, 3, 101).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pau(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, pau(x.float()).bfloat16())


def test_mixture_reports_its_weights_by_name():
    mixture = Mixture()
    assert mixture.weights == pytest.approx({"identity": 1 / 3, "relu": 1 / 3, "tanh": 1 / 3})
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.0, math.log(2), math.log(5)]))
    assert mixture.weights == pytest.approx({"identity": 1 / 8, "relu": 2 / 8, "tanh": 5 / 8})
    x = torch.randn(10)
    torch.testing.assert_close(mixture(x), x / 8 + x.relu() / 4 + 5 / 8 * x.tanh())


def test_dynamic_relu_depends_on_the_whole_input_and_keeps_within_its_bounds():
    dynamic = make_activation("dynamic_relu", config(), 16)
    x = torch.randn(2, 16)
    x[:, 0] = x[0, 0]
    assert torch.equal(dynamic(x)[0, 0], dynamic(x)[1, 0])
    nn.init.normal_(dynamic.coefficients.weight)
    assert dynamic(x)[0, 0] != dynamic(x)[1, 0]  # the same value of this unit, but not of others
    nn.init.constant_(dynamic.coefficients.bias, 100.0)
    x = x.abs()
    torch.testing.assert_close(dynamic(x), 2 * x + 0.5)
    nn.init.constant_(dynamic.coefficients.bias, -100.0)
    torch.testing.assert_close(dynamic(x), torch.full_like(x, -0.5))


def test_dynamic_relu_of_images_takes_its_pieces_from_the_mean_of_each_channel():
    on_images = shaken(make_activation("dynamic_relu", config(), 8, CONV).double())
    dense = make_activation("dynamic_relu", config(), 8).double()
    dense.load_state_dict(on_images.state_dict())
    x = torch.randn(3, 8, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(on_images(x).flatten(1), dense(x.flatten(1)))
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    turned = x.flatten(2).flip(-1).unflatten(-1, (4, 4))  # has the same means
    torch.testing.assert_close(on_images(turned), on_images(x).flatten(2).flip(-1).unflatten(-1, (4, 4)))
    shifted = x.clone()
    shifted[:, :, 0, 0] += 1
    assert not torch.allclose(on_images(shifted)[:, :, 1:], on_images(x)[:, :, 1:])


@pytest.mark.parametrize("name", TABLE)
def test_gain_matches_the_reference_table(name):
    assert variance_gain(name, config(), 128) == pytest.approx(TABLE[name], abs=6e-4)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.5, 1.0])
def test_gain_of_leaky_relu_matches_its_closed_form(slope):
    gain = variance_gain("leaky_relu", config(leaky_relu_slope=slope), 128)
    assert gain == pytest.approx(math.sqrt(2 / (1 + slope**2)), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "closed_form"),
    [("relu2", math.sqrt(2 / 3)), ("apl", math.sqrt(2)), ("dynamic_relu", math.sqrt(2))],
)
def test_gain_matches_its_closed_form(name, closed_form):
    assert variance_gain(name, config(), 128) == pytest.approx(closed_form, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "function", "rel"),
    [
        ("silu", lambda z: z / (1 + np.exp(-z)), 1e-10),
        ("swish", lambda z: z / (1 + np.exp(-z)), 1e-10),
        ("acon_c", lambda z: z / (1 + np.exp(-z)), 1e-10),
        ("tanh", np.tanh, 1e-10),
        ("glu", lambda z: 1 / (1 + np.exp(-z)), 1e-10),  # of the gate; the other factor has moment 1
        ("mixture", lambda z: (z + max(z, 0) + np.tanh(z)) / 3, 1e-10),
        ("hardswish", lambda z: z * min(max(z + 3, 0), 6) / 6, 1e-5),  # kinks where the quadrature has no split
    ],
)
def test_gain_matches_adaptive_quadrature(name, function, rel):
    moment, _ = integrate.quad(
        lambda z: function(z) ** 2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
        -12,
        12,
        epsabs=1e-13,
        points=(-3, 0, 3),
    )
    assert variance_gain(name, config(), 128) == pytest.approx(moment**-0.5, rel=rel)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "exponential"])
def test_gain_matches_a_simulation(name):
    activation = make_activation(name, config(), 16).eval()
    with torch.no_grad():
        moment = activation(inputs(name, (40_000, 16))).square().mean().item()
    assert variance_gain(name, config(), 16) == pytest.approx(moment**-0.5, rel=0.01)


@pytest.mark.parametrize(("width", "window"), [(1, 3), (4, 3), (128, 5), (1100, 3)])
def test_gain_of_averages_matches_the_matrix_written_out(width, window):
    matrix = np.zeros((width, width))
    for i in range(width):
        low, high = max(0, i - window // 2), min(width, i + window // 2 + 1)
        matrix[i, low:high] = 1 / (high - low)
    expected = math.sqrt(width / (matrix**2).sum())
    assert variance_gain("avg_pool", config(avg_pool_window=window), width) == pytest.approx(expected)
    # E relu(Z_j) relu(Z_k): 1/2 for j = k, else the square of the mean 1/sqrt(2 pi)
    second = np.full((width, width), 1 / (2 * math.pi))
    np.fill_diagonal(second, 1 / 2)
    expected = math.sqrt(width / np.einsum("ij,jk,ik->", matrix, second, matrix, optimize=True))
    assert variance_gain("relu_avgpool", config(avg_pool_window=window), width) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["avg_pool", "relu_avgpool"])
@pytest.mark.parametrize("window", [3, 5])
def test_gain_of_averages_of_images_is_that_of_interior_pixels(name, window):
    setting = config(avg_pool_window=window)
    averaged = make_activation(name, setting, 20, CONV)(torch.randn(20, 20, 40, 40))
    moment = averaged[..., window // 2 : -(window // 2), window // 2 : -(window // 2)].square().mean().item()
    assert variance_gain(name, setting, 20, is_conv=True) == pytest.approx(moment**-0.5, rel=0.02)


def test_gain_of_the_others_is_the_same_for_images_and_any_width():
    others = [name for name in NAMES if "pool" not in name]
    assert len(others) == len(NAMES) - 2
    for name in others:
        assert variance_gain(name, config(), 7, is_conv=True) == variance_gain(name, config(), 128)


def test_gain_draws_nothing_and_is_found_while_a_model_is_built_on_no_device():
    before = torch.get_rng_state()
    for name in NAMES:
        expected = variance_gain(name, config(), 37)
        with torch.device("meta"):
            assert all(p.is_meta for p in make_activation(name, config(), 37).parameters())
            assert variance_gain(name, config(), 37) == expected
            assert variance_gain(name, config(), 38) == pytest.approx(expected, rel=0.01)  # not one kept from before
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("exponential", "relu2")])
def test_second_moment_stays_at_one_through_six_layers(name):
    width, rows = 1024, 128
    generator = torch.Generator().manual_seed(0)
    activation = make_activation(name, config(), width).eval()
    gain = variance_gain(name, config(), width)
    wide = input_width(name, width)
    pre = torch.randn(rows, wide, generator=generator)
    for _ in range(6):
        weight = torch.randn(width, wide, generator=generator) * gain / math.sqrt(width)
        pre = activation(pre).detach() @ weight
    assert 0.8 < pre.square().mean().item() < 1.25


@pytest.mark.parametrize("q", [0.5, 1.0, 1.2])
def test_relu2_squares_the_second_moment_so_that_one_is_an_unstable_fixed_point(q):
    x = math.sqrt(q) * torch.randn(1_000_000, 1)
    moment = make_activation("relu2", config(), 1)(x).square().mean().item()
    assert variance_gain("relu2", config(), 1) ** 2 * moment == pytest.approx(q**2, rel=0.05)


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
    gain = variance_gain("exponential", config(), 128)
    assert gain**2 < 1 / (2 * math.e)
    q = 1.0
    for _ in range(200):
        q = exponential_map(q, gain)
    assert q == pytest.approx(exponential_map(q, gain), rel=1e-9)
    assert q < 0.5  # f' = f, so the factor of a layer's backward pass is g^2 E f'^2 = q
