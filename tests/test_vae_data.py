"""The data a study trains on: every source reads the same rows, and every bad input is refused in words."""

import csv
import gzip
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet

from vae import readers
from vae.config import SUPPORTS, DataConfig, InputError
from vae.data import Dataset, available_sources, fitting_likelihoods, likelihood_advice, load_data

ROOT = Path(__file__).parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist"
NAMES = ("age", "height", "width")


@pytest.fixture(autouse=True)
def no_data_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAESEARCH_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(readers, "SYSTEM_DATASETS", tmp_path / "system")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(5).random((40, 3))


def load(source: object, **settings: object) -> Dataset:
    return load_data(DataConfig(source=str(source), **settings))  # type: ignore[arg-type]


def save(path: Path, array: np.ndarray) -> Path:
    """The array as .npy, .npz, .csv with a header, or .parquet, by the path's suffix."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, array)
    elif path.suffix == ".csv":
        write_csv(path, [NAMES, *array.tolist()])
    else:
        parquet.write_table(pa.table(dict(zip(NAMES, array.T, strict=True))), path)
    return path


def write_csv(path: Path, lines: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def write_idx(folder: Path, zipped: bool = True, dot: str = "-") -> tuple[np.ndarray, np.ndarray]:
    """Small idx files, written from the format's description -> training and test images."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    images = [generator.integers(0, 256, (n, 3, 4), dtype=np.uint8) for n in (20, 6)]
    for part, array in zip(("train", "t10k"), images, strict=True):
        content = struct.pack(">IIII", 2051, *array.shape) + array.tobytes()
        name = f"{part}-images{dot}idx3-ubyte" + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return images[0], images[1]


def together(dataset: Dataset) -> np.ndarray:
    """All rows, in an order of their own, to be compared as sets."""
    stacked = np.concatenate([dataset.train, dataset.validation, dataset.test])
    return stacked[np.lexsort(stacked.T)]


def in_order(array: np.ndarray) -> np.ndarray:
    return array[np.lexsort(array.T)]


# ---- formats


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet", ".NPY"])
def test_every_format_reads_the_same_rows_into_the_same_splits(tmp_path, rows, suffix):
    expected = load(save(tmp_path / "expected.npy", rows), binarize="none")
    path = save(tmp_path / f"x{suffix.lower()}", rows).rename(tmp_path / f"x{suffix}")
    got = load(path, binarize="none")
    for split in ("train", "validation", "test"):
        array = getattr(got, split)
        np.testing.assert_array_equal(array, getattr(expected, split))
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
    np.testing.assert_array_equal(together(got), in_order(rows.astype(np.float32)))
    assert got.fingerprint == expected.fingerprint
    assert got.columns == (NAMES if suffix in (".csv", ".parquet") else None)
    assert got.input_dim == 3
    assert got.nbytes == 40 * 3 * 4


def test_the_fingerprint_is_of_dtype_shape_and_bytes_and_not_of_layout_or_scaling(tmp_path, rows):
    def fingerprint(array: np.ndarray, **settings: object) -> str:
        return load(save(tmp_path / "x.npy", array), **settings).fingerprint

    usual = fingerprint(rows)
    assert re.fullmatch("[0-9a-f]{64}", usual)
    assert fingerprint(np.asfortranarray(rows)) == usual
    assert fingerprint(rows.astype(">f8")) == usual
    assert fingerprint(rows, scale="minmax", seed=3, binarize="none") == usual
    changed = rows.copy()
    changed[7, 1] = np.nextafter(changed[7, 1], 1)
    others = [changed, rows.astype(np.float32), rows.reshape(30, 4), rows[::-1]]
    assert len({usual, *map(fingerprint, others)}) == 5


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, bool, np.int8, np.int64])
def test_every_real_dtype_in_the_unit_interval_is_read(tmp_path, dtype):
    array = np.random.default_rng(0).random((30, 4))
    array = (array if np.dtype(dtype).kind == "f" else array.round()).astype(dtype)
    got = load(save(tmp_path / "x.npy", array), binarize="none")
    np.testing.assert_array_equal(together(got), in_order(array.astype(np.float32)))


def test_a_csv_without_a_header_loses_no_row(tmp_path, rows):
    path = write_csv(tmp_path / "x.csv", rows.tolist())
    got = load(path, binarize="none")
    np.testing.assert_array_equal(together(got), in_order(rows.astype(np.float32)))
    assert got.columns == ("0", "1", "2")
    picked = load(path, binarize="none", columns=("2", "0"))
    np.testing.assert_array_equal(together(picked), in_order(rows[:, [2, 0]].astype(np.float32)))


def test_a_first_csv_line_with_an_empty_field_is_data_and_its_hole_is_told(tmp_path):
    path = write_csv(tmp_path / "x.csv", [[0.5, ""], *[[0.1, 0.2]] * 5])
    with pytest.raises(InputError, match=r"row 0, column 1 \('1'\).* is NaN"):
        load(path)


def test_a_csv_of_excel_with_byte_order_mark_crlf_quotes_and_blank_lines_is_read(tmp_path):
    lines = [f'"0.{i}",{i % 2}\r\n' for i in range(1, 9)]
    (tmp_path / "x.csv").write_bytes(("\ufeff\r\nage,sex\r\n" + "\r\n".join(lines)).encode())
    got = load(tmp_path / "x.csv", binarize="none")
    assert got.columns == ("age", "sex")
    assert len(together(got)) == 8


