"""A search for a VAE written after Ray's documentation: a function trainable, a DataLoader, OptunaSearch, ASHA.

    python ray_tune.py FOLDER --trials 20 --epochs 5 --out trials.jsonl [--search-rate] [--search [--start JSON]]

FOLDER holds train.npy (grey) and validation.npy (binarised). Where nothing is searched every trial is the same
configuration with another seed. A line of JSON for each trial goes to --out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 128


def make_activation(config: dict[str, Any]) -> nn.Module:
    activations = {
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(config["leaky_relu_slope"]),
        "prelu": nn.PReLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "elu": nn.ELU,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
    }
    return activations[config["activation"]]()


class VAE(nn.Module):
    def __init__(self, config: dict[str, Any], input_dim: int = 784, hidden_dim: int = 400) -> None:
        super().__init__()
        latent_dim = config["latent_dim"]
        self.encoder = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), make_activation(config), nn.Dropout(config["dropout"])
        )
        self.mu = nn.Linear(hidden_dim, latent_dim)
        self.logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            make_activation(config),
            nn.Dropout(config["dropout"]),
            nn.Linear(hidden_dim, input_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return torch.sigmoid(self.decoder(z)), mu, logvar


def loss_function(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Negative ELBO, summed over the batch."""
    bce = F.binary_cross_entropy(recon, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kl


def load_data(folder: str) -> tuple[DataLoader, DataLoader]:
    train = TensorDataset(torch.from_numpy(np.load(f"{folder}/train.npy")))
    validation = TensorDataset(torch.from_numpy(np.load(f"{folder}/validation.npy")))
    return DataLoader(train, batch_size=BATCH_SIZE, shuffle=True), DataLoader(validation, batch_size=BATCH_SIZE)


def train_vae(config: dict[str, Any]) -> None:
    started_at = time.time()
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    train_loader, validation_loader = load_data(config["data"])
    model = VAE(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    train_s = 0.0
    for _ in range(config["epochs"]):
        began = time.perf_counter()
        model.train()
        for (x,) in train_loader:
            x = torch.bernoulli(x)
            optimizer.zero_grad()
            recon, mu, logvar = model(x)
            loss = loss_function(recon, x, mu, logvar) / len(x)
            loss.backward()
            optimizer.step()
        model.eval()
        total = 0.0
        with torch.no_grad():
            for (x,) in validation_loader:
                recon, mu, logvar = model(x)
                total += loss_function(recon, x, mu, logvar).item()
        value = total / len(validation_loader.dataset)
        train_s += time.perf_counter() - began
        times = {"started_at": started_at, "reported_at": time.time(), "train_s": train_s}
        tune.report({"val_nelbo": value, **times})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search-rate", action="store_true", help="the learning rate alone, none stopped")
    parser.add_argument("--search", action="store_true", help="all of the space, poor trials stopped")
    parser.add_argument("--start", type=json.loads, help="with --search: the first configuration, as JSON")
    parser.add_argument("--results", type=Path, default=Path("ray_results"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    space = {
        "data": str(Path(args.data).resolve()),
        "epochs": args.epochs,
        "seed": tune.randint(0, 1_000_000),
        "activation": "relu",
        "leaky_relu_slope": 0.01,
        "dropout": 0.0,
        "learning_rate": 1e-3,
        "latent_dim": 16,
    }
    scheduler = None
    if args.search_rate:
        space["learning_rate"] = tune.loguniform(1e-4, 3e-3)
    if args.search:
        space |= {
            "seed": args.seed,
            "activation": tune.choice(["relu", "leaky_relu", "prelu", "tanh", "sigmoid", "elu", "silu", "gelu"]),
            "leaky_relu_slope": tune.loguniform(1e-3, 0.5),
            "dropout": tune.uniform(0.0, 0.5),
            "learning_rate": tune.loguniform(1e-4, 1e-2),
            "latent_dim": tune.lograndint(2, 65),
        }
        scheduler = ASHAScheduler(max_t=args.epochs, grace_period=1, reduction_factor=2)

    first = [{"leaky_relu_slope": 0.01, **args.start}] if args.start else None  # it takes no point without one
    ray.init(address="local", num_cpus=args.workers)
    tuner = tune.Tuner(
        tune.with_resources(train_vae, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="val_nelbo",
            mode="min",
            search_alg=OptunaSearch(seed=args.seed, points_to_evaluate=first),
            scheduler=scheduler,
            num_samples=args.trials,
        ),
        run_config=tune.RunConfig(name="vae", storage_path=str(args.results.resolve())),
    )
    results = tuner.fit()
    print("best:", results.get_best_result().metrics["val_nelbo"])
    with args.out.open("w") as file:
        for result in results:
            last = result.metrics
            record = {
                "started": last["started_at"],
                "ended": last["reported_at"],
                "train_s": last["train_s"],
                "epochs": last["training_iteration"],
                "value": last["val_nelbo"],
            }
            print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
