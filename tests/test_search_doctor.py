"""`vaesearch doctor`: what it looks at from which place, what becomes of a failure, and how it is shown."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from clusters import BIN, Head, ray_head
from rich.console import Console

from cluster.preflight import Check
from search.doctor import _entrypoint, _taken_over, check_cluster, examine, print_checks, refuse_if_failed
from search.results import STUDY_FILE
from search.spec import StudySpec
from vae.config import InputError
from vae.data import load_data


def doctor(tmp_path: Path, address: str | None = None, **keys: object) -> dict[str, Check]:
    """The checks by their names, of which there may be several; the worst of each."""
    overrides = {"storage.path": str(tmp_path)} | {key.replace("__", "."): value for key, value in keys.items()}
    found: dict[str, Check] = {}
    for check in examine(None, address=address, overrides=overrides, say=lambda text: None):
        if check.name not in found or check.verdict != "ok":
            found[check.name] = check
    return found


def shown(checks: list[Check], width: int) -> list[str]:
    file = StringIO()
    print_checks(Console(file=file, width=width, highlight=False), checks)
    return file.getvalue().splitlines()


# ---- from here


def test_where_nothing_is_wrong_data_storage_and_ray_are_all_looked_at(ray_here, tmp_path):
    found = doctor(tmp_path)
    assert [check for check in found.values() if check.verdict == "failed"] == []
    assert {"data", "storage", "nodes", "versions", "token", "placement", "gpus", "memory"} <= set(found)
    assert "1,797 rows" in found["data"].what
    assert str(tmp_path) in found["storage"].what
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read_fail_and_the_rest_is_looked_at(ray_here, tmp_path):
    found = doctor(tmp_path, data__source=str(tmp_path / "missing.npy"))
    assert found["data"].verdict == "failed"
    assert "missing.npy" in found["data"].what
    assert found["storage"].verdict == found["versions"].verdict == found["placement"].verdict == "ok"


def test_data_with_fewer_rows_than_a_batch_fail_with_what_would_do(ray_here, tmp_path):
    check = doctor(tmp_path, train__batch_size=5000)["data"]
    assert check.verdict == "failed"
    assert "train.batch_size" in check.mend


def test_a_storage_that_cannot_be_written_fails(ray_here, tmp_path):
    (tmp_path / "file").touch()
    check = doctor(tmp_path, storage__path=str(tmp_path / "file" / "studies"))["storage"]
    assert check.verdict == "failed"
    assert str(tmp_path / "file") in check.what
    assert "--storage" in check.mend


def test_a_trial_that_has_no_room_fails_with_what_would_do(ray_here, tmp_path):
    check = doctor(tmp_path, resources__cpus_per_trial=3)["placement"]
    assert check.verdict == "failed"
    assert "resources.cpus_per_trial = 2" in check.mend


def test_a_study_file_that_is_wrong_is_an_error_of_its_own(tmp_path):
    (tmp_path / "study.toml").write_text("[budget]\nnum_trials = 3\n")
    with pytest.raises(InputError, match="num_trials"):
        examine(tmp_path / "study.toml", address=None, overrides={}, say=lambda text: None)


def test_an_address_at_which_nobody_listens_fails_in_seconds_and_says_what_was_not_looked_at(tmp_path):
    started = time.monotonic()
    found = doctor(tmp_path, "127.0.0.1:1")
    assert time.monotonic() - started < 100
    assert found["ray"].verdict == "failed"
    assert "127.0.0.1:1" in found["ray"].what
    assert "ray start --head" in found["ray"].mend
    assert found["nodes"].verdict == "warning"
    assert "placement" in found["nodes"].what
    assert found["data"].verdict == "ok"


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port", "no-such-host.invalid:6379"])
def test_an_address_that_is_none_fails_and_is_shown(tmp_path, address):
    found = doctor(tmp_path, address)
    assert found["ray"].verdict == "failed"
    assert address in found["ray"].what


def test_the_checks_of_a_cluster_are_those_of_the_study(ray_here, small_spec):
    checks = check_cluster(small_spec, load_data(small_spec.data_config()), ray_here)
    (placement,) = [check for check in checks if check.name == "placement"]
    assert placement.what.startswith("1 trial at once")  # its resources.concurrency
    refuse_if_failed(checks)


# ---- from outside


def test_a_cluster_that_does_not_answer_fails_from_outside_too(tmp_path):
    found = doctor(tmp_path, "http://127.0.0.1:1")
    assert found["ray"].verdict == "failed"
    assert found["nodes"].verdict == "warning"


def test_plain_http_beyond_this_machine_is_refused_without_insecure(tmp_path):
    with pytest.raises(InputError, match="--insecure"):
        doctor(tmp_path, "http://10.0.0.5:8265")


def test_a_token_that_is_named_and_not_there_fails_once(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    overrides = {"storage.path": str(tmp_path)}
    checks = examine(None, address="http://127.0.0.1:1", overrides=overrides, say=lambda text: None)
    assert [(check.name, check.verdict) for check in checks] == [("token", "failed"), ("nodes", "warning")]


NODE = Check("versions", "failed", "vaesearch is not installed on two (10.0.0.3, 8e6d058f)", "install it")


def test_what_a_doctor_on_the_cluster_printed_is_taken_over_with_where_it_was_seen():
    document = json.dumps([asdict(NODE), asdict(Check("clocks", "ok", "clocks agree within 2 s"))], indent=2)
    said = f"2026-11-25 15:44:00,001 INFO worker.py:1700 -- Connecting [to] a cluster\n{document}\n(a last word)\n"
    failed, well = _taken_over(said)
    assert (failed.name, failed.verdict, failed.mend) == ("cluster.versions", "failed", "install it")
    assert failed.what == f"there, {NODE.what}"
    assert (well.name, well.verdict) == ("cluster.clocks", "ok")


@pytest.mark.parametrize("said", ["", "sh: 1: exec: vaesearch: not found\n", "[\n]nonsense\n]\n", '[\n{"a": 1}\n]\n'])
def test_what_is_no_list_of_checks_is_not_taken_for_one(said):
    assert _taken_over(said) == []


@pytest.mark.parametrize(
    ("asked", "of_the_cluster", "storage"),
    [
        ("s3://bucket/my studies", None, "s3://bucket/my studies"),
        ("/mnt/results", "/elsewhere", "/mnt/results"),
        ("studies", "/mnt/the cluster's", "/mnt/the cluster's"),
        ("studies", None, "~/vaesearch-studies"),
    ],
)
def test_the_head_looks_at_the_storage_that_a_submitted_study_would_have(asked, of_the_cluster, storage):
    entrypoint = _entrypoint(StudySpec.load(None, {"storage.path": asked}))
    script = 'vaesearch() { for word; do printf "%s\\n" "$word"; done; }; ' + entrypoint
    known = {"PATH": os.environ["PATH"]} | ({} if of_the_cluster is None else {"VAESEARCH_STORAGE": of_the_cluster})
    words = subprocess.run(["sh", "-c", script], env=known, capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == ["doctor", STUDY_FILE, "--json", "--address", "auto", "--storage", storage]


# ---- what becomes of them


def test_failed_checks_are_an_error_with_a_line_each_and_warnings_are_none():
    well, odd = Check("data", "ok", "digits"), Check("token", "warning", "others may read it", "chmod 600 token")
    refuse_if_failed([well, odd])
    with pytest.raises(InputError) as caught:
        refuse_if_failed([well, odd, NODE, Check("nodes", "failed", "three: no answer")])
    assert str(caught.value).splitlines() == [f"{NODE.what}; install it", "three: no answer"]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_check_is_shown_with_its_verdict_ahead_and_no_line_is_wider_than_the_terminal(width):
    checks = [Check("ray", "ok", "Ray 2.60.0 and Python 3.11 on all 3 nodes"), NODE]
    lines = shown(checks, width)
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["ok", "failed"]
    assert all(line.startswith(("ok       ", "failed   ", 9 * " ")) for line in lines)
    words = " ".join(" ".join(lines).split())
    assert words == f"ok {checks[0].what} failed {NODE.what}; {NODE.mend}"


def test_text_from_elsewhere_is_shown_as_it_stands():
    assert shown([Check("ray", "ok", "[bold]a[/bold] :smile:")], 80) == ["ok       [bold]a[/bold] :smile:"]


# ---- a cluster of its own


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(num_cpus=2) as head:
        yield head


def vaesearch(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "vaesearch", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )


def wrong_token(head: Head, folder: Path) -> dict[str, str]:
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text("0" * 64)
    return head.environment() | {"RAY_AUTH_TOKEN_PATH": str(file)}


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_a_cluster_is_examined_from_outside_by_its_own_head(head, tmp_path):
    (tmp_path / "study.toml").write_text('name = "outside"\n[budget]\ntrials = 3\n')
    started = time.monotonic()
    done = vaesearch("doctor", "study.toml", "--address", head.url, "--json", cwd=tmp_path, env=head.environment())
    print(f"from outside: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["ray"]["what"].startswith(head.url)
    assert {"cluster.data", "cluster.storage", "cluster.versions", "cluster.placement"} <= set(checks)
    assert {check["verdict"] for check in checks.values()} <= {"ok", "warning"}
    assert checks["cluster.token"]["verdict"] == "ok"
    assert head.token not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_data_of_this_machine_are_examined_on_the_cluster(head, tmp_path):
    import numpy as np

    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((100, 5), np.float32))
    arguments = ("--data", "mine.npy", "--set", "train.batch_size=16", "--json")
    done = vaesearch("doctor", "--address", head.url, *arguments, cwd=tmp_path, env=head.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = [check for check in json.loads(done.stdout) if check["name"] == "cluster.data"]
    assert "100 rows of 5 values" in data["what"]


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_what_fails_on_the_cluster_fails_the_doctor_outside(head, tmp_path):
    arguments = ("--set", "resources.cpus_per_trial=64", "--address", head.url)
    done = vaesearch("doctor", *arguments, cwd=tmp_path, env=head.environment())
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "failed there, a trial asks for 64 CPUs" in text
    assert "set resources.cpus_per_trial = 2" in text


@pytest.mark.system
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("from_outside", [True, False])
def test_a_wrong_token_is_a_failed_check_within_seconds_and_stderr_is_ours(head, tmp_path, from_outside):
    address = head.url if from_outside else head.address
    started = time.monotonic()
    environment = wrong_token(head, tmp_path)
    done = vaesearch("doctor", "--address", address, "--json", cwd=tmp_path, env=environment)
    took = time.monotonic() - started
    print(f"{shlex.join(('--address', address))}: {took:.1f} s")
    assert done.returncode == 1, done.stderr
    failed = [check for check in json.loads(done.stdout) if check["verdict"] == "failed"]
    assert [check["name"] for check in failed] == ["ray"]
    assert "refuses the token" in failed[0]["what"]
    assert "RAY_AUTH_TOKEN_PATH" in failed[0]["mend"]
    assert took < 100
    assert "gcs" not in done.stderr.lower()
    assert "0" * 64 not in done.stdout + done.stderr


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_a_cluster_is_joined_and_examined(head, tmp_path):
    started = time.monotonic()
    environment = head.environment()
    done = vaesearch("doctor", "--address", head.address, "--json", cwd=tmp_path, env=environment)
    print(f"joined: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert head.address in checks["ray"]["what"]
    assert {"data", "storage", "nodes", "versions", "token", "placement", "gpus", "memory"} <= set(checks)


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_a_head_without_the_command_is_told_what_to_install(tmp_path):
    with ray_head(extra={"PATH": os.defpath}) as head:
        done = vaesearch("doctor", "--address", head.url, cwd=tmp_path, env=head.environment())
    assert done.returncode == 1, done.stderr
    assert "failed   vaesearch is not installed there; install vaesearch" in done.stdout


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_this_machine_is_examined_with_a_ray_of_its_own(tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VAESEARCH_"))}
    started = time.monotonic()
    done = vaesearch("doctor", cwd=tmp_path, env=kept)
    print(f"alone: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on this machine" in done.stdout
    assert list(tmp_path.iterdir()) == []
