"""Exported models: read back elsewhere they give the value in the ledger; what doesn't is not announced."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from PIL import Image

import search.publish
from search.publish import TOLERANCE_NATS, ExportMismatch, export_best, export_models, publish_best
from search.results import Study, open_study, ranked
from vae import export
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
        model = vae.load(folder)
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


def test_a_model_that_was_rejected_leaves_nothing_behind(copy, data, monkeypatch, tmp_path):
    monkeypatch.setattr(search.publish.export, "save", tampering(scaled_weights))
    with pytest.raises(ExportMismatch):
        export_best(copy, data, 1, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
