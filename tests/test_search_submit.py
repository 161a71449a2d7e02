"""What is sent to a cluster with a study, and what is brought home: checked here, where an error costs seconds."""

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_studies import made_up_study
from typer.testing import CliRunner

import search.fetch
import search.submit
from cluster.jobs import Job, JobExists, JobFailed
from search import cli
from search.fetch import FORGOTTEN_AFTER_S, fetch, pack, pack_on, unpack
from search.lease import Lease, LeaseHeld
from search.results import open_study, write_study_file
from search.spec import StudySpec
from search.submit import STUDY_FILE, identity_hash, submit, unheeded
from vae.config import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no cluster by default."""
    for name in ("RAY_ADDRESS", "VAESEARCH_STORAGE", "VAESEARCH_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def packaged(spec: StudySpec, folder: Path, data_on_cluster: bool = False) -> dict[str, Any]:
    """The keys of the study file that would be sent."""
    folder.mkdir(exist_ok=True)
    search.submit.write_package(spec, folder, data_on_cluster)
    return tomllib.loads((folder / STUDY_FILE).read_text())


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# ---- what is sent


def test_the_study_is_sent_with_every_default_filled_in_but_where_results_go(here, tmp_path):
    spec = StudySpec.load(None, {"budget.trials": 7, "storage.path": "/results"})
    values = packaged(spec, tmp_path / "package")
    assert files_of(tmp_path / "package") == {STUDY_FILE}
    assert "path" not in values["storage"]
    values["storage"]["path"] = "/results"
    assert StudySpec.model_validate(values) == spec


def test_a_file_of_this_machine_is_sent_and_named_by_its_place_in_the_package(here, tmp_path):
    rows = np.random.default_rng(0).random((300, 4))
    np.save(here / "points.npy", rows)
    spec = StudySpec.load(None, {"data.source": "points.npy"})
    values = packaged(spec, tmp_path / "package")
    assert values["data"]["source"] == "data/points.npy"
    assert files_of(tmp_path / "package") == {STUDY_FILE, "data/points.npy"}
    assert (np.load(tmp_path / "package" / "data" / "points.npy") == rows).all()
    assert identity_hash(StudySpec.model_validate(values)) == identity_hash(spec)


def test_of_a_folder_with_idx_files_the_images_are_sent(here, tmp_path):
    folder = here / "mine"
    folder.mkdir()
    for part, rows in (("train", 200), ("t10k", 50)):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, rows, 8, 8))
        pixels = np.random.default_rng(0).integers(0, 256, rows * 64, dtype=np.uint8).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"not of use")
    values = packaged(
        StudySpec.load(None, {"data.source": "mnist", "data.data_dir": str(folder)}), tmp_path / "package"
    )
    assert values["data"]["data_dir"] == "data"
    assert files_of(tmp_path / "package") == {
        STUDY_FILE,
        "data/train-images-idx3-ubyte",
        "data/t10k-images-idx3-ubyte",
    }


def test_data_of_the_cluster_are_left_where_they_are(here, tmp_path):
    values = packaged(StudySpec.load(None, {"data.source": "/there/x.npy"}), tmp_path / "package", data_on_cluster=True)
    assert values["data"]["source"] == "/there/x.npy"
    assert files_of(tmp_path / "package") == {STUDY_FILE}


@pytest.mark.parametrize(
    ("source", "data_on_cluster", "mend"),
    [
        ("missing.npy", False, "--data-on-cluster"),
        ("/missing/there.npy", False, "--data-on-cluster"),
        ("relative.npy", True, "absolute path"),
        ("large.npy", False, "--data /PATH/THERE/large.npy --data-on-cluster"),
        ("broken.npy", False, "broken.npy"),
        ("notes.txt", False, "known: digits"),
    ],
)
def test_data_that_will_not_do_are_refused_here(here, tmp_path, monkeypatch, source, data_on_cluster, mend):
    monkeypatch.setattr(search.submit, "DATA_LIMIT_BYTES", 5000)
    np.save(here / "large.npy", np.zeros((2000, 4)))
    (here / "broken.npy").write_bytes(b"\x93NUMPY")
    (here / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=mend):
        packaged(StudySpec.load(None, {"data.source": source}), tmp_path / "package", data_on_cluster)


@pytest.mark.parametrize(
    ("overrides", "is_same"),
    [
        ({"resources.concurrency": 1}, True),
        ({"storage.path": "/elsewhere"}, True),
        ({"data.source": "moved.npy"}, True),
        ({"seed": 1}, False),
        ({"budget.trials": 25}, False),
        ({"space.activation": ["relu"]}, False),
    ],
)
def test_what_makes_another_study_makes_another_hash(overrides, is_same):
    name = {"name": "study"}
    assert (identity_hash(StudySpec.load(None, name | overrides)) == identity_hash(StudySpec.load(None, name))) == (
        is_same
    )


@pytest.mark.parametrize(
    ("storage", "told"),
    [("studies", None), ("s3://bucket/studies?region=x", "s3://bucket/studies?region=x"), ("/results", "/results")],
)
def test_where_results_go_is_told_if_it_means_anything_elsewhere(storage, told):
    spec = StudySpec.load(None, {"storage.path": storage})
    expected = ["vaesearch", "supervise", "study.toml", *(["--storage", told] if told else [])]
    assert shlex.split(search.submit._entrypoint(spec, 0)) == expected


# ---- what is there already


class ClusterWith:
    """Jobs of a cluster on which studies were started from here. Their other methods are not used."""

    def __init__(self) -> None:
        self.started: dict[str, Job] = {}
        self.is_behind = False

    def check_version(self) -> None: ...

    def get(self, job_id: str) -> Job | None:
        job = self.started.get(job_id)
        if job is not None and self.is_behind:
            self.is_behind = False
            return replace(job, state="STOPPED")
        return job

    def make_way(self, ended: Job) -> None:
        raise JobExists(ended.job_id)

    def submit(self, job_id: str, entrypoint: str, *, working_dir: Path, metadata: dict[str, str]) -> Job:
        self.started[job_id] = Job(job_id, "RUNNING", entrypoint, metadata, "", None, None, None)
        return self.started[job_id]


def submitted(jobs: Any, data_on_cluster: bool = False, **overrides: object) -> bool:
    """Whether that started a job."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    spec = StudySpec.load(None, {"name": "study"} | keys)
    return submit(jobs, spec, data_on_cluster=data_on_cluster)[1]


