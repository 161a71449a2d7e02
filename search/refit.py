"""A configuration of a study trained anew: for longer, with the validation rows too, or on other data; and exported.

Its states lie in the output folder until the end, so that the same call goes on where a killed one was, and ends with
the same bits. Schedules span the new number of epochs. Nothing is stopped early and no epoch is chosen: the value is
that of the last one.
"""

import contextlib
import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from search.attempt import device_for, threads_for
from search.checkpoints import CheckpointStore
from search.checks import own_data
from search.interrupts import Interrupts, interrupts_caught
from search.publish import check, check_programs, described
from search.replay import Tell, trial_of
from search.results import MODEL_FILE, Study, model_config_of, ranked, storage_flag
from search.spec import StudySpec, spec_diff
from search.storage import StorageFailed, failing_clearly, sync, temporary_of, write_atomically
from search.tables import TrialRow
from vae import export
from vae.adversarial import make_trainer
from vae.config import InputError, ModelConfig, TrainConfig
from vae.data import Dataset, load_data
from vae.model import VAE
from vae.training import Diverged, EpochMetrics, Trainer

TrainOn = Literal["train", "train+validation"]
Split = Literal["validation", "test"]

STORE_EVERY_S, STORE_TIMES = 5.0, 20.0
"""A state is stored after the first epoch that ends so long after the last state: so many seconds, and so many times
what that one took to be stored. Each epoch's is, where epochs are longer."""

