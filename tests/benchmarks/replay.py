"""Replay searches over `curves.parquet`: this project's against hand-written Ray scripts, at equal numbers of epochs.

    python tests/benchmarks/make_curves.py                   # the table, once
    python tests/benchmarks/replay.py                        # all KL warm-ups in it; minutes on two cores
    python tests/benchmarks/replay.py --warmups 20 --workers 8 --set scheduler.grace_epochs=5
    python tests/benchmarks/replay.py --methods vaesearch --ahead 1     # a question about vaesearch alone

Nothing is trained: a suggested configuration has the curve of its nearest neighbour in the table. Workers are
simulated, each trial at its own speed, so trials overtake each other as they do on a cluster. What is compared:

    random       uniform draws; Ray's ASHA from epoch 0 on the value at beta = 1
    stock (a)    OptunaSearch and Ray's ASHA on the loss as it is trained: recon + weight(epoch) * KL
    stock (b)    the same on the value at beta = 1
    stock (c)    as (b), and the first trial is the default model, as it is in vaesearch
    vaesearch    StudySearcher and Asha as `search.study` wires them, on the value at beta = 1
    ahead K      with --ahead K: vaesearch with K suggestions made before there is a worker for them
    limit N      with --limit N: vaesearch whose TPE is shown N trials at most

A script hands over the trial with the lowest last value, as Ray's `get_best_result` does; vaesearch hands over
its best healthy trial with the full budget. The regret is the value at beta = 1 of the weights handed over, less
the best healthy value of the table; "re-trained" is that of their configuration after the full budget. Who has
nothing to hand over yet gets the value of a model without latents. No trial is begun that may not fit into the
budget, and the others are let end, as in a study; with `--cut` a search is broken off in its midst.
"""

import argparse
import heapq
import os
import random
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import optuna
import pyarrow.parquet as pq
from curves import MAX_EPOCHS, Curves, Floats, read_curves
from ray import tune
from ray.tune.schedulers.async_hyperband import _Bracket
from ray.tune.search.optuna import OptunaSearch

from search import tpe
from search.early_stopping import Asha
from search.events import StudyEvents
from search.ledger import Ledger
from search.results import ranked
from search.sampler import StudySearcher
from search.space import Space
from search.spec import StudySpec
from search.tables import TrialRow

TABLE = Path(__file__).with_name("curves.parquet")
METHODS = ("random", "stock (a)", "stock (b)", "stock (c)", "vaesearch")
BUDGETS = (240, 480, 960, 1440, 2880)  # epochs, all trials together
GRACE_EPOCHS, REDUCTION_FACTOR = 3, 3  # of the scripts: what vaesearch has by default
SPEED_SPREAD = 0.3  # of the logarithm of a trial's time per epoch
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


# ---- the searches


class HandedOver(NamedTuple):
    """The weights of a row of the table after an epoch."""

    row: int
    epoch: int


class Search(Protocol):
    """What the simulation asks of a search. Trials are numbered from 0."""

    def start(self, trial: int) -> int:
        """Suggest a configuration; its row in the table."""

    def goes_on(self, trial: int, row: int, epoch: int) -> bool:
        """Hear of an epoch that is done; False if the trial has ended with it."""

    def best(self) -> HandedOver | None:
        """What it would hand over now."""


