"""The trainer: exact resumption, isolation of its randomness, divergence, and what it reaches on the digits."""

import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch

import vae.optimizer
from vae.config import DataConfig, ModelConfig, TrainConfig
from vae.data import Dataset, load_data
from vae.objective import evaluate
from vae.training import Diverged, EpochMetrics, Trainer

TIMES = ("wall_s", "samples_per_s")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig(source="digits"))


def two_clusters(num_train: int) -> Dataset:
    """So many rows of 2 x 3 grey pixels in two clusters, and ten to validate and to test by."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.9, 0.8, 0.9, 0.1, 0.2, 0.1], [0.1, 0.2, 0.1, 0.9, 0.8, 0.9]])
    rows = centres[rng.integers(0, 2, num_train + 20)].astype(np.float32)
    fixed = (rng.random((20, 6)) < rows[num_train:]).astype(np.float32)
    return Dataset(
        config=DataConfig(source="grey.npy", binarize="dynamic"),
        train=rows[:num_train],
        validation=fixed[:10],
        test=fixed[10:],
        fingerprint="0" * 64,
        image_shape=(2, 3),
        columns=None,
        shift=None,
        factor=None,
    )


@pytest.fixture
def tiny() -> Dataset:
    """41 rows of 6 grey features in two clusters; 41 leaves a last batch of one row at a batch size of 20."""
    return two_clusters(41)


def make(
    data: Dataset,
    *,
    seed: int = 0,
    activation: str = "silu",
    dropout: float = 0.2,
    normalization: str = "none",
    **train: object,
) -> Trainer:
    model = ModelConfig(
        input_dim=data.input_dim,
        latent_dim=3,
        hidden_dims=(8,),
        activation=activation,
        dropout=dropout,
        normalization=normalization,
    )
    return Trainer(model, TrainConfig(**{"batch_size": 20, "max_epochs": 6, **train}), data, seed=seed)


def figures(metrics: EpochMetrics) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(metrics).items() if name not in TIMES}


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def test_a_seed_decides_everything_but_the_clock(tiny):
    first, again, other = (make(tiny, seed=seed) for seed in (1, 1, 2))
    assert [figures(m) for m in first] == [figures(m) for m in again]
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_iteration_stops_at_max_epochs_and_goes_on_from_where_it_stands(tiny):
    trainer = make(tiny, max_epochs=5)
    iterator = iter(trainer)
    assert [next(iterator).epoch, next(iterator).epoch] == [1, 2]
    assert [metrics.epoch for metrics in trainer] == [3, 4, 5]
    assert trainer.epoch == 5
    assert list(trainer) == []


def test_a_last_partial_batch_is_trained_on(tiny):
    trainer = make(tiny)
    trainer.train_epoch()
    assert trainer.state_dict()["step"] == 3  # 20 + 20 + 1


@pytest.mark.parametrize("through_a_file", [False, True])
def test_restored_state_gives_the_same_next_epochs_to_the_bit(tiny, through_a_file):
    straight = make(tiny)
    expected = [figures(metrics) for metrics in straight]
    broken_off = make(tiny)
    for _ in range(2):
        broken_off.train_epoch()
    state = broken_off.state_dict()
    broken_off.train_epoch()  # a state is a copy: training on doesn't change it
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    for seed in (0, 99):  # a state is not used up, and the seed of whoever takes it over is of no account
        resumed = make(tiny, seed=seed)
        resumed.load_state_dict(state)
        assert resumed.epoch == 2
        assert [figures(metrics) for metrics in resumed] == expected[2:]
        assert torch.equal(weights(resumed), weights(straight))


def test_two_interleaved_trainers_do_not_disturb_each_other(tiny):
    alone = [[figures(metrics) for metrics in make(tiny, seed=seed)] for seed in (1, 2)]
    pair = [make(tiny, seed=seed) for seed in (1, 2)]
    together = [[figures(trainer.train_epoch()) for trainer in pair] for _ in range(6)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_the_callers_generator_is_neither_read_nor_changed(tiny):
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append([figures(metrics) for metrics in make(tiny)])
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


def test_the_callers_generator_survives_a_divergence(tiny):
    before = torch.get_rng_state()
    with pytest.raises(Diverged):
        list(make(tiny, learning_rate=1e20))
    assert torch.equal(torch.get_rng_state(), before)


def test_read_only_arrays_are_wrapped_without_a_copy_and_left_alone(tiny):
    tiny.train.flags.writeable = tiny.validation.flags.writeable = False
    before = tiny.train.copy()
    trainer = make(tiny)
    list(trainer)
    assert trainer._train.data_ptr() == tiny.train.ctypes.data
    assert make(tiny)._rows.data_ptr() == trainer._rows.data_ptr()  # made once for all trials of a data set
    assert np.array_equal(tiny.train, before)


def seen_in_training(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Fills with the rows and the noise of every training step from now on."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    backward = Trainer._backward

    def spy(trainer, x, noise):
        seen.append((x.clone(), noise.clone()))
        return backward(trainer, x, noise)

    monkeypatch.setattr(Trainer, "_backward", spy)
    return seen


def test_grey_rows_are_drawn_anew_in_each_batch_when_dynamic_and_only_then(tiny, monkeypatch):
    seen = seen_in_training(monkeypatch)
    make(tiny, batch_size=41).train_epoch()
    assert set(seen[0][0].unique().tolist()) == {0.0, 1.0}
    flat = dataclasses.replace(tiny, train=np.full((20_000, 2), 0.3, np.float32), validation=tiny.validation[:, :2])
    make(flat, batch_size=20_000).train_epoch()
    assert seen[1][0].mean().item() == pytest.approx(0.3, abs=0.01)
    none = dataclasses.replace(tiny, config=DataConfig(source="tiny.npy", binarize="none"))
    make(none, batch_size=41).train_epoch()
    assert set(seen[2][0].unique().tolist()) == set(np.unique(tiny.train).tolist())


def test_every_epoch_draws_its_own_order_and_noise(tiny, monkeypatch):
    seen = seen_in_training(monkeypatch)
    grey = dataclasses.replace(tiny, config=DataConfig(source="tiny.npy", binarize="none"))
    trainer = make(grey, batch_size=41)
    trainer.train_epoch()
    trainer.train_epoch()
    (first_x, first_noise), (second_x, second_noise) = seen
    assert not torch.equal(first_x, second_x)
    assert sorted(first_x.tolist()) == sorted(second_x.tolist()) == sorted(tiny.train.tolist())
    assert not torch.equal(first_noise, second_noise)


def test_the_optimizer_is_torchs_adamw_to_the_bit(tiny):
    trained = []
    for optimizer in (vae.optimizer.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        steps = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        for _ in range(20):
            model(torch.from_numpy(tiny.train)).square().sum().backward()
            steps.step()
            steps.zero_grad(set_to_none=True)
        trained.append([*model.parameters(), *(state["exp_avg_sq"] for state in steps.state_dict()["state"].values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*trained, strict=True))


def test_biases_and_learned_slopes_are_not_decayed(tiny):
    trainer = make(tiny, activation="prelu", weight_decay=0.5, learning_rate=0.1)
    decayed, kept = ([id(p) for p in group["params"]] for group in trainer.optimizer.param_groups)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0]
    for name, parameter in trainer.model.named_parameters():
        is_matrix = name.endswith("weight")
        assert (id(parameter) in decayed, id(parameter) in kept) == (is_matrix, not is_matrix)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert sum(name.endswith("slope") for name in before) == 2
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, parameter in trainer.model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name.endswith("weight") else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_metrics_of_an_epoch_agree_with_each_other(tiny):
    trainer = make(tiny, kl_warmup_epochs=4, beta=2.0)
    for metrics in trainer:
        assert metrics.train_nelbo == pytest.approx(metrics.train_recon + metrics.train_kl)
        assert metrics.val_nelbo == pytest.approx(metrics.val_recon + metrics.val_kl)
        assert metrics.kl_weight == pytest.approx(2.0 * min(1.0, metrics.epoch / 4))
        assert metrics.wall_s > 0
        assert metrics.samples_per_s > 0
        assert trainer.evaluate() == (
            metrics.val_nelbo,
            metrics.val_recon,
            metrics.val_kl,
            metrics.active_units,
        )


def test_the_training_losses_are_means_over_rows_not_over_batches(tiny):
    """With weights that don't move and no dropout, one epoch in batches equals one epoch in a single batch."""
    flat = dataclasses.replace(tiny, config=DataConfig(source="tiny.npy", binarize="none"))
    recons = []
    for batch_size in (20, 41):
        trainer = make(flat, batch_size=batch_size, dropout=0.0, learning_rate=1e-30)
        with torch.no_grad():
            trainer.model.outputs.weight.zero_()  # no dependence on the noise
        recons.append(trainer.train_epoch().train_recon)
    assert recons[0] == pytest.approx(recons[1], rel=1e-6)


