"""Make `seeds.parquet`: one configuration trained with many seeds of several activations, scored image by image.

    python tests/benchmarks/make_seeds.py    # about twelve minutes on one core; goes on where it was stopped

64-64-z8 and its mirror on the digits, dynamic binarisation, 40 epochs at one learning rate for all; what `verdict.py`
draws its studies from. The value is -log p(x) of each test image in nats, with importance samples whose noise is the
same for all models. A seed sets first weights, order and noise for every activation alike, so rows of one seed pair.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from filling import fill

import vae
from vae.config import ActivationName

TABLE = Path(__file__).with_name("seeds.parquet")
SEEDS: dict[ActivationName, int] = {
    "relu": 120,
    "tanh": 40,
    "gelu": 40,
    "leaky_relu": 40,
    "sigmoid": 40,
    "linear": 40,
}  # from 0
IMPORTANCE_SAMPLES = 200
EPOCHS = 40
WRITE_EVERY = 20  # models
SCHEMA = pa.schema(
    [
        ("activation", pa.string()),
        ("seed", pa.int32()),
        ("active_units", pa.int32()),
        ("wall_s", pa.float32()),  # of training
        ("nll", pa.list_(pa.float32())),  # nats, one a test image
    ]
)


def train(activation: ActivationName, seed: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    data = vae.load_data(vae.DataConfig(source="digits"))
    model = vae.ModelConfig(input_dim=64, latent_dim=8, hidden_dims=(64,), activation=activation)
    config = vae.TrainConfig(learning_rate=3e-3, lr_schedule="cosine", kl_warmup_epochs=5, max_epochs=EPOCHS)
    trainer = vae.Trainer(model, config, data, seed=seed)
    epochs = list(trainer)
    estimate = vae.importance_weighted(trainer.result, torch.tensor(data.test), IMPORTANCE_SAMPLES, seed=0)
    return {
        "activation": activation,
        "seed": seed,
        "active_units": epochs[-1].active_units,
        "wall_s": sum(epoch.wall_s for epoch in epochs),
        "nll": -estimate.log_likelihood,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    wanted = [{"activation": name, "seed": seed} for name, seeds in SEEDS.items() for seed in range(seeds)]
    key = ("activation", "seed")
    fill(asked.out, SCHEMA, key, wanted, train, write_every=WRITE_EVERY, processes=asked.processes)


if __name__ == "__main__":
    main()
