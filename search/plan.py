"""`vaesearch run --dry-run`: what a study would do, where, and about what it would take. Nothing is written."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster.resources import Packing
from cluster.runtime import ray_runtime
from search.checks import check_space, concurrency_of, disk_budget_bytes, largest_num_parameters, prepared
from search.early_stopping import EarlyStopping
from search.finalists import missing_runs
from search.progress import duration
from search.results import Study
from search.space import Space
from search.spec import Entry, Range, StudySpec, values_of
from search.storage import free_bytes
from vae.data import Dataset, likelihood_advice

SIMULATIONS, SIMULATED_TRIALS = 20, 500  # of early stopping
TIMED_BATCHES = 20  # of the training that the estimate rests on, after as many that are not timed


@dataclass(frozen=True)
class Plan:
    """Of a study. Epochs are of all trials together, of those still to run; times are estimates."""

    study: str
    folder: str
    data: str
    features: int
    rows: dict[str, int]  # of each split
    model: str
    num_parameters: int  # of the largest model
    searched: dict[str, str]  # parameter -> its choices or range
    fixed: dict[str, str]
    trials: int
    trials_ended: int  # of an earlier run, which are not made again
    max_epochs: int
    rungs: list[int]  # epochs at which a trial may be stopped
    concurrency: int
    cpus_per_trial: int
    gpus_per_trial: float
    epochs_at_most: int
    epochs_expected: int  # with early stopping of trials that differ by luck alone; a good sampler's take more
    final_runs: int  # still to be made of each activation's best, all epochs each, at the most
    epoch_s: float | None  # of the first configuration, one alone on this machine; None: it diverged
    seconds_at_most: float | None
    seconds_expected: float | None
    why_untimed: str | None
    disk_bytes: int  # at the most
    free_bytes: int | None  # None: nobody can tell
    advice: str | None  # on the likelihood


def plan_study(spec: StudySpec, *, address: str | None = None, extend: int = 0) -> Plan:
    """What `run_study` with these arguments would do. Raises InputError where it would.

    It starts Ray, or joins the cluster at `address`, to see what fits; and trains for a second or two, on a CPU of
    this machine, since a GPU may be busy.
    """
    begin = prepared(spec, address=address, extend=extend)
    spec, data, stored = begin.spec, begin.data, begin.stored
    concurrency, gpus = _placement(spec, address, data)
    check_space(spec, data, concurrency)
    ended = 0 if stored is None else stored.summary().ended
    to_come = max(0, spec.budget.trials - ended)
    num_final_runs = _final_runs(spec, None if to_come else stored)
    final_epochs = num_final_runs * spec.budget.max_epochs
    at_most = to_come * spec.budget.max_epochs + final_epochs
    expected = _expected_epochs(spec, range(ended, spec.budget.trials)) + final_epochs
    epoch_s, why_untimed = _epoch_seconds(spec, data)
    num_parameters = largest_num_parameters(spec, data)
    space = Space(spec.space)
    hidden = "-".join(map(str, spec.model.hidden_dims)) or "none"
    return Plan(
        study=spec.name,
        folder=str(spec.folder),
        data=spec.data.source,
        features=data.input_dim,
        rows={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        model=f"{spec.model.body}, hidden {hidden}, {spec.model.likelihood}",
        num_parameters=num_parameters,
        searched={name: _entry_text(getattr(spec.space, name)) for name in space.distributions},
        fixed={name: _entry_text(value) for name, value in space.constants.items()},
        trials=spec.budget.trials,
        trials_ended=ended,
        max_epochs=spec.budget.max_epochs,
        rungs=spec.rungs() if spec.scheduler.kind == "asha" else [],
        concurrency=concurrency,
        cpus_per_trial=spec.resources.cpus_per_trial,
        gpus_per_trial=gpus,
        epochs_at_most=at_most,
        epochs_expected=expected,
        final_runs=num_final_runs,
        epoch_s=epoch_s,
        seconds_at_most=None if epoch_s is None else at_most * epoch_s / concurrency,
        seconds_expected=None if epoch_s is None else expected * epoch_s / concurrency,
        why_untimed=why_untimed,
        disk_bytes=disk_budget_bytes(spec, num_parameters, concurrency),
        free_bytes=free_bytes(spec.folder),
        advice=likelihood_advice(spec.model.likelihood, data),
    )


def plan_lines(plan: Plan) -> Iterator[str]:
    """A plan for people."""
    going_on = f", {plan.trials_ended} of them there already" if plan.trials_ended else ""
    yield f"{plan.study}: {plan.trials} trials of up to {plan.max_epochs} epochs{going_on}, {plan.concurrency} at once"
    splits = (f"{plan.rows[split]:,} {what}" for split, what in _SPLITS.items())
    yield f"data: {plan.data}, {plan.features} features, rows {', '.join(splits)}"
    if plan.advice is not None:
        yield f"  {plan.advice}"
    yield f"model: {plan.model}; up to {plan.num_parameters:,} parameters"
    yield "searched:" if plan.searched else "searched: nothing; every trial is the same but for its seed"
    yield from (f"  {name}: {text}" for name, text in plan.searched.items())
    if plan.fixed:
        yield f"fixed: {', '.join(f'{name} {text}' for name, text in plan.fixed.items())}"
    if plan.rungs:
        yield f"early stopping: at epochs {', '.join(map(str, plan.rungs))}"
    if plan.final_runs:
        yield f"finalists: up to {plan.final_runs} runs of {plan.max_epochs} epochs from fresh seeds"
    gpus = f", {plan.gpus_per_trial:g} GPU" if plan.gpus_per_trial else ""
    yield f"each trial: {plan.cpus_per_trial} CPU{'s' * (plan.cpus_per_trial > 1)}{gpus}"
    yield f"training: {plan.epochs_at_most:,} epochs at most, {_time_text(plan)}"
    free = "" if plan.free_bytes is None else f", {plan.free_bytes / 2**20:,.0f} MiB are free"
    yield f"disk: {plan.disk_bytes / 2**20:,.0f} MiB at the most in {plan.folder}{free}"


_SPLITS = {"train": "to train on", "validation": "to judge by", "test": "kept aside"}


def _time_text(plan: Plan) -> str:
    if plan.epoch_s is None or plan.seconds_at_most is None or plan.seconds_expected is None:
        return f"and no saying how long they take: the first configuration, tried here, {plan.why_untimed}"
    expected = f", about {duration(plan.seconds_expected)} with early stopping" if plan.rungs else ""
    return (
        f"{plan.epoch_s:.2g} s each on a CPU here: "
        f"{duration(plan.seconds_at_most)}{expected}; and some seconds to start and to end"
    )


def _placement(spec: StudySpec, address: str | None, data: Dataset) -> tuple[int, float]:
    """Trials at once, and the GPUs of each; `auto`, which a run measures, counts as a whole GPU here."""
    with ray_runtime(address, data_bytes=data.nbytes) as runtime:
        gpus = spec.resources.gpus(Packing(1) if runtime.num_gpus else None)
        return min(concurrency_of(spec, runtime, gpus), spec.budget.trials), gpus


def _final_runs(spec: StudySpec, searched: Study | None) -> int:
    """At the most. searched: with all its trials, so that its finalists are known, and what was made of their runs."""
    if searched is not None:
        return len(missing_runs(spec, searched.rows(), searched.whole_final_rows()))
    return spec.num_arms * spec.finalists.per_activation * spec.finalists.seeds * spec.finalists.confirm


def _expected_epochs(spec: StudySpec, trials: range) -> int:
    """Of these trials under the study's early stopping, if they were as good as each other but for their luck."""
    some = trials[:SIMULATED_TRIALS]
    if not some:
        return 0
    rng, full, total = np.random.default_rng(0), spec.budget.max_epochs, 0
    for _ in range(SIMULATIONS):
        stopping = EarlyStopping(spec)
        for trial, value in zip(some, rng.random(len(some)), strict=True):
            stopped_at = (rung for rung in spec.rungs() if not stopping.may_go_on(trial, rung, value))
            total += next(stopped_at, full)
    return round(total / SIMULATIONS / len(some) * len(trials))


def _epoch_seconds(spec: StudySpec, data: Dataset) -> tuple[float | None, str | None]:
    """Training and validation of the first trial's model, from some batches; or None, and why."""
    import torch

    from vae.adversarial import make_trainer
    from vae.training import Diverged

    params = Space(spec.arms()[0]).constants | Space(spec.arms()[0]).start()
    train = replace(spec.train_config_for(params), compile="none")  # which takes minutes, and a compiler here
    some = replace(data, train=data.train[: TIMED_BATCHES * train.batch_size])
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.resources.cpus_per_trial)
    try:
        trainer = make_trainer(spec.model_config_for(params, data.row_shape), train, some, seed=spec.seed)
        for _ in range(2):  # the first time has what is done once
            metrics = trainer.train_epoch()
    except Diverged as error:
        return None, str(error)
    finally:
        torch.set_num_threads(threads)
    training_s = len(some.train) / metrics.samples_per_s
    return training_s * len(data.train) / len(some.train) + max(0.0, metrics.wall_s - training_s), None


def _entry_text(entry: Entry) -> str:
    if isinstance(entry, Range):
        return f"{entry.low:g} to {entry.high:g}{', log' if entry.log else ''}"
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values_of(entry))
