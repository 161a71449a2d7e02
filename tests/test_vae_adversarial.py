"""The VAE-GAN trainer: who is moved by which loss, what it reaches on the digits, and a Trainer's own promises."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vae.adversarial
from vae.adversarial import AdversarialTrainer, Discriminator, make_trainer
from vae.config import DataConfig, ModelConfig, TrainConfig
from vae.data import Dataset, load_data
from vae.layers import Block
from vae.objective import evaluate
from vae.training import Diverged, EpochMetrics, Trainer

TIMES = ("wall_s", "samples_per_s")
NETWORKS = ("encoder", "decoder", "discriminator", "likelihood")


@pytest.fixture
def tiny() -> Dataset:
    """41 rows of 2 x 3 grey pixels in two clusters; 41 leaves a last batch of one row at a batch size of 20."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.9, 0.8, 0.9, 0.1, 0.2, 0.1], [0.1, 0.2, 0.1, 0.9, 0.8, 0.9]])
    rows = (centres[rng.integers(0, 2, 61)] + rng.uniform(-0.1, 0.1, (61, 6))).astype(np.float32)
    return Dataset(
        config=DataConfig(source="tiny.npy", binarize="none"),
        train=rows[:41],
        validation=rows[41:51],
        test=rows[51:],
        fingerprint="0" * 64,
        image_shape=(2, 3),
        columns=None,
        shift=None,
        factor=None,
    )


def make(data: Dataset, *, seed: int = 0, train: dict[str, object] | None = None, **model: object) -> Trainer:
    model = {"latent_dim": 3, "hidden_dims": (8,), "image_shape": (2, 3), "channels": (4,), **model}
    train = {"objective": "vae_gan", "batch_size": 20, "max_epochs": 4, **(train or {})}
    return make_trainer(ModelConfig(input_dim=data.input_dim, **model), TrainConfig(**train), data, seed=seed)


def figures(metrics: EpochMetrics) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(metrics).items() if name not in TIMES}


def weights(trainer: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer._parameters).detach().clone()


def draw(data: Dataset, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """x, noise, and the prior's z that `_backward` will draw right after `torch.manual_seed(1)`."""
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(5))
    prior = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1))
    return torch.from_numpy(data.train[:rows].copy()), noise, prior


def gradients(trainer: Trainer, x: Tensor, noise: Tensor) -> dict[str, list[Tensor]]:
    """Of each network's parameters, as the trainer's step has them."""
    trainer.optimizer.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        trainer._backward(x, noise)
    return {name: [p.grad.clone() for p in trainer._moved_by[name]] for name in NETWORKS}


def test_make_trainer_goes_by_the_objective(tiny):
    assert type(make(tiny)) is AdversarialTrainer
    plain = make(tiny, train={"objective": "elbo"})
    assert type(plain) is Trainer
    config = dataclasses.replace(plain.config, objective="elbo")
    assert [figures(m) for m in plain] == [figures(m) for m in Trainer(plain.model.config, config, tiny, seed=0)]


