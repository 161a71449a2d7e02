"""`vaesearch evaluate`: which rows a model is evaluated on, how they are scaled, what is told, and what is refused."""

import csv
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import search.progress
from search.evaluation import evaluate_model
from search.results import Study
from vae import export
from vae.config import SUPPORTS, DataConfig, InputError, ModelConfig
from vae.data import Dataset, load_data
from vae.model import VAE
from vae.objective import importance_weighted

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("VAESEARCH_DATA_DIR", "VAESEARCH_STORAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def evaluate(in_process: Command) -> Command:
    """`vaesearch evaluate ...` -> exit status, stdout, stderr."""
    return functools.partial(in_process, "evaluate")


def refused(evaluate: Command, *arguments: object) -> str:
    code, out, err = evaluate(*arguments)
    assert (code, out) == (2, ""), err
    assert 1 <= len(err.splitlines()) <= 3, err
    return err


def export_model(folder: str, likelihood: str = "bernoulli", **settings: Any) -> tuple[VAE, Dataset]:
    """A model as its weights were drawn, exported to `folder`, and its data."""
    support = SUPPORTS[likelihood]  # type: ignore[index]
    data = load_data(DataConfig(**{"support": support} | settings))
    torch.manual_seed(0)
    config = ModelConfig(input_dim=data.input_dim, latent_dim=3, hidden_dims=(8,), likelihood=likelihood)  # type: ignore[arg-type]
    model = VAE(config, data.train).eval()
    stored = {
        "study": "things",
        "trial": 4,
        "data": {
            "config": {k: v for k, v in dataclasses.asdict(data.config).items() if k != "data_dir"},
            "fingerprint": data.fingerprint,
            "columns": data.columns,
            "shift": None if data.shift is None else data.shift.tolist(),
            "factor": None if data.factor is None else data.factor.tolist(),
        },
    }
    export.save(model, Path(folder), config=stored, data=data)
    return model, data


def nll(model: VAE, rows: np.ndarray, num_samples: int, seed: int = 0) -> float:
    return importance_weighted(model, torch.from_numpy(rows), num_samples, seed).nll


# ---- the model's own data


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_model_is_evaluated_on_the_very_rows_of_its_own_split(split):
    model, data = export_model("best")
    rows = getattr(data, split)
    found = evaluate_model("best", split=split, importance_samples=20, seed=3)
    assert found.nll == pytest.approx(nll(model, rows, 20, 3), rel=1e-12)
    assert (found.rows, found.is_own_data, found.data) == (len(rows), True, "digits")
    assert found.no_latent_nelbo == model.likelihood.no_latent_nelbo(data.train, rows)
    assert found.inference_gap == found.nelbo - found.nll > 0


def test_dynamically_binarised_training_rows_are_binarised_once():
    model, data = export_model("best")
    static = load_data(dataclasses.replace(data.config, binarize="static"))
    found = evaluate_model("best", split="train", importance_samples=2, rows=100)
    assert found.rows == 100
    assert found.nll == pytest.approx(nll(model, static.train[:100], 2), rel=1e-12)


def test_more_rows_than_there_are_is_all_of_them():
    _, data = export_model("best")
    assert evaluate_model("best", importance_samples=1, rows=10**6).rows == len(data.test)


def test_data_that_have_moved_are_known_by_their_content():
    np.save("rows.npy", np.random.default_rng(0).normal(5, 2, (200, 4)))
    model, data = export_model("best", "gaussian", source="rows.npy", binarize="none", scale="minmax")
    Path("rows.npy").rename("moved.npy")
    with pytest.raises(InputError, match=r"rows\.npy"):
        evaluate_model("best")
    found = evaluate_model("best", data="moved.npy", importance_samples=20)
    assert found.is_own_data
    assert found.nll == pytest.approx(nll(model, data.test, 20), rel=1e-12)


# ---- other data


def test_other_data_are_scaled_as_the_models_own_were_and_never_anew():
    np.save("rows.npy", np.random.default_rng(0).normal(5, 2, (200, 4)))
    model, own = export_model("best", "gaussian", source="rows.npy", binarize="none", scale="standard")
    other = np.random.default_rng(1).normal(9, 1, (200, 4))
    np.save("other.npy", other)
    found = evaluate_model("best", data="other.npy", importance_samples=20)
    assert not found.is_own_data
    assert found.no_latent_nelbo is None
    raw = load_data(DataConfig(source="other.npy", support="real", scale="none", binarize="none")).test
    assert own.shift is not None
    assert own.factor is not None
    rows = ((raw - own.shift) / own.factor).astype(np.float32)
    assert found.nll == pytest.approx(nll(model, rows, 20), rel=1e-6)


def test_other_images_are_binarised_once_with_the_stored_seed():
    rng = np.random.default_rng(0)
    for name, mean in (("rows", 100), ("other", 150)):
        np.save(f"{name}.npy", rng.poisson(mean, (200, 4, 4)).clip(0, 255).astype(np.uint8))
    seen = []
    for seed in (0, 0, 1):
        export_model(f"best{seed}", source="rows.npy", seed=seed)
        seen.append(evaluate_model(f"best{seed}", data="other.npy", importance_samples=5).nll)
    assert seen[0] == seen[1] != seen[2]


def test_other_counts_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    for name in ("rows", "other"):
        np.save(f"{name}.npy", rng.poisson(3, (200, 4)))
    model, _ = export_model("best", "poisson", source="rows.npy", binarize="none")
    found = evaluate_model("best", data="other.npy", importance_samples=5)
    raw = load_data(DataConfig(source="other.npy", support="counts", binarize="none")).test
    assert found.nll == pytest.approx(nll(model, raw, 5), rel=1e-12)


def test_columns_of_another_table_are_found_by_name_in_whatever_order():
    rows = np.random.default_rng(0).random((200, 3))
    for name, order in (("rows", [0, 1, 2]), ("other", [2, 0, 1])):
        np.savetxt(f"{name}.csv", rows[:, order], delimiter=",", header=",".join("abc"[i] for i in order), comments="")
    export_model("best", source="rows.csv", binarize="none")
    own = evaluate_model("best", importance_samples=5)
    other = evaluate_model("best", data="other.csv", importance_samples=5)
    assert own.is_own_data
    assert other.is_own_data
    assert other.nll == own.nll
    Path("rows.csv").unlink()
    Path("other.csv").rename("rows.csv")
    assert evaluate_model("best", importance_samples=5).nll == own.nll


def test_other_rows_of_the_same_columns_are_read_in_the_models_order():
    rows = np.random.default_rng(0).random((200, 3))
    np.savetxt("rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    export_model("best", source="rows.csv", binarize="none")
    seen = []
    for order in ([0, 1, 2], [2, 0, 1]):
        np.savetxt("other.csv", rows[:150, order], delimiter=",", header=",".join("abc"[i] for i in order), comments="")
        seen.append(evaluate_model("best", data="other.csv", importance_samples=5))
    assert [found.is_own_data for found in seen] == [False, False]
    assert seen[0].nll == seen[1].nll


def test_changed_data_under_the_same_name_are_told_on_stderr(evaluate):
    rows = np.random.default_rng(0).random((200, 4))
    np.save("rows.npy", rows)
    export_model("best", source="rows.npy", binarize="none")
    np.save("rows.npy", rows / 2)
    code, out, err = evaluate("best", "--importance-samples", 3)
    assert code == 0
    assert "rows.npy" in err
    assert "SHA-256" in err
    assert "not the data it was made on" in out
    assert "no latent" not in out


def test_grey_data_for_a_model_of_8_bit_data_are_told_on_stderr(evaluate):
    rng = np.random.default_rng(0)
    np.save("rows.npy", rng.integers(0, 256, (200, 4), dtype=np.uint8))
    np.save("grey.npy", rng.random((200, 4)))
    export_model("best", source="rows.npy")
    code, _, err = evaluate("best", "--data", "grey.npy", "--importance-samples", 3)
    assert code == 0
    assert "255" in err


def test_a_column_of_lists_that_has_moved_is_found_by_the_settings():
    rows = np.random.default_rng(0).random((100, 4))
    pq.write_table(pa.table({"label": pa.array(range(100)), "pixels": pa.array(rows.tolist())}), "rows.parquet")
    export_model("best", "gaussian", source="rows.parquet", columns=("pixels",), binarize="none")
    own = evaluate_model("best", importance_samples=5)
    Path("rows.parquet").rename("moved.parquet")
    moved = evaluate_model("best", data="moved.parquet", importance_samples=5)
    assert moved.is_own_data
    assert moved.nll == own.nll


# ---- what is told


@pytest.mark.parametrize("train_on", ["train", "train+validation"])
def test_rows_that_a_refit_was_trained_on_are_told(train_on, evaluate):
    export_model("best")
    file = Path("best") / export.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"refit": {"plan": {"train_on": train_on}}}))
    for split in ("train", "validation", "test"):
        code, out, _ = evaluate("best", "--importance-samples", 3, "--rows", 9, "--split", split)
        assert code == 0
        assert ("which it was trained on" in out) == (split == "validation" and train_on == "train+validation")
        found = evaluate_model("best", importance_samples=3, rows=9, split=split)
        assert found.was_trained_on == (split in train_on)