def test_gradients_are_clipped_beyond_the_limit_and_measured_before(tiny):
    free, clipped = make(tiny, clip_grad_norm=1e9), make(tiny, clip_grad_norm=1e-6)
    reference, metrics = free.train_epoch(), clipped.train_epoch()
    assert reference.clipped_steps == 0
    assert metrics.clipped_steps == 3
    assert metrics.grad_norm > 1e-3
    gradients = torch.cat([p.grad.flatten() for p in clipped.model.parameters()])
    assert gradients.norm().item() == pytest.approx(1e-6, rel=1e-2)


def test_the_validation_value_does_not_depend_on_beta_or_warm_up(tiny):
    first, second = make(tiny), make(tiny, beta=7.0, kl_warmup_epochs=0, learning_rate=1e-2)
    first.train_epoch()
    second.model.load_state_dict(first.model.state_dict())
    assert first.evaluate() == second.evaluate()


def test_beta_weighs_the_kl_term_in_training(tiny):
    free, strict = (make(tiny, beta=beta, kl_warmup_epochs=0, max_epochs=20, learning_rate=1e-2) for beta in (0, 20))
    assert list(free)[-1].val_kl > 10 * list(strict)[-1].val_kl


def test_the_baseline_is_that_of_the_validation_split(tiny):
    p = np.clip(tiny.train.mean(axis=0, dtype=np.float64), 1e-3, 1 - 1e-3)
    losses = -np.where(tiny.validation == 1, np.log(p), np.log(1 - p)).sum(axis=1)
    assert make(tiny).no_latent_nelbo == pytest.approx(losses.mean(), rel=1e-9)