class Script:
    """A hand-written Ray script: one result an epoch, and what Tune 2.60's controller does with it."""

    def __init__(self, curves: Curves, metric: Floats, searcher: OptunaSearch) -> None:
        searcher.set_search_properties("loss", "min", script_space())
        self.curves, self.metric, self.searcher = curves, metric, searcher
        self._asha: Any = _Bracket(GRACE_EPOCHS, MAX_EPOCHS, REDUCTION_FACTOR, 0)
        self._last: dict[int, tuple[float, HandedOver]] = {}

    def start(self, trial: int) -> int:
        params = self.searcher.suggest(str(trial))
        assert params is not None
        return self.curves.nearest(params)

    def goes_on(self, trial: int, row: int, epoch: int) -> bool:
        value = float(self.metric[row, epoch - 1])
        self._last[trial] = value, HandedOver(row, epoch)
        result = {"loss": value, "training_iteration": epoch}
        verdict = self._asha.on_result(SimpleNamespace(trial_id=trial), epoch, -value)
        if epoch < MAX_EPOCHS and verdict == "CONTINUE":
            self.searcher.on_trial_result(str(trial), result)
            return True
        self.searcher.on_trial_complete(str(trial), result)  # the one place where this result is heard of
        return False

    def best(self) -> HandedOver | None:
        """As `ResultGrid.get_best_result`: the lowest last value of all trials, whatever became of them."""
        return min((last for last in self._last.values() if np.isfinite(last[0])), default=(0, None))[1]


def script_space() -> dict[str, Any]:
    """The default space as a Ray script writes it: flat, because Tune's domains know no conditions."""
    return {
        "activation": tune.choice(list(StudySpec().space.activation)),
        "dropout": tune.uniform(0.0, 0.5),
        "learning_rate": tune.loguniform(1e-4, 1e-2),
        "latent_dim": tune.lograndint(2, 65),  # Tune leaves the upper end out
        "leaky_relu_slope": tune.loguniform(1e-3, 0.5),
    }


class VaeSearch(StudyEvents):
    """This project's search on a real ledger, with results as `search.trial` makes them: at rungs and at the end."""

    def __init__(self, curves: Curves, spec: StudySpec, folder: Path) -> None:
        self.curves, self.spec = curves, spec
        self.searcher = StudySearcher(spec, Ledger(folder), [], {}, [self])
        self._asha = Asha(spec.rungs(), spec.scheduler.reduction_factor)
        self._row_of: dict[int, int] = {}
        self._reported: dict[int, int] = {}  # trial -> epochs
        self._ended: list[TrialRow] = []

    def trial_ended(self, row: TrialRow) -> None:
        self._ended.append(row)

    def start(self, trial: int) -> int:
        while (config := self.searcher.suggest(str(trial))) is None:
            pass  # it is on its way to the disk
        self._row_of[trial] = self.curves.nearest(config["params"])
        return self._row_of[trial]

    def goes_on(self, trial: int, row: int, epoch: int) -> bool:
        diverged = bool(np.isnan(self.curves.value[row, epoch - 1]))
        if not diverged and epoch not in (*self.spec.rungs(), MAX_EPOCHS):
            return True
        result = self._result(trial, row, epoch, diverged)
        if not result["done"] and self._asha.may_go_on(trial, epoch, result["objective"]):
            self.searcher.on_trial_result(str(trial), result)
            return True
        self.searcher.on_trial_complete(str(trial), result)
        return False

    def best(self) -> HandedOver | None:
        leaders = ranked(self._ended)
        return HandedOver(self._row_of[leaders[0].trial], leaders[0].epochs) if leaders else None

    def _result(self, trial: int, row: int, epoch: int, diverged: bool) -> dict[str, Any]:
        last = epoch - diverged
        epochs = [self._epoch(row, e) for e in range(self._reported.get(trial, 0) + 1, last + 1)]
        self._reported[trial] = last
        value, active = self.curves.value[row, last - 1], self.curves.active_units[row, last - 1]
        final = last == MAX_EPOCHS
        collapsed = final and bool(active == 0 or value >= self.curves.no_latent)
        status = "diverged" if diverged else "collapsed" if collapsed else "ok"
        return {
            "epochs": epochs,
            "epoch": last,
            "objective": float(value),
            "final": final,
            "status": status,
            "reason": None if status == "ok" else status,
            "probes": [],
            "step": None,
            "layer": None,
            "from_epoch": 0,
            "damaged": None,
            "node_id": None,
            "gpu_ids": None,
            "num_parameters": 1,
            "no_latent_nelbo": self.curves.no_latent,
            "no_latent_objective": self.curves.no_latent,
            "device": "cpu",
            "train_wall_s": 0.0,
            "done": final or diverged,
        }

    def _epoch(self, row: int, epoch: int) -> dict[str, Any]:
        """An `EpochMetrics` as far as the table knows it."""
        recon, kl, active = (
            float(m[row, epoch - 1]) for m in (self.curves.recon, self.curves.kl, self.curves.active_units)
        )
        known = {"epoch": epoch, "val_nelbo": recon + kl, "val_recon": recon, "val_kl": kl, "active_units": int(active)}
        unknown = ("train_nelbo", "train_recon", "train_kl", "grad_norm", "kl_weight", "wall_s", "samples_per_s")
        return {**known, **dict.fromkeys(unknown, 0.0), "clipped_steps": 0, "skipped_steps": 0, "objective": recon + kl}


