"""A trained model in use from the shell and from Python: what the commands write, and what they refuse."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from scipy.spatial import geometric_slerp

import search.progress
from search import use
from search.model_output import grid_columns, write_values
from search.results import Study
from vae import export
from vae.config import SUPPORTS, DataConfig, InputError, ModelConfig
from vae.data import Dataset, load_data
from vae.loaded import Model, load
from vae.model import VAE

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("VAESEARCH_DATA_DIR", "VAESEARCH_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def vaesearch(in_process: Command) -> Command:
    return in_process


def export_model(folder: str, likelihood: str = "bernoulli", body: str = "mlp", **settings: Any) -> tuple[VAE, Dataset]:
    """A model whose latents matter, though nobody trained it, exported to `folder`, and its data."""
    data = load_data(DataConfig(**{"support": SUPPORTS[likelihood]} | settings))  # type: ignore[index]
    torch.manual_seed(0)
    config = ModelConfig(
        input_dim=data.input_dim, latent_dim=3, hidden_dims=(8,), likelihood=likelihood, image_shape=data.image_shape,
        body=body, channels=(4,),
    )  # type: ignore[arg-type]  # fmt: skip
    model = VAE(config, data.train).eval()
    with torch.no_grad():
        for weight in (*model.mu.parameters(), *model.outputs.parameters()):
            weight.mul_(3 if weight.ndim > 1 and SUPPORTS[config.likelihood] != "counts" else 1)
    stored = {
        "data": {
            "config": {k: v for k, v in dataclasses.asdict(data.config).items() if k != "data_dir"},
            "fingerprint": data.fingerprint,
            "image_shape": data.image_shape,
            "columns": data.columns,
            "shift": None if data.shift is None else data.shift.tolist(),
            "factor": None if data.factor is None else data.factor.tolist(),
        }
    }
    export.save(model, Path(folder), config=stored, data=data)
    return model, data


def write_people(file: str = "people.csv", order: str = "abc", num_rows: int = 200, seed: int = 0) -> np.ndarray:
    """A table whose last column is far from 0 beside its spread, as times are; (N, 3) in the order a, b, c."""
    rng = np.random.default_rng(seed)
    rows = np.column_stack(
        [rng.normal(170, 9, num_rows), rng.normal(40, 12, num_rows), rng.normal(1.7e9, 600, num_rows)]
    )
    picked = rows[:, ["abc".index(name) for name in order]]
    np.savetxt(file, picked, delimiter=",", header=",".join(order), comments="", fmt="%.6f")
    return np.loadtxt(file, delimiter=",", skiprows=1)[:, [order.index(name) for name in "abc"]]


def assert_people(given: np.ndarray, expected: np.ndarray) -> None:
    """Equal to what float32 holds of each column's spread."""
    assert given.shape == expected.shape
    assert (np.abs(given - expected) <= [1e-4, 1e-4, 5e-3]).all()


@pytest.fixture
def people() -> Model:
    write_people()
    export_model("best", "gaussian", source="people.csv", binarize="none")
    return load("best")


@pytest.fixture
def digits() -> Model:
    export_model("best")
    return load("best")


def table(file: str) -> dict[str, np.ndarray]:
    read = pq.read_table(file) if file.endswith(".parquet") else pacsv.read_csv(file)
    return {name: read[name].to_numpy() for name in read.column_names}


def values(file: str, without: str = "row") -> np.ndarray:
    return np.column_stack([column for name, column in table(file).items() if name != without])


