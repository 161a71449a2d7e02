"""A trained model as a folder: weights in safetensors, config.json, pictures, tables, a card; programs if asked for.

A folder may come from anybody. What is read of it, config.json and the weights, is no pickle, runs nothing, and is
refused before a model is made that is larger than the weights are. The programs are not read again here.
"""

import csv
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vae import portable
from vae.card import card
from vae.config import DataConfig, InputError, ModelConfig, printable
from vae.data import Dataset, Units, feature_names
from vae.images import num_that_fit, save_grid, save_reconstructions, shades
from vae.model import VAE

FORMAT = 2  # of config.json; raise it when an older load() could not read what save() writes
WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32
_SAMPLE_SEED = 0

_PER_FEATURE: Mapping[str, type | tuple[type, ...]] = {
    "shift": (int, float),
    "factor": (int, float),
    "columns": str,
    "image_shape": int,
}  # of config.json

_SECTIONS = ("data", "train", "params", "metrics", "finals", "versions", "refit")  # objects
_SETTINGS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("source", "key", "data_dir", "columns", "support", "scale", "binarize"), str),
    **dict.fromkeys(("validation_fraction", "test_fraction"), (int, float)),
    **dict.fromkeys(("image_shape", "seed"), int),
}  # of data.config; of the two lists each value

_MAX_HEADER_BYTES = 2**24  # of the weights; what a model has is far below
_MAX_CONFIG_BYTES = 2**27  # shift and factor of two million features
_MAX_CONFIG_VALUES = 2**23  # read, each takes up to twenty times its letters
_MAX_LAYERS = 256
_MAX_TOLD = 300  # letters of what an error repeats from a folder


def save(
    model: VAE, path: Path, *, config: dict[str, Any], data: Dataset, programs: bool = False, onnx: bool = False
) -> None:
    """Write the folder `path`. `config`: data, params, metrics, versions, study and trial, fit for JSON.

    programs: also encoder and decoder as torch.export has them, and with `onnx` as ONNX; see `vae.portable`.
    config.json and the card tell which there are, how near to the model they are, and which were refused.
    """
    path.mkdir(parents=True, exist_ok=True)
    for name in portable.FILES:  # those of an earlier export are of other weights
        (path / name).unlink(missing_ok=True)
    if programs:
        config = {**config, **asdict(portable.write(model, path, data.validation, onnx=onnx))}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(weights, path / WEIGHTS, metadata={"format": "pt"})  # without which some readers refuse it
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"{path / WEIGHTS} cannot be written: {error}") from error
    text = json.dumps({"format": FORMAT, "model": asdict(model.config), **config}, indent=2, allow_nan=False)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")
    shutil.copymode(path / CONFIG, path / WEIGHTS)  # safetensors lets its owner alone read it

    counts = data.config.support == "counts"
    most = num_that_fit(data.input_dim, data.image_shape)
    means, draws = (_samples(model, min(_NUM_SAMPLES, most), mean) for mean in (True, False))
    most = num_that_fit(data.input_dim, data.image_shape, tiles=2)
    originals = data.validation[: min(_NUM_RECONSTRUCTIONS, most)]
    reconstructions = model.reconstruct(torch.from_dlpack(originals).to(model.device)).cpu().numpy()
    shown = [shades(rows, data.train, data.image_shape, counts) for rows in (means, originals, reconstructions)]
    save_grid(shown[0], data.image_shape, path / "samples.png", max_pixels=None)
    save_reconstructions(shown[1], shown[2], data.image_shape, path / "reconstructions.png", max_pixels=None)
    if data.image_shape is None:
        _save_samples(draws, data, path / "samples.csv")
        _save_reconstructions(originals, reconstructions, data, path / "reconstructions.csv")
    (path / "README.md").write_text(card(model, path.name, config, data), encoding="utf-8")


