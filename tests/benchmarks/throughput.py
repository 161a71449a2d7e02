"""What a study costs beside the training: ours against scripts that one would write, side by side, start-up included.

    python tests/benchmarks/throughput.py --to throughput.parquet     # on two cores some four hours
    python tests/benchmarks/throughput.py --only short --to short.parquet     # one hour
    python tests/benchmarks/throughput.py --only short --short-trials 4 --repeats 1 --rows 1000     # two minutes
    python tests/benchmarks/throughput.py --only short --arms vaesearch floor --to pair.parquet    # two arms alone
    python tests/benchmarks/throughput.py --report short.parquet medium.parquet

Every arm is a fresh process from its start to its exit, on two workers of one thread each:

    ray            Ray Tune and OptunaSearch as in Ray's documentation: throughput_arms/ray_tune.py
    optuna         Optuna alone in two processes that share a journal and one budget of trials, the data in memory:
                   throughput_arms/optuna_alone.py
    optuna+step    the same with the training step of vae.training
    vaesearch      `vaesearch run`
    floor          vae.training.Trainer in two bare processes that take trials from one list: throughput_arms/floor.py

Equal work (short, medium, long): the space is one configuration (784-400-16, relu, batches of 128, Adam at 1e-3), each
trial another seed, none stopped; so all arms train the same. How many epochs a trial of about 1, 10 and 30 s has on
this machine is measured first, by the floor. With --search-rate all but the floor search the learning rate, so that
their samplers have something to do, and a step takes what it took. The arms take turns at being first, after each
has run once, not counted, so that none reads its programs from the disk for the others. Ratios are of the arms of one
round; shown are medians [quartiles]. Beside them stands where the time goes. A trial's training is its epochs (steps
and validation) in all arms; data, model and optimizer are what else a trial takes. The trials of vaesearch begin and
end when the driver hears of it, the others' in their workers: what lies between is its trials', and their gaps'.

Equal budget (budget): ray with ASHA, and vaesearch, search the default space with as many trials and epochs. Both are
judged by the same binarised validation rows, in nats per example at beta = 1. Shown is when vaesearch first had a
trial of all epochs that is no worse than what ray ended with. What vaesearch brings by default is part of that: a
first trial with good parameters, a cosine schedule, KL warm-up. With --same-recipe ray begins with that trial, too, and
vaesearch trains at a constant rate without warm-up, as ray does: what is left is the search and its machinery.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCRIPTS = Path(__file__).parent / "throughput_arms"
ARMS = ("ray", "optuna", "optuna+step", "vaesearch", "floor")
PARTS = {"short": (100, 1.0), "medium": (24, 10.0), "long": (12, 30.0)}  # trials, seconds of one
BUDGET = "budget"
BUDGET_ARMS = ("ray", "vaesearch")
CALIBRATION_EPOCHS = 20
LEFT_BEHIND_S = 10.0  # in which processes that an arm leaves behind may end by themselves
PR_SET_CHILD_SUBREAPER = 36

OURS = ("model.hidden_dims=[400]", "train.batch_size=128")
ONE_CONFIGURATION = (
    "space.activation=relu",
    "space.dropout=0",
    "space.learning_rate=1e-3",
    "space.latent_dim=16",
    "scheduler.kind=none",
)
RAYS_RECIPE = ("train.lr_schedule=constant", "train.kl_warmup_epochs=0")

Space = Literal["one", "rate", "whole", "alike"]


@dataclass(frozen=True)
class Trial:
    """One trial of an arm. Times in seconds since 1970."""

    started: float
    ended: float
    train_s: float  # of its epochs: training and validation, but not what is built before
    epochs: int
    value: float  # of the last epoch, nats per example


@dataclass(frozen=True)
class Job:
    """What all arms of a round are asked for."""

    folder: Path  # of the data
    scratch: Path  # empty
    trials: int
    epochs: int
    workers: int
    seed: int
    space: Space  # the last two: with early stopping; alike: by one recipe


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One run of one arm: a row of the Parquet. Seconds; means over trials or workers where there are several."""

    part: str
    space: Space
    arm: str
    round: int
    begun_at: float  # since 1970
    trials: int
    epochs: int  # of a trial at the most
    train_rows: int
    workers: int
    wall_s: float
    busy_s: float  # CPU time of the whole machine meanwhile: of the arm, and of whoever disturbs it
    stolen_s: float  # CPU time that the host gave to others
    first_s: float  # start to first trial
    exit_s: float  # last trial's end to exit
    begin_s: float  # start to a worker's first trial
    train_s: float  # of a trial's epochs: training and validation
    beside_s: float  # what else a trial takes
    gap_s: float  # between two trials of a worker
    end_s: float  # a worker's last trial's end to exit
    value: float  # median over trials that were trained to the end
    best: float  # the least of all trials
    full: int  # trials trained to the end
    reached_s: float | None = None  # of budget: when a full trial first was no worse than the best of ray


