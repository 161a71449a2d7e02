"""Samples a second of a training step, beside its matrix products alone and beside the usual loop.

    python tests/benchmarks/step.py                          # a minute and a half of one core
    python tests/benchmarks/step.py --rounds 2 --seconds 0.1 --networks 784-400-20 --batches 128
    python tests/benchmarks/step.py --to step.parquet        # every round's figures, too
    python tests/benchmarks/step.py --compile default --normalization layer    # by autograd, plain and compiled
    python tests/benchmarks/step.py --quality 5 --epochs 5   # what bfloat16 does to the validation value on MNIST

floor: the products of forward and backward in float32, by torch.mm into memory that is there already, and nothing
else; the two heads as one, and no gradient of the data. ours: all that `vae.training.Trainer` does in a step, from
gathering rows to AdamW. loop: what people write, a DataLoader that shuffles, a sigmoid with a cross-entropy, Adam's
defaults, a loss that is read in each step; without binarisation, clipping or a look at whether anything is finite.
With --compile also autograd and compiled: ours without a gradient by hand, and that by torch.compile.

A round takes each in turn, in one process, so that what else the machine does is shared; the ratio to the floor is
taken within a round, and its median and quartiles over the rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vae.config import CompileMode, DataConfig, ModelConfig, TrainConfig
from vae.data import Dataset, load_data
from vae.training import Trainer

NETWORKS = ("784-400-20", "784-200-200-50")
BATCHES = (128, 512)
PRECISIONS = ("float32", "bfloat16")
ROWS, VALIDATION_ROWS = 50_000, 1_000  # of the synthetic images
GREY = 0.1  # share of pixels that are neither 0 nor 1, about that of MNIST

Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--normalization", default="none")
    parser.add_argument("--compile", choices=get_args(CompileMode)[1:], help="a mode of torch.compile to time as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", help="a Parquet file for the figures of every round")
    parser.add_argument("--quality", type=int, metavar="SEEDS", help="train on MNIST in both precisions instead")
    parser.add_argument("--epochs", type=int, default=5, help="of --quality")
    parser.add_argument("--data-dir", help="where the files of MNIST are, for --quality")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = list(qualities(options) if options.quality else speeds(options))
    if options.to:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), options.to)


# ---- speed


def speeds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prints a table; the figures of every round."""
    data = images(ROWS, VALIDATION_ROWS)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.activation}, {options.rounds} rounds")
    print("network         batch  what               samples/s   of the floor (quartiles)   of the loop")
    for network, batch_size in itertools.product(options.networks, options.batches):
        steps = make_steps(model_of(network, options), batch_size, data, options.compile)
        for step in steps.values():
            step()  # a trainer that compiles makes those before it compile once more
        rounds = [
            {name: batch_size / time_of(step, options.seconds) for name, step in steps.items()}
            for _ in range(options.rounds + 1)
        ][1:]  # the first warms up
        for name in steps:
            speed = statistics.median(each[name] for each in rounds)
            ratios = [each[name] / each["floor"] for each in rounds]
            low, _, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
            faster = statistics.median(each[name] / each["loop"] for each in rounds)
            spread = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
            print(
                f"{network:<15} {batch_size:>5}  {name:<16} {speed:>11,.0f}   {spread:<24} {faster:>10.2f}", flush=True
            )
        for index, figures in enumerate(rounds):
            for name, speed in figures.items():
                yield {
                    "network": network,
                    "batch_size": batch_size,
                    "round": index,
                    "what": name,
                    "samples_per_s": speed,
                }


def model_of(network: str, options: argparse.Namespace) -> ModelConfig:
    input_dim, *hidden_dims, latent_dim = (int(width) for width in network.split("-"))
    return ModelConfig(
        input_dim=input_dim,
        hidden_dims=tuple(hidden_dims),
        latent_dim=latent_dim,
        activation=options.activation,
        normalization=options.normalization,
    )


def make_steps(model: ModelConfig, batch_size: int, data: Dataset, compiled: CompileMode | None) -> dict[str, Step]:
    steps = {"floor": floor(model, batch_size)}
    for precision in PRECISIONS:
        steps[f"ours, {precision}"] = ours(model, batch_size, precision, data)
        if compiled is not None:
            steps[f"autograd, {precision}"] = ours(model, batch_size, precision, data, "none")
            steps[f"compiled, {precision}"] = ours(model, batch_size, precision, data, compiled)
    return steps | {"loop": loop(model, batch_size, data)}


def floor(model: ModelConfig, batch_size: int) -> Step:
    widths = [model.input_dim, *model.hidden_dims]
    layers = [*pairwise(widths), (widths[-1], 2 * model.latent_dim), *pairwise([model.latent_dim, *widths[::-1]])]
    products = []
    for index, (fan_in, fan_out) in enumerate(layers):
        x, weight, grad = (
            torch.rand(*shape) for shape in ((batch_size, fan_in), (fan_out, fan_in), (batch_size, fan_out))
        )
        products += [(x, weight.t(), torch.empty_like(grad)), (grad.t(), x, torch.empty_like(weight))]
        if index:
            products.append((grad, weight, torch.empty_like(x)))

    def step() -> None:
        for left, right, result in products:
            torch.mm(left, right, out=result)

    return step


