"""An exported model in use: the data's own units on both sides, any array, and nothing of the search needed."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vae
from vae.config import SUPPORTS, DataConfig, InputError, LikelihoodName, ModelConfig
from vae.data import Dataset, load_data
from vae.export import read_config, save
from vae.model import VAE
from vae.objective import evaluate, fixed_noise

RNG = np.random.default_rng(4)
MEASURED = RNG.normal([1.7e9, -5, 0.02, 8], [1e4, 100, 1e-3, 0], (80, 4))
COUNTED = RNG.poisson(np.random.default_rng(5).lognormal(1, 1, (80, 1)) * [1, 3, 0.2, 10])
PIXELS = RNG.integers(0, 256, (90, 4, 3), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)

KINDS: dict[str, tuple[np.ndarray, LikelihoodName, dict[str, Any]]] = {
    "measured": (MEASURED, "gaussian", {}),
    "minmax": (MEASURED, "gaussian", {"scale": "minmax"}),
    "as they are": (MEASURED[:, 1:] / 100, "gaussian", {"scale": "none"}),
    "counts": (COUNTED, "negative_binomial", {}),
    "pixels": (PIXELS, "continuous_bernoulli", {}),
    "colours": (COLOURS, "gaussian", {}),
    "threshold": (PIXELS, "bernoulli", {"binarize": "threshold"}),
    "dynamic": (PIXELS, "bernoulli", {"binarize": "dynamic"}),
    "static": (MEASURED[:, :3], "bernoulli", {"scale": "minmax", "binarize": "static"}),
}


def exported(folder: Path, kind: str) -> tuple[vae.Model, Dataset, np.ndarray]:
    """The model, its data, and the rows of the validation split as they stand in the source."""
    table, likelihood, settings = KINDS[kind]
    file = folder / "data.npy"
    np.save(file, table)
    settings = {"support": SUPPORTS[likelihood], "binarize": "none", **settings}
    config = DataConfig(source=str(file), **settings)
    data = load_data(config)
    torch.manual_seed(0)
    body: dict[str, Any] = (
        {"body": "conv", "image_shape": data.image_shape, "channels": (3,)} if data.image_shape else {}
    )
    model = VAE(
        ModelConfig(input_dim=data.input_dim, latent_dim=2, hidden_dims=(8,), likelihood=likelihood, **body), data.train
    )
    units = {name: None if (v := getattr(data, name)) is None else v.tolist() for name in ("shift", "factor")}
    stored = {"config": asdict(config), "image_shape": data.image_shape, "columns": data.columns, **units}
    save(model, folder / "best", config={"data": stored}, data=data)
    # The same split of the rows' indices tells which rows of the source are validation.
    index = np.arange(len(table), dtype=np.float32)[:, None] + [0, 0.5]
    np.save(folder / "index.npy", index)
    picked = load_data(
        replace(config, source=str(folder / "index.npy"), support="real", scale="none", binarize="none")
    ).validation
    return vae.load(folder / "best"), data, table[picked[:, 0].astype(int)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[vae.Model, Dataset, np.ndarray]]:
    return {kind: exported(tmp_path_factory.mktemp(kind.replace(" ", "-")), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_nelbo_of_validation_rows_in_their_own_units_is_the_value_that_a_study_records(models, kind):
    model, data, own = models[kind]
    x = torch.from_numpy(data.validation)
    wanted = evaluate(model.vae, x, fixed_noise(len(x), model.latent_dim, data.config.seed)).nelbo
    bounds = model.nelbo(own, seed=data.config.seed)
    assert (bounds.shape, bounds.dtype) == ((len(own),), np.float64)
    assert bounds.mean() == pytest.approx(wanted, rel=1e-6)
    other = model.nelbo(own, seed=data.config.seed + 1)
    assert other.mean() != bounds.mean()
    np.testing.assert_array_equal(model.nelbo(own, seed=data.config.seed), bounds)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_and_samples_are_the_model_s_in_the_data_s_own_units(models, kind):
    model, data, own = models[kind]
    rows = data.units.scale(own.reshape(len(own), -1))
    rows = (rows > 0.5).astype(np.float32) if kind == "threshold" else rows
    means = model.vae.reconstruct(torch.from_numpy(rows)).numpy()
    wanted = means if kind == "threshold" else data.restore(means)
    spread = wanted.std(axis=0) + 1e-6
    np.testing.assert_allclose(model.reconstruct(own) / spread, wanted / spread, rtol=1e-6, atol=1e-4)
    mu, logvar = model.encode(own)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(mu), model.vae.encode(torch.from_numpy(rows))[0])
    assert mu.shape == logvar.shape == (len(own), 2)
    assert mu.dtype == np.float32
    if kind != "counts":  # whose reconstructions have their rows' totals
        np.testing.assert_allclose(model.decode(mu) / spread, wanted / spread, rtol=1e-6, atol=1e-3)

    means, draws = (model.sample(2000, seed=3, mean=mean) for mean in (True, False))
    assert means.shape == draws.shape == (2000, model.input_dim)
    noise = draws.std(axis=0) / np.sqrt(2000) + 1e-6 * np.abs(means).max(axis=0) + 1e-9
    assert (np.abs(draws.mean(axis=0) - means.mean(axis=0)) / noise).max() < 6
    np.testing.assert_array_equal(model.sample(5, seed=3), model.sample(5, seed=3))
    if kind == "counts":
        np.testing.assert_array_equal(draws, draws.round())
    if kind in ("dynamic", "threshold"):
        assert len(np.unique(draws)) == 2


@pytest.mark.parametrize("kind", ["measured", "colours", "counts"])
def test_any_number_of_rows_of_any_array_gives_the_same(models, kind):
    model, _, own = models[kind]
    flat = own.reshape(len(own), -1)
    many = np.tile(flat, (1 + 2500 // len(flat), 1))
    mu, _ = model.encode(many)
    means = model.reconstruct(many)
    np.testing.assert_allclose(mu[: len(own)], mu[-len(own) :], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.encode(own)[0], mu[: len(own)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.encode(own[:1])[0], mu[:1], rtol=1e-5, atol=1e-5)
    tensor = torch.from_numpy(many)
    for given in (tensor, tensor.double()):
        got = model.encode(given)[0]
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, torch.from_numpy(mu))
        torch.testing.assert_close(model.reconstruct(given), torch.from_numpy(means))
    assert not model.encode(tensor)[0].requires_grad
    assert len(model.nelbo(many)) == len(many)

    for empty in (own[:0], torch.from_numpy(own[:0])):
        assert model.encode(empty)[0].shape == (0, 2)
        assert model.reconstruct(empty).shape == (0, model.input_dim)
        assert model.nelbo(empty).shape == (0,)
    assert model.decode(np.zeros((0, 2))).shape == (0, model.input_dim)
    assert model.sample(0).shape == (0, model.input_dim)


def test_images_go_in_flat_or_as_images(models):
    model, _, own = models["pixels"]
    assert model.image_shape == (4, 3)
    for rows in (own, own[..., None], own.reshape(len(own), -1), own.astype(np.int64)):
        np.testing.assert_array_equal(model.encode(rows)[0], model.encode(own)[0])
    assert model.reconstruct(own).shape == (len(own), 12)
    assert 1 < model.reconstruct(own).mean() < 255
    assert own.flags.writeable
    read_only = own.copy()
    read_only.flags.writeable = False
    model.encode(read_only)


def test_grey_values_are_taken_as_probabilities_and_drawn_for_the_bound_alone(models):
    model, _, _ = models["dynamic"]
    grey = np.full((4000, 12), 127.5)
    assert np.ptp(model.encode(grey)[0], axis=0).max() < 1e-6
    mixed = model.nelbo(grey)
    ends = np.where(np.random.default_rng(0).random(grey.shape) < 0.5, 255.0, 0.0)
    apart = model.nelbo(ends)
    assert abs(mixed.mean() - apart.mean()) < 6 * np.hypot(mixed.std(), apart.std()) / np.sqrt(4000)


def test_the_bound_depends_on_seed_and_rows_alone_and_not_on_the_parts_they_are_worked_through_in(models, monkeypatch):
    model, _, own = models["static"]
    grey = (own.min(axis=0) + own.max(axis=0)) / 2 + np.zeros((50, 1))  # odd columns; a draw of each is a toss-up
    whole = model.nelbo(grey)
    monkeypatch.setattr(vae.loaded, "CHUNK_ROWS", 3)
    np.testing.assert_allclose(model.nelbo(grey), whole, rtol=1e-5)
    assert np.ptp(whole) > 0.1


def test_rows_and_weights_are_of_the_config_that_was_read_once(tmp_path, monkeypatch):
    exported(tmp_path, "measured")
    read = []

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return read_config(path)

    for module in (vae.loaded, vae.export):
        monkeypatch.setattr(module, "read_config", counted)
    vae.load(tmp_path / "best")
    assert len(read) == 1


def test_what_the_model_is_can_be_asked(models):
    model, _, _ = models["colours"]
    assert (model.input_dim, model.latent_dim, model.image_shape) == (48, 2, (4, 4, 3))
    assert model.device == torch.device("cpu")
    assert not model.vae.training
    assert model.config["model"]["latent_dim"] == 2
    assert model.columns is None
    assert "48 features" in repr(model)


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "rows", "error"),
    [
        ("measured", np.zeros(4), r"expected \(N, 4\)"),
        ("measured", np.zeros((2, 5)), r"rows of shape \(2, 5\): expected \(N, 4\)"),
        ("measured", np.zeros((0, 3)), r"expected \(N, 4\)"),
        ("measured", np.array(3.0), r"expected \(N, 4\)"),
        ("pixels", np.zeros((4, 3)), r"expected \(N, 12\) or \(N, 4, 3\)"),
        ("pixels", np.zeros((2, 3, 4)), r"or \(N, 4, 3\) or \(N, 4, 3, 1\)"),
        ("measured", np.array([[0, 1, np.nan, 2]]), "column 2.* is NaN"),
        ("measured", np.array([[0, 1, 2, 3], [0, 1, np.nan, 2]]), "row 1, column 2.* is NaN"),
        ("measured", np.array([[0, 1, 2, np.inf]]), "column 3.* is inf"),
        ("measured", np.array([["a"] * 4]), "expected real numbers"),
        ("measured", np.zeros((1, 4), complex), "expected real numbers"),
        ("measured", torch.zeros(1, 4, dtype=torch.complex64), "expected real numbers"),
        ("measured", np.array([[1e300] * 4]), "beyond float32"),
        ("counts", np.array([[1.5, 0, 0, 0]]), "counts are whole numbers"),
        ("counts", np.array([[0, 0, -1, 0]]), "column 2.*counts are whole numbers"),
        ("counts", np.array([[0, 0, 2**24 + 2, 0]]), "column 2.* is 16777218, beyond the 16777216 to which float32"),
        ("pixels", np.full((1, 12), 256), "outside the 0 to 255"),
        ("dynamic", np.full((1, 12), -1.0), "outside the 0 to 255"),
    ],
)
def test_rows_that_the_model_was_not_made_for_are_refused(models, kind, rows, error):
    model = models[kind][0]
    for use in (model.encode, model.reconstruct, model.nelbo):
        with pytest.raises(InputError, match=error):
            use(rows)


@pytest.mark.parametrize("z", [np.zeros(2), np.zeros((3, 4)), np.full((1, 2), np.nan), np.array([["a", "b"]])])
def test_latents_of_another_shape_are_refused(models, z):
    with pytest.raises(InputError, match="latents"):
        models["measured"][0].decode(z)


def test_rows_between_0_and_1_for_a_model_of_8_bits_are_pointed_out(models):
    with pytest.warns(UserWarning, match="went up to 255"):
        models["pixels"][0].encode(np.full((1, 12), 0.5))


# ---- alone

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna", "search", "cluster", "pyarrow", "sklearn"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import numpy as np, vae
model = vae.load(sys.argv[1])
rows = np.load(sys.argv[2])
mu, logvar = model.encode(rows)
np.savez(sys.argv[3], mu=mu, logvar=logvar, means=model.reconstruct(rows), decoded=model.decode(mu),
         samples=model.sample(7, seed=1), nelbo=model.nelbo(rows))
"""


def test_a_process_without_ray_optuna_and_search_finds_the_same_numbers(tmp_path):
    model, _, own = exported(tmp_path, "colours")
    np.save(tmp_path / "rows.npy", own)
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in ("best", "rows.npy", "out.npz"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mu, logvar = model.encode(own)
    here = {
        "mu": mu, "logvar": logvar, "means": model.reconstruct(own), "decoded": model.decode(mu),
        "samples": model.sample(7, seed=1), "nelbo": model.nelbo(own),
    }  # fmt: skip
    with np.load(tmp_path / "out.npz") as there:
        assert set(there) == set(here)
        for name, values in here.items():
            np.testing.assert_allclose(there[name], values, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_a_model_on_a_gpu_gives_what_it_gives_on_the_cpu(tmp_path):
    model, _, own = exported(tmp_path, "colours")
    there = vae.load(tmp_path / "best", "cuda")
    np.testing.assert_allclose(there.reconstruct(own), model.reconstruct(own), rtol=0, atol=1)  # of 255: TF32
    got = there.encode(torch.from_numpy(own).cuda())[0]
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu(), model.encode(torch.from_numpy(own))[0], rtol=0, atol=1e-2)
