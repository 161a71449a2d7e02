"""Test NLL of sixteen activations at two learning rates on the digits, beside a table measured with other code.

    python tests/benchmarks/digits.py                      # about six minutes on two cores
    python tests/benchmarks/digits.py silu relu --seeds 1

64-128-128-z10 and its mirror, dynamic binarisation, Adam at a constant learning rate, batches of 64, 60 epochs, no KL
warm-up; the mean over seeds of the NLL with 500 importance samples. The other code split the digits otherwise, and a
split of 180 images shifts every value by some tenths. What compares is the gain: how far below the NLL of a model
without latents on the same images. Rows that have collapsed compare with nothing.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import torch

import vae

IMPORTANCE_SAMPLES = 500
RATES = (1e-3, 3e-3)
REFERENCE_NO_LATENT = 27.35
REFERENCE = {  # activation -> NLL in nats at each of the rates
    "mish": (23.24, 23.01),
    "silu": (23.27, 23.05),
    "prelu": (23.34, 23.08),
    "elu": (23.29, 23.13),
    "leaky_relu(0.2)": (23.36, 23.15),
    "gelu": (23.36, 23.17),
    "tanh": (23.61, 23.23),
    "selu": (23.44, 23.27),
    "leaky_relu(0.01)": (23.53, 25.29),
    "relu": (23.56, 26.44),
    "softplus": (23.99, 24.38),
    "linear": (23.97, 24.03),
    "avg_pool": (24.00, 24.02),
    "dropout": (24.32, 24.33),
    "sigmoid": (25.09, 24.26),
    "exponential": (27.35, 27.35),
}


def measure(name: str, rate: float, seed: int) -> tuple[float, float, int, float]:
    """NLL of the test split and its gain in nats, active units, and the largest share of dead units in a layer."""
    torch.set_num_threads(1)
    data = vae.load_data(vae.DataConfig(source="digits"))
    activation, _, slope = name.rstrip(")").partition("(")
    own = {"leaky_relu_slope": float(slope)} if slope else {}
    model = vae.ModelConfig(input_dim=64, latent_dim=10, activation=activation, **own)
    train = vae.TrainConfig(learning_rate=rate, lr_schedule="constant", kl_warmup_epochs=0, max_epochs=60)
    trainer = vae.Trainer(model, train, data, seed=seed)
    last = list(trainer)[-1]
    estimate = vae.importance_weighted(trainer.result, torch.tensor(data.test), IMPORTANCE_SAMPLES, seed=0)
    gain = trainer.model.likelihood.no_latent_nelbo(data.train, data.test) - estimate.nll
    dead = max(layer.dead for layer in trainer.diagnose().diagnostics.layers)
    return estimate.nll, gain, last.active_units, dead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", nargs="*", choices=[[], *REFERENCE], default=[], metavar="ACTIVATION")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.activations or list(REFERENCE)
    jobs = list(product(names, RATES, range(arguments.seeds)))
    with ProcessPoolExecutor(arguments.processes) as pool:
        found = dict(zip(jobs, pool.map(measure, *zip(*jobs, strict=True)), strict=True))
    print(f"{'activation':18}{'lr':>8}{'NLL':>8}{'sd':>6}{'other':>8}{'gain':>7}{'other':>7}{'active':>8}{'dead':>6}")
    for name, (index, rate) in product(names, enumerate(RATES)):
        nll, gain, active, dead = np.transpose([found[name, rate, seed] for seed in range(arguments.seeds)])
        other = REFERENCE[name][index]
        print(
            f"{name:18}{rate:8.0e}{nll.mean():8.2f}{nll.std():6.2f}{other:8.2f}"
            f"{gain.mean():7.2f}{REFERENCE_NO_LATENT - other:7.2f}{active.mean():8.1f}{dead.mean():6.2f}"
        )


if __name__ == "__main__":
    main()