STATES_FOLDER = "checkpoints"
PLAN_FILE = "refit.json"  # among the states: what is being trained
BUILDING = ".building"
TABLES = (".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Refit:
    """An exported refit. Losses are means over `split`, in nats per example."""

    folder: str
    study: str
    trial: int
    epochs: int
    seed: int
    train_on: TrainOn
    data: str
    is_own_data: bool  # those of the study
    train_rows: int
    split: Split  # whose the values are
    nelbo: float
    recon: float
    kl: float
    active_units: int
    objective: float  # what trials are ranked by: nelbo, or for vae_gan the squared error of reconstructions
    no_latent_nelbo: float
    train_objective: str
    train_wall_s: float


@dataclass(frozen=True)
class _Plan:
    """All that decides the bits of a refit."""

    row: TrialRow
    model: ModelConfig
    train: TrainConfig
    seed: int
    train_on: TrainOn
    data: Dataset  # as trained on; what stands for validation is of `split`
    is_own_data: bool
    study: str

    @property
    def split(self) -> Split:
        return "validation" if self.train_on == "train" else "test"

    def identity(self) -> dict[str, Any]:
        """In JSON's terms."""
        what = {
            "study": self.study,
            "trial": self.row.trial,
            "epochs": self.train.max_epochs,
            "seed": self.seed,
            "train_on": self.train_on,
            "data_fingerprint": self.data.fingerprint,
            "model": asdict(self.model),
            "train": asdict(self.train),
        }
        return dict(json.loads(json.dumps(what)))


def refit(
    study: Study,
    *,
    epochs: int,
    trial: int | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    train_on: str = "train",
    to: str | Path | None = None,
    seed: int | None = None,
    programs: bool = False,
    onnx: bool = False,
    tell: Tell | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Refit:
    """Train a configuration and write it as a model folder; a call like an interrupted one goes on with it.

    trial: None: the best. data, data_dir: other data of the same kind, or where the study's own are now. train_on: with
    "train+validation" the value is that of the test split. to: None: see `default_folder`. seed: None: the trial's.
    programs, onnx: as of `vae.export.save`; what a finished refit lacks of them is added. tell: hears of epochs. say:
    takes the few lines meant for people. Raises InputError before anything is written; ArithmeticError where the
    training diverges; Interrupted, with a state stored; StorageFailed.
    """
    if epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {epochs}")
    if seed is not None and seed < 0:
        raise InputError(f"--seed must be at least 0, got {seed}")
    if train_on not in get_args(TrainOn):
        raise InputError(f"--train-on {train_on}: known are {', '.join(get_args(TrainOn))}")
    check_programs(programs=programs, onnx=onnx)
    row = _best(study) if trial is None else trial_of(study, trial)
    spec = study.spec
    dataset, is_own_data = _load(study, data, data_dir)
    train = _stretched(spec, row, epochs)
    with _mendable(dataset):
        plan = _Plan(
            row=row,
            model=model_config_of(spec, row, dataset.row_shape),
            train=train,
            seed=row.seed if seed is None else seed,
            train_on=train_on,  # type: ignore[arg-type]
            data=dataset if train_on == "train" else _with_validation(dataset),
            is_own_data=is_own_data,
            study=study.name,
        )
    folder = default_folder(study, row.trial) if to is None else Path(to)
    if (done := _finished(folder, plan)) is not None:
        missing = _missing(folder, programs=programs, onnx=onnx)
        say(f"{folder}: this refit is there already{f'; writing its {missing} files' if missing else ''}")
        if missing:
            with failing_clearly(folder):
                _export(plan, folder, export.load(folder), done, programs=programs, onnx=onnx)
        return done
    device = device_for(row.device)
    with threads_for(spec, device), interrupts_caught() as interrupts:
        trainer, last, wall_s = _train(plan, folder, device, interrupts, tell, say)
        result = _result(plan, folder, trainer, last, wall_s)
        with failing_clearly(folder):
            _export(plan, folder, trainer.result.eval(), result, programs=programs, onnx=onnx)
    return result


def default_folder(study: Study, trial: int) -> Path:
    return Path("models") / f"{study.name}-trial-{trial}-refit"


def refit_lines(refit: Refit) -> list[str]:
    """For people."""
    which = "train" if refit.train_on == "train" else "train and validation"
    source = refit.data if refit.is_own_data else f"{refit.data}, not the data of the study"
    lines = [
        f"{refit.folder}: trial {refit.trial} of {refit.study}, {refit.epochs} epochs with seed {refit.seed} "
        f"on {refit.train_rows:,} rows ({which} of {source})",
        f"{refit.split} split: nelbo {refit.nelbo:.3f} nats per example (recon {refit.recon:.3f}, KL {refit.kl:.3f}), "
        f"{refit.active_units} active units; a model without latents has {refit.no_latent_nelbo:.3f}",
    ]
    if refit.train_objective != "elbo":
        lines.append(f"trained adversarially, for reconstructions: their squared error is {refit.objective:.3f}")
    elif refit.nelbo >= refit.no_latent_nelbo:
        lines.append("it is no better than a model without latents; more epochs, another --trial or --seed may help")
    return lines


# ---- what is trained


def _best(study: Study) -> TrialRow:
    leaders = ranked(study.rows())
    if not leaders:
        raise InputError(
            f"{study.path}: no healthy trial has trained to its last epoch yet; name one with --trial: "
            f"vaesearch show {study.name}{storage_flag(study.path)} --trials"
        )
    return leaders[0]


def _load(study: Study, source: str | None, data_dir: str | None) -> tuple[Dataset, bool]:
    """The data, and whether they are those of the study."""
    if source is None:
        return own_data(study, None, data_dir), True
    config = study.spec.data_config()
    suffix = Path(source).suffix.lower()
    own_suffix = Path(config.source).suffix.lower()
    config = replace(
        config,
        source=source,
        data_dir=data_dir or config.data_dir,
        key=config.key if suffix == ".npz" else None,
        columns=config.columns if suffix in TABLES and own_suffix in TABLES else None,
    )
    dataset = load_data(config)
    width = study.provenance["input_dim"]
    if dataset.input_dim != width:
        raise InputError(
            f"{source}: a row has {dataset.input_dim} features, and one of the study's data has {width}; "
            f"bring data of the same kind, or search on these: vaesearch run --data {shlex.quote(source)}"
        )
    return dataset, dataset.fingerprint == study.provenance["data_fingerprint"]


def _with_validation(data: Dataset) -> Dataset:
    """Training and validation rows to train on, and the test split in the place of validation."""
    validation = data.validation
    if data.config.binarize == "dynamic":  # they are drawn anew in every batch, too
        validation = load_data(replace(data.config, binarize="none")).validation
    return replace(data, train=np.concatenate([data.train, validation]), validation=data.test)


def _stretched(spec: StudySpec, row: TrialRow, epochs: int) -> TrainConfig:
    """The trial's, its KL warm-up as large a share of the epochs as it was; a learning rate's schedule spans them."""
    config = spec.train_config_for(row.params)
    warmup = round(config.kl_warmup_epochs * epochs / config.max_epochs)
    return replace(config, max_epochs=epochs, kl_warmup_epochs=warmup)


@contextlib.contextmanager
def _mendable(data: Dataset) -> Iterator[None]:
    """Configurations that the data do not fit are the user's to mend."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{data.config.source}: {error}") from None


# ---- training


def _train(
    plan: _Plan, folder: Path, device: str, interrupts: Interrupts, tell: Tell | None, say: Callable[[str], None]
) -> tuple[Trainer, EpochMetrics, float]:
    """Trained to the end, with the last epoch's figures and the seconds that all took."""
    epochs = plan.train.max_epochs
    with _mendable(plan.data):
        trainer = _trainer(plan, device)
    states = _States(plan, folder)
    trainer, last, wall_s = states.newest(trainer, lambda: _trainer(plan, device), say)
    stored_at, epoch_s = time.monotonic(), math.inf
    while trainer.epoch < epochs:
        # Of a short epoch the end is waited for. Before a long one everything was stored.
        with interrupts.deferred() if epoch_s < states.every_s else contextlib.nullcontext():
            try:
                last = trainer.train_epoch()
            except Diverged as error:
                states.clear()
                raise ArithmeticError(f"{error}\nnothing is exported; another --seed or --trial may stand it") from None
            wall_s, epoch_s = wall_s + last.wall_s, last.wall_s
            if tell is not None:
                tell(trainer.epoch, epochs, last)
            is_due = time.monotonic() - stored_at >= states.every_s
            if is_due or trainer.epoch == epochs or interrupts.pending is not None:
                states.put(trainer, last, wall_s)
                stored_at = time.monotonic()
        interrupts.raise_if_pending()
    assert last is not None
    return trainer, last, wall_s


def _trainer(plan: _Plan, device: str) -> Trainer:
    return make_trainer(plan.model, plan.train, plan.data, seed=plan.seed, device=device)


class _States:
    """Those of one refit, in its output folder, with the plan beside them."""

    def __init__(self, plan: _Plan, folder: Path) -> None:
        self._folder, self._number = folder, plan.row.trial
        states = folder / STATES_FOLDER
        with failing_clearly(folder):
            states.mkdir(parents=True, exist_ok=True)
            write_atomically(states / PLAN_FILE, json.dumps(plan.identity(), indent=2).encode())
        self._store, self._took_s = CheckpointStore(states), 0.0

    @property
    def every_s(self) -> float:
        """How long after the last state the next one is due."""
        return max(STORE_EVERY_S, STORE_TIMES * self._took_s)

    def put(self, trainer: Trainer, last: EpochMetrics, wall_s: float) -> None:
        buffer, began = io.BytesIO(), time.monotonic()
        torch.save({"trainer": trainer.state_dict(), "last": asdict(last), "wall_s": wall_s}, buffer)
        self._store.put(self._number, trainer.epoch, buffer.getvalue())
        self._took_s = time.monotonic() - began
        if self._store.error is not None:
            raise StorageFailed(self._folder, self._store.error)

    def newest(
        self, trainer: Trainer, make: Callable[[], Trainer], say: Callable[[str], None]
    ) -> tuple[Trainer, EpochMetrics | None, float]:
        """The trainer in the newest state that can be read, that epoch's figures, and the seconds up to there."""
        while True:
            stored = self._store.newest(self._number)
            if stored.damaged:
                say(f"{self._folder}: {stored.damaged}")
            if stored.state is None:
                return trainer, None, 0.0
            try:
                state = torch.load(io.BytesIO(stored.state), weights_only=True, map_location="cpu")
                trainer.load_state_dict(state["trainer"])
                last, wall_s = EpochMetrics(**state["last"]), float(state["wall_s"])
            except Exception as error:  # torch raises unrelated types for what it cannot read
                say(f"{self._folder}: the state of epoch {stored.epoch} could not be loaded: {error}")
                self._store.remove(self._number, stored.epoch)
                trainer = make()
                continue
            say(f"{self._folder}: going on from epoch {trainer.epoch}")
            return trainer, last, wall_s

    def clear(self) -> None:
        _clear_states(self._folder)
        with contextlib.suppress(OSError):  # what is in it besides is not ours
            self._folder.rmdir()


def _clear_states(folder: Path) -> None:
    """If they are a refit's. The plan goes last: states without one would be taken for somebody else's."""
    states = folder / STATES_FOLDER
    if any(states.glob("*")) and not (states / PLAN_FILE).is_file():
        return
    CheckpointStore(states).clear()
    for path in (temporary_of(states / PLAN_FILE), states / PLAN_FILE):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # nor is what is in there
        states.rmdir()


# ---- the folder


def _finished(folder: Path, plan: _Plan) -> Refit | None:
    """What an earlier call has made there; None where there is a refit to begin or to go on with.

    Raises InputError if something else is there.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder with --to")
    states = folder / STATES_FOLDER
    if (folder / MODEL_FILE).is_file():
        stored = export.read_config(folder).get("refit")
        if stored is None:
            raise InputError(f"{folder}: holds an exported model that is no refit; name another folder with --to")
        with _undamaged(folder / MODEL_FILE):
            _refuse_another(folder, stored["plan"], plan, "another")
            result = Refit(**(stored["result"] | {"folder": str(folder)}))
        _clear_states(folder)  # which that call may not have come to
        return result
    if (states / PLAN_FILE).is_file():
        with _undamaged(states / PLAN_FILE):
            there = json.loads((states / PLAN_FILE).read_text(encoding="utf-8"))
            _refuse_another(folder, there, plan, "an unfinished")
        return None
    ours = {states, temporary_of(states / PLAN_FILE)}  # of a call that was cut off as it began
    if states.is_file() or not ours.issuperset([*folder.iterdir(), *states.glob("*")]):
        raise InputError(f"{folder}: holds something else than a refit; name another folder with --to")
    return None


def _missing(folder: Path, *, programs: bool, onnx: bool) -> str:
    """The kinds of programs that are asked for, and neither there nor refused; '' if none."""
    config = export.read_config(folder)
    tried = {Path(name).suffix for key in ("files", "refused") for name in config.get(key) or {}}
    wanted = (".pt2",) * programs + (".onnx",) * onnx
    return " and ".join(suffix for suffix in wanted if suffix not in tried)


@contextlib.contextmanager
def _undamaged(file: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: damaged: {error}; remove the folder, or name another with --to") from None


def _refuse_another(folder: Path, there: dict[str, Any], plan: _Plan, what: str) -> None:
    asked = plan.identity()
    if there == asked:
        return
    flat = [{k: v for k, v in identity.items() if not isinstance(v, dict)} for identity in (there, asked)]
    diff = "; ".join(spec_diff(*flat)) or "the study's settings"
    raise InputError(
        f"{folder}: holds {what} refit: {diff}\nname another folder with --to, or remove that one to begin anew"
    )


def _result(plan: _Plan, folder: Path, trainer: Trainer, last: EpochMetrics, wall_s: float) -> Refit:
    return Refit(
        folder=str(folder),
        study=plan.study,
        trial=plan.row.trial,
        epochs=plan.train.max_epochs,
        seed=plan.seed,
        train_on=plan.train_on,
        data=plan.data.config.source,
        is_own_data=plan.is_own_data,
        train_rows=len(plan.data.train),
        split=plan.split,
        nelbo=last.val_nelbo,
        recon=last.val_recon,
        kl=last.val_kl,
        active_units=last.active_units,
        objective=last.objective,
        no_latent_nelbo=trainer.no_latent_nelbo,
        train_objective=plan.train.objective,
        train_wall_s=wall_s,
    )


def _export(plan: _Plan, folder: Path, model: VAE, result: Refit, *, programs: bool, onnx: bool) -> None:
    """Write, read back and check the model beside the states, then put it in their place; config.json comes last."""
    building = folder / BUILDING
    built = building / folder.resolve().name  # by which the card calls it
    shutil.rmtree(building, ignore_errors=True)
    try:
        config = _config(plan, result)
        export.save(model, built, config=config, data=plan.data, programs=programs, onnx=onnx)
        values = {"val_nelbo": result.nelbo, "val_recon": result.recon, "val_kl": result.kl}
        check(built, replace(plan.row, **values), plan.data)  # type: ignore[arg-type]
        for path in sorted(built.iterdir(), key=lambda path: path.name == MODEL_FILE):
            sync(path)
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _clear_states(folder)


def _config(plan: _Plan, refit: Refit) -> dict[str, Any]:
    """What config.json says of the model beyond its architecture: as of a trial, and of what it is a refit."""
    prefix = "val" if plan.split == "validation" else plan.split
    metrics = {f"{prefix}_{name}": getattr(refit, name) for name in ("nelbo", "recon", "kl")}
    metrics |= {name: getattr(refit, name) for name in ("active_units", "no_latent_nelbo", "epochs")}
    config = described(plan.study, plan.row, plan.train, plan.seed, plan.data)
    if plan.split == "test":
        config["data"]["rows"]["validation"] = 0  # they are among those trained on
    return config | {
        "metrics": metrics,
        "refit": {"plan": plan.identity(), "result": {**asdict(refit), "folder": None}},
    }
