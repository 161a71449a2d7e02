"""Export: what is written, that it reads back to the same value elsewhere, and what is refused."""

import csv
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vae.config import SUPPORTS, DataConfig, InputError, LikelihoodName, ModelConfig
from vae.data import Dataset, load_data
from vae.export import load, read_config, read_units, save
from vae.images import save_grid, save_reconstructions, shades
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
        shift=None,
        factor=None,
    )


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(MODEL, dataset().train)


@pytest.fixture
def folder(tmp_path, model):
    save(model, tmp_path / "best", config=CONFIG, data=dataset())
    return tmp_path / "best"


def test_save_writes_the_five_files(folder):
    names = {"model.safetensors", "config.json", "samples.png", "reconstructions.png", "README.md"}
    assert {file.name for file in folder.iterdir()} == names


def test_read_config_gives_back_what_was_saved(folder):
    config = read_config(folder)
    model = json.loads(json.dumps(dataclasses.asdict(MODEL)))  # tuples as lists
    assert model["hidden_dims"] == [8, 5]
    assert config == {"format": 2, "model": model, **CONFIG}


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
    baseline = model.likelihood.no_latent_nelbo(data.train, data.validation)
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
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["mu"].shape == (1, 3)
    assert names["samples"].shape == (16, 12)


def test_a_model_of_a_table_is_saved_too(tmp_path, model):
    save(model, tmp_path / "table", config={}, data=dataset(image_shape=None))
    assert load(tmp_path / "table").config == MODEL


# ---- the data's own units

MEASURED = np.random.default_rng(4).normal([1.7e9, -5, 0.02, 8], [1e4, 100, 1e-3, 0], (80, 4))
COUNTED = np.random.default_rng(4).poisson(np.random.default_rng(5).lognormal(1, 1, (80, 1)) * [1, 3, 0.2, 10])
NAMES = ("time", "kind", "a, b", "d")


def exported(
    folder: Path, table: np.ndarray, likelihood: LikelihoodName, *, columns: bool = True, body: str = "mlp", **settings
) -> tuple[VAE, Dataset]:
    """A model of the table (or images), exported to `folder`, with what config.json has from a study."""
    np.save(folder.with_suffix(".npy"), table)
    settings = {"support": SUPPORTS[likelihood], "binarize": "none", **settings}
    data = load_data(DataConfig(source=str(folder.with_suffix(".npy")), **settings))
    data = dataclasses.replace(data, columns=NAMES if columns and data.image_shape is None else None)
    torch.manual_seed(0)
    image_shape = None if body == "mlp" else data.image_shape
    architecture = ModelConfig(
        input_dim=data.input_dim, latent_dim=2, hidden_dims=(8,), likelihood=likelihood, body=body, channels=(4, 8),
        image_shape=image_shape, activation="mixture" if body == "conv" else "silu", decoder_activation="tanh",
    )  # fmt: skip
    model = VAE(architecture, data.train)
    units = {name: None if (v := getattr(data, name)) is None else v.tolist() for name in ("shift", "factor")}
    config = {"data": {"config": dataclasses.asdict(data.config), **units}}
    save(model, folder, config=config, data=data)
    return model, data


def read_csv(file: Path) -> tuple[list[str], list[list[str]]]:
    with file.open(newline="", encoding="utf-8") as lines:
        names, *rows = csv.reader(lines)
    return names, rows