def test_the_same_data_under_another_name_are_the_same_study(here):
    jobs, rows = ClusterWith(), np.random.default_rng(0).random((300, 4))
    for name in ("points.npy", "moved.npy"):
        np.save(here / name, rows)
    assert submitted(jobs, data__source="points.npy")
    assert not submitted(jobs, data__source="moved.npy")


def test_other_data_under_the_same_name_are_refused(here):
    jobs = ClusterWith()
    np.save(here / "points.npy", np.random.default_rng(0).random((300, 4)))
    assert submitted(jobs, data__source="points.npy")
    np.save(here / "points.npy", np.random.default_rng(1).random((300, 4)))
    with pytest.raises(InputError, match=r"on points.npy \(SHA-256 .*not on points.npy \(SHA-256 .*another --name"):
        submitted(jobs, data__source="points.npy")
    with pytest.raises(InputError, match="not on digits; use another --name"):
        submitted(jobs)


def test_data_of_the_cluster_are_known_by_their_path_there(here):
    jobs = ClusterWith()
    assert submitted(jobs, data_on_cluster=True, data__source="/there/x.npy")
    assert not submitted(jobs, data_on_cluster=True, data__source="/there/x.npy")
    with pytest.raises(InputError, match=r"on /there/x.npy \(on the cluster\), not on /there/y.npy"):
        submitted(jobs, data_on_cluster=True, data__source="/there/y.npy")


def test_what_a_job_at_work_does_not_heed_is_named():
    jobs = ClusterWith()
    assert submitted(jobs, storage__path="here")
    changed = {"resources.concurrency": 1, "finalists.confirm": True, "budget.max_retries": 9, "storage.path": "there"}
    specs = [StudySpec.load(None, {"name": "study"} | keys) for keys in ({}, changed)]
    assert [unheeded(jobs.started["study"], spec) for spec in specs] == [
        [],
        ["budget.max_retries", "finalists.confirm", "resources.concurrency"],
    ]


def test_the_slower_of_two_submits_finds_the_job_of_the_other(here):
    jobs = ClusterWith()
    assert submitted(jobs)
    jobs.is_behind = True
    assert not submitted(jobs)


# ---- the commands


