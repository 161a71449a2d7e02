"""The replay benchmark runs, and its table is what it says: real curves of this program, whole and reproducible."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent / "benchmarks"
TABLE = FOLDER / "curves.parquet"
MAX_EPOCHS = 60


def test_the_table_has_hundreds_of_configurations_for_each_warm_up_with_every_epoch_of_the_budget():
    assert TABLE.stat().st_size < 2_000_000
    rows = pq.read_table(TABLE).to_pylist()
    for warmup in (0, 5, 20):
        of_warmup = [row for row in rows if row["kl_warmup_epochs"] == warmup]
        assert len(of_warmup) >= 400
        assert len({row["activation"] for row in of_warmup}) == 8
        assert all(len(row["val_recon"]) == len(row["val_kl"]) == MAX_EPOCHS for row in of_warmup)


def test_a_row_of_the_table_is_trained_again_to_the_same_curve():
    """Its beginning: the last bits of a matrix product are another machine's affair, and grow."""
    code = (
        "import json, pyarrow.parquet as pq, make_curves as m\n"
        "row = pq.read_table(m.TABLE).to_pylist()[700]\n"
        "m.Trainer.__iter__ = lambda self: (self.train_epoch() for _ in range(4))\n"
        "keys = ('kl_warmup_epochs', 'setting', 'activation', *m.RANGED)\n"
        "setting = m.settings(50, 0)[row['setting']]\n"
        "again = m.train({**{k: row[k] for k in keys}, **setting})\n"
        "print(json.dumps([row['val_recon'][:4], again['val_recon'], row['val_kl'][:4], again['val_kl']]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    recon, recon_again, kl, kl_again = np.array(json.loads(done.stdout))
    assert np.allclose(recon, recon_again, atol=0.02)
    assert np.allclose(kl, kl_again, atol=0.02)


def test_the_benchmark_prints_a_table_in_which_every_search_hands_over_a_model():
    arguments = ["--seeds", "2", "--warmups", "20", "--budgets", "240", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, FOLDER / "replay.py", *arguments], capture_output=True, text=True, check=True
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for name in ("random", "stock (a)", "stock (b)", "stock (c)", "vaesearch"):
        assert any(name in line for line in lines)
    (first, second) = (line for line in lines if line.startswith("   240"))
    assert first.count("[") == second.count("[") == 5
    assert first.endswith(" 0")  # no seed without a model
