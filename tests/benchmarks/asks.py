"""What a suggestion costs as a study grows, by this project's TPE and by Optuna's; and what a trial costs beside it.

    python tests/benchmarks/asks.py                               # half a minute, and some minutes for the trials
    python tests/benchmarks/asks.py --sizes 50 100 --pairs 2 --trials 60       # to try it

Both samplers are asked in turn for the next suggestion of one study, whose trials are made up: three in ten run to
their end, the others stop early, a few violate a constraint. Then a searcher is led through a study of trivial
trials as Ray Tune would do it, with a ledger and without Ray, and what a trial takes is told as the study grows: with
one worker, which waits for each suggestion, and with two, for which they are made ahead. What a free worker waits for
is told beside all that the driver does: of trials that take no time that is still the disk, but not the sampler.
"""

import argparse
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import TrialState, create_trial

from search.arm import CONSTRAINTS, Arm
from search.ledger import Ledger
from search.sampler import StudySearcher
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


class Led(NamedTuple):
    """Milliseconds, for each trial of a study."""

    all_ms: list[float]  # that the searcher has to do with it
    wait_ms: list[float]  # from the end of the trial before on its worker to its configuration


def trials(count: int, workers: int) -> Led:
    """Lead the searcher through so many trials of one epoch; with several workers it suggests ahead."""
    spec = StudySpec.load(None, {"budget.trials": count, "budget.max_epochs": 1})
    led = Led([], [])
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        searcher = StudySearcher(spec, ledger, [], {}, [])
        under_way: deque[tuple[str, Params]] = deque()
        for number in range(count):
            began = time.perf_counter()
            if len(under_way) == workers:
                its_id, params = under_way.popleft()
                searcher.on_trial_complete(its_id, result(params))
            while (config := searcher.suggest(str(number))) is None:  # the suggestion's row is on its way to the disk
                pass
            led.wait_ms.append(1e3 * (time.perf_counter() - began))
            under_way.append((str(number), config["params"]))
            ledger.tick()
            searcher.ask_ahead()
            led.all_ms.append(1e3 * (time.perf_counter() - began))
        ledger.flush()
        ledger.close()
    return led


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
    print(
        f"\nmilliseconds of the searcher for a trial, suggestion and ledger included, in each fifth of {asked.trials}"
    )
    for workers in (1, 2):
        for what, took in trials(asked.trials, workers)._asdict().items():
            rows += [(f"{what}, {workers} workers", number, 0, ms) for number, ms in enumerate(took)]
            fifths = np.array_split(np.array(took), 5)
            columns = " ".join(f"{spread(fifth.tolist()):>18}" for fifth in fifths)
            name = {"all_ms": "in all", "wait_ms": "waited for"}[what]
            last = np.sum(fifths[-1]) / np.sum(fifths[0])
            print(f"{workers} at once, {name:10} {columns}   the last by the first {last:.2f}", flush=True)
    if asked.to is not None:
        pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=RAW), asked.to)


if __name__ == "__main__":
    main()
