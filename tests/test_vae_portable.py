"""Programs for other runtimes: the model's numbers where it is not installed, and what differs is refused by name."""

import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import nn

import vae
from vae import portable
from vae.config import (
    SUPPORTS,
    ActivationName,
    Attention,
    DataConfig,
    InputError,
    LikelihoodName,
    ModelConfig,
    Normalization,
    TrainConfig,
)
from vae.data import Dataset, load_data
from vae.export import read_config, save
from vae.model import VAE
from vae.readers import read_source
from vae.training import Trainer

NO_ONNX = portable.missing_onnx_packages()
MLP = ModelConfig(input_dim=12, latent_dim=3, hidden_dims=(8, 6), activation="apl", normalization="layer")
CONV = ModelConfig(
    input_dim=48, image_shape=(4, 4, 3), latent_dim=3, hidden_dims=(8,), body="conv", channels=(4, 8),
    activation="softplus", attention="self_attention", normalization="batch", likelihood="gaussian",
)  # fmt: skip
CONV_MNIST = ModelConfig(
    input_dim=784, image_shape=(28, 28), latent_dim=5, hidden_dims=(16,), body="conv", channels=(4, 8),
    activation="leaky_relu", attention="squeeze_excitation",
)  # fmt: skip

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
SEARCH = ("ray", "optuna", "search", "cluster")

# Runs blocks of cards, in the folder that a model's own is in, where none of the named packages can be imported.
BLOCKS_ALONE = """
import json, os, sys, numpy as np

refused = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
for home, blocks, own in json.load(sys.stdin):
    os.chdir(home)
    names = {}
    for block in blocks:
        exec(block, names)
    found = {name: names[name] for name in ("mu", "logvar", "means")}
    found["own"] = eval(own, names)
    np.savez("found.npz", **{name: getattr(value, "detach", lambda: value)() for name, value in found.items()})
assert not refused & set(sys.modules)
"""


def stirred(model: VAE) -> VAE:
    """As if trained a little: what starts at 0, such as the weight of attention, is there.

    Not the coefficients of PAU: fifth powers of random ones make torch's own float32 differ from its float64 by more
    than any tolerance here.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("numerator", "denominator")):
                parameter += 0.02 * torch.randn_like(parameter)
    return model


class Exported(NamedTuple):
    model: VAE  # the live one
    data: Dataset
    rows: np.ndarray  # (N, X) as they stand in the source
    home: Path  # of its folder, "best"


def export_kind(kind: str, home: Path) -> Exported:
    """In every format there is: a convolutional model of images in 8 bits, one of MNIST, or a trained one of digits."""
    torch.manual_seed(0)
    if kind == "digits":
        config = DataConfig()
        data = load_data(config)
        trainer = Trainer(
            ModelConfig(input_dim=64, latent_dim=4, hidden_dims=(32,)), TrainConfig(max_epochs=2), data, seed=0
        )
        list(trainer)
        model = trainer.result.eval()
    else:
        settings: dict[str, Any] = {"source": "mnist", "data_dir": str(MNIST)}
        if kind == "colours":
            np.save(home / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8))
            settings = {"source": str(home / "images.npy"), "support": "real", "binarize": "none"}
        config = DataConfig(**settings)
        data = load_data(config)
        data = replace(data, train=data.train[:600], validation=data.validation[:300])
        model = stirred(VAE(CONV if kind == "colours" else CONV_MNIST, data.train)).eval()
    units = {name: None if (v := getattr(data, name)) is None else v.tolist() for name in ("shift", "factor")}
    stored = {"config": asdict(config) | {"data_dir": None}, "image_shape": data.image_shape, **units}
    save(model, home / "best", config={"data": stored}, data=data, programs=True, onnx=not NO_ONNX)
    rows = read_source(config).train[:40]
    return Exported(model, data, rows.reshape(len(rows), -1), home)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    found = {"colours": export_kind("colours", tmp_path_factory.mktemp("colours"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_checked_elsewhere", checked_here)
        for kind in ("digits", "mnist") if MNIST.is_dir() else ("digits",):
            found[kind] = export_kind(kind, tmp_path_factory.mktemp(kind))
    return found


def checked_here(folder: Path, names: list[str], arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """`_checked_elsewhere`, without its process for each model."""
    return {file: portable._deviation(folder / file, arrays) for file in names}


@pytest.fixture
def exported(models: dict[str, Exported]) -> Path:
    return models["colours"].home


def blocks_of(home: Path) -> tuple[list[str], str]:
    """The blocks of Python of a card, and the expression that leads back to the data's own units."""
    card = (home / "best" / "README.md").read_text(encoding="utf-8")
    (own,) = re.findall("own units again: `(.+?)`", card)
    return [block.split("```")[0] for block in card.split("```python\n")[1:]], own


