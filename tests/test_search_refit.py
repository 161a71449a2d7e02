"""A configuration trained anew and exported: the same bits however often it was cut off, and honest about its value."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_search_replay import change_study_file, rewrite, vaesearch

import search.refit
from search.checkpoints import CheckpointStore
from search.interrupts import Interrupted
from search.publish import ExportMismatch
from search.refit import PLAN_FILE, STATES_FOLDER, Refit, refit, refit_lines
from search.results import Study, open_study, ranked
from vae import export, portable
from vae.config import DataConfig, InputError
from vae.data import load_data
from vae.objective import evaluate, fixed_noise
from vae.training import EpochMetrics

EPOCHS = 5


class CutOff(Exception):
    """The end of a process, staged."""


class CutOffAt:
    """Ends a refit after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[int] = []

    def __call__(self, done: int, total: int, metrics: EpochMetrics) -> None:
        self.seen.append(done)
        if done == self.epoch:
            raise CutOff


@pytest.fixture
def copy(small_study: Study, tmp_path: Path) -> Study:
    shutil.copytree(small_study.path, tmp_path / small_study.name)
    return open_study(tmp_path / small_study.name)


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.refit, "STORE_EVERY_S", 0.0)
    monkeypatch.setattr(search.refit, "STORE_TIMES", 0.0)


