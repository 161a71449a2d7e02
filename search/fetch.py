"""Bring a study home from a cluster, through nothing but the output of short jobs on its head.

The head packs the study's folder as a tar archive and says it in base64, in parts; here it is checked by its digest,
unpacked, and exchanged for the copy that is there. Also while the study runs: its files are replaced whole, never
written to, so a copy has each as it was at some moment.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from cluster.jobs import JobFailed, Jobs
from search.lease import Lease
from search.results import CHECKPOINTS_FOLDER, FINAL_CHECKPOINTS_FOLDER, STUDY_FILE, Study
from search.storage import BUILDING, REPLACED, location, replace_tree, restore_tree
from search.supervisor import storage_on_cluster
from vae.config import InputError

PART_BYTES = 24 * 2**20  # of each 200 MiB of output, three processes of Ray's head (2.60) hold 800 MiB for a while
JOB_TIMEOUT_S = 600.0
FORGOTTEN_AFTER_S = 1800.0
TRIES = 5
LEFT_OUT = {CHECKPOINTS_FOLDER, FINAL_CHECKPOINTS_FOLDER, "lease.json"}
HEADER = "vaesearch-pack: "
ARCHIVE_PREFIX = "vaesearch-pack-"
ARCHIVE = re.compile(rf"{ARCHIVE_PREFIX}[0-9a-z_]+\.tar")
SHORT_JOB_LOG = re.compile(r"job-driver-vaesearch-[0-9a-f]{12}\.log")
"""The output of a `Jobs.run`, in Ray's folder; a study's is named after the study."""


@dataclass(frozen=True)
class _Header:
    """Ahead of the first part. archive: the name under which the head keeps what is to come."""

    size: int
    sha256: str
    archive: str


def fetch(jobs: Jobs, name: str, to: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Put a copy of the study into the folder `to`, in place of an older one of the same study.

    Raises InputError where that would lose something, or where the study lies behind a URL.
    """
    job = jobs.get(name)
    storage = "" if job is None else job.metadata.get("storage", "")
    if "://" in storage:
        raise InputError(
            f"{name}: lies at {storage}, which is read from here as it is: "
            f"vaesearch show {shlex.quote(name)} --storage {shlex.quote(storage)}; also query, report and export"
        )
    command = ["vaesearch", "pack", name, *(["--storage", storage] if storage else [])]
    header, part = _first_part(_run(jobs, command))
    with tempfile.TemporaryFile() as archive, tempfile.TemporaryDirectory(prefix="vaesearch-") as folder:
        archive.write(part)
        while part and archive.tell() < header.size:
            say(f"{name}: {archive.tell() / 2**20:.0f} of {header.size / 2**20:.0f} MiB")
            rest = ["vaesearch", "pack", name, "--archive", header.archive, "--offset", str(archive.tell())]
            part = _next_part(_run(jobs, rest))
            archive.write(part)
        if _digest(archive) != header.sha256:
            raise OSError(f"{name}: damaged on the way here; fetch it again")
        unpack(archive, Path(folder))
        to.mkdir(parents=True, exist_ok=True)
        _check_replaceable(to / name, Study(Path(folder)))
        replace_tree(Path(folder), to / name, STUDY_FILE)
    return to / name


def pack(name: str, storage: str | None) -> Iterator[str]:
    """On the head: the lines of the first part. Raises InputError."""
    _forget_old()
    place = location(storage_on_cluster(storage)) / name
    if not isinstance(place, Path):
        raise InputError(f"{place}: lies behind a URL; read it there")
    if not (place / STUDY_FILE).is_file():
        raise InputError(f"{place}: the head of the cluster has no study there")
    with tempfile.NamedTemporaryFile(prefix=ARCHIVE_PREFIX, suffix=".tar", delete=False) as file:
        _write_archive(place, file)
        size = file.tell()
        yield HEADER + json.dumps(asdict(_Header(size, _digest(file), Path(file.name).name)))
    yield pack_on(Path(file.name).name, 0)


