"""What a study says of its activations: figures by hand, whatever became of its trials, and words that fit them."""

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_search_ledger import NOON, trial_row

from search.across import across
from search.across import document as document_across
from search.comparison import (
    Comparison,
    as_plain,
    compare,
    comparison_lines,
    document,
    finals_of,
    pair,
)
from search.comparison_table import print_across, print_comparison, print_pair
from search.comparison_words import pair_lines
from search.importance import FEWEST_TRIALS, importances
from search.results import PENALTY, Study, write_study_file
from search.spec import StudySpec
from search.statistics import judge, wilson
from search.tables import SCHEMAS, FinalRow, TrialRow, to_table
from vae.config import InputError

BASELINE = 30.0
"""Of a model that ignores its latents, on the validation split; on the test split it is one more."""

ROWS = 120  # of the test split

# Shapes: R seeds, N rows of the test split.


def make_study(
    path: Path,
    rows: Sequence[TrialRow] = (),
    finals: Mapping[tuple[int, int], np.ndarray | None] | None = None,
    *,
    final_values: Mapping[tuple[int, int], Mapping[str, Any]] | None = None,
    fingerprint: str = "f00",
    **spec: Any,
) -> Study:
    """A study on disk. finals: (trial, run) -> (N,) nll, None where it failed; all of it plain Parquet."""
    path.mkdir(parents=True)
    provenance = {"created_at": datetime(2026, 3, 1, tzinfo=UTC), "data_fingerprint": fingerprint}
    write_study_file(path, StudySpec.model_validate({"name": path.name, **spec}), provenance)
    write(path, "trials", list(rows))
    names = {row.trial: row.activations for row in rows}
    final_rows, images = [], []
    for (trial, run), nll in (finals or {}).items():
        known: dict[str, Any] = {"state": "COMPLETE", "status": "ok", "val_nelbo": 20.0}
        if nll is None:
            known = {"state": "FAIL", "status": "error", "reason": "x"}
        else:
            known |= {"nll": float(nll.mean()), "nelbo": float(nll.mean()) + 1, "no_latent_nelbo": BASELINE + 1}
            columns = [["s"] * len(nll), [trial] * len(nll), [run] * len(nll), range(len(nll)), nll, nll + 1]
            images.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMAS["final_images"], strict=True)],
                                   schema=SCHEMAS["final_images"]))  # fmt: skip
        known |= {"study": "s", "activation": names[trial], "importance_samples": 9}
        known |= (final_values or {}).get((trial, run), {})
        final_rows.append(FinalRow(**({"trial": trial, "run": run, "seed": run} | known)))
    write(path, "finals", final_rows)
    if images:
        write(path, "final_images", pa.concat_tables(images))
    return Study(path)


def write(path: Path, table: str, rows: list[Any] | pa.Table) -> None:
    content = rows if isinstance(rows, pa.Table) else to_table(rows, SCHEMAS[table])
    (path / table).mkdir()
    pq.write_table(content, path / table / "part-00000.parquet")


def ended(number: int, activation: str, value: float | None, **values: Any) -> TrialRow:
    """A trial that trained to its end; one that diverged where there is no value."""
    known: dict[str, Any] = {"no_latent_nelbo": BASELINE, "epochs": 3, "train_wall_s": 3.0, "num_parameters": 1000}
    known |= {"activation": activation, "val_nelbo": value, "state": "COMPLETE"}
    if value is None:
        known |= {"state": "PRUNED", "status": "diverged", "reason": "the loss is nan"}
    return trial_row(number, **(known | values))


def screen(table: Mapping[str, Sequence[float | None]], **values: Any) -> list[TrialRow]:
    """The common settings of a comparison, in turns: activation -> its value at each setting."""
    names, count = list(table), len(next(iter(table.values())))
    return [
        ended(turn * len(names) + arm, name, table[name][turn], phase="screen", **values)
        for turn in range(count)
        for arm, name in enumerate(names)
    ]


def of_activations(*names: str, settings: int = 4, trials: int | None = None, **spec: Any) -> dict[str, Any]:
    """The study file of a comparison."""
    budget = {"trials": trials or settings * len(names), "max_epochs": 3}
    known: dict[str, Any] = {"goal": "compare-activations", "space": {"activation": list(names)}, "budget": budget}
    return known | {"comparison": {"settings": settings}, "finalists": {"seeds": 10}} | spec


def nll_of(mean: float, seeds: int = 10, *, spread: float = 0.05, seed: int = 0) -> list[np.ndarray]:
    """Runs of a finalist: rows differ by nats, the same ones in each run, and seeds by little."""
    rows = np.random.default_rng(99).normal(0, 2, ROWS)
    noise = np.random.default_rng(seed).normal(0, spread, (seeds, 1))
    return list(mean + rows + noise)


def finals_with(**of_trial: Sequence[np.ndarray | None]) -> dict[tuple[int, int], np.ndarray | None]:
    """t0=[...], t1=[...]: trial -> its runs."""
    return {(int(name[1:]), run): nll for name, runs in of_trial.items() for run, nll in enumerate(runs)}