@pytest.fixture(scope="module")
def straight(small_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Refit:
    """A refit that nothing disturbed."""
    return refit(small_study, epochs=EPOCHS, to=tmp_path_factory.mktemp("straight") / "model")


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def without_clock(result: Refit) -> Refit:
    return replace(result, folder="", train_wall_s=0.0)


def judged(result: Refit, split: str) -> float:
    """The bound of an exported model on a split, by its own config.json."""
    stored = export.read_config(result.folder)
    data = load_data(DataConfig(**stored["data"]["config"]))
    model = export.load(result.folder)
    x = torch.tensor(getattr(data, split))
    return evaluate(model, x, fixed_noise(len(x), model.config.latent_dim, data.config.seed)).nelbo


# ---- what comes out


def test_with_the_trials_epochs_seed_and_data_it_is_the_trials_model_again(small_study, tmp_path):
    best = ranked(small_study.rows())[0]
    result = refit(small_study, epochs=best.max_epochs, to=tmp_path / "model")
    assert (result.trial, result.seed, result.nelbo) == (best.trial, best.seed, best.val_nelbo)
    model, trials_own = export.load(result.folder), export.load(small_study.model_folders()[0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trials_own.state_dict().items())


def test_schedules_span_the_new_number_of_epochs(copy, tmp_path):
    change_study_file(copy, "train", kl_warmup_epochs=2, lr_schedule="cosine")  # of 8 epochs
    told: list[EpochMetrics] = []
    result = refit(copy, epochs=12, to=tmp_path / "model", tell=lambda done, total, metrics: told.append(metrics))
    assert (
        export.read_config(result.folder)["train"] | {"max_epochs": 12, "kl_warmup_epochs": 3}
        == (export.read_config(result.folder)["train"])
    )
    assert [metrics.kl_weight for metrics in told] == pytest.approx([1 / 3, 2 / 3] + 10 * [1.0])


def test_trained_on_validation_too_its_value_is_that_of_the_test_split_and_said_so(small_study, tmp_path):
    result = refit(small_study, epochs=2, train_on="train+validation", to=tmp_path / "model")
    rows = export.read_config(result.folder)["data"]["rows"]
    assert (result.split, result.train_rows) == ("test", 1437 + 180)
    assert rows == {"train": 1437 + 180, "validation": 0, "test": 180}
    assert judged(result, "test") == pytest.approx(result.nelbo, abs=1e-4)
    metrics = export.read_config(result.folder)["metrics"]
    assert metrics["test_nelbo"] == result.nelbo
    assert "val_nelbo" not in metrics
    card = (Path(result.folder) / "README.md").read_text()
    assert "The validation split was trained on" in card
    assert "baseline (test)" in card
    assert "Test examples" in card
    assert "alidation examples" not in card
    assert f"{result.nelbo:.6g}" in card
    assert "test split" in refit_lines(result)[1]


def test_validation_rows_are_trained_on_as_the_training_rows_are(small_study):
    """Grey, where batches are binarised anew: all rows but those of the test split, each once."""
    data = load_data(small_study.spec.data_config())
    joined = search.refit._with_validation(data)
    grey = load_data(replace(data.config, binarize="none"))
    everything = np.concatenate([grey.train, grey.validation, grey.test])
    found = np.concatenate([joined.train, grey.test])
    assert np.array_equal(np.sort(found, axis=0), np.sort(everything, axis=0))
    assert np.array_equal(joined.validation, data.test)


def test_other_data_of_the_kind_can_be_trained_on(small_study, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "other.npy", rng.integers(0, 17, (300, 8, 8), dtype=np.uint8))
    other = str(tmp_path / "other.npy")
    result = refit(small_study, epochs=1, data=other, to=tmp_path / "model")
    assert (result.is_own_data, result.data, result.train_rows) == (False, other, 240)
    assert judged(result, "validation") == pytest.approx(result.nelbo, abs=1e-4)
    assert "not the data of the study" in refit_lines(result)[0]


def test_the_folder_tells_of_which_trial_it_is_a_refit_on_what_and_how_long(small_study, straight):
    folder = Path(straight.folder)
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["study"], stored["trial"]) == (small_study.name, straight.trial)
    assert stored["refit"]["plan"]["epochs"] == stored["metrics"]["epochs"] == EPOCHS
    assert stored["refit"]["result"]["split"] == "validation"
    card = (folder / "README.md").read_text()
    assert f"It is a refit of trial {straight.trial} of the study `small`." in card
    assert f"trained anew for {EPOCHS} epochs with seed {straight.seed}" in card
    assert not (folder / STATES_FOLDER).exists()
    assert not (folder / search.refit.BUILDING).exists()
    assert judged(straight, "validation") == pytest.approx(straight.nelbo, abs=1e-4)


def test_a_study_under_another_name_is_meant_by_that_name(small_study, tmp_path):
    shutil.copytree(small_study.path, tmp_path / "renamed")
    result = refit(open_study(tmp_path / "renamed"), epochs=1, to=tmp_path / "model")
    assert export.read_config(result.folder)["study"] == result.study == "renamed"


def test_programs_that_a_finished_refit_lacks_are_added(small_study, straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "model")
    said: list[str] = []
    more = {"to": tmp_path / "model", "programs": True, "tell": CutOffAt(1), "say": said.append}
    done = refit(small_study, epochs=EPOCHS, **more)
    assert done == replace(straight, folder=str(tmp_path / "model"))
    assert set(export.read_config(tmp_path / "model")["files"]) == {"encoder.pt2", "decoder.pt2"}
    assert (tmp_path / "model" / "decoder.pt2").is_file()
    assert weights(tmp_path / "model") == weights(straight.folder)
    refit(small_study, epochs=EPOCHS, **more)
    assert [line.partition(": ")[2] for line in said] == [
        "this refit is there already; writing its .pt2 files",
        "this refit is there already",
    ]


@pytest.mark.system
def test_onnx_that_a_finished_refit_lacks_is_added(small_study, straight, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copytree(straight.folder, tmp_path / "model")
    said: list[str] = []
    for onnx in (False, True, True):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "model", programs=True, onnx=onnx, say=said.append)
    assert [line.partition("; ")[2] for line in said] == ["writing its .pt2 files", "writing its .onnx files", ""]
    names = {f"{side}{suffix}" for side in ("encoder", "decoder") for suffix in (".pt2", ".onnx")}
    assert set(export.read_config(tmp_path / "model")["files"]) == names


def test_adversarial_training_is_refitted_too(copy, tmp_path, every_epoch):
    change_study_file(copy, "train", objective="vae_gan")
    results = []
    for name in ("straight", "cut"):
        if name == "cut":
            with pytest.raises(CutOff):
                refit(copy, trial=0, epochs=3, to=tmp_path / name, tell=CutOffAt(3))
        results.append(refit(copy, trial=0, epochs=3, to=tmp_path / name))
    assert weights(tmp_path / "straight") == weights(tmp_path / "cut")
    assert without_clock(results[0]) == without_clock(results[1])
    assert results[0].objective != results[0].nelbo
    assert "squared error" in refit_lines(results[0])[2]


# ---- cut off


def test_cut_off_between_two_epochs_it_goes_on_and_ends_with_the_same_bits(
    small_study, straight, tmp_path, every_epoch
):
    folder = tmp_path / "model"
    for epoch in (2, 4):  # before their state is stored
        cut = CutOffAt(epoch)
        with pytest.raises(CutOff):
            refit(small_study, epochs=EPOCHS, to=folder, tell=cut)
        assert not (folder / "config.json").exists()
    assert cut.seen == [2, 3, 4]
    result = refit(small_study, epochs=EPOCHS, to=folder)
    assert weights(folder) == weights(straight.folder)
    assert without_clock(result) == without_clock(straight)


def test_killed_half_way_the_same_call_in_another_process_ends_with_the_same_bits(small_study, straight, tmp_path):
    folder = tmp_path / "model"
    code = f"""
import time
import search.refit
from search.results import open_study
search.refit.STORE_EVERY_S = search.refit.STORE_TIMES = 0.0
search.refit.refit(
    open_study({str(small_study.path)!r}), epochs={EPOCHS}, to={str(folder)!r}, tell=lambda *_: time.sleep(0.5)
)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 100
    while not list(folder.glob(f"{STATES_FOLDER}/*.epoch-00002.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "config.json").exists()
    said: list[str] = []
    refit(small_study, epochs=EPOCHS, to=folder, say=said.append)
    assert any("going on from epoch" in line for line in said)
    assert weights(folder) == weights(straight.folder)


def test_states_take_a_twentieth_of_the_time_at_the_most(small_study, tmp_path, monkeypatch):
    """By a clock of the test's: an epoch takes 1 s and a state 0.25 s."""
    now, stored = 0.0, []
    monkeypatch.setattr(search.refit, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(search.refit, "STORE_EVERY_S", 2.0)
    put = CheckpointStore.put

    def slow_put(store: CheckpointStore, trial: int, epoch: int, state: bytes) -> None:
        nonlocal now
        put(store, trial, epoch, state)
        now += 0.25
        stored.append(epoch)

    def tell(done: int, total: int, metrics: EpochMetrics) -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(CheckpointStore, "put", slow_put)
    refit(small_study, epochs=13, to=tmp_path / "model", tell=tell)
    assert stored == [2, 7, 12, 13]


def test_the_states_go_only_once_the_model_would_outlast_a_power_cut(small_study, tmp_path, monkeypatch):
    synced, seen = set[int](), []
    fsync, clear = os.fsync, CheckpointStore.clear

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checked(store: CheckpointStore) -> None:
        model = tmp_path / "model"
        files = {path.name: path.stat().st_ino for path in (model, *model.iterdir()) if path.name != STATES_FOLDER}
        seen.append([name for name, inode in files.items() if inode not in synced and name != search.refit.BUILDING])
        assert "model.safetensors" in files
        clear(store)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(CheckpointStore, "clear", checked)
    refit(small_study, epochs=1, to=tmp_path / "model")
    assert seen == [[]]


def test_of_the_states_the_plan_goes_last(small_study, tmp_path, monkeypatch):
    """Cut off in between, what is left is known to be a refit's, and goes with the next call."""
    unlink = Path.unlink

    def cut_off(path: Path, missing_ok: bool = False) -> None:
        if path.name == PLAN_FILE:
            raise CutOff
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut_off)
        with pytest.raises(CutOff):
            refit(small_study, epochs=1, to=tmp_path / "model")
    states = tmp_path / "model" / STATES_FOLDER
    assert [path.name for path in states.iterdir()] == [PLAN_FILE]
    refit(small_study, epochs=1, to=tmp_path / "model", tell=CutOffAt(1))
    assert not states.exists()


def test_a_torn_state_is_passed_over_for_the_one_before(small_study, straight, tmp_path, every_epoch):
    with pytest.raises(CutOff):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "model", tell=CutOffAt(4))
    newest = sorted((tmp_path / "model" / STATES_FOLDER).glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    said: list[str] = []
    refit(small_study, epochs=EPOCHS, to=tmp_path / "model", say=said.append)
    assert "the state of epoch 3 could not be read" in said[0]
    assert "going on from epoch 2" in said[1]
    assert weights(tmp_path / "model") == weights(straight.folder)


def test_an_interrupt_stores_the_epoch_that_it_came_in(small_study, straight, tmp_path):
    def interrupt(done: int, total: int, metrics: EpochMetrics) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "model", tell=interrupt)
    said: list[str] = []
    refit(small_study, epochs=EPOCHS, to=tmp_path / "model", say=said.append)
    assert "going on from epoch 3" in said[0]
    assert weights(tmp_path / "model") == weights(straight.folder)