# ---- the arms


def ray_commands(job: Job) -> list[list[str]]:
    command = [*script("ray_tune.py", job), "--trials", f"{job.trials}", "--seed", f"{job.seed}"]
    command += ["--workers", f"{job.workers}", "--results", f"{job.scratch}/results"]
    command += {"one": [], "rate": ["--search-rate"], "whole": ["--search"], "alike": ["--search"]}[job.space]
    return [command + (["--start", our_start()] if job.space == "alike" else [])]


def our_start() -> str:
    """The first trial of vaesearch, as JSON."""
    from search.space import Space
    from search.spec import StudySpec

    return json.dumps(Space(StudySpec().space).start())


def optuna_commands(job: Job, step: str) -> list[list[str]]:
    command = [*script("optuna_alone.py", job), "--step", step, "--journal", f"{job.scratch}/journal.log"]
    command += ["--trials", f"{job.trials}"] + ["--search-rate"] * (job.space == "rate")
    return [command] * job.workers


def our_commands(job: Job) -> list[list[str]]:
    program = [str(Path(sys.executable).with_name("vaesearch")), "run", "--name", "study"]
    program += ["--storage", f"{job.scratch}", "--data", f"{job.folder}/rows.npy", "--seed", f"{job.seed}"]
    program += ["--trials", f"{job.trials}", "--max-epochs", f"{job.epochs}"]
    settings = [*OURS, f"resources.concurrency={job.workers}"]
    if job.space in ("one", "rate"):
        settings += ONE_CONFIGURATION
    if job.space == "alike":
        settings += RAYS_RECIPE
    if job.space == "rate":
        settings += ["space.learning_rate={low=1e-4, high=3e-3, log=true}"]
    return [program + [part for setting in settings for part in ("--set", setting)]]


def floor_commands(job: Job) -> list[list[str]]:
    return [[*script("floor.py", job), "--trials", f"{job.trials}", "--workers", f"{job.workers}"]]


def script(name: str, job: Job) -> list[str]:
    out = ["--epochs", f"{job.epochs}", "--out", f"{job.scratch}/trials.jsonl"]
    return [sys.executable, str(SCRIPTS / name), str(job.folder), *out]


COMMANDS: Mapping[str, Callable[[Job], list[list[str]]]] = {
    "ray": ray_commands,
    "optuna": lambda job: optuna_commands(job, "own"),
    "optuna+step": lambda job: optuna_commands(job, "vae"),
    "vaesearch": our_commands,
    "floor": floor_commands,
}


def trials_of(arm: str, scratch: Path) -> list[Trial]:
    """As the arm recorded them."""
    if arm != "vaesearch":
        return [Trial(**json.loads(line)) for line in (scratch / "trials.jsonl").read_text().splitlines()]
    study = scratch / "study"
    placed = {row["trial"]: row for row in rows_of(study / "attempts", "trial", "placed_at", "ended_at")}
    return [
        Trial(
            started=placed[row["trial"]]["placed_at"].timestamp(),
            ended=placed[row["trial"]]["ended_at"].timestamp(),
            train_s=row["train_wall_s"],
            epochs=row["epochs"],
            value=math.inf if row["val_nelbo"] is None else row["val_nelbo"],
        )
        for row in rows_of(study / "trials", "trial", "train_wall_s", "epochs", "val_nelbo")
    ]


def rows_of(table: Path, *columns: str) -> list[dict]:
    return [
        row
        for part in sorted(table.glob("part-*.parquet"))
        for row in pq.read_table(part, columns=list(columns)).to_pylist()
    ]


# ---- running them


