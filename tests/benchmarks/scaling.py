"""What a trial and a report cost the driver, and from it how many workers one driver can feed.

    python tests/benchmarks/scaling.py                     # some ten minutes on two cores
    python tests/benchmarks/scaling.py --trials 40 --workers 1 --repeats 1
    python tests/benchmarks/scaling.py --fifths --trials 5000 --workers 2    # does a trial cost more the more there are

Trials of next to no work (64 rows, one layer of 4) on logical CPUs, so that what is seen is the driver. Its own CPU
time is taken between the first tenth of the trials and the last; a driver is one thread of Python, so that a second of
it is a second. Trials that report once, and trials that report eight times, give the cost of a trial and of a report.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

REPORTS = (1, 8)
TRIAL_S = (10, 60, 600)
REPORT_EVERY_S = 2.0  # search.attempt.STEP_S
BUSY = 0.5  # of the driver's thread: beyond, workers begin to wait for it


def measure(trials: int, workers: int, reports: int, parts: int) -> list[dict[str, float]]:
    """In a process of its own: seconds of CPU time and of wall time a trial, in each of `parts` of the study.

    The first tenth of the first part, in which the workers start, is left out.
    """
    import numpy as np

    from cluster.runtime import ray_runtime
    from search.events import StudyEvents
    from search.spec import StudySpec
    from search.study import run_study
    from search.tables import TrialRow

    ends = [max(1, trials // (10 * parts)), *(trials * part // parts for part in range(1, parts + 1))]

    class Clock(StudyEvents):
        ended = 0
        marks: list[tuple[float, float]] = []  # noqa: RUF012  # one a process

        def trial_ended(self, row: TrialRow) -> None:
            self.ended += 1
            if self.ended in ends:
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
    costs = zip(*(itertools.pairwise(of) for of in (ends, *zip(*clock.marks, strict=True))), strict=True)
    return [
        {"cpu_s": (cpu_end - cpu) / (end - begin), "wall_s": (wall_end - wall) / (end - begin)}
        for (begin, end), (cpu, cpu_end), (wall, wall_end) in costs
    ]


def in_a_process(*arguments: int) -> list[dict[str, float]]:
    code = f"import json, scaling; print(json.dumps(scaling.measure(*{arguments})))"
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show_fifths(trials: int, workers: int) -> None:
    print(f"one study of {trials} trials with one report, {workers} workers: ms a trial in each fifth")
    fifths = in_a_process(trials, workers, 1, 5)
    for name, what in (("cpu_s", "driver's CPU time"), ("wall_s", "wall time")):
        values = [1e3 * fifth[name] for fifth in fifths]
        figures = "".join(f"{value:8.1f}" for value in values)
        print(f"{what:<18}{figures}   last / first {values[-1] / values[0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fifths", action="store_true", help="what a trial costs in each fifth of one study")
    options = parser.parse_args()
    if options.fifths:
        for workers in options.workers:
            show_fifths(options.trials, workers)
        return
    print(f"{options.trials} trials, medians of {options.repeats}: driver's CPU and wall time, ms a trial")
    print("workers   " + "".join(f"{n} report{'s' * (n > 1):<9}" + 8 * " " for n in REPORTS))
    found: dict[int, list[Any]] = {n: [] for n in REPORTS}
    for workers in options.workers:
        line = f"{workers:>7}   "
        for reports in REPORTS:
            runs = [in_a_process(options.trials, workers, reports, 1)[0] for _ in range(options.repeats)]
            cpu, wall = (1e3 * statistics.median(run[name] for run in runs) for name in ("cpu_s", "wall_s"))
            found[reports].append(cpu)
            line += f"{cpu:6.1f} {wall:7.1f}     "
        print(line, flush=True)
    once, often = (statistics.median(found[n]) for n in REPORTS)
    report = max(0.0, (often - once) / (REPORTS[1] - REPORTS[0]))
    trial = max(0.0, once - REPORTS[0] * report)
    print(f"\na trial costs the driver {trial:.1f} ms, a report {report:.2f} ms; one comes every {REPORT_EVERY_S:g} s")
    for length in TRIAL_S:
        busy = (trial + length / REPORT_EVERY_S * report) / (1e3 * length)  # of the thread, for each worker
        print(f"trials of {length:>3} s: {BUSY / busy:6.0f} workers at {BUSY:.0%} of the driver's thread")


if __name__ == "__main__":
    main()