def test_a_csv_column_that_turns_fractional_after_a_megabyte_is_read(tmp_path):
    values = np.zeros((300_000, 2), dtype=object)
    values[-1] = 0.5
    got = load(write_csv(tmp_path / "x.csv", [("a", "b"), *values.tolist()]), binarize="none")
    assert together(got).sum() == 1.0


def test_a_csv_line_of_more_than_two_megabytes_is_read(tmp_path):
    table = np.random.default_rng(0).integers(0, 10, (3, 12_000)) / 10
    path = write_csv(tmp_path / "x.csv", [[f"{value:.250f}" for value in row] for row in table])
    assert path.stat().st_size > 3 * 2 * 2**20
    np.testing.assert_array_equal(together(load(path, binarize="none")), in_order(table.astype(np.float32)))


def test_flags_beside_bytes_are_not_divided_by_255(tmp_path):
    table = {"flag": [True, False] * 5, "x": pa.array(range(10), pa.uint8())}
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"row 2, column 1 \('x'\).* is 2, outside .*minmax"):
        load(tmp_path / "x.parquet")


def test_booleans_count_as_0_and_1_in_tables(tmp_path):
    flags = np.arange(20) % 3 == 0
    parquet.write_table(pa.table({"flag": flags, "x": np.linspace(0, 1, 20)}), tmp_path / "x.parquet")
    write_csv(tmp_path / "x.csv", [("flag", "x"), *([str(f).lower(), i / 19] for i, f in enumerate(flags))])
    for suffix in ("parquet", "csv"):
        got = load(tmp_path / f"x.{suffix}", binarize="none")
        assert together(got)[:, 0].sum() == flags.sum()


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 3)])
def test_a_parquet_column_of_lists_is_a_matrix(tmp_path, rows, kind):
    label = pa.array(np.arange(40))
    table = pa.table({"pixels": pa.array(rows.tolist(), kind), "label": label})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    got = load(tmp_path / "x.parquet", columns=("pixels",), binarize="none")
    np.testing.assert_array_equal(together(got), in_order(rows.astype(np.float32)))
    assert got.fingerprint == load(save(tmp_path / "x.npy", rows)).fingerprint
    with pytest.raises(InputError, match=r"not numeric: 'pixels' .*data\.columns"):
        load(tmp_path / "x.parquet")


