"""A trained model as a folder: weights in safetensors, config.json, pictures, a card. Nothing is pickled."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vae.config import InputError, ModelConfig
from vae.data import Dataset
from vae.images import save_grid, save_reconstructions
from vae.model import VAE

FORMAT = 1  # of config.json; raise it when an older load() could not read what save() writes
WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32
_SAMPLE_SEED = 0

_CARD = """\
# Variational autoencoder: {{ model.activation }}, latent size {{ model.latent_dim }}

A variational autoencoder over {{ model.input_dim }} features: a perceptron on each side with hidden layers
{{ model.hidden_dims | join(", ") or "none" }} and activation `{{ model.activation }}`, a Gaussian posterior
of {{ model.latent_dim }} dimensions and a {{ model.likelihood }} likelihood; {{ num_parameters }} parameters.
{%- if study is not none %} It is trial {{ trial }} of the study `{{ study }}`.{% endif %}

## Data

- source: `{{ data.source }}`
- binarisation: {{ data.binarize }}
- fingerprint: `{{ fingerprint }}`

## Parameters

| parameter | value |
|---|---|
{% for name, value in params.items() -%}
| {{ name }} | {{ value | short }} |
{% endfor %}
## Results

Losses are nats per example.

| metric | value |
|---|---|
{% for name, value in metrics.items() if name != "no_latent_nelbo" -%}
| {{ name }} | {{ value | short }} |
{% endfor -%}
| no-latent baseline (validation) | {{ baseline | short }} |

The baseline is the same likelihood without a latent: a model no better than it has learned nothing about how
the features hang together.

![Samples from the prior](samples.png)

![Validation examples, and their reconstructions below them](reconstructions.png)

## Use

```python
import torch
import vae

model = vae.load("{{ folder }}")
mu, logvar = model.encode(torch.zeros(1, {{ model.input_dim }}))  # rows in [0, 1]
samples = model.sample(16)
```

## Versions

{% for name, value in versions.items() -%}
- {{ name }} {{ value }}
{% endfor %}
## Licence

None is given here; whoever publishes the model chooses one, and the data may have a say in it.
"""


def save(model: VAE, path: Path, *, config: dict[str, Any], data: Dataset) -> None:
    """Write the folder `path`. `config`: data, params, metrics, versions, study and trial, fit for JSON."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path / WEIGHTS)
    text = json.dumps({"format": FORMAT, "model": asdict(model.config), **config}, indent=2, allow_nan=False)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")

    device = model.outputs.weight.device
    generator = torch.Generator(device).manual_seed(_SAMPLE_SEED)
    save_grid(model.sample(_NUM_SAMPLES, generator).cpu().numpy(), data.image_shape, path / "samples.png")
    originals = data.validation[:_NUM_RECONSTRUCTIONS]
    reconstructions = model.reconstruct(torch.from_dlpack(originals).to(device)).cpu().numpy()
    save_reconstructions(originals, reconstructions, data.image_shape, path / "reconstructions.png")
    (path / "README.md").write_text(_card(model, path, config, data), encoding="utf-8")


def load(path: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The model `save` wrote, in evaluation mode. InputError: the folder is none, or damaged."""
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


def _card(model: VAE, path: Path, config: dict[str, Any], data: Dataset) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["short"] = lambda value: f"{value:.6g}" if isinstance(value, float) else value
    return environment.from_string(_CARD).render(
        model=model.config,
        data=data.config,
        num_parameters=f"{model.num_parameters:,}",
        fingerprint=data.fingerprint,
        baseline=model.likelihood.no_latent_nelbo(data.train_mean, data.validation),
        folder=path.name,
        **{name: config.get(name) or {} for name in ("params", "metrics", "versions")},
        **{name: config.get(name) for name in ("study", "trial")},
    )