def measured(part: str, arm: str, round_: int, job: Job, train_rows: int) -> tuple[Figure, list[Trial]]:
    """Run an arm in an empty folder, see that it did its work, and say where the time went."""
    with tempfile.TemporaryDirectory(dir=job.scratch) as scratch:
        job = replace(job, scratch=Path(scratch))
        commands = COMMANDS[arm](job)
        started = time.time()
        before = cpu_times()
        ended = run(commands, Path(scratch))
        busy_s, stolen_s = (after - then for after, then in zip(cpu_times(), before, strict=True))
        trials = sorted(trials_of(arm, Path(scratch)), key=lambda trial: trial.started)
    full = [trial.value for trial in trials if trial.epochs == job.epochs]
    done = len(full) if job.space in ("one", "rate") else len(trials)
    if done != job.trials or not full:
        raise SystemExit(f"{part}: {arm} made {done} of {job.trials} trials, {len(full)} of {job.epochs} epochs")
    figure = Figure(
        part=part,
        space=job.space,
        arm=arm,
        round=round_,
        begun_at=started,
        trials=job.trials,
        epochs=job.epochs,
        train_rows=train_rows,
        workers=job.workers,
        wall_s=ended - started,
        busy_s=busy_s,
        stolen_s=stolen_s,
        first_s=trials[0].started - started,
        exit_s=ended - max(trial.ended for trial in trials),
        value=statistics.median(full),
        best=min(trial.value for trial in trials),
        full=len(full),
        **shares(trials, job.workers, started, ended),
    )
    return figure, [replace(t, started=t.started - started, ended=t.ended - started) for t in trials]


def shares(trials: Sequence[Trial], workers: int, started: float, ended: float) -> dict[str, float]:
    """They add up to the wall time: begin + n * (train + beside) + (n - 1) * gap + end, n = trials / workers."""
    lines: list[list[Trial]] = [[] for _ in range(min(workers, len(trials)))]
    for trial in trials:  # to the worker that has been free for longest
        min(lines, key=lambda line: line[-1].ended if line else 0.0).append(trial)
    gaps = [after.started - before.ended for line in lines for before, after in itertools.pairwise(line)]
    return {
        "begin_s": statistics.fmean(line[0].started - started for line in lines),
        "train_s": statistics.fmean(trial.train_s for trial in trials),
        "beside_s": statistics.fmean(trial.ended - trial.started - trial.train_s for trial in trials),
        "gap_s": statistics.fmean(gaps) if gaps else 0.0,
        "end_s": statistics.fmean(ended - line[-1].ended for line in lines),
    }


def run(commands: Sequence[Sequence[str]], scratch: Path) -> float:
    """Start all, wait for all; when the last one ended. Nothing of theirs is left behind."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(scratch)}
    environment.pop("RAY_ADDRESS", None)
    log = scratch / "output.log"
    processes: list[subprocess.Popen] = []
    try:
        with log.open("w") as output:
            for command in commands:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        statuses = [process.wait() for process in processes]
        ended = time.time()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
        reap(LEFT_BEHIND_S)
    if any(statuses):
        raise SystemExit(f"{' '.join(commands[0])}\n{log.read_text()[-3000:]}")
    return ended


def reap(patience_s: float) -> None:
    """Wait for what the arm left behind, then kill it: a Ray that is still there would disturb the next one."""
    give_up = time.monotonic() + patience_s
    with contextlib.suppress(ChildProcessError):  # no more of them
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid and time.monotonic() > give_up:
                for left in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    print(f"left behind and killed: process {left}", file=sys.stderr)
                    os.kill(int(left), signal.SIGKILL)
            if not pid:
                time.sleep(0.05)


def adopt_orphans() -> None:
    """What the arms' processes leave behind becomes a child of this process: Linux alone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def cpu_times() -> tuple[float, float]:
    """Seconds that all cores were at work, and that the host took away, since the machine started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


# ---- the parts


class Record:
    """The figures so far, on disk after each run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.figures: list[Figure] = []

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(f"{figure.part} {figure.round}: {figure.arm} {figure.wall_s:.1f} s", file=sys.stderr, flush=True)
        if self.path is not None:
            pq.write_table(pa.Table.from_pylist([asdict(figure) for figure in self.figures]), self.path)


def warm_up(arms: Iterable[str], job: Job) -> None:
    """A trial of an epoch for each worker of each arm. What is read from the disk for the first time, is read now."""
    for arm in arms:
        measured("warm-up", arm, 0, replace(job, trials=job.workers, epochs=1), 0)


def equal_work(part: str, options: argparse.Namespace, job: Job, train_rows: int, record: Record) -> None:
    for round_ in rounds(options):
        turn = round_ % len(options.arms)
        for arm in (*options.arms[turn:], *options.arms[:turn]):
            record.add(measured(part, arm, round_, job, train_rows)[0])