# ---- which rows


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "continuous_bernoulli"])
def test_a_split_of_the_models_own_data_is_encoded_to_the_bits_of_its_own_rows(likelihood):
    if likelihood == "gaussian":
        write_people()
        model, data = export_model("best", likelihood, source="people.csv", binarize="none")
    else:
        model, data = export_model("best", likelihood, binarize="none")
    opened = load("best")
    for split in ("train", "validation", "test"):
        found = use.encode(opened, use.read_rows(opened, split=split))
        with torch.no_grad():
            mu, logvar = model.encode(torch.from_numpy(getattr(data, split)))
        assert found["row"].to_pylist() == list(range(len(mu)))
        for dim in range(3):
            assert found[f"mu_{dim}"].to_numpy() == pytest.approx(mu[:, dim].numpy(), abs=1e-6)
            assert found[f"logvar_{dim}"].to_numpy() == pytest.approx(logvar[:, dim].numpy(), abs=1e-6)
    own = use.read_rows(opened).values.reshape(data.test.shape)
    assert (opened.units.scale(own) == data.test).all()


def test_all_rows_are_those_of_the_source_in_its_order(digits):
    from sklearn.datasets import load_digits

    found = use.read_rows(digits, split="all")
    assert (found.values.reshape(-1, 64) == load_digits().data).all()
    assert found.label == "digits"


def test_a_file_of_ones_own_is_taken_whole_by_the_names_of_its_columns_and_to_the_last_digit(people):
    own = write_people("mine.csv", "cab", num_rows=3, seed=5)
    found = use.read_rows(people, "mine.csv")
    assert (found.values == own).all()
    one = use.encode(people, found.first(1))
    assert one.num_rows == 1
    mu, _ = people.encode(own)
    assert np.column_stack([one[f"mu_{i}"].to_numpy() for i in range(3)]) == pytest.approx(mu[:1], abs=1e-6)


def test_a_split_of_other_data_is_read_as_it_stands(people):
    own = write_people("mine.csv", num_rows=60, seed=5)
    parts = [use.read_rows(people, "mine.csv", split=split).values for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, own))


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
def test_whole_numbers_stay_whole_in_every_split_of_other_data(split):
    rng = np.random.default_rng(0)
    for name in ("counts", "mine"):
        np.save(f"{name}.npy", rng.negative_binomial(1, 0.02, (150, 6)))
    export_model("counts", "poisson", source="counts.npy", binarize="none")
    np.save("pixels.npy", rng.integers(0, 17, (150, 8, 8)))
    export_model("pixels")
    for name, file in (("counts", "mine.npy"), ("pixels", "pixels.npy")):
        model = load(name)
        rows = use.read_rows(model, file, split=split)
        assert (rows.values == rows.values.round()).all()
        assert use.encode(model, rows).num_rows == len(rows.values) > 0
    np.save("turned.npy", np.zeros((50, 4, 16)))
    with pytest.raises(InputError, match="4 x 16 values, and the model takes 64, or 8 x 8"):
        use.read_rows(load("pixels"), "turned.npy", split=split)


def test_the_splits_of_other_data_are_those_that_a_study_makes(people):
    write_people("mine.csv", num_rows=60, seed=5)
    data = load_data(DataConfig(source="mine.csv", support="real", scale="none", binarize="none"))
    for split in ("train", "validation", "test"):
        found = use.read_rows(people, "mine.csv", split=split).values
        assert (found.astype(np.float32) == getattr(data, split)).all()


def test_a_column_of_lists_is_found_again_by_the_settings():
    rows = np.random.default_rng(0).random((100, 4))
    columns = {"label": pa.array(range(100)), "pixels": pa.array(rows.tolist())}
    for name in ("rows", "moved"):
        pq.write_table(pa.table(columns), f"{name}.parquet")
    export_model("best", "gaussian", source="rows.parquet", columns=("pixels",), binarize="none")
    for data in (None, "moved.parquet"):
        assert (use.read_rows(load("best"), data, split="all").values == rows).all()


def test_changed_data_under_the_same_name_are_told(people, vaesearch):
    write_people(seed=9)
    code, _, err = vaesearch("encode", "best", "--rows", 1)
    assert code == 0
    assert "people.csv: not the data the model was trained on" in err


