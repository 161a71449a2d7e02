"""Make `curves.parquet`: learning curves of hundreds of configurations on the digits, each to its full budget.

    python tests/benchmarks/make_curves.py            # about 50 minutes on two cores; goes on where it was stopped

Every activation of the default space is trained with the same scrambled Sobol settings of the other parameters,
once for each length of the KL warm-up. `replay.py` replays searches over this table.
"""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from filling import fill
from scipy.stats import qmc

from search.spec import Range, StudySpec
from vae.data import load_data
from vae.training import Diverged, Trainer

TABLE = Path(__file__).with_name("curves.parquet")
RANGED = ("dropout", "learning_rate", "latent_dim", "leaky_relu_slope")
WRITE_EVERY = 16  # configurations

SCHEMA = pa.schema(
    [
        ("kl_warmup_epochs", pa.int16()),
        ("setting", pa.int16()),  # of the Sobol sequence, shared by the activations
        ("activation", pa.string()),
        ("leaky_relu_slope", pa.float64()),
        ("dropout", pa.float64()),
        ("learning_rate", pa.float64()),
        ("latent_dim", pa.int16()),
        ("no_latent_nelbo", pa.float64()),
        ("val_recon", pa.list_(pa.float32())),  # epoch by epoch; shorter than the budget if it diverged
        ("val_kl", pa.list_(pa.float32())),
        ("active_units", pa.list_(pa.int16())),
    ]
)


def settings(count: int, seed: int) -> list[dict[str, float]]:
    """Points of a scrambled Sobol sequence in the default space."""
    space = StudySpec().space
    points = qmc.Sobol(len(RANGED), rng=seed).random_base2((count - 1).bit_length())[:count]
    return [{name: at(getattr(space, name), u) for name, u in zip(RANGED, point, strict=True)} for point in points]


def at(range_: Range, u: float) -> float:
    """The point of a range at the share u of its length."""
    if range_.log:
        return float(range_.low * (range_.high / range_.low) ** u)
    return float(range_.low + (range_.high - range_.low) * u)


def configurations(count: int, warmups: list[int], seed: int) -> Iterator[dict[str, Any]]:
    for warmup in warmups:
        for number, setting in enumerate(settings(count, seed)):
            for activation in StudySpec().space.activation:
                yield {"kl_warmup_epochs": warmup, "setting": number, "activation": activation, **setting}


def train(**config: Any) -> dict[str, Any]:
    """A row of the table."""
    torch.set_num_threads(1)
    spec = StudySpec.model_validate({"train": {"kl_warmup_epochs": config["kl_warmup_epochs"]}})
    data = load_data(spec.data_config())
    params = {name: config[name] for name in ("activation", *RANGED)}
    params["latent_dim"] = round(params["latent_dim"])
    if params["activation"] != "leaky_relu":
        params["leaky_relu_slope"] = None
    given = {name: value for name, value in params.items() if value is not None}
    model, training = spec.model_config_for(given, data.row_shape), spec.train_config_for(given)
    trainer = Trainer(model, training, data, seed=config["setting"])
    curve: list[dict[str, Any]] = []
    with contextlib.suppress(Diverged):
        curve.extend(map(asdict, trainer))
    columns = {name: [epoch[name] for epoch in curve] for name in ("val_recon", "val_kl", "active_units")}
    return {**config, **params, "no_latent_nelbo": trainer.no_latent_nelbo, **columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--settings", type=int, default=50, help="of each activation")
    parser.add_argument("--warmups", type=int, nargs="+", default=[5, 20, 0], help="epochs of KL warm-up, each a table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TABLE)
    asked = parser.parse_args()
    wanted = list(configurations(asked.settings, asked.warmups, asked.seed))
    fill(asked.out, SCHEMA, ("kl_warmup_epochs", "setting", "activation"), wanted, train, write_every=WRITE_EVERY)


if __name__ == "__main__":
    main()
