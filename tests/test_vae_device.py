"""Training on a GPU, as far as a CPU can tell: steps that are read many at a time against steps read one by one.

And torch.compile, with what is not compiled as the oracle.
"""

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from test_vae_training import two_clusters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae.adversarial import make_trainer
from vae.config import DataConfig, InputError, ModelConfig, TrainConfig
from vae.data import Dataset
from vae.training import Diverged, EpochMetrics, Trainer

TIMES = ("wall_s", "samples_per_s")
AT_ONCE = 8
STEPS_AN_EPOCH = 14  # not a multiple of AT_ONCE
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "by hand": ({}, {}),
    "by hand, clipped, averaged": ({"dropout": 0.2}, {"clip_grad_norm": 3.0, "ema_decay": 0.9, "weight_decay": 0.1}),
    "by hand, bfloat16": ({}, {"precision": "bfloat16"}),
    "autograd, clipped, dropout": ({"normalization": "layer", "dropout": 0.2}, {"clip_grad_norm": 3.0}),
    "autograd, statistics, averaged": ({"normalization": "batch"}, {"ema_decay": 0.9, "free_bits": 0.1}),
    "autograd, bfloat16": ({"activation": "prelu"}, {"precision": "bfloat16"}),
    "convolutions": ({"body": "conv", "channels": (4,), "likelihood": "continuous_bernoulli"}, {}),
    "adversarial, convolutions": (
        {"body": "conv", "channels": (4,), "likelihood": "continuous_bernoulli"},
        {"objective": "vae_gan"},
    ),
    "adversarial": ({"normalization": "batch"}, {"objective": "vae_gan", "clip_grad_norm": 3.0, "ema_decay": 0.9}),
}


@pytest.fixture
def grey() -> Dataset:
    return two_clusters(56)


def make(data: Dataset, kind: str = "by hand", device: str = "cpu", **train: object) -> Trainer:
    model, own = KINDS[kind]
    model_config = ModelConfig(input_dim=6, latent_dim=3, hidden_dims=(8,), image_shape=(2, 3), **model)
    return make_trainer(
        model_config, TrainConfig(**{"batch_size": 4, "max_epochs": 4, **own, **train}), data, seed=0, device=device
    )


def spoil(trainer: Trainer, steps: set[int]) -> Trainer:
    """From now on the loss (in odd ones) or the gradient alone (in even ones) of these steps is not finite."""
    backward = trainer._backward

    def spoiled(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = trainer.steps + 1
        losses = backward(x * torch.nan if step in steps and step % 2 else x, noise)
        if step in steps and not step % 2:
            trainer._parameters[-1].grad.view(-1)[0] = torch.inf
        return losses

    trainer._backward = spoiled
    return trainer


def figures(metrics: EpochMetrics) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(metrics).items() if name not in TIMES}


