"""Exported models: read back elsewhere they give the value in the ledger; what doesn't is not announced."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import search.interrupts
import search.publish
import vae
from search import cli
from search.publish import TOLERANCE_NATS, ExportMismatch, export_best, export_models, publish_best
from search.results import Study, open_study, ranked
from search.statistics import mean_interval
from search.tables import FinalRow
from vae import export, portable
from vae.config import InputError
from vae.data import Dataset, load_data
from vae.model import VAE

JUDGE = dedent(
    """
    import json, sys
    import vae, torch

    for folder in sys.argv[1:]:
        config = vae.read_config(folder)
        data = vae.load_data(vae.DataConfig(**config["data"]["config"]))
        model = vae.load(folder).vae
        noise = vae.fixed_noise(len(data.validation), model.config.latent_dim, config["data"]["config"]["seed"])
        value = vae.evaluate(model, torch.tensor(data.validation), noise)
        same = data.fingerprint == config["data"]["fingerprint"]
        print(json.dumps([value.nelbo, value.active_units, same, not model.training]))
    assert not {"ray", "optuna", "search"} & set(sys.modules)
    """
)


CONTENTS = ["attempts", "diagnostics", "epochs", "layers", "models", "study.toml", "trials"]


def judged(*folders: Path) -> list[tuple[float, int, bool, bool]]:
    """Validation value and active units of exported models in a process that knows `vae` alone."""
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, *map(str, folders)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def data(small_study: Study) -> Dataset:
    return load_data(small_study.spec.data_config())


@pytest.fixture
def copy(small_study: Study, tmp_path: Path) -> Study:
    shutil.copytree(small_study.path, tmp_path / small_study.name)
    return open_study(tmp_path / small_study.name)


def test_exported_models_give_their_recorded_value_in_a_new_process(small_study):
    folders, best = small_study.model_folders(), ranked(small_study.rows())
    values = judged(*folders)
    assert len(values) == small_study.spec.export.top == 2
    for row, (nelbo, active_units, same_data, evaluating) in zip(best, values, strict=False):
        assert nelbo == pytest.approx(row.val_nelbo, abs=TOLERANCE_NATS)
        assert active_units == row.active_units
        assert same_data
        assert evaluating


def test_whoever_may_read_a_study_may_read_its_models(small_study):
    folder = Path(str(small_study.path))
    assert (folder / "models").stat().st_mode == (folder / "trials").stat().st_mode
    for model in small_study.model_folders():
        assert len({path.stat().st_mode for path in Path(str(model)).iterdir()}) == 1


def test_folders_are_named_by_rank_and_trial_best_first(small_study):
    best = ranked(small_study.rows())
    names = [f"{rank}-trial-{row.trial}" for rank, row in enumerate(best, start=1)]
    assert [folder.name for folder in small_study.model_folders()] == names[: small_study.spec.export.top]


def test_config_json_says_what_the_model_is_and_where_it_comes_from(small_study, data):
    for row, folder in zip(ranked(small_study.rows()), small_study.model_folders(), strict=False):
        config = json.loads((folder / "config.json").read_text())
        assert (config["study"], config["trial"], config["params"]) == (
            small_study.name,
            row.trial,
            {k: v for k, v in row.params.items() if not k.startswith("hidden_")} | {"hidden_dims": row.hidden_dims},
        )
        assert config["model"]["activation"] == row.activation
        assert config["model"]["hidden_dims"] == row.hidden_dims
        assert config["train"]["seed"] == row.seed
        assert config["train"]["max_epochs"] == config["metrics"]["epochs"] == row.epochs
        assert config["metrics"]["val_nelbo"] == row.val_nelbo
        assert config["metrics"]["no_latent_nelbo"] == row.no_latent_nelbo
        assert config["data"]["fingerprint"] == data.fingerprint
        assert config["data"]["rows"]["validation"] == len(data.validation)
        assert {"vaesearch", "torch", "numpy"} <= set(config["versions"])


def test_the_bound_of_validation_rows_as_they_stand_in_the_source_is_the_ledger_s(small_study):
    spec = small_study.spec
    config = replace(spec.data_config(), support="real", scale="none", binarize="none")
    own = load_data(config).validation  # the same rows: the split knows their number and the seed alone
    assert own.max() == 16
    for row, folder in zip(ranked(small_study.rows()), small_study.model_folders(), strict=False):
        model = vae.load(Path(str(folder)))
        bounds = model.nelbo(own, seed=config.seed)
        assert bounds.mean() == pytest.approx(row.val_nelbo, abs=TOLERANCE_NATS)
        error = model.config["metrics"]["val_nelbo_se"]
        assert error == pytest.approx(bounds.std(ddof=1) / np.sqrt(len(own)), rel=1e-4)
        assert model.nelbo(own, seed=1).mean() == pytest.approx(row.val_nelbo, abs=6 * error)


def test_what_fresh_seeds_came_to_stands_in_config_and_card(copy, data, monkeypatch, tmp_path):
    best, second = ranked(copy.rows())[:2]
    runs = [
        FinalRow(study=copy.name, trial=row.trial, activation=row.activation, run=run, seed=run, state=state,
                 status="ok", importance_samples=50)
        for row in (best, second) for run, state in enumerate(("COMPLETE", "COMPLETE", "COMPLETE", "FAIL"))
    ]  # fmt: skip
    nll = np.random.default_rng(0).normal(80, 5, (2, 3, 20))
    images = pa.Table.from_pylist(
        [
            {"trial": row.trial, "run": run, "row": image, "nll": nll[index, run, image]}
            for image in reversed(range(20)) for run in range(3) for index, row in enumerate((best, second))
        ]
    )  # fmt: skip
    monkeypatch.setattr(Study, "whole_final_rows", lambda self: runs)
    monkeypatch.setattr(Study, "final_images", lambda self: images)
    (folder,) = export_best(copy, data, 1, tmp_path / "mine")
    finals = export.read_config(folder)["finals"]
    interval = mean_interval(nll[0])
    assert finals == {
        "split": "test", "nll": pytest.approx(nll[0].mean()), "interval": [interval.low, interval.high], "seeds": 3,
        "importance_samples": 50,
    }  # fmt: skip
    assert "3 fresh seeds" in (folder / "README.md").read_text(encoding="utf-8")


def test_pictures_open_and_the_card_names_the_value(small_study):
    for folder in small_study.model_folders():
        for name in ("samples.png", "reconstructions.png"):
            with Image.open(folder / name) as picture:
                picture.load()
                assert picture.format == "PNG"
                assert min(picture.size) >= 8
                low, high = picture.convert("L").getextrema()
                assert high > low
        config = json.loads((folder / "config.json").read_text())
        assert f"{config['metrics']['val_nelbo']:.4g}"[:4] in (folder / "README.md").read_text()


def test_export_of_the_best_writes_checked_folders_anywhere(small_study, data, tmp_path):
    folders = export_best(small_study, data, 1, tmp_path / "mine")
    assert [folder.name for folder in folders] == [small_study.model_folders()[0].name]
    assert folders[0].parent == tmp_path / "mine"
    original = export.load(small_study.model_folders()[0]).state_dict()
    again = export.load(folders[0]).state_dict()
    assert all(torch.equal(again[name], value) for name, value in original.items())


def test_more_than_was_kept_is_refused_with_what_was(small_study, data, tmp_path):
    assert len(ranked(small_study.rows())) > small_study.spec.export.top
    with pytest.raises(InputError, match=r"2.*3|3.*2"):
        export_best(small_study, data, 3, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_study_without_a_finished_trial_has_nothing_to_export(copy, data, tmp_path):
    shutil.rmtree(copy.path / "trials")
    with pytest.raises(InputError, match="nothing to export"):
        export_best(copy, data, 1, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def tampering(change: Callable[[Path], None]) -> Callable[..., None]:
    save = export.save

    def saved_and_changed(model: VAE, path: Path, **more: object) -> None:
        save(model, path, **more)
        change(path)

    return saved_and_changed


def scaled_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["outputs.weight"] = weights["outputs.weight"] * 1.01
    save_file(weights, folder / "model.safetensors")


def test_a_model_that_does_not_give_its_value_when_read_back_is_not_announced(copy, data, monkeypatch, tmp_path):
    before = {folder.name: (folder / "model.safetensors").read_bytes() for folder in copy.model_folders()}
    monkeypatch.setattr(search.publish.export, "save", tampering(scaled_weights))
    with pytest.raises(ExportMismatch, match="ledger"):
        export_best(copy, data, 1, tmp_path / "mine")
    with pytest.raises(ExportMismatch):
        publish_best(copy, data)
    after = {folder.name: (folder / "model.safetensors").read_bytes() for folder in copy.model_folders()}
    assert after == before  # those that were checked are still there


def test_a_model_of_other_weights_than_the_ledger_tells_is_found_out(copy, data, tmp_path):
    best, second = ranked(copy.rows())[:2]
    impostor, victim = copy.model_folders()[1], copy.model_folders()[0]
    for file in impostor.iterdir():
        shutil.copy(file, victim / file.name)
    with pytest.raises(ExportMismatch):
        export_models(copy, [best], data, tmp_path / "mine")
    assert best.val_nelbo != second.val_nelbo


def test_publishing_again_changes_no_weight(copy, data):
    before = {folder.name: (folder / "model.safetensors").read_bytes() for folder in copy.model_folders()}
    folders = publish_best(copy, data)
    assert {folder.name: (folder / "model.safetensors").read_bytes() for folder in folders} == before
    assert sorted(path.name for path in copy.path.iterdir()) == CONTENTS


def test_an_export_cut_off_between_its_two_renames_loses_no_model(copy, data, monkeypatch):
    """The weights of a finished study lie in models/ alone."""
    before = {folder.name: (folder / "model.safetensors").read_bytes() for folder in copy.model_folders()}
    rename, renames = Path.rename, []

    def cut_off(self: Path, target: Path) -> Path:
        if self.name.startswith("models"):
            if renames:
                raise KeyboardInterrupt
            renames.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            publish_best(copy, data)
    assert renames == ["models"]
    publish_best(copy, data)
    assert {folder.name: (folder / "model.safetensors").read_bytes() for folder in copy.model_folders()} == before
    assert sorted(path.name for path in copy.path.iterdir()) == CONTENTS


@pytest.mark.parametrize("leftover", ["models.tmp", "models.old"])
def test_leftovers_of_a_crash_are_cleared_away(copy, data, leftover):
    (copy.path / leftover / "1-trial-99").mkdir(parents=True)
    publish_best(copy, data)
    assert sorted(path.name for path in copy.path.iterdir()) == CONTENTS


def test_export_of_other_data_than_the_study_was_made_on_is_refused(copy, data, tmp_path):
    with pytest.raises(InputError, match="other data"):
        export_best(copy, replace(data, fingerprint="0" * 64), 1, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_onnx_that_cannot_be_written_is_refused_before_a_model_is_made(copy, data, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="programs = True"):
        export_best(copy, data, 1, tmp_path / "mine", onnx=True)
    monkeypatch.setattr(portable, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="ONNX needs no_such_package"):
        export_best(copy, data, 1, tmp_path / "mine", programs=True, onnx=True)
    assert not (tmp_path / "mine").exists()


def test_a_model_that_was_rejected_leaves_nothing_behind(copy, data, monkeypatch, tmp_path):
    monkeypatch.setattr(search.publish.export, "save", tampering(scaled_weights))
    with pytest.raises(ExportMismatch):
        export_best(copy, data, 1, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_the_command_writes_programs_and_tells_how_to_get_onnx(small_study, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(portable, "_ONNX_PACKAGES", ("no_such_package",))
    where = {"study": small_study.name, "storage": str(small_study.path.parent), "to": tmp_path / "mine"}
    with pytest.raises(InputError, match=r"no_such_package: pip install 'vaesearch\[onnx\]'"):
        cli.export(**where, onnx=True)
    assert not (tmp_path / "mine").exists()
    cli.export(**where)
    out, err = capsys.readouterr()
    folder = Path(out.strip())
    assert "no ONNX files: ONNX needs no_such_package" in err
    assert {file.name for file in folder.iterdir()} == {
        *(file.name for file in small_study.model_folders()[0].iterdir()), "encoder.pt2", "decoder.pt2",
    }  # fmt: skip
    assert set(export.read_config(folder)["files"]) == {"encoder.pt2", "decoder.pt2"}
    assert len(judged(folder)) == 1


def test_how_far_an_export_is_is_told_and_ctrl_c_leaves_whole_models_alone(copy, monkeypatch, tmp_path, in_process):
    save, told = export.save, []

    def interrupted_in_the_second(model: VAE, path: Path, **more: object) -> None:
        if told:
            os.kill(os.getpid(), signal.SIGINT)
        told.append(path.name)
        save(model, path, **(more | {"programs": False}))

    monkeypatch.setattr(search.publish.export, "save", interrupted_in_the_second)
    monkeypatch.setattr(search.interrupts, "_swallowed", [])  # or it would end the next study of this process
    where = ("--storage", copy.path.parent, "--to", tmp_path / "mine", "--no-onnx")
    code, out, err = in_process("export", copy.name, *where, "--top", 2)
    first, _ = copy.model_folders()
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("vaesearch: interrupted with 1 of 2 models done: models that were done are")
    assert [folder.name for folder in (tmp_path / "mine").iterdir()] == [first.name]
    assert len(judged(tmp_path / "mine" / first.name)) == 1


def test_what_the_command_refused_is_told(copy, monkeypatch, tmp_path, capsys):
    refused = portable.Portable(refused={"encoder.pt2": "differs from the model by 0.5, and 1e-06 is allowed"})
    monkeypatch.setattr(portable, "write", lambda *given, **more: refused)
    cli.export(study=copy.name, storage=str(copy.path.parent), to=tmp_path / "mine", onnx=False)
    assert "encoder.pt2: refused: differs from the model by 0.5" in capsys.readouterr().err
