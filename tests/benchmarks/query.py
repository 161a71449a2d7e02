"""`vaesearch query` against plain duckdb on the same files: whole processes, side by side.

    python tests/benchmarks/query.py                              # a million epochs of 5,000 trials; two minutes
    python tests/benchmarks/query.py --trials 50 --pairs 1        # to try it
    python tests/benchmarks/query.py --to query.parquet           # the raw times, too

The study is made of random figures by the ledger itself, in parts as any study has them. Plain duckdb is a
`python -c` that makes a view over each table's files, and prints what it fetches. The processes take turns, and of each
pair the ratio is taken; at the end, what `vaesearch --help` takes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from search.ledger import Ledger
from search.results import write_study_file
from search.spec import StudySpec
from search.tables import EpochRow, TrialRow

EPOCHS = 200  # of a trial
ACTIVATIONS = ("relu", "tanh", "silu", "gelu", "leaky_relu")
QUERIES = {
    "count": "SELECT count(*) FROM epochs",
    "by trial": "SELECT trial, min(val_nelbo) AS best, avg(wall_s) AS wall_s FROM epochs "
    "GROUP BY trial ORDER BY best LIMIT 20",
    "top 10": "SELECT trial, activation, epoch, epochs.val_nelbo FROM epochs JOIN trials USING (study, trial) "
    "WHERE learning_rate < 0.005 ORDER BY epochs.val_nelbo LIMIT 10",
}
PLAIN = """
import sys, duckdb
connection = duckdb.connect()
for table in (table for table in ("epochs", "trials") if table in sys.argv[2]):
    connection.execute(f"CREATE VIEW {table} AS FROM read_parquet('{sys.argv[1]}/*/{table}/*.parquet')")
for row in connection.sql(sys.argv[2]).fetchall():
    print(*row)
"""
RAW = pa.schema([("command", pa.string()), ("query", pa.string()), ("pair", pa.int32()), ("wall_s", pa.float64())])


def make_study(path: Path, trials: int) -> None:
    """Random figures, written as a study writes them."""
    spec = StudySpec.model_validate({"name": path.name, "budget": {"trials": trials, "max_epochs": EPOCHS}})
    path.mkdir(parents=True)
    now = datetime.now(UTC)
    write_study_file(path, spec, {"created_at": now, "data_fingerprint": "none"})
    ledger, rng = Ledger(path), np.random.default_rng(0)
    figures = ("train_nelbo", "train_recon", "train_kl", "val_nelbo", "val_recon", "val_kl", "grad_norm")
    for trial in range(trials):
        values = rng.normal(25, 1, (EPOCHS, len(figures) + 2)).tolist()
        ledger.add_epochs(
            EpochRow(
                study=path.name,
                trial=trial,
                epoch=epoch,
                attempt=1,
                **dict(zip(figures, row[2:], strict=True)),
                active_units=8,
                clipped_steps=0,
                skipped_steps=0,
                kl_weight=1.0,
                wall_s=row[0],
                samples_per_s=row[1],
                objective=row[5],
                reported_at=now,
            )
            for epoch, row in enumerate(values, start=1)
        )
        ledger.end_trial(
            TrialRow(
                study=path.name,
                trial=trial,
                state="COMPLETE",
                status="ok",
                activation=ACTIVATIONS[trial % len(ACTIVATIONS)],
                dropout=rng.uniform(0, 0.5),
                learning_rate=float(np.exp(rng.uniform(np.log(1e-4), np.log(1e-2)))),
                latent_dim=int(rng.integers(2, 65)),
                hidden_dims=[128, 128],
                batch_size=64,
                seed=trial,
                objective=values[-1][5],
                val_nelbo=values[-1][5],
                epochs=EPOCHS,
                max_epochs=EPOCHS,
                suggested_at=now,
                ended_at=now,
            )
        )
        if trial % 100 == 99:
            ledger.flush()
    ledger.flush()
    ledger.close()


def seconds(command: Sequence[str | Path]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--storage", type=Path, help="folder of the studies: made there, and used again if it is there")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the raw times, as Parquet")
    asked = parser.parse_args()
    vaesearch = Path(sys.executable).with_name("vaesearch")
    rows: list[tuple[str, str, int, float]] = []

    def take(command: str, query: str, pair: int, words: Sequence[str | Path]) -> None:
        rows.append((command, query, pair, seconds(words)))

    with tempfile.TemporaryDirectory() as scratch:
        storage = asked.storage or Path(scratch)
        if not (storage / "study").exists():
            make_study(storage / "study", asked.trials)
        for pair in range(-1, asked.pairs):  # the first one warms the caches
            for name, sql in QUERIES.items():
                ours, plain = (
                    [vaesearch, "query", sql, "--storage", storage],
                    [sys.executable, "-c", PLAIN, storage, sql],
                )
                turns = [("ours", ours), ("plain", plain)]
                for command, words in turns if pair % 2 else reversed(turns):
                    take(command, name, pair, words)
            take("help", "", pair, [vaesearch, "--help"])
            take("nothing", "", pair, [sys.executable, "-c", "pass"])
        parts = sorted((storage / "study" / "epochs").iterdir())
        epochs = sum(pq.read_metadata(part).num_rows for part in parts)
        size = sum(part.stat().st_size for part in parts) / 2**20
    rows = [row for row in rows if row[2] >= 0]
    if asked.to is not None:
        pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=RAW), asked.to)

    def times(command: str, query: str = "") -> list[float]:
        return [wall_s for its, of, _, wall_s in rows if (its, of) == (command, query)]

    print(f"{epochs:,} epochs in {len(parts)} parts, {size:.0f} MiB; seconds of a whole process, ", end="")
    print(f"median [least, most] of {asked.pairs} pairs")
    print(f"{'query':10}{'vaesearch':>20}{'plain duckdb':>20}{'ratio of a pair':>20}")
    for name in QUERIES:
        ours, plain = times("ours", name), times("plain", name)
        ratios = [one / other for one, other in zip(ours, plain, strict=True)]
        print(f"{name:10}{spread(ours):>20}{spread(plain):>20}{spread(ratios):>20}")
    print(f"vaesearch --help {spread(times('help'))}, python -c pass {spread(times('nothing'))}")


if __name__ == "__main__":
    main()
