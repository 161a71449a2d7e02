"""The benchmarks run, and the table of curves is what it says: made by this program, whole and reproducible."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae import export

FOLDER = Path(__file__).parent / "benchmarks"
TABLE = FOLDER / "curves.parquet"
MAX_EPOCHS = 60
MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def printed_by(script: str, *arguments: str) -> str:
    command = [sys.executable, FOLDER / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_table_has_hundreds_of_configurations_for_each_warm_up_with_every_epoch_of_the_budget():
    assert TABLE.stat().st_size < 2_000_000
    rows = pq.read_table(TABLE).to_pylist()
    for warmup in (0, 5, 20):
        of_warmup = [row for row in rows if row["kl_warmup_epochs"] == warmup]
        assert len(of_warmup) >= 400
        assert len({row["activation"] for row in of_warmup}) == 8
        assert all(len(row["val_recon"]) == len(row["val_kl"]) == MAX_EPOCHS for row in of_warmup)


def test_a_row_of_the_table_is_trained_again_to_the_same_curve():
    """Its beginning: the last bits of a matrix product are another machine's affair, and grow.

    With the draws that there were when the table was made, and the gradient by autograd.
    """
    code = (
        "import json, torch, pyarrow.parquet as pq, make_curves as m, vae.training as t\n"
        "t.covers, t.limits = lambda model: False, lambda rows: rows\n"
        "t.coins = lambda rows: torch.rand_like(rows).lt_(rows)\n"
        "row = pq.read_table(m.TABLE).to_pylist()[700]\n"
        "m.Trainer.__iter__ = lambda self: (self.train_epoch() for _ in range(4))\n"
        "keys = ('kl_warmup_epochs', 'setting', 'activation', *m.RANGED)\n"
        "setting = m.settings(50, 0)[row['setting']]\n"
        "again = m.train(**{**{k: row[k] for k in keys}, **setting})\n"
        "print(json.dumps([row['val_recon'][:4], again['val_recon'], row['val_kl'][:4], again['val_kl']]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    recon, recon_again, kl, kl_again = np.array(json.loads(done.stdout))
    assert np.allclose(recon, recon_again, atol=0.02)
    assert np.allclose(kl, kl_again, atol=0.02)


def test_the_benchmark_prints_a_table_in_which_every_search_hands_over_a_model():
    arguments = ["--seeds", "2", "--warmups", "20", "--budgets", "240", "--processes", "1"]
    lines = printed_by("replay.py", *arguments).splitlines()
    for name in ("random", "stock (a)", "stock (b)", "stock (c)", "vaesearch"):
        assert any(name in line for line in lines)
    (first, second) = (line for line in lines if line.startswith("   240"))
    assert first.count("[") == second.count("[") == 5
    assert first.endswith(" 0")  # no seed without a model


@pytest.mark.skipif(not MNIST.is_dir(), reason="the real MNIST files are not beside this repository")
def test_the_runs_on_mnist_print_a_line_each_with_the_reference_and_leave_their_models(tmp_path):
    cut = ["--epochs", "1", "--train-images", "300", "--test-images", "20", "--samples", "10"]
    folders = ["--data-dir", str(MNIST), "--save", str(tmp_path)]
    title, head, *lines = printed_by("mnist.py", *cut, *folders).splitlines()
    assert "20 test images, 10 importance samples" in title
    assert [line.split()[0] for line in lines] == ["burda-mini", "strong-mini"]
    assert ["86.76" in line for line in lines] == [True, False]
    for line in lines:
        at = head.index("minutes") + len("minutes")
        nll, standard_error, active, nelbo, _ = map(float, line[at:].split()[:5])
        assert 100 < nll < nelbo < 500
        assert 0 < standard_error < 50
        assert 0 <= active <= 50
    model = export.load(tmp_path / "burda-mini")
    assert (model.config.latent_dim, model.config.activation) == (50, "tanh")


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_healthy_activations_on_the_digits_gain_what_they_gained_with_other_code():
    names = ["silu", "elu", "leaky_relu(0.2)", "tanh", "linear"]
    _, *lines = printed_by("digits.py", *names, "--seeds", "1").splitlines()
    assert len(lines) == 2 * len(names)
    for line in lines:
        gain, other = map(float, line.split()[5:7])
        assert gain == pytest.approx(other, abs=0.3), line


def test_the_benchmark_of_a_step_prints_the_floor_ours_and_the_usual_loop(tmp_path):
    quick = ["--rounds", "2", "--seconds", "0.02", "--networks", "784-400-20", "--batches", "128"]
    lines = printed_by("step.py", *quick, "--to", str(tmp_path / "step.parquet")).splitlines()
    for name in ("floor", "ours, float32", "ours, bfloat16", "loop"):
        assert any(line.split("128", 1)[-1].strip().startswith(name) for line in lines)
    assert pq.read_table(tmp_path / "step.parquet").num_rows >= 4 * 2


def test_the_benchmark_of_suggestions_asks_both_samplers():
    output = printed_by("asks.py", "--sizes", "20", "40", "--pairs", "2", "--trials", "20")
    assert "20" in output
    assert "40" in output
    for workers in (1, 2):
        assert f"{workers} at once, waited for" in output


def test_the_benchmark_of_queries_takes_pairs_of_each(tmp_path):
    output = printed_by("query.py", "--trials", "20", "--pairs", "1", "--to", str(tmp_path / "query.parquet"))
    for name in ("count", "by trial", "top 10", "--help"):
        assert name in output
    assert {"count", "by trial", "top 10"} <= set(pq.read_table(tmp_path / "query.parquet")["query"].to_pylist())


def test_the_report_of_whole_runs_pairs_what_ran_in_turns_and_keeps_other_work_apart(tmp_path):
    times = {"begun_at", "busy_s", "stolen_s", "first_s", "exit_s", "begin_s", "train_s", "beside_s", "gap_s", "end_s"}
    common = {
        **dict.fromkeys(times, 1.0),
        "space": "one",
        "epochs": 3,
        "train_rows": 800,
        "workers": 2,
        "reached_s": None,
    }
    common |= {"part": "short", "round": 0, "value": 100.0, "best": 100.0, "full": 4}
    walls = {"a": (4, 10.0, 5.0), "b": (4, 30.0, 10.0), "c": (20, 70.0, 10.0)}  # trials, ours, the floor: 2, 3 and 7
    for name, (trials, ours, floor) in walls.items():
        rows = [{"arm": arm, "wall_s": wall} for arm, wall in (("vaesearch", ours), ("floor", floor))]
        pq.write_table(pa.Table.from_pylist([{**common, "trials": trials, **row} for row in rows]), tmp_path / name)
    lines = printed_by("throughput.py", "--report", *(str(tmp_path / name) for name in walls)).splitlines()
    tables = [line.split(" trials")[0] for line in lines if line.startswith("short: ")]
    assert tables == ["short: 4", "short: 20"]
    first, _, second, _ = (line for line in lines if line.startswith("vaesearch"))
    assert "2.50 [2.25, 2.75] of 2" in first
    assert "7.00 [7.00, 7.00] of 1" in second


@pytest.mark.system
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not MNIST.is_dir(), reason="the MNIST files are not beside this checkout")
def test_the_benchmark_of_whole_runs_accounts_for_all_of_the_time_of_each_arm(tmp_path):
    file, trials, workers = tmp_path / "runs.parquet", 4, 2
    quick = ["--short-trials", str(trials), "--short-epochs", "1", "--rows", "1000", "--repeats", "1"]
    printed_by("throughput.py", "--only", "short", *quick, "--data-dir", str(MNIST), "--to", str(file))
    rows = pq.read_table(file).to_pylist()
    assert sorted(row["arm"] for row in rows) == sorted(["ray", "optuna", "optuna+step", "vaesearch", "floor"])
    for row in rows:
        assert row["full"] == trials
        in_turn = trials / workers
        accounted = row["begin_s"] + in_turn * (row["train_s"] + row["beside_s"]) + (in_turn - 1) * row["gap_s"]
        assert accounted + row["end_s"] == pytest.approx(row["wall_s"], abs=1e-6)