def poisoned(data: Dataset, rows: object, **train: object) -> Trainer:
    """A trainer of some rows that are not finite."""
    values = data.train.copy()
    values[rows, 3] = np.nan
    config = DataConfig(source="tiny.npy", binarize="none")
    trainer = make(dataclasses.replace(data, train=values, config=config), batch_size=1, **train)
    with torch.no_grad():  # the output bias was taken from the poisoned mean
        trainer.model.outputs.bias.zero_()
    return trainer


def test_a_step_that_is_not_finite_is_left_out_and_counted(tiny):
    trainer = poisoned(tiny, [7, 20])
    metrics = list(trainer)
    assert [epoch.skipped_steps for epoch in metrics] == [2] * 6
    assert all(math.isfinite(epoch.train_nelbo) for epoch in metrics)
    assert metrics[-1].train_nelbo < metrics[0].train_nelbo
    assert trainer.steps == 6 * 41
    assert weights(trainer).isfinite().all()


def test_too_many_such_steps_in_a_row_are_a_divergence_in_the_first_of_them(tiny):
    trainer = poisoned(tiny, slice(None), max_skipped_steps=10)
    before = weights(trainer)
    with pytest.raises(Diverged, match="loss is nan, first in input") as caught:
        trainer.train_epoch()
    assert (caught.value.epoch, caught.value.step, caught.value.layer) == (1, 1, "input")
    assert trainer.steps == 11
    assert torch.equal(weights(trainer), before)


def test_a_poisoned_row_raises_diverged_in_its_step_with_finite_weights_where_none_may_be_left_out(tiny):
    trainer = poisoned(tiny, 7, max_skipped_steps=0)
    with pytest.raises(Diverged, match="loss is nan") as caught:
        trainer.train_epoch()
    assert caught.value.epoch == 1
    assert 1 <= caught.value.step <= 41
    assert caught.value.step == trainer.state_dict()["step"]
    assert weights(trainer).isfinite().all()


def test_the_layer_that_was_first_not_finite_is_named(tiny):
    trainer = make(tiny)
    with torch.no_grad():
        trainer.model.decoder[0].linear.weight.fill_(torch.inf)
    with pytest.raises(Diverged) as caught:
        trainer.train_epoch()
    assert caught.value.layer == "decoder.0"