def test_uneven_or_null_lists_are_refused(tmp_path):
    for lists in ([[0.1, 0.2], [0.3]] * 5, [[0.1, 0.2], None] * 5):
        parquet.write_table(pa.table({"x": lists}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match="column 'x' are not of one length"):
            load(tmp_path / "x.parquet")


def test_columns_picks_and_orders(tmp_path, rows):
    for suffix in (".csv", ".parquet"):
        got = load(save(tmp_path / f"x{suffix}", rows), columns=("width", "age"), binarize="none")
        np.testing.assert_array_equal(together(got), in_order(rows[:, [2, 0]].astype(np.float32)))
        assert got.columns == ("width", "age")


def test_an_npz_key_picks_and_several_arrays_without_one_are_refused_by_name(tmp_path, rows):
    path = tmp_path / "x.npz"
    np.savez(path, first=rows, second=rows / 2)
    assert together(load(path, key="second", binarize="none")).max() <= 0.5
    with pytest.raises(InputError, match=r"set data\.key to one of: first, second"):
        load(path)
    with pytest.raises(InputError, match="no array 'secnd'; did you mean second"):
        load(path, key="secnd")


@pytest.mark.parametrize("keys", [("x_train", "x_test"), ("X_train", "X_test"), ("train", "test"),
                                  ("train_images", "test_images")])  # fmt: skip
def test_an_npz_with_a_test_array_keeps_it_whole_and_in_order(tmp_path, rows, keys):
    test = rows[:5] ** 2
    np.savez(tmp_path / "x.npz", **dict(zip(keys, (rows, test), strict=True)), y_train=np.arange(40))
    got = load(tmp_path / "x.npz", binarize="none", test_fraction=0.5)
    np.testing.assert_array_equal(got.test, test.astype(np.float32))
    assert (len(got.train), len(got.validation)) == (36, 4)
    kept = in_order(np.concatenate([got.train, got.validation]))
    np.testing.assert_array_equal(kept, in_order(rows.astype(np.float32)))


def test_a_path_may_start_with_a_tilde(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "x.npy", rows)
    assert load("~/x.npy").input_dim == 3


# ---- images


@pytest.mark.parametrize(
    ("shape", "wanted", "image"),
    [
        ((10, 12), None, None),
        ((10, 12), (3, 4), (3, 4)),
        ((10, 12), (3, 4, 1), (3, 4)),
        ((10, 12), (2, 2, 3), (2, 2, 3)),
        ((10, 3, 4), None, (3, 4)),
        ((10, 3, 4, 1), None, (3, 4)),
        ((10, 1, 4, 3), None, (1, 4, 3)),
        ((10, 3, 1, 4), None, (3, 1, 4)),
    ],
)
def test_the_image_shape_comes_from_the_array_or_the_config(tmp_path, shape, wanted, image):
    array = np.random.default_rng(0).random(shape)
    got = load(save(tmp_path / "x.npy", array), image_shape=wanted, binarize="none")
    assert got.image_shape == image
    np.testing.assert_array_equal(together(got), in_order(array.reshape(10, 12).astype(np.float32)))


@pytest.mark.parametrize(
    ("shape", "wanted", "match"),
    [
        ((10, 12), (3, 5), r"\(3, 5\) makes 15 values, a row has 12"),
        ((10, 12), (12,), "images of shape"),
        ((10, 12), (-3, -4), "images of shape"),
        ((10, 12), (), "images of shape"),
        ((10, 3, 4, 4, 1), None, r"an array of shape \(10, 3, 4, 4, 1\)"),
        ((10, 3, 8, 8), None, r"images of shape \(3, 8, 8\).*channels being 1, 3 or 4"),
        ((10,), None, r"an array of shape \(10,\)"),
        ((), None, r"an array of shape \(1,\)"),
        ((10, 1), None, "a row of 1 value"),
        ((10, 0), None, "a row of 0 value"),
    ],
)
def test_shapes_that_are_neither_rows_nor_images_are_refused(tmp_path, shape, wanted, match):
    with pytest.raises(InputError, match=match):
        load(save(tmp_path / "x.npy", np.full(shape, 0.5)), image_shape=wanted)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_are_read_plain_or_zipped_under_both_spellings(tmp_path, zipped, dot):
    train, test = write_idx(tmp_path, zipped, dot)
    got = load("mnist", data_dir=str(tmp_path), binarize="none", test_fraction=0.5)
    np.testing.assert_array_equal(got.test, test.reshape(6, 12) / np.float32(255))
    kept = in_order(np.concatenate([got.train, got.validation]))
    np.testing.assert_array_equal(kept, in_order(train.reshape(20, 12) / np.float32(255)))
    assert (len(got.train), len(got.validation), got.image_shape) == (18, 2, (3, 4))


def test_an_unpacked_idx_file_that_kept_its_gz_name_is_read(tmp_path):
    write_idx(tmp_path, zipped=True)
    for file in tmp_path.glob("*.gz"):
        file.write_bytes(gzip.decompress(file.read_bytes()))
    assert load("mnist", data_dir=str(tmp_path)).input_dim == 12


def test_idx_files_are_looked_for_in_order(tmp_path, monkeypatch):
    places = {
        "system": tmp_path / "system" / "mnist",
        "cache": tmp_path / "cache" / "vaesearch" / "mnist",
        "named": tmp_path / "variable" / "mnist",
        "variable": tmp_path / "variable",
        "given/named": tmp_path / "given" / "mnist",
        "given": tmp_path / "given",
    }
    monkeypatch.setenv("VAESEARCH_DATA_DIR", str(tmp_path / "variable"))
    for name in ("cache", "system", "named", "variable", "given/named", "given"):  # last to first
        write_idx(places[name])
        status = next(s for s in available_sources(str(tmp_path / "given")) if s.name == "mnist")
        assert status.found
        assert status.where == str(places[name])
        assert status.description == "20 + 6 images of 3 x 4"
    assert load("mnist").input_dim == 12


def test_a_folder_named_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_idx(tmp_path / "mnist")
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        load("fashion-mnist", data_dir=str(tmp_path / "mnist"))
    write_idx(tmp_path / "mnist" / "fashion-mnist")
    assert load("fashion-mnist", data_dir=str(tmp_path / "mnist")).input_dim == 12


def test_missing_idx_files_tell_where_they_were_sought_and_what_would_do(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError) as caught:
        load("mnist", data_dir=str(tmp_path))
    for words in (str(tmp_path), str(tmp_path / "cache"), "t10k-labels-idx1-ubyte.gz", "ossci-datasets"):
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def wrong_magic(content: bytes) -> bytes:
    return gzip.compress(struct.pack(">I", 2049) + gzip.decompress(content)[4:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (torn, "end-of-stream"),
        (wrong_magic, "magic number is 0x00000801"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "promises 72 bytes and 71 follow"),
        (lambda content: gzip.compress(gzip.decompress(content) + b"x"), "promises 72 bytes and 73 follow"),
        (lambda content: gzip.decompress(content)[:10], "16 bytes"),
        (lambda content: b"", "16 bytes"),
        (lambda content: content[:20] + b"\xff\xff\xff" + content[23:], "."),
    ],
)
def test_a_torn_idx_file_is_named(tmp_path, damage, reason):
    write_idx(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=rf"{re.escape(str(file))}: cannot be read \(.*{reason}"):
        load("mnist", data_dir=str(tmp_path))
    status = next(s for s in available_sources(str(tmp_path)) if s.name == "mnist")
    assert status.found


def test_available_sources_reports_a_wrong_magic_number_and_absent_files(tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(wrong_magic(file.read_bytes()))
    digits, mnist, fashion = available_sources(str(tmp_path / "mnist"))
    assert (digits.found, mnist.found, fashion.found) == (True, False, False)
    assert "apt-get" in fashion.how_to_get
    assert "magic number" in available_sources(str(tmp_path))[1].description


@pytest.mark.skipif(not MNIST.is_dir(), reason="the real MNIST files are not beside this repository")
def test_real_mnist_has_its_known_sizes_and_mean():
    got = load("mnist", data_dir=str(MNIST))
    assert (got.train.shape, got.validation.shape, got.test.shape) == ((54000, 784), (6000, 784), (10000, 784))
    assert got.image_shape == (28, 28)
    assert got.train.mean(dtype=np.float64) == pytest.approx(0.1307, abs=5e-4)
    assert set(np.unique(got.validation)) == {0.0, 1.0}


def test_digits_are_those_that_scikit_learn_reads():
    from sklearn.datasets import load_digits

    source = readers.read_source(DataConfig(source="digits"))
    np.testing.assert_array_equal(source.train, load_digits().images)


def test_digits_are_sixteenths():
    got = load("digits", binarize="none")
    assert together(got).shape == (1797, 64)
    assert got.image_shape == (8, 8)
    np.testing.assert_array_equal(np.unique(together(got)), np.arange(17, dtype=np.float32) / 16)


# ---- sources and files that are not there, or not what they seem


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("mnits", "did you mean mnist"),
        ("MNIST", "did you mean mnist"),
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("x.txt", r"known: digits, mnist, fashion-mnist, or a file ending in \.npy, \.npz, \.csv, \.parquet"),
        ("no/such/file.npy", "no such file"),
    ],
)
def test_an_unknown_source_names_the_known_and_the_nearest(source, match):
    with pytest.raises(InputError, match=match):
        load(source)


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_torn_file_is_named(tmp_path, rows, suffix, kept):
    path = save(tmp_path / f"x{suffix}", rows)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: cannot be read \(.+\)"):
        load(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "cannot be read .*[Ee]mpty"),
        (b"a,b\n", "too few rows"),
        (b"a,b\n0.1,0.2\n0.3\n", "cannot be read .*Expected 2 columns, got 1"),
        (b"\x00\x01\x02,\xff\n", "cannot be read"),
        (b"\xff\xfea\x00,\x00b\x00", "cannot be read"),
        (b"a,a\n0.1,0.2\n", "column 'a' is there twice"),
        (b"a\n0.1\n0.2\n0.3\n", "a row of 1 value"),
        (b"a,b\n0.1,x\n0.2,0.3\n", r"not numeric: 'b' \(string\); .*data\.columns"),
        (b"a,b\n0.1,2020-01-01\n0.2,2020-01-02\n", r"not numeric: 'b' \(date32"),
        (b"a,b,c,d,e,f,g\n" + b"x,x,x,x,x,x,x\n" * 3, r"'a' .* 'e' \(string\) and 2 more"),
    ],
)
def test_a_bad_csv_is_refused_in_words(tmp_path, content, match):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=match):
        load(tmp_path / "x.csv")