@pytest.mark.parametrize(
    ("address", "arguments", "storage"),
    [
        ("http://127.0.0.1:8265", [], None),
        ("http://127.0.0.1:8265", ["--storage", "/results"], "/results"),
        ("auto", [], "/of/this/machine"),
    ],
)
def test_doctor_does_not_take_this_machines_storage_for_the_clusters(here, monkeypatch, address, arguments, storage):
    monkeypatch.setenv("VAESEARCH_STORAGE", "/of/this/machine")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("search.doctor.examine", lambda *_, overrides, **__: asked.append(overrides) or [])
    CliRunner().invoke(cli.app, ["doctor", "--address", address, *arguments], catch_exceptions=False)
    assert asked[0].get("storage.path") == storage


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["status"], 2, "which cluster? Give --address"),
        (["status", "--address", "http://10.0.0.1:8265"], 2, "--insecure"),
        (["submit", "--address", "ray://head:10001"], 2, "such as http://127.0.0.1:8265"),
        (["submit", "--storage", "results", "--address", "http://127.0.0.1:8265"], 2, "absolute path on the head"),
        (["submit", "--trials", "0", "--address", "http://127.0.0.1:8265"], 2, "--trials"),
        (["logs", "x", "--address", "http://127.0.0.1:1"], 1, "nothing listens there"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_or_three(here, arguments, code, said):
    done = subprocess.run([sys.executable, "-m", "search.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 4  # with the address in force
    assert "Traceback" not in done.stderr


def test_the_commands_for_a_cluster_load_neither_torch_nor_ray():
    code = "import sys, search.cli, search.submit, search.fetch, search.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "ray", "optuna", "sklearn"}


# ---- what is brought home


class HeadHere:
    """Jobs of a head that is this process: what they would run there is run here. Their other methods are not used."""

    address = "http://127.0.0.1:8265"

    def __init__(self, storage: Path | str, damage: Callable[[str], str] = lambda text: text) -> None:
        self.storage, self.damage, self.ran = str(storage), damage, 0

    def get(self, job_id: str) -> Job:
        return Job(job_id, "RUNNING", "", {"storage": self.storage}, "", None, None, None)

    def run(self, entrypoint: str, *, working_dir: Path | None = None, timeout_s: float) -> str:
        self.ran += 1
        done = CliRunner().invoke(cli.app, shlex.split(entrypoint)[1:])
        if done.exception is not None:
            raise JobFailed(f"vaesearch: {done.exception}\n", 2 if isinstance(done.exception, InputError) else 1)
        return self.damage(done.output)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The storage of a cluster, with a study that is under way."""
    study = made_up_study(tmp_path / "there" / "study", trials=12, unfinished=2, compared=False, pictures=2)
    (study.path / "lease.json").write_text("{}")
    for name in ("checkpoints/trial-0/state.pt", "trials/.part-00000.parquet.tmp", "models.tmp/1-trial-0/config.json"):
        (study.path / name).parent.mkdir(parents=True, exist_ok=True)
        (study.path / name).write_bytes(b"of use to the driver alone")
    return study.path.parent


def bring(head: Any, to: Path) -> Path:
    return fetch(head, "study", to)


def test_a_study_comes_home_as_it_is_without_what_is_the_drivers_alone(here, there):
    bring(HeadHere(there), here)
    ours = files_of(here / "study")
    assert {"study.toml", "trials/part-00000.parquet", "epochs/part-00000.parquet"} <= ours
    assert not [name for name in ours if "tmp" in name or name.startswith(("checkpoints", "lease"))]
    for name in ours:
        assert (here / "study" / name).read_bytes() == (there / "study" / name).read_bytes()
    assert open_study(here / "study").summary() == open_study(there / "study").summary()


def test_a_large_one_comes_in_parts_and_leaves_nothing_on_the_head(here, there, tmp_path, monkeypatch):
    monkeypatch.setattr(search.fetch, "PART_BYTES", 20_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    head = HeadHere(there)
    bring(head, here)
    assert head.ran > 2
    assert open_study(here / "study").rows() == open_study(there / "study").rows()
    assert not list(tmp_path.glob("vaesearch-*"))


def test_a_newer_copy_takes_the_place_of_an_older_one(here, there):
    bring(HeadHere(there), here)
    (here / "study" / "report.html").write_text("old")
    (there / "study" / "models" / "more").mkdir(parents=True)
    (there / "study" / "models" / "more" / "x").write_text("new")
    bring(HeadHere(there), here)
    assert (here / "study" / "models" / "more" / "x").read_text() == "new"
    assert [path.name for path in here.iterdir()] == ["study"]


def test_damage_on_the_way_is_noticed_and_nothing_is_replaced(here, there):
    def damaged(text: str) -> str:
        return text[:-200] + ("A" if text[-200] != "A" else "B") + text[-199:]

    with pytest.raises(OSError, match="damaged on the way"):
        bring(HeadHere(there, damaged), here)
    assert list(here.iterdir()) == []


def test_an_empty_part_is_told(here, there, monkeypatch):
    monkeypatch.setattr(search.fetch, "PART_BYTES", 20_000)
    with pytest.raises(JobFailed, match="an empty part; fetch the study again"):
        bring(HeadHere(there, lambda text: text if "vaesearch-pack: " in text else "\n"), here)
    assert list(here.iterdir()) == []


def test_a_study_that_is_not_there_or_lies_behind_a_url_says_what_to_do(here, there):
    with pytest.raises(InputError, match="nothing: the head of the cluster has no study there"):
        fetch(HeadHere(there), "nothing", here)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="vaesearch show study --storage s3://bucket/studies"):
        bring(HeadHere("s3://bucket/studies"), here)


def test_another_study_of_that_name_is_not_overwritten(here, there):
    bring(HeadHere(there), here)
    spec = open_study(there / "study").spec
    write_study_file(
        there / "study", spec, {"created_at": datetime(2026, 4, 1, tzinfo=UTC), "data_fingerprint": "f00d" * 16}
    )
    with pytest.raises(InputError, match="another one of the same name; use another --to"):
        bring(HeadHere(there), here)


def test_a_folder_that_is_no_study_is_not_overwritten(here, there):
    (here / "study").mkdir()
    (here / "study" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no study"):
        bring(HeadHere(there), here)
    assert (here / "study" / "thesis.txt").read_text() == "mine"


def test_a_copy_that_went_on_here_is_not_overwritten(here, there, tmp_path):
    further = made_up_study(tmp_path / "further" / "study", trials=12, compared=False, pictures=2)
    shutil.copytree(further.path, here / "study")
    with pytest.raises(InputError, match="has come further than the cluster's"):
        bring(HeadHere(there), here)


def test_a_copy_at_which_a_driver_is_at_work_is_not_overwritten(here, there, tmp_path):
    bring(HeadHere(there), here)
    held = {"host": "elsewhere", "pid": 1, "heartbeat": datetime.now(UTC).timestamp()}
    (here / "study" / "lease.json").write_text(json.dumps(held))
    with pytest.raises(LeaseHeld):
        bring(HeadHere(there), here)
    Lease(here / "study").path.unlink()
    bring(HeadHere(there), here)


# ---- archives


def archive_of(*members: tarfile.TarInfo, study_file: bool = True) -> io.BytesIO:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:") as tar:
        for member in [*([tarfile.TarInfo(STUDY_FILE)] if study_file else []), *members]:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return content


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    entry.size = 3 if kind == tarfile.REGTYPE else 0
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        member("../outside"),
        member("models/../../outside"),
        member("/tmp/outside"),
        member("..\\outside"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.LNKTYPE, "study.toml"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
        member("folder", tarfile.DIRTYPE),
    ],
    ids=lambda entry: f"{entry.name}-{entry.type.decode()}",
)
def test_an_archive_writes_plain_files_below_its_folder_alone(tmp_path, entry):
    folder = tmp_path / "study"
    with pytest.raises(InputError, match="not a plain file of a study"):
        unpack(archive_of(entry), folder)
    assert files_of(tmp_path) <= {"study/study.toml"}


@pytest.mark.parametrize("content", [io.BytesIO(b"no archive"), io.BytesIO(), archive_of(study_file=False)])
def test_what_is_no_archive_of_a_study_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="what the cluster sent"):
        unpack(content, tmp_path)


def test_the_head_packs_no_other_files_than_studies(there, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "secret").write_text("s3cret")
    for name in ("../secret", "secret", "vaesearch-pack-../secret.tar", "vaesearch-backup.tar"):
        with pytest.raises(InputError, match="no archive"):
            pack_on(name, 0)


def test_what_a_fetch_that_was_cut_off_left_on_the_head_goes_with_a_later_one(there, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(search.fetch, "PART_BYTES", 20_000)
    header, _ = pack("study", str(there))
    (left,) = tmp_path.glob("vaesearch-pack-*.tar")
    assert left.name in header
    assert hashlib.sha256(left.read_bytes()).hexdigest() in header
    past = left.stat().st_mtime - FORGOTTEN_AFTER_S - 1
    os.utime(left, (past, past))
    list(pack("study", str(there)))
    assert not left.exists()


def test_what_is_not_of_a_fetch_stays_on_the_head_however_old_it_is(tmp_path):
    kept = [tmp_path / name for name in ("vaesearch-backup.tar", "job-driver-vaesearch-mnist.log")]
    gone = [tmp_path / name for name in ("vaesearch-pack-0a_b1c2d.tar", "job-driver-vaesearch-0123456789ab.log")]
    for file in [*kept, *gone]:
        file.write_bytes(bytes(2**20 + 1))
        os.utime(file, (0, 0))
    with (tmp_path / "job-driver-now.log").open("w") as output:
        code = "import search.fetch; search.fetch._forget_old()"
        subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=output, env=os.environ | {"TMPDIR": str(tmp_path)}
        )
    assert [file.stat().st_size for file in kept] == [2**20 + 1] * 2
    assert not gone[0].exists()
    assert gone[1].stat().st_size == 0


def test_what_another_user_left_on_the_head_does_not_stop_a_fetch(there, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "vaesearch-pack-of_other.tar"
    left.mkdir()  # as little to be unlinked as another's file in a sticky folder, also by root
    os.utime(left, (0, 0))
    list(pack("study", str(there)))
    assert left.exists()