def assert_same(found: Any, expected: Any) -> None:
    """To the bit, through all of a state."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=False)


def pair(make_one: Callable[[], Trainer]) -> tuple[Trainer, Trainer]:
    one_by_one, at_once = make_one(), make_one()
    at_once._steps_a_read = AT_ONCE
    return one_by_one, at_once


@pytest.mark.parametrize("kind", KINDS)
def test_steps_read_many_at_a_time_are_those_read_one_by_one(grey, kind):
    """Some are left out: alone, three in a row, over the edges of what is read at once and of an epoch."""
    left_out = {1, 5, 8, 9, 10, 14, 15, 20, 30}
    one_by_one, at_once = pair(lambda: spoil(make(grey, kind), left_out))
    clipped = 0
    for expected in one_by_one:
        found = at_once.train_epoch()
        assert figures(found) == figures(expected)
        assert_same(at_once.state_dict(), one_by_one.state_dict())
        clipped += expected.clipped_steps
    assert at_once.steps == one_by_one.steps == 4 * STEPS_AN_EPOCH
    assert (clipped > 0) == (one_by_one.config.clip_grad_norm < 100)


@pytest.mark.parametrize("kind", ["by hand, clipped, averaged", "autograd, statistics, averaged", "adversarial"])
@pytest.mark.parametrize("num_skipped", [4, 5])  # of which 4 are borne
def test_a_training_read_many_steps_at_a_time_resumes_halfway_through_a_row_of_skipped_steps(grey, kind, num_skipped):
    """Three of them are before the resume, at the end of an epoch."""
    last = 2 * STEPS_AN_EPOCH
    left_out = set(range(last - 2, last - 2 + num_skipped))
    straight, at_once = pair(lambda: spoil(make(grey, kind, max_skipped_steps=4), left_out))
    resumed = spoil(make(grey, kind, max_skipped_steps=4), left_out)
    resumed._steps_a_read = AT_ONCE
    for trainer in (straight, at_once):
        assert [trainer.train_epoch().skipped_steps for _ in range(2)] == [0, 3]
    resumed.load_state_dict(at_once.state_dict())
    if num_skipped == 4:
        assert [figures(metrics) for metrics in resumed] == [figures(metrics) for metrics in straight]
        assert_same(resumed.state_dict(), straight.state_dict())
        return
    errors = []
    for trainer in (straight, resumed):
        with pytest.raises(Diverged) as caught:
            trainer.train_epoch()
        errors.append((caught.value.args, trainer.steps))
    assert errors[0] == errors[1]
    assert errors[0][0][1] == last - 2
    assert_same(resumed.state_dict()["model"], straight.state_dict()["model"])


def assert_gradients_lie_as_their_weights(trainer: Trainer) -> None:
    """The fused optimizer goes through both in the order of memory."""
    trainer.train_epoch()
    gradients = [parameter.grad for parameter in trainer._parameters]
    assert any(gradient is not None and gradient.ndim == 4 for gradient in gradients)
    assert all(gradient is None or gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("kind", ["convolutions", "adversarial, convolutions"])
def test_gradients_lie_in_memory_as_their_weights(grey, kind):
    assert_gradients_lie_as_their_weights(make(grey, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["convolutions", "adversarial, convolutions"])
def test_gradients_on_a_gpu_lie_in_memory_as_their_weights(grey, kind):
    assert_gradients_lie_as_their_weights(make(grey, kind, device="cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_is_freed_with_its_last_reference(grey, kind):
    """Its weights and moments wait for no collector of cycles: searches make one trainer after the other."""
    trainer = make(grey, kind, max_epochs=1)
    list(trainer)
    seen = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("left_out", "first"),
    [
        (range(4, 9), 4),  # the last of what is read at once is one too many
        (range(7, 40), 7),  # and so is one in the midst of the next, with more to come
        ((1, 2, 3, 4, 12, 13, 14, 15, 16), 12),  # over the end of an epoch, after a row that was borne
    ],
)
@pytest.mark.parametrize("kind", ["by hand", "autograd, statistics, averaged", "adversarial"])
def test_one_skipped_step_too_many_is_the_same_divergence_and_nothing_moves_after_it(grey, kind, left_out, first):
    errors = []
    trainers = pair(lambda: spoil(make(grey, kind, max_skipped_steps=4), set(left_out)))
    for trainer in trainers:
        with pytest.raises(Diverged) as caught:
            list(trainer)
        errors.append((caught.value.args, trainer.steps))
    assert errors[0] == errors[1]
    assert errors[0][0][1] == first
    assert errors[0][1] == first + 4
    states = [trainer.state_dict() for trainer in trainers]
    for group in (group for state in states for group in state["optimizer"]["param_groups"]):
        del group["lr"]  # of the last step that was asked for
    assert_same(states[1], states[0])


def test_the_layer_of_a_divergence_is_found_in_the_batch_that_was_spoiled(grey):
    poisoned = dataclasses.replace(grey, config=DataConfig(source="grey.npy", binarize="none"), train=grey.train.copy())
    poisoned.train[5, 3] = np.nan
    errors = []
    for trainer in pair(lambda: make(poisoned, max_skipped_steps=0)):
        with torch.no_grad():
            trainer.model.outputs.bias.zero_()  # it was taken from the poisoned mean
        with pytest.raises(Diverged, match="first in input") as caught:
            trainer.train_epoch()
        errors.append(caught.value.args)
    assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", ["by hand", "autograd, statistics, averaged", "adversarial"])
def test_an_epoch_without_a_finite_step_changes_nothing_and_is_a_divergence_below_the_limit(grey, kind):
    for trainer in pair(lambda: spoil(make(grey, kind, max_skipped_steps=1000), set(range(1, 100)))):
        networks = ("model", "averaged", "discriminator")
        before = {name: value for name, value in trainer.state_dict().items() if name in networks}
        with pytest.raises(Diverged, match="epoch 1, step 1: gradient norm is inf"):  # as the last of them
            trainer.train_epoch()
        assert_same({name: trainer.state_dict()[name] for name in before}, before)


class OneDevice(TorchDispatchMode):
    """Lets no tensor of the CPU meet one of another device, but a number that a sum takes as its argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        strangers = [value for value in tensors if value.device.type == "cpu"]
        assert not strangers or (func is torch.ops.aten.add.Tensor and strangers[0].ndim == 0), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "autograd, bfloat16"])