def test_a_study_stands_for_its_best_model(small_study: Study, vaesearch):
    storage, best = small_study.path.parent, load(Path(str(small_study.model_folders()[0])))
    code, out, err = vaesearch("sample", small_study.name, "--storage", storage, "-n", 5, "-o", "five.npy")
    assert (code, out, err) == (0, "five.npy\n", "")
    assert (np.load("five.npy").reshape(5, 64) == best.sample(5, seed=0)).all()
    assert (use.open_model(Path(str(small_study.path))).sample(5, seed=0) == best.sample(5, seed=0)).all()


def test_a_study_that_has_exported_nothing_is_refused(small_study: Study, vaesearch):
    shutil.copytree(Path(str(small_study.path)), "studies/small", ignore=shutil.ignore_patterns("models"))
    assert "has exported no model" in refused(vaesearch, "sample", "small", "-o", "x.npy")


def test_models_are_not_exported_with_other_data(small_study: Study, vaesearch):
    np.save("other.npy", np.random.default_rng(0).random((50, 64)))
    storage = small_study.path.parent
    complaint = refused(vaesearch, "export", small_study.name, "--storage", storage, "--data", "other.npy")
    assert "made on other data" in complaint
    assert "those of other.npy have" in complaint
    assert not Path("models").exists()


# ---- what is given


@pytest.mark.parametrize("draws", [False, True])
def test_sample_writes_what_the_model_gives_in_python(draws, digits, vaesearch):
    flags = ["--draws"] if draws else []
    seen = []
    for seed in (3, 3, 4):
        assert vaesearch("sample", "best", "-n", 70, "--seed", seed, "-o", "s.npy", *flags) == (0, "s.npy\n", "")
        seen.append(np.load("s.npy"))
    assert seen[0].shape == (70, 8, 8)
    assert (seen[0].reshape(70, 64) == digits.sample(70, seed=3, mean=not draws)).all()
    assert (seen[0] == seen[1]).all()
    assert (seen[0] != seen[2]).any()
    if draws:
        assert set(np.unique(seen[0])) == {0, 16}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "npy"])
def test_what_was_encoded_is_decoded_to_the_reconstructions(suffix, people, vaesearch):
    file = f"latents.{suffix}"
    assert vaesearch("encode", "best", "--to", file)[0] == 0
    if suffix == "npy":
        assert np.load(file).shape == (20, 6)
    else:
        assert list(table(file)) == ["row", *(f"{kind}_{i}" for kind in ("mu", "logvar") for i in range(3))]
    assert vaesearch("decode", "best", "--latents", file, "-o", "decoded.csv")[0] == 0
    assert vaesearch("reconstruct", "best", "-o", "again.parquet")[0] == 0
    assert list(table("decoded.csv")) == list(table("again.parquet")) == ["row", "a", "b", "c"]
    for file in ("decoded.csv", "again.parquet"):
        assert_people(values(file), people.reconstruct(use.read_rows(people).values))


def test_rows_of_latents_keep_their_numbers(people, vaesearch):
    vaesearch("encode", "best", "--to", "latents.parquet")
    picked = pq.read_table("latents.parquet").take([7, 2])
    pq.write_table(picked.select(["logvar_0", "mu_2", "mu_0", "row", "mu_1"]), "picked.parquet")
    vaesearch("decode", "best", "--latents", "picked.parquet", "-o", "picked.csv")
    vaesearch("reconstruct", "best", "-o", "all.csv")
    assert table("picked.csv")["row"].tolist() == [7, 2]
    assert_people(values("picked.csv"), values("all.csv")[[7, 2]])


@pytest.mark.parametrize("rows", [["p1", "p2"], ["3", ""], ["0.5", "1.5"], ["inf", "1"]])
def test_rows_of_latents_that_are_no_numbers_are_passed_over(rows):
    Path("z.csv").write_text("row,z_0,z_1\n" + "".join(f"{row},{i},0.25\n" for i, row in enumerate(rows)))
    found = use.read_latents("z.csv", 2)
    assert found.row.tolist() == [0, 1]
    assert found.z.tolist() == [[0, 0.25], [1, 0.25]]


