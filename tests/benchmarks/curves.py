"""The table of `make_curves.py`, read for `replay.py`: a configuration has the curve of its nearest neighbour."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from search.spec import Params, StudySpec

# Shapes: N configurations, E epochs.

MAX_EPOCHS = 60
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """The configurations of one KL warm-up."""

    warmup: int
    rows_of: Mapping[str, NDArray[np.intp]]  # by activation
    points: Floats  # (N, 4) in the unit cube
    recon: Floats  # (N, E); NaN from where one diverged, also in the others
    kl: Floats  # (N, E)
    active_units: Floats  # (N, E)
    no_latent: float

    @cached_property
    def value(self) -> Floats:
        """(N, E) at beta = 1."""
        return self.recon + self.kl

    @cached_property
    def trained_loss(self) -> Floats:
        """(N, E) with the weight that the KL term has in training at the end of each epoch."""
        return self.recon + np.minimum(1, np.arange(1, MAX_EPOCHS + 1) / max(self.warmup, 1)) * self.kl

    @cached_property
    def final(self) -> Floats:
        """(N,) after the full budget; of a model without latents where it diverged."""
        return np.nan_to_num(self.value[:, -1], nan=self.no_latent)

    @cached_property
    def best(self) -> float:
        return float(self.final[(self.active_units[:, -1] > 0) & (self.final < self.no_latent)].min())

    def nearest(self, params: Params) -> int:
        """The row of the nearest configuration with the same activation."""
        rows = self.rows_of[params["activation"]]
        used = slice(4) if params["activation"] == "leaky_relu" else slice(3)
        return int(rows[np.square(self.points[rows] - unit_point(params))[:, used].sum(axis=1).argmin()])


def unit_point(params: Mapping[str, Any]) -> Floats:
    """(4,) dropout, learning rate, latent size and slope in the unit cube of the space; 0 for a slope that is unset."""
    space = StudySpec().space
    point = np.zeros(4)
    for at, name in enumerate(("dropout", "learning_rate", "latent_dim", "leaky_relu_slope")):
        if params.get(name) is not None:
            range_ = getattr(space, name)
            low, high, value = (np.log(x) if range_.log else x for x in (range_.low, range_.high, params[name]))
            point[at] = (value - low) / (high - low)
    return point


@cache
def read_curves(path: Path, warmup: int) -> Curves:
    table = pq.read_table(path)
    table = table.filter(pc.equal(table["kl_warmup_epochs"], warmup))
    activations = np.array(table["activation"].to_pylist())

    def matrix(name: str) -> Floats:
        lists = table[name].to_pylist()
        return np.array([values + [np.nan] * (MAX_EPOCHS - len(values)) for values in lists])

    return Curves(
        warmup=warmup,
        rows_of={name: np.flatnonzero(activations == name) for name in np.unique(activations)},
        points=np.stack([unit_point(row) for row in table.to_pylist()]),
        recon=matrix("val_recon"),
        kl=matrix("val_kl"),
        active_units=matrix("active_units"),
        no_latent=table["no_latent_nelbo"][0].as_py(),
    )
