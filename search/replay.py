"""A trial trained once more, by what the ledger has of it, and its curve held against the recorded one.

On the same CPU build, with as many threads and the same torch, the two are equal bit for bit, also where the trial
had several attempts. Elsewhere sums are taken in another order, and what that changes grows with the epochs.
"""

import math
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any, Literal

import torch

from search.attempt import Attempt, Ended, device_for, threads_for, what_ended
from search.checks import own_data
from search.results import VERSIONS, Study, model_config_of, storage_flag
from search.tables import TrialRow
from vae.adversarial import make_trainer
from vae.config import InputError
from vae.training import Diverged, EpochMetrics, Trainer

FIRST_TOLERANCE, TOLERANCE = 2e-4, 2e-2
"""How far bounds may lie apart that are not equal, as a share of |recon| + kl: that of training in the first epoch, and
all others.

Trials of the digits and of MNIST, trained with two threads for one, with MKL's kernels for AVX2 or with torch's for no
vector instructions at all: in the first epoch the bounds of training are at most 5e-5 apart; later bounds, and those of
validation, mostly within 4e-5, but in a few trials up to 7e-3, for what rounding changes may grow. With another seed
the bounds of training in the first epoch are 1e-3 to 7e-2 apart: that tells another training from other rounding.
"""

CLOCK = ("wall_s", "samples_per_s")
TERMS = tuple(f.name for f in fields(EpochMetrics) if f.name not in ("epoch", *CLOCK))
"""What of an epoch is compared: all but what the clock says."""

HEALTHY = "healthy as far as it was trained"

Verdict = Literal["equal", "close", "different"]
Tell = Callable[[int, int, EpochMetrics], None]
"""Hears of each epoch: how many are done, how many there are to be, and its figures."""


@dataclass(frozen=True, slots=True)
class ReplayedEpoch:
    """One epoch. `then` and `now`: term -> value, as in `TERMS`; without `now` where the training ended before it."""

    epoch: int
    then: dict[str, float]
    now: dict[str, float] | None

    @property
    def differing(self) -> list[str]:
        """The terms that are not the same to the last bit."""
        return list(TERMS) if self.now is None else [name for name in TERMS if self.then[name] != self.now[name]]

    @property
    def deviation(self) -> float:
        """How far the bounds are apart, as a share of |recon| + kl of then; infinity where there is none now."""
        return max(self._apart("train"), self._apart("val"))

    @property
    def is_close(self) -> bool:
        """Whether the bounds are within the tolerance."""
        is_alike = self.epoch > 1 or self._apart("train") <= FIRST_TOLERANCE
        return is_alike and self.deviation <= TOLERANCE

    def _apart(self, split: str) -> float:
        if self.now is None:
            return math.inf
        apart = abs(self.now[f"{split}_nelbo"] - self.then[f"{split}_nelbo"])
        return apart / (abs(self.then[f"{split}_recon"]) + self.then[f"{split}_kl"]) if apart else 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """What `vaesearch replay` tells."""

    study: str
    trial: int
    state: str  # of the trial, as in the ledger
    status: str | None
    attempts: int
    verdict: Verdict  # close: not equal, but within the tolerance
    epochs: list[ReplayedEpoch]  # those that the ledger has
    ended_then: str  # in words; an end that training alone does not bring about is not meant
    ended_now: str
    threads: int
    device: str
    cpu: str  # the kernels that torch chose for this one: AVX2, AVX512, ...
    changed: list[str]  # what is known to be unlike then
    notes: list[str]  # what was not compared

    @property
    def differing(self) -> list[ReplayedEpoch]:
        return [epoch for epoch in self.epochs if epoch.differing]

    @property
    def deviation(self) -> float:
        """The largest, as a share of |recon| + kl."""
        return max((epoch.deviation for epoch in self.epochs), default=0.0)

    def document(self) -> dict[str, Any]:
        """For JSON, with the epochs that differ alone."""
        simple = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "epochs"}
        differing = [{"epoch": epoch.epoch, "then": epoch.then, "now": epoch.now} for epoch in self.differing]
        return simple | {
            "epochs": len(self.epochs),
            "deviation": self.deviation,
            "first_tolerance": FIRST_TOLERANCE,
            "tolerance": TOLERANCE,
            "differing": differing,
        }


