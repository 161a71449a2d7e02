"""Export: what is written, that it reads back to the same value elsewhere, and what is refused."""

import csv
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vae.card import card as write_card
from vae.config import SUPPORTS, DataConfig, InputError, LikelihoodName, ModelConfig
from vae.data import Dataset, load_data
from vae.export import load, read_config, read_units, save
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
model = vae.load(sys.argv[1]).vae
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


def test_weights_that_cannot_be_written_are_an_error_of_the_system_that_names_the_file(tmp_path, model):
    (tmp_path / "best" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match=r"best/model\.safetensors cannot be written: .*directory"):
        save(model, tmp_path / "best", config=CONFIG, data=dataset())


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


def test_the_lines_run_whatever_the_folder_is_called(tmp_path, model, monkeypatch):
    name = 'it\'s "my" model\\ \x07'
    save(model, tmp_path / name, config=CONFIG, data=dataset())
    code = (tmp_path / name / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_header_of_the_weights_is_what_other_readers_expect(folder, model):
    """By hand, as https://github.com/huggingface/safetensors describes the format."""
    content = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"}
    weights = model.state_dict()
    assert set(header) == set(weights)
    ends = [0]
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = told["data_offsets"]
        assert (start, told["dtype"]) == (ends[-1], "F32")
        ends.append(end)
        found = np.frombuffer(values[start:end], "<f4").reshape(told["shape"])
        np.testing.assert_array_equal(found, weights[name].numpy())
    assert ends[-1] == len(values)


def test_a_model_of_a_table_is_saved_too(tmp_path, model):
    save(model, tmp_path / "table", config={}, data=dataset(image_shape=None))
    assert load(tmp_path / "table").config == MODEL


def test_the_card_opens_with_what_model_hubs_read(folder, tmp_path, model):
    import yaml

    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("vaesearch", "unknown")
    assert {"vae", "safetensors"} <= set(front["tags"])
    assert "onnx" not in front["tags"]
    (entry,) = front["model-index"]
    assert entry["name"] == "things, trial 17"
    (result,) = entry["results"]
    assert result["dataset"]["name"] == "things.npy"
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("nelbo", 7.25)]
    assert front["metrics"] == ["nelbo"]
    # What is required of a result: hub-docs/modelcard.md. Of the licences it knows, one is called unknown.
    assert entry.keys() == {"name", "results"}
    assert isinstance(result["task"]["type"], str)
    assert all(isinstance(result["dataset"][key], str) for key in ("type", "name", "split"))
    assert all(isinstance(tag, str) for tag in front["tags"])
    assert front["pipeline_tag"] == "unconditional-image-generation"

    odd = dataclasses.replace(dataset(), config=DataConfig(source='a: "b" # ä\n- c.npy', binarize="static"))
    save(model, tmp_path / "odd", config=CONFIG, data=odd)
    front = yaml.safe_load((tmp_path / "odd" / "README.md").read_text(encoding="utf-8").split("\n---\n")[0])
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == 'a: "b" # ä\n- c.npy'
    save(model, tmp_path / "bare", config={}, data=dataset())
    front = yaml.safe_load((tmp_path / "bare" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert "metrics" not in front


def test_the_hub_s_own_reader_finds_the_card_s_values(folder):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    card = hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("vaesearch", "unknown")
    assert card.data.model_name == "things, trial 17"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("nelbo", 7.25)
    assert (result.task_type, result.dataset_split) == ("density-estimation", "validation")
    assert (result.dataset_name, result.dataset_type) == ("things.npy", "things.npy")
    assert card.text.startswith("# Variational autoencoder")


@pytest.mark.parametrize(
    ("source", "name", "slug"),
    [
        ("/home/somebody/secret project/faces \U0001f600.npz", "faces \U0001f600.npz", "faces-.npz"),
        ("../../somewhere/\U0001f600", "\U0001f600", "data"),
        ("line\x85and\u2028\x7fend\u200d.csv", "line\x85and\u2028\x7fend\u200d.csv", "line-and-end-.csv"),
        ("mnist", "mnist", "mnist"),
    ],
)
def test_the_card_tells_the_name_of_the_data_alone_whatever_its_letters(tmp_path, model, source, name, slug):
    import yaml

    data = dataclasses.replace(dataset(), config=DataConfig(source=source, binarize="static"))
    save(model, tmp_path / "best", config=CONFIG, data=data)
    text = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("\n---\n")[0])
    found = front["model-index"][0]["results"][0]["dataset"]
    assert (found["name"], found["type"]) == (name, slug)
    assert "somebody" not in text
    assert "somewhere" not in text


def test_the_card_tells_how_sure_the_values_are(tmp_path, model):
    finals = {"split": "test", "nll": 83.25, "interval": [82.5, 84.0], "seeds": 5, "importance_samples": 5000}
    metrics = {"val_nelbo": 7.25, "val_nelbo_se": 0.125}
    save(model, tmp_path / "best", config={"metrics": metrics, "finals": finals}, data=dataset())
    text = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert "| val_nelbo | 7.25 ± 0.125 |" in text
    assert "5 fresh seeds" in text
    assert "**83.25** (5000 samples a row; 95 % interval over seeds 82.5 to 84)" in " ".join(text.split())


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
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    assert code.count("np.zeros((1, 4))") == 1
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    names: dict[str, Any] = {}
    exec(code.replace("np.zeros((1, 4))", f"np.array({table.reshape(80, 4).tolist()})"), names)

    splits = np.concatenate((data.train, data.validation, data.test))  # the same rows, in another order
    if data.config.binarize == "dynamic":
        splits = data.units.scale(table.reshape(80, 4))
    x = torch.from_numpy(splits)
    means = model.reconstruct(x).numpy()
    means = means if data.config.binarize == "threshold" else data.restore(means)
    scale = means.std(axis=0) + 1e-9
    for got, wanted in ((names["means"], means), (names["mu"], model.encode(x)[0].detach().numpy())):
        spread = scale if got is names["means"] else 1
        np.testing.assert_allclose(
            np.sort(got, axis=0) / spread, np.sort(wanted, axis=0) / spread, rtol=1e-5, atol=1e-4
        )
    assert names["samples"].shape == (16, 4)

    programs = {"files": {"encoder.pt2": {"tolerance": 1e-6}, "encoder.onnx": {"tolerance": 1e-5}}}
    text = write_card(model, "best", read_config(tmp_path / "best") | programs, data)
    assert "`encoder.pt2` is within 1e-06, `encoder.onnx` is within 1e-05 of what it gives." in text
    assert "- onnx\n" in text
    code = text.split("```python\n")[2].split("```")[0]
    exec(code.replace("np.zeros((1, 4))", f"np.array({table.reshape(80, 4).tolist()})"), names)
    x = data.units.scale(table.reshape(80, 4))
    np.testing.assert_array_equal(names["x"], x > 0.5 if data.config.binarize == "threshold" else x)
    assert names["x"].dtype == np.float32


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


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize(
    "claim",
    [
        {"latent_dim": 10**9},
        {"latent_dim": 10**30},
        {"hidden_dims": [10**9, 5]},
        {"hidden_dims": [8, 5] * 10**6},
        {"input_dim": 10**9},
        {"activation": "apl", "apl_hinges": 10**9},
        {"activation": "avg_pool", "avg_pool_window": 10**9 + 1},
        {"body": "conv", "image_shape": [10**5, 10**5], "input_dim": 10**10},
        {"body": "conv", "image_shape": [3, 4], "channels": [10**9]},
    ],
    ids=lambda claim: "-".join(claim),
)
def test_sizes_that_are_not_those_of_the_weights_are_refused(folder, claim):
    rewrite(folder, lambda config: config | {"model": config["model"] | claim})
    assert "do not belong together" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shift": [0.0]},
        {"shift": [0.0] * 12},
        {"shift": ["x"] * 12, "factor": [1.0] * 12},
        {"shift": [float("inf")] * 12, "factor": [1.0] * 12},
        {"columns": ["a"]},
        {"image_shape": [3, 5]},
        {"config": [1]},
        {"config": {"source": 5}},
        {"config": {"seed": "0"}},
        {"config": {"columns": [1, 2]}},
        {"config": {"image_shape": ["3", "4"]}},
        {"config": {"validation_fraction": 2}},
        {"config": {"colour": "red"}},
        {"fingerprint": "\x1b[2J"},
        "x",
    ],
)
def test_what_is_said_of_the_data_and_does_not_fit_is_refused(folder, change):
    rewrite(folder, lambda config: config | {"data": change})
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shift": [10**400] * 12, "factor": [1] * 12},
        {"shift": [0] * 12, "factor": [float("nan")] * 12},
        {"image_shape": [12]},
        {"image_shape": [3, 2, 2, 1]},
        {"image_shape": [-3, -4]},
        {"image_shape": [10**4000] * 2000},  # whose product would take minutes
    ],
)
def test_numbers_in_a_config_that_no_array_holds_are_refused(folder, change):
    rewrite(folder, lambda config: config | {"data": change})
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize("section", ["data", "train", "params", "metrics", "finals", "versions", "refit"])
def test_a_section_that_is_none_is_refused(folder, section):
    rewrite(folder, lambda config: config | {section: ["x"]})
    assert f"{section} is not what it should be" in refusal(folder)


