"""A trained model as a folder: weights in safetensors, config.json, pictures, tables, a card. Nothing is pickled."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vae.config import SUPPORTS, InputError, ModelConfig
from vae.data import Dataset, Units
from vae.images import save_grid, save_reconstructions, shades
from vae.model import VAE

FORMAT = 2  # of config.json; raise it when an older load() could not read what save() writes
WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32
_SAMPLE_SEED = 0

_CARD = """\
# Variational autoencoder: {{ activation }}, latent size {{ model.latent_dim }}

A variational autoencoder over {{ model.input_dim }} features: {{ body }}.
Activation {{ activation }}, normalisation {{ model.normalization }}, a Gaussian posterior of
{{ model.latent_dim }} dimensions and a {{ model.likelihood }} likelihood,
{{ outputs }}; {{ num_parameters }} parameters.
{%- if study is not none %} It is trial {{ trial }} of the study `{{ study }}`.{% endif %}
{%- if mixtures %}

What the activations have learned to be, as weights that sum to 1:

| layer | weights |
|---|---|
{% for layer, weights in mixtures.items() -%}
| {{ layer }} | {{ weights }} |
{% endfor %}
{%- endif %}

## Data

- source: `{{ data.source }}`
- values: {{ values }}
- scale: {{ data.scale }}
- binarisation: {{ data.binarize }}
- fingerprint: `{{ fingerprint }}`

## Parameters

| parameter | value |
|---|---|
{% for name, value in params.items() -%}
| {{ name }} | {{ value | short }} |
{% endfor %}
## Results

Losses are nats per example
{%- if density %}; of a density, whose logarithm may be positive, so that they may be negative{% endif %}.

| metric | value |
|---|---|
{% for name, value in metrics.items() if name != "no_latent_nelbo" -%}
| {{ name }} | {{ value | short }} |
{% endfor -%}
| no-latent baseline (validation) | {{ baseline | short }} |
{% if objective == "elbo" %}
The baseline is the same likelihood without a latent: a model no better than it has learned nothing about how
the features hang together.
{%- else %}
The model was trained adversarially, for reconstructions and samples that a discriminator takes for data. Its bounds
are not what was trained for: they may lie above the baseline of the same likelihood without a latent, and rank with
no other model's. It was chosen by the squared error of reconstructions.
{%- endif %}

![Samples from the prior](samples.png)

![Validation examples, and their reconstructions below them](reconstructions.png)
{%- if tables %}

In the data's own units, `samples.csv` has draws from the model at the same latents as the picture, which shows
their means, and `reconstructions.csv` the examples of the picture, each with the mean of its reconstruction.
{%- endif %}

## Use

```python
import numpy as np
import torch
import vae
from vae.export import read_units

model = vae.load("{{ folder }}")
units = read_units("{{ folder }}")
own = np.zeros((1, {{ model.input_dim }}))  # rows as they stand in the source; put yours here
x = torch.from_numpy(units.scale(own))  # {{ scaled }}
{%- if data.binarize == "threshold" %}
x = (x > 0.5).float()  # as the model was trained
{%- elif data.binarize != "none" %}
x = torch.bernoulli(x)  # as the model was trained
{%- endif %}
mu, logvar = model.encode(x)
{%- if data.binarize == "threshold" %}
means = model.reconstruct(x)  # the probability that a value is above half of its range
samples = model.sample(16)
{%- else %}
means = units.restore(model.reconstruct(x).numpy())  # in the units of the source again
samples = units.restore(model.sample(16).numpy())  # means; with mean=False draws
{%- endif %}
```
{%- if data.support == "counts" %}

A row's size factor is its total over {{ mean_total | short }}, the mean total of the rows trained on: the mean of a
reconstruction has the size of its row, and samples have size factor 1.
{%- endif %}

## Versions

{% for name, value in versions.items() -%}
- {{ name }} {{ value }}
{% endfor %}
## Licence

