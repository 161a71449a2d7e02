"""Export: what is written, that it reads back to the same value elsewhere, and what is refused."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vae.config import DataConfig, InputError, ModelConfig
from vae.data import Dataset
from vae.export import load, read_config, save
from vae.images import save_grid, save_reconstructions
from vae.model import VAE
from vae.objective import evaluate, fixed_noise

MODEL = ModelConfig(input_dim=12, latent_dim=3, hidden_dims=(8, 5), activation="prelu", dropout=0.3)
CONFIG = {
    "data": {"source": "things.npy"},
    "params": {"activation": "prelu", "learning_rate": 0.00123456789, "latent_dim": 3},
    "metrics": {"val_nelbo": 7.25, "active_units": 2},
    "versions": {"torch": "1.2.3"},
    "study": "things",
    "trial": 17,
}
EVALUATE_ELSEWHERE = """
import sys, numpy as np, torch, vae
model = vae.load(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
print(vae.evaluate(model, x, vae.fixed_noise(len(x), 3, 0)).nelbo.hex())
"""


def dataset(image_shape: tuple[int, ...] | None = (3, 4)) -> Dataset:
    rows = (np.random.default_rng(0).random((60, 12)) < 0.4).astype(np.float32)
    return Dataset(
        config=DataConfig(source="things.npy", binarize="static"),
        train=rows[:30],
        validation=rows[30:45],
        test=rows[45:],
        fingerprint="abc123",
        image_shape=image_shape,
        columns=None,
        scale_min=None,
        scale_max=None,
    )


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(MODEL, dataset().train_mean)


@pytest.fixture
def folder(tmp_path, model):
    save(model, tmp_path / "best", config=CONFIG, data=dataset())
    return tmp_path / "best"


def test_save_writes_the_five_files(folder):
    names = {"model.safetensors", "config.json", "samples.png", "reconstructions.png", "README.md"}
    assert {file.name for file in folder.iterdir()} == names


def test_read_config_gives_back_what_was_saved(folder):
    config = read_config(folder)
    assert config == {"format": 1, "model": dataclasses.asdict(MODEL) | {"hidden_dims": [8, 5]}, **CONFIG}


def test_a_loaded_model_has_the_same_weights_and_is_in_evaluation_mode(folder, model):
    before = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == MODEL
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_another_process_finds_the_same_validation_value_to_the_bit(folder, model, tmp_path):
    x = dataset().validation
    np.save(tmp_path / "x.npy", x)
    here = evaluate(model, torch.from_numpy(x), fixed_noise(len(x), 3, 0)).nelbo
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_ELSEWHERE, str(folder), str(tmp_path / "x.npy")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.stdout.strip() == here.hex()


def test_the_card_names_data_parameters_results_baseline_and_use(folder, model):
    card = (folder / "README.md").read_text(encoding="utf-8")
    data = dataset()
    baseline = model.likelihood.no_latent_nelbo(data.train_mean, data.validation)
    for text in (
        "trial 17 of the study `things`",
        "source: `things.npy`",
        "fingerprint: `abc123`",
        "| learning_rate | 0.00123457 |",
        "| val_nelbo | 7.25 |",
        f"| no-latent baseline (validation) | {baseline:.6g} |",
        'vae.load("best")',
        "- torch 1.2.3",
        "## Licence",
    ):
        assert text in card
    assert "{" not in card


def test_the_lines_of_the_card_that_show_the_use_run(folder, monkeypatch):
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["mu"].shape == (1, 3)
    assert names["samples"].shape == (16, 12)


def test_a_model_of_a_table_is_saved_too(tmp_path, model):
    save(model, tmp_path / "table", config={}, data=dataset(image_shape=None))
    assert load(tmp_path / "table").config == MODEL


@pytest.mark.parametrize(
    ("name", "error"), [("config.json", "is no exported model"), ("model.safetensors", "is missing")]
)
def test_a_missing_file_is_refused(folder, name, error):
    (folder / name).unlink()
    with pytest.raises(InputError, match=error):
        load(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no exported model"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="is damaged"):
        load(folder)


def test_a_pickle_in_the_place_of_the_weights_is_refused_and_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="is damaged"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights | {"mu.weight": torch.zeros(4, 5)},
        lambda weights: weights | {"extra": torch.zeros(1)},
        lambda weights: {name: value for name, value in weights.items() if name != "mu.bias"},
    ],
    ids=["wrong shape", "unknown key", "missing key"],
)
def test_weights_of_another_model_are_refused(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match="do not belong together"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda config: config | {"format": 2}, "has format 2"),
        (lambda config: {name: value for name, value in config.items() if name != "format"}, "has format None"),
        (lambda config: [config], "has format None"),
        (lambda config: config | {"model": None}, "does not say what the model is"),
        (lambda config: config | {"model": config["model"] | {"depth": 3}}, "do not belong together"),
        (lambda config: config | {"model": config["model"] | {"activation": "Flatten"}}, "unknown activation"),
        (lambda config: config | {"model": config["model"] | {"input_dim": "12"}}, "do not belong together"),
        (lambda config: config | {"model": config["model"] | {"input_dim": 12.5}}, "do not belong together"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, change, error):
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=error):
        load(folder)


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        load(folder)


def test_a_value_that_json_lacks_is_refused_when_saving(model, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(model, tmp_path / "bad", config={"metrics": {"val_nelbo": float("nan")}}, data=dataset())


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_grid_shows_small_images_enlarged_and_in_order(tmp_path):
    rows = np.zeros((5, 4), dtype=np.float32)
    rows[3] = 1  # the first of the second line
    save_grid(rows, (2, 2), tmp_path / "grid.png", columns=3)
    image = pixels(tmp_path / "grid.png")
    assert image.shape[0] >= 2 * 64
    assert image.shape[1] >= 3 * 64
    white = np.argwhere((image == 255).all(axis=-1))
    assert len(white) == 64 * 64
    assert white[:, 0].min() > image.shape[0] // 2
    assert white[:, 1].max() < image.shape[1] // 3


@pytest.mark.parametrize("image_shape", [(6, 8), (6, 8, 1), (4, 4, 3), (6, 4, 2), None])
def test_every_kind_of_row_can_be_drawn(tmp_path, image_shape):
    rows = np.random.default_rng(0).random((7, 48), dtype=np.float32)
    save_grid(rows, image_shape, tmp_path / "grid.png")
    save_reconstructions(rows, rows, image_shape, tmp_path / "pairs.png")
    assert pixels(tmp_path / "pairs.png").shape[0] > pixels(tmp_path / "grid.png").shape[0]


def test_colours_keep_their_channels(tmp_path):
    save_grid(np.array([[1.0, 0.0, 0.0]], dtype=np.float32), (1, 1, 3), tmp_path / "red.png")
    assert pixels(tmp_path / "red.png")[10, 10].tolist() == [255, 0, 0]


def test_reconstructions_stand_below_their_originals(tmp_path):
    originals, reconstructions = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    save_reconstructions(originals, reconstructions, (2, 2), tmp_path / "pairs.png", columns=2)
    image = pixels(tmp_path / "pairs.png")
    height = image.shape[0] // 4
    lines = [image[index * height + height // 2, image.shape[1] // 4, 0] for index in range(4)]
    assert lines == [255, 0, 255, 0]