def equal_budget(options: argparse.Namespace, job: Job, record: Record) -> None:
    """Each round has a seed, and with it a split, of its own."""
    for seed in rounds(options):
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
            train_rows = write_splits(np.load(job.folder / "rows.npy"), Path(folder), seed)
            asked = replace(job, folder=Path(folder), seed=seed)
            runs = {arm: measured(BUDGET, arm, seed, asked, train_rows) for arm in order(seed)}
        target = runs["ray"][0].best
        for figure, trials in runs.values():
            reached = [t.ended for t in trials if t.epochs == job.epochs and t.value <= target]
            record.add(replace(figure, reached_s=min(reached, default=None)))


def rounds(options: argparse.Namespace) -> range:
    return range(options.first_round, options.first_round + options.repeats)


def order(round_: int) -> Sequence[str]:
    return BUDGET_ARMS[::-1] if round_ % 2 else BUDGET_ARMS


def write_splits(rows: np.ndarray, folder: Path, seed: int) -> int:
    """rows.npy and, as vae.data splits and binarises them, train.npy (grey) and validation.npy; rows of train.npy."""
    import vae

    np.save(folder / "rows.npy", rows)
    data = vae.load_data(vae.DataConfig(source=f"{folder}/rows.npy", seed=seed))
    np.save(folder / "train.npy", data.train)
    np.save(folder / "validation.npy", data.validation)
    return len(data.train)


def mnist_rows(data_dir: str | None, count: int) -> np.ndarray:
    """(count, 28, 28) uint8."""
    import vae
    from vae.readers import read_source

    return read_source(vae.DataConfig(source="mnist", data_dir=data_dir)).train[:count]


def epoch_seconds(job: Job, train_rows: int) -> float:
    """Of the floor, with all workers at work."""
    asked = replace(job, trials=2 * job.workers, epochs=CALIBRATION_EPOCHS)
    return measured("calibration", "floor", 0, asked, train_rows)[0].train_s / CALIBRATION_EPOCHS


