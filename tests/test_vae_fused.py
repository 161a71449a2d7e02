"""The gradient by hand against autograd, and the coins that training draws against what they are to be."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import vae.fused
from vae.activations import ACTIVATIONS
from vae.config import DataConfig, ModelConfig, TrainConfig
from vae.data import Dataset
from vae.draws import coins, limits, mask_like
from vae.fused import PlainGradient, covers
from vae.likelihoods import Bernoulli
from vae.model import VAE
from vae.objective import free_bits_kl, gaussian_kl
from vae.training import Trainer

COVERED = [
    "elu", "exponential", "gelu", "hardswish", "leaky_relu", "linear", "mish", "relu", "selu", "sigmoid", "silu",
    "softplus", "tanh",
]  # fmt: skip
KL_WEIGHT = 0.7


def make_model(**settings: object) -> VAE:
    torch.manual_seed(0)
    config = ModelConfig(**{"input_dim": 21, "latent_dim": 5, "hidden_dims": (24, 17), **settings})
    model = VAE(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 16, grey: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(rows, 21, generator=generator)
    return x if grey else (x < 0.5).float(), torch.randn(rows, 5, generator=generator)


def by_autograd(model: VAE, x: Tensor, noise: Tensor, free_bits: float = 0.0, bfloat16: bool = False) -> list[Tensor]:
    """Loss, recon and kl, and all gradients, of a copy of the model."""
    model = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        outputs, mu, logvar = model(x, noise)
    recon, kl = -model.likelihood.log_prob(outputs, x).mean(), gaussian_kl(mu, logvar).mean()
    loss = recon + KL_WEIGHT * (free_bits_kl(mu, logvar, free_bits) if free_bits else kl)
    loss.backward()
    return [loss.detach(), recon.detach(), kl.detach(), *(p.grad for p in model.parameters())]


def by_hand(model: VAE, x: Tensor, noise: Tensor, free_bits: float = 0.0, bfloat16: bool = False) -> list[Tensor]:
    model = copy.deepcopy(model)
    gradient = PlainGradient(model, torch.bfloat16 if bfloat16 else torch.float32)
    losses = gradient.backward(x.clone(), noise, KL_WEIGHT, free_bits)
    assert gradient.gradient.norm() == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    )
    return [*losses, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("free_bits", [0.0, 0.3])
@pytest.mark.parametrize("hidden_dims", [(), (24,), (24, 17)])
@pytest.mark.parametrize("activation", COVERED)
def test_losses_and_gradients_are_those_of_autograd(activation, hidden_dims, free_bits):
    model = make_model(activation=activation, hidden_dims=hidden_dims, leaky_relu_slope=0.2)
    for grey in (True, False):
        torch.testing.assert_close(
            by_hand(model, *batch(grey=grey), free_bits), by_autograd(model, *batch(grey=grey), free_bits),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_free_bits_hold_some_dimensions_back_and_not_others():
    """Or the test above shows nothing."""
    x, noise = batch()
    mu, logvar = make_model().encode(x)
    kl = vae.objective.kl_per_dimension(mu, logvar).mean(dim=0)
    assert 0 < (kl >= 0.3).sum() < len(kl)
    assert noise.shape == mu.shape


def test_encoder_and_decoder_may_have_activations_of_their_own_and_a_batch_one_row():
    model = make_model(activation="tanh", decoder_activation="silu")
    torch.testing.assert_close(by_hand(model, *batch(rows=1)), by_autograd(model, *batch(rows=1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", COVERED)
def test_bfloat16_is_as_near_to_float32_as_under_autocast(activation):
    model = make_model(activation=activation)
    exact = by_autograd(model, *batch(64))
    ours, torchs = (
        [float((value - true).norm() / true.norm()) for value, true in zip(found, exact, strict=True)]
        for found in (by_hand(model, *batch(64), bfloat16=True), by_autograd(model, *batch(64), bfloat16=True))
    )
    assert max(ours) < max(0.02, 1.5 * max(torchs))
    assert max(ours) > 1e-4  # it is bfloat16


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@pytest.mark.parametrize("activation", ["relu", "silu"])  # f' from h, and from a
def test_dropout_keeps_and_scales_up_what_its_masks_say(monkeypatch, activation):
    model, dropout = make_model(activation=activation, dropout=0.25), 0.25
    masks = []

    def spy(x: Tensor, keep: float) -> Tensor:
        masks.append(mask_like(x, keep))
        return masks[-1].clone()

    monkeypatch.setattr(vae.fused, "mask_like", spy)
    found = by_hand(model, *batch())
    assert [mask.shape for mask in masks] == [(16, 24), (16, 17), (16, 17), (16, 24)]
    assert 0.5 < torch.cat([mask.flatten() for mask in masks]).mean() < 0.9
    for (_, _, block), mask in zip(model.blocks(), masks, strict=True):
        block.dropout = Masked(mask / (1 - dropout))
    torch.testing.assert_close(found, by_autograd(model, *batch()), rtol=1e-4, atol=1e-5)


def test_what_is_covered_and_what_is_left_to_autograd():
    def is_covered(kind: type[VAE] = VAE, **settings: object) -> bool:
        return covers(kind(ModelConfig(input_dim=4, hidden_dims=(3,), **settings)))

    assert [name for name in sorted(ACTIVATIONS) if is_covered(activation=name)] == COVERED
    assert not is_covered(decoder_activation="prelu")
    assert not is_covered(normalization="layer")
    assert not is_covered(likelihood="gaussian")
    assert not is_covered(image_shape=(2, 2), body="conv")

    class Other(VAE):
        """With a forward of its own, perhaps."""

    assert not is_covered(Other)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 48)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_the_cross_entropy_is_that_of_the_likelihood_however_large_the_logits(shape, scale):
    logits = (scale * torch.randn(shape)).requires_grad_()
    x = torch.rand(shape).round(decimals=1)
    likelihood = Bernoulli(ModelConfig(input_dim=shape[1]))
    expected = -likelihood.log_prob(logits, x).mean()
    expected.backward()
    recon, grad = vae.fused._cross_entropy(logits.detach().clone(), x)
    torch.testing.assert_close(recon, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, logits.grad)


def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not():
    for value in (torch.nan, torch.inf, -torch.inf):
        recon, _ = vae.fused._cross_entropy(torch.tensor([[0.0, value]]), torch.tensor([[1.0, 0.5]]))
        assert not recon.isfinite()


def test_a_model_keeps_its_values_its_names_and_how_it_is_saved():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    PlainGradient(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded = safetensors.torch.load(safetensors.torch.save(after))
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.mu.bias.fill_(7)
    assert not torch.equal(copied.mu.bias, model.mu.bias)


def test_training_by_hand_goes_where_autograd_goes():
    rng = np.random.default_rng(0)
    train, validation = (rng.random((rows, 21)).round().astype(np.float32) for rows in (200, 50))
    data = Dataset(
        config=DataConfig(source="rows.npy", binarize="static"), train=train, validation=validation, test=validation,
        fingerprint="0" * 64, image_shape=None, columns=None, shift=None, factor=None,
    )  # fmt: skip
    model = ModelConfig(input_dim=21, hidden_dims=(16,), latent_dim=3)
    ours, torchs = (Trainer(model, TrainConfig(max_epochs=5, weight_decay=0.1), data, seed=0) for _ in range(2))
    assert torchs._by_hand is not None
    torchs._by_hand = None
    for mine, theirs in zip(ours, torchs, strict=True):
        assert mine.val_nelbo == pytest.approx(theirs.val_nelbo, abs=1e-4)
        assert mine.train_recon == pytest.approx(theirs.train_recon, abs=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


# ---- draws


def test_coins_fall_as_often_as_their_probability_says():
    torch.manual_seed(0)
    p = torch.tensor([1 / 255, 0.1, 0.5, 0.9, 254 / 255, 2**-14])
    rows = 400_000
    found = coins(limits(p.expand(rows, -1)))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    z = (found.double().mean(dim=0) - p) / (p * (1 - p) / rows).sqrt()
    assert z.abs().max() < 4
    # in pairs of neighbours, which share a word of the generator
    pairs = torch.corrcoef(coins(limits(torch.full((200_000, 8), 0.5))).T) - torch.eye(8)
    assert pairs.abs().max() < 4.5 / 200_000**0.5


def test_coins_of_probability_0_and_1_are_certain_and_their_type_and_shape_kept():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 1.0]).repeat(500_001, 1)[:, :2]
    assert torch.equal(coins(limits(p)), p)
    assert coins(limits(torch.rand(3, 5, 7))).shape == (3, 5, 7)
    assert coins(limits(torch.rand(1))).dtype == torch.float32


def test_each_of_the_numbers_behind_coins_is_drawn_equally_often():
    torch.manual_seed(0)
    numbers = vae.draws._numbers(torch.empty(2**20)).float()
    assert (numbers.min(), numbers.max()) == (-(2**15), -1)
    counts = torch.histc(numbers, 256, -(2**15), 0)
    chi_square = ((counts - 4096) ** 2 / 4096).sum()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.875])
def test_masks_keep_the_share_they_are_told(keep):
    torch.manual_seed(0)
    mask = mask_like(torch.empty(1000, 400, dtype=torch.bfloat16), keep)
    assert mask.dtype == torch.float32
    assert mask.mean() == pytest.approx(keep, abs=4 * (keep * (1 - keep) / 400_000) ** 0.5)


def test_coins_come_again_with_the_generators_state_and_only_then():
    state, p = torch.get_rng_state(), limits(torch.rand(64, 64))
    first, second = coins(p), coins(p)
    torch.set_rng_state(state)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    again = coins(p)
    torch.set_rng_state(state)
    assert torch.equal(coins(p), again)