def test_no_step_reads_a_value_or_leaves_its_device(grey, monkeypatch, kind):
    """On the device `meta`, whose tensors have no values that could be read."""
    monkeypatch.setattr(Trainer, "_autocast", lambda _: contextlib.nullcontext())  # there is none for meta
    trainer = make(grey, kind, device="meta")
    trainer.model.train()
    with trainer._own_rng(), OneDevice():
        for rows in trainer._batches():
            trainer._train_step(trainer._rows.index_select(0, rows))
        assert len(trainer._tally.unread) == STEPS_AN_EPOCH
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            trainer._read()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_not_waited_for_in_a_step(grey, monkeypatch, kind):
    trainer = make(grey, kind, device="cuda")
    trainer.train_epoch()  # loads kernels, takes memory
    step = trainer._train_step

    def unwaited(x: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "_train_step", unwaited)
    assert trainer._steps_a_read > STEPS_AN_EPOCH
    assert trainer.train_epoch().skipped_steps == 0


# ---- torch.compile


def test_compile_is_one_of_torchs_modes_and_for_the_bound_alone():
    with pytest.raises(ValueError, match="unknown compile 'fast'; known: none, default, reduce-overhead, max-autotune"):
        TrainConfig(compile="fast")
    with pytest.raises(ValueError, match="compile = default needs objective = elbo"):
        TrainConfig(compile="default", objective="vae_gan")


def test_a_cpu_trains_plain_perceptrons_by_hand_also_where_compile_is_set(grey):
    plain, compiled = make(grey), make(grey, compile="default")
    assert compiled._by_hand is not None
    assert [figures(metrics) for metrics in compiled] == [figures(metrics) for metrics in plain]


def test_compile_without_a_compiler_is_an_error_in_words(grey):
    trainer = make(grey, "autograd, statistics, averaged", compile="default")
    assert trainer.evaluate().nelbo > 0  # who does not train needs no compiler
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++")}),
        pytest.raises(InputError, match=r"compile = default needs a C\+\+ compiler: .*; or set train.compile = none"),
    ):
        trainer.train_epoch()


@pytest.mark.system  # half a minute of compiling
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's (2.13) own compiler
@pytest.mark.parametrize("kind", ["autograd, statistics, averaged", "autograd, clipped, dropout"])
def test_compiled_training_goes_where_training_goes_and_resumes_to_the_bit(grey, kind):
    plain = make(grey, kind, batch_size=5)  # a last batch of one row
    compiled = make(grey, kind, batch_size=5, compile="default")
    for expected in plain:
        found = compiled.train_epoch()
        if expected.epoch == 2:
            state = compiled.state_dict()
        assert found.val_nelbo == pytest.approx(expected.val_nelbo, rel=1e-3)
        assert found.train_nelbo == pytest.approx(expected.train_nelbo, rel=1e-3)
        if expected.epoch == 1:
            assert figures(found) != figures(expected)  # it is compiled
    assert state["model"].keys() == plain.state_dict()["model"].keys()
    resumed = make(grey, kind, batch_size=5, compile="default")
    resumed.load_state_dict(state)
    list(resumed)
    assert_same(resumed.state_dict(), compiled.state_dict())


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's (2.13) own compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["by hand", "autograd, statistics, averaged", "convolutions"])
def test_compiled_training_on_a_gpu_goes_where_training_goes(grey, kind, mode):
    """CUDA graphs of reduce-overhead write every step's results to the same memory, which is read much later."""
    plain = make(grey, kind, "cuda", batch_size=5)
    compiled = make(grey, kind, "cuda", batch_size=5, compile=mode)
    for expected in plain:
        found = compiled.train_epoch()
        assert found.skipped_steps == 0
        assert found.val_nelbo == pytest.approx(expected.val_nelbo, rel=1e-2)  # TF32
        assert found.train_nelbo == pytest.approx(expected.train_nelbo, rel=1e-2)
