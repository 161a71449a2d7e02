"""The trainable in this process, over a real store: nothing of a trial is left to the next, none of it is lost."""

import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import tune

import search.attempt
from cluster.runtime import Runtime
from search.checkpoints import CheckpointStore, StoreServer
from search.spec import StudySpec
from search.trial import VaeTrial
from vae.config import DataConfig
from vae.data import Dataset, load_data

TIMES = ("wall_s", "samples_per_s")
MAX_EPOCHS = 8
GENTLE = {"activation": "tanh", "dropout": 0.2, "learning_rate": 3e-3, "latent_dim": 4}
OTHER = {"activation": "leaky_relu", "leaky_relu_slope": 0.1, "dropout": 0.0, "learning_rate": 1e-3, "latent_dim": 9}

Make = Callable[..., VaeTrial]


def make_spec(**sections: dict[str, Any]) -> StudySpec:
    values: dict[str, dict[str, Any]] = {
        "model": {"hidden_dims": [16]},
        "train": {"kl_warmup_epochs": 1, "lr_schedule": "constant"},
        "budget": {"max_epochs": MAX_EPOCHS},
        "scheduler": {"grace_epochs": 1, "reduction_factor": 2},  # rungs 2, 3, 5
        "space": {"batch_size": [64, 96]},
    }
    for section, more in sections.items():
        values[section] = {**values.get(section, {}), **more}
    return StudySpec.model_validate(values)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig(source="digits"))


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "checkpoints"


@pytest.fixture(scope="module")
def store(ray_here: Runtime, store_folder: Path) -> Iterator[Any]:
    """One for all tests here: each takes trial numbers of its own."""
    store = ray.remote(StoreServer).options(num_cpus=0).remote(store_folder)
    yield store
    ray.kill(store)