# ---- the simulation


@dataclass(frozen=True)
class Setting:
    """A replay but for its method."""

    table: Path
    warmup: int
    workers: int
    whole: bool  # no trial is begun that may not fit into the budget; else all end at once
    budgets: tuple[int, ...]  # ascending
    overrides: tuple[tuple[str, str], ...]  # of the study file of vaesearch
    seed: int


def replay(search: Search, setting: Setting, budgets: Sequence[int], ahead: int = 0) -> list[HandedOver | None]:
    """What the search would hand over after each budget, ascending; trials are at most those that `setting` lets in.

    ahead: suggestions that are made as soon as there are fewer, and wait for a worker.
    """
    rng = random.Random(setting.seed)
    speeds: list[float] = []  # of the trials, the same for every method
    waiting: deque[int] = deque()  # suggested: the rows of the next trials
    running: list[tuple[float, int, int, int]] = []  # when the next epoch is done; trial, row, epochs done
    handed_over: list[HandedOver | None] = []
    now, spent = 0.0, 0
    while len(handed_over) < len(budgets):
        while len(running) < setting.workers and (not setting.whole or fits(running, budgets[-1] - spent)):
            trial = len(speeds)
            speeds.append(rng.lognormvariate(0, SPEED_SPREAD))
            waiting.extend(search.start(number) for number in range(trial + len(waiting), trial + 1))
            heapq.heappush(running, (now + speeds[trial], trial, waiting.popleft(), 0))
            waiting.extend(search.start(trial + number) for number in range(1 + len(waiting), 1 + ahead))
        if spent == budgets[len(handed_over)] or not running:
            handed_over.append(search.best())
            continue
        now, trial, row, epochs = heapq.heappop(running)
        spent += 1
        if search.goes_on(trial, row, epochs + 1):
            heapq.heappush(running, (now + speeds[trial], trial, row, epochs + 1))
    return handed_over


def fits(running: list[tuple[float, int, int, int]], left: int) -> bool:
    """True if one more trial could be trained to its end, and those under way too."""
    return MAX_EPOCHS + sum(MAX_EPOCHS - epochs for *_, epochs in running) <= left


def make_search(method: str, curves: Curves, setting: Setting, folder: Path) -> Search:
    if method in ("vaesearch", "ahead", "limit"):
        given = {"seed": setting.seed, "train.kl_warmup_epochs": setting.warmup, "budget.trials": setting.budgets[-1]}
        return VaeSearch(curves, StudySpec.load(None, {**given, **dict(setting.overrides)}), folder)
    metric = curves.trained_loss if method == "stock (a)" else curves.value
    if method == "random":
        return Script(curves, metric, OptunaSearch(sampler=optuna.samplers.RandomSampler(setting.seed)))
    first = [{**Space(StudySpec().space).start(), "leaky_relu_slope": 0.01}] if method == "stock (c)" else None
    return Script(curves, metric, OptunaSearch(points_to_evaluate=first, seed=setting.seed))