def test_loading_draws_no_first_weights(tmp_path, monkeypatch):
    """Which would be overwritten at once: those of some activations take hours for layers that a file has room for."""
    model = VAE(dataclasses.replace(MODEL, activation="avg_pool"))
    save(model, tmp_path / "best", config={}, data=dataset())
    monkeypatch.setattr("vae.layers.variance_gain", None)
    for name, value in load(tmp_path / "best").state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07\x1b[2J", "x" * 10**6, "one\ntwo", "\u202e\u2028"])
def test_an_error_repeats_a_line_at_the_most_of_a_folder_and_nothing_that_steers_a_terminal(folder, name):
    weights = load_file(folder / "model.safetensors")
    told = []
    save_file({name: torch.zeros(3)} | weights, folder / "model.safetensors")
    told.append(refusal(folder))
    for change in ({"format": name}, {"model": {name: 1}}, {"data": {"config": {"source": name, "seed": name}}}):
        rewrite(folder, lambda config, change=change: config | {"format": 2} | change)
        told.append(refusal(folder))
    (folder / "config.json").unlink()
    if len(name) < 100:
        (folder / "config.json").symlink_to(f"/nowhere/{name}")
        told.append(refusal(folder))
    for line in told:
        assert line.isprintable()
        assert len(line) < 600 + 2 * len(str(folder))


def test_the_size_of_images_is_held_against_the_features_of_any_body(folder):
    rewrite(folder, lambda config: config | {"model": config["model"] | {"image_shape": [3, 5]}})
    assert "image_shape [3, 5] does not make 12 features" in refusal(folder)


def test_hundreds_of_layers_of_nothing_are_refused_before_any_is_made(folder, monkeypatch):
    """Weights without values cost a line of the header each, and a layer to hold them thousands of bytes."""
    weights = load_file(folder / "model.safetensors") | {f"empty.{i}": torch.zeros(0) for i in range(1000)}
    save_file(weights, folder / "model.safetensors")
    rewrite(folder, lambda config: config | {"model": config["model"] | {"hidden_dims": [8] * 1000}})
    monkeypatch.setattr("vae.export.VAE", None)
    assert "hidden_dims has more than 256 values" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda value: value.double(), "mu.bias is of torch.float64, and torch.float32 is wanted"),
        (lambda value: value.int(), "mu.bias is of torch.int32, and torch.float32 is wanted"),
        (lambda value: value + torch.nan, "mu.bias is not finite"),
    ],
    ids=["wider", "whole", "NaN"],
)
def test_weights_of_another_type_or_that_are_not_finite_are_refused(folder, change, error):
    weights = load_file(folder / "model.safetensors")
    weights["mu.bias"] = change(weights["mu.bias"])
    save_file(weights, folder / "model.safetensors")
    assert error in refusal(folder)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a\\b", ""])
