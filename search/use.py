"""A trained model in use: what `sample`, `reconstruct`, `encode`, `decode`, `interpolate` and `traverse` do.

Rows come and go in the data's own units, as `vae.Model` takes and gives them; `search.model_output` writes them.
"""

import csv
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from search.environment import memory_bytes
from search.evaluation import Split, data_config_of
from search.layout import DEFAULT_STORAGE, STUDY_FILE
from search.model_output import ROW
from search.results import MODEL_FILE, open_study
from search.storage import fetch_tree, location, reason_of
from vae.config import DataConfig, InputError
from vae.data import fingerprint_of, split_rows
from vae.loaded import Model, load
from vae.readers import read_source

Progress = Callable[[int], None]
"""Told of so many rows more."""

SPLITS = (*get_args(Split), "all")
ALL = "all"
PICTURED_ROWS = 32  # of reconstructions, where nobody says how many

_MAX_SEED = 2**63 - 1
_LATENT_COLUMN = re.compile(r"(mu|z)_(\d+)")

# Shapes: N rows, X input features, Z latent dimensions, S steps.


class Rows(NamedTuple):
    """Rows of data in their own units."""

    label: str  # opens every error about them
    values: np.ndarray  # (N, X), or (N, H, W[, C]) for images

    def first(self, count: int | None) -> "Rows":
        """The first `count` alone; None: all."""
        if count is not None and count < 1:
            raise InputError(f"--rows must be at least 1, got {count}")
        return self._replace(values=self.values[:count])

    def one(self, row: int, flag: str) -> "Rows":
        """The row of that number alone, counted from 0; `flag` is what the error is about."""
        if not 0 <= row < len(self.values):
            raise InputError(f"{flag} {row}: {self.label} has {len(self.values):,} rows, counted from 0")
        return Rows(f"{self.label}: row {row}", self.values[row : row + 1])


class Latents(NamedTuple):
    """What `encode` has written, read back."""

    label: str
    row: np.ndarray  # (N,) which row of the data each is of; 0 to N - 1 where the file does not say
    z: np.ndarray  # (N, Z)


def open_model(model: str | Path, storage: str = DEFAULT_STORAGE) -> Model:
    """The model exported to a folder, or the best of the study of that name (or of that folder).

    Raises InputError as `model_folder` does, and for a damaged folder.
    """
    with model_folder(model, storage) as folder:
        return load(folder)


@contextmanager
def model_folder(model: str | Path, storage: str = DEFAULT_STORAGE) -> Iterator[Path]:
    """The folder of such a model; a copy for the time being where the study is behind a URL.

    Raises InputError where there is neither a model nor a study, and where the study has exported none.
    """
    folder = Path(model).expanduser()
    if (folder / MODEL_FILE).exists():
        yield folder
        return
    path = folder if (folder / STUDY_FILE).is_file() else location(storage) / str(model)
    if not (path / STUDY_FILE).is_file():
        raise InputError(
            f"{model}: neither the folder of an exported model (no {MODEL_FILE} in it) nor a study in {storage}; "
            f"vaesearch list shows the studies, --storage names another folder of them"
        )
    folders = open_study(path).model_folders()
    if not folders:
        raise InputError(f"{model}: the study has exported no model; that comes once a trial has trained to its end")
    with tempfile.TemporaryDirectory(prefix="vaesearch-") as scratch:
        yield fetch_tree(folders[0], Path(scratch) / "model")