def test_an_unknown_column_brings_the_nearest(tmp_path, rows):
    for suffix in (".csv", ".parquet"):
        with pytest.raises(InputError, match=r"no column 'hieght' .*did you mean height"):
            load(save(tmp_path / f"x{suffix}", rows), columns=("age", "hieght"))


def test_settings_of_another_format_are_refused(tmp_path, rows):
    path = save(tmp_path / "x.npy", rows)
    with pytest.raises(InputError, match=r"data\.columns is for"):
        load(path, columns=("a",))
    with pytest.raises(InputError, match=r"data\.key is for"):
        load(path, key="a")


class Harm:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_pickles_are_never_run(tmp_path):
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Harm()))
    np.save(tmp_path / "object.npy", np.array([[Harm(), 1]], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "object.npz", "w") as archive:
        archive.write(tmp_path / "object.npy", "x.npy")
    for name in ("plain.npy", "object.npy", "object.npz"):
        with pytest.raises(InputError, match=f"{name}: cannot be read .*allow_pickle"):
            load(tmp_path / name)


@pytest.mark.parametrize("array", [np.full((9, 2), "a"), np.full((9, 2), 1j), np.zeros(9, "f4,f4")])
def test_arrays_without_real_numbers_are_refused(tmp_path, array):
    with pytest.raises(InputError, match="holds no real numbers"):
        load(save(tmp_path / "x.npy", array))


# ---- values


@pytest.mark.parametrize("scale", ["auto", "none", "minmax"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_placed_and_counted(tmp_path, rows, scale, value):
    rows[3, 1] = rows[17, 0] = value
    shown = {"nan": "NaN"}.get(str(value), str(value))
    for suffix, column in ((".npy", "1"), (".csv", r"1 \('height'\)"), (".parquet", r"1 \('height'\)")):
        path = save(tmp_path / f"x{suffix}", rows)
        words = rf"x{suffix}: row 3, column {column}, both counted from 0, is {shown} \(2 values are not finite\)"
        with pytest.raises(InputError, match=words):
            load(path, scale=scale)


def test_a_null_cell_is_a_nan(tmp_path):
    parquet.write_table(pa.table({"n": [0, 1, None, 0], "flag": [True, None, False, True]}), tmp_path / "x.parquet")
    write_csv(tmp_path / "x.csv", [("n", "flag"), (0, "true"), (1, ""), ("", "false"), (0, "true")])
    for suffix in ("csv", "parquet"):
        with pytest.raises(InputError, match=r"row 1, column 1 \('flag'\).* is NaN \(2 values"):
            load(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize(("dtype", "shown"), [(np.float32, r"2\.0"), (np.int64, "2")])
@pytest.mark.parametrize("scale", ["auto", "none"])
def test_values_outside_the_unit_interval_are_placed_and_minmax_is_named(tmp_path, dtype, shown, scale):
    array = np.eye(9, 4, dtype=dtype)
    array[5, 2], array[6, 0] = 2, -3
    words = rf"row 5, column 2, .* is {shown}, outside \[0, 1\] \(the data span -3.* to 2.*\); .*minmax"
    with pytest.raises(InputError, match=words):
        load(save(tmp_path / "x.npy", array), scale=scale)


def test_a_bad_value_of_the_test_array_is_placed_there(tmp_path, rows):
    for value, words in ((np.nan, "is NaN"), (7.0, r"is 7\.0, outside")):
        test = rows[:5].copy()
        test[2, 0] = value
        np.savez(tmp_path / "x.npz", x_train=rows, x_test=test)
        with pytest.raises(InputError, match=rf"\(test split\): row 2, column 0.*{words}"):
            load(tmp_path / "x.npz")


def test_training_and_test_rows_of_two_shapes_are_refused(tmp_path, rows):
    np.savez(tmp_path / "x.npz", x_train=rows, x_test=rows[:, :2])
    with pytest.raises(InputError, match=r"differ in shape: \(40, 3\) and \(40, 2\)"):
        load(tmp_path / "x.npz")


def test_uint8_is_divided_by_255_unless_binary_already(tmp_path):
    bytes_ = np.arange(200, dtype=np.uint8).reshape(50, 4)
    got = load(save(tmp_path / "x.npy", bytes_), binarize="none")
    np.testing.assert_array_equal(together(got), in_order((bytes_ / 255).astype(np.float32)))
    bits = bytes_ % 2 * np.uint8(1)
    np.testing.assert_array_equal(
        together(load(save(tmp_path / "x.npy", bits), binarize="none")), in_order(bits.astype(np.float32))
    )
    with pytest.raises(InputError, match=r'data\.scale = "auto"'):
        load(save(tmp_path / "x.npy", bytes_), scale="none")


def test_a_uint8_parquet_stays_uint8(tmp_path):
    bytes_ = np.arange(150, dtype=np.uint8).reshape(50, 3)
    got = load(save(tmp_path / "x.parquet", bytes_), binarize="none")
    np.testing.assert_array_equal(together(got), in_order((bytes_ / 255).astype(np.float32)))


def test_minmax_of_a_table_is_by_column_and_of_the_training_rows_alone(tmp_path):
    table = np.random.default_rng(1).normal([1.7e9, -5, 0], [1, 100, 1], (60, 3))
    table[:, 2] = 4.0
    path = save(tmp_path / "x.npy", table)
    held_out_extremes = 0
    for seed in range(5):
        got = load(path, scale="minmax", binarize="none", seed=seed)
        undone = got.restore(got.train)
        train = table[[np.abs(table - row).sum(axis=1).argmin() for row in undone]]
        np.testing.assert_allclose(undone, train, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(got.shift, train.min(axis=0))
        np.testing.assert_array_equal(got.factor, train.max(axis=0) - train.min(axis=0))
        held_out_extremes += (got.shift > table.min(axis=0)).any() or (train.max(axis=0) < table.max(axis=0)).any()
        assert (got.train.min(), got.train[:, :2].max(axis=0).min(), got.train[:, 2].max()) == (0, 1, 0)
        assert together(got).min() >= 0
        assert together(got).max() <= 1
    assert held_out_extremes, "no seed put an extreme row outside of training: the test proves nothing"


def test_minmax_of_images_is_one_pair(tmp_path):
    images = np.random.default_rng(1).normal(size=(60, 2, 3)) * np.arange(1, 7).reshape(2, 3)
    got = load(save(tmp_path / "x.npy", images), scale="minmax", binarize="none")
    assert got.shift.shape == got.factor.shape == (6,)
    assert len(set(got.shift)) == len(set(got.factor)) == 1
    assert (got.train.min(), got.train.max()) == (0, 1)


def test_a_column_constant_in_training_is_0_in_every_split(tmp_path):
    table = np.random.default_rng(1).random((30, 3))
    np.savez(tmp_path / "x.npz", x_train=table * [1, 1, 0], x_test=table)
    got = load(tmp_path / "x.npz", scale="minmax", binarize="none")
    np.testing.assert_array_equal(got.test[:, 2], 0)


@settings(max_examples=40, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(6, 20), st.integers(2, 5)),
        elements=st.floats(-1e100, 1e100, allow_nan=False),
    )
)
def test_minmax_puts_any_finite_table_into_the_unit_interval_or_refuses_it(tmp_path_factory, table):
    path = save(tmp_path_factory.mktemp("any") / "x.npy", table)
    try:
        got = load(path, scale="minmax", binarize="none")
    except InputError as error:
        assert "every value" in str(error)  # noqa: PT017
        return
    assert np.isfinite(together(got)).all()
    assert together(got).min() >= 0
    assert together(got).max() == 1


def test_constant_data_are_refused(tmp_path):
    for scale in ("auto", "minmax"):
        with pytest.raises(InputError, match=r"every value is 0\.25"):
            load(save(tmp_path / "x.npy", np.full((20, 3), 0.25)), scale=scale)


def test_a_threshold_that_leaves_only_zeros_is_refused(tmp_path, rows):
    with pytest.raises(InputError, match="binarize = 'threshold'"):
        load(save(tmp_path / "x.npy", rows / 2), binarize="threshold")


# ---- real numbers and counts


REAL = {"support": "real", "binarize": "none"}
COUNTS = {"support": "counts", "binarize": "none"}


@pytest.fixture
def cancer(tmp_path) -> Path:
    """scikit-learn's breast cancer table: 569 rows of 30 columns on scales from 1e-3 to 1e3."""
    from sklearn.datasets import load_breast_cancer

    return save(tmp_path / "cancer.npy", load_breast_cancer().data)


def test_tables_of_real_numbers_are_standardised_by_the_training_rows(cancer):
    got = load(cancer, **REAL)
    np.testing.assert_allclose(got.train.mean(axis=0, dtype=np.float64), np.zeros(30), atol=1e-6)
    np.testing.assert_allclose(got.train.std(axis=0, dtype=np.float64), np.ones(30), atol=1e-6)
    assert np.abs(got.validation.mean(axis=0)).max() > 1e-3
    np.testing.assert_array_equal(load(cancer, scale="standard", **REAL).train, got.train)


@pytest.mark.parametrize("scale", ["auto", "standard", "minmax", "none"])
def test_restore_undoes_every_scale(cancer, scale):
    table = np.load(cancer)
    np.savez(cancer.with_suffix(".npz"), x_train=table[:500], x_test=table[500:])
    got = load(cancer.with_suffix(".npz"), scale=scale, **REAL)
    own = got.restore(got.train)
    assert own.dtype == np.float64
    train = table[[(np.abs(table - row) / table.std(axis=0)).sum(axis=1).argmin() for row in own]]
    test = table[500:]
    if scale == "minmax":
        assert (test > train.max(axis=0)).any()
        test = test.clip(train.min(axis=0), train.max(axis=0))
    spread = train.std(axis=0)
    for restored, wanted in ((own, train), (got.restore(got.test), test)):
        np.testing.assert_allclose(restored / spread, wanted / spread, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.units.scale(train), got.train, rtol=1e-6)
    np.testing.assert_allclose(got.units.scale(table[500:]), got.test, rtol=1e-6)


def test_a_large_offset_survives_standardising(tmp_path):
    table = np.random.default_rng(0).normal([1.7e9, -1e-8], [100, 1e-12], (60, 2))
    got = load(save(tmp_path / "x.npy", table), **REAL)
    np.testing.assert_allclose(in_order(got.restore(together(got))), in_order(table), rtol=1e-6)
    np.testing.assert_allclose(got.train.std(axis=0), [1, 1], rtol=1e-5)


def test_a_constant_column_is_0_and_standard_never_clips(tmp_path):
    table = np.random.default_rng(1).normal(size=(40, 3))
    table[:, 2] = 0.1
    test = table[:5] * 100
    np.savez(tmp_path / "x.npz", x_train=table, x_test=test)
    got = load(tmp_path / "x.npz", **REAL)
    np.testing.assert_array_equal(got.train[:, 2], 0)
    assert (got.shift[2], got.factor[2]) == (0.1, 1)
    np.testing.assert_allclose(got.restore(got.test), test, rtol=1e-6)
    assert np.abs(got.test).max() > 20


def test_images_are_standardised_by_one_mean_and_spread(tmp_path):
    images = np.random.default_rng(1).normal(size=(60, 2, 3)) * np.arange(1, 7).reshape(2, 3)
    got = load(save(tmp_path / "x.npy", images), scale="standard", **REAL)
    assert len(set(got.shift)) == len(set(got.factor)) == 1
    assert got.train.mean() == pytest.approx(0, abs=1e-6)
    assert got.train.std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(
        in_order(got.restore(together(got))), in_order(images.reshape(60, 6)), rtol=1e-6, atol=1e-6
    )


def test_images_of_real_numbers_stay_as_they_are_and_bytes_are_divided(tmp_path):
    images = np.random.default_rng(1).normal(size=(60, 2, 3))
    got = load(save(tmp_path / "x.npy", images), **REAL)
    np.testing.assert_array_equal(together(got), in_order(images.reshape(60, 6).astype(np.float32)))
    assert got.shift is None
    digits = load("digits", **REAL)
    np.testing.assert_array_equal(np.unique(together(digits)), np.arange(17, dtype=np.float32) / 16)
    np.testing.assert_array_equal(np.unique(digits.restore(digits.train)), np.arange(17))
    np.testing.assert_array_equal(digits.units.scale(digits.restore(digits.train)), digits.train)


@pytest.mark.parametrize("scale", ["auto", "none", "minmax"])
def test_values_beyond_float32_are_refused_where_the_scale_does_not_help(tmp_path, rows, scale):
    rows[3, 1] = 1e200
    path = save(tmp_path / "x.npy", rows.reshape(40, 3, 1))
    if scale == "minmax":
        assert load(path, scale=scale, **REAL).train.max() == 1
    else:
        with pytest.raises(InputError, match=r"beyond float32; .*minmax"):
            load(path, scale=scale, **REAL)


@settings(max_examples=40, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(6, 20), st.integers(2, 5)),
        elements=st.floats(-1e300, 1e300, allow_nan=False),
    )
)
def test_any_finite_table_is_standardised_to_finite_rows_or_refused(tmp_path_factory, table):
    path = save(tmp_path_factory.mktemp("any") / "x.npy", table)
    try:
        got = load(path, **REAL)
    except InputError as error:
        assert re.search("every value|beyond float32", str(error))  # noqa: PT017
        return
    assert np.isfinite(together(got)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_counts_stay_as_they_are(tmp_path, dtype):
    counts = np.random.default_rng(0).poisson([1, 20, 100], (40, 3)).astype(dtype)
    got = load(save(tmp_path / "x.npy", counts), **COUNTS)
    np.testing.assert_array_equal(together(got), in_order(counts.astype(np.float32)))
    assert got.train.dtype == np.float32
    assert got.shift is got.factor is None
    np.testing.assert_array_equal(got.restore(got.train), got.train)


def test_bytes_of_images_may_be_counts():
    np.testing.assert_array_equal(np.unique(together(load("digits", **COUNTS))), np.arange(17))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-1, r'row 3, column 1, .* is -1\.0, and counts are whole .*model\.likelihood = "gaussian"'),
        (2.5, r'row 3, column 1, .* is 2\.5, and counts are whole .*model\.likelihood = "gaussian"'),
        (2.0**25, r"row 3, column 1, .* is 33554432\.0, beyond the 16777216 "),
        (np.nan, "is NaN"),
    ],
)
def test_what_is_no_count_is_placed_and_the_likelihood_that_fits_is_named(tmp_path, value, match):
    counts = np.random.default_rng(0).poisson(5, (40, 3)).astype(float)
    counts[3, 1] = value
    with pytest.raises(InputError, match=match) as caught:
        load(save(tmp_path / "x.npy", counts), **COUNTS)
    assert 1 <= len(str(caught.value).splitlines()) <= 3