None is given here; whoever publishes the model chooses one, and the data may have a say in it.
"""

_OUTPUTS = {
    "bernoulli": "whose outputs are logits",
    "continuous_bernoulli": "whose outputs are logits",
    "poisson": "whose outputs are log rates at size factor 1",
    "negative_binomial": "whose outputs are log means at size factor 1",
}
_VALUES = {"unit": "in [0, 1]", "real": "real numbers", "counts": "counts, never scaled"}
_DENSITIES = ("continuous_bernoulli", "gaussian")
_DIGITS = 6  # behind the unit of a column's spread, of numbers in tables
_MAX_DECIMALS = 15


def save(model: VAE, path: Path, *, config: dict[str, Any], data: Dataset) -> None:
    """Write the folder `path`. `config`: data, params, metrics, versions, study and trial, fit for JSON."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path / WEIGHTS)
    text = json.dumps({"format": FORMAT, "model": asdict(model.config), **config}, indent=2, allow_nan=False)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")

    counts = data.config.support == "counts"
    means, draws = (_samples(model, mean) for mean in (True, False))
    originals = data.validation[:_NUM_RECONSTRUCTIONS]
    reconstructions = model.reconstruct(torch.from_dlpack(originals).to(model.device)).cpu().numpy()
    shown = [shades(rows, data.train, data.image_shape, counts) for rows in (means, originals, reconstructions)]
    save_grid(shown[0], data.image_shape, path / "samples.png")
    save_reconstructions(shown[1], shown[2], data.image_shape, path / "reconstructions.png")
    if data.image_shape is None:
        _save_samples(draws, data, path / "samples.csv")
        _save_reconstructions(originals, reconstructions, data, path / "reconstructions.csv")
    (path / "README.md").write_text(_card(model, path, config, data), encoding="utf-8")


