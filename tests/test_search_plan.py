"""What `run --dry-run` foretells is what `run` then does, and nothing is written; `env` tells no secret."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_search_study import stored_in, with_

from search import cli
from search.checks import prepared
from search.environment import describe, environment_lines
from search.lease import LeaseHeld
from search.plan import plan_lines, plan_study
from search.results import Study
from search.spec import StudySpec
from vae.config import InputError
from vae.data import load_data

pytestmark = pytest.mark.usefixtures("ray_here")


def test_a_plan_is_what_the_study_then_does(small_study: Study, small_spec: StudySpec, tmp_path: Path) -> None:
    plan = plan_study(stored_in(small_spec, tmp_path / "storage"))
    assert not (tmp_path / "storage").exists()
    rows = small_study.rows()
    assert (plan.trials, plan.trials_ended, plan.concurrency) == (len(rows), 0, 1)
    assert plan.epochs_expected <= plan.epochs_at_most == len(rows) * 8
    assert sum(row.epochs for row in rows) <= plan.epochs_at_most
    assert plan.num_parameters >= max(row.num_parameters or 0 for row in rows)
    on_disk = sum(file.stat().st_size for file in Path(str(small_study.path)).rglob("*") if file.is_file())
    assert on_disk < plan.disk_bytes < 20 * on_disk
    assert set(plan.searched) == {"activation", "leaky_relu_slope", "dropout", "learning_rate", "latent_dim"}
    assert plan.seconds_at_most == pytest.approx(plan.epochs_at_most * plan.epoch_s)
    assert 0 < plan.epoch_s < 60
    assert plan.rungs == small_spec.rungs()
    text = "\n".join(plan_lines(plan))
    assert "6 trials of up to 8 epochs, 1 at once" in text
    assert "learning_rate: 0.001 to 0.01, log" in text


def test_a_plan_knows_what_is_there_already(small_study: Study, small_spec: StudySpec) -> None:
    plan = plan_study(small_spec, extend=4)
    assert (plan.trials, plan.trials_ended, plan.epochs_at_most) == (10, 6, 4 * 8)
    assert "6 of them there already" in next(iter(plan_lines(plan)))
    done = plan_study(small_spec)
    assert (done.epochs_at_most, done.epochs_expected, done.seconds_at_most) == (0, 0, 0)
    with pytest.raises(InputError, match="another one"):
        plan_study(with_(small_spec, train={"beta": 0.5}))


def test_early_stopping_at_one_rung_lets_one_in_so_many_go_on(small_spec: StudySpec, tmp_path: Path) -> None:
    spec = stored_in(with_(small_spec, budget={"trials": 900, "max_epochs": 10}), tmp_path)
    spec = with_(spec, scheduler={"grace_epochs": 5, "reduction_factor": 4})
    assert spec.rungs() == [5]
    plan = plan_study(spec)
    # Each is judged by those before it and by itself, so that the share comes down to a quarter.
    assert plan.epochs_expected == pytest.approx(900 * (5 + 5 / 4), rel=0.02)
    unstopped = plan_study(with_(spec, scheduler={"kind": "none"}))
    assert unstopped.epochs_expected == unstopped.epochs_at_most == 9000
    assert "with early stopping" not in "\n".join(plan_lines(unstopped))


def test_a_plan_of_a_comparison_counts_the_finalists(small_spec: StudySpec, tmp_path: Path) -> None:
    confirmed = {"finalists": {"confirm": True, "seeds": 2}, "comparison": {"settings": 2}}
    spec = with_(stored_in(small_spec, tmp_path), goal="compare-activations", **confirmed)
    plan = plan_study(spec)
    assert plan.final_runs == 3 * 2
    assert plan.epochs_at_most == (6 + 3 * 2) * 8
    assert plan.epochs_expected == plan.epochs_at_most  # two trials of each are all at the common settings


def test_a_plan_is_refused_as_the_study_would_be(small_spec: StudySpec, tmp_path: Path) -> None:
    spec = stored_in(small_spec, tmp_path)
    with pytest.raises(InputError, match="cpus_per_trial = 2 or lower"):
        plan_study(with_(spec, resources={"cpus_per_trial": 64}))
    with pytest.raises(InputError, match="fewer than a batch"):
        plan_study(with_(spec, train={"batch_size": 5000}))
    with pytest.raises(InputError, match="there is no study to extend"):
        plan_study(spec, extend=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        plan_study(stored_in(spec, tmp_path / "file" / "studies"))


def test_what_is_trained_elsewhere_is_compiled_elsewhere(
    small_spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = stored_in(with_(small_spec, train={"compile": "default"}), tmp_path)
    with pytest.raises(InputError, match="compile"):
        prepared(spec, address=None, extend=0)
    assert not prepared(spec, address="elsewhere:6379", extend=0).is_complete


def test_a_study_at_work_is_planned_by_nobody_else(small_study: Study, small_spec: StudySpec, tmp_path: Path) -> None:
    shutil.copytree(small_study.path, tmp_path / small_study.name)
    code = """