def text_of(comparison: Comparison, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(console, comparison, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def strict(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.fixture
def decided(tmp_path: Path) -> Study:
    """silu is a nat ahead of relu, and elu, which failed often, was left behind."""
    rows = screen({"relu": [24.0, 25, 26, 29], "silu": [23.0, 24, 25, 26], "elu": [None, None, None, 25.5]})
    finals = finals_with(t0=nll_of(24.0, seed=1), t1=nll_of(23.0, seed=2))
    return make_study(tmp_path / "decided", rows, finals, **of_activations("relu", "silu", "elu"))


# ---- the common settings, by hand


def test_the_figures_of_the_common_settings_are_those_by_hand(tmp_path):
    rows = screen({"relu": [24.0, 26.0, 25.0, 29.0], "silu": [23.0, 27.0, None, 23.5]})
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "silu")), importances=False)
    silu, relu = found.arms
    assert (relu.activation, relu.screened, relu.trials, relu.failed) == ("relu", 4, 4, 0)
    assert (relu.screen_best, relu.screen_median) == (24.0, 25.5)
    assert (relu.screen_quartiles.low, relu.screen_quartiles.high) == (24.75, 26.75)
    assert relu.robustness == 0.5  # 24 and 25
    # behind the best at each setting: relu 1, 0, 0, 5.5; silu 0, 1, 31 - 25, 0
    assert relu.screen_gap == 0.5
    assert silu.screen_gap == 0.5
    # a failure is 30 + 1, and stays in every denominator
    assert (silu.trials, silu.failed, silu.screened) == (4, 1, 4)
    assert (silu.screen_best, silu.screen_median, silu.robustness) == (23.0, 25.25, 0.5)
    assert silu.failure_rate == wilson(1, 4)
    assert found.no_latent_nelbo == BASELINE


def test_the_expected_best_is_tangs_unbiased_one_and_failures_count_in_it(tmp_path):
    rows = screen({"relu": [24.0, 26.0, None], "silu": [23.0, 27.0, 25.0]})
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "silu", settings=3)), importances=False)
    relu = next(arm for arm in found.arms if arm.activation == "relu")
    # the best of two of {24, 26, 31}, drawn without replacement: (24 + 24 + 26) / 3
    assert relu.expected_best == pytest.approx((27.0, 74 / 3, 24.0))
    low, high = relu.expected_band
    assert len(low) == len(high) == 3
    assert all(a <= b for a, b in zip(low, high, strict=True))


def test_what_was_refined_stays_out_of_the_figures_of_the_common_settings(tmp_path):
    rows = screen({"relu": [24.0, 26.0], "silu": [23.0, 27.0]})
    rows += [ended(4, "relu", 10.0, phase="refine"), ended(5, "silu", None, phase="refine")]
    spec = of_activations("relu", "silu", settings=2, trials=6)
    relu, silu = compare(make_study(tmp_path / "s", rows, **spec), importances=False).arms
    assert (relu.best.trial, relu.screen_best, relu.screened, len(relu.expected_best)) == (4, 24.0, 2, 2)
    assert (silu.screened, silu.trials, silu.failed) == (2, 3, 1)


def test_every_kind_of_failure_counts_the_same_and_also_one_that_has_a_value(tmp_path):
    failures = [
        {"status": "collapsed", "val_nelbo": 29.9},
        {"state": "PRUNED", "status": "diverged", "val_nelbo": 22.0},
        {"state": "PRUNED", "status": "oom"},
        {"state": "FAIL", "status": "error"},
        {"state": "FAIL", "status": "lost"},
        {"state": "FAIL", "status": "timeout"},
    ]
    rows = []
    for turn, failure in enumerate(failures):
        rows.append(ended(2 * turn, "relu", 24.0, phase="screen"))
        rows.append(ended(2 * turn + 1, "elu", None, **({"phase": "screen", "val_nelbo": None} | failure)))
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "elu", settings=6)), importances=False)
    elu = found.arms[1]
    assert (elu.activation, elu.trials, elu.failed, elu.screened) == ("elu", 6, 6, 6)
    assert (elu.screen_median, elu.screen_best, elu.robustness) == (BASELINE + PENALTY, None, 0.0)
    assert elu.screen_gap == BASELINE + PENALTY - 24.0
    assert elu.dropped is not None


def test_the_learning_rates_that_work_are_those_near_the_best(tmp_path):
    values = {"relu": [24.0, 24.9, 25.1, 24.2], "silu": [25.0, 25.0, 25.0, 25.0]}
    rows = screen(values)
    rows = [replace(row, learning_rate=10.0 ** -(row.trial // 2 + 1)) for row in rows]  # 0.1, 0.01, ...
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "silu")), importances=False)
    assert (found.arms[0].learning_rates.low, found.arms[0].learning_rates.high) == (1e-4, 0.1)
    assert found.arms[0].robustness == 0.75