def regrets(method: str, setting: Setting) -> Floats:
    """(3, budgets): regret of the weights, of their configuration re-trained; 1 where there is nothing yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves = read_curves(setting.table, setting.warmup)
    kind, _, figure = method.partition(" ")
    if kind not in ("ahead", "limit"):
        kind = method
    found: list[HandedOver | None] = []
    for budgets in [[budget] for budget in setting.budgets] if setting.whole else [setting.budgets]:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            with mock.patch.object(tpe, "LIMIT", int(figure) if kind == "limit" else tpe.LIMIT):
                search = make_search(kind, curves, setting, Path(folder))
                found += replay(search, setting, budgets, ahead=int(figure) if kind == "ahead" else 0)
    weights = [curves.value[f.row, f.epoch - 1] if f else curves.no_latent for f in found]
    retrained = [curves.final[f.row] if f else curves.no_latent for f in found]
    return np.array([weights, retrained, [curves.best + (f is None) for f in found]]) - curves.best


# ---- the tables


def spread(values: Floats) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def against(ours: Floats, theirs: Floats) -> str:
    """% of the seeds in which ours is better, equal, worse."""
    signs = np.sign((theirs - ours).round(9))
    return " ".join(f"{100 * (signs == sign).mean():3.0f}" for sign in (1, 0, -1))


def report(results: Mapping[str, Floats], budgets: tuple[int, ...]) -> None:
    """results: method -> (seeds, 3, budgets)."""
    rivals = [name for name in results if name not in ("random", "vaesearch")]
    heads = "".join(f"{name:>19}" for name in results)
    heads += "".join(f"{'than ' + name.removeprefix('stock '):>15}" for name in rivals)
    for measure, title in enumerate(("weights handed over", "their configuration re-trained")):
        print(f"\n{title}: regret; % of seeds in which vaesearch is better, equal, worse; seeds with nothing yet")
        print(f"epochs{heads}  nothing")
        for at, budget in enumerate(budgets):
            columns = {name: result[:, measure, at] for name, result in results.items()}
            shares = "".join(f"{against(columns['vaesearch'], columns[name]):>15}" for name in rivals)
            nothing = int(results["vaesearch"][:, 2, at].sum())
            print(
                f"{budget:6}"
                + "".join(f"{spread(column):>19}" for column in columns.values())
                + shares
                + f"{nothing:9}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--warmups", type=int, nargs="+", help="epochs of KL warm-up; all of the table by default")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="epochs, all trials together")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="simulated, of each search")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--ahead", type=int, nargs="+", default=[], metavar="K", help="also with K suggestions waiting")
    parser.add_argument("--limit", type=int, nargs="+", default=[], metavar="N", help="also with a TPE of N trials")
    parser.add_argument("--cut", action="store_true", help="break searches off in their midst")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of vaesearch's study file")
    asked = parser.parse_args()
    overrides = tuple((key, value) for key, _, value in (item.partition("=") for item in asked.set))
    budgets = tuple(sorted(asked.budgets))
    own = [f"{kind} {figure}" for kind in ("ahead", "limit") for figure in getattr(asked, kind)]
    methods = [*(method for method in METHODS if method in {*asked.methods, "vaesearch"}), *own]
    with ProcessPoolExecutor(asked.processes) as pool:
        for warmup in asked.warmups or sorted(set(pq.read_table(asked.table)["kl_warmup_epochs"].to_pylist())):
            curves = read_curves(asked.table, warmup)
            seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
            settings = [
                Setting(asked.table, warmup, asked.workers, not asked.cut, budgets, overrides, seed) for seed in seeds
            ]
            jobs = {method: [pool.submit(regrets, method, setting) for setting in settings] for method in methods}
            print(f"\nKL warm-up {warmup}: {len(curves.points)} configurations, best {curves.best:.2f} nats, ", end="")
            print(f"without latents {curves.no_latent:.2f}; {len(seeds)} seeds, {asked.workers} workers", end="")
            print(", cut" if asked.cut else "", "; median [quartiles]", sep="", flush=True)
            report({method: np.stack([job.result() for job in jobs[method]]) for method in methods}, budgets)


if __name__ == "__main__":
    main()