import sys
from pathlib import Path
from search.lease import Lease
Lease(Path(sys.argv[1])).acquire()
print(flush=True)
input()
"""
    command = [sys.executable, "-c", code, str(tmp_path / small_study.name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        spec = stored_in(small_spec, tmp_path)
        with pytest.raises(LeaseHeld, match="being worked on"):
            plan_study(spec, extend=1)
        assert plan_study(spec).epochs_at_most == 0  # as `run_study`, which then has nothing to do
        process.communicate(b"\n")


def test_a_first_configuration_that_diverges_leaves_the_plan_without_times(
    small_spec: StudySpec, tmp_path: Path
) -> None:
    wild = {"activation": "exponential", "learning_rate": 10.0}
    plan = plan_study(with_(stored_in(small_spec, tmp_path), space=wild))
    assert (plan.epoch_s, plan.seconds_at_most, plan.seconds_expected) == (None, None, None)
    text = "\n".join(plan_lines(plan))
    assert "no saying how long they take: the first configuration, tried here, diverged in epoch 1" in text


def test_a_dry_run_prints_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", (load_data(StudySpec().data_config()).train[:300] > 0.5).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    command = ["vaesearch", "run", "--data", "rows.npy", "--trials", "3", "--dry-run"]
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        out = capfd.readouterr().out
        if options:
            assert json.loads(out)["trials"] == 3
        else:
            assert out.startswith("rows: 3 trials of up to 60 epochs")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_the_environment_is_told_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret-of-ray")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-amazon")
    monkeypatch.setenv("VAESEARCH_STORAGE", "s3://me:a-secret-of-mine@bucket/studies?secret_key=a-secret-of-s3")
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:a-secret-of-mine@head:10001")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = describe()
    text = "\n".join(environment_lines(found)) + json.dumps(found)
    assert "a-secret" not in text
    assert {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"} <= set(found["also_set"]["names"])
    assert found["variables"]["OMP_NUM_THREADS"] == "7"
    assert found["variables"]["VAESEARCH_STORAGE"] == "s3://...@bucket/studies?..."
    assert found["variables"]["RAY_ADDRESS"] == "ray://...@head:10001"
    assert found["packages"]["ray"].startswith("2.")
    assert "memory: " in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/home/me@work/studies", "/home/me@work/studies"),
        ("head:6379", "head:6379"),
        ("s3://bucket/studies", "s3://bucket/studies"),
        ("s3://bucket/studies?region=x", "s3://bucket/studies?..."),
        ("s3://bucket/studies#hidden", "s3://bucket/studies?..."),
        ("s3://me:hidden@bucket/studies", "s3://...@bucket/studies"),
        ("s3://me:hid/den@bucket/studies", "s3://...@bucket/studies"),
        ("s3://me:hid?den@bucket/studies", "s3://..."),
        ("s3://bucket/studies?secret_key=hid@den", "s3://..."),
    ],
)
def test_of_a_url_only_the_place_is_told(url: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAESEARCH_STORAGE", url)
    assert describe()["variables"]["VAESEARCH_STORAGE"] == shown


def test_the_environment_is_told_also_where_torch_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = describe()
    assert found["torch"]["error"].startswith("ModuleNotFoundError: ")
    assert "  error: ModuleNotFoundError: " in "\n".join(environment_lines(found))