def test_the_command_tells_on_ctrl_c_which_command_goes_on(small_study, tmp_path, monkeypatch, capsys):
    where = ["--storage", str(small_study.path.parent), "--to", str(tmp_path / "model")]
    command = ["refit", "small", "--epochs", "3", "--no-onnx", *where]
    monkeypatch.setattr(sys, "argv", ["vaesearch", *command])
    with monkeypatch.context() as patch:
        train = search.refit.make_trainer

        def interrupted(*arguments: Any, **options: Any) -> Any:
            trainer = train(*arguments, **options)
            straight = trainer.train_epoch

            def train_epoch() -> EpochMetrics:
                metrics = straight()
                if metrics.epoch == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                return metrics

            monkeypatch.setattr(trainer, "train_epoch", train_epoch)
            return trainer

        patch.setattr(search.refit, "make_trainer", interrupted)
        assert vaesearch(*command) == 130
    told = capsys.readouterr().err
    assert f"interrupted with 2 of 3 epochs done; go on with: vaesearch {' '.join(command)}" in told
    said: list[str] = []
    refit(small_study, epochs=3, to=tmp_path / "model", say=said.append)
    assert "going on from epoch 2" in said[0]
    assert vaesearch(*command, "--json") == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["epochs"] == 3
    assert "is there already" in answer.err


