"""The card of an exported model: what it is, what it was made of, what it is worth, and how to use each of its files.

It opens with the YAML that model hubs read.
"""

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jinja2

from vae.config import SUPPORTS, ModelConfig
from vae.data import Dataset
from vae.model import VAE

_CARD = """\
---
library_name: vaesearch
license: unknown
tags:
- variational-autoencoder
- vae
- pytorch
- safetensors
{%- if onnx %}
- onnx
{%- endif %}
{%- if not tables %}
pipeline_tag: unconditional-image-generation
{%- endif %}
{%- if measured %}
metrics:
{%- for name in measured %}
- {{ name }}
{%- endfor %}
model-index:
- name: {{ title | quoted }}
  results:
  - task:
      type: density-estimation
      name: Density estimation
    dataset:
      type: {{ data.source | file_name | slug | quoted }}
      name: {{ data.source | file_name | quoted }}
      split: {{ held_out }}
    metrics:
{%- for name, value in measured.items() %}
    - type: {{ name }}
      name: {{ "Negative evidence lower bound, nats per example" | quoted }}
      value: {{ value }}
{%- endfor %}
{%- endif %}
---
# Variational autoencoder: {{ activation }}, latent size {{ model.latent_dim }}

A variational autoencoder over {{ model.input_dim }} features: {{ body }}.
Activation {{ activation }}, normalisation {{ model.normalization }}, a Gaussian posterior of
{{ model.latent_dim }} dimensions and a {{ model.likelihood }} likelihood,
{{ outputs }}; {{ num_parameters }} parameters.
{%- if study is not none %} It is {% if refit %}a refit of {% endif -%}
trial {{ trial }} of the study `{{ study }}`.{% endif %}
{%- if mixtures %}

What the activations have learned to be, as weights that sum to 1:

| layer | weights |
|---|---|
{% for layer, weights in mixtures.items() -%}
| {{ layer }} | {{ weights }} |
{% endfor %}
{%- endif %}

## Intended use, and limits

To encode rows of the kind described under Data into {{ model.latent_dim }} numbers each, to reconstruct them, to draw
{{ "images" if not tables else "rows" }} like them, and to say how likely a row is. It knows nothing beyond its data:
it repeats their errors and their bias, samples may resemble examples it was trained on, and the likelihood of rows
of another kind may be higher than that of its own. It has been judged by the numbers below alone.

{%- if refit %}

## Refit

The configuration of that trial, trained anew for {{ refit.epochs }} epochs with seed {{ refit.seed }} on
{{ refit.train_rows }} rows, {{ refit.train_on | replace("+", " and ") }} of `{{ refit.data | file_name }}`.
Its values are those of the last epoch.
{%- if held_out != "validation" %} The validation split was trained on: values and examples are of the
{{ held_out }} split.
{%- endif %}
{%- endif %}

## Data

- source: `{{ data.source | file_name }}`
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
{% for name, value in metrics.items() if name not in ("no_latent_nelbo", "val_nelbo_se") -%}
| {{ name }} | {{ value | short }}
{%- if name == "val_nelbo" and metrics.get('val_nelbo_se') %} ± {{ metrics.val_nelbo_se | short }}{% endif %} |
{% endfor -%}
| no-latent baseline ({{ held_out }}) | {{ baseline | short }} |
{% if metrics.get('val_nelbo_se') %}
± is the standard error over the validation rows. The model was chosen on those rows: its value on others is likely
to be a little worse.
{% endif %}
{%- if finals %}
The configuration was trained anew from {{ finals.seeds }} fresh {{ "seed" if finals.seeds == 1 else "seeds" }} and
scored on the test split, which had no part in the choice: an importance-weighted negative log-likelihood of
**{{ finals.nll | short }}** ({{ finals.importance_samples }} samples a row
{%- if finals.interval %}; 95 % interval over seeds {{ finals.interval[0] | short }} to {{ finals.interval[1] | short }}
{%- endif %}).
{% endif %}
{%- if objective == "elbo" %}
The baseline is the same likelihood without a latent: a model no better than it has learned nothing about how
the features hang together.
{%- else %}
The model was trained adversarially, for reconstructions and samples that a discriminator takes for data. Its bounds
are not what was trained for: they may lie above the baseline of the same likelihood without a latent, and rank with
no other model's. It was chosen by the squared error of reconstructions.
{%- endif %}

![Samples from the prior](samples.png)

![{{ held_out | capitalize }} examples, and their reconstructions below them](reconstructions.png)
{%- if tables %}

In the data's own units, `samples.csv` has draws from the model at the same latents as the picture, which shows
their means, and `reconstructions.csv` the examples of the picture, each with the mean of its reconstruction.
{%- endif %}

## Use

With `vaesearch` installed, in the data's own units (`model.safetensors`, `config.json`):

```python
import numpy as np
import vae

model = vae.load({{ folder | quoted }})
rows = np.zeros((1, {{ model.input_dim }}))  # rows as they stand in the source; put yours here
mu, logvar = model.encode(rows)
means, samples = model.reconstruct(rows), model.sample(16)
```
{%- if data.binarize == "threshold" %}

Rows are cut at half of their range, as the model's own were; what comes out are the probabilities of being above it.
{%- elif data.binarize != "none" %}

The model was trained on zeros and ones drawn from the values of a row, taken as probabilities.
{%- endif %}
{%- if data.support == "counts" %}

A row's size factor is its total over {{ mean_total | short }}, the mean total of the rows trained on: the mean of a
reconstruction has the size of its row, and samples have size factor 1.
{%- endif %}
{%- if files %}

The other files need no `vaesearch`. They take and give rows in the model's own space, flat and float32:

```python
import json
from pathlib import Path
import numpy as np

rows = np.zeros((1, {{ model.input_dim }}))  # rows as they stand in the source; put yours here
{%- if is_scaled %}
data = json.loads(Path({{ (folder ~ "/config.json") | quoted }}).read_text())["data"]
shift, factor = np.array(data["shift"]), np.array(data["factor"])
{%- if data.scale == "minmax" %}
x = ((rows - shift) / np.where(factor == 0, np.inf, factor)).clip(0, 1).astype(np.float32)
{%- else %}
x = ((rows - shift) / factor).astype(np.float32)
{%- endif %}
{%- else %}
x = rows.astype(np.float32)
{%- endif %}
{%- if data.binarize == "threshold" %}
x = (x > 0.5).astype(np.float32)
{%- endif %}
```
{%- if pt2 %}

{{ pt2 | join(" and ") }} (`torch.export`, any batch size):

```python
import torch

{% if "encoder.pt2" in files -%}
encoder = torch.export.load({{ (folder ~ "/encoder.pt2") | quoted }}).module()
mu, logvar = encoder(torch.from_numpy(x))
{% endif -%}
{% if "decoder.pt2" in files -%}
decoder = torch.export.load({{ (folder ~ "/decoder.pt2") | quoted }}).module()
means = decoder(torch.zeros(1, {{ model.latent_dim }})).detach().numpy()  # at a latent of your choice
{% endif -%}
```

Loading a `.pt2` file runs what somebody has put into it, such as a pickle: load none from people you don't trust.
`vae.load` reads none.
{%- endif %}
{%- if onnx %}

{{ onnx | join(" and ") }} (ONNX, any batch size):

```python
import onnxruntime

{% if "encoder.onnx" in files -%}
encoder = onnxruntime.InferenceSession({{ (folder ~ "/encoder.onnx") | quoted }})
mu, logvar = encoder.run(["mu", "logvar"], {"x": x})
{% endif -%}
{% if "decoder.onnx" in files -%}
decoder = onnxruntime.InferenceSession({{ (folder ~ "/decoder.onnx") | quoted }})
(means,) = decoder.run(["means"], {"z": np.zeros((1, {{ model.latent_dim }}), np.float32)})
{% endif -%}
```
{%- endif %}
{%- if is_scaled and data.binarize != "threshold" %}

In the data's own units again: `means * factor + shift`.
{%- endif %}

Each file was read again in a new process and held against the model on real rows
{%- for name, found in files.items() %}{{ ": " if loop.first else ", " }}`{{ name }}` is within {{ found.tolerance }}
{%- endfor %} of what it gives.
{%- endif %}
{%- for name, why in refused.items() %}

There is no `{{ name }}`: {{ why }}.
{%- endfor %}

## Versions

{% for name, value in versions.items() -%}
- {{ name }} {{ value }}
{% endfor %}
## Licence

None is given here (`license: unknown` at the top); whoever publishes the model chooses one, and the data may have a
say in it.
"""