def test_a_study_stands_for_its_best_model(small_study: Study, evaluate):
    found = evaluate_model(Path(str(small_study.model_folders()[0])), importance_samples=5)
    code, out, err = evaluate(
        small_study.name, "--storage", small_study.path.parent, "--importance-samples", 5, "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["model"], document["trial"], document["nll"]) == (small_study.name, found.trial, found.nll)


def test_the_values_are_printed_with_what_they_are_of(evaluate):
    export_model("best")
    found = evaluate_model("best", importance_samples=10, rows=50)
    code, out, err = evaluate("best", "--importance-samples", 10, "--rows", 50)
    assert (code, err) == (0, "")
    assert "test split of digits" in out
    assert "50 rows, 10 importance samples each, seed 0" in out
    assert f"{found.nll:.3f} ± {found.nll_se:.3f}" in out
    for value in (found.nelbo, found.inference_gap, found.no_latent_nelbo):
        assert f"{value:.3f}" in out


def test_json_is_one_document(evaluate):
    export_model("best")
    code, out, err = evaluate("best", "--importance-samples", 10, "--rows", 1, "--split", "validation", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["rows"] == 1
    assert document["nll_se"] is None  # of one row
    assert (document["study"], document["trial"], document["split"]) == ("things", 4, "validation")
    assert document["nelbo"] - document["nll"] == pytest.approx(document["inference_gap"])
    assert "estimate" not in document


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_are_written_one_by_one(suffix, evaluate):
    _, data = export_model("best")
    file = f"rows.{suffix}"
    code, out, _ = evaluate("best", "--importance-samples", 10, "--per-image", "-o", file, "--json")
    assert code == 0
    if suffix == "parquet":
        lines = pq.read_table(file).to_pylist()
    else:
        with open(file, newline="") as stream:
            lines = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(stream)]
    assert list(lines[0]) == ["row", "nll", "nelbo", "effective_samples"]
    assert [line["row"] for line in lines] == list(range(len(data.test)))
    document = json.loads(out)
    for name in ("nll", "nelbo"):
        assert np.mean([line[name] for line in lines]) == pytest.approx(document[name], rel=1e-12)


def test_a_long_evaluation_says_how_far_it_is(evaluate, monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 0.0)
    monkeypatch.setattr(search.progress, "LINE_EVERY_S", 0.0)
    export_model("best")
    code, out, err = evaluate("best", "--importance-samples", 3000, "--rows", 4, "--json")
    assert code == 0
    assert json.loads(out)
    assert "of 4 rows" in err
    assert "left" in err


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["best", "--split", "tset"], ["--split tset", "test"]),
        (["best", "--importance-samples", 0], ["--importance-samples", "1"]),
        (["best", "--rows", 0], ["--rows", "1"]),
        (["best", "--seed", -1], ["--seed", "0"]),
        (["best", "--seed", 2**63], ["--seed", "at most 9223372036854775807"]),
        (["best", "--data", "wide.npy"], ["wide.npy", "64 features", "has 5"]),
        (["best", "--data", "high.npy"], ["high.npy", "outside [0, 1]"]),
        (["best", "--data", "none.npy"], ["none.npy", "no such file"]),
        (["best", "--per-image"], ["-o"]),
        (["best", "-o", "rows.csv"], ["--per-image"]),
        (["best", "--per-image", "-o", "rows.txt"], [".parquet"]),
        (["best", "--per-image", "-o", "none/rows.csv"], ["none"]),
        (["none"], ["none", "exported model", "study in studies"]),
        (["bare"], ["bare", "which data"]),
        (["odd"], ["odd", "damaged", "data.config", "source is 5"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_cannot_be_evaluated_is_refused(arguments, words, evaluate):
    export_model("best")
    rng = np.random.default_rng(0)
    np.save("wide.npy", rng.random((100, 5)))
    np.save("high.npy", rng.integers(0, 200, (100, 64)))
    model, data = export_model("bare")
    export.save(model, Path("bare"), config={}, data=data)
    export.save(model, Path("odd"), config={"data": {"config": {"source": 5}}}, data=data)
    complaint = refused(evaluate, *arguments)
    assert all(word in complaint for word in words), complaint


def test_a_model_that_gives_no_finite_likelihood_fails_by_row(evaluate):
    model, _ = export_model("best")
    weights = model.state_dict()
    weights["outputs.bias"][:] = torch.finfo(torch.float32).max
    save_file(weights, Path("best") / export.WEIGHTS)
    code, out, err = evaluate("best", "--importance-samples", 3)
    assert (code, out) == (1, "")
    assert "row 0 of the test split of digits is -inf" in err
