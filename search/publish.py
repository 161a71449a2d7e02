"""Export of the best models: announced only after they were read back and gave their recorded value."""

import io
import math
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from search.attempt import device_for, threads_for
from search.checkpoints import CheckpointStore
from search.checks import check_fingerprint
from search.events import Tell, untold
from search.results import (
    CHECKPOINTS_FOLDER,
    MODEL_FILE,
    MODELS_FOLDER,
    VERSIONS,
    Study,
    exportable,
    exported,
    model_config_of,
)
from search.statistics import mean_interval
from search.storage import Location, fetch_tree, replace_tree, restore_tree
from search.tables import TrialRow
from vae import export
from vae.adversarial import make_trainer
from vae.config import InputError, TrainConfig
from vae.data import Dataset
from vae.model import VAE, evaluating
from vae.objective import CHUNK_ROWS, elbo_terms, evaluate, fixed_noise
from vae.portable import how_to_get_onnx, missing_onnx_packages

TOLERANCE_NATS, TOLERANCE = 1e-4, 1e-5
"""How far the value of a model read back may lie from the one in the ledger: so much, and this share of its terms."""


class ExportMismatch(RuntimeError):
    """A model that was read back does not give the value in the ledger. It is not announced."""


class _Kept:
    """The weights that a study has kept: last states in its checkpoints, and what was exported before."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._store = CheckpointStore(study.path / CHECKPOINTS_FOLDER)
        self._exported = {int(folder.name.rpartition("-")[2]): folder for folder in study.model_folders()}

    def has(self, row: TrialRow) -> bool:
        return row.trial in self._store.trials() or row.trial in self._exported

    def model(self, row: TrialRow, data: Dataset) -> VAE:
        """Trained. Where its last state cannot be read, it is trained again from the one before, or from 0."""
        stored = self._store.newest(row.trial)
        if stored.state is None and row.trial in self._exported:
            with tempfile.TemporaryDirectory(prefix="vaesearch-") as scratch:
                return export.load(fetch_tree(self._exported[row.trial], Path(scratch) / "model"))
        spec = self._study.spec
        config = model_config_of(spec, row, data.row_shape)
        device = "cpu" if stored.epoch == row.max_epochs else device_for(row.device)
        with threads_for(spec, device):
            trainer = make_trainer(config, spec.train_config_for(row.params), data, seed=row.seed, device=device)
            if stored.state is not None:
                state = torch.load(io.BytesIO(stored.state), weights_only=True, map_location="cpu")
                trainer.load_state_dict(state["trainer"])
            for _ in trainer:
                pass
        return trainer.result.cpu().eval()


def publish_best(study: Study, data: Dataset) -> list[Location]:
    """Export the study's best as `models/<rank>-trial-<n>/`, in place of what was exported before."""
    restore_tree(study.path / MODELS_FOLDER)
    kept = _Kept(study)
    rows = [row for row in exported(study.spec, study.rows()) if kept.has(row)]
    with tempfile.TemporaryDirectory(prefix="vaesearch-") as scratch:
        building = Path(scratch) / MODELS_FOLDER  # which others may read, as the folder of a study
        building.mkdir()
        folders = export_models(study, rows, data, building)
        replace_tree(building, study.path / MODELS_FOLDER, last=MODEL_FILE)
    return [study.path / MODELS_FOLDER / folder.name for folder in folders]


def export_best(
    study: Study,
    data: Dataset,
    top: int,
    to: Path,
    *,
    programs: bool = False,
    onnx: bool = False,
    tell: Tell = untold,
) -> list[Path]:
    """Export the best `top` into a folder of the user's. Raises InputError if fewer were kept.

    programs and onnx: as of `vae.export.save`; what was refused stands in config.json. Raises InputError, too, where
    packages for ONNX are missing.
    """
    check_programs(programs=programs, onnx=onnx)
    kept = _Kept(study)
    rows = exportable(study.spec, study.rows())[:top]
    of_rows = sum(kept.has(row) for row in rows)
    if not rows:
        raise InputError(f"{study.path}: no trial has trained to its last epoch yet; nothing to export")
    if of_rows < len(rows):
        raise InputError(
            f"{study.path}: the weights of the best {of_rows} were kept, not of the best {len(rows)}; "
            f"use --top {of_rows}, or search with export.top = {top}"
        )
    return export_models(study, rows, data, to, programs=programs, onnx=onnx, tell=tell)


