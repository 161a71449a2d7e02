"""A study on a cluster elsewhere, seen from here: start it, ask after it, stop it.

Nothing is shared with the cluster but the HTTP address of its dashboard. The study's name is the id of its job, so
there is one of each, and a study that ended in whatever way goes on where its ledger stands.
"""

import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from cluster.jobs import UPLOAD_LIMIT_BYTES, AddressRefused, Job, JobExists, Jobs, UploadTooLarge
from cluster.tokens import TokenUnreadable
from search.checks import check_batches, check_model
from search.results import STUDY_FILE
from search.spec import NO_IDENTITY, StudySpec
from vae.config import InputError
from vae.data import load_data
from vae.readers import IDX_SOURCES, SOURCES, find_idx

DATA_FOLDER = "data"
DATA_LIMIT_BYTES = UPLOAD_LIMIT_BYTES - 2**20  # the rest is for all else that is sent
STOP_TIMEOUT_S = 150.0
NOT_FOUND = 127  # a shell's exit status

IS_STOPPED = "interrupted"
"""Begins the last line of a driver that had the time to write all it knew."""
PROGRESS = re.compile(r"^\[\d+/\d+\] .*", re.MULTILINE)


@dataclass(frozen=True)
class Standing:
    """Of a submitted study. progress: the last that its driver said of it. storage: "" is the cluster's own."""

    id: str
    state: str
    progress: str
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    storage: str
    version: str

    def document(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """For people: the first is the sum of it."""
        times = [("started", self.started_at), ("ended", self.ended_at)]
        return [
            f"{self.id}: {self.state}" + (f" ({self.exit_code})" if self.exit_code else ""),
            *([f"  {self.progress}"] if self.progress else []),
            *(f"  {word} {_local(time)}" for word, time in times if time is not None),
            *([f"  results in {self.storage}"] if self.storage else []),
        ]


def connect(address: str, *, insecure: bool = False) -> Jobs:
    """The jobs of a cluster, which need not be up. Raises InputError for an address or token that will not do."""
    try:
        return Jobs(address, insecure=insecure)
    except (AddressRefused, TokenUnreadable) as error:
        raise InputError(str(error)) from None


def submit(jobs: Jobs, spec: StudySpec, *, extend: int = 0, data_on_cluster: bool = False) -> tuple[Job, bool]:
    """The job of the study, and whether it was started now: one that is at work on the same study is left alone.

    data_on_cluster: the data's paths are the head's, and nothing of them is sent. Raises InputError,
    VersionMismatch, AccessDenied, ClusterUnreachable.
    """
    jobs.check_version()
    former = jobs.get(spec.name)
    if former is not None and not _is_study(former):
        raise InputError(f"{spec.name}: a job of that name is there, and is no study; use another --name")
    if former is not None and not former.has_ended:
        return _same(former, spec, extend, data_on_cluster), False
    with tempfile.TemporaryDirectory(prefix="vaesearch-") as folder:
        write_package(spec, Path(folder), data_on_cluster)
        try:
            if former is not None:
                jobs.make_way(former)
            job = jobs.submit(
                spec.name,
                _entrypoint(spec, extend),
                working_dir=Path(folder),
                metadata=_metadata(spec, data_on_cluster),
            )
        except JobExists:  # another submit came first
            return submit(jobs, spec, extend=extend, data_on_cluster=data_on_cluster)
        except UploadTooLarge as error:
            raise _too_large(spec.data.source, str(error)) from None
    return job, True


def wait_for_start(jobs: Jobs, job: Job, say: Callable[[str], None]) -> int | None:
    """None once the driver has passed its checks and is at work, or the study complete; else its exit status.

    What the driver says meanwhile goes to `say`.
    """
    is_at_work = re.compile(rf"{re.escape(job.job_id)}: (searching:|going on at|complete with)|finalists: ")
    said = False
    for line in jobs.follow(job.job_id, say):
        say(line)
        said = True
        if is_at_work.match(line):
            return None
    ended = jobs.get(job.job_id)
    if ended is None or ended.state == "SUCCEEDED":
        return 0
    if not said:
        say((ended.message.strip().splitlines() or [ended.state])[-1])
    if ended.exit_code == NOT_FOUND:
        say(f"the head of the cluster has no vaesearch; install {version('vaesearch')} on each node")
    return 2 if ended.exit_code == 2 else 1


def standings(jobs: Jobs) -> list[Standing]:
    """Of all studies that the cluster knows, oldest first."""
    return [standing_of(jobs, job) for job in jobs.list() if _is_study(job)]


def standing_of(jobs: Jobs, job: Job) -> Standing:
    said = jobs.logs(job.job_id)
    lines = PROGRESS.findall(said) or said.split("\n") if said.strip() else [job.message]
    return Standing(
        id=job.job_id,
        state=job.state,
        progress=next((line for line in reversed(lines) if line.strip()), "").strip(),
        started_at=job.started_at,
        ended_at=job.ended_at,
        exit_code=job.exit_code,
        storage=job.metadata.get("storage", ""),
        version=job.metadata.get("vaesearch", ""),
    )


def standing_lines(found: list[Standing]) -> list[str]:
    """A line a study, in columns."""
    cells = [
        (each.id, each.state, "" if each.started_at is None else _local(each.started_at), each.progress)
        for each in found
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in cells]


def existing(jobs: Jobs, job_id: str) -> Job:
    job = jobs.get(job_id)
    if job is None:
        known = [each.job_id for each in jobs.list() if _is_study(each)]
        raise InputError(f"{jobs.address} knows no study {job_id}; it knows {', '.join(known) or 'none'}")
    return job


def stop(jobs: Jobs, job_id: str) -> bool | None:
    """End a study's job and wait until it is over. None: it was over before; False: its driver was killed at last.

    Raises InputError, TimeoutError.
    """
    if existing(jobs, job_id).has_ended:
        return None
    jobs.stop(job_id)
    jobs.wait(job_id, STOP_TIMEOUT_S)
    said = jobs.logs(job_id).splitlines()
    return not said or any(line.startswith(IS_STOPPED) for line in said[-3:])


def unheeded(job: Job, spec: StudySpec) -> list[str]:
    """The keys with which the spec would have run otherwise than the job of the same study that is at work."""
    theirs = json.loads(job.metadata.get("settings", "{}"))
    return sorted(key for key, value in _settings(spec).items() if key in theirs and theirs[key] != value)


def identity_hash(spec: StudySpec) -> str:
    """What makes two specs the same study, in short."""
    return hashlib.sha256(json.dumps(spec.identity(), sort_keys=True).encode()).hexdigest()[:16]


def _is_study(job: Job) -> bool:
    return "vaesearch" in job.metadata


def _plain(value: object) -> object:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else value


def _local(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _same(job: Job, spec: StudySpec, extend: int, data_on_cluster: bool) -> Job:
    """The running job, if it is of that very study. Raises InputError."""
    if job.metadata.get("identity") != identity_hash(spec):
        raise InputError(
            f"{spec.name}: a job of that name is {job.state}, and its study is another one; "
            f"use another --name, or `vaesearch stop {spec.name}` first"
        )
    ours, theirs = _data_metadata(spec, data_on_cluster), job.metadata
    if _data_key(ours) != _data_key(theirs):
        raise InputError(
            f"{spec.name}: is {job.state}, and searches on {_data_label(theirs)}, not on {_data_label(ours)}; "
            f"use another --name"
        )
    storage = job.metadata.get("storage", "")
    if storage != (storage_elsewhere(spec) or ""):
        raise InputError(
            f"{spec.name}: is {job.state}, with its results in {storage or 'the own storage of the cluster'}"
        )
    if extend:
        raise InputError(f"{spec.name}: is {job.state}; --extend it when it is complete")
    return job


def _metadata(spec: StudySpec, data_on_cluster: bool) -> dict[str, str]:
    return {
        "vaesearch": version("vaesearch"),
        "study": spec.name,
        "identity": identity_hash(spec),
        "storage": storage_elsewhere(spec) or "",
        "settings": json.dumps(_settings(spec)),
        **_data_metadata(spec, data_on_cluster),
    }


def _settings(spec: StudySpec) -> dict[str, object]:
    """What may change from one run of a study to the next, but for where its data and results lie."""
    values = spec.model_dump(mode="json")
    keys = [(section, key) for section in ("resources", "export", "finalists", "storage") for key in values[section]]
    places = (("data", "source"), ("data", "data_dir"), ("storage", "path"))
    return {
        f"{section}.{key}": values[section][key]
        for section, key in [*keys, *NO_IDENTITY]
        if (section, key) not in places
    }


def _data_metadata(spec: StudySpec, data_on_cluster: bool) -> dict[str, str]:
    """The data's name, and the digest of what is sent of them, if anything. Raises InputError."""
    folder = "" if spec.data.data_dir is None else f" of {spec.data.data_dir}"
    digest = hashlib.sha256()
    files = _files_to_send(spec, data_on_cluster)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return {
        "data": f"{spec.data.source}{folder}{' (on the cluster)' if data_on_cluster else ''}",
        "data_sha256": digest.hexdigest() if files else "",
    }


def _data_key(metadata: Mapping[str, str]) -> str:
    """The same for the same data: by their content where they were sent, else by their name on the cluster."""
    return metadata.get("data_sha256") or metadata.get("data", "")


def _data_label(metadata: Mapping[str, str]) -> str:
    digest = metadata.get("data_sha256", "")
    return metadata.get("data", "other data") + (f" (SHA-256 {digest[:12]})" if digest else "")


def _entrypoint(spec: StudySpec, extend: int) -> str:
    command = ["vaesearch", "supervise", STUDY_FILE]
    if storage := storage_elsewhere(spec):
        command += ["--storage", storage]
    if extend:
        command += ["--extend", str(extend)]
    return shlex.join(command)


def storage_elsewhere(spec: StudySpec) -> str | None:
    """Where the study says that its results go, if that means anything on another machine."""
    path = spec.storage.path
    return path if "://" in path or path.startswith("/") else None


def write_package(spec: StudySpec, folder: Path, data_on_cluster: bool) -> None:
    """The study file, and the data if they are files of this machine. Raises InputError."""
    values = spec.dump()
    values["storage"].pop("path")
    is_named = spec.data.source in SOURCES
    files = _files_to_send(spec, data_on_cluster)
    if data_on_cluster:
        _check_absolute(spec.data.source if not is_named else spec.data.data_dir)
    elif not is_named:
        values["data"]["source"] = _pack(spec, files, folder)
    elif spec.data.data_dir is not None and spec.data.source in IDX_SOURCES:
        values["data"]["data_dir"] = str(Path(_pack(spec, files, folder)).parent)
    (folder / STUDY_FILE).write_text(tomli_w.dumps(values), encoding="utf-8")


def _files_to_send(spec: StudySpec, data_on_cluster: bool) -> list[Path]:
    """The data, if they are files of this machine. Raises InputError."""
    data, files = spec.data, []
    if not data_on_cluster and data.source not in SOURCES:
        files = [_existing_file(data.source)]
    elif not data_on_cluster and data.data_dir is not None and data.source in IDX_SOURCES:
        files = find_idx(data.source, data.data_dir) or []
    size = sum(file.stat().st_size for file in files)
    if size > DATA_LIMIT_BYTES:
        raise _too_large(data.source, f"{size / 2**20:,.0f} MiB are more than can be sent")
    return files


def _pack(spec: StudySpec, files: list[Path], folder: Path) -> str:
    """Check the data here, where an error costs seconds, and put them beside the study file. The last one's place."""
    data = load_data(spec.data_config())
    check_model(spec, data)
    check_batches(spec, data)
    (folder / DATA_FOLDER).mkdir()
    for file in files:
        shutil.copyfile(file, folder / DATA_FOLDER / file.name)
    return f"{DATA_FOLDER}/{files[-1].name}"


def _existing_file(source: str) -> Path:
    file = Path(source)
    if not file.is_file():
        raise InputError(f"{source}: no such file here; if it is one of the cluster's head, add --data-on-cluster")
    return file


def _check_absolute(path: str | None) -> None:
    if path is not None and not Path(path).is_absolute():
        raise InputError(f"--data-on-cluster: {path}: give the absolute path on the head of the cluster")


def _too_large(source: str, why: str) -> InputError:
    return InputError(
        f"{source}: {why}; copy the file to where the head of the cluster reads it, and submit with "
        f"--data /PATH/THERE/{Path(source).name} --data-on-cluster"
    )
