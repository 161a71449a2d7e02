"""Made-up studies for the tests of the page: curves that fall, trials that are stopped, fail, and are confirmed."""

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from search.results import Study, write_study_file
from search.spec import StudySpec
from search.storage import write_atomically
from search.tables import (
    SCHEMAS,
    AttemptRow,
    DiagnosticsRow,
    EpochRow,
    FinalImageRow,
    FinalRow,
    LayerRow,
    TrialRow,
    to_table,
)

BEGIN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
LEVELS = {"silu": 22.6, "gelu": 22.7, "elu": 22.75, "tanh": 23.0, "prelu": 23.1, "leaky_relu": 23.2, "relu": 23.4}
ACTIVATIONS = (*LEVELS, "sigmoid")
BASELINE = 26.9


def write_tables(path: Path, **tables: Sequence[Any]) -> None:
    """A part of each table, as the ledger leaves it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, rows in tables.items():
        folder = path / name
        folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(to_table(list(rows), SCHEMAS[name]), sink)
        write_atomically(folder / f"part-{len(list(folder.iterdir())):05d}.parquet", sink.getvalue())


def made_up_study(
    path: Path,
    trials: int = 48,
    max_epochs: int = 30,
    activations: Sequence[str] = ACTIVATIONS,
    seeds: int = 0,
    compared: bool = True,
    unfinished: int = 0,
    asked: int | None = None,
    failing: bool = False,
    pictures: int = 0,
) -> Study:
    """failing: every trial. pictures: so many of the best have a model's folder."""
    spec: dict[str, Any] = {
        "name": "study",
        "budget": {"trials": asked or trials, "max_epochs": max_epochs},
        "space": {"activation": list(activations)},
        "train": {"kl_warmup_epochs": 0},
    }
    if compared:
        spec |= {"goal": "compare-activations", "finalists": {"seeds": max(1, seeds)}}
        spec["budget"]["trials"] = math.ceil(spec["budget"]["trials"] / len(activations)) * len(activations)
        spec["comparison"] = {"settings": max(1, trials // len(activations) // 2)}
    path.mkdir(parents=True)
    provenance = {
        "created_at": BEGIN,
        "data_fingerprint": "f00d" * 16,
        "data_rows": {"train": 1437, "validation": 180, "test": 180},
        "versions": {"vaesearch": "0.1.0", "torch": "2.13.0"},
    }
    resolved = StudySpec.model_validate(spec)
    write_study_file(path, resolved, provenance)
    rows, epochs = [], []
    for number in range(trials):
        row, its_epochs = _trial(number, resolved, activations, failing, is_running=number >= trials - unfinished)
        rows.append(row)
        epochs += its_epochs
    diagnostics = [look for row in rows if row.epochs for look in _looks(row)]
    layers = [layer for row in rows if row.epochs for layer in _layers(row)]
    attempts = [_attempt(row) for row in rows]
    write_tables(path, trials=rows, epochs=epochs, diagnostics=diagnostics, layers=layers, attempts=attempts)
    best = _best(rows)
    if seeds:
        finals = [_final(row, run) for row in best for run in range(seeds)]
        images = [image for final in finals for image in _images(final)]
        write_tables(path, finals=finals, final_images=images)
    for rank, row in enumerate(best[:pictures], start=1):
        folder = path / "models" / f"{rank}-trial-{row.trial}"
        folder.mkdir(parents=True)
        for name in ("samples.png", "reconstructions.png"):
            Image.effect_noise((66, 66), 80).resize((530, 530), 0).convert("RGB").save(folder / name)
        (folder / "config.json").write_text("{}")
    return Study(path)


def _trial(
    number: int, spec: StudySpec, activations: Sequence[str], failing: bool, is_running: bool
) -> tuple[TrialRow, list[EpochRow]]:
    chance = random.Random(number)
    place = number % len(activations)
    setting = random.Random(number // len(activations))  # common to all activations
    activation = activations[place]
    rate, dropout = 10 ** setting.uniform(-4, -2), setting.uniform(0, 0.5)
    latent = round(2 ** setting.uniform(1, 6))
    level = LEVELS.get(activation, 25.2) + 1.2 * (math.log10(rate) + 2.6) ** 2 + 3 * dropout**2
    level += 0.5 * max(0, 3 - math.log2(latent)) + chance.gauss(0, 0.12)
    max_epochs = spec.budget.max_epochs
    state, status, reason, last = "COMPLETE", "ok", None, max_epochs
    if level > 24.6 and chance.random() < 0.7:
        state, last = "PRUNED", max(1, round(max_epochs * chance.choice((0.1, 0.3))))
    if failing or chance.random() < 0.06:
        state, status, last = "PRUNED", chance.choice(("diverged", "oom", "collapsed")), max(1, max_epochs // 5)
        reason = {"diverged": "loss is nan", "oom": "DefaultCPUAllocator: can't allocate memory"}.get(status)
        state = "COMPLETE" if status == "collapsed" else state
        last = max_epochs if status == "collapsed" else last
    if is_running:
        state, status, reason, last = "RUNNING", None, None, max_epochs // 3
    curve = [level + 18 * math.exp(-6 * epoch / max_epochs) + chance.gauss(0, 0.03) for epoch in range(1, last + 1)]
    if status == "collapsed":
        curve = [max(value, BASELINE) for value in curve]
    kl = 4.6 - 2 * dropout - (level - 22.6) * 0.4
    row = TrialRow(
        study="study",
        trial=number,
        phase=spec.phase(number) if number < spec.budget.trials else "search",
        state=state,
        status=status,
        reason=reason,
        step=411 if status == "diverged" else None,
        layer="encoder.0" if status == "diverged" else None,
        activation=activation,
        leaky_relu_slope=0.1 * (1 + number % 3) if activation == "leaky_relu" else None,
        dropout=dropout,
        learning_rate=rate,
        latent_dim=latent,
        hidden_dims=[128, 128],
        batch_size=64,
        seed=number,
        val_nelbo=None if status == "diverged" or not curve else curve[-1],
        val_recon=None if status == "diverged" or not curve else curve[-1] - kl,
        val_kl=None if status == "diverged" else kl,
        active_units=0 if status == "collapsed" else min(latent, 12),
        no_latent_nelbo=BASELINE,
        epochs=len(curve),
        max_epochs=max_epochs,
        num_parameters=40_000 + 257 * latent,
        train_wall_s=len(curve) * (0.05 + 0.01 * place),
        attempts=1,
        host="here",
        device="cpu",
        suggested_at=BEGIN + timedelta(seconds=number),
        ended_at=None if is_running else BEGIN + timedelta(seconds=number + 2),
    )
    epochs = [
        EpochRow(
            study="study", trial=number, epoch=epoch, attempt=1, train_nelbo=value, train_recon=value - kl,
            train_kl=kl, val_nelbo=math.nan if status == "diverged" and epoch == last else value, val_recon=value - kl,
            val_kl=kl, active_units=min(latent, epoch), grad_norm=10.0, clipped_steps=0, skipped_steps=0,
            kl_weight=1.0, wall_s=0.05, samples_per_s=3e4, objective=value,
            reported_at=BEGIN + timedelta(seconds=number),
        )
        for epoch, value in enumerate(curve, start=1)
    ]  # fmt: skip
    return row, epochs


def _looks(row: TrialRow) -> list[DiagnosticsRow]:
    chance = random.Random(row.trial)
    return [
        DiagnosticsRow(
            study="study", trial=row.trial, epoch=epoch, rate=row.val_kl or 0.0, distortion=row.val_recon or 40.0,
            active_units=row.active_units or 0, kl_active_units=3, collapsed_share=0.1, mutual_information=3.0,
            aggregated_kl=0.5, aggregated_kl_low=0.6, logvar_clamped=0.0,
            encoder_gradient_ratio=math.exp(chance.gauss(0, 1)), decoder_gradient_ratio=math.exp(chance.gauss(0.5, 1)),
            generalization_gap=0.2, precision_effect=None, flags=[],
        )
        for epoch in (0, row.epochs)
    ]  # fmt: skip


def _layers(row: TrialRow) -> list[LayerRow]:
    dies = 0.5 if row.activation == "relu" else 0.05
    return [
        LayerRow(
            study="study", trial=row.trial, epoch=epoch, net=net, layer=layer, width=128,
            dead=dies * random.Random(f"{row.trial}{net}{layer}").random(), dormant=0.1, saturated=0.2,
            gradient_ratio=1.0, second_moment=1.0, mixture=None,
        )
        for epoch in (0, row.epochs) for net in ("encoder", "decoder") for layer in (0, 1)
    ]  # fmt: skip


def _attempt(row: TrialRow) -> AttemptRow:
    was_lost = row.trial % 17 == 3
    return AttemptRow(
        study="study", trial=row.trial, attempt=1, outcome="lost" if was_lost else "ended",
        reason="its node went away" if was_lost else None, from_epoch=0, started_at=row.suggested_at,
    )  # fmt: skip


def _best(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The best healthy one of each activation, best first."""
    best: dict[str, TrialRow] = {}
    healthy = [row for row in rows if row.state == "COMPLETE" and row.status == "ok" and row.val_nelbo is not None]
    for row in sorted(healthy, key=lambda row: row.val_nelbo or 0):
        best.setdefault(row.activation, row)
    return list(best.values())


def _final(row: TrialRow, run: int) -> FinalRow:
    value = (row.val_nelbo or 0.0) - 0.6 + random.Random(1000 * row.trial + run).gauss(0, 0.08)
    return FinalRow(
        study="study", trial=row.trial, activation=row.activation, run=run, seed=run, state="COMPLETE", status="ok",
        nll=value, nelbo=value + 0.5, effective_samples=80.0, importance_samples=1000, no_latent_nelbo=BASELINE,
        val_nelbo=row.val_nelbo, active_units=row.active_units, epochs=row.max_epochs, train_wall_s=1.0,
        score_wall_s=0.5, attempts=1, started_at=BEGIN, ended_at=BEGIN + timedelta(seconds=300),
    )  # fmt: skip


def _images(final: FinalRow) -> list[FinalImageRow]:
    assert final.nll is not None
    return [
        FinalImageRow(
            study="study", trial=final.trial, run=final.run, row=number, nll=final.nll + offset, nelbo=final.nll + 0.5
        )
        for number in range(40)
        for offset in [3 * math.sin(number)]
    ]