def test_grey_values_as_counts_name_the_continuous_bernoulli(tmp_path, rows):
    with pytest.raises(InputError, match=r'is 0\.\d+, .*model\.likelihood = "continuous_bernoulli"'):
        load(save(tmp_path / "x.npy", rows), **COUNTS)


@pytest.mark.parametrize(("value", "other"), [(7, "poisson"), (7.5, "gaussian"), (-7, "gaussian")])
def test_values_outside_the_unit_interval_name_the_likelihood_that_fits(tmp_path, value, other):
    table = np.eye(9, 4)
    table[5, 2] = value
    with pytest.raises(InputError, match=rf'outside \[0, 1\] .*model\.likelihood = "{other}"') as caught:
        load(save(tmp_path / "x.npy", table))
    assert 1 <= len(str(caught.value).splitlines()) <= 3


# ---- which likelihood


def advice(likelihood: str, source: object, **settings: object) -> str | None:
    """As a study would load the data for it."""
    support = SUPPORTS[likelihood]  # type: ignore[index]
    data = load(source, **{"support": support, "binarize": "none", **settings})
    text = likelihood_advice(likelihood, data)
    assert (text is None) or "\n" not in text
    return text


def test_grey_digits_are_no_bernoulli_variables():
    text = advice("bernoulli", "digits")
    assert "compare with each other alone" in text
    assert 'model.likelihood = "continuous_bernoulli"' in text
    for binarize in ("threshold", "static", "dynamic"):
        assert advice("bernoulli", "digits", binarize=binarize) is None
        assert 'model.likelihood = "bernoulli"' in advice("continuous_bernoulli", "digits", binarize=binarize)
    assert advice("continuous_bernoulli", "digits") is None
    assert advice("gaussian", "digits") is None
    assert advice("gaussian", "digits", scale="standard") is None
    assert advice("negative_binomial", "digits") is None
    assert 'model.likelihood = "negative_binomial"' in advice("poisson", "digits")
    assert fitting_likelihoods(load("digits", binarize="none"))[0] == "continuous_bernoulli"