def test_settings_that_not_all_have_been_through_make_no_gap(tmp_path):
    rows = screen({"relu": [24.0, 26.0], "silu": [23.0, 27.0]})
    rows[3] = replace(rows[3], state="RUNNING", status=None, val_nelbo=None)
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "silu", settings=2)), importances=False)
    gaps = {arm.activation: arm.screen_gap for arm in found.arms}
    assert gaps == {"relu": 1.0, "silu": 0.0}


def test_a_search_for_the_best_model_has_no_common_settings(tmp_path):
    rows = [ended(0, "relu", 24.0), ended(1, "silu", 23.0)]
    for arm in compare(make_study(tmp_path / "s", rows, budget={"trials": 2}), importances=False).arms:
        assert (arm.screened, arm.screen_median, arm.screen_gap, arm.robustness) == (0, None, None, None)
        assert (arm.expected_best, arm.expected_band) == ((), ((), ()))


# ---- cost


def test_cost_is_seconds_an_epoch_and_the_front_is_of_those_no_other_beats_in_both(tmp_path):
    def timed(number: int, activation: str, value: float, seconds: float) -> TrialRow:
        return ended(number, activation, value, epochs=3, train_wall_s=3 * seconds, num_parameters=number)

    rows = [timed(0, "relu", 24.0, 1.0), timed(1, "silu", 23.0, 2.0), timed(2, "tanh", 24.5, 1.5)]
    rows += [timed(3, "relu", 25.0, 3.0), timed(4, "relu", 26.0, 1.2), timed(5, "elu", 27.0, 0.5)]
    found = compare(make_study(tmp_path / "s", rows, budget={"trials": 6}), importances=False)
    figures = {arm.activation: (arm.epoch_s, arm.num_parameters, arm.is_on_front) for arm in found.arms}
    assert figures["relu"] == (pytest.approx(1.2), 0, True)
    assert figures["silu"] == (pytest.approx(2.0), 1, True)
    assert figures["tanh"] == (pytest.approx(1.5), 2, False)  # relu is better and faster
    assert figures["elu"] == (pytest.approx(0.5), 5, True)


def test_different_devices_are_told_of(tmp_path):
    rows = [ended(0, "relu", 24.0, device="cpu"), ended(1, "silu", 23.0, device="cuda:0")]
    found = compare(make_study(tmp_path / "s", rows, budget={"trials": 2}), importances=False)
    assert any("different devices: cpu, cuda:0" in text for text in found.caveats)


# ---- the finalists


def test_the_verdict_is_over_each_activations_runs_on_the_test_split(decided):
    found = compare(decided, importances=False)
    rows = decided.rows()
    nll = finals_of(decided, [rows[0], rows[1]])
    assert set(nll) == {"relu", "silu"}
    assert nll["silu"].shape == (10, ROWS)
    assert np.array_equal(nll["relu"], np.stack(nll_of(24.0, seed=1)))
    assert found.verdict == judge(nll)
    assert found.verdict.kind == "best"
    assert [arm.activation for arm in found.arms] == ["silu", "relu", "elu"]
    assert [(arm.finalist, arm.runs, arm.failed_runs) for arm in found.arms] == [(1, 10, 0), (0, 10, 0), (None, 0, 0)]
    assert found.runs == tuple(range(10))
    assert found.is_complete


def test_the_best_is_named_first_and_for_what_it_holds(decided):
    found = compare(decided, importances=False)
    assert found.sentence.startswith("best: silu, for digits (bernoulli, binarize dynamic), mlp")
    assert "4 trials of each activation, up to 3 epochs each" in found.sentence
    assert "relu, the nearest, over 10 seeds" in found.sentence
    assert any("elu (3 of 4 trials failed)" in text for text in found.caveats)
    assert found.commands == ()


