"""What a suggestion costs as a study grows, by this project's TPE and by Optuna's; and what a trial costs beside it.

    python tests/benchmarks/asks.py                               # half a minute, and as long again for the trials
    python tests/benchmarks/asks.py --sizes 50 100 --pairs 2 --trials 60       # to try it

Both samplers are asked in turn for the next suggestion of one study, whose trials are made up: three in ten run to
their end, the others stop early, a few violate a constraint. Then a searcher is led through a study of trivial
trials as Ray Tune would do it, with a ledger and without Ray, and what a trial takes is told as the study grows.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import TrialState, create_trial

from search.ledger import Ledger
from search.sampler import CONSTRAINTS, Arm, StudySearcher
from search.spec import Params, StudySpec
from search.tpe import BoundedTPESampler, Past

MAX_EPOCHS, STOPPED_AT, FULL_SHARE = 60, 8, 0.3
RAW = pa.schema([("what", pa.string()), ("trials", pa.int32()), ("turn", pa.int32()), ("ms", pa.float64())])


def made_up(arm: Arm, count: int) -> None:
    """Let a study have had so many trials."""
    rng = np.random.default_rng(0)
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        params = arm.space.suggest(draws.ask())
        value = 25 + abs(np.log10(params["learning_rate"]) + 2.5) + params["dropout"] + 0.2 * rng.standard_normal()
        is_full, is_bad = rng.random() < FULL_SHARE, rng.random() < 0.05
        chosen, distributions = arm.space.chosen(params)
        arm.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if is_full else TrialState.PRUNED,
                value=float(value),
                params=chosen,
                distributions=distributions,
                intermediate_values=dict.fromkeys(range(1, 1 + (MAX_EPOCHS if is_full else STOPPED_AT)), float(value)),
                constraints={name: float(is_bad and name == "collapsed") for name in CONSTRAINTS},
            )
        )


def asks(size: int, pairs: int) -> dict[str, list[float]]:
    """Milliseconds for one suggestion, by sampler."""
    arm = Arm(StudySpec(), 0, [], {})
    made_up(arm, size)
    options: dict[str, Any] = {"n_startup_trials": 10, "multivariate": True, "group": True, "constant_liar": True}
    past = Past()
    makers: dict[str, Callable[[int], optuna.samplers.TPESampler]] = {
        "ours": lambda seed: BoundedTPESampler(past, **options, seed=seed),
        "Optuna's": lambda seed: optuna.samplers.TPESampler(**options, seed=seed),
    }
    took: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(-1, pairs):
        for name, make in makers.items():
            arm.study.sampler = make(turn + 1)
            began = time.perf_counter()
            trial = arm.study.ask()
            arm.space.suggest(trial)
            if turn >= 0:
                took[name].append(1e3 * (time.perf_counter() - began))
            arm.study.tell(trial, state=TrialState.FAIL)
    return took


def trials(count: int) -> list[float]:
    """Milliseconds that the searcher has to do with each of so many trials of one epoch."""
    spec = StudySpec.load(None, {"budget.trials": count, "budget.max_epochs": 1})
    took = []
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        searcher = StudySearcher(spec, ledger, [], {}, [])
        for number in range(count):
            began = time.perf_counter()
            config = searcher.suggest(str(number))
            while config is None:  # the row of a suggestion is on its way to the disk
                config = searcher.suggest(str(number))
            searcher.on_trial_complete(str(number), result(config["params"]))
            ledger.tick()
            took.append(1e3 * (time.perf_counter() - began))
        ledger.flush()
        ledger.close()
    return took


def result(params: Params) -> dict[str, Any]:
    """What a worker has to say of a trial of one epoch."""
    value = 25 + abs(np.log10(params["learning_rate"]) + 2.5) + params["dropout"]
    figures = ("train_nelbo", "train_recon", "train_kl", "val_nelbo", "val_recon", "val_kl", "objective")
    epoch = dict.fromkeys((*figures, "grad_norm", "kl_weight", "wall_s", "samples_per_s"), float(value))
    counts = dict.fromkeys(("clipped_steps", "skipped_steps"), 0)
    unknown = dict.fromkeys(("reason", "step", "layer", "damaged", "node_id", "gpu_ids"))
    return {
        "epochs": [{"epoch": 1, "active_units": 4, **epoch, **counts}],
        "epoch": 1,
        "objective": float(value),
        "final": True,
        "status": "ok",
        "probes": [],
        "from_epoch": 0,
        "num_parameters": 1,
        "no_latent_nelbo": 30.0,
        "no_latent_objective": 30.0,
        "device": "cpu",
        "train_wall_s": 0.0,
        "done": True,
        **unknown,
    }


def spread(values: Sequence[float]) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 5000], help="trials of the study")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--trials", type=int, default=5000, help="that the searcher is led through")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the raw times, as Parquet")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows: list[tuple[str, int, int, float]] = []
    print("milliseconds for a suggestion, median [quartiles]")
    print(f"{'trials':>6}{'ours':>24}{'Optuna':>24}{'ratio of a pair':>18}")
    for size in asked.sizes:
        took = asks(size, asked.pairs)
        rows += [(name, size, turn, ms) for name, its in took.items() for turn, ms in enumerate(its)]
        ratios = [ours / theirs for ours, theirs in zip(*took.values(), strict=True)]
        columns = "".join(f"{spread(its):>24}" for its in took.values())
        print(f"{size:6}{columns}{np.median(ratios):18.2f}", flush=True)
    took = trials(asked.trials)
    rows += [("trial", number, 0, ms) for number, ms in enumerate(took)]
    print(f"\nmilliseconds of the searcher for a trial, suggestion and ledger included, {asked.trials} trials")
    fifths = np.array_split(np.array(took), 5)
    print(" ".join(f"{spread(fifth.tolist()):>18}" for fifth in fifths) + "   in each fifth of the study")
    print(f"the last fifth by the first: {np.sum(fifths[-1]) / np.sum(fifths[0]):.2f} in all")
    if asked.to is not None:
        pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=RAW), asked.to)


if __name__ == "__main__":
    main()