def test_drawn_latents_are_distributed_as_the_posterior_says(digits):
    rows = use.read_rows(digits, split="all")
    mu, logvar = digits.encode(rows.values)
    drawn = use.encode(digits, rows, draws=True, seed=1)
    assert drawn.column_names == ["row", "z_0", "z_1", "z_2"]
    z = np.column_stack([drawn[f"z_{i}"].to_numpy() for i in range(3)])
    assert stats.kstest(((z - mu) / np.exp(logvar / 2)).ravel(), "norm").pvalue > 1e-3
    assert drawn.equals(use.encode(digits, rows, draws=True, seed=1))
    assert not drawn.equals(use.encode(digits, rows, draws=True, seed=2))


def test_draws_from_latents_have_the_decoders_means(digits):
    z = np.repeat(np.array([[0.5, -1.0, 2.0]]), 4000, axis=0)
    latents = use.Latents("z", np.arange(4000), z)
    drawn = use.decode(digits, latents, draws=True, seed=0)
    assert set(np.unique(drawn)) == {0, 16}
    assert drawn.dtype == np.float32
    p = digits.decode(z[:1])[0] / 16
    assert (np.abs(drawn.mean(axis=0) / 16 - p) <= 5 * np.sqrt(p * (1 - p) / 4000) + 1e-6).all()


def test_drawn_counts_are_whole_and_keep_the_size_of_their_rows():
    rng = np.random.default_rng(0)
    np.save("counts.npy", rng.poisson(rng.gamma(2.0, 20.0, (200, 1)) * rng.random(6)))
    export_model("best", "poisson", source="counts.npy", binarize="none")
    model = load("best")
    row = np.array([[3, 0, 5, 9, 1, 7]])
    both = use.Rows("both", np.concatenate([row.repeat(3000, axis=0), 10 * row.repeat(3000, axis=0)]))
    drawn = use.reconstruct(model, both, draws=True)
    assert (drawn == drawn.round()).all()
    small, large = np.log(drawn.sum(axis=1).clip(1)).reshape(2, 3000).mean(axis=1)
    assert large - small == pytest.approx(np.log(10), abs=0.1)  # the encoder sees the same row twice
    write_values(model, drawn[:10], Path("drawn.csv"))
    assert "." not in Path("drawn.csv").read_text()


def test_a_straight_way_between_two_rows_is_even_in_their_latents(people):
    rows = use.read_rows(people)
    start, end = rows.one(2, "--from"), rows.one(5, "--to")
    ways = use.interpolate(people, start, end, steps=5)
    (mu,), (other,) = people.encode(start.values)[0], people.encode(end.values)[0]
    assert_people(ways[[0, -1]], people.reconstruct(np.concatenate([start.values, end.values])))
    assert_people(ways[1:2], people.decode((0.75 * mu + 0.25 * other)[None]))


def test_the_way_on_a_sphere_is_that_of_scipy_and_straight_through_the_origin():
    first, last = np.array([0.6, 0.8, 0.0]), np.array([0.0, 0.0, 1.0])
    shares = np.linspace(0, 1, 6)
    assert use._on_sphere(first, last, shares[:, None]) == pytest.approx(geometric_slerp(first, last, shares))
    through = use._on_sphere(first, -2 * first, shares[:, None])
    assert through == pytest.approx(first + shares[:, None] * -3 * first)
    assert use._on_sphere(0 * first, last, shares[:, None])[3] == pytest.approx(0.6 * last)