def test_measurements_are_gaussian(cancer):
    assert advice("gaussian", cancer) is None
    assert advice("gaussian", cancer, scale="minmax") is None
    assert advice("continuous_bernoulli", cancer, scale="minmax") is None
    assert 'model.likelihood = "continuous_bernoulli"' in advice("bernoulli", cancer, scale="minmax")
    assert fitting_likelihoods(load(cancer, **REAL)) == ("gaussian",)


@pytest.mark.parametrize("scale", ["auto", "none", "minmax"])
def test_zeros_and_ones_are_bernoulli_variables(tmp_path, scale):
    path = save(tmp_path / "x.npy", (np.random.default_rng(0).random((80, 5)) < 0.3).astype(np.int64))
    for name in SUPPORTS:
        text = advice(name, path, scale="auto" if SUPPORTS[name] == "counts" else scale)
        if name == "bernoulli":
            assert text is None
        else:
            assert "0 and 1 alone" in text
            assert 'model.likelihood = "bernoulli"' in text
    assert fitting_likelihoods(load(path)) == ("bernoulli",)


def test_counts_are_told_from_measurements_and_from_each_other(tmp_path):
    rng = np.random.default_rng(0)
    rates = rng.lognormal(0, 0.6, (400, 1)) * rng.lognormal(1, 1, 30)
    poisson = save(tmp_path / "poisson.npy", rng.poisson(rates))
    spread = save(tmp_path / "spread.npy", rng.poisson(rates * rng.gamma(1, 1, rates.shape)))
    assert advice("poisson", poisson) is None
    assert advice("negative_binomial", poisson) is None
    assert advice("negative_binomial", spread) is None
    text = advice("poisson", spread)
    assert re.search(r"vary \d+\.\d times as much as Poisson", text)
    assert 'model.likelihood = "negative_binomial"' in text
    for scale in ("auto", "none", "minmax"):
        assert 'model.likelihood = "poisson"' in advice("gaussian", poisson, scale=scale)
        assert 'model.likelihood = "negative_binomial"' in advice("gaussian", spread, scale=scale)
    assert fitting_likelihoods(load(poisson, **COUNTS)) == ("poisson", "negative_binomial")
    assert fitting_likelihoods(load(spread, **COUNTS)) == ("negative_binomial",)