@pytest.mark.system
def test_the_command_exports_programs_too(small_study, tmp_path, capsys):
    where = ("--storage", str(small_study.path.parent), "--to", str(tmp_path / "model"))
    assert vaesearch("refit", "small", "--epochs", "2", "--train-on", "train+validation", "--no-onnx", *where) == 0
    assert "test split: nelbo" in capsys.readouterr().out
    assert set(export.read_config(tmp_path / "model")["files"]) == {"encoder.pt2", "decoder.pt2"}
    assert (tmp_path / "model" / "encoder.pt2").exists()


def test_done_before_it_is_not_done_again(small_study, straight):
    cut, said = CutOffAt(1), list[str]()
    assert refit(small_study, epochs=EPOCHS, to=straight.folder, tell=cut, say=said.append) == straight
    assert (cut.seen, len(said)) == ([], 1)


def test_cut_off_while_it_tidied_up_it_is_done(small_study, straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "model")
    (tmp_path / "model" / STATES_FOLDER).mkdir()
    (tmp_path / "model" / STATES_FOLDER / PLAN_FILE).write_text(
        json.dumps(export.read_config(straight.folder)["refit"]["plan"])
    )
    cut = CutOffAt(1)
    refit(small_study, epochs=EPOCHS, to=tmp_path / "model", tell=cut)
    assert cut.seen == []
    assert not (tmp_path / "model" / STATES_FOLDER).exists()