def test_interpolate_writes_a_line_a_step(people, vaesearch):
    assert vaesearch("interpolate", "best", "--from", 0, "--to", 1, "--steps", 4, "--spherical", "-o", "i.csv")[0] == 0
    assert list(table("i.csv")) == ["share", "a", "b", "c"]
    assert table("i.csv")["share"] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_traversal_moves_one_latent_and_holds_the_others(people, vaesearch):
    row = use.read_rows(people).one(4, "--around")
    (mu,), _ = people.encode(row.values)
    for around, centre in (([], np.zeros(3)), (["--around", 4], mu)):
        assert (
            vaesearch("traverse", "best", "--dims", "2,0", "--steps", 3, "--range", 2, *around, "-o", "t.csv")[0] == 0
        )
        found = table("t.csv")
        assert found["latent"].tolist() == [2, 2, 2, 0, 0, 0]
        assert found["value"].tolist() == [-2, 0, 2] * 2
        z = np.tile(centre, (6, 1))
        z[[0, 1, 2], 2] = z[[3, 4, 5], 0] = [-2, 0, 2]
        assert_people(np.column_stack([found[name] for name in "abc"]), people.decode(z))


def test_a_column_that_the_data_have_too_gets_an_underscore():
    rng = np.random.default_rng(0)
    np.savetxt("rows.csv", rng.random((50, 2)), delimiter=",", header="row,share", comments="")
    export_model("best", "gaussian", source="rows.csv", binarize="none")
    model = load("best")
    written = write_values(model, use.sample(model, 2), Path("s.csv"), beside={"row": np.arange(2)})
    assert written.columns == ("row_", "row", "share") == tuple(table("s.csv"))


def test_values_above_a_threshold_are_probabilities():
    export_model("best", binarize="threshold")
    model = load("best")
    means, draws = (use.reconstruct(model, use.read_rows(model), draws=draws) for draws in (False, True))
    assert 0 <= means.min() < means.max() <= 1
    assert set(np.unique(draws)) == {0, 1}
    write_values(model, use.sample(model, 4), Path("grid.png"))
    assert picture("grid.png").std() > 10


@pytest.mark.parametrize("body", ["mlp", "conv"])
def test_progress_counts_every_row_once(body):
    export_model("best", body=body)
    model = load("best")
    rows = use.read_rows(model, split="all")
    latents = use.Latents("z", np.arange(1500), np.zeros((1500, 3)))
    for draws in (False, True):
        for act, total in (
            (lambda **how: use.sample(model, 1500, **how), 1500),
            (lambda **how: use.encode(model, rows, **how), 1797),
            (lambda **how: use.reconstruct(model, rows, **how), 1797),
            (lambda **how: use.decode(model, latents, **how), 1500),
        ):
            told: list[int] = []
            act(draws=draws, progress=told.append)
            assert sum(told) == total
            assert len(told) > 1


def test_what_takes_long_says_how_far_it_is(digits, vaesearch, monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 0.0)
    monkeypatch.setattr(search.progress, "LINE_EVERY_S", 0.0)
    code, out, err = vaesearch("encode", "best", "--split", "all", "--to", "z.npy", "--json")
    assert code == 0
    assert "of 1,797 rows" in err
    assert json.loads(out) == {
        "path": "z.npy",
        "rows": 1797,
        "columns": [f"{k}_{i}" for k in ("mu", "logvar") for i in range(3)],
    }