def test_a_failed_run_scores_the_penalty_on_every_row_of_the_test_split(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    silu: list[np.ndarray | None] = list(nll_of(23.0))
    silu[3] = None
    study = make_study(
        tmp_path / "s", rows, finals_with(t0=nll_of(24.0), t1=silu), **of_activations("relu", "silu", settings=1)
    )
    nll = finals_of(study, study.rows())["silu"]
    assert np.array_equal(nll[3], np.full(ROWS, BASELINE + 1 + PENALTY))
    found = compare(study, importances=False)
    assert next(arm.failed_runs for arm in found.arms if arm.activation == "silu") == 1
    assert any("final runs failed: silu 1 of 10" in text for text in found.caveats)


def test_a_collapsed_run_is_a_failure_though_it_was_scored(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    study = make_study(
        tmp_path / "s",
        rows,
        finals_with(t0=nll_of(24.0), t1=nll_of(23.0)),
        final_values={(1, 0): {"status": "collapsed", "reason": "no active unit"}},
        **of_activations("relu", "silu", settings=1),
    )
    assert np.array_equal(finals_of(study, study.rows())["silu"][0], np.full(ROWS, BASELINE + 1 + PENALTY))


def test_only_runs_that_every_finalist_has_ended_count_and_that_is_told(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    finals = finals_with(t0=nll_of(24.0), t1=nll_of(23.0, 8))
    running = {(1, 7): {"state": "RUNNING", "status": None}}
    study = make_study(tmp_path / "s", rows, finals, final_values=running, **of_activations("relu", "silu", settings=1))
    found = compare(study, importances=False)
    assert found.runs == tuple(range(7))
    assert found.verdict.seeds == 7
    assert not found.is_complete
    assert any("7 of 10 final runs count" in text for text in found.caveats)
    assert any("unfinished" in text for text in found.caveats)
    assert found.commands[0].startswith("vaesearch resume s --storage ")


def test_runs_are_paired_by_their_number_whatever_the_order_of_the_rows_on_disk(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    finals = finals_with(t0=nll_of(24.0, 4, seed=1), t1=nll_of(23.0, 4, seed=2))
    study = make_study(
        tmp_path / "s", rows, dict(reversed(finals.items())), **of_activations("relu", "silu", settings=1)
    )
    part = study.path / "final_images" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), part)
    nll = finals_of(study, study.rows())
    assert np.array_equal(nll["relu"], np.stack(nll_of(24.0, 4, seed=1)))
    assert np.array_equal(nll["silu"], np.stack(nll_of(23.0, 4, seed=2)))


def test_a_run_whose_rows_of_the_test_split_are_not_whole_does_not_count(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    silu = nll_of(23.0)
    silu[2] = silu[2][:-5]
    study = make_study(
        tmp_path / "s", rows, finals_with(t0=nll_of(24.0), t1=silu), **of_activations("relu", "silu", settings=1)
    )
    found = compare(study, importances=False)
    assert found.runs == (0, 1, 3, 4, 5, 6, 7, 8, 9)
    assert any("1 final run left out" in text for text in found.caveats)


def test_of_several_finalists_the_one_best_on_the_validation_split_stands_for_its_activation(tmp_path):
    rows = screen({"relu": [24.0, 24.1], "silu": [23.0, 23.1]})
    finals = finals_with(t0=nll_of(24.0), t1=nll_of(23.0), t2=nll_of(20.0), t3=nll_of(22.5))
    values = {(trial, run): {"val_nelbo": {0: 24.0, 1: 23.5, 2: 24.5, 3: 23.0}[trial]} for trial, run in finals}
    spec = of_activations("relu", "silu", settings=2, finalists={"seeds": 10, "per_activation": 2})
    found = compare(make_study(tmp_path / "s", rows, finals, final_values=values, **spec), importances=False)
    # trial 2 has the lower nll on the test split, which must not choose
    assert {arm.activation: arm.finalist for arm in found.arms} == {"relu": 0, "silu": 3}
    assert any("not on the test split" in text for text in found.caveats)


def test_too_few_seeds_for_significance_are_told_with_how_many_it_takes(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0], "tanh": [24.0]})
    finals = finals_with(t0=nll_of(24.0, 3), t1=nll_of(23.9, 3), t2=nll_of(24.1, 3))
    spec = of_activations("relu", "silu", "tanh", settings=1, finalists={"seeds": 3})
    found = compare(make_study(tmp_path / "s", rows, finals, **spec), importances=False)
    needed = found.verdict.seeds_to_be_significant
    assert needed > 3
    assert f"takes {needed} seeds" in found.sentence


def test_an_activation_against_itself_makes_no_difference_and_more_seeds_are_offered(tmp_path):
    rows = screen({"relu": [24.0], "silu": [24.0]})
    finals = finals_with(t0=nll_of(24.0, spread=0.5, seed=1), t1=nll_of(24.0, spread=0.5, seed=2))
    study = make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", settings=1))
    found = compare(study, importances=False)
    assert (found.verdict.kind, found.verdict.is_equivalent) == ("no_difference", False)
    assert found.sentence.startswith("no detectable difference, for digits")
    assert found.verdict.seeds_to_decide > 100  # which is told, but not asked for
    assert any(f"it takes about {found.verdict.seeds_to_decide} to settle" in text for text in found.caveats)
    assert found.commands == (f"vaesearch resume s --storage {tmp_path} --set finalists.seeds=29",)


def test_activations_that_are_shown_to_be_alike_leave_nothing_open(tmp_path):
    rows = screen({"relu": [24.0], "silu": [24.0]})
    finals = finals_with(t0=nll_of(24.0, spread=0.01, seed=1), t1=nll_of(24.0, spread=0.01, seed=2))
    study = make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", settings=1))
    found = compare(study, importances=False)
    assert found.verdict.is_equivalent
    assert "are all within 0.10 nats of one another" in found.sentence
    assert found.commands == ()


def test_a_best_group_names_who_is_in_it_and_who_is_worse(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0], "gelu": [23.0]})
    finals = finals_with(
        t0=nll_of(24.0, seed=1), t1=nll_of(23.0, spread=0.3, seed=2), t2=nll_of(23.0, spread=0.3, seed=3)
    )
    study = make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", "gelu", settings=1))
    found = compare(study, importances=False)
    first, second = found.verdict.group
    assert {first, second} == {"silu", "gelu"}
    assert found.sentence.startswith(f"best group: {first} and {second}, for digits")
    assert f"{second} is not shown to be worse by more than {found.verdict.rope:.2f} nats" in found.sentence
    assert found.sentence.endswith(", and relu is")