@pytest.fixture
def make(digits: Dataset, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Trainables as Tune makes them, data and store through Ray; steps are ended by rungs alone, not by the clock."""
    monkeypatch.setenv("HOME", str(tmp_path))  # a trainable without Tune's storage logs to ~/ray_results
    monkeypatch.setattr(search.attempt, "STEP_S", math.inf)

    def make(config: dict[str, Any], *, spec: StudySpec | None = None, data: Dataset = digits) -> VaeTrial:
        return tune.with_parameters(VaeTrial, spec=spec or make_spec(), data=data, store=store)(config)

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


_numbers = itertools.count()


def trial_config(params: dict[str, Any] = GENTLE, *, seed: int = 7, keep_below: float = math.inf) -> dict[str, Any]:
    """A suggestion with a number that the store has not seen."""
    params = {"batch_size": 64, **params}
    own = {"is_first": False, "keep_below": keep_below}
    return {"trial": next(_numbers), "seed": seed, "params": params, "gpus": 0, **own}


def steps(trial: VaeTrial) -> Iterator[dict[str, Any]]:
    """Results until it says that it is done."""
    for _ in range(100):
        yield (result := trial.step())
        if result["done"]:
            return
    raise AssertionError("it is never done")


def epochs(*results: dict[str, Any]) -> list[dict[str, Any]]:
    """All epochs of some results, without what the clock decides."""
    return [{k: v for k, v in e.items() if k not in TIMES} for result in results for e in result["epochs"]]


def test_a_step_ends_at_each_rung_and_the_last_one_is_final(make):
    spec = make_spec()
    assert spec.rungs() == [2, 3, 5]
    results = list(steps(make(trial_config(), spec=spec)))
    assert [result["epoch"] for result in results] == [*spec.rungs(), MAX_EPOCHS]
    assert [[e["epoch"] for e in result["epochs"]] for result in results] == [[1, 2], [3], [4, 5], [6, 7, 8]]
    assert [(result["final"], result["done"]) for result in results] == [(False, False)] * 3 + [(True, True)]
    assert {result["status"] for result in results} == {"ok"}
    assert all(result["objective"] == result["epochs"][-1]["val_nelbo"] for result in results)
    assert {(result["from_epoch"], result["damaged"]) for result in results} == {(0, None)}
    assert results[-1]["num_parameters"] > 0
    assert results[-1]["train_wall_s"] == pytest.approx(sum(e["wall_s"] for r in results for e in r["epochs"]))


def test_the_last_state_is_stored_where_its_weights_may_be_kept(make, store):
    config = trial_config()
    value = list(steps(make(config)))[-1]["objective"]
    epochs_stored = []
    for bound in (math.inf, value, math.nextafter(value, 0), -math.inf):
        config = trial_config(keep_below=bound)
        list(steps(make(config)))
        epochs_stored.append(ray.get(store.newest.remote(config["trial"])).epoch)
    assert epochs_stored == [MAX_EPOCHS, MAX_EPOCHS, 5, 5]  # 5: the last rung


def test_a_step_ends_between_rungs_once_its_time_is_up(make, monkeypatch):
    straight = list(steps(make(trial_config())))
    monkeypatch.setattr(search.attempt, "STEP_S", 0.0)
    results = list(steps(make(trial_config())))
    assert [len(result["epochs"]) for result in results] == [1] * MAX_EPOCHS
    assert epochs(*results) == epochs(*straight)  # how it is cut into steps changes nothing


def test_a_trial_in_a_used_worker_is_to_the_bit_the_one_in_a_fresh_worker(make):
    wide = {**OTHER, "batch_size": 96}
    fresh = list(steps(make(trial_config(wide, seed=8))))
    used = make(trial_config())
    next(itertools.islice(steps(used), 2, None))  # stopped at a rung
    assert used.reset_config(trial_config(wide, seed=8))
    again = list(steps(used))
    assert epochs(*again) == epochs(*fresh)
    for name in ("epoch", "objective", "num_parameters", "no_latent_nelbo", "from_epoch", "status"):
        assert [r[name] for r in again] == [r[name] for r in fresh]


def test_a_worker_that_saw_a_trial_diverge_trains_the_next_as_a_fresh_one(make):
    fresh = list(steps(make(trial_config())))
    used = make(trial_config({**GENTLE, "activation": "exponential", "learning_rate": 10.0}))
    assert list(steps(used))[-1]["status"] == "diverged"
    used.reset_config(trial_config())
    assert epochs(*steps(used)) == epochs(*fresh)


def test_another_seed_is_another_trial(make):
    one, two = (epochs(*steps(make(trial_config(seed=seed)))) for seed in (1, 2))
    assert one != two


def test_a_trial_goes_on_from_its_last_stored_rung_to_the_same_end(make, monkeypatch):
    rungs = make_spec().rungs()
    expected = epochs(*steps(make(trial_config())))
    for done_before in (1, 2, 4, 6):
        lost = trial_config()
        with monkeypatch.context() as patch:
            patch.setattr(search.attempt, "STEP_S", 0.0)  # an epoch a step: so it can be lost between rungs
            worker = make(lost)
            for _ in range(done_before):
                worker.step()
        resumed = list(steps(make(lost)))
        stored = max([r for r in rungs if r <= done_before], default=0)
        first_stop = stored or rungs[0]  # at a rung that may not have been judged yet
        assert [e["epoch"] for e in resumed[0]["epochs"]] == list(range(1, first_stop + 1))  # earlier ones once more
        ends = [result["epoch"] for result in resumed[1:]]
        assert ends == [end for end in (*rungs, MAX_EPOCHS) if end > first_stop]
        assert epochs(*resumed) == expected
        assert {result["from_epoch"] for result in resumed} == {stored}
        assert resumed[-1]["final"]


def test_a_resumed_trial_trains_only_what_is_missing(make, monkeypatch):
    config = trial_config()
    worker = make(config)
    worker.step()
    worker.step()  # rung 3
    resumed = make(config)
    resumed.step()
    assert resumed._attempt.trainer.epoch == 3


def test_a_trial_lost_after_its_end_reports_its_end_again(make):
    config = trial_config()
    first = list(steps(make(config)))
    again = list(steps(make(config)))
    assert len(again) == 1
    assert again[0]["final"]
    assert epochs(*again) == epochs(*first)


def test_a_trial_whose_newest_state_is_damaged_goes_on_from_the_one_before_to_the_same_end(make, store_folder):
    expected = epochs(*steps(make(trial_config())))
    for damage, told in ((b"", "checksum"), (None, "could not be loaded")):
        config = trial_config()
        worker = make(config)
        worker.step()
        worker.step()
        newest = store_folder / f"trial-{config['trial']:05d}.epoch-00003.pt"
        if damage is None:  # whole, and yet nothing that torch can read
            CheckpointStore(store_folder).put(config["trial"], 3, b"from another world")
        else:
            newest.write_bytes(damage)
        resumed = list(steps(make(config)))
        assert {result["from_epoch"] for result in resumed} == {2}
        assert told in resumed[0]["damaged"]
        assert "epoch 3" in resumed[0]["damaged"]
        assert epochs(*resumed) == expected


def test_a_trial_without_any_sound_state_begins_anew(make, store_folder):
    expected = epochs(*steps(make(trial_config())))
    config = trial_config()
    worker = make(config)
    worker.step()
    worker.step()
    for path in store_folder.glob(f"trial-{config['trial']:05d}.*"):
        path.write_bytes(path.read_bytes()[:50])
    resumed = list(steps(make(config)))
    assert {result["from_epoch"] for result in resumed} == {0}
    assert "epoch 2" in resumed[0]["damaged"]
    assert epochs(*resumed) == expected


def test_a_worker_is_heard_while_it_trains_and_not_while_it_hangs(make, monkeypatch):
    spec = make_spec(budget={"max_epochs": MAX_EPOCHS, "stall_timeout_s": 0.5})
    worker = make(trial_config(), spec=spec)
    worker.step()
    attempt = worker._attempt
    beats: list[tuple[int, int, int]] = []  # how far the attempt was
    heard_by = SimpleNamespace(beat=SimpleNamespace(remote=lambda trial: beats.append(attempt.progress)))
    monkeypatch.setattr(worker._heartbeat, "_store", heard_by)
    straight = attempt.trainer._train_step

    def slow(x: torch.Tensor) -> None:
        time.sleep(0.02)  # an epoch of half a second
        straight(x)

    monkeypatch.setattr(attempt.trainer, "_train_step", slow)
    attempt.trainer.train_epoch()
    deadline = time.monotonic() + 60
    while not beats or beats[-1] != attempt.progress:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # in which a worker that moved would be heard ten times
    worker.cleanup()
    assert len(set(beats)) > 2
    assert beats.count(attempt.progress) <= 2  # the first may be of the step before


def test_the_final_model_is_in_the_store_before_its_result_is_told(make, store_folder):
    config = trial_config()
    last = list(steps(make(config)))[-1]
    stored = CheckpointStore(store_folder).newest(config["trial"])
    assert stored.epoch == MAX_EPOCHS
    state = torch.load(io.BytesIO(stored.state), weights_only=True)
    assert state["trainer"]["epoch"] == MAX_EPOCHS
    assert state["history"][-1]["val_nelbo"] == last["objective"]


# ---- bad ends are results, not exceptions


def test_a_model_that_ignores_its_latents_is_collapsed(make):
    """A KL term that weighs a thousandfold leaves no reason to use them."""
    spec = make_spec(train={"beta": 1000.0, "kl_warmup_epochs": 0, "lr_schedule": "constant"})
    last = list(steps(make(trial_config(), spec=spec)))[-1]
    assert (last["status"], last["final"], last["done"]) == ("collapsed", True, True)
    assert last["reason"]
    assert math.isfinite(last["objective"])


def test_a_model_no_better_than_one_without_latents_is_collapsed_though_its_latents_are_in_use(make):
    spec = make_spec(budget={"max_epochs": 1}, train={"kl_warmup_epochs": 0}, scheduler={"grace_epochs": 1})
    last = list(steps(make(trial_config({**GENTLE, "learning_rate": 1e-6}), spec=spec)))[-1]
    assert last["epochs"][-1]["active_units"] > 0
    assert last["objective"] >= last["no_latent_nelbo"]
    assert (last["status"], last["final"]) == ("collapsed", True)
    assert f"{last['no_latent_nelbo']:.2f}" in last["reason"]


def test_a_non_finite_loss_ends_a_trial_at_once_as_diverged(make):
    results = list(steps(make(trial_config({**GENTLE, "activation": "exponential", "learning_rate": 10.0}))))
    last = results[-1]
    assert (last["status"], last["final"], last["done"]) == ("diverged", False, True)
    assert "epoch" in last["reason"]
    assert last["epoch"] < MAX_EPOCHS
    assert math.isfinite(last["no_latent_nelbo"])
    assert all(math.isfinite(e["val_nelbo"]) for r in results for e in r["epochs"])


def test_epochs_before_the_divergence_are_reported_with_it(make, monkeypatch):
    trial = make(trial_config())
    trial.step()  # up to epoch 2
    straight = trial._attempt.trainer.train_epoch

    def breaks_in_epoch_5() -> object:
        if trial._attempt.trainer.epoch == 4:
            with torch.no_grad():
                trial._attempt.trainer.model.outputs.bias.fill_(math.nan)
        return straight()

    monkeypatch.setattr(trial._attempt.trainer, "train_epoch", breaks_in_epoch_5)
    assert [e["epoch"] for e in trial.step()["epochs"]] == [3]
    last = trial.step()
    assert (last["status"], last["done"]) == ("diverged", True)
    assert [e["epoch"] for e in last["epochs"]] == [4]
    assert last["objective"] == last["epochs"][-1]["val_nelbo"]


def test_data_that_break_the_training_end_a_trial_as_an_error_with_the_last_lines_of_its_traceback(make, digits):
    broken = replace(digits, validation=np.ascontiguousarray(digits.validation[:, :10]))
    trial = make(trial_config(), data=broken)
    (last,) = steps(trial)
    assert (last["status"], last["final"], last["done"], last["epochs"]) == ("error", False, True, [])
    assert last["objective"] == math.inf
    assert "Error" in last["reason"].splitlines()[-1]
    assert 1 < len(last["reason"].splitlines()) <= 10


def test_a_worker_that_met_an_error_is_of_use_for_the_next_trial(make, monkeypatch):
    expected = epochs(*steps(make(trial_config())))
    used = make(trial_config())
    with monkeypatch.context() as broken:
        broken.setattr(search.attempt, "make_trainer", None)
        assert used.step()["status"] == "error"
    used.reset_config(trial_config())
    assert epochs(*steps(used)) == expected


def test_a_model_beyond_all_memory_ends_a_trial_as_oom(make):
    beyond_any_address_space = make_spec(model={"hidden_dims": [10**13]})
    (last,) = steps(make(trial_config(), spec=beyond_any_address_space))
    assert (last["status"], last["final"], last["done"]) == ("oom", False, True)
    assert last["epochs"] == []
    assert "allocate" in last["reason"]


# ---- the data


def test_workers_read_the_data_where_they_lie_in_shared_memory(make, digits):
    trial = make(trial_config())
    trial.step()
    for split in ("train", "validation", "test"):
        array = getattr(trial._data, split)
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert not np.shares_memory(array, getattr(digits, split))  # it did go through the store
        assert np.array_equal(array, getattr(digits, split))
    assert trial._attempt.trainer._train.data_ptr() == trial._data.train.ctypes.data
    assert trial._attempt.trainer._validation.data_ptr() == trial._data.validation.ctypes.data


def test_training_leaves_the_shared_data_as_they_were(make, digits):
    trial = make(trial_config())
    list(steps(trial))
    assert np.array_equal(trial._data.train, digits.train)
    assert np.array_equal(trial._data.validation, digits.validation)


@pytest.mark.parametrize(
    ("error", "is_of_the_machine", "status"),
    [
        (ray.exceptions.RayActorError(), True, "error"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, "error"),
        (torch.AcceleratorError("CUDA error: out of memory"), False, "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, "oom"),
        (torch.OutOfMemoryError("CUDA out of memory."), False, "oom"),
        (MemoryError(), False, "oom"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, "error"),
    ],
    ids=str,
)
def test_faults_of_a_machine_are_told_from_those_of_a_trial(error, is_of_the_machine, status):
    assert search.attempt.is_of_the_machine(error) == is_of_the_machine
    assert search.attempt.what_ended(error).status == status