def test_a_terminal_shows_a_bar_once_it_takes_a_while(monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 5.0)
    clock = iter([0.0, 1.0, 6.0, 11.0])
    monkeypatch.setattr(search.progress.time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with search.progress.counting("rows", console) as count:
        count(10, 100)
        assert file.getvalue() == ""
        monkeypatch.setattr(search.progress, "Bar", Shown)
        for done in (35, 60):
            count(done, 100, "as a note")
    # 50 rows in the 10 seconds after the first 10, and 40 to come
    assert Shown.seen == [(35, "as a note, about 13 s left"), (60, "as a note, about 8 s left"), "stopped"]


class Shown:
    """In place of rich's bar, which looks at the clock itself."""

    seen: ClassVar[list[object]] = []

    def __init__(self, *columns: object, console: Console, transient: bool) -> None:
        assert transient

    def add_task(self, text: str, total: int) -> None:
        self.task_ids = [0]

    def start(self) -> None: ...

    def update(self, task: int, completed: int, description: str) -> None:
        self.seen.append((completed, description))

    def stop(self) -> None:
        self.seen.append("stopped")


def test_a_table_without_a_file_goes_to_stdout_as_csv(people, vaesearch):
    code, out, err = vaesearch("sample", "best", "-n", 2)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head == '"a","b","c"'
    assert len(lines) == 2
    assert vaesearch("sample", "best", "-n", 2, "-o", "s.csv")[1] == "s.csv\n"
    assert Path("s.csv").read_text() == out


def test_grey_rows_for_a_model_of_pixels_are_told(digits, vaesearch):
    np.save("grey.npy", np.random.default_rng(0).random((5, 64)))
    for command in (["encode"], ["interpolate", "--from", 0, "--to", 1], ["traverse", "--around", 0]):
        code, _, err = vaesearch(*command, "best", "--data", "grey.npy", "-o", "x.csv")
        assert code == 0
        assert err.startswith("vaesearch: no value of the rows is above 1")
        assert len(err.splitlines()) == 1


# ---- pictures


def picture(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def tile(shown: np.ndarray, line: int, column: int, margin: int = 0) -> np.ndarray:
    """(8, 8) of bytes: a digit of a picture, which enlarges each eight times, with gaps of two pixels."""
    top, left = (2 + index * 66 for index in (line, column))
    found = shown[top : top + 64, margin + left : margin + left + 64]
    assert (found.reshape(8, 8, 8, 8, 3) == found.reshape(8, 8, 8, 8, 3)[:, :1, :, :1, :1]).all()
    return found[::8, ::8, 0]


def pixels(values: np.ndarray) -> np.ndarray:
    return (values / 16 * 255).round().reshape(-1, 8, 8)


def test_a_picture_of_reconstructions_has_the_originals_above_them(digits, vaesearch):
    code, out, err = vaesearch("reconstruct", "best", "-o", "r.png", "--json")
    assert code == 0
    assert json.loads(out) == {"path": "r.png", "rows": 32, "columns": []}
    assert "the first 32 of 180 rows" in err
    shown = picture("r.png")
    rows = use.read_rows(digits).values
    for column in (0, 7):
        assert np.abs(tile(shown, 0, column) - pixels(rows)[column]).max() <= 1
        assert np.abs(tile(shown, 1, column) - pixels(digits.reconstruct(rows))[column]).max() <= 1
        assert np.abs(tile(shown, 2, column) - pixels(rows)[8 + column]).max() <= 1


def test_a_picture_of_a_traversal_has_a_line_and_a_label_for_each_latent(digits, vaesearch):
    assert vaesearch("traverse", "best", "--steps", 5, "-o", "t.png")[0] == 0
    shown = picture("t.png")
    margin = shown.shape[1] - (5 * 66 + 2)
    assert shown.shape[0] == 3 * 66 + 2
    assert 20 < margin < 60
    for line in range(3):
        assert shown[line * 66 : line * 66 + 66, :margin].max() == 255  # the label
        z = np.zeros((1, 3))
        z[0, line] = 3
        assert np.abs(tile(shown, line, 4, margin) - pixels(digits.decode(z))[0]).max() <= 1


def test_a_picture_that_is_too_large_is_refused_before_it_is_computed(digits, vaesearch, monkeypatch):
    monkeypatch.setattr(Model, "sample", None)
    assert "ask for fewer" in refused(vaesearch, "sample", "best", "-n", 50_000, "-o", "s.png")


def test_many_samples_are_a_square(digits, vaesearch):
    vaesearch("sample", "best", "-n", 100, "-o", "s.png")
    assert picture("s.png").shape == (10 * 66 + 2, 10 * 66 + 2, 3)
    assert [grid_columns(n) for n in (1, 64, 65, 81, 82)] == [8, 8, 9, 9, 10]


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson"])
def test_images_on_a_scale_of_their_own_are_drawn_over_the_range_of_the_originals(likelihood, vaesearch):
    rng = np.random.default_rng(0)
    np.save("rows.npy", rng.poisson(300, (100, 8, 8)).astype(float))
    export_model("best", likelihood, source="rows.npy", binarize="none")
    assert vaesearch("reconstruct", "best", "--rows", 8, "-o", "r.png")[0] == 0
    above = np.concatenate([tile(picture("r.png"), 0, column) for column in range(8)])
    assert above.min() == 0
    assert above.max() == 255
    assert 80 < above.mean() < 175


# ---- files and refusals


def refused(vaesearch: Command, *arguments: object) -> str:
    code, out, err = vaesearch(*arguments)
    assert (code, out) == (2, ""), err
    assert 1 <= len(err.splitlines()) <= 3, err
    return err


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(digits, vaesearch):
    Path("s.png").write_bytes(b"old")
    assert "examples would be" in refused(vaesearch, "sample", "best", "-n", 50_000, "-o", "s.png")
    assert Path("s.png").read_bytes() == b"old"
    assert vaesearch("sample", "best", "-o", "s.png")[0] == 0
    assert picture("s.png").shape == (530, 530, 3)
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "best", "-o", "x.png"], ["of a table, not of images", ".csv"]),
        (["sample", "best", "-o", "x.txt"], ["x.txt", ".png, .npy, .csv, .parquet"]),
        (["sample", "best", "-o", "none/x.csv"], ["none is no folder"]),
        (["sample", "best", "-o", "best.csv"], ["best.csv", "it is a folder"]),
        (["sample", "best", "--json"], ["--json", "-o FILE"]),
        (["sample", "best", "-n", 0], ["-n must be at least 1"]),
        (["sample", "best", "-n", 10**11], ["-n 100000000000", "do not fit in memory; ask for fewer"]),
        (["sample", "grey", "-n", 10**11, "-o", "x.png"], ["100,000,000,000 examples", "ask for fewer"]),
        (["sample", "best", "--seed", -1], ["--seed", "0"]),
        (["sample", "best", "--seed", 2**63], ["--seed", "2^63 - 1"]),
        (["encode", "best", "--seed", 2**63, "--draws"], ["--seed", "2^63 - 1"]),
        (["decode", "best", "--latents", "none.npy"], ["none.npy: there is no row in it"]),
        (["decode", "grey", "--latents", "none.npy", "-o", "x.png"], ["none.npy: there is no row in it"]),
        (["decode", "grey", "--latents", "one.npy", "-o", "x.png"], ["one.npy", "shape ()"]),
        (["decode", "best", "--latents", "text.npy"], ["text.npy", "no real numbers"]),
        (["sample", "grey", "-n", 0, "-o", "x.png"], ["-n must be at least 1"]),
        (["decode", "best", "--latents", "none.csv"], ["none.csv: there is no row in it"]),
        (["interpolate", "best", "--data", "nan.npy", "--from", 1, "--to", 2], ["nan.npy: row 2", "1 ('b')", "NaN"]),
        (["traverse", "best", "--data", "nan.npy", "--around", 2], ["nan.npy: row 2", "column 1 ('b')", "NaN"]),
        (["sample", "nobody", "-o", "x.npy"], ["nobody", "exported model", "study in studies"]),
        (["sample", "grey"], ["images go into a file", "-o grid.png"]),
        (["encode", "best", "--to", "x.png"], ["--to x.png", ".parquet, .csv, .npy"]),
        (["encode", "best", "--data", "wide.npy"], ["wide.npy", "5 values", "takes 3"]),
        (["encode", "grey", "--data", "turned.npy"], ["turned.npy", "4 x 16", "8 x 8"]),
        (["encode", "best", "--data", "nan.npy"], ["nan.npy", "row 2, column 1 ('b')", "NaN"]),
        (["encode", "best", "--data", "empty.npy"], ["empty.npy", "no row"]),
        (["encode", "best", "--data", "other.csv"], ["other.csv", "no column 'b'", "a, c"]),
        (["encode", "best", "--data", "gone.npy"], ["gone.npy", "no such file"]),
        (["encode", "best", "--split", "tset"], ["--split tset", "test, all"]),
        (["encode", "best", "--rows", 0], ["--rows", "1"]),
        (["decode", "best", "--latents", "two.npy"], ["two.npy", "2 latents a row", "takes 3"]),
        (["decode", "best", "--latents", "flat.npy"], ["flat.npy", "(3,)"]),
        (["decode", "best", "--latents", "nan.npy"], ["nan.npy", "row 2, latent 1", "nan"]),
        (["decode", "best", "--latents", "nan.npy", "--draws"], ["nan.npy", "row 2, latent 1", "nan"]),
        (["decode", "best", "--latents", "other.csv"], ["other.csv", "mu_0", "z_0", "a, c"]),
        (["decode", "best", "--latents", "gaps.csv"], ["gaps.csv", "2 columns mu_*", "mu_1"]),
        (["decode", "best", "--latents", "z.txt"], ["z.txt", ".parquet, .csv or .npy"]),
        (["decode", "best", "--latents", "gone.csv"], ["gone.csv", "no such file"]),
        (["decode", "best", "--latents", "torn.parquet"], ["torn.parquet", "cannot be read"]),
        (["interpolate", "best", "--from", 0, "--to", 20], ["--to 20", "test split of people.csv", "20 rows"]),
        (["interpolate", "best", "--from", -1, "--to", 2], ["--from -1"]),
        (["interpolate", "best", "--from", 0, "--to", 1, "--steps", 1], ["--steps", "2"]),
        (["traverse", "best", "--dims", "0,3"], ["--dims 3", "3 latents"]),
        (["traverse", "best", "--dims", "first"], ["--dims first", "0,3,5"]),
        (["traverse", "best", "--steps", 1], ["--steps", "2"]),
        (["traverse", "best", "--range", 0], ["--range", "positive"]),
        (["traverse", "best", "--around", 99], ["--around 99", "20 rows"]),
        (["traverse", "best", "--data", "people.csv"], ["--around ROW"]),
    ],
    ids=lambda value: " ".join(map(str, value[2:])) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_a_line(arguments, words, wrong_files, vaesearch):
    complaint = refused(vaesearch, *arguments)
    assert all(word in complaint for word in words), complaint
    assert not list(Path().glob("x.*"))