def load(path: str | Path, device: str | torch.device = "cpu", config: Mapping[str, Any] | None = None) -> VAE:
    """The model `save` wrote, in evaluation mode. InputError: the folder is none, or damaged.

    It takes and gives rows as it was trained on; `read_units` of the same folder goes between them and the data's
    own units. config: what `read_config` gave, for who has read it already.
    """
    folder = Path(path)
    config = read_config(folder) if config is None else config
    device = _device(device)
    file = _inside(folder, WEIGHTS)
    if file is None:
        raise InputError(f"{folder / WEIGHTS} is missing: export the model again")
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as stored:  # on the CPU: what fails on a device is not the file's fault
            names = list(stored.keys())
            try:
                model = _make(config["model"], {name: tuple(stored.get_slice(name).get_shape()) for name in names})
                _fill(model, {name: stored.get_tensor(name) for name in names})
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise InputError(f"{folder}: {CONFIG} and {WEIGHTS} do not belong together: {_told(error)}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({_told(error)}): export the model again") from error
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an exported model: `format`, `model`, and whatever `save` was given as its config.

    With programs also `files` and `refused`. InputError: there is none, or it is damaged, or names a file outside the
    folder.
    """
    folder = Path(path)
    file = _inside(folder, CONFIG)
    if file is None:
        raise InputError(f"{path} is no exported model: {CONFIG} is missing")
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise InputError(f"{folder / CONFIG} has more than {_MAX_CONFIG_BYTES:,} bytes: no model's has")
        text = file.read_bytes()
        if sum(text.count(mark) for mark in (b",", b"[", b"{")) > _MAX_CONFIG_VALUES:
            raise InputError(f"{folder / CONFIG} has more than {_MAX_CONFIG_VALUES:,} values: no model's has")
        config = json.loads(text)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} is no JSON: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{folder / CONFIG} has format {_told(repr(found))} and this version reads {FORMAT}: export the model again"
        )
    if not isinstance(config.get("model"), dict):
        raise InputError(f"{folder / CONFIG} does not say what the model is: export it again")
    _check_config(folder / CONFIG, config)
    return config


def read_units(path: str | Path) -> Units:
    """Between the data's own units and the rows of the model exported to `path`. InputError as for `read_config`."""
    return units_of(read_config(path))


def units_of(config: Mapping[str, Any]) -> Units:
    """Those that config.json, as `read_config` returns it, tells of."""
    data = config.get("data") or {}
    shift, factor = (
        None if data.get(name) is None else np.array(data[name], np.float64) for name in ("shift", "factor")
    )
    return Units(shift, factor, clip=(data.get("config") or {}).get("scale") == "minmax")


# ---- what is refused


def _inside(folder: Path, name: str) -> Path | None:
    """The file, None where there is none. InputError: it is a link that leads out of the folder."""
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
        # The cache of huggingface_hub: snapshots/<revision>/[<folder>/]<name> -> blobs/<hash>.
        is_cached = any(
            parent.name == "snapshots" and target.parent == parent.parent / "blobs" for parent in home.parents
        )
        if not (target.parent == home or is_cached):
            raise InputError(f"{file} is a link to {_told(target)}, outside of the folder: put the file itself there")
        return target if target.is_file() else None
    except (OSError, RuntimeError) as error:  # the latter of links in a circle
        raise InputError(f"{file} cannot be read: {error}") from error


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """What else is used of config.json. InputError where it is not what `save` writes."""
    for name in _SECTIONS:
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{file} is damaged: {name} is not what it should be: export the model again")
    data = config.get("data") or {}
    try:
        _check_settings(data.get("config") or {})
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged: data.config: {_told(error)}: export the model again") from error
    features = config["model"].get("input_dim")
    for name, kind in _PER_FEATURE.items():
        value = data.get(name)
        if value is None:
            continue
        fits = isinstance(value, list) and all(isinstance(each, kind) for each in value)
        if fits and name == "image_shape":
            fits = _is_image(value, features)
        elif fits:
            fits = len(value) == features
        if fits and name in ("shift", "factor"):
            fits = all(abs(each) <= sys.float_info.max for each in value)  # not so of NaN
        if not fits:
            raise InputError(f"{file} is damaged: data.{name} does not fit input_dim: export the model again")
    if not str(data.get("fingerprint", "")).isprintable():
        raise InputError(f"{file} is damaged: data.fingerprint is none: export the model again")
    if (data.get("shift") is None) != (data.get("factor") is None):
        raise InputError(f"{file} is damaged: data.shift and data.factor go together: export the model again")
    for key in ("files", "refused"):
        names = config.get(key) or {}
        if not isinstance(names, dict) or any(name in ("", ".", "..") or set(name) & set("/\\\0") for name in names):
            raise InputError(f"{file} is damaged: {key} must name files of the folder: export the model again")