def load(path: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The model `save` wrote, in evaluation mode. InputError: the folder is none, or damaged.

    It takes and gives rows as it was trained on; `read_units` of the same folder goes between them and the data's
    own units.
    """
    path = Path(path)
    config = read_config(path)
    try:
        weights = load_file(path / WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise InputError(f"{path / WEIGHTS} is missing: export the model again") from error
    except SafetensorError as error:
        raise InputError(f"{path / WEIGHTS} is damaged ({error}): export the model again") from error
    try:
        # The first weights are overwritten at once; the caller's generator is none of their business.
        with torch.random.fork_rng(devices=[]):
            model = VAE(ModelConfig(**config["model"]))
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: {CONFIG} and {WEIGHTS} do not belong together: {error}") from error
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an exported model: format, model, data, params, metrics, versions, study, trial."""
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is no exported model: {CONFIG} is missing") from error
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise InputError(f"{file} has format {found!r} and this version reads {FORMAT}: export the model again")
    if not isinstance(config.get("model"), dict):
        raise InputError(f"{file} does not say what the model is: export it again")
    return config


def read_units(path: str | Path) -> Units:
    """Between the data's own units and the rows of the model exported to `path`. InputError as for `read_config`."""
    data = read_config(path).get("data") or {}
    shift, factor = (
        None if data.get(name) is None else np.array(data[name], np.float64) for name in ("shift", "factor")
    )
    return Units(shift, factor, clip=(data.get("config") or {}).get("scale") == "minmax")


def _samples(model: VAE, mean: bool) -> np.ndarray:
    """The same latents for means and for draws: they are drawn first."""
    generator = torch.Generator(model.device).manual_seed(_SAMPLE_SEED)
    return model.sample(_NUM_SAMPLES, generator, mean).cpu().numpy()


# ---- tables


def _save_samples(draws: np.ndarray, data: Dataset, file: Path) -> None:
    _write_csv(file, _columns(data), _own(draws, data))


def _save_reconstructions(originals: np.ndarray, reconstructions: np.ndarray, data: Dataset, file: Path) -> None:
    """Two lines an example: what was read, and the mean of what the model makes of it."""
    names = _columns(data)
    marks = []
    for mark in ("example", "kind"):
        while mark in names:
            mark += "_"
        marks.append(mark)
    lines = []
    for index, pair in enumerate(zip(_own(originals, data), _own(reconstructions, data), strict=True)):
        lines += [[index, kind, *row] for kind, row in zip(("original", "reconstruction"), pair, strict=True)]
    _write_csv(file, (*marks, *names), lines)


def _columns(data: Dataset) -> tuple[str, ...]:
    return data.columns or tuple(f"x{i}" for i in range(data.input_dim))


def _own(rows: np.ndarray, data: Dataset) -> list[list[float | int]]:
    """(N, X) -> in the data's own units, to the digits that float32 rows have; whole numbers without a point."""
    # What was cut at a threshold is a class, not a place on a scale.
    own = rows.astype(np.float64) if data.config.binarize == "threshold" else data.restore(rows)
    factors = np.ones(data.input_dim) if data.factor is None else data.factor
    decimals = [_DIGITS - math.floor(math.log10(factor)) if factor > 0 else _MAX_DECIMALS for factor in factors]
    for i, places in enumerate(decimals):
        if places <= _MAX_DECIMALS:
            own[:, i] = own[:, i].round(places)
    return [
        [int(value) if value.is_integer() and abs(value) < 2**53 else value for value in row] for row in own.tolist()
    ]


def _write_csv(file: Path, names: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([names, *lines])


# ---- the card


def _card(model: VAE, path: Path, config: dict[str, Any], data: Dataset) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["short"] = lambda value: f"{value:.6g}" if isinstance(value, float) else value
    metrics = config.get("metrics") or {}
    baseline = metrics.get("no_latent_nelbo")
    if baseline is None:
        baseline = model.likelihood.no_latent_nelbo(data.train, data.validation)
    is_counts = SUPPORTS[model.config.likelihood] == "counts"
    return environment.from_string(_CARD).render(
        model=model.config,
        activation=" and ".join(f"`{name}`" for name in dict.fromkeys(model.config.activations)),
        body=_body(model.config),
        outputs=_outputs(model.config),
        mixtures=_mixtures(model),
        density=model.config.likelihood in _DENSITIES,
        mean_total=float(model.likelihood.get_buffer("mean_total")) if is_counts else None,
        data=data.config,
        values=_VALUES[data.config.support],
        scaled=_scaled(data),
        tables=data.image_shape is None,
        num_parameters=f"{model.num_parameters:,}",
        fingerprint=data.fingerprint,
        baseline=baseline,
        folder=path.name,
        objective=(config.get("train") or {}).get("objective", "elbo"),
        metrics=metrics,
        **{name: config.get(name) or {} for name in ("params", "versions")},
        **{name: config.get(name) for name in ("study", "trial")},
    )


def _body(model: ModelConfig) -> str:
    """What stands between rows and latents, in words."""
    widths = ", ".join(map(str, model.hidden_dims))
    dense = f"hidden layers of {widths} units" if widths else "no hidden layers"
    if model.body == "mlp":
        return f"a perceptron on each side with {dense}"
    strides = model.strides or (2,) * len(model.channels)
    convolutions = ", ".join(f"{n} (stride {stride})" for n, stride in zip(model.channels, strides, strict=True))
    attention = "" if model.attention == "none" else f", {model.attention.replace('_', '-')}"
    return f"convolutions of {convolutions} channels{attention}, then {dense}, and the mirror of all that"


def _outputs(model: ModelConfig) -> str:
    """What the decoder's outputs are, in words."""
    if model.likelihood == "gaussian":
        return (
            f"whose outputs are means, with {'one sigma' if model.gaussian_scale == 'shared' else 'a sigma a feature'}"
        )
    return _OUTPUTS[model.likelihood]


def _scaled(data: Dataset) -> str:
    """What `Units.scale` does, in words."""
    if data.shift is None:
        return "as they are"
    if data.config.scale == "minmax":
        return "(row - shift) / factor, into [0, 1]"
    return "(row - shift) / factor"


def _mixtures(model: VAE) -> dict[str, str]:
    """Layer -> the weights its activation has learned for the functions it mixes."""
    found = {}
    for net, index, block in model.blocks():
        weights = getattr(block.activation, "weights", None)
        if isinstance(weights, Mapping):
            found[f"{net} {index}"] = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
    return found
