"""The whole program by its command: first use, crashes, signals, results read meanwhile, people's own files."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clusters import BIN, clean_environment, command_of, descendants, is_alive

from search.results import Study, exported, open_study
from search.tables import SCHEMAS
from vae.data import load_data
from vae.export import read_config
from vae.training import Trainer

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
BY_ACTIVATION = "SELECT activation, min(val_nelbo) FROM trials GROUP BY 1 ORDER BY 2"

QUICK = ("--max-epochs", "3", "--set", "model.hidden_dims=[32]", "--set", "space.learning_rate=0.005")
"""Trials of less than a second on small data."""

STEADY = ("--max-epochs", "40", "--set", "model.hidden_dims=[96, 96]", "--set", "scheduler.grace_epochs=2")
"""Trials of a few seconds, so that there is a middle to be cut off in."""


def run(
    *arguments: str, cwd: Path, timeout: float = 600, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`vaesearch` with these arguments, to its end. extra: variables of its environment."""
    return subprocess.run(
        [BIN / "vaesearch", *arguments],
        cwd=cwd,
        env=clean_environment() | dict(extra or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_line(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as it was printed, in a shell."""
    return subprocess.run(
        line, shell=True, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=600
    )


class Driver:
    """`vaesearch` in the background, with what it has said so far."""

    def __init__(self, *arguments: str, cwd: Path, extra: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [BIN / "vaesearch", *arguments],
            cwd=cwd,
            env=clean_environment() | dict(extra or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._threads = [
            threading.Thread(target=lambda lines=lines, pipe=pipe: lines.extend(pipe), daemon=True)
            for lines, pipe in ((self.stdout, self.process.stdout), (self.stderr, self.process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait_until(self, condition: Callable[[], bool], timeout: float = 400) -> None:
        """Until it holds or the driver is over."""
        deadline = time.monotonic() + timeout
        while not self.is_over and not condition():
            assert time.monotonic() < deadline, "".join(self.stderr)
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: any(text in line for line in self.stderr))
        assert not self.is_over, "".join(self.stderr)

    def end(self, timeout: float = 600) -> int:
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextmanager
def driver(*arguments: str, cwd: Path, extra: Mapping[str, str] | None = None) -> Iterator[Driver]:
    """A driver that is over, with all its processes, when the block is."""
    running = Driver(*arguments, cwd=cwd, extra=extra)
    try:
        yield running
    finally:
        if not running.is_over:
            family = descendants(running.process.pid)
            running.process.kill()
            running.end()
            end_family(family, 100)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if is_alive(pid)}


def wait_until_gone(pids: set[int], timeout: float) -> None:
    started = time.monotonic()
    while left := alive(pids):
        assert time.monotonic() - started < timeout, [command_of(pid) for pid in left]
        time.sleep(0.1)


def agents(pids: set[int]) -> set[int]:
    """Ray's two helpers on a node, also before they have taken their names."""
    names = r"ray::(DashboardAgent|RuntimeEnvAgent)|dashboard/agent\.py|runtime_env/agent/main\.py"
    return {pid for pid in pids if re.search(names, command_of(pid))}


def end_family(pids: set[int], timeout: float) -> None:
    """Until all are gone but those helpers, which are ended here: else they are gone a minute later (ray 2.60)."""
    started = time.monotonic()
    while not (left := alive(pids)) <= agents(left):
        assert time.monotonic() - started < timeout, [command_of(pid) for pid in left]
        time.sleep(0.1)
    end(left)


def has_an_end(study: Path) -> bool:
    """Whether the end of a trial is on disk, which may be half a second after it was told."""
    return any(row.state != "RUNNING" for row in Study(study).rows())


def end(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def epochs_of(study: Study) -> dict[int, list[int]]:
    epochs = defaultdict(list)
    for row in study.epochs().sort_by([("trial", "ascending"), ("epoch", "ascending")]).to_pylist():
        epochs[row["trial"]].append(row["epoch"])
    return epochs


def assert_whole(study: Study, trials: int) -> None:
    """What must hold of a study that is complete, whatever befell it on the way."""
    rows, epochs = study.rows(), epochs_of(study)
    assert [row.trial for row in rows] == list(range(trials))
    assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"}
    for row in rows:
        assert epochs[row.trial] == list(range(1, row.epochs + 1)), row
        ends = [*study.spec.rungs(), row.max_epochs] if row.state == "PRUNED" else [row.max_epochs]
        assert row.epochs in ends
    left = {path.name for path in study.path.iterdir()}
    assert left <= {"study.toml", "models", *SCHEMAS}
    assert not [file for folder in study.path.iterdir() for file in folder.glob("*.tmp")]
    assert len(study.model_folders()) == len(exported(study.spec, rows))


def assert_retrains(study: Study, trial: int) -> None:
    """Trained here without a break, the trial has the very values that the ledger has."""
    spec, row = study.spec, study.rows()[trial]
    data = load_data(spec.data_config())
    trainer = Trainer(
        spec.model_config_for(row.params, data.row_shape), spec.train_config_for(row.params), data, seed=row.seed
    )
    table = study.epochs().sort_by("epoch")
    recorded = table.filter(pa.compute.equal(table["trial"], trial))["val_nelbo"].to_pylist()
    assert [trainer.train_epoch().val_nelbo for _ in recorded] == recorded


def assert_ours_alone(lines: list[str]) -> None:
    """No library speaks to people who asked for a study."""
    for line in lines:
        assert not re.search(r"\bray\b|raylet|gcs|optuna|warning|\(pid=|\bpid=|traceback|deprecat", line, re.I), line
        assert not re.match(r"\[?\d{4}-\d\d-\d\d|[IWE] ?\d{4}", line), line  # a logger's line


# ---- first use


def test_without_arguments_the_digits_are_searched_well(tmp_path):
    started = time.monotonic()
    done = run("run", cwd=tmp_path)
    print(f"the default study took {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / "digits")
    assert_whole(study, trials=24)
    best = study.summary().best
    assert best is not None
    print(f"best {best.val_nelbo:.3f}")
    assert best.val_nelbo <= 24.2
    assert f"{best.val_nelbo:.3f}" in done.stdout
    assert_ours_alone(done.stderr.splitlines())
    assert_ours_alone(done.stdout.splitlines())
    assert len(re.findall(r"^\[\d+/24\] ", done.stderr, re.M)) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["studies"]

    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith("  vaesearch ")]
    assert len(commands) >= 3
    for command in commands:
        printed = run_line(command, tmp_path)
        assert printed.returncode == 0, (command, printed.stderr)
        assert printed.stdout.strip()
        assert printed.stderr == ""
    (model,) = tmp_path.glob("model/*")
    assert read_config(model)["trial"] == best.trial

    again = run("run", cwd=tmp_path, timeout=60)
    assert again.returncode == 0
    assert "complete with 24 trials" in again.stderr  # nothing was left to do
    assert f"{best.val_nelbo:.3f}" in again.stdout


def test_nothing_is_written_beside_the_study_and_what_was_asked_for(tmp_path):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    for arguments in (
        ("run", "--trials", "2", "--max-epochs", "8", "--set", "scheduler.kind=none"),
        ("export", "digits", "--to", "models"),
        ("sample", "digits", "-o", "samples.png"),
        ("refit", "digits", "--epochs", "2", "--to", "longer", "--no-onnx"),
    ):
        done = run(*arguments, cwd=here, extra={"HOME": str(home)})
        assert done.returncode == 0, (arguments, done.stderr)
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in here.iterdir()) == ["longer", "models", "samples.png", "studies"]


# ---- signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_search_before_its_trials_end_and_names_the_command_that_goes_on(tmp_path, signum, code):
    path = tmp_path / "studies" / "study"
    with driver("run", "--name", "study", "--trials", "6", *STEADY, cwd=tmp_path) as running:
        running.wait_for("[1/6]")
        running.wait_until(lambda: has_an_end(path))
        family = descendants(running.process.pid)
        told = num_told(running)
        sent = time.monotonic()
        running.process.send_signal(signum)
        assert running.end(100) == code
        print(f"{signum.name}: gone after {time.monotonic() - sent:.1f} s")
        assert num_told(running) <= told + 2  # those that ended just then; none was waited for
        wait_until_gone(family, 60)
    assert running.stdout == []
    assert_ours_alone(running.stderr)
    command = running.stderr[-1].partition("go on with: ")[2].strip()
    assert shlex.split(command)[:2] == ["vaesearch", "run"]
    assert not (path / "lease.json").exists()
    ended = {row.trial: row for row in open_study(path).rows() if row.state != "RUNNING"}
    assert ended
    assert len(ended) < 6

    done = run_line(command, tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(path)
    assert_whole(study, trials=6)
    assert all(study.rows()[number] == row for number, row in ended.items())


def num_told(running: Driver) -> int:
    """Trials whose end it has told."""
    return sum(line.startswith("[") for line in running.stderr)


def has_loaded(running: Driver, library: str) -> bool:
    return library in Path(f"/proc/{running.process.pid}/maps").read_text()


def starts_ray(running: Driver) -> bool:
    return any("raylet/raylet" in command_of(pid) for pid in descendants(running.process.pid))


@pytest.mark.parametrize(
    ("signum", "code", "while_ray_starts"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, True),
    ],
)
def test_a_signal_before_the_first_trial_ends_it_too_and_leaves_no_process(tmp_path, signum, code, while_ray_starts):
    with driver("run", "--trials", "6", *STEADY, cwd=tmp_path) as running:
        if while_ray_starts:
            running.wait_until(lambda: starts_ray(running))
        else:
            running.wait_until(lambda: has_loaded(running, "libarrow"))  # the command is at work
        family = descendants(running.process.pid)
        sent = time.monotonic()
        running.process.send_signal(signum)
        returned = running.end(120)
        print(f"{signum.name}: gone after {time.monotonic() - sent:.1f} s with {returned}")
        end_family(family, 100)
    assert not any("Traceback" in line for line in running.stderr), running.stderr
    assert returned in (code, -signum)  # a shell tells both as `code`


# ---- results meanwhile


def test_results_are_queried_while_the_study_runs(tmp_path):
    answers, seconds = [], []
    with driver("run", "--name", "busy", "--trials", "8", *STEADY, cwd=tmp_path) as running:
        running.wait_until(lambda: any((tmp_path / "studies" / "busy" / "trials").glob("*.parquet")))
        while not running.is_over:
            started = time.monotonic()
            done = run("query", BY_ACTIVATION, "--format", "json", cwd=tmp_path)
            seconds.append(time.monotonic() - started)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            answers.append(json.loads(done.stdout))
            if len(answers) % 4 == 1:
                shown = run("show", "busy", cwd=tmp_path)
                assert shown.returncode == 0, shown.stderr
        assert running.end() == 0
    print(f"{len(answers)} queries, {min(seconds):.2f} to {max(seconds):.2f} s each")
    assert len(answers) >= 5
    seen = [{row["activation"] for row in answer} for answer in answers]
    assert all(one <= two for one, two in itertools.pairwise(seen))  # nothing is lost again
    assert_ours_alone(running.stderr)
    study = open_study(tmp_path / "studies" / "busy")
    assert_whole(study, trials=8)
    best = study.summary().best
    assert best is not None
    last = run("query", BY_ACTIVATION, cwd=tmp_path)
    assert best.activation in last.stdout


def test_json_is_all_of_stdout_and_says_what_was_found(tmp_path):
    done = run("run", "--json", "--trials", "2", "--name", "j", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    study = open_study(tmp_path / "studies" / "j")
    assert document["is_complete"]
    assert document["states"] == dict(study.summary().states)
    assert all((tmp_path / folder / "model.safetensors").is_file() for folder in document["models"])
    shown, listed = run("show", "j", "--json", cwd=tmp_path), run("list", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout) == document
    assert json.loads(listed.stdout) == [document]
    assert_ours_alone(done.stderr.splitlines())


# ---- data of one's own


def table_of(rows: int) -> np.ndarray:
    """Two clusters in five columns of other ranges."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 10.0, -5.0, 100.0, 1.0], [4.0, 20.0, 5.0, 300.0, 2.0]])
    return centres[rng.integers(0, 2, rows)] + rng.normal(0, 0.3, (rows, 5))


def write_csv(folder: Path) -> tuple[str, list[str]]:
    lines = ["a,b,c,d,e", *(",".join(f"{value:.4f}" for value in row) for row in table_of(300))]
    (folder / "sensors.csv").write_text("\n".join(lines) + "\n")
    return "sensors.csv", ["--set", "data.scale=minmax", "--set", "data.binarize=none"]


def write_npz(folder: Path) -> tuple[str, list[str]]:
    rng = np.random.default_rng(0)
    images = np.zeros((300, 6, 6), np.uint8)
    for image, row in zip(images, rng.integers(0, 6, 300), strict=True):
        image[row] = 255
    np.savez(folder / "bars.npz", images=images)
    return "bars.npz", []


def write_parquet(folder: Path) -> tuple[str, list[str]]:
    table = table_of(300)
    pq.write_table(pa.table({f"x{i}": table[:, i] for i in range(5)}), folder / "table.parquet")
    return "table.parquet", ["--set", "data.scale=minmax", "--set", 'data.columns=["x0", "x1", "x3"]']


@pytest.mark.parametrize("write", [write_csv, write_npz, write_parquet])
def test_a_file_of_ones_own_is_searched_from_end_to_end(tmp_path, write):
    file, flags = write(tmp_path)
    done = run("run", "--data", file, "--trials", "2", *QUICK, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / Path(file).stem)
    assert_whole(study, trials=2)
    assert Path(file).stem in done.stdout
    for folder in study.model_folders():
        assert read_config(folder)["data"]["config"]["source"].endswith(file)


def test_mnist_is_searched_from_end_to_end(tmp_path):
    if not MNIST.is_dir():
        pytest.skip(f"the idx files of mnist are not in {MNIST}")
    flags = ("--set", "model.hidden_dims=[64]", "--set", "train.batch_size=256", "--set", "scheduler.grace_epochs=1")
    budget = ("--trials", "3", "--max-epochs", "2")
    done = run("run", "--data", "mnist", "--data-dir", str(MNIST), *budget, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = open_study(tmp_path / "studies" / "mnist")
    assert_whole(study, trials=3)
    best = study.summary().best
    assert best is not None
    assert best.val_nelbo < best.no_latent_nelbo - 20
    assert read_config(study.model_folders()[0])["data"]["rows"] == {"train": 54000, "validation": 6000, "test": 10000}
    exported = run("export", "mnist", "--to", "mine", "--data-dir", str(MNIST), cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