# ---- splits


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_rows_are_too_few(tmp_path, count):
    with pytest.raises(InputError, match=rf"too few rows \({count}\)"):
        load(save(tmp_path / "x.npy", np.eye(9)[:count]))


def test_three_rows_make_one_of_each_and_no_row_to_train_on_is_an_error(tmp_path):
    path = save(tmp_path / "x.npy", np.eye(3))
    got = load(path)
    assert (len(got.train), len(got.validation), len(got.test)) == (1, 1, 1)
    with pytest.raises(InputError, match="too few rows"):
        load(path, validation_fraction=0.5, test_fraction=0.49)
    np.savez(tmp_path / "x.npz", train=np.eye(3), test=np.eye(3)[:0])
    with pytest.raises(InputError, match=r"too few rows \(3 \+ 0\)"):
        load(tmp_path / "x.npz")


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(3, 200),
    seed=st.integers(0, 2**40),
    validation=st.floats(0.01, 0.4),
    test=st.floats(0.01, 0.4),
)
def test_splits_are_disjoint_complete_of_the_asked_sizes_and_reproducible(
    tmp_path_factory, count, seed, validation, test
):
    numbers = np.arange(count) / count
    path = save(tmp_path_factory.mktemp("any") / "x.npy", np.stack([numbers, np.ones(count)], axis=1))
    asked = {"seed": seed, "validation_fraction": validation, "test_fraction": test, "binarize": "none"}
    sizes = max(1, round(validation * count)), max(1, round(test * count))
    if sum(sizes) >= count:
        with pytest.raises(InputError, match="too few rows"):
            load(path, **asked)
        return
    got, again = load(path, **asked), load(path, **asked)
    assert (len(got.validation), len(got.test)) == sizes
    np.testing.assert_array_equal(together(got), in_order(np.load(path).astype(np.float32)))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(got, split), getattr(again, split))