def read_rows(
    model: Model,
    data: str | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rows:
    """Rows for `model`: of the data it was trained on, or of those that `data` names, in their own units.

    split: train, validation or test as the study split the data, or all rows in the order of the source. None: test of
    the model's own data, all of any others. Raises InputError for what cannot be read, or is of another width.
    """
    split = split or ("test" if data is None else ALL)
    if split not in SPLITS:
        raise InputError(f"--split {split}: known are {', '.join(SPLITS)}")
    config = _asked(model, data, data_dir)
    source = read_source(config)
    parts = [part for part in (source.train, source.test) if part is not None]
    for part in parts:
        _check_width(model, config.source, part)
    if split == ALL:
        return Rows(config.source, parts[0] if len(parts) == 1 else np.concatenate(parts))
    if data is None and fingerprint_of(source) != (model.config.get("data") or {}).get("fingerprint"):
        say(f"{config.source}: not the data the model was trained on; its {split} split is another one")
    train, validation, test = split_rows(source.label, [len(part) for part in parts], config)
    picked = {"train": parts[0][train], "validation": parts[0][validation], "test": parts[-1][test]}[split]
    return Rows(f"the {split} split of {config.source}", picked)


def sample(
    model: Model, n: int = 64, *, draws: bool = False, seed: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """(n, X) from the prior, in the data's own units: means of p(x|z), or draws from it."""
    if n < 1:
        raise InputError(f"-n must be at least 1, got {n}")
    memory = memory_bytes()
    if memory is not None and n * (model.latent_dim + 2 * model.input_dim) * 4 > memory:
        raise InputError(f"-n {n}: so many rows do not fit in memory; ask for fewer")
    with _counting(model.vae.outputs, progress):
        return model.sample(n, seed=_seed(seed), mean=not draws)


def encode(
    model: Model, rows: Rows, *, draws: bool = False, seed: int = 0, progress: Progress | None = None
) -> pa.Table:
    """The latents of each row: `row`, then mu_0.. and logvar_0.. of q(z|x), or z_0.. where draws from it are asked."""
    with _about(rows.label), _counting(model.vae.mu, progress):
        mu, logvar = model.encode(rows.values)
    columns = {ROW: np.arange(len(mu))}
    if draws:
        noise = np.random.default_rng(_seed(seed)).standard_normal(mu.shape, dtype=np.float32)
        return pa.table(columns | _numbered("z", mu + np.exp(logvar / 2) * noise))
    return pa.table(columns | _numbered("mu", mu) | _numbered("logvar", logvar))


def reconstruct(
    model: Model, rows: Rows, *, draws: bool = False, seed: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """(N, X) in the data's own units: means of p(x|z) at the mean of q(z|x), or draws of z and then of x.

    Means of counts keep a row's total, draws its size factor.
    """
    with _about(rows.label), _counting(model.vae.outputs, progress):
        return model.reconstruct(rows.values, generator=_generator(model, seed) if draws else None)


def decode(
    model: Model, latents: Latents, *, draws: bool = False, seed: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """(N, X) in the data's own units: means of p(x|z), or draws from it; of counts at size factor 1."""
    with _counting(model.vae.outputs, progress):
        return model.decode(latents.z, generator=_generator(model, seed) if draws else None)


def interpolate(model: Model, start: Rows, end: Rows, *, steps: int = 10, spherical: bool = False) -> np.ndarray:
    """start, end: a row each -> (S, X) in the data's own units, decoded on the way from the mean of the one's latents
    to that of the other's, both included; of counts at size factor 1.

    spherical: along a great circle, as the latents of high-dimensional data lie about a sphere (White 2016).
    """
    if steps < 2:
        raise InputError(f"--steps must be at least 2, the two rows, got {steps}")
    first, last = (_mean_of(model, row).astype(np.float64) for row in (start, end))
    shares = np.linspace(0, 1, steps)[:, None]
    z = _on_sphere(first, last, shares) if spherical else first + shares * (last - first)
    return model.decode(z)


def traverse(
    model: Model,
    *,
    dims: Sequence[int] | None = None,
    steps: int = 7,
    limit: float = 3.0,
    around: Rows | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One latent at a time from -limit to +limit, in standard deviations of the prior, the others held still.

    dims: which, counted from 0; None: all. around: a row at whose mean the others are held; None: at 0.
    Returns the latent of each point (N,), its value (N,) and what is decoded there (N, X), N = len(dims) * steps.
    """
    dims = range(model.latent_dim) if dims is None else dims
    bad = [dim for dim in dims if not 0 <= dim < model.latent_dim]
    if bad or not len(dims):
        raise InputError(
            f"--dims {','.join(map(str, bad or dims))}: the model has {model.latent_dim} latents, counted from 0"
        )
    if steps < 2:
        raise InputError(f"--steps must be at least 2, got {steps}")
    if not 0 < limit < math.inf:
        raise InputError(f"--range must be positive, got {limit:g}")
    centre = np.zeros(model.latent_dim, np.float32) if around is None else _mean_of(model, around)
    latent = np.repeat(np.asarray(dims), steps)
    value = np.tile(np.linspace(-limit, limit, steps), len(dims))
    z = np.tile(centre, (len(latent), 1))
    z[np.arange(len(latent)), latent] = value
    return latent, value, model.decode(z)


def read_latents(path: str | Path, latent_dim: int) -> Latents:
    """Latents from columns mu_0.. or z_0.. of a .csv or .parquet file, beside which may stand anything, or from an
    .npy array (N, Z), or (N, 2 Z) of mu beside logvar as `encode` writes. latent_dim: Z of the model.

    Raises InputError where there are none, numbers are missing among them, or they are another model's.
    """
    found = _read_latents(Path(path), latent_dim)
    z = found.z
    if z.ndim != 2 or z.shape[1] != latent_dim:
        what = f"{z.shape[1]} latents a row" if z.ndim == 2 else f"an array of shape {z.shape}"
        raise InputError(f"{found.label}: {what}, and the model takes {latent_dim}")
    if not len(z):
        raise InputError(f"{found.label}: there is no row in it")
    if z.dtype.kind not in "biuf":
        raise InputError(f"{found.label}: an array of {z.dtype} holds no real numbers")
    if not np.isfinite(z).all():
        row, dim = np.argwhere(~np.isfinite(z))[0]
        raise InputError(f"{found.label}: row {row}, latent {dim}, both counted from 0, is {z[row, dim]}")
    return found


# ---- what is read


def _asked(model: Model, data: str | None, data_dir: str | None) -> DataConfig:
    """How the rows are to be read and split; columns of a table by name, in the model's order."""
    own = (model.config.get("data") or {}).get("config") or {}
    if data is None:
        config = data_config_of("the model", model.config)
    else:
        same = {name: own[name] for name in ("validation_fraction", "test_fraction", "seed") if name in own}
        key = own.get("key") if data.lower().endswith(".npz") else None
        config = DataConfig(source=data, key=key, **same)
    suffix = Path(config.source).suffix.lower()
    columns = model.columns if suffix in (".csv", ".parquet") else None
    if suffix == ".parquet" and columns is None:  # a column of lists: what is in it has no names
        columns = own.get("columns")
    return replace(config, data_dir=data_dir, columns=columns)


def _read_latents(path: Path, latent_dim: int) -> Latents:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".csv", ".parquet"):
        raise InputError(f"--latents {path}: a file ending in .parquet, .csv or .npy is expected")
    if not path.is_file():
        raise InputError(f"--latents {path}: no such file")
    if suffix == ".npy":
        z = read_source(DataConfig(source=str(path))).train
        if z.ndim == 2 and z.shape[1] == 2 * latent_dim:
            z = z[:, :latent_dim]
        return Latents(str(path), np.arange(len(z) if z.ndim else 0), z)
    names = _column_names(path)
    found = [name for name in names if _LATENT_COLUMN.fullmatch(name)]
    kind = "mu" if any(name.startswith("mu_") for name in found) else "z"
    wanted = [f"{kind}_{i}" for i in range(sum(name.startswith(f"{kind}_") for name in found))]
    if not wanted:
        raise InputError(f"{path}: no columns mu_0, mu_1, ... or z_0, z_1, ...; it has {', '.join(names[:8])}")
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{path}: latents are missing: it has {len(wanted)} columns {kind}_*, but no {missing[0]}")
    if ROW in names:
        try:
            both = read_source(DataConfig(source=str(path), columns=(*wanted, ROW))).train
        except InputError:  # such as of rows that have names
            pass
        else:
            row = both[:, -1]
            is_whole = np.isfinite(row).all() and (row == np.floor(row)).all() and (np.abs(row) < 2**53).all()
            return Latents(str(path), row.astype(np.int64) if is_whole else np.arange(len(row)), both[:, :-1])
    z = read_source(DataConfig(source=str(path), columns=tuple(wanted))).train
    return Latents(str(path), np.arange(len(z)), z)


def _check_width(model: Model, label: str, values: np.ndarray) -> None:
    image = model.image_shape
    shapes = [(model.input_dim,)] + ([] if image is None else [image, (*image, 1)])
    if values.shape[1:] not in shapes:
        shape = " x ".join(map(str, values.shape[1:])) or "1"
        known = f"{model.input_dim}" + ("" if image is None else f", or {' x '.join(map(str, image))}")
        raise InputError(f"{label}: a row is of {shape} values, and the model takes {known}")
    if not len(values):
        raise InputError(f"{label}: there is no row in it")


def _column_names(path: Path) -> list[str]:
    from pyarrow.parquet import ParquetFile

    try:
        if path.suffix.lower() == ".parquet":
            with ParquetFile(path) as file:
                return file.schema_arrow.names
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return next((fields for fields in csv.reader(lines) if fields), [])
    except (OSError, ValueError, csv.Error) as error:  # Arrow's own are of these
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); write the file again") from None


# ---- latents


def _mean_of(model: Model, row: Rows) -> np.ndarray:
    """One row -> the mean of its latents, (Z,)."""
    with _about(row.label):
        return model.encode(row.values)[0][0]


def _on_sphere(first: np.ndarray, last: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """first, last (Z,), shares (S, 1) -> (S, Z). On a straight line where no great circle is told: about 0."""
    lengths = np.linalg.norm(first) * np.linalg.norm(last)
    angle = math.acos(np.clip(first @ last / lengths, -1, 1)) if lengths > 0 else 0.0
    if math.sin(angle) < 1e-6:
        return first + shares * (last - first)
    return (np.sin((1 - shares) * angle) * first + np.sin(shares * angle) * last) / math.sin(angle)


def _numbered(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{name}_{i}": column for i, column in enumerate(values.T)}


def _seed(seed: int) -> int:
    if not 0 <= seed <= _MAX_SEED:
        raise InputError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
    return seed


def _generator(model: Model, seed: int) -> torch.Generator:
    return torch.Generator(model.device).manual_seed(_seed(seed))


@contextmanager
def _about(label: str) -> Iterator[None]:
    """An error about rows says of which data they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{label}: {error}") from None


@contextmanager
def _counting(module: nn.Module, progress: Progress | None) -> Iterator[None]:
    """Tells how many rows have gone through a module of the model, batch by batch."""
    if progress is None:
        yield
        return

    def tell(_module: nn.Module, _given: Any, out: Tensor) -> None:
        progress(len(out))

    handle = module.register_forward_hook(tell)
    try:
        yield
    finally:
        handle.remove()
