"""Programs for other runtimes: the model's numbers where it is not installed, and what differs is refused by name."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

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
)
from vae.data import load_data
from vae.export import read_config, save
from vae.model import VAE

NO_ONNX = portable.missing_onnx_packages()
MLP = ModelConfig(input_dim=12, latent_dim=3, hidden_dims=(8, 6), activation="apl", normalization="layer")
CONV = ModelConfig(
    input_dim=48, image_shape=(4, 4, 3), latent_dim=3, hidden_dims=(8,), body="conv", channels=(4, 8),
    activation="softplus", attention="self_attention", normalization="batch", likelihood="gaussian",
)  # fmt: skip

# Runs the blocks of the card where neither the search nor the model's own package can be imported.
BLOCKS_ALONE = """
import sys, numpy as np

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna", "search", "cluster", "vae"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
names, found = {}, {}
blocks = sys.stdin.read().split("#####")
exec(blocks[0].replace("np.zeros((1, 48))", f"np.load({sys.argv[1]!r})"), names)
for index, block in enumerate(blocks[1:]):
    exec(block, names)
    for name in ("mu", "logvar", "means"):
        value = names.pop(name)  # a block that gives none is not to pass with those of the last
        found[f"{index}.{name}"] = value.detach().numpy() if hasattr(value, "detach") else value
    found[f"{index}.own"] = found[f"{index}.means"] * names["factor"] + names["shift"]
np.savez(sys.argv[2], **found)
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional model of images in 8 bits, in every format there is."""
    home = tmp_path_factory.mktemp("portable")
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    np.save(home / "images.npy", images)
    data = load_data(DataConfig(source=str(home / "images.npy"), support="real", binarize="none"))
    torch.manual_seed(0)
    units = {name: getattr(data, name).tolist() for name in ("shift", "factor")}
    stored = {"config": asdict(data.config), "image_shape": data.image_shape, **units}
    model = VAE(CONV, data.train)
    stirred(model)
    save(model, home / "best", config={"data": stored}, data=data, programs=True, onnx=not NO_ONNX)
    return home


def test_every_format_gives_the_same_numbers_without_the_package(exported):
    folder = exported / "best"
    stored = read_config(folder)
    assert stored["refused"] == {}
    suffixes = (".pt2",) if NO_ONNX else (".pt2", ".onnx")
    assert set(stored["files"]) == {f"{side}{suffix}" for side in ("encoder", "decoder") for suffix in suffixes}
    for name, file in stored["files"].items():
        assert (folder / name).is_file()
        assert file["deviation"] <= file["tolerance"] == portable.TOLERANCES[Path(name).suffix]

    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in card.split("```python\n")[2:]]
    assert len(blocks) == 1 + len(suffixes)
    for block in blocks[1:]:
        assert len([line for line in block.splitlines() if line and not line.startswith("import")]) <= 5
    own = np.load(exported / "images.npy").reshape(60, 48)
    np.save(exported / "rows.npy", own)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS_ALONE, str(exported / "rows.npy"), str(exported / "found.npz")],
        input="#####".join(blocks), capture_output=True, text=True, cwd=exported, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = vae.load(folder)
    mu, logvar = model.encode(own)
    mean = model.decode(np.zeros((1, 3)))
    with np.load(exported / "found.npz") as found:
        for index in range(len(suffixes)):
            np.testing.assert_allclose(found[f"{index}.mu"], mu, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found[f"{index}.logvar"], logvar, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found[f"{index}.own"], mean, rtol=1e-5, atol=1e-3)
    assert np.ptp(mu, axis=0).min() > 1e-3


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
    def checked_here(folder, names, arrays):  # a process for each model would double what this takes
        return {file: portable._deviation(folder / file, arrays) for file in names}

    monkeypatch.setattr(portable, "_checked_elsewhere", checked_here)
    config = every_model()[name]
    torch.manual_seed(0)
    rows = np.random.default_rng(0).random((257, config.input_dim), dtype=np.float32)
    rows = (rows * 20).round() if SUPPORTS[config.likelihood] == "counts" else rows
    found = portable.write(stirred(VAE(config, rows)), tmp_path, rows, onnx=True)
    assert found.refused == {}
    assert len(found.files) == 4
    print(name, json.dumps({file: told["deviation"] for file, told in found.files.items()}))