def test_different_counts_of_importance_samples_are_told_of(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.0]})
    study = make_study(
        tmp_path / "s",
        rows,
        finals_with(t0=nll_of(24.0), t1=nll_of(23.0)),
        final_values={(1, 0): {"importance_samples": 5000}},
        **of_activations("relu", "silu", settings=1),
    )
    assert any("9 and 5000 importance samples" in text for text in compare(study, importances=False).caveats)


# ---- a search for the best model


def test_without_finals_there_is_no_verdict_but_who_leads_and_what_confirms(tmp_path):
    rows = [ended(0, "relu", 24.0), ended(1, "silu", 23.25), ended(2, "silu", 26.0)]
    found = compare(make_study(tmp_path / "s", rows, budget={"trials": 3}), importances=False)
    assert found.verdict is None
    assert found.sentence.startswith("no verdict: silu leads so far")
    assert "0.75 less than relu, the next" in found.sentence
    assert "chosen for its luck" in found.sentence
    assert found.commands == (f"vaesearch resume s --storage {tmp_path} --confirm",)


def test_the_storage_is_not_named_where_it_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [ended(0, "relu", 24.0), ended(1, "silu", 23.25)]
    found = compare(make_study(Path("studies/s"), rows, budget={"trials": 2}), importances=False)
    assert found.commands == ("vaesearch resume s --confirm",)


def test_a_confirmed_search_has_the_same_verdict_and_tells_of_unequal_effort(tmp_path):
    rows = [ended(0, "relu", 24.0), ended(1, "silu", 23.25), ended(2, "silu", 26.0)]
    finals = finals_with(t0=nll_of(24.0), t1=nll_of(23.0))
    spec = {"budget": {"trials": 3}, "finalists": {"confirm": True}, "space": {"activation": ["relu", "silu"]}}
    found = compare(make_study(tmp_path / "s", rows, finals, **spec), importances=False)
    assert found.verdict.kind == "best"
    assert "3 trials in all" in found.sentence
    assert any("unequal" in text and "silu 2 trials, relu 1 trial;" in text for text in found.caveats)


def test_a_decoder_with_an_activation_of_its_own_is_named_as_a_pair(tmp_path):
    rows = [ended(0, "relu", 24.0, decoder_activation="tanh"), ended(1, "relu", 23.0, decoder_activation="relu")]
    spec = {"budget": {"trials": 2}, "model": {"activation_scope": "separate"}}
    found = compare(make_study(tmp_path / "s", rows, **spec), importances=False)
    assert [arm.activation for arm in found.arms] == ["relu/relu", "relu/tanh"]


def test_adversarial_training_is_refused(tmp_path):
    study = make_study(tmp_path / "s", [], train={"objective": "vae_gan"})
    with pytest.raises(InputError, match="adversarially"):
        compare(study)


# ---- little, or nothing

EDGES: dict[str, tuple[list[TrialRow], dict[str, Any], str]] = {
    "no trial": ([], {}, "no trial has ended yet"),
    "one trial": ([ended(0, "relu", 24.0)], {"budget": {"trials": 1}}, "relu alone has a trial that trained well"),
    "none finished": ([trial_row(0, "RUNNING", activation="relu")], {}, "no trial has ended yet"),
    "all failed": ([ended(0, "relu", None), ended(1, "silu", None)], {}, "2 of 2 trials failed"),
    "failed without a baseline": (
        [trial_row(0, "FAIL", status="error", activation="relu", phase="screen")],
        {},
        "1 of 1 trial failed",
    ),
    "one activation": (
        [ended(0, "relu", 24.0), ended(1, "relu", 25.0)],
        {"space": {"activation": "relu"}, "budget": {"trials": 2}},
        "relu is the only activation",
    ),
    "stopped early alone": ([trial_row(0, "PRUNED", activation="relu", val_nelbo=25.0)], {}, "no healthy trial"),
    "comparison of none": ([], of_activations("relu", "silu"), "no trial has ended yet"),
    "comparison of one": ([], of_activations("relu"), "no trial has ended yet"),
    "comparison all failed": (screen({"relu": [None] * 4, "silu": [None] * 4}), of_activations("relu", "silu"),
                              "8 of 8 trials failed"),
    "comparison of equals": (screen({"relu": [24.0] * 12, "silu": [24.0] * 12}),
                             of_activations("relu", "silu", settings=12), "no verdict"),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_whatever_there_is_is_told_in_words_in_a_table_and_as_strict_json(edge, tmp_path):
    rows, spec, words = EDGES[edge]
    found = compare(make_study(tmp_path / "s", rows, **spec))
    assert words in found.sentence
    assert "for digits" in found.sentence
    assert strict(document(found))["sentence"] == found.sentence
    assert comparison_lines(found)[0] == found.sentence
    for width in (60, 80, 120):
        text = text_of(found, width)
        assert " ".join(text.split()).startswith(found.sentence)
        assert all(len(line) <= width for line in text.splitlines() if "vaesearch" not in line)


def test_finals_of_one_activation_alone_make_no_verdict(tmp_path):
    rows = screen({"relu": [24.0], "elu": [None]})
    study = make_study(tmp_path / "s", rows, finals_with(t0=nll_of(24.0)), **of_activations("relu", "elu", settings=1))
    found = compare(study, importances=False)
    assert found.verdict is None
    assert "relu alone was confirmed" in found.sentence


def test_finals_that_all_failed_make_no_verdict(tmp_path):
    rows = screen({"relu": [24.0], "silu": [24.5]})
    finals = finals_with(t0=[None] * 10, t1=[None] * 10)
    found = compare(
        make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", settings=1)), importances=False
    )
    assert found.verdict is None
    assert found.sentence.startswith("no verdict: all final runs failed")
    assert any("final runs failed: relu 10 of 10, silu 10 of 10" in text for text in found.caveats)


def test_one_finalist_that_failed_always_is_last(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.5]})
    finals = finals_with(t0=nll_of(24.0), t1=[None] * 10)
    found = compare(
        make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", settings=1)), importances=False
    )
    assert found.verdict.kind == "best"
    assert [arm.activation for arm in found.arms] == ["relu", "silu"]


