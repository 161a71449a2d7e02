"""What a trial and a report cost the driver, and from it how many workers one driver can feed.

    python tests/benchmarks/scaling.py                     # some ten minutes on two cores
    python tests/benchmarks/scaling.py --trials 40 --workers 1 --repeats 1

Trials of next to no work (64 rows, one layer of 4) on logical CPUs, so that what is seen is the driver. Its own CPU
time is taken between the first tenth of the trials and the last; a driver is one thread of Python, so that a second of
it is a second. Trials that report once, and trials that report eight times, give the cost of a trial and of a report.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

REPORTS = (1, 8)
TRIAL_S = (10, 60, 600)
BUSY = 0.5  # of the driver's thread: beyond, workers begin to wait for it


def measure(trials: int, workers: int, reports: int) -> dict[str, float]:
    """In a process of its own: seconds of CPU time and of wall time a trial."""
    import numpy as np

    from cluster.runtime import ray_runtime
    from search.events import StudyEvents
    from search.spec import StudySpec
    from search.study import run_study
    from search.tables import TrialRow

    class Clock(StudyEvents):
        ended = 0
        marks: list[tuple[float, float]] = []  # noqa: RUF012  # one a process

        def trial_ended(self, row: TrialRow) -> None:
            self.ended += 1
            if self.ended in (max(1, trials // 10), trials):
                self.marks.append((time.process_time(), time.monotonic()))

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/rows.npy", np.random.default_rng(0).random((80, 4), dtype=np.float32))
        spec = StudySpec.load(
            None,
            {
                "name": "scaling",
                "storage.path": folder,
                "data.source": f"{folder}/rows.npy",
                "model.hidden_dims": [4],
                "train.kl_warmup_epochs": 0,
                "train.batch_size": 64,
                "budget.trials": trials,
                "budget.max_epochs": 2 ** (reports - 1),  # a report at each power of two
                "scheduler.kind": "none",
                "scheduler.grace_epochs": 1,
                "scheduler.reduction_factor": 2,
                "resources.concurrency": workers,
                "export.top": 0,
            },
        )
        clock = Clock()
        with ray_runtime(num_cpus=workers):
            run_study(spec, events=[clock])
    (cpu, wall), (cpu_end, wall_end) = clock.marks
    counted = trials - max(1, trials // 10)
    return {"cpu_s": (cpu_end - cpu) / counted, "wall_s": (wall_end - wall) / counted}


def in_a_process(*arguments: int) -> dict[str, float]:
    code = f"import json, scaling; print(json.dumps(scaling.measure(*{arguments})))"
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.trials} trials, medians of {options.repeats}: driver's CPU and wall time, ms a trial")
    print("workers   " + "".join(f"{n} report{'s' * (n > 1):<9}" + 8 * " " for n in REPORTS))
    found: dict[int, list[Any]] = {n: [] for n in REPORTS}
    for workers in options.workers:
        line = f"{workers:>7}   "
        for reports in REPORTS:
            runs = [in_a_process(options.trials, workers, reports) for _ in range(options.repeats)]
            cpu, wall = (1e3 * statistics.median(run[name] for run in runs) for name in ("cpu_s", "wall_s"))
            found[reports].append(cpu)
            line += f"{cpu:6.1f} {wall:7.1f}     "
        print(line, flush=True)
    once, often = (statistics.median(found[n]) for n in REPORTS)
    report = max(0.0, (often - once) / (REPORTS[1] - REPORTS[0]))
    trial = max(0.0, once - REPORTS[0] * report)
    print(f"\na trial costs the driver {trial:.1f} ms, a report {report:.2f} ms; a worker reports once a second")
    for length in TRIAL_S:
        busy = (trial + length * report) / (1e3 * length)  # of the thread, for each worker
        print(f"trials of {length:>3} s: {BUSY / busy:6.0f} workers at {BUSY:.0%} of the driver's thread")


if __name__ == "__main__":
    main()