def alone(refused: Sequence[str], jobs: list[tuple[str, list[str], str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_ALONE, ",".join(refused)],
        input=json.dumps(jobs), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def with_rows(block: str, exported: Exported) -> str:
    """With rows, and with their latents, where the card says that they are to be put."""
    latent_dim = exported.model.config.latent_dim
    np.save(exported.home / "rows.npy", exported.rows)
    for place, what in {
        f"np.zeros((1, {exported.rows.shape[1]}))": "np.load('rows.npy')",
        f"torch.zeros(1, {latent_dim})": "mu",
        f"np.zeros((1, {latent_dim}), np.float32)": "mu",
    }.items():
        block = block.replace(place, what)
    return block


@pytest.mark.parametrize("way", ["vae", "pt2", "onnx"])
def test_the_card_s_lines_give_the_live_model_s_numbers_where_no_search_can_be_imported(models, way):
    """Neither ray nor optuna; for .pt2 and ONNX not the model's own package either."""
    if way == "onnx" and NO_ONNX:
        pytest.skip("the extra onnx is not installed")
    as_printed, jobs = [], []
    for exported in models.values():
        blocks, own = blocks_of(exported.home)
        used, own = ([blocks[0]], "means") if way == "vae" else ([blocks[1], blocks[2 if way == "pt2" else 3]], own)
        lines = [line for line in used[-1].splitlines() if line and not line.startswith("import")]
        assert len(lines) <= 5
        as_printed.append((str(exported.home), used, own))
        jobs.append((str(exported.home), [with_rows(block, exported) for block in used], own))
        assert jobs[-1][1] != used
    alone(SEARCH if way == "vae" else (*SEARCH, "vae"), as_printed + jobs)
    for exported in models.values():
        x = torch.from_numpy(exported.data.units.scale(exported.rows))
        with torch.no_grad():
            mu, logvar = exported.model.encode(x)
            means = exported.model.likelihood.mean(exported.model.decode(mu))
        assert np.ptp(mu.numpy(), axis=0).min() > 1e-3
        with np.load(exported.home / "found.npz") as found:
            np.testing.assert_allclose(found["mu"], mu, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found["logvar"], logvar, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found["own"], exported.data.restore(means.numpy()), rtol=1e-5, atol=1e-3)


def test_what_is_refused_cannot_be_imported_by_the_card_s_lines(models):
    home = str(models["digits"].home)
    for name in ("ray", "optuna", "search", "vae"):
        with pytest.raises(AssertionError, match=f"ModuleNotFoundError: {name}"):
            alone((*SEARCH, "vae"), [(home, [f"import {name}"], "0")])


def test_every_format_is_there_and_as_near_to_the_model_as_it_must_be(models):
    suffixes = (".pt2",) if NO_ONNX else (".pt2", ".onnx")
    for exported in models.values():
        stored = read_config(exported.home / "best")
        assert stored["refused"] == {}
        assert set(stored["files"]) == {f"{side}{suffix}" for side in ("encoder", "decoder") for suffix in suffixes}
        for name, file in stored["files"].items():
            assert (exported.home / "best" / name).is_file()
            assert file["deviation"] <= file["tolerance"] == portable.TOLERANCES[Path(name).suffix]


def test_a_program_holds_the_weights_of_its_side_alone(exported):
    sides = {"encoder": {"encoder", "mu", "logvar"}, "decoder": {"decoder", "outputs"}}
    for side, parts in sides.items():
        program = torch.export.load(exported / "best" / f"{side}.pt2")
        assert {name.split(".")[1] for name in program.state_dict} - {"likelihood"} == parts


def test_no_module_in_the_current_folder_is_run_by_the_check(tmp_path, monkeypatch):
    for name in ("torch", "queue", "vae"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('sprung').touch()\n")
    (tmp_path / "best").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    written = portable.write(VAE(MLP).eval(), tmp_path / "best", np.zeros((5, 12), np.float32), onnx=False)
    assert set(written.files) == {"encoder.pt2", "decoder.pt2"}
    assert not (tmp_path / "sprung").exists()


def test_no_file_tells_of_the_machine_that_wrote_it(exported):
    here = (str(Path(vae.__file__).parent).encode(), str(Path(torch.__file__).parent).encode())
    for name in read_config(exported / "best")["files"]:
        content = (exported / "best" / name).read_bytes()
        assert not any(path in content for path in here)


def test_a_pickle_in_a_program_runs_when_it_is_loaded_as_the_card_warns_and_vae_load_reads_none(exported, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    pickled = io.BytesIO()
    torch.save(Trap(), pickled)
    file = exported / "best" / "encoder.pt2"
    whole = file.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(file, "w") as trap:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            trap.writestr(name, pickled.getvalue() if name.endswith("weights/weight_0") else content)
    try:
        vae.load(exported / "best")
        assert not (tmp_path / "sprung").exists()
        with pytest.raises(pickle.UnpicklingError):
            torch.export.load(file)
        assert (tmp_path / "sprung").exists()
    finally:
        file.write_bytes(whole)
    assert "load none from people you don't trust" in (exported / "best" / "README.md").read_text(encoding="utf-8")


class Undecided(nn.Module):
    """Which way it goes depends on the data: no program says that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def spoiled(change: Callable[[Path], None]) -> Callable[..., dict[str, str]]:
    """`_write_side`, after which the encoder's file is changed."""
    write_side = portable._write_side

    def written(name: str, *rest: Any) -> dict[str, str]:
        refused = write_side(name, *rest)
        if name == "encoder":
            change(rest[2] / "encoder.pt2")
        return refused

    return written


def nudged(file: Path) -> None:
    """The same program with a weight a little larger."""
    program = torch.export.load(file)
    with torch.no_grad():
        program.state_dict["model.mu.bias"] += 1e-4
    torch.export.save(program, file)


def test_what_differs_or_cannot_be_written_is_refused_by_name_and_the_rest_is_whole(tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((60, 12), dtype=np.float32)
    np.save(tmp_path / "images.npy", images)
    data = load_data(DataConfig(source=str(tmp_path / "images.npy"), binarize="none"))
    model = VAE(MLP, data.train)
    for name, _, block in model.blocks():
        if name == "decoder":
            block.activation = Undecided()
    monkeypatch.setattr(portable, "_write_side", spoiled(nudged))
    save(model, tmp_path / "best", config={}, data=data, programs=True)
    assert {file.name for file in (tmp_path / "best").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png", "reconstructions.png", "samples.csv",
        "reconstructions.csv",
    }  # fmt: skip
    stored = read_config(tmp_path / "best")
    assert stored["files"] == {}
    assert "differs from the model by" in stored["refused"]["encoder.pt2"]
    assert "1e-06 is allowed" in stored["refused"]["encoder.pt2"]
    assert "data-dependent" in stored["refused"]["decoder.pt2"]
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    for name, why in stored["refused"].items():
        assert f"There is no `{name}`: {why}." in card
    assert "torch.export.load" not in card


def test_a_file_that_cannot_be_read_again_is_told_with_the_reason(tmp_path, capsys):
    (tmp_path / "encoder.pt2").write_bytes(b"PK torn")
    np.savez(tmp_path / "reference.npz", encoder=np.zeros((257, 12), np.float32))
    portable._main(str(tmp_path), str(tmp_path / "reference.npz"), "encoder.pt2", "decoder.pt2")
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"encoder.pt2", "decoder.pt2"}
    assert "zip" in found["encoder.pt2"]
    assert "decoder.pt2" in found["decoder.pt2"]


def test_onnx_without_its_packages_is_refused_with_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "_ONNX_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match=r"ONNX needs no_such_package: pip install 'vaesearch\[onnx\]'"):
        portable.write(VAE(MLP), tmp_path, np.zeros((1, 12), np.float32), onnx=True)
    assert list(tmp_path.iterdir()) == []


def every_model() -> dict[str, ModelConfig]:
    """Every activation, with the likelihoods and normalisations in turn; every normalisation and attention on images.

    Those activations do something else with images than with dense layers.
    """
    small = {"latent_dim": 3, "hidden_dims": (8, 6)}
    likelihoods, normalizations = itertools.cycle(get_args(LikelihoodName)), itertools.cycle(("none", "layer", "batch"))
    mlps = [
        ModelConfig(
            input_dim=12, activation=name, likelihood=next(likelihoods), normalization=next(normalizations), **small
        )
        for name in get_args(ActivationName)
    ]
    kinds: list[tuple[Normalization, Attention, ActivationName]] = [
        ("none", "none", "avg_pool"), ("layer", "squeeze_excitation", "dynamic_relu"),
        ("batch", "self_attention", "glu"), ("group", "none", "pau"),
    ]  # fmt: skip
    convs = [
        ModelConfig(
            input_dim=108, image_shape=(6, 6, 3), body="conv", channels=(4, 8), normalization=normalization,
            attention=attention, activation=activation, **small,
        )
        for normalization, attention, activation in kinds
    ]  # fmt: skip
    return {f"{model.body} {model.activation}": model for model in (*mlps, *convs)}


@pytest.mark.system
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(NO_ONNX), reason="the extra onnx is not installed")
@pytest.mark.parametrize("name", every_model())
def test_every_activation_body_and_likelihood_is_exported_in_every_format(tmp_path, name, monkeypatch):
    monkeypatch.setattr(portable, "_checked_elsewhere", checked_here)
    config = every_model()[name]
    torch.manual_seed(0)
    rows = np.random.default_rng(0).random((257, config.input_dim), dtype=np.float32)
    rows = (rows * 20).round() if SUPPORTS[config.likelihood] == "counts" else rows
    found = portable.write(stirred(VAE(config, rows)), tmp_path, rows, onnx=True)
    assert found.refused == {}
    assert len(found.files) == 4
    print(name, json.dumps({file: told["deviation"] for file, told in found.files.items()}))