def test_one_seed_is_little_and_is_told_to_be(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.5]})
    finals = finals_with(t0=nll_of(24.0, 1), t1=nll_of(23.0, 1))
    spec = of_activations("relu", "silu", settings=1, finalists={"seeds": 1})
    found = compare(make_study(tmp_path / "s", rows, finals, **spec), importances=False)
    strict(document(found))
    assert "seed" in found.sentence
    assert found.commands


def test_finals_without_a_seed_in_common_make_no_verdict_yet(tmp_path):
    rows = screen({"relu": [24.0], "silu": [23.5]})
    finals = {(0, 0): nll_of(24.0)[0], (1, 1): nll_of(23.0)[1]}
    found = compare(
        make_study(tmp_path / "s", rows, finals, **of_activations("relu", "silu", settings=1)), importances=False
    )
    assert found.verdict is None
    assert "no seed in common" in found.sentence


def test_five_thousand_trials_are_compared_at_once(tmp_path):
    rng = np.random.default_rng(0)
    names = ["relu", "silu", "tanh", "elu"]
    rows = [
        ended(n, names[n % 4], float(rng.normal(24, 1)) if n % 10 else None, phase="screen" if n < 2000 else "refine",
              learning_rate=float(10 ** rng.uniform(-4, -2)))
        for n in range(5000)
    ]  # fmt: skip
    study = make_study(tmp_path / "s", rows, **of_activations(*names, settings=500, trials=5000))
    compare(study, importances=False)  # what is imported late is there now
    start = time.process_time()
    compare(study, importances=False)
    assert time.process_time() - start < 5  # about one


# ---- importances


def of_shares(count: int, value: Any, **spec: Any) -> tuple[StudySpec, list[TrialRow], dict[int, float]]:
    rng = np.random.default_rng(5)
    names = ["relu", "leaky_relu", "silu", "tanh"]
    rows = [
        ended(n, names[n % 4], 24.0, phase="screen", learning_rate=float(10 ** rng.uniform(-4, -2)),
              leaky_relu_slope=float(10 ** rng.uniform(-3, -0.31)) if n % 4 == 1 else None,
              dropout=float(rng.uniform(0, 0.5)), latent_dim=int(rng.integers(2, 64)))
        for n in range(count)
    ]  # fmt: skip
    return StudySpec.model_validate(of_activations(*names, **spec)), rows, {row.trial: value(row) for row in rows}


@pytest.mark.parametrize(
    ("value", "first"),
    [
        (lambda row: abs(math.log10(row.learning_rate) + 3), "learning_rate"),
        (lambda row: (row.activation != "silu") + row.trial % 7 / 100, "activation"),
        (lambda row: abs(math.log10(row.leaky_relu_slope or 1.0) + 1), "leaky_relu_slope"),
    ],
    ids=["learning_rate", "activation", "slope"],
)
def test_what_decides_has_the_largest_share(value, first):
    shares = importances(*of_shares(320, value))
    assert next(iter(shares)) == first
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"activation", "learning_rate", "leaky_relu_slope", "dropout", "latent_dim"}


@pytest.mark.parametrize("count", [0, 1, FEWEST_TRIALS - 1])
def test_few_trials_have_no_importances(count):
    assert importances(*of_shares(count, lambda row: row.learning_rate)) is None


def test_values_that_are_all_alike_have_no_importances():
    assert importances(*of_shares(100, lambda row: 1.0)) is None


def test_a_space_without_a_choice_has_no_importances():
    _, rows, values = of_shares(40, lambda row: row.dropout)
    fixed = {"activation": "relu", "dropout": 0.1, "learning_rate": 0.001, "latent_dim": 4}
    assert importances(StudySpec.model_validate({"space": fixed}), rows, values) is None