def export_models(
    study: Study,
    rows: list[TrialRow],
    data: Dataset,
    to: Path,
    *,
    programs: bool = False,
    onnx: bool = False,
    tell: Tell = untold,
) -> list[Path]:
    """Write, read back and check one folder a row, named after its rank in `rows`."""
    check_fingerprint(study, data)
    kept = _Kept(study)
    folders: list[Path] = []
    building = to / ".building"
    for rank, row in enumerate(rows, start=1):
        folder = building / f"{rank}-trial-{row.trial}"
        try:
            tell(len(folders), len(rows), f"{folder.name}: its weights")
            model = kept.model(row, data)
            config = _config(study, row, model, data)
            tell(len(folders), len(rows), f"{folder.name}: its files, each checked")
            export.save(model, folder, config=config, data=data, programs=programs, onnx=onnx)
            check(folder, row, data)
            shutil.rmtree(to / folder.name, ignore_errors=True)
            folders.append(folder.rename(to / folder.name))
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folders


def check_programs(*, programs: bool, onnx: bool) -> None:
    """Before a model is made. Raises InputError if ONNX is asked for and cannot be written."""
    if onnx and not programs:
        raise ValueError("onnx = True goes with programs = True")
    if onnx and missing_onnx_packages():
        raise InputError(how_to_get_onnx())


def check(folder: Path, row: TrialRow, data: Dataset) -> None:
    """Read a model back and hold its validation value against the ledger's. Raises ExportMismatch."""
    model = export.load(folder)
    x = torch.tensor(data.validation)
    noise = fixed_noise(len(x), model.config.latent_dim, data.config.seed)
    value = evaluate(model, x, noise).nelbo
    assert row.val_nelbo is not None
    assert row.val_recon is not None
    assert row.val_kl is not None
    allowed = TOLERANCE_NATS + TOLERANCE * (abs(row.val_recon) + row.val_kl)
    if not abs(value - row.val_nelbo) <= allowed:
        raise ExportMismatch(f"{folder}: gives {value:.5f} nats when read back, the ledger has {row.val_nelbo:.5f}")


def described(study: str, row: TrialRow, train: TrainConfig, seed: int, data: Dataset) -> dict[str, Any]:
    """What config.json says of the model of a trial's configuration, beyond its architecture and its worth."""
    params = {k: v for k, v in row.params.items() if k not in ("hidden_width", "hidden_layers")}
    return {
        "study": study,
        "trial": row.trial,
        "params": params | {"hidden_dims": list(row.hidden_dims)},
        "train": {**asdict(train), "seed": seed},
        "data": {
            # the folder of the idx files is this machine's affair
            "config": {k: v for k, v in asdict(data.config).items() if k != "data_dir"},
            "fingerprint": data.fingerprint,
            "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
            "image_shape": data.image_shape,
            "columns": data.columns,
            "shift": None if data.shift is None else data.shift.tolist(),
            "factor": None if data.factor is None else data.factor.tolist(),
        },
        "versions": {name: version(name) for name in VERSIONS},
    }


def _config(study: Study, row: TrialRow, model: VAE, data: Dataset) -> dict[str, Any]:
    metrics = ("val_nelbo", "val_recon", "val_kl", "active_units", "train_nelbo", "no_latent_nelbo", "epochs")
    return described(study.name, row, study.spec.train_config_for(row.params), row.seed, data) | {
        "metrics": {**{name: getattr(row, name) for name in metrics}, "val_nelbo_se": _standard_error(model, data)},
        "finals": _finals(study, row.trial),
    }


def _standard_error(model: VAE, data: Dataset) -> float | None:
    """Of val_nelbo, over the validation rows; None for one row."""
    x = torch.tensor(data.validation)
    noise = fixed_noise(len(x), model.config.latent_dim, data.config.seed)
    with evaluating(model), torch.no_grad():
        parts = zip(x.split(CHUNK_ROWS), noise.split(CHUNK_ROWS), strict=True)
        values = torch.cat([elbo_terms(model, *part).nelbo.double() for part in parts])
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None


def _finals(study: Study, trial: int) -> dict[str, Any] | None:
    """What the trial's configuration came to on the test split when trained from fresh seeds; None where it was not."""
    runs = [run for run in study.whole_final_rows() if run.trial == trial and run.state == "COMPLETE"]
    if not runs:
        return None
    images = study.final_images()
    values = [
        images.filter((pc.field("trial") == trial) & (pc.field("run") == run.run)).sort_by("row")["nll"].to_numpy()
        for run in runs
    ]
    interval = mean_interval(np.stack(values))
    return {
        "split": "test",
        "nll": float(np.mean(values)),
        "interval": [interval.low, interval.high] if math.isfinite(interval.high - interval.low) else None,
        "seeds": len(runs),
        "importance_samples": runs[0].importance_samples,
    }
