"""The network: linear heads, the soft clamp, where dropout is, and that a seed decides the first weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vae.activations import ACTIVATIONS, variance_gain
from vae.config import ModelConfig
from vae.layers import SelfAttention
from vae.model import LOGVAR_MAX, LOGVAR_MIN, VAE, num_parameters
from vae.objective import elbo_terms

LINEAR = [name for name, spec in ACTIVATIONS.items() if spec.linear]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(**changes: object) -> VAE:
    return VAE(ModelConfig(**{"input_dim": 6, "latent_dim": 3, "hidden_dims": (8, 5), **changes}))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_shapes_for_every_activation_with_and_without_importance_samples(name):
    model = make(activation=name)
    x = torch.rand(4, 6)
    outputs, mu, logvar = model(x, torch.randn(4, 3))
    assert outputs.shape == (4, 6)
    assert mu.shape == logvar.shape == (4, 3)
    outputs, mu, logvar = model(x, torch.randn(2, 4, 3))
    assert outputs.shape == (2, 4, 6)
    assert mu.shape == logvar.shape == (4, 3)


def test_the_decoder_mirrors_the_encoder():
    model = make(hidden_dims=(8, 5))
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(6, 8), (8, 5), (5, 3), (5, 3), (3, 5), (5, 8), (8, 6)]
    assert model.num_parameters == sum(i * o + o for i, o in shapes)


def test_the_posterior_sample_is_mean_plus_scaled_noise():
    model, x, noise = make(), torch.rand(4, 6), torch.randn(4, 3)
    mu, logvar = model.encode(x)
    torch.testing.assert_close(model(x, noise)[0], model.decode(mu + logvar.exp().sqrt() * noise))


def test_without_hidden_layers_it_is_a_linear_vae():
    model = make(hidden_dims=(), dropout=0.5).double()
    x, y = torch.rand(2, 4, 6, dtype=torch.float64)
    mixed = model.encode(0.3 * x + 0.7 * y)[0]
    torch.testing.assert_close(mixed, 0.3 * model.encode(x)[0] + 0.7 * model.encode(y)[0])
    assert [name for name, _ in model.named_parameters()] == [
        f"{layer}.{kind}" for layer in ("mu", "logvar", "outputs") for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_encoder_and_decoder_are_affine_with_linear_activations_and_no_others(name):
    model = make(activation=name, dropout=0.3).double().eval()
    x, y = torch.rand(2, 4, 6, dtype=torch.float64) * 10 - 5
    u, v = torch.randn(2, 4, 3, dtype=torch.float64) * 5
    affine = [
        torch.allclose(f(0.3 * a + 0.7 * b), 0.3 * f(a) + 0.7 * f(b), rtol=1e-9, atol=1e-9)
        for f, a, b in ((lambda x: model.encode(x)[0], x, y), (model.decode, u, v))
    ]
    assert affine == [name in LINEAR] * 2


def test_the_mean_is_unbounded_and_the_log_variance_softly_bounded():
    model = make(activation="tanh")
    with torch.no_grad():
        for head in (model.mu, model.logvar):
            head.weight.zero_()
            head.bias.copy_(torch.tensor([-1e4, 0.0, 1e4]))
    mu, logvar = model.encode(torch.rand(1, 6))
    assert mu.tolist() == [[-1e4, 0.0, 1e4]]
    assert logvar[0, 0].item() == pytest.approx(LOGVAR_MIN)
    assert logvar[0, 2].item() == pytest.approx(LOGVAR_MAX)
    assert logvar[0, 1].item() == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("raw", [LOGVAR_MIN - 6.0, LOGVAR_MAX + 6.0])
def test_the_clamp_has_a_gradient_beyond_its_bounds(raw):
    model = make()
    with torch.no_grad():
        model.logvar.weight.zero_()
        model.logvar.bias.fill_(raw)
    model.encode(torch.rand(1, 6))[1].sum().backward()
    assert (model.logvar.bias.grad > 1e-4).all()


def test_dropout_follows_hidden_activations_only():
    model = make(activation="tanh", dropout=0.5)
    for body in (model.encoder, model.decoder):
        layers = [module for module in body.modules() if isinstance(module, nn.Linear | nn.Tanh | nn.Dropout)]
        assert [type(layer) for layer in layers] == [nn.Linear, nn.Tanh, nn.Dropout] * 2
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 4


def test_latents_and_outputs_are_never_dropped():
    model = make(dropout=0.9).train()
    with torch.no_grad():
        for head in (model.mu, model.logvar, model.outputs):
            head.weight.zero_()
            head.bias.fill_(2.0)
    for _ in range(20):
        outputs, mu, logvar = model(torch.rand(16, 6), torch.randn(16, 3))
        assert (outputs == 2).all()
        assert (mu == 2).all()
        assert (logvar == logvar[0, 0]).all()


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, x = make(dropout=0.5, hidden_dims=(64,)), torch.rand(4, 6)
    assert not torch.equal(model.encode(x)[0], model.encode(x)[0])
    model.eval()
    assert torch.equal(model.encode(x)[0], model.encode(x)[0])


def test_first_weights_have_the_stated_scales():
    model = VAE(ModelConfig(input_dim=400, latent_dim=300, hidden_dims=(500, 600), activation="silu"))
    gain = variance_gain("silu", model.config, 500)
    assert len(model.blocks()) == 4
    for _, _, block in model.blocks():
        assert block.linear.weight.std().item() == pytest.approx(gain / math.sqrt(block.linear.in_features), rel=0.02)
        assert not block.linear.bias.any()
    for head, head_gain in ((model.mu, 1.0), (model.logvar, 0.1), (model.outputs, 1.0)):
        scale = head_gain * math.sqrt(2 / (head.in_features + head.out_features))
        assert head.weight.std().item() == pytest.approx(scale, rel=0.02)
        assert not head.bias.any()


def test_with_zero_output_weights_the_loss_is_the_no_latent_baseline():
    x = (np.random.default_rng(0).random((50, 6)) < [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]).astype(np.float32)
    model = VAE(ModelConfig(input_dim=6, latent_dim=3), x)
    with torch.no_grad():
        model.outputs.weight.zero_()
        recon = elbo_terms(model, torch.from_numpy(x), torch.randn(50, 3)).recon.mean().item()
    baseline = model.likelihood.no_latent_nelbo(x, x)
    assert recon == pytest.approx(baseline, rel=1e-5)


def test_a_seed_decides_the_first_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(make().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_samples_follow_the_generator_and_are_means_or_draws():
    model = make(dropout=0.5).train()
    means = [model.sample(9, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*means)
    assert means[0].shape == (9, 6)
    assert ((means[0] > 0) & (means[0] < 1)).all()
    assert model.training
    draws = model.sample(9, torch.Generator().manual_seed(3), mean=False)
    assert set(draws.unique().tolist()) <= {0.0, 1.0}


def test_reconstructions_pass_through_the_posterior_mean():
    model, x = make(dropout=0.5).train(), torch.rand(4, 6)
    reconstruction = model.reconstruct(x)
    assert model.training
    model.eval()
    torch.testing.assert_close(reconstruction, model(x, torch.zeros(4, 3))[0].sigmoid())


@pytest.mark.parametrize("activation", ["silu", "prelu", "glu", "dynamic_relu"])
@pytest.mark.parametrize("more", [{}, {"hidden_dims": ()}, {"body": "conv", "image_shape": (2, 3), "channels": (4, 6)}])
def test_the_number_of_parameters_is_known_without_building_the_model(activation, more):
    config = ModelConfig(**{"input_dim": 6, "latent_dim": 5, "hidden_dims": (40, 24), "activation": activation, **more})
    before = torch.get_rng_state()
    number = num_parameters(config)
    assert torch.equal(before, torch.get_rng_state())
    assert number == VAE(config).num_parameters


# ---- convolutional bodies


IMAGES = [((8, 8), None), ((7, 5), (2, 2)), ((9, 6, 3), (1, 3))]


def conv(image_shape: tuple[int, ...], **values: Any) -> VAE:
    return VAE(
        ModelConfig(
            input_dim=math.prod(image_shape),
            image_shape=image_shape,
            body="conv",
            channels=(4, 6),
            latent_dim=3,
            hidden_dims=(10,),
            **values,
        )
    )


@pytest.mark.parametrize(("image_shape", "strides"), IMAGES)
@pytest.mark.parametrize("attention", ["none", "squeeze_excitation", "self_attention"])
def test_convolutions_take_and_give_rows_of_any_image_and_leading_dimensions(image_shape, strides, attention):
    model = conv(image_shape, strides=strides, attention=attention, activation="glu").eval()
    x, noise = torch.rand(5, math.prod(image_shape)), torch.randn(4, 5, 3)
    outputs, mu, _ = model(x, noise)
    assert outputs.shape == (4, 5, x.shape[1])
    assert mu.shape == (5, 3)
    for k in range(4):  # importance samples are as if they came one by one
        torch.testing.assert_close(outputs[k], model(x, noise[k])[0], rtol=1e-4, atol=1e-5)


def test_the_convolutional_decoder_goes_back_through_the_sizes_and_channels_of_the_encoder():
    model = conv((28, 20), strides=(2, 2)).eval()
    shapes: dict[str, list[tuple[int, ...]]] = {"encoder": [], "decoder": []}
    for net, _, block in model.blocks():
        block.register_forward_hook(lambda module, inputs, output, net=net: shapes[net].append(output.shape[1:]))
    model(torch.rand(2, 560), torch.zeros(2, 3))
    assert shapes["encoder"] == [(4, 14, 10), (6, 7, 5), (10,)]
    assert shapes["decoder"] == [(10,), (6, 7, 5), (4, 14, 10)]
    assert [type(block.dropout) for _, _, block in model.blocks()] == [
        nn.Dropout2d, nn.Dropout2d, nn.Dropout, nn.Dropout, nn.Dropout2d, nn.Dropout2d,
    ]  # fmt: skip


def test_rows_are_read_as_height_width_and_channels():
    model = conv((4, 6, 3))
    x = torch.arange(72.0)[None]
    image = model.encoder[0](x)
    assert image.shape == (1, 3, 4, 6)
    assert image[0, 1, 2, 5] == x[0, (2 * 6 + 5) * 3 + 1]


def test_a_convolutional_model_is_blind_to_nothing_and_its_outputs_have_the_data_s_means_at_first():
    x = np.random.default_rng(0).random((60, 48)).astype(np.float32) * np.linspace(0.1, 1, 48, dtype=np.float32)
    config = ModelConfig(input_dim=48, image_shape=(4, 4, 3), body="conv", channels=(4,), latent_dim=2)
    model = VAE(config, x)
    torch.testing.assert_close(model.outputs.bias.sigmoid(), torch.from_numpy(x.mean(axis=0)), rtol=1e-4, atol=1e-4)
    row = torch.rand(1, 48, requires_grad=True)
    model.encode(row)[0].sum().backward()
    assert (row.grad != 0).float().mean() > 0.9


def test_self_attention_is_that_of_its_definition():
    block = SelfAttention(8).double()
    torch.nn.init.constant_(block.weight, 0.7)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    flat = x.flatten(2).transpose(1, 2)
    query, key, value = (flat @ h.weight[:, :, 0, 0].T + h.bias for h in (block.query, block.key, block.value))
    seen = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]), dim=-1) @ value
    torch.testing.assert_close(block(x), x + 0.7 * seen.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("body", ["mlp", "conv"])
def test_statistics_of_batch_normalisation_are_never_taken_from_importance_samples(body):
    model = VAE(ModelConfig(input_dim=64, image_shape=(8, 8), body=body, normalization="batch", latent_dim=3)).train()
    x, noise = torch.rand(5, 64), torch.randn(4, 5, 3)
    before = [value.clone() for value in model.decoder.buffers()]
    with pytest.raises(ValueError, match="batch normalisation"):
        model(x, noise)
    assert all(torch.equal(old, new) for old, new in zip(before, model.decoder.buffers(), strict=True))
    model(x, noise[0])
    assert not all(torch.equal(old, new) for old, new in zip(before, model.decoder.buffers(), strict=True))
    model.eval()
    assert model(x, noise)[0].shape == (4, 5, 64)


def test_group_normalisation_is_over_groups_that_divide_the_channels():
    norms = [module for module in conv((8, 8), normalization="group").modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(4, 4), (6, 6), (6, 6), (4, 4)]


def test_encoder_and_decoder_may_have_an_activation_each():
    model = make(activation="tanh", decoder_activation="prelu")
    assert {(net, type(block.activation).__name__) for net, _, block in model.blocks()} == {
        ("encoder", "Tanh"),
        ("decoder", "PReLU"),
    }