# ---- the tables


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The middle one where there is none between: a value may be infinite."""
    low, median, high = np.percentile(values, [25, 50, 75], method="nearest" if len(values) % 2 else "linear")
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] of {len(values)}"


def report_work(figures: Sequence[Figure]) -> None:
    print(f"\n{title(figures[0])}; medians [quartiles] of runs, and of pairs in a round")
    print(f"{'arm':<12}{'wall s':>28}{'times the floor':>26}{'times vaesearch':>26}{'busy s':>8}{'nats':>8}")
    of = {(figure.arm, figure.round): figure for figure in figures}
    for arm in [arm for arm in ARMS if any(figure.arm == arm for figure in figures)]:
        own = [figure for figure in figures if figure.arm == arm]
        line = f"{arm:<12}{spread([figure.wall_s for figure in own], 1):>28}"
        for other in ("floor", "vaesearch"):
            pairs = [f.wall_s / of[other, f.round].wall_s for f in own if (other, f.round) in of]
            line += f"{spread(pairs) if pairs else '':>26}"
        busy_s, value = (statistics.median(getattr(f, name) for f in own) for name in ("busy_s", "value"))
        print(f"{line}{busy_s:8.0f}{value:8.2f}")
    report_shares(figures)


def report_shares(figures: Sequence[Figure]) -> None:
    names = ("first_s", "begin_s", "train_s", "beside_s", "gap_s", "end_s", "exit_s")
    print("\nwhere it goes, s: start to first trial, to a worker's first; a trial's training, what else it takes, ")
    print("between two trials of a worker; a worker's last to exit, the last of all to exit; medians of the means")
    print(f"{'arm':<12}" + "".join(f"{name.removesuffix('_s'):>9}" for name in names))
    for arm in [arm for arm in ARMS if any(figure.arm == arm for figure in figures)]:
        own = [figure for figure in figures if figure.arm == arm]
        medians = (statistics.median(getattr(figure, name) for figure in own) for name in names)
        print(f"{arm:<12}" + "".join(f"{median:9.3f}" for median in medians))


def report_budget(figures: Sequence[Figure]) -> None:
    print(f"\n{title(figures[0])}; when the best of ray was reached, s, and over all the time of ray")
    print("round  ray: wall    best  reached  full   vaesearch: wall    best  reached  full   ratio  to ray's reached")
    of = {(figure.arm, figure.round): figure for figure in figures}
    ratios: list[tuple[float, float]] = []
    for round_ in sorted(round_ for arm, round_ in of if arm == "ray" and ("vaesearch", round_) in of):
        ray, ours = of["ray", round_], of["vaesearch", round_]
        at, its = (math.inf if f.reached_s is None else f.reached_s for f in (ours, ray))
        ratios.append((at / ray.wall_s, at / its if its < math.inf else math.nan))
        print(f"{round_:5}{ray.wall_s:11.1f}{ray.best:8.2f}{its:9.1f}{ray.full:6}", end="")
        print(f"{ours.wall_s:18.1f}{ours.best:8.2f}{at:9.1f}{ours.full:6}{ratios[-1][0]:8.2f}{ratios[-1][1]:18.2f}")
    for name, values in zip(("all of ray's time", "ray's own time to it"), zip(*ratios, strict=True), strict=True):
        known = [value for value in values if not math.isnan(value)]  # ray's best may be of a trial that it stopped
        if known:
            print(f"vaesearch's time to it by {name}: {spread(known)}, median [quartiles] of pairs")


def report(figures: Sequence[Figure]) -> None:
    """A table for each of what the arms were asked for."""
    for part in (*PARTS, BUDGET):
        of_part = [figure for figure in figures if figure.part == part]
        for asked in dict.fromkeys(map(title, of_part)):
            own = [figure for figure in of_part if title(figure) == asked]
            (report_budget if part == BUDGET else report_work)(own)


def title(figure: Figure) -> str:
    space = {"one": "", "rate": ", learning rate searched", "whole": "", "alike": ", by ray's recipe"}[figure.space]
    return (
        f"{figure.part}: {figure.trials} trials of {figure.epochs} epochs{space}, {figure.train_rows} rows, "
        f"{figure.workers} workers"
    )


def read_figures(paths: Sequence[Path]) -> Iterator[Figure]:
    """Those of a later file are other rounds: only what ran in turns is a pair."""
    before = 0
    for path in paths:
        rows = pq.read_table(path).to_pylist()
        yield from (Figure(**row | {"round": before + row["round"]}) for row in rows)
        before += 1 + max((row["round"] for row in rows), default=-1)


# ---- the command line


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PARTS, BUDGET], default=[*PARTS, BUDGET], metavar="PART")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="of equal work")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, or seeds of the budget")
    parser.add_argument("--first-round", type=int, default=0, help="its number, of the budget its seed: to add more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", help="with the idx files of MNIST; none: where vae.data finds them")
    parser.add_argument("--rows", type=int, default=6400, help="of MNIST; 80 % are trained on, 10 % judged by")
    for part, (trials, seconds) in PARTS.items():
        parser.add_argument(f"--{part}-trials", type=int, default=trials)
        parser.add_argument(f"--{part}-epochs", type=int, help=f"of a trial; none: about {seconds:g} s of them")
    parser.add_argument("--search-rate", action="store_true", help="search the learning rate in equal work")
    parser.add_argument("--same-recipe", action="store_true", help="in the budget: leave what vaesearch knows of VAEs")
    parser.add_argument("--budget-trials", type=int, default=40)
    parser.add_argument("--budget-epochs", type=int, default=30)
    parser.add_argument("--to", type=Path, help="Parquet for the raw figures")
    parser.add_argument("--report", type=Path, nargs="+", help="print the tables of such files and run nothing")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.report:
        report(list(read_figures(options.report)))
        return
    adopt_orphans()
    record = Record(options.to)
    with tempfile.TemporaryDirectory(prefix="tp-") as folder:  # short: Ray has sockets in it
        data, scratch = Path(folder) / "data", Path(folder)
        data.mkdir()
        train_rows = write_splits(mnist_rows(options.data_dir, options.rows), data, seed=0)
        space: Space = "rate" if options.search_rate else "one"
        job = Job(data, scratch, trials=0, epochs=0, workers=options.workers, seed=0, space=space)
        is_work, is_budget = options.only != [BUDGET], BUDGET in options.only
        warm_up(dict.fromkeys([*options.arms * is_work, *BUDGET_ARMS * is_budget]), job)
        epoch_s: float | None = None
        for part in options.only:
            asked = {name: getattr(options, f"{part}_{name}") for name in ("trials", "epochs")}
            if part == BUDGET:
                budget_space: Space = "alike" if options.same_recipe else "whole"
                equal_budget(options, replace(job, **asked, space=budget_space), record)
                continue
            if asked["epochs"] is None:
                epoch_s = epoch_s or epoch_seconds(job, train_rows)
                asked["epochs"] = max(1, round(PARTS[part][1] / epoch_s))
                print(f"{part}: an epoch of {train_rows} rows takes {epoch_s:.3f} s, a trial {asked['epochs']} epochs")
            equal_work(part, options, replace(job, **asked), train_rows, record)
    report(record.figures)


if __name__ == "__main__":
    main()