@pytest.mark.parametrize("activation", ["relu", "exponential"])
def test_a_learning_rate_beyond_all_bounds_raises_diverged_with_finite_weights(tiny, activation):
    trainer = make(tiny, activation=activation, learning_rate=1e20)
    with pytest.raises(Diverged) as caught:
        list(trainer)
    assert caught.value.epoch == 1
    assert caught.value.step <= 3
    assert weights(trainer).isfinite().all()


@pytest.mark.parametrize("normalization", ["none", "layer"])  # by hand, and by autograd
def test_a_gradient_that_is_not_finite_under_a_finite_loss_raises_diverged(tiny, monkeypatch, normalization):
    trainer = make(tiny, normalization=normalization)
    backward = trainer._backward

    def spoil(x, noise):
        losses = backward(x, noise)
        trainer.model.outputs.bias.grad[0] = np.inf
        return losses

    monkeypatch.setattr(trainer, "_backward", spoil)
    before = weights(trainer)
    with pytest.raises(Diverged, match="gradient norm is") as caught:  # no step of the epoch was finite
        trainer.train_epoch()
    assert caught.value.step == 1
    assert torch.equal(weights(trainer), before)


def test_a_validation_value_that_is_not_finite_is_a_divergence(tiny):
    trainer = make(tiny)
    tiny.validation[0, 0] = np.inf  # the trainer's own memory
    with pytest.raises(Diverged, match="validation loss is"):
        trainer.train_epoch()
    assert trainer.epoch == 0


def test_diverged_survives_pickling():
    error = pickle.loads(pickle.dumps(Diverged(2, 31, "loss is nan", "mu")))
    assert (error.epoch, error.step, error.reason, error.layer) == (2, 31, "loss is nan", "mu")
    assert str(error) == "diverged in epoch 2, step 31: loss is nan, first in mu"
    assert str(Diverged(2, 31, "loss is nan")) == "diverged in epoch 2, step 31: loss is nan"


def test_a_model_of_another_width_than_the_data_is_refused(tiny):
    with pytest.raises(ValueError, match="5 features and the data have 6"):
        Trainer(ModelConfig(input_dim=5), TrainConfig(), tiny, seed=0)


def test_digits_are_learned(digits):
    model = ModelConfig(input_dim=64, activation="silu")
    trainer = Trainer(model, TrainConfig(learning_rate=2e-3, max_epochs=30), digits, seed=0)
    last = list(trainer)[-1]
    assert last.val_nelbo < 24.6
    assert last.val_nelbo < trainer.no_latent_nelbo - 2
    assert last.active_units > 5


@pytest.mark.parametrize("activation", sorted(vae.ACTIVATIONS))
def test_every_activation_trains_to_below_the_baseline(digits, activation):
    # without normalisation the signal of these vanishes with depth, and at most seeds the latents with it
    vanishes = activation in ("relu2", "exponential")
    model = ModelConfig(input_dim=64, activation=activation, normalization="layer" if vanishes else "none")
    trainer = Trainer(model, TrainConfig(max_epochs=15), digits, seed=0)
    assert list(trainer)[-1].val_nelbo < trainer.no_latent_nelbo


# ---- options


def test_averaged_weights_are_the_average_by_hand_and_are_what_is_validated_and_resumed(tiny):
    trainer = make(tiny, ema_decay=0.9, dropout=0.0)
    expected, step = weights(trainer), 0
    taken = trainer.optimizer.step

    def spy(*args: object) -> None:
        nonlocal expected, step
        taken(*args)
        step += 1
        weight = min(0.9, (1 + step) / (10 + step))
        expected = weight * expected + (1 - weight) * weights(trainer)

    trainer.optimizer.step = spy
    first = [trainer.train_epoch() for _ in range(2)]
    result = torch.nn.utils.parameters_to_vector(trainer.result.parameters()).detach()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(result, weights(trainer))
    assert first[-1].val_nelbo == evaluate(trainer.result, trainer._validation, trainer._noise).nelbo
    state = trainer.state_dict()
    trainer.optimizer.step = taken
    resumed = make(tiny, ema_decay=0.9, dropout=0.0)
    resumed.load_state_dict(state)
    assert figures(resumed.train_epoch()) == figures(trainer.train_epoch())