def test_importances_are_of_the_common_settings_with_failures_and_without(tmp_path):
    rng = np.random.default_rng(1)
    rows = []
    for n in range(80):  # a high learning rate fails; among the others, dropout decides
        rate, dropout = float(10 ** rng.uniform(-4, -2)), float(rng.uniform(0, 0.5))
        value = None if rate > 1e-3 else 20 + 10 * dropout
        rows.append(ended(n, "relu" if n % 2 == 0 else "silu", value, phase="screen", learning_rate=rate,
                          dropout=dropout, latent_dim=int(rng.integers(2, 64))))  # fmt: skip
    rows += [ended(80 + n, "relu", 5.0, phase="refine", latent_dim=64) for n in range(40)]
    found = compare(make_study(tmp_path / "s", rows, **of_activations("relu", "silu", settings=40, trials=120)))
    assert sum(found.importances.values()) == pytest.approx(1)
    assert next(iter(found.importances_without_failures)) == "dropout"
    assert found.importances["learning_rate"] > found.importances_without_failures["learning_rate"]
    text = text_of(found, with_importances=True)
    assert "what decided at the common settings" in text
    assert "without failed trials" in text
    assert "what decided" not in text_of(found)


def test_a_search_for_the_best_model_has_no_importances(tmp_path):
    _, rows, _ = of_shares(40, lambda row: 1.0)
    rows = [replace(row, phase="search", val_nelbo=24 + row.dropout) for row in rows]
    found = compare(make_study(tmp_path / "s", rows, budget={"trials": 40}))
    assert (found.importances, found.importances_without_failures) == (None, None)
    assert f"it takes {FEWEST_TRIALS} trials" in text_of(found, with_importances=True)


# ---- pairs


def test_a_pair_is_the_same_from_both_sides(decided):
    found = compare(decided, importances=False)
    one, other = pair(found, "silu", "relu"), pair(found, "relu", "silu")
    assert (one.a, one.b, other.a, other.b) == ("silu", "relu", "relu", "silu")
    assert one.difference == pytest.approx(-1.0, abs=0.1)
    assert one.difference == -other.difference
    assert one.better == pytest.approx(1 - other.better)
    assert (one.interval.low, one.interval.high) == (-other.interval.high, -other.interval.low)
    assert (one.p_value, one.p_holm) == (other.p_value, other.p_holm)


def test_a_pair_in_words_has_all_its_figures(decided):
    found = compare(decided, importances=False)
    of_pair = pair(found, "relu", "silu")
    text = " ".join(pair_lines(found, of_pair))
    assert "relu has" in text
    assert "nats an example more on the test split" in text
    for figure in (of_pair.interval.low, of_pair.interval.high, of_pair.better, of_pair.difference):
        assert f"{figure:.2f}" in text
    assert f"{of_pair.p_value:.3f}" in text
    assert f"±{found.verdict.rope:.2f}" in text
    assert "10 paired seeds" in text
    assert "told apart" in text


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("silu", "elu", ["elu has no finals", "3 of 4 trials failed", "silu, relu"]),
        ("silu", "gelu", ["gelu is not among", "silu, relu, elu"]),
        ("silu", "silu", ["itself"]),
    ],
)
def test_a_pair_that_cannot_be_compared_is_refused_with_why(a, b, words, decided):
    with pytest.raises(InputError) as caught:
        pair(compare(decided, importances=False), a, b)
    assert all(word in str(caught.value) for word in words)


# ---- several data sets


def tuned(folder: Path, name: str, values: Mapping[str, float], **options: Any) -> Comparison:
    rows = [ended(number, activation, value) for number, (activation, value) in enumerate(values.items())]
    spec = {"budget": {"trials": len(rows)}, "space": {"activation": list(values)}}
    return compare(make_study(folder / name, rows, fingerprint=name, **(spec | options)), importances=False)


def test_ranks_over_data_sets_are_those_by_hand_and_few_are_told_to_be_few(tmp_path):
    found = across(
        [
            tuned(tmp_path, "one", {"relu": 24.0, "silu": 23.0, "tanh": 25.0}),
            tuned(tmp_path, "two", {"relu": 240.0, "silu": 250.0, "tanh": 260.0}),
            tuned(tmp_path, "three", {"relu": 2.5, "silu": 2.4, "tanh": 2.4, "elu": 1.0}),
        ]
    )
    assert found.activations == ("silu", "relu", "tanh")
    assert found.mean_ranks == pytest.approx({"silu": 4.5 / 3, "relu": 2.0, "tanh": 7.5 / 3})
    assert found.ranks["three"] == {"relu": 3.0, "silu": 1.5, "tanh": 1.5}
    assert any("3 data sets are few" in text for text in found.caveats)
    assert any("elu of three" in text for text in found.caveats)
    assert any("without final runs" in text for text in found.caveats)
    strict(document_across(found, []))


