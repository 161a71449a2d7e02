"""The least that trials can take: vae.training.Trainer in bare processes, one list of trials, nothing stored.

    python floor.py FOLDER --trials 20 --epochs 5 --out trials.jsonl

FOLDER holds rows.npy, as `vaesearch run --data` reads it. Every trial is the same configuration with another seed;
processes take the next number as they come free. A line of JSON for each trial goes to --out.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

BATCH_SIZE = 128


def load(folder: str) -> Any:
    import vae

    return vae.load_data(vae.DataConfig(source=f"{folder}/rows.npy"))


def trained(data: Any, epochs: int, seed: int, learning_rate: float = 1e-3) -> tuple[float, float]:
    """The last validation value and the seconds of all epochs: training and validation."""
    import vae

    model = vae.ModelConfig(input_dim=data.input_dim, latent_dim=16, hidden_dims=(400,), activation="relu", dropout=0.0)
    train = vae.TrainConfig(
        learning_rate=learning_rate, batch_size=BATCH_SIZE, max_epochs=epochs, kl_warmup_epochs=min(5, epochs // 6)
    )
    history = list(vae.Trainer(model, train, data, seed=seed))
    return history[-1].val_nelbo, sum(metrics.wall_s for metrics in history)


def work(args: argparse.Namespace, taken: Any) -> None:
    import torch

    torch.set_num_threads(1)
    data = load(args.data)
    while (trial := take(taken)) < args.trials:
        started = time.time()
        value, train_s = trained(data, args.epochs, seed=trial)
        record = {"started": started, "ended": time.time(), "train_s": train_s, "epochs": args.epochs, "value": value}
        with args.out.open("a") as file:
            print(json.dumps(record), file=file)


def take(taken: Any) -> int:
    """The next trial's number; `taken` is shared."""
    with taken.get_lock():
        taken.value += 1
        return taken.value - 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    workers = [context.Process(target=work, args=(args, taken)) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