def test_the_model_starts_as_that_of_the_plain_trainer(tiny):
    pair = make(tiny), make(tiny, train={"objective": "elbo"})
    for first, second in zip(*(trainer.model.parameters() for trainer in pair), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_are_refused_in_words(tiny, likelihood):
    counts = dataclasses.replace(tiny, train=tiny.train.round(), validation=tiny.validation.round())
    with pytest.raises(ValueError, match=f"likelihood = {likelihood} set objective = elbo"):
        make(counts, likelihood=likelihood)


def test_a_model_of_another_width_than_the_data_is_refused(tiny):
    with pytest.raises(ValueError, match="5 features and the data have 6"):
        make_trainer(ModelConfig(input_dim=5), TrainConfig(objective="vae_gan"), tiny, seed=0)


@pytest.mark.parametrize("body", ["mlp", "conv"])
def test_every_parameter_belongs_to_one_network_and_to_the_optimizer(tiny, body):
    trainer = make(tiny, body=body, likelihood="gaussian", activation="prelu", train={"weight_decay": 0.5})
    everything = sorted(id(p) for net in (trainer.model, trainer.discriminator) for p in net.parameters())
    assert sorted(id(p) for name in NETWORKS for p in trainer._moved_by[name]) == everything
    assert sorted(id(p) for p in trainer._parameters) == everything
    groups = trainer.optimizer.param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == everything
    assert all(group["weight_decay"] == (0.5 if p.ndim >= 2 else 0.0) for group in groups for p in group["params"])


def written_out(trainer: AdversarialTrainer, x: Tensor, noise: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """The losses once more, in passes of their own and by torch.distributions."""
    model, discriminator = trainer.model, trainer.discriminator
    mu, logvar = model.encode(x)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, standard).sum(dim=-1).mean()
    outputs = model.decode(mu + posterior.stddev * noise)
    features, on_x = discriminator(x)
    of_recon, on_recon = discriminator(model.likelihood.mean(outputs))
    _, on_sample = discriminator(model.likelihood.mean(model.decode(prior)))
    unit = torch.distributions.Normal(of_recon, 1.0)
    error = (unit.log_prob(of_recon) - unit.log_prob(features)).sum(dim=-1).mean()
    d_x, d_recon, d_sample = (logits.double().sigmoid() for logits in (on_x, on_recon, on_sample))
    return {
        "encoder": trainer._kl_weight() * kl + error,
        "decoder": vae.adversarial.FEATURE_WEIGHT * error - d_recon.log().mean() - d_sample.log().mean(),
        "discriminator": -(d_x.log() + (1 - d_recon).log() + (1 - d_sample).log()).mean(),
        "likelihood": -model.likelihood.log_prob(outputs, x).mean(),
    }


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_each_network_is_moved_by_its_own_losses_and_by_them_alone(tiny, monkeypatch, likelihood):
    """The gradients are those of the losses written out, with all other networks' weights made constants."""
    monkeypatch.setattr(vae.adversarial, "FEATURE_WEIGHT", 3.0)
    trainer = make(tiny, likelihood=likelihood, train={"beta": 2.0, "kl_warmup_epochs": 0})
    x, noise, prior = draw(tiny)
    found = gradients(trainer, x, noise)
    for name in NETWORKS:
        trainer.optimizer.zero_grad()
        own = {id(p) for p in trainer._moved_by[name]}
        for parameter in trainer._parameters:
            parameter.requires_grad_(id(parameter) in own)
        if own:
            written_out(trainer, x, noise, prior)[name].backward()
        for parameter, gradient in zip(trainer._moved_by[name], found[name], strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
            assert gradient.any()
        for parameter in trainer._parameters:
            parameter.requires_grad_(True)
    assert bool(found["likelihood"]) == (likelihood == "gaussian")


def test_a_weight_of_one_networks_loss_changes_no_other_networks_gradient(tiny, monkeypatch):
    x, noise, _ = draw(tiny)

    def changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
        return {name for name in NETWORKS if not all(map(torch.equal, before[name], after[name]))}

    trainer = make(tiny, likelihood="gaussian", train={"kl_warmup_epochs": 0})
    before = gradients(trainer, x, noise)
    trainer.config = dataclasses.replace(trainer.config, beta=5.0)
    after = gradients(trainer, x, noise)
    assert changed(before, after) == {"encoder"}
    monkeypatch.setattr(vae.adversarial, "FEATURE_WEIGHT", 0.0)
    before, after = after, gradients(trainer, x, noise)
    assert changed(before, after) == {"decoder"}
    with torch.no_grad():
        trainer.model.likelihood.raw_log_sigma -= 1
    before, after = after, gradients(trainer, x, noise)
    assert changed(before, after) == {"likelihood"}


def test_the_scale_of_a_gaussian_is_fitted_to_the_errors_of_its_means(tiny):
    """With means that stand still, it goes to their root mean square error: the value that is most likely."""
    train = {"batch_size": 41, "learning_rate": 3e-2, "max_epochs": 200}
    trainer = make(tiny, likelihood="gaussian", train=train)
    for name in ("encoder", "decoder", "discriminator"):
        for parameter in trainer._moved_by[name]:
            parameter.register_hook(torch.zeros_like)  # autograd.grad calls it, too
    means = trainer.model.outputs.bias.detach().clone()
    with torch.no_grad():
        trainer.model.outputs.weight.zero_()
        trainer.model.likelihood.raw_log_sigma += 2
    list(trainer)
    assert torch.equal(trainer.model.outputs.bias, means)
    expected = (trainer._train - means).square().mean().sqrt().item()
    assert trainer.model.likelihood.log_sigma.exp().item() == pytest.approx(expected, rel=0.02)


def test_digits_are_learned_by_the_discriminators_own_measure():
    """Judged by the discriminator at the end, what the model makes is better than what it made at the start."""
    digits = load_data(DataConfig(source="digits", binarize="none"))
    model = ModelConfig(input_dim=64, image_shape=(8, 8))
    train = TrainConfig(objective="vae_gan", learning_rate=3e-3, max_epochs=8)
    untrained, trainer = (make_trainer(model, train, digits, seed=0) for _ in range(2))
    list(trainer)
    rows = torch.from_numpy(digits.validation)
    discriminator = trainer.discriminator.eval()

    def judge(vae_: nn.Module) -> tuple[float, float, float, float]:
        """Feature error; that of rows with another's reconstruction; mean logits of samples; distance to data."""
        samples = vae_.sample(500, torch.Generator().manual_seed(0))
        with torch.no_grad():
            of_x, of_recon = discriminator(rows)[0], discriminator(vae_.reconstruct(rows))[0]
            logits = discriminator(samples)[1]
        errors = ((of_x - other).square().sum(dim=-1).mean().item() / 2 for other in (of_recon, of_recon.roll(1, 0)))
        return *errors, logits.mean().item(), torch.cdist(samples, trainer._train).amin(dim=1).mean().item()

    error, error_of_another, logit, distance = judge(trainer.result)
    error_before, _, logit_before, distance_before = judge(untrained.result)
    assert error < 0.5 * error_before
    assert error < 0.5 * error_of_another  # it is this row's reconstruction, not just anything that looks right
    assert logit > logit_before + 0.5
    assert distance < 0.9 * distance_before  # by a measure that nobody trained for
    assert evaluate(trainer.model, rows, trainer._noise).active_units >= 8


@pytest.mark.parametrize(
    "model",
    [
        {"body": "conv", "normalization": "batch", "dropout": 0.2},
        {"normalization": "batch", "likelihood": "gaussian", "gaussian_scale": "per_dimension"},
        {"activation": "dropout", "likelihood": "continuous_bernoulli"},
        {"hidden_dims": ()},
    ],
)
def test_other_architectures_train(tiny, model):
    trainer = make(tiny, **model)
    assert [metrics.skipped_steps for metrics in trainer] == [0] * 4
    assert weights(trainer).isfinite().all()


def test_dropout_does_not_reach_the_features(tiny):
    discriminator = Discriminator(ModelConfig(input_dim=6, dropout=0.5, activation="dropout")).train()
    x = torch.from_numpy(tiny.train)
    assert torch.equal(discriminator(x)[0], discriminator(x)[0])


def test_the_features_are_the_last_hidden_layer_or_the_last_convolution(tiny):
    x = torch.from_numpy(tiny.train)
    dense = Discriminator(ModelConfig(input_dim=6, hidden_dims=(8, 5)))
    assert dense(x)[0].shape == (41, 5)
    conv = Discriminator(ModelConfig(input_dim=6, body="conv", image_shape=(2, 3), channels=(4,), hidden_dims=(8,)))
    assert conv(x)[0].shape == (41, 4 * 1 * 2)
    assert [type(module) for module in conv.body if isinstance(module, Block)] == [Block]


def test_the_values_of_an_epoch_are_those_of_the_elbo(tiny):
    trainer = make(tiny)
    for metrics in trainer:
        expected = evaluate(trainer.model, trainer._validation, trainer._noise)
        assert (metrics.val_nelbo, metrics.val_recon, metrics.val_kl, metrics.active_units) == expected
        assert metrics.train_nelbo == pytest.approx(metrics.train_recon + metrics.train_kl)
    assert trainer.diagnose().diagnostics.layers


def test_a_seed_decides_everything_but_the_clock(tiny):
    first, again, other = (make(tiny, seed=seed, dropout=0.2) for seed in (1, 1, 2))
    assert [figures(m) for m in first] == [figures(m) for m in again]
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_trainers_of_both_kinds_do_not_disturb_each_other_nor_the_caller(tiny):
    def pair() -> list[Trainer]:
        return [make(tiny, train={"objective": objective}) for objective in ("elbo", "vae_gan")]

    alone = [[figures(metrics) for metrics in trainer] for trainer in pair()]
    before = torch.get_rng_state()
    together = pair()
    epochs = [[figures(trainer.train_epoch()) for trainer in together] for _ in range(4)]
    assert [list(column) for column in zip(*epochs, strict=True)] == alone
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_restored_state_gives_the_same_next_epochs_to_the_bit(tiny, precision):
    train = {"precision": precision, "ema_decay": 0.9, "free_bits": 0.1, "weight_decay": 0.01}
    model = {"dropout": 0.2, "normalization": "batch", "likelihood": "gaussian"}
    straight = make(tiny, train=train, **model)
    expected = [figures(metrics) for metrics in straight]
    broken_off = make(tiny, train=train, **model)
    for _ in range(2):
        broken_off.train_epoch()
    file = io.BytesIO()
    torch.save(broken_off.state_dict(), file)
    kept = broken_off.state_dict()
    broken_off.train_epoch()  # a state is a copy: training on doesn't change it
    file.seek(0)
    for state in (torch.load(file, weights_only=True), kept):
        resumed = make(tiny, seed=99, train=train, **model)
        resumed.load_state_dict(state)
        assert [figures(metrics) for metrics in resumed] == expected[2:]
        assert torch.equal(weights(resumed), weights(straight))
        assert resumed.evaluate() == straight.evaluate()
        for name, value in straight.discriminator.state_dict().items():
            assert torch.equal(resumed.discriminator.state_dict()[name], value)


def test_the_averaged_model_is_the_result_and_has_no_discriminator(tiny):
    trainer = make(tiny, train={"ema_decay": 0.9})
    list(trainer)
    assert trainer.result is not trainer.model
    assert trainer.result.state_dict().keys() == make(tiny, train={"objective": "elbo"}).model.state_dict().keys()
    assert not torch.equal(trainer.result.outputs.weight, trainer.model.outputs.weight)


def test_a_poisoned_row_raises_diverged_in_its_step_with_finite_weights(tiny):
    trainer = make(tiny, train={"batch_size": 1, "max_skipped_steps": 0})
    tiny.train[7, 3] = np.nan  # the trainer's own memory
    with pytest.raises(Diverged, match="loss is nan") as caught:
        trainer.train_epoch()
    assert caught.value.epoch == 1
    assert weights(trainer).isfinite().all()


@pytest.mark.parametrize("network", ["encoder", "decoder", "discriminator"])
def test_a_gradient_that_is_not_finite_in_any_network_moves_none(tiny, network):
    trainer = make(tiny, train={"max_skipped_steps": 2})
    trainer._moved_by[network][-1].register_hook(lambda gradient: gradient * np.inf)
    before = weights(trainer)
    with pytest.raises(Diverged, match="gradient norm is"):
        trainer.train_epoch()
    assert torch.equal(weights(trainer), before)


def test_steps_that_are_not_finite_are_skipped(tiny):
    trainer = make(tiny, train={"batch_size": 1, "max_skipped_steps": 1})
    tiny.train[7, 3] = np.nan
    assert trainer.train_epoch().skipped_steps == 1
    assert weights(trainer).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_resumes(tiny):
    def on_gpu() -> Trainer:
        config = TrainConfig(objective="vae_gan", max_epochs=4)
        return make_trainer(ModelConfig(input_dim=6, dropout=0.2), config, tiny, seed=0, device="cuda")

    trainer = on_gpu()
    trainer.train_epoch()
    state = trainer.state_dict()
    resumed = on_gpu()
    resumed.load_state_dict(state)
    for expected, metrics in zip(trainer, resumed, strict=True):
        assert metrics.val_nelbo == pytest.approx(expected.val_nelbo, rel=1e-5)