def ours(
    model: ModelConfig, batch_size: int, precision: Any, data: Dataset, by_autograd: CompileMode | None = None
) -> Step:
    """by_autograd: even where the gradient would be that by hand, in this mode of torch.compile."""
    config = TrainConfig(
        batch_size=batch_size, precision=precision, max_epochs=1_000_000, compile=by_autograd or "none"
    )
    trainer = Trainer(model, config, data, seed=0)
    if by_autograd is not None:
        trainer._by_hand = None
    trainer.model.train()

    def batches() -> Iterator[None]:
        """As in Trainer.train_epoch, but for the validation at its end."""
        with trainer._own_rng():
            while True:
                for rows in trainer._batches():
                    trainer._train_step(trainer._rows.index_select(0, rows))
                    yield

    return batches().__next__


def loop(model: ModelConfig, batch_size: int, data: Dataset) -> Step:
    """As people write it."""

    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [model.input_dim, *model.hidden_dims]
            self.encoder = nn.Sequential(*_layers(widths))
            self.mu = nn.Linear(widths[-1], model.latent_dim)
            self.logvar = nn.Linear(widths[-1], model.latent_dim)
            hidden = _layers([model.latent_dim, *widths[:0:-1]])
            self.decoder = nn.Sequential(*hidden, nn.Linear(widths[1], model.input_dim), nn.Sigmoid())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.encoder(x)
            mu, logvar = self.mu(hidden), self.logvar(hidden)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return self.decoder(z), mu, logvar

    def batches() -> Iterator[None]:
        usual = Usual()
        optimizer = torch.optim.Adam(usual.parameters())
        loader = DataLoader(TensorDataset(torch.from_numpy(data.train)), batch_size=batch_size, shuffle=True)
        total = 0.0
        while True:
            for (x,) in loader:
                optimizer.zero_grad()
                recon, mu, logvar = usual(x)
                bce = F.binary_cross_entropy(recon, x, reduction="sum")
                kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
                loss = bce + kl
                loss.backward()
                optimizer.step()
                total += loss.item()
                yield

    return batches().__next__


def _layers(widths: list[int]) -> list[nn.Module]:
    return [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())]


def images(rows: int, validation_rows: int) -> Dataset:
    """Grey images of 784 pixels without much sense: a fifth is white, and grey where it ends."""
    rng = np.random.default_rng(0)
    values = rng.random((rows + validation_rows, 784), dtype=np.float32)
    values = np.where(values < GREY, values / GREY, (values > 0.85).astype(np.float32)).round(2).astype(np.float32)
    validation = (values[rows:] > 0.5).astype(np.float32)
    return Dataset(
        config=DataConfig(source="synthetic.npy", binarize="dynamic"),
        train=values[:rows],
        validation=validation,
        test=validation,
        fingerprint="0" * 64,
        image_shape=(28, 28),
        columns=None,
        shift=None,
        factor=None,
    )


def time_of(step: Step, seconds: float) -> float:
    """Seconds a step, of as many as take about that long."""
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not steps:
        step()
        steps += 1
    return (time.perf_counter() - start) / steps


# ---- quality


def qualities(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prints final validation values in nats, in float32 and in bfloat16 from the same seed; those figures."""
    data = load_data(DataConfig(source="mnist", data_dir=options.data_dir))
    print(f"MNIST, {options.epochs} epochs, {options.activation}: validation nelbo in nats")
    print("network         batch   seed   float32  bfloat16  difference")
    for network, batch_size in itertools.product(options.networks, options.batches):
        differences = []
        for seed in range(options.quality):
            values = {name: final_value(network, batch_size, name, seed, data, options) for name in PRECISIONS}
            differences.append(values["bfloat16"] - values["float32"])
            figures = "".join(f"{value:>10.3f}" for value in (*values.values(), differences[-1]))
            print(f"{network:<15} {batch_size:>5} {seed:>6}{figures}", flush=True)
            for name, value in values.items():
                yield {"network": network, "batch_size": batch_size, "seed": seed, "what": name, "val_nelbo": value}
        print(f"{network:<15} {batch_size:>5} median{statistics.median(differences):>30.3f}")


def final_value(
    network: str, batch_size: int, precision: Any, seed: int, data: Dataset, options: argparse.Namespace
) -> float:
    config = TrainConfig(batch_size=batch_size, precision=precision, max_epochs=options.epochs, learning_rate=1e-3)
    return list(Trainer(model_of(network, options), config, data, seed=seed))[-1].val_nelbo


if __name__ == "__main__":
    main()