def test_finalists_rank_before_those_left_behind_and_those_before_the_failed(tmp_path, decided):
    other = tuned(tmp_path, "other", {"relu": 24.0, "silu": 23.0, "elu": 20.0})
    found = across([compare(decided, importances=False), other])
    assert found.ranks["decided"] == {"silu": 1.0, "relu": 2.0, "elu": 3.0}
    assert found.ranks["other"] == {"elu": 1.0, "silu": 2.0, "relu": 3.0}


def test_the_critical_difference_tells_apart_what_always_ranks_apart(tmp_path):
    comparisons = [tuned(tmp_path, f"d{n}", {"relu": 24.0, "silu": 23.0, "tanh": 25.0}) for n in range(10)]
    found = across(comparisons)
    # Nemenyi at 0.05: 2.343 sqrt(3 * 4 / (6 * 10)), Demšar 2006, table 5
    assert found.critical_difference == pytest.approx(2.343 * math.sqrt(12 / 60), abs=2e-3)
    assert "ahead of tanh" in found.sentence
    assert not any("few" in text for text in found.caveats)


def test_studies_of_the_same_data_are_told_of(tmp_path):
    one = tuned(tmp_path, "one", {"relu": 24.0, "silu": 23.0})
    two = replace(tuned(tmp_path, "two", {"relu": 24.0, "silu": 23.0}), data_fingerprint="one")
    assert any("one and two are of the same data" in text for text in across([one, two]).caveats)


def test_studies_that_cannot_be_ranked_together_are_refused(tmp_path):
    one = tuned(tmp_path, "one", {"relu": 24.0, "silu": 23.0})
    with pytest.raises(InputError, match="one stands twice"):
        across([one, one])
    with pytest.raises(InputError, match="fewer than two"):
        across([one, tuned(tmp_path, "two", {"relu": 24.0, "tanh": 23.0})])


# ---- text and JSON


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_the_table_fits_the_terminal_and_has_every_figure(width, decided):
    found = compare(decided, importances=False)
    text = text_of(found, width)
    lines = text.splitlines()
    tables = [line for line in lines if line.strip().startswith(("silu", "relu", "elu", "activation", "───"))]
    assert all(len(line.rstrip()) <= width for line in tables)
    assert sum("─" in line for line in lines) == {60: 3, 80: 2, 120: 2, 400: 1}[width]
    estimate = found.verdict.estimates[0]
    for figure in (f"{estimate.mean:.2f}", f"{estimate.interval.low:.2f} to {estimate.interval.high:.2f}", "3/4"):
        assert figure in text
    for header in ("test", "P of", "p by", "first", "trials", "failed", "gap", "front"):
        assert header in text
    assert "…" not in text


def test_nothing_is_lost_without_colours(decided):
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    command = [sys.executable, "-m", "search.cli", "compare", decided.name, "--storage", str(decided.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("best: silu, for digits")
    assert "\x1b" not in done.stdout
    assert "yes" in done.stdout  # on the front


def test_names_in_brackets_are_not_taken_for_markup(tmp_path):
    rows = [ended(0, "relu", 24.0)]
    study = make_study(tmp_path / "s", rows, data={"source": "to/[b]x.npy"}, budget={"trials": 1})
    assert "[b]x.npy" in text_of(compare(study, importances=False))


def test_the_document_has_every_field_and_is_strict_json(decided):
    found = compare(decided)
    values = strict(document(found))
    assert set(values) == {field.name for field in fields(Comparison)}
    assert [arm["activation"] for arm in values["arms"]] == ["silu", "relu", "elu"]
    assert values["verdict"]["kind"] == "best"
    assert values["verdict"]["group"] == ["silu"]
    assert values["arms"][0]["best"]["trial"] == 1
    assert values["arms"][0]["best"]["suggested_at"] == NOON.isoformat()
    assert isinstance(values["arms"][0]["runs"], int)
    assert isinstance(values["arms"][0]["is_on_front"], bool)


def test_numpys_scalars_are_plain_too():
    values = as_plain({"a": np.int64(3), "b": (np.float64(0.5), np.bool_(True)), "c": float("nan")})
    assert strict(values) == {"a": 3, "b": [0.5, True], "c": None}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_pairs_and_ranks_print_at_every_width(width, decided, tmp_path):
    console = Console(file=io.StringIO(), width=width)
    found = compare(decided, importances=False)
    print_pair(console, found, pair(found, "silu", "relu"))
    print_across(console, across([found, tuned(tmp_path, "other", {"relu": 24.0, "silu": 23.0})]))
    assert "silu against relu" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "mean" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.system
@pytest.mark.timeout(600)
def test_every_command_of_the_page_runs_as_printed(tmp_path):
    root = Path(__file__).parent.parent
    page, readme = root / "docs" / "comparing.md", (root / "README.md").read_text(encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if f"{line}\n" not in readme:  # whose test runs those that it has, too
                subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True, timeout=300)
    found = compare(Study(tmp_path / "studies" / "quick"))
    assert found.is_complete
    assert found.verdict is not None


def test_comparing_loads_neither_torch_nor_ray_nor_optuna_before_it_must():
    code = "import sys, search.comparison, search.comparison_table; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "ray", "optuna", "sklearn", "scipy"}
