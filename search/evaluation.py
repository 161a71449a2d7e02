"""What an exported model is worth on a split of data: its importance-weighted likelihood, and what it must beat.

The data are brought to the model, never the model to the data: rows are scaled as the model's own were.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch

from vae import export
from vae.config import DataConfig, InputError, Support
from vae.data import Dataset, Units, load_data
from vae.objective import ImportanceEstimate, importance_weighted

Split = Literal["train", "validation", "test"]

_MAX_SEED = 2**63 - 1  # of torch's generators
_BINARIZE_STREAM = 4  # of rows that are not the model's own; those have theirs in vae.data

# Shapes: N rows, X input features.


@dataclass(frozen=True, eq=False, slots=True)
class ModelEvaluation:
    """What `vaesearch evaluate` tells. Values are means over the rows, in nats per example."""

    model: str
    study: str | None
    trial: int | None
    data: str
    is_own_data: bool  # those the model was made on
    was_trained_on: bool  # whether the model has seen these very rows in training
    train_objective: str  # vae_gan: the values are bounds that were not trained for
    split: Split
    rows: int
    importance_samples: int
    seed: int
    nll: float  # importance-weighted
    nll_se: float  # standard error over the rows; NaN for one
    nelbo: float
    inference_gap: float  # nelbo - nll
    effective_samples: float  # median over the rows
    no_latent_nelbo: float | None  # on the same rows, of the fit to the training rows; None for data of others
    wall_s: float  # of the estimate alone
    estimate: ImportanceEstimate  # row by row

    def document(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "estimate"}

    def per_image(self) -> pa.Table:
        """A line for each row of the split, in its order: values of two models can be held against each other."""
        return pa.table(
            {
                "row": np.arange(self.rows),
                "nll": -self.estimate.log_likelihood,
                "nelbo": -self.estimate.elbo,
                "effective_samples": self.estimate.effective_samples,
            }
        )


class _Rows(NamedTuple):
    x: np.ndarray  # (N, X) of the split, as the model takes them
    train: np.ndarray | None  # the model's own training rows; None for data of others


def evaluate_model(
    path: str | Path,
    *,
    name: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    split: str = "test",
    importance_samples: int = 5000,
    seed: int = 0,
    rows: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> ModelEvaluation:
    """The model exported to `path`, on the data it was made on or on those that `data` names.

    name: what it is called in what is told, if not by its path. rows: only so many, the first. `say` gets warnings,
    `count` how many rows of all are done. Raises InputError for
    what the user can mend, and ArithmeticError if the model gives a row no finite likelihood.
    """
    for flag, value, least in (("importance-samples", importance_samples, 1), ("seed", seed, 0), ("rows", rows, 1)):
        if value is not None and value < least:
            raise InputError(f"--{flag} must be at least {least}, got {value}")
    if seed > _MAX_SEED:
        raise InputError(f"--seed must be at most {_MAX_SEED}, got {seed}")
    if split not in get_args(Split):
        raise InputError(f"--split {split}: known are {', '.join(get_args(Split))}")
    stored = export.read_config(path)
    model = export.load(path, config=stored)
    config = data_config_of(path, stored)
    x, train = _load(path, stored, config, data, data_dir, split, model.config.input_dim, say)
    x = np.ascontiguousarray(x[:rows])
    start = time.perf_counter()
    estimate = importance_weighted(
        model, torch.from_dlpack(x), importance_samples, seed, progress=lambda done: count(done, len(x))
    )
    wall_s = time.perf_counter() - start
    source = config.source if data is None else data
    bad = np.flatnonzero(~(np.isfinite(estimate.log_likelihood) & np.isfinite(estimate.elbo)))
    if len(bad):
        value = estimate.elbo[bad[0]]
        raise ArithmeticError(f"{path}: the bound of row {bad[0]} of the {split} split of {source} is {value}")
    return ModelEvaluation(
        model=name or str(path),
        study=stored.get("study"),
        trial=stored.get("trial"),
        data=source,
        train_objective=(stored.get("train") or {}).get("objective", "elbo"),
        is_own_data=train is not None,
        was_trained_on=train is not None and split in _trained_on(stored),
        split=split,  # type: ignore[arg-type]
        rows=len(x),
        importance_samples=importance_samples,
        seed=seed,
        nll=estimate.nll,
        nll_se=estimate.nll_se,
        nelbo=estimate.nelbo,
        inference_gap=estimate.inference_gap,
        effective_samples=float(np.median(estimate.effective_samples)),
        no_latent_nelbo=None if train is None else model.likelihood.no_latent_nelbo(train, x),
        wall_s=wall_s,
        estimate=estimate,
    )


def evaluation_lines(evaluation: ModelEvaluation) -> list[str]:
    """For people."""
    what = "" if evaluation.is_own_data else " (not the data it was made on)"
    if evaluation.was_trained_on and evaluation.split != "train":
        what = " (which it was trained on: no measure of rows that it has not seen)"
    error = "" if math.isnan(evaluation.nll_se) else f" ± {evaluation.nll_se:.3f}"
    lines = [
        f"{evaluation.model} on the {evaluation.split} split of {evaluation.data}{what}",
        f"{evaluation.rows:,} rows, {evaluation.importance_samples:,} importance samples each, seed {evaluation.seed}, "
        f"{evaluation.wall_s:.1f} s; nats per example",
        "",
        f"nll            {evaluation.nll:10.3f}{error}",
        f"nelbo          {evaluation.nelbo:10.3f}",
        f"inference gap  {evaluation.inference_gap:10.3f}",
    ]
    if evaluation.no_latent_nelbo is not None:
        lines.append(f"no latent      {evaluation.no_latent_nelbo:10.3f}")
    if evaluation.train_objective != "elbo":
        lines += ["", "trained adversarially: the bounds are not what was trained for and rank with no other model's"]
    return lines


# ---- the rows


def _trained_on(stored: dict[str, Any]) -> list[str]:
    """The splits of its own data; a refit may have been trained on more than one."""
    plan = (stored.get("refit") or {}).get("plan")
    return str(plan.get("train_on", "train") if isinstance(plan, dict) else "train").split("+")


def data_config_of(path: str | Path, stored: dict[str, Any]) -> DataConfig:
    try:
        return DataConfig(**stored["data"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {export.CONFIG} does not say which data the model was made on: {error}") from None


def _load(
    path: str | Path,
    stored: dict[str, Any],
    config: DataConfig,
    source: str | None,
    data_dir: str | None,
    split: str,
    input_dim: int,
    say: Callable[[str], None],
) -> _Rows:
    """The split of the model's own data, wherever they are now, or of other data as if they were of its kind."""
    fingerprint = stored["data"].get("fingerprint")
    asked = dataclasses.replace(config, source=source or config.source, data_dir=data_dir)
    if split == "train" and config.binarize == "dynamic":
        asked = dataclasses.replace(asked, binarize="static")  # once, so that a value comes again; no other row changes
    is_named = asked.source == config.source
    if is_named:
        own = load_data(asked)
        if own.fingerprint == fingerprint:
            return _own(own, split)
    suffix = Path(asked.source).suffix.lower()
    asked = dataclasses.replace(
        asked,
        key=config.key if suffix == ".npz" else None,
        columns=_columns(stored, config, suffix),
    )
    other = load_data(_as_they_are(asked))
    if other.fingerprint == fingerprint:  # the same under another name, or columns in another order
        return _own(load_data(asked), split)
    if other.input_dim != input_dim:
        raise InputError(f"{path}: the model takes {input_dim} features and {asked.source} has {other.input_dim}")
    if is_named:
        say(
            f"{asked.source}: not the data the model was made on (SHA-256 {str(fingerprint)[:12]}..., these have "
            f"{other.fingerprint[:12]}...); they are scaled as those were"
        )
    return _Rows(_as_own(path, export.units_of(stored), _split(other, split), asked, say), None)