@pytest.fixture(scope="module")
def _wrong_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a table, one of images, and files that fit neither."""
    folder = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_people()
        export_model("best", "gaussian", source="people.csv", binarize="none")
        export_model("grey")
        Path("best.csv").mkdir()
        rows = np.random.default_rng(0).random((4, 3))
        np.save("wide.npy", np.zeros((4, 5)))
        np.save("turned.npy", np.zeros((4, 4, 16)))
        np.save("empty.npy", np.zeros((0, 3)))
        np.save("two.npy", rows[:, :2])
        np.save("none.npy", rows[:0])
        np.save("one.npy", rows[0, 0])
        np.save("text.npy", rows.astype(str))
        Path("none.csv").write_text("row,z_0,z_1,z_2\n")
        np.save("flat.npy", rows[0])
        rows[2, 1] = np.nan
        np.save("nan.npy", rows)
        Path("other.csv").write_text("a,c\n1,2\n")
        Path("gaps.csv").write_text("mu_0,mu_2\n1,2\n")
        Path("torn.parquet").write_bytes(b"PAR1")
    return folder


@pytest.fixture
def wrong_files(_wrong_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_wrong_files)


def test_a_model_that_does_not_say_its_data_takes_those_of_the_user(digits):
    stored = json.loads(Path("best/config.json").read_text())
    del stored["data"]["config"]
    Path("best/config.json").write_text(json.dumps(stored))
    model = load("best")
    with pytest.raises(InputError, match="which data"):
        use.read_rows(model)
    assert len(use.read_rows(model, "digits").values) == 1797


def test_the_commands_load_nothing_heavy_before_they_are_called():
    code = "import sys, search.cli_models; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "ray", "numpy", "pyarrow", "PIL"}