@pytest.mark.parametrize("key", ["files", "refused"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(folder, key, name):
    rewrite(folder, lambda config: config | {key: {name: {}}})
    assert "must name files of the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_but_within_a_hub_s_cache(folder, tmp_path, name):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in list(folder.iterdir()):
        (blobs / f"hash-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert load(snapshot).config == MODEL
    (snapshot / "models" / "best").mkdir(parents=True)  # in a subfolder of the repository
    for file in list(folder.iterdir()):
        (snapshot / "models" / "best" / file.name).symlink_to(f"../../../../blobs/hash-{file.name}")
    assert load(snapshot / "models" / "best").config == MODEL
    (folder / name).unlink()
    (folder / name).symlink_to(blobs / f"hash-{name}")
    assert "outside of the folder" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert name in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "9" * 10**5, "\xff", '{"format": 2, "model": NaN}'])
def test_json_that_would_break_a_reader_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is missing" in refusal(folder)


def test_a_device_that_is_not_there_is_refused(folder):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match="no device"):
            load(folder, device)


REFUSE_IN_LITTLE_MEMORY = """
import json, os, resource, sys
from pathlib import Path
from vae.config import InputError
from vae.export import load

folder = Path(sys.argv[1])
load(folder)  # what this needs is there
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
weights, config = folder / "model.safetensors", folder / "config.json"
whole, text = weights.read_bytes(), config.read_text()

def refused():
    try:
        load(folder)
    except InputError as error:
        print(error)
    else:
        raise SystemExit("was loaded")

for claim in (10 * 2**30, 90 * 2**20):
    with weights.open("wb") as stream:
        stream.write(claim.to_bytes(8, "little"))
        stream.truncate(11 * 2**30)
    refused()
header = json.dumps({"mu.weight": {"dtype": "F32", "shape": [10**9, 10], "data_offsets": [0, 4 * 10**10]}}).encode()
weights.write_bytes(len(header).to_bytes(8, "little") + header)
refused()
header = json.dumps({"mu.weight": {"dtype": "F32", "shape": [0, 10**9], "data_offsets": [0, 0]}}).encode()
weights.write_bytes(len(header).to_bytes(8, "little") + header)
stored = json.loads(text)
stored["model"] |= {"hidden_dims": [10**7, 10**7], "activation": "avg_pool"}
config.write_text(json.dumps(stored))
refused()
weights.write_bytes(whole)
for claim in ({"latent_dim": 10**9}, {"hidden_dims": [10**8, 5]}, {"apl_hinges": 10**9, "activation": "apl"}):
    stored = json.loads(text)
    stored["model"] |= claim
    config.write_text(json.dumps(stored))
    refused()
with config.open("wb") as stream:
    stream.truncate(2**30)
refused()
config.write_bytes(b'{"format": 2, "model": {}, "x": [' + b"[]," * 10**7 + b"0]}")
refused()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_absurd_claims_are_refused_in_little_memory(folder):
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_IN_LITTLE_MEMORY, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert [("damaged" in line, "do not belong" in line, "more than" in line) for line in lines] == [
        *[(True, False, False)] * 3, *[(False, True, False)] * 4, *[(False, False, True)] * 2,
    ]  # fmt: skip


def test_what_fails_on_the_device_is_not_the_file_s_fault(folder, monkeypatch):
    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(VAE, "to", full)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        load(folder)
    assert not isinstance(caught.value, InputError)


# ---- large ones


def test_a_model_of_800_000_features_reads_back(tmp_path, monkeypatch):
    """shift and factor are a number a feature, and config.json has tens of megabytes."""
    monkeypatch.setattr("vae.export._NUM_SAMPLES", 1)
    rows = np.random.default_rng(0).random((3, 800_000), dtype=np.float32)
    scale = np.random.default_rng(1).random(800_000)
    data = dataclasses.replace(
        dataset((800, 1000)),
        config=DataConfig(source="large.npy", support="real", binarize="none"),
        train=rows[:1], validation=rows[1:2], test=rows[2:], shift=scale, factor=scale,
    )  # fmt: skip
    model = VAE(ModelConfig(input_dim=800_000, latent_dim=1, hidden_dims=(1,), likelihood="gaussian"))
    units = {"image_shape": [800, 1000], "shift": scale.tolist(), "factor": scale.tolist()}
    save(model, tmp_path / "large", config={"data": units}, data=data)
    assert (tmp_path / "large" / "config.json").stat().st_size > 2**24
    assert load(tmp_path / "large").config == model.config
    np.testing.assert_array_equal(read_units(tmp_path / "large").factor, scale)


def num_pixels(path: Path) -> int:
    with Image.open(path) as picture:
        return math.prod(picture.size)


@pytest.mark.parametrize(("image_shape", "tile_pixels"), [((3, 4), 50 * 66), (None, 14 * 650)])
@pytest.mark.parametrize("fitting", [0, 3, 20])
def test_the_pictures_of_an_export_show_as_many_examples_as_fit(
    tmp_path, model, monkeypatch, image_shape, tile_pixels, fitting
):
    save(model, tmp_path / "all", config={}, data=dataset(image_shape))
    monkeypatch.setattr("vae.images.MAX_PIXELS", fitting * tile_pixels)
    save(model, tmp_path / "few", config={}, data=dataset(image_shape))
    for name in ("samples.png", "reconstructions.png"):
        few, every = (num_pixels(tmp_path / folder / name) for folder in ("few", "all"))
        assert tile_pixels <= few < every
        assert few < 1.2 * max(fitting, 2) * tile_pixels  # with the gaps
        assert few > 0.5 * fitting * tile_pixels


def test_programs_of_an_earlier_export_do_not_stay_beside_new_weights(folder, model):
    (folder / "encoder.pt2").write_bytes(b"old")
    (folder / "decoder.onnx").write_bytes(b"old")
    save(model, folder, config=CONFIG, data=dataset())
    assert not list(folder.glob("*.pt2")) + list(folder.glob("*.onnx"))