def pack_on(archive: str, offset: int) -> str:
    """On the head: a part. With the last one, the archive is gone. Raises InputError."""
    if not ARCHIVE.fullmatch(archive):
        raise InputError(f"{archive}: is no archive of vaesearch's")
    path = Path(tempfile.gettempdir()) / archive
    try:
        with path.open("rb") as file:
            file.seek(offset)
            part = file.read(PART_BYTES)
            is_last = not file.read(1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; fetch the study again") from None
    if is_last:
        path.unlink(missing_ok=True)
    return base64.b64encode(part).decode()


def unpack(archive: IO[bytes], folder: Path) -> None:
    """Write an archive's files below the folder. Raises InputError for anything but plain files that lie there."""
    try:
        archive.seek(0)
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                is_below = place.parts and not place.is_absolute() and ".." not in place.parts
                if not member.isfile() or not is_below or "\\" in member.name:
                    raise InputError(f"{member.name}: not a plain file of a study; nothing was written")
                content = tar.extractfile(member)
                assert content is not None
                target = folder.joinpath(*place.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    except tarfile.TarError as error:
        raise InputError(f"what the cluster sent is no archive: {error}") from None
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"what the cluster sent has no {STUDY_FILE}")


def _write_archive(study: Path, target: IO[bytes]) -> None:
    """All of a study but what only its driver needs."""
    for attempt in range(TRIES):
        target.seek(0)
        target.truncate()
        try:
            with tarfile.open(fileobj=target, mode="w:") as tar:
                for file in sorted(study.rglob("*")):
                    place = file.relative_to(study)
                    if _belongs(place) and file.is_file():
                        _add(tar, place.as_posix(), file)
            return
        except FileNotFoundError:  # exchanged meanwhile
            if attempt == TRIES - 1:
                raise


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _belongs(place: Path) -> bool:
    top = place.parts[0]
    hidden = any(part.startswith(".") or part.endswith((BUILDING, REPLACED)) for part in place.parts)
    return top not in LEFT_OUT and not hidden


def _add(tar: tarfile.TarFile, name: str, file: Path) -> None:
    content = file.read_bytes()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    tar.addfile(entry, io.BytesIO(content))


def _run(jobs: Jobs, command: list[str]) -> str:
    try:
        return jobs.run(shlex.join(command), timeout_s=JOB_TIMEOUT_S)
    except JobFailed as error:
        if error.exit_code == 2:
            raise InputError(str(error).removeprefix("vaesearch: ")) from None
        raise


def _first_part(said: str) -> tuple[_Header, bytes]:
    lines = said.strip().splitlines()
    at = next((number for number, line in enumerate(lines) if line.startswith(HEADER)), None)
    if at is None or at + 1 >= len(lines):
        raise JobFailed(f"the head of the cluster packed nothing: {said[-300:]}")
    return _Header(**json.loads(lines[at].removeprefix(HEADER))), base64.b64decode(lines[at + 1])


def _next_part(said: str) -> bytes:
    lines = said.strip().splitlines()
    if not lines:
        raise JobFailed("the head of the cluster sent an empty part; fetch the study again")
    return base64.b64decode(lines[-1])


def _check_replaceable(target: Path, fetched: Study) -> None:
    """Raises InputError unless what is there, if anything, is an older copy of the same study."""
    restore_tree(target)
    if not target.exists():
        return
    other = "use another --to"
    if not (target / STUDY_FILE).is_file():
        raise InputError(f"{target}: is there and is no study; {other}")
    here = Study(target)
    Lease(target).check()
    keys = ("created_at", "data_fingerprint")
    if [here.provenance[key] for key in keys] != [fetched.provenance[key] for key in keys]:
        raise InputError(f"{target}: the study there is another one of the same name; {other}")
    if _num_ended(here) > _num_ended(fetched):
        raise InputError(f"{target}: the study there has come further than the cluster's; {other}")


def _num_ended(study: Study) -> int:
    return sum(row.state != "RUNNING" for row in study.rows())


def _forget_old() -> None:
    """Free what former calls left on the head: archives of a fetch that was cut off, and the output of those that were
    read, which Ray (2.60) keeps for as long as the cluster lives. Those of another user stay."""
    old = time.time() - FORGOTTEN_AFTER_S
    for file in _named(Path(tempfile.gettempdir()), ARCHIVE):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old:
                file.unlink()
    output = Path(os.readlink("/proc/self/fd/1")) if os.path.exists("/proc/self/fd/1") else Path()
    if output.name.startswith("job-driver-"):
        for file in _named(output.parent, SHORT_JOB_LOG):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < old and file.stat().st_size > 2**20:
                    os.truncate(file, 0)


def _named(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [file for file in folder.glob("*vaesearch-*") if names.fullmatch(file.name)]