def test_another_seed_splits_otherwise(tmp_path, rows):
    path = save(tmp_path / "x.npy", rows)
    first, second = (load(path, seed=seed, binarize="none") for seed in (0, 1))
    assert (first.validation != second.validation).any()
    assert (first.test != second.test).any()


# ---- binarisation


@pytest.fixture
def grey_file(tmp_path: Path) -> Path:
    """2000 equal rows, so that each split has the same grey values, 0 and 1 among them."""
    return save(tmp_path / "grey.npy", np.tile(np.linspace(0, 1, 50), (2000, 1)))


def test_bernoulli_draws_have_the_grey_values_as_frequencies(grey_file):
    got = load(grey_file, binarize="static")
    grey = np.linspace(0, 1, 50)
    for split in (got.train, got.validation, got.test):
        assert set(np.unique(split)) == {0.0, 1.0}
        bound = 5 * np.sqrt(grey * (1 - grey) / len(split))  # 5 standard errors: one false alarm in 10^4 runs
        assert (np.abs(split.mean(axis=0) - grey) <= bound).all()
    assert (got.validation != got.test).any()
    assert (got.train[:200] != got.validation).any()


def test_static_and_dynamic_share_validation_and_test_and_dynamic_keeps_training_grey(grey_file):
    static, dynamic = load(grey_file, binarize="static"), load(grey_file, binarize="dynamic")
    np.testing.assert_array_equal(static.validation, dynamic.validation)
    np.testing.assert_array_equal(static.test, dynamic.test)
    np.testing.assert_allclose(dynamic.train.mean(axis=0, dtype=np.float64), np.linspace(0, 1, 50), atol=1e-7)
    np.testing.assert_array_equal(dynamic.train, load(grey_file, binarize="none").train)
    other = load(grey_file, binarize="dynamic", seed=1)
    assert (dynamic.validation != other.validation).any()


def test_threshold_is_one_above_a_half(tmp_path):
    array = np.tile([0, 0.5, np.nextafter(np.float32(0.5), 1), 1], (20, 1)).astype(np.float32)
    got = load(save(tmp_path / "x.npy", array), binarize="threshold")
    np.testing.assert_array_equal(together(got), np.tile([0, 0, 1, 1], (20, 1)))


# ---- floors


def test_reading_every_format_imports_neither_torch_nor_ray_nor_pyarrow_dataset(tmp_path, rows):
    files = [str(save(tmp_path / f"x{suffix}", rows)) for suffix in (".npy", ".npz", ".csv", ".parquet")]
    code = (
        "import sys; from vae.config import DataConfig; from vae.data import load_data\n"
        "assert 'sklearn' not in sys.modules and 'pyarrow' not in sys.modules\n"
        f"for source in {['digits', *files]!r}: load_data(DataConfig(source=source))\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'sklearn', 'pyarrow.dataset') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