@pytest.mark.parametrize("scale", ["auto", "minmax", "none"])
def test_units_read_back_are_those_of_the_data(tmp_path, scale):
    table = MEASURED - [1.7e9, 0, 0, 0]
    _, data = exported(tmp_path / "best", table, "gaussian", scale=scale)
    units = read_units(tmp_path / "best")
    rows = units.scale(table)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, data.units.scale(table))
    spread = table.std(axis=0) + 1e-12
    wanted = table
    if scale == "minmax":
        assert (rows.min(), rows.max()) == (0, 1)
        train = data.restore(data.train)
        wanted = table.clip(train.min(axis=0), train.max(axis=0))
    np.testing.assert_allclose(units.restore(rows) / spread, wanted / spread, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(units.restore(data.validation), data.restore(data.validation))


def test_a_table_has_samples_and_reconstructions_in_its_own_units_and_names(tmp_path):
    model, data = exported(tmp_path / "best", MEASURED, "gaussian")
    names, rows = read_csv(tmp_path / "best" / "samples.csv")
    assert tuple(names) == NAMES
    samples = np.array(rows, dtype=float)
    assert samples.shape == (64, 4)
    np.testing.assert_allclose(np.median(samples, axis=0)[:2], [1.7e9, -5], rtol=0, atol=2e4)
    assert samples[:, 0].std() > 1e3

    names, rows = read_csv(tmp_path / "best" / "reconstructions.csv")
    assert tuple(names) == ("example", "kind_", *NAMES)
    assert [row[:2] for row in rows[:3]] == [["0", "original"], ["0", "reconstruction"], ["1", "original"]]
    values = np.array([row[2:] for row in rows], dtype=float)
    assert len(values) == 2 * len(data.validation)
    nearest = [np.abs((MEASURED - row) / data.factor).sum(axis=1).min() for row in values[::2]]
    assert max(nearest) < 1e-5
    x = torch.from_numpy(data.validation)
    expected = data.restore(model.reconstruct(x).numpy())
    np.testing.assert_allclose(values[1::2] / data.factor, expected / data.factor, rtol=0, atol=1e-5)


def test_numbers_in_tables_have_no_more_digits_than_float32(tmp_path):
    table = np.random.default_rng(0).integers(0, 100, (80, 4)) / 10 + [0, 0, 5, 1000]
    exported(tmp_path / "best", table, "gaussian")
    _, rows = read_csv(tmp_path / "best" / "reconstructions.csv")
    known = {repr(value).removesuffix(".0") for value in table.ravel().tolist()}
    for row in rows[::2]:
        assert set(row[2:]) <= known


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_are_written_as_counts(tmp_path, likelihood):
    model, data = exported(tmp_path / "best", COUNTED, likelihood, columns=False)
    names, rows = read_csv(tmp_path / "best" / "samples.csv")
    assert names == ["x0", "x1", "x2", "x3"]
    assert all(value.isdigit() for row in rows for value in row)
    _, rows = read_csv(tmp_path / "best" / "reconstructions.csv")
    assert all(value.isdigit() for row in rows[::2] for value in row[2:])
    loaded, x = load(tmp_path / "best"), torch.from_numpy(data.validation)
    assert loaded.likelihood.mean_total.item() == pytest.approx(data.train.sum(axis=1).mean())
    torch.testing.assert_close(loaded.reconstruct(x), model.reconstruct(x), rtol=0, atol=0)


def test_images_have_no_tables_and_tables_of_zeros_and_ones_do(tmp_path, folder, model):
    assert not list(folder.glob("*.csv"))
    save(model, tmp_path / "table", config={}, data=dataset(image_shape=None))
    names, rows = read_csv(tmp_path / "table" / "samples.csv")
    assert names == [f"x{i}" for i in range(12)]
    assert {value for row in rows for value in row} == {"0", "1"}


@pytest.mark.parametrize(
    ("likelihood", "table", "settings"),
    [
        ("gaussian", MEASURED, {}),
        ("gaussian", MEASURED, {"scale": "minmax"}),
        ("continuous_bernoulli", MEASURED, {"scale": "minmax"}),
        ("bernoulli", MEASURED, {"scale": "minmax", "binarize": "dynamic"}),
        ("bernoulli", MEASURED, {"scale": "minmax", "binarize": "threshold"}),
        ("poisson", COUNTED, {}),
        ("negative_binomial", COUNTED, {}),
        ("gaussian", (COUNTED * 7 % 256).astype(np.uint8).reshape(80, 2, 2), {}),
    ],
)
def test_the_card_s_lines_feed_a_model_what_it_was_trained_on(tmp_path, monkeypatch, likelihood, table, settings):
    model, data = exported(tmp_path / "best", table, likelihood, **settings)
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert "{" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert code.count("np.zeros((1, 4))") == 1
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    names: dict[str, Any] = {}
    exec(code.replace("np.zeros((1, 4))", f"np.array({table.reshape(80, 4).tolist()})"), names)

    x, binarize = names["x"], data.config.binarize
    if binarize == "dynamic":
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert np.abs(x.numpy().mean(axis=0) - data.train.mean(axis=0)).max() < 0.3
    else:  # the same rows, in another order
        splits = np.concatenate((data.train, data.validation, data.test))
        np.testing.assert_array_equal(np.sort(x.numpy(), axis=0), np.sort(splits, axis=0))
    means = model.reconstruct(x).numpy()
    np.testing.assert_array_equal(names["means"], means if binarize == "threshold" else data.restore(means))
    assert names["mu"].shape == (80, 2)
    assert names["samples"].shape == (16, 4)


def test_the_card_tells_body_activations_likelihood_and_what_mixtures_have_learned(tmp_path):
    images = np.random.default_rng(0).random((40, 6, 8))
    exported(tmp_path / "best", images, "continuous_bernoulli", body="conv")
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    for text in (
        "Activation `mixture` and `tanh`, normalisation none",
        "convolutions of 4 (stride 2), 8 (stride 2) channels",
        "hidden layers of 8 units",
        "continuous_bernoulli likelihood",
        "of a density",
        "| encoder 0 | identity 0.333, relu 0.333, tanh 0.333 |",
        "| encoder 2 |",
    ):
        assert text in card
    assert "decoder 0" not in card
    exported(tmp_path / "counts", COUNTED, "poisson")
    card = (tmp_path / "counts" / "README.md").read_text(encoding="utf-8")
    assert "size factor" in card
    assert "What the activations have learned" not in card


def test_the_baseline_of_the_study_stands_on_the_card(tmp_path, model):
    save(model, tmp_path / "best", config={"metrics": {"no_latent_nelbo": 4.5}}, data=dataset())
    assert "| no-latent baseline (validation) | 4.5 |" in (tmp_path / "best" / "README.md").read_text()


# ---- what is refused


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
        (lambda config: config | {"format": 1}, "has format 1"),
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


# ---- pictures


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("image_shape", [None, (2, 2)])
def test_shades_of_any_data_fill_the_range_whatever_the_outliers(image_shape, logarithmic):
    rng = np.random.default_rng(0)
    train = rng.poisson([1, 20, 300, 5000], (500, 4)).astype(np.float32)
    train[0, 1] = 1e6
    drawn = shades(train, train, image_shape, logarithmic)
    assert np.isfinite(drawn).all()
    inside = (drawn >= 0) & (drawn <= 1)
    assert inside.mean() > 0.95
    columns = drawn.clip(0, 1).std(axis=0)
    assert (columns > 0.1).all() if image_shape is None else drawn.clip(0, 1).std() > 0.1


def test_shades_of_a_constant_and_of_a_rare_column_are_drawn():
    train = np.zeros((1000, 3), dtype=np.float32)
    train[:, 0], train[7, 1], train[:, 2] = 5, 9, np.linspace(-3, 3, 1000)
    drawn = shades(train, train, None)
    assert (drawn[:, 0] == 0).all()
    assert (drawn[7, 1], drawn[8, 1]) == (1, 0)


def test_rows_in_the_unit_interval_are_drawn_as_they_are():
    rows = np.random.default_rng(0).random((5, 4), dtype=np.float32) / 2
    assert shades(rows, rows, None) is rows


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