def replay(
    study: Study, trial: int, *, data: str | None = None, data_dir: str | None = None, tell: Tell | None = None
) -> Replay:
    """Train a trial again in this process, as far as the ledger has it, and compare.

    data, data_dir: where the study's data are now, if they have moved. Raises InputError for what the user can mend:
    no such trial, nothing recorded of it, other data.
    """
    spec, row = study.spec, trial_of(study, trial)
    recorded = _recorded(study, trial)
    last = max(row.epochs, max(recorded, default=0))
    if not recorded and row.status != "diverged":
        what = row.state if row.status in (None, "ok") else f"{row.state}, {row.status}"
        raise InputError(f"{study.path}: the ledger has no epoch of trial {trial} ({what}): nothing to compare")
    dataset = own_data(study, data, data_dir)
    device = device_for(row.device)
    attempt = Attempt(
        spec, dataset, None, number=trial, params=row.params, seed=row.seed, gpus=float(device != "cpu"), is_first=True
    )
    threads = spec.resources.cpus_per_trial
    with threads_for(spec, device):
        model = model_config_of(spec, row, dataset.row_shape)
        trainer = make_trainer(model, spec.train_config_for(row.params), dataset, seed=row.seed, device=device)
        now, ended = _train(attempt, trainer, row, last, tell)
    epochs = [ReplayedEpoch(number, then, now.get(number)) for number, then in recorded.items()]
    then = Ended(row.status or "ok", row.reason, row.step, row.layer)
    is_judged = row.state == "COMPLETE" or row.status == "diverged" or ended.status == "diverged"
    ends = _compared(then, ended, is_as_far=len(now) == last) if is_judged else "equal"
    return Replay(
        study=study.name,
        trial=trial,
        state=row.state,
        status=row.status,
        attempts=row.attempts,
        verdict=_verdict(epochs, ends),
        epochs=epochs,
        ended_then=_words(then) if is_judged else HEALTHY,
        ended_now=_words(ended) if is_judged else HEALTHY,
        threads=threads,
        device=device,
        cpu=torch.backends.cpu.get_cpu_capability(),
        changed=list(_changed(study, row, device)),
        notes=list(_notes(row, recorded, last)),
    )


def replay_lines(replay: Replay) -> list[str]:
    """For people, but for the table of epochs that differ."""
    several = f", then in {replay.attempts} attempts" if replay.attempts > 1 else ""
    head = f"{replay.study}, trial {replay.trial} ({replay.state}{several})"
    threads = f"{replay.threads} thread{'s' if replay.threads > 1 else ''} on {replay.device}"
    kernels = f", {replay.cpu}" if replay.device == "cpu" else ""
    count = f"{len(replay.epochs)} epoch{'s' if len(replay.epochs) != 1 else ''}"
    if replay.verdict == "equal":
        lines = [f"{head}: equal bit for bit, {count}"]
    else:
        measure = f"bounds up to {replay.deviation:.1e} of |recon| + kl apart"
        if math.isinf(replay.deviation):
            measure = f"it ended before epoch {next(e.epoch for e in replay.epochs if e.now is None)}"
        allowed = f"{TOLERANCE:g}, of training in the first epoch {FIRST_TOLERANCE:g}"
        verdict = "equal within the tolerance" if replay.verdict == "close" else "different"
        lines = [f"{head}: {verdict}, {len(replay.differing)} of {count} differ; {measure} (tolerance {allowed})"]
    if replay.ended_then != replay.ended_now:
        lines += [f"then: {replay.ended_then}", f"now: {replay.ended_now}"]
    elif replay.ended_then != HEALTHY:
        lines.append(f"then and now: {replay.ended_then}")
    if replay.verdict != "equal":
        changed = "; ".join(replay.changed) or "versions, host and device are those of then"
        lines.append(f"now {threads}{kernels}; {changed}; kernels and threads of then are not recorded")
    return lines + replay.notes