_OUTPUTS = {
    "bernoulli": "whose outputs are logits",
    "continuous_bernoulli": "whose outputs are logits",
    "poisson": "whose outputs are log rates at size factor 1",
    "negative_binomial": "whose outputs are log means at size factor 1",
}
_VALUES = {"unit": "in [0, 1]", "real": "real numbers", "counts": "counts, never scaled"}
_DENSITIES = ("continuous_bernoulli", "gaussian")


def card(model: VAE, folder: str, config: Mapping[str, Any], data: Dataset) -> str:
    """The Markdown of README.md in `folder`. config: what config.json says; data: what the model was made on."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"quoted": _quoted, "file_name": _file_name, "slug": _slug}
    environment.filters["short"] = lambda value: f"{value:.6g}" if isinstance(value, float) else value
    metrics = config.get("metrics") or {}
    baseline = metrics.get("no_latent_nelbo")
    if baseline is None:
        baseline = model.likelihood.no_latent_nelbo(data.train, data.validation)
    files = config.get("files") or {}
    refit = (config.get("refit") or {}).get("result")
    held_out = refit["split"] if refit else "validation"
    value = metrics.get("test_nelbo" if held_out == "test" else "val_nelbo")
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
        title=_title(config, folder),
        measured={} if value is None else {"nelbo": value},
        refit=refit,
        held_out=held_out,
        is_scaled=data.shift is not None,
        pt2=[f"`{name}`" for name in files if name.endswith(".pt2")],
        onnx=[f"`{name}`" for name in files if name.endswith(".onnx")],
        tables=data.image_shape is None,
        num_parameters=f"{model.num_parameters:,}",
        fingerprint=data.fingerprint,
        baseline=baseline,
        folder=folder,
        objective=(config.get("train") or {}).get("objective", "elbo"),
        metrics=metrics,
        **{name: config.get(name) or {} for name in ("params", "versions", "files", "refused")},
        **{name: config.get(name) for name in ("study", "trial", "finals")},
    )


def _quoted(text: str) -> str:
    """A string of YAML and of Python: one of JSON, but for surrogates, by which that escapes what is beyond U+FFFF."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _file_name(source: str) -> str:
    """Where the data lie on the machine of whoever made the model is nobody else's affair."""
    return PurePath(source).name or source


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "data"


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


def _title(config: Mapping[str, Any], folder: str) -> str:
    return folder if config.get("study") is None else f"{config['study']}, trial {config['trial']}"


def _mixtures(model: VAE) -> dict[str, str]:
    """Layer -> the weights its activation has learned for the functions it mixes."""
    found = {}
    for net, index, block in model.blocks():
        weights = getattr(block.activation, "weights", None)
        if isinstance(weights, Mapping):
            found[f"{net} {index}"] = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
    return found