def _check_settings(settings: Any) -> None:
    """How the data were read, which is asked for where they are read again. TypeError, ValueError."""
    if not isinstance(settings, dict):
        raise TypeError("no object")
    for name, kind in _SETTINGS.items():
        value = settings.get(name)
        values = value if name in ("columns", "image_shape") and isinstance(value, list) else [value]
        if value is not None and not all(isinstance(each, kind) for each in values):
            raise TypeError(f"{name} is {value!r}")
    DataConfig(**settings)


def _is_image(shape: Sequence[int], features: Any) -> bool:
    return len(shape) in (2, 3) and min(shape) > 0 and math.prod(shape) == features


def _check_header(file: Path) -> None:
    """SafetensorError where it claims to be larger than any model's is, before anything is made to hold it."""
    with file.open("rb") as stream:
        claimed = int.from_bytes(stream.read(8), "little")
    if claimed > _MAX_HEADER_BYTES:
        raise SafetensorError(f"a header of {claimed:,} bytes is claimed")


def _make(settings: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VAE:
    """The model of config.json, for weights of these shapes, still without any. ValueError where they don't fit.

    It takes no memory before they do: sizes that are claimed may be anything, and the weights lie in the file. Nor are
    first weights drawn, which costs more than all the rest for some activations.
    """
    for name, value in settings.items():
        if isinstance(value, list) and len(value) > _MAX_LAYERS:
            raise ValueError(f"{name} has more than {_MAX_LAYERS} values")
    config = ModelConfig(**settings)
    if config.image_shape is not None and not _is_image(config.image_shape, config.input_dim):
        raise ValueError(f"image_shape {list(config.image_shape)} does not make {config.input_dim} features")
    with torch.device("meta"):
        model = VAE(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted({*wanted, *shapes}):
        if wanted.get(name) != shapes.get(name):
            raise ValueError(f"{name} is {shapes.get(name, 'missing')}, and {wanted.get(name, 'nothing')} is wanted")
    return model


def _fill(model: VAE, weights: Mapping[str, torch.Tensor]) -> None:
    """With weights of the right shapes. ValueError for some of another type, or that are not finite."""
    for name, value in model.state_dict().items():
        found = weights[name]
        if found.dtype != value.dtype:
            raise ValueError(f"{name} is of {found.dtype}, and {value.dtype} is wanted")
        if not found.isfinite().all():
            raise ValueError(f"{name} is not finite")
    # Copies: what is mapped to a file changes with it.
    model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)


def _told(what: object) -> str:
    """In words from a stranger's folder, a line of which nothing steers a terminal."""
    return printable(" ".join(str(what).split())[:_MAX_TOLD])


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error
    return found


# ---- samples


def _samples(model: VAE, num_rows: int, mean: bool) -> np.ndarray:
    """The same latents for means and for draws: they are drawn first."""
    generator = torch.Generator(model.device).manual_seed(_SAMPLE_SEED)
    return model.sample(num_rows, generator, mean).cpu().numpy()


# ---- tables


def _save_samples(draws: np.ndarray, data: Dataset, file: Path) -> None:
    _write_csv(file, feature_names(data.columns, data.input_dim), _own(draws, data))


def _save_reconstructions(originals: np.ndarray, reconstructions: np.ndarray, data: Dataset, file: Path) -> None:
    """Two lines an example: what was read, and the mean of what the model makes of it."""
    names = feature_names(data.columns, data.input_dim)
    marks = []
    for mark in ("example", "kind"):
        while mark in names:
            mark += "_"
        marks.append(mark)
    lines = []
    for index, pair in enumerate(zip(_own(originals, data), _own(reconstructions, data), strict=True)):
        lines += [[index, kind, *row] for kind, row in zip(("original", "reconstruction"), pair, strict=True)]
    _write_csv(file, (*marks, *names), lines)


def _own(rows: np.ndarray, data: Dataset) -> list[list[float | int]]:
    """(N, X) -> in the data's own units, to the digits that float32 rows have; whole numbers without a point."""
    # What was cut at a threshold is a class, not a place on a scale.
    own = rows.astype(np.float64) if data.config.binarize == "threshold" else data.restore(rows)
    return [
        [int(value) if value.is_integer() and abs(value) < 2**53 else value for value in row]
        for row in data.units.rounded(own).tolist()
    ]


def _write_csv(file: Path, names: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([names, *lines])