def test_a_model_that_does_not_give_its_value_is_not_put_in_place(small_study, straight, tmp_path, monkeypatch):
    save = export.save

    def spoiled(model: Any, path: Path, **more: Any) -> None:
        save(model, path, **more)
        shutil.copy(Path(straight.folder) / "model.safetensors", path)

    with monkeypatch.context() as patch:
        patch.setattr(export, "save", spoiled)
        with pytest.raises(ExportMismatch):
            refit(small_study, epochs=EPOCHS, seed=1, to=tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == [STATES_FOLDER]
    refit(small_study, epochs=EPOCHS, seed=1, to=tmp_path / "model")
    assert weights(tmp_path / "model") != weights(straight.folder)


def test_a_training_that_diverges_says_what_may_do_and_leaves_nothing(copy, tmp_path):
    rewrite(copy, 0, lambda row: replace(row, activation="exponential", learning_rate=10.0))
    with pytest.raises(ArithmeticError, match=r"diverged(.|\n)*another --seed or --trial"):
        refit(copy, trial=0, epochs=2, to=tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- refused


def test_values_out_of_range_are_refused_before_anything_is_written(small_study, tmp_path):
    for wrong, message in (
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"epochs": 1, "seed": -1}, "--seed"),
        ({"epochs": 1, "train_on": "everything"}, r"--train-on everything: known are train, train\+validation"),
        ({"epochs": 1, "trial": 99}, "there is no trial 99; it has trials 0 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            refit(small_study, to=tmp_path / "model", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


def test_onnx_that_cannot_be_written_is_refused_before_the_training(small_study, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="programs = True"):
        refit(small_study, epochs=1, to=tmp_path / "model", onnx=True)
    monkeypatch.setattr(portable, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="ONNX needs no_such_package"):
        refit(small_study, epochs=1, to=tmp_path / "model", programs=True, onnx=True, tell=CutOffAt(1))
    assert not (tmp_path / "model").exists()


def test_a_study_without_a_complete_trial_asks_for_one_by_its_number(copy, tmp_path):
    for row in copy.rows():
        rewrite(copy, row.trial, lambda row: replace(row, state="PRUNED", epochs=2))
    with pytest.raises(InputError, match="no healthy trial has trained to its last epoch yet; name one with --trial"):
        refit(copy, epochs=1, to=tmp_path / "model")
    assert refit(copy, trial=1, epochs=1, to=tmp_path / "model").trial == 1


def test_data_of_another_width_or_support_are_refused(small_study, tmp_path):
    rng = np.random.default_rng(0)
    wide = tmp_path / "my wide.npy"
    np.save(wide, rng.random((50, 65)))
    np.save(tmp_path / "real.npy", rng.normal(size=(50, 64)))
    with pytest.raises(InputError, match="a row has 65 features, and one of the study's data has 64") as refused:
        refit(small_study, epochs=1, data=str(wide), to=tmp_path / "model")
    assert str(refused.value).endswith(f"vaesearch run --data '{wide}'")
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        refit(small_study, epochs=1, data=str(tmp_path / "real.npy"), to=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_checkpoints_of_somebody_else_are_left_alone(small_study, straight, tmp_path):
    """Also where they are called as ours are."""
    theirs = tmp_path / "run" / STATES_FOLDER
    theirs.mkdir(parents=True)
    for name in ("epoch=3.ckpt", "trial-00000.epoch-00001.pt"):
        (theirs / name).write_text("mine")
        with pytest.raises(InputError, match="holds something else than a refit"):
            refit(small_study, epochs=EPOCHS, to=tmp_path / "run")
        with_model = tmp_path / name
        shutil.copytree(straight.folder, with_model)
        shutil.copytree(theirs, with_model / STATES_FOLDER)
        refit(small_study, epochs=EPOCHS, to=with_model, tell=CutOffAt(1))
        for folder in (theirs, with_model / STATES_FOLDER):
            assert [path.read_text() for path in folder.iterdir()] == ["mine"]
        (theirs / name).unlink()
    theirs.rmdir()
    theirs.write_text("mine")
    with pytest.raises(InputError, match="holds something else than a refit"):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "run")


def test_cut_off_as_it_wrote_its_plan_it_begins(small_study, tmp_path):
    states = tmp_path / "model" / STATES_FOLDER
    states.mkdir(parents=True)
    (states / f".{PLAN_FILE}.tmp").write_text('{"stu')
    refit(small_study, epochs=1, to=tmp_path / "model")
    assert not states.exists()


def test_to_train_a_trial_again_loads_no_ray():
    code = "import sys, search.refit, search.replay; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_folder_that_holds_something_else_is_left_alone(small_study, straight, tmp_path, every_epoch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match="holds something else than a refit; name another folder with --to"):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "mine" / "thesis.tex")
    with pytest.raises(InputError, match="an exported model that is no refit"):
        refit(small_study, epochs=EPOCHS, to=small_study.model_folders()[0])
    with pytest.raises(InputError, match=r"holds another refit: epochs: 5 -> 6\n"):
        refit(small_study, epochs=EPOCHS + 1, to=straight.folder)
    with pytest.raises(CutOff):
        refit(small_study, epochs=EPOCHS, to=tmp_path / "model", tell=CutOffAt(2))
    plan = (tmp_path / "model" / STATES_FOLDER / PLAN_FILE).read_bytes()
    with pytest.raises(InputError, match=r"holds an unfinished refit: seed: \d+ -> 3"):
        refit(small_study, epochs=EPOCHS, seed=3, to=tmp_path / "model")
    assert (tmp_path / "model" / STATES_FOLDER / PLAN_FILE).read_bytes() == plan
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