def test_averaging_takes_running_statistics_along(tiny):
    trainer = make(tiny, ema_decay=0.9, normalization="batch")
    list(trainer)
    raw, averaged = (dict(model.named_buffers()) for model in (trainer.model, trainer.result))
    for name, value in raw.items():
        assert torch.equal(value, averaged[name]) == name.endswith("num_batches_tracked")


def test_a_batch_of_one_row_is_left_out_under_batch_normalisation(tiny):
    trainer = make(tiny, normalization="batch")  # 41 rows in batches of 20
    trainer.train_epoch()
    assert trainer.steps == 2
    assert make(tiny).train_epoch().skipped_steps == 0


def test_schedules_count_the_steps_that_are_made(tiny):
    trainer = make(tiny, normalization="batch", max_epochs=4, kl_warmup_epochs=2)  # 41 rows in batches of 20
    weights = [trainer.train_epoch().kl_weight for _ in range(4)]
    assert weights[1:] == [1, 1, 1]
    assert weights[0] == pytest.approx(0.5)


def test_training_in_bfloat16_is_validated_in_float32_and_its_effect_is_small_and_told(digits):
    model = ModelConfig(input_dim=64, activation="silu")
    values = {}
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(model, TrainConfig(max_epochs=10, precision=precision), digits, seed=0)
        values[precision] = list(trainer)[-1].val_nelbo
        effect = trainer.diagnose().precision_effect
        assert (effect is None) == (precision == "float32")
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert values["float32"] != values["bfloat16"]
    assert values["bfloat16"] == pytest.approx(values["float32"], abs=0.5)
    assert 0 < abs(effect) < 0.2


def test_free_bits_leave_more_latents_in_use_at_a_price(digits):
    kls = []
    for free_bits in (0.0, 1.0):
        config = TrainConfig(max_epochs=6, free_bits=free_bits, kl_warmup_epochs=0)
        last = list(Trainer(ModelConfig(input_dim=64, latent_dim=8), config, digits, seed=0))[-1]
        kls.append(last.val_kl)
    assert kls[1] > max(kls[0], 5)


def test_diagnosing_changes_nothing_of_the_training(tiny):
    plain, looked_at = make(tiny), make(tiny)
    looked_at.diagnose()
    for expected in plain:
        assert figures(looked_at.train_epoch()) == figures(expected)
        probed = looked_at.diagnose()
        assert probed.epoch == expected.epoch
        assert probed.diagnostics.active_units == expected.active_units
        assert probed.diagnostics.rate == pytest.approx(expected.val_kl, rel=1e-5)


def test_the_generalization_gap_of_rows_that_are_also_validated_is_none(tiny):
    same = dataclasses.replace(tiny, train=tiny.validation, config=dataclasses.replace(tiny.config, binarize="static"))
    trainer = make(same)
    trainer.train_epoch()
    assert trainer.diagnose().generalization_gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("attention", "normalization"), [("none", "none"), ("squeeze_excitation", "group"), ("self_attention", "batch")]
)
def test_convolutions_learn_the_digits_and_resume_to_the_bit(digits, attention, normalization):
    model = ModelConfig(
        input_dim=64, image_shape=(8, 8), body="conv", channels=(8, 16), hidden_dims=(32,), latent_dim=4,
        attention=attention, normalization=normalization,
    )  # fmt: skip
    trainer, again = (Trainer(model, TrainConfig(max_epochs=4), digits, seed=0) for _ in range(2))
    first = trainer.train_epoch()
    again.load_state_dict(trainer.state_dict())
    last = list(trainer)[-1]
    assert last.val_nelbo < first.val_nelbo
    assert figures(list(again)[-1]) == figures(last)


@pytest.mark.gpu
def test_a_gpu_resumes_and_leaves_the_callers_generators_alone(tiny):
    def on_gpu() -> Trainer:
        return Trainer(ModelConfig(input_dim=6, dropout=0.2), TrainConfig(max_epochs=4), tiny, seed=0, device="cuda")

    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    trainer = on_gpu()
    trainer.train_epoch()
    state = trainer.state_dict()
    resumed = on_gpu()
    resumed.load_state_dict(state)
    for expected, metrics in zip(trainer, resumed, strict=True):
        assert metrics.val_nelbo == pytest.approx(expected.val_nelbo, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])
