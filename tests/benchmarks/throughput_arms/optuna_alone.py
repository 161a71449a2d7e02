"""A search for a VAE with Optuna alone: start it once a core, processes share the study in the journal.

    python optuna_alone.py FOLDER --trials 20 --epochs 5 --out trials.jsonl [--search-rate] [--step vae]

--trials are those of all processes, which share one budget. FOLDER as in ray_tune.py. --step own: network and loop as
one writes them; --step vae: those of vae.training.Trainer, on the rows.npy of FOLDER, so that what is left of the
difference to floor.py is Optuna's. Where nothing is searched every trial is the same configuration with another seed.
A line of JSON for each trial goes to --out.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor, nn

BATCH_SIZE = 128


class VAE(nn.Module):
    def __init__(self, latent_dim: int, dropout: float, input_dim: int = 784, hidden_dim: int = 400) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.mu = nn.Linear(hidden_dim, latent_dim)
        self.logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, input_dim)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        return self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)), mu, logvar


def loss_function(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Negative ELBO, summed over the batch."""
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def own_training(args: argparse.Namespace) -> Callable[[int, float], tuple[float, float]]:
    """Seed, learning rate -> the last validation value and the seconds of all epochs."""
    train = torch.from_numpy(np.load(f"{args.data}/train.npy"))
    validation = torch.from_numpy(np.load(f"{args.data}/validation.npy"))

    def train_vae(seed: int, rate: float) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = VAE(latent_dim=16, dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        began = time.perf_counter()
        for _ in range(args.epochs):
            model.train()
            for rows in torch.randperm(len(train)).split(BATCH_SIZE):
                x = torch.bernoulli(train[rows])
                optimizer.zero_grad()
                logits, mu, logvar = model(x)
                loss = loss_function(logits, x, mu, logvar) / len(x)
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                logits, mu, logvar = model(validation)
                value = loss_function(logits, validation, mu, logvar).item() / len(validation)
        return value, time.perf_counter() - began

    return train_vae


def training_of_vae(args: argparse.Namespace) -> Callable[[int, float], tuple[float, float]]:
    from floor import load, trained

    data = load(args.data)
    return lambda seed, rate: trained(data, args.epochs, seed, rate)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--trials", type=int, default=20, help="of all processes")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--search-rate", action="store_true", help="the learning rate")
    parser.add_argument("--step", choices=["own", "vae"], default="own")
    parser.add_argument("--journal", type=Path, default=Path("journal.log"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    train_vae = own_training(args) if args.step == "own" else training_of_vae(args)

    def objective(trial: optuna.Trial) -> float:
        if trial.number >= args.trials:  # numbers are given out by the journal: all are taken
            study.stop()
            raise optuna.TrialPruned
        started = time.time()
        rate = trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True) if args.search_rate else 1e-3
        value, train_s = train_vae(trial.number, rate)
        record = {"started": started, "ended": time.time(), "train_s": train_s, "epochs": args.epochs, "value": value}
        with args.out.open("a") as file:
            print(json.dumps(record), file=file)
        return value

    storage = JournalStorage(JournalFileBackend(str(args.journal)))
    study = optuna.create_study(study_name="vae", storage=storage, direction="minimize", load_if_exists=True)
    study.optimize(objective)


if __name__ == "__main__":
    main()