# ---- what a trial is made of, for whoever trains one again


def trial_of(study: Study, trial: int) -> TrialRow:
    """Its row. Raises InputError if there is none."""
    rows = {row.trial: row for row in study.rows()}
    if trial in rows:
        return rows[trial]
    known = f"it has trials {min(rows)} to {max(rows)}" if rows else "it has none"
    show = f"vaesearch show {study.name}{storage_flag(study.path)} --trials"
    raise InputError(f"{study.path}: there is no trial {trial}; {known}: {show}")


# ---- then and now


def _recorded(study: Study, trial: int) -> dict[int, dict[str, float]]:
    """Epoch -> its terms, as far as the ledger has them."""
    import pyarrow.compute as pc

    epochs = study.epochs()
    own = epochs.filter(pc.equal(epochs["trial"], trial)).sort_by("epoch").select(["epoch", *TERMS])
    return {line.pop("epoch"): line for line in own.to_pylist()}


def _train(
    attempt: Attempt, trainer: Trainer, row: TrialRow, last: int, tell: Tell | None
) -> tuple[dict[int, dict[str, float]], Ended]:
    """Epoch -> its terms, and the end, judged as the trial's own was."""
    attempt.trainer = trainer
    now: dict[int, dict[str, float]] = {}
    num_epochs = last + (row.status == "diverged")  # the one that it did not get through
    try:
        for _ in range(num_epochs):
            metrics = trainer.train_epoch()
            attempt.history.append(asdict(metrics))
            now[metrics.epoch] = {name: getattr(metrics, name) for name in TERMS}
            if tell is not None:
                tell(metrics.epoch, num_epochs, metrics)
    except Diverged as error:
        return now, what_ended(error)
    reason = attempt.collapse() if attempt.is_final else None
    return now, Ended("ok") if reason is None else Ended("collapsed", reason)


def _compared(then: Ended, now: Ended, *, is_as_far: bool) -> Verdict:
    """Of two ends. Where rounding differs, a reason may name other digits, and a step within the epoch be another."""
    if now.status != then.status or (now.status == "diverged" and not is_as_far):
        return "different"
    return "equal" if now == then else "close"


def _verdict(epochs: list[ReplayedEpoch], ends: Verdict) -> Verdict:
    if ends == "different" or not all(epoch.is_close for epoch in epochs):
        return "different"
    return "close" if ends == "close" or any(epoch.differing for epoch in epochs) else "equal"


def _words(ended: Ended) -> str:
    if ended.status == "ok":
        return HEALTHY
    reason = ended.reason or ""
    return reason if ended.status == "diverged" else f"{ended.status}: {reason}"


def _changed(study: Study, row: TrialRow, device: str) -> Iterator[str]:
    """What is recorded of then, and is another now."""
    then: Mapping[str, str] = study.provenance.get("versions", {})
    for name in VERSIONS:
        if name in then and then[name] != version(name):
            yield f"{name} {then[name]} then, {version(name)} now"
    if row.host is not None and row.host != socket.gethostname():
        yield f"on {row.host} then, on {socket.gethostname()} now"
    if row.device is not None and not row.device.startswith(device):
        yield f"on {row.device} then, on {device} now"


def _notes(row: TrialRow, recorded: Mapping[int, Any], last: int) -> Iterator[str]:
    if row.state == "RUNNING":
        yield f"the trial is under way: trained as far as the ledger has it, {last} epochs"
    elif row.status not in ("ok", "collapsed", "diverged"):
        why = f"{row.status}: {row.reason.splitlines()[-1]}" if row.reason else str(row.status)
        yield f"trained as far as the ledger goes, {last} epochs; what ended the trial then is not tried again ({why})"
    missing = last - len(recorded)
    if missing:
        yield f"{missing} of its epochs are missing from the ledger, with a damaged part of it, and were not compared"
