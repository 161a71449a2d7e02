"""What docs/article.md says against the founding article, shown: its faults, each planted in a model that is right."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import vae.training
from search.spec import StudySpec
from search.tables import SCHEMAS
from vae.config import ActivationName, DataConfig, ModelConfig, TrainConfig, get_args
from vae.data import Dataset, load_data
from vae.model import VAE
from vae.objective import gaussian_kl, importance_weighted
from vae.training import EpochMetrics, Trainer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "article.md"


class OneOutputTwice(VAE):
    """The same output of the encoder as mean and as log variance."""

    def encode(self, x):
        output = self.mu(self.encoder(x))
        return output, output


class WithoutMean(VAE):
    """z is scaled noise, to which the mean is not added."""

    def forward(self, x, noise):
        mu, logvar = self.encode(x)
        return self.decode((logvar / 2).exp() * noise), mu, logvar


class ArticleVAE(OneOutputTwice, WithoutMean):
    """The article's sample, but for its outputs: they are logits, so that it trains at all."""


@dataclass(frozen=True)
class Trained:
    last: EpochMetrics
    no_latent: float
    nll: float


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig(source="digits"))


@pytest.fixture(scope="module")
def train(digits: Dataset) -> Train:
    @cache
    def train(kind: type[VAE] = VAE, beta: float = 1.0) -> Trained:
        model = ModelConfig(input_dim=64, latent_dim=10, activation="tanh")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vae.training, "VAE", kind)
            trainer = Trainer(model, TrainConfig(learning_rate=3e-3, max_epochs=20, beta=beta), digits, seed=0)
        last = list(trainer)[-1]
        estimate = importance_weighted(trainer.model, torch.from_numpy(digits.validation), 20, seed=0)
        return Trained(last, trainer.no_latent_nelbo, estimate.nll)

    return train


def test_the_right_model_learns_the_digits(train):
    right = train()
    assert right.last.active_units == 10
    assert right.last.val_nelbo < right.no_latent - 2


def test_the_sample_of_the_article_collapses(train):
    sample = train(ArticleVAE)
    assert sample.last.val_kl < 0.05
    assert sample.last.active_units == 0
    assert sample.last.val_nelbo > sample.no_latent - 0.2
    assert sample.nll > sample.no_latent - 0.5  # so it is not the bound that is loose


def test_a_latent_without_its_mean_is_enough_to_collapse(train):
    faulty = train(WithoutMean)
    assert faulty.last.val_kl < 0.05
    assert faulty.last.active_units == 0
    assert faulty.last.val_nelbo > faulty.no_latent - 0.2


def test_one_output_for_mean_and_log_variance_costs_most_of_what_is_learned(train):
    assert train(OneOutputTwice).last.val_nelbo > train().last.val_nelbo + 2


def test_an_error_averaged_over_pixels_against_a_kl_summed_over_latents_collapses(train):
    faulty = train(beta=64.0)  # 1/64 of the sum over pixels, plus the KL: the same, times 64
    assert faulty.last.active_units == 0
    assert faulty.last.val_nelbo > faulty.no_latent - 0.2


def test_mean_and_log_variance_are_two_outputs_of_the_encoder(digits):
    torch.manual_seed(0)
    mu, logvar = VAE(ModelConfig(input_dim=64, latent_dim=10)).encode(torch.from_numpy(digits.test))
    assert (mu - logvar).abs().max() > 0.1


def test_the_kl_does_not_penalise_uncertainty_but_pulls_it_to_one():
    logvar = torch.tensor([[-2.0], [0.0], [2.0]])
    narrow, unit, wide = gaussian_kl(torch.zeros(3, 1), logvar).tolist()
    assert unit == 0
    assert narrow > 0.5
    assert wide > 0.5


def test_relu_kills_units_at_a_high_learning_rate_and_its_leaky_relatives_do_not(digits):
    def dead(activation: ActivationName) -> list[float]:
        model = ModelConfig(input_dim=64, latent_dim=10, activation=activation, leaky_relu_slope=0.2)
        config = TrainConfig(learning_rate=1e-2, lr_schedule="constant", max_epochs=8)
        trainer = Trainer(model, config, digits, seed=0)
        list(trainer)
        return [layer.dead for layer in trainer.diagnose().diagnostics.layers]

    assert max(dead("relu")) > 0.4
    assert max(dead("leaky_relu")) == max(dead("prelu")) == 0


@pytest.mark.parametrize("activation", ["linear", "avg_pool"])
def test_a_linear_activation_leaves_probabilistic_pca(activation):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 8)) + 0.5 * rng.normal(size=(2000, 8)) + rng.normal(size=8)
    train, validation, test = np.split(rows.astype(np.float32), [1200, 1600])
    data = Dataset(
        config=DataConfig(source="plane.npy", support="real", binarize="none"),
        train=train,
        validation=validation,
        test=test,
        fingerprint="0" * 64,
        image_shape=None,
        columns=None,
        shift=None,
        factor=None,
    )
    model = ModelConfig(input_dim=8, latent_dim=2, hidden_dims=(12,), activation=activation, likelihood="gaussian")
    config = TrainConfig(learning_rate=3e-2, batch_size=100, max_epochs=30, kl_warmup_epochs=0)
    trainer = Trainer(model, config, data, seed=0)
    list(trainer)
    estimate = importance_weighted(trainer.model, torch.from_numpy(test), 100, seed=0)
    exact = -PCA(n_components=2).fit(train).score(test)
    assert estimate.nll == pytest.approx(exact, abs=0.05)
    assert estimate.nelbo == pytest.approx(exact, abs=0.05)  # the bound is tight: the exact posterior is Gaussian


# ---- the page


def test_the_page_has_every_claim_once_and_in_order():
    numbers = re.findall(r"^(\d+)\. \*\*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 31)]


def test_the_page_names_what_exists():
    text = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"`([^`\n]+)`", text)
    spec = StudySpec().model_dump()
    for name in names:
        where, _, what = name.partition(".")
        if where in spec and isinstance(spec[where], dict) and what:
            assert what.split(" ")[0] in spec[where], name
        elif where in SCHEMAS and what:
            assert what in SCHEMAS[where].names, name
        elif name.startswith("test_"):
            assert f"def {name}(" in Path(__file__).read_text(encoding="utf-8"), name
        elif "/" in name and name.endswith((".py", ".md")):
            assert (ROOT / name).is_file(), name
    assert set(get_args(ActivationName)) <= set(names)