def _columns(stored: dict[str, Any], config: DataConfig, suffix: str) -> tuple[str, ...] | None:
    """Those to read of a file, in the model's order."""
    named = stored["data"].get("columns")
    if suffix == ".parquet" and named is None:  # a column of lists: what is in it has no names
        return config.columns
    return named if suffix in (".csv", ".parquet") else None


def _own(data: Dataset, split: str) -> _Rows:
    return _Rows(_split(data, split), data.train)


def _split(data: Dataset, split: str) -> np.ndarray:
    return {"train": data.train, "validation": data.validation, "test": data.test}[split]


def _as_they_are(config: DataConfig) -> DataConfig:
    """For the same rows in the data's own units."""
    support: Support = "counts" if config.support == "counts" else "real"
    return dataclasses.replace(config, image_shape=None, support=support, scale="none", binarize="none")


def _as_own(
    path: str | Path, units: Units, own: np.ndarray, config: DataConfig, say: Callable[[str], None]
) -> np.ndarray:
    """(N, X) in the data's own units -> as the model's rows were made of its own data."""
    if config.support == "unit" and units.factor is not None and not units.clip and own.max() <= 1:
        say(f"{config.source}: no value is above 1, and the model's data went up to {units.factor.max():g}")
    x = units.scale(own)
    if config.support == "unit" and (x.min() < 0 or x.max() > 1):
        raise InputError(
            f"{config.source}: values from {own.min():g} to {own.max():g} are outside [0, 1] in the model's scale; "
            f"bring the data into the range of {path}'s own"
        )
    if config.binarize == "none":
        return x
    if config.binarize == "threshold":
        return (x > 0.5).astype(np.float32)
    generator = np.random.default_rng((config.seed, _BINARIZE_STREAM))
    return (generator.random(x.shape, dtype=np.float32) < x).astype(np.float32)
