"""Jobs on a Ray cluster, over the HTTP address of its dashboard: submit, list, follow, stop.

Ray's own client (2.60) is not used: RAY_ADDRESS overrides the address it is given, it waits for ever for a host that
does not answer, and it takes a second to import. The interface underneath is Ray's documented one, but for packages.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, urlsplit

from cluster.head import ClusterUnreachable, is_loopback
from cluster.tokens import PATH_VARIABLE, find_token

UPLOAD_LIMIT_BYTES = 100 * 2**20  # what the dashboard takes at once (ray 2.60, DASHBOARD_CLIENT_MAX_SIZE)
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
POLL_EVERY_S = 0.5
POLL_SHARE = 5  # a poll that took long is followed by this many times its length of rest
RECONNECT_FOR_S = 150.0
WATCHED_S = 3.0
"""So long Ray (2.60) looks after a job that has ended: another one of its id it would take for that, and for dead."""

DEFAULT_PORT = 8265
MARK = "vaesearch-job-"
"""Begins the first line of a job's output, which is that of no other job: those of one id share a file (ray 2.60)."""

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


class AddressRefused(ValueError):
    """That is no address to submit to, or not a safe one. The text says what would do."""


class AccessDenied(RuntimeError):
    """The cluster wants a token and got none, or a wrong one."""


class JobExists(RuntimeError):
    """There is a job of that id."""


class NoSuchJob(RuntimeError):
    """The cluster knows no job of that id."""


class JobFailed(RuntimeError):
    """A short job did not end well. `exit_code` is that of its command, where there is one."""

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class VersionMismatch(RuntimeError):
    """The cluster's Ray is not ours."""


class UploadTooLarge(ValueError):
    """More than the dashboard takes."""


@dataclass(frozen=True)
class Job:
    """message: what Ray says of a job that has ended. exit_code: of its command, unless it was stopped."""

    job_id: str
    state: State
    entrypoint: str = field(repr=False)
    metadata: Mapping[str, str]
    message: str
    exit_code: int | None
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")


class Jobs:
    """The jobs of one cluster. `address` is the one in force, without a trailing slash.

    Raises AddressRefused and TokenUnreadable when made; ClusterUnreachable and AccessDenied at any call.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        self.address = _checked(address, insecure)
        self._token = find_token()

    def ray_version(self) -> str:
        return str(self._json("GET", "/api/version")["ray_version"])

    def check_version(self) -> None:
        """Raises VersionMismatch unless the cluster's Ray has our major and minor version."""
        theirs, ours = self.ray_version(), version("ray")
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise VersionMismatch(
                f"{self.address} runs Ray {theirs}, this is Ray {ours}; install one version on both sides"
            )

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        working_dir: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Start a job of that id; its command starts in a copy of `working_dir`. Raises JobExists, UploadTooLarge."""
        runtime_env = {} if working_dir is None else {"working_dir": self._upload(working_dir)}
        request = {
            "submission_id": job_id,
            "entrypoint": f"echo {MARK}{secrets.token_hex(8)}; exec {entrypoint}",
            "runtime_env": runtime_env,
            "metadata": dict(metadata or {}),
        }
        response = self._request("POST", "/api/jobs/", json=request)
        if response.status_code == 400 and "already exists" in response.text:
            raise JobExists(f"{self.address} has a job {job_id} already")
        self._raise_unless_ok(response)
        job = self.get(job_id)
        if job is None:
            raise NoSuchJob(f"{self.address}: the job {job_id} was deleted as it was submitted")
        return job

    def get(self, job_id: str) -> Job | None:
        response = self._request("GET", _path(job_id))
        if response.status_code == 404:
            return None
        return _job(self._checked_json(response))

    def list(self) -> list[Job]:
        """Those that were submitted, oldest first."""
        found = [_job(entry) for entry in self._json("GET", "/api/jobs/") if entry.get("submission_id")]
        return sorted(found, key=lambda job: job.started_at or datetime.max.replace(tzinfo=UTC))

    def logs(self, job_id: str) -> str:
        """What the job's command has said so far. Raises NoSuchJob."""
        return self._logs(self._existing(job_id))

    def follow(self, job_id: str, notice: Callable[[str], None] = lambda text: None) -> Iterator[str]:
        """The lines of a job as they come, until it has ended; also over breaks of the connection, told to `notice`.

        Raises NoSuchJob, also where the cluster was replaced meanwhile.
        """
        read, entrypoint = 0, None
        while True:
            started = time.monotonic()
            job, text = self._patiently(lambda: self._state_and_logs(job_id), notice)
            if job.entrypoint != entrypoint:
                read, entrypoint = 0, job.entrypoint
            end = len(text) if job.has_ended else text.rfind("\n") + 1
            yield from text[read:end].splitlines()
            read = max(read, end)
            if job.has_ended:
                return
            time.sleep(max(POLL_EVERY_S, POLL_SHARE * (time.monotonic() - started)))

    def stop(self, job_id: str) -> None:
        """Ask the job to end; Ray (2.60) sends SIGTERM to all its processes and, after RAY_JOB_STOP_WAIT_TIME_S, KILL.

        Raises NoSuchJob.
        """
        response = self._request("POST", f"{_path(job_id)}/stop")
        if response.status_code == 404:
            raise self._unknown(job_id)
        self._raise_unless_ok(response)

    def wait(self, job_id: str, timeout_s: float, until: Callable[[Job], bool] = lambda job: job.has_ended) -> Job:
        """The job as soon as it has ended. Raises TimeoutError, NoSuchJob."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self._existing(job_id)
            if until(job):
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address}: the job {job_id} is still {job.state} after {timeout_s:g} s")
            time.sleep(POLL_EVERY_S)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, so that its id is free again. Raises JobExists where it is at work."""
        response = self._request("DELETE", _path(job_id))
        if response.status_code == 404:
            return
        if response.status_code == 500:  # Ray's answer (2.60) to that as well
            job = self.get(job_id)
            if job is not None and not job.has_ended:
                raise JobExists(f"{self.address}: the job {job_id} is {job.state}, and is not forgotten")
        self._raise_unless_ok(response)

    def make_way(self, ended: Job) -> None:
        """Forget a job that has ended, for another one of its id. Waits where it ended just now. Raises as `delete`."""
        if ended.ended_at is not None:
            age_s = (datetime.now(UTC) - ended.ended_at).total_seconds()  # negative where clocks differ
            time.sleep(min(max(0.0, WATCHED_S - age_s), WATCHED_S))
        self.delete(ended.job_id)

    def run(self, entrypoint: str, *, working_dir: Path | None = None, timeout_s: float) -> str:
        """A short job to its end: what it said. Raises JobFailed."""
        job_id = f"vaesearch-{secrets.token_hex(6)}"
        job = self.submit(job_id, entrypoint, working_dir=working_dir)
        try:
            job = self.wait(job_id, timeout_s)
            text = self._logs(job)
        except TimeoutError as error:
            raise JobFailed(f"{error}; has the head of the cluster a free moment?") from None
        finally:
            with contextlib.suppress(ClusterUnreachable, NoSuchJob):
                if job.has_ended:
                    self.delete(job_id)
                else:
                    self.stop(job_id)
        if job.state != "SUCCEEDED":
            raise JobFailed(text.strip() or job.message or f"the job {job_id} {job.state}", job.exit_code)
        return text

    def _existing(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job is None:
            raise self._unknown(job_id)
        return job

    def _unknown(self, job_id: str) -> NoSuchJob:
        return NoSuchJob(f"{self.address} knows no job {job_id}; `vaesearch status` lists those it knows")

    def _state_and_logs(self, job_id: str) -> tuple[Job, str]:
        job = self._existing(job_id)  # first: what is read after it has ended is all there is
        return job, self._logs(job)

    def _logs(self, job: Job) -> str:
        return own_output(job, str(self._json("GET", f"{_path(job.job_id)}/logs")["logs"]))

    def _patiently(self, call: Callable[[], tuple[Job, str]], notice: Callable[[str], None]) -> tuple[Job, str]:
        failing_since: float | None = None
        while True:
            try:
                return call()
            except ClusterUnreachable as error:
                now = time.monotonic()
                if failing_since is None:
                    notice(f"{str(error).splitlines()[0]}; trying again")
                    failing_since = now
                if now - failing_since > RECONNECT_FOR_S:
                    raise
                time.sleep(2 * POLL_EVERY_S)

    def _upload(self, folder: Path) -> str:
        """Give the cluster a copy of the folder; the URI by which jobs name it."""
        with tempfile.TemporaryFile() as package:
            name = _zip(folder, package)
            size = package.tell()
            if size >= UPLOAD_LIMIT_BYTES:
                raise UploadTooLarge(
                    f"{size / 2**20:.0f} MiB to send, and a cluster's dashboard takes less than "
                    f"{UPLOAD_LIMIT_BYTES / 2**20:.0f}"
                )
            package.seek(0)
            path = f"/api/packages/gcs/{name}"
            if self._request("GET", path).status_code != 200:
                self._raise_unless_ok(self._request("PUT", path, data=package if size else b""))
        return f"gcs://{name}"

    def _json(self, method: str, path: str) -> Any:
        return self._checked_json(self._request(method, path))

    def _checked_json(self, response: Any) -> Any:
        self._raise_unless_ok(response)
        try:
            return response.json()
        except ValueError:
            raise ClusterUnreachable(f"{self.address} answers, but is no Ray dashboard") from None

    def _raise_unless_ok(self, response: Any) -> None:
        if response.status_code == 200:
            return
        said = (response.text.strip().splitlines() or [response.reason])[-1]
        raise ClusterUnreachable(f"{self.address} answers with HTTP status {response.status_code}: {said[:300]}")

    def _request(self, method: str, path: str, **options: Any) -> Any:
        """The response, unless it asks for a token. Raises ClusterUnreachable, AccessDenied."""
        import requests

        with requests.Session() as session:
            # Over plain HTTP no proxy may read the token. `auth` keeps requests from asking ~/.netrc for another one.
            session.trust_env = self.address.startswith("https:")
            try:
                response = session.request(
                    method,
                    self.address + path,
                    auth=self._authorize,
                    timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                    allow_redirects=False,
                    **options,
                )
            except requests.RequestException as error:
                raise ClusterUnreachable(f"{self.address}: {_reason(error)}\n{self._mend()}") from None
        if response.status_code in (401, 403):
            raise AccessDenied(self._denied())
        return response

    def _authorize(self, request: Any) -> Any:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token.value}"
        return request

    def _denied(self) -> str:
        mend = f"set {PATH_VARIABLE} to a file that holds the token of this cluster"
        if self._token is None:
            return f"{self.address} asks for a token and there is none here; {mend}"
        return f"{self.address} refuses the token of {self._token.origin}; {mend}"

    def _mend(self) -> str:
        if is_loopback(urlsplit(self.address).hostname or ""):
            port = urlsplit(self.address).port or DEFAULT_PORT
            return f"is the cluster up, and the tunnel to it? ssh -N -L {port}:127.0.0.1:{DEFAULT_PORT} HEAD"
        return "is the cluster up, and that its dashboard's address?"


def own_output(job: Job, text: str) -> str:
    """What a job has said, of a text that begins with Ray's own lines and with what former jobs of its id have said."""
    text = text.replace(f"Running entrypoint for job {job.job_id}: {job.entrypoint}\n", "")  # may come after the mark
    mark = job.entrypoint.removeprefix("echo ").partition(";")[0] + "\n"
    return text.rpartition(mark)[2] if mark in text else ""


def _checked(address: str, insecure: bool) -> str:
    """The address without its trailing slash. Raises AddressRefused."""
    parts = urlsplit(address)
    wanted = f"give the dashboard's, such as http://127.0.0.1:{DEFAULT_PORT}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AddressRefused(f"{address}: jobs are submitted to an HTTP address; {wanted}")
    if parts.username is not None or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise AddressRefused(f"{shown}: no names, keys or queries in the address; {wanted}")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        port = parts.port or DEFAULT_PORT
        raise AddressRefused(
            f"{address}: over plain HTTP the token can be read on the way, and whoever has it owns the cluster\n"
            f"ssh -N -L {DEFAULT_PORT}:127.0.0.1:{port} {parts.hostname}, then --address http://127.0.0.1:"
            f"{DEFAULT_PORT}; or --insecure, on a network that nobody else is on"
        )
    return address.rstrip("/")


def _path(job_id: str) -> str:
    return f"/api/jobs/{quote(job_id, safe='')}"


def _job(entry: Mapping[str, Any]) -> Job:
    return Job(
        job_id=entry["submission_id"],
        state=entry["status"],
        entrypoint=entry["entrypoint"],
        metadata=entry.get("metadata") or {},
        message=entry.get("message") or "",
        exit_code=entry.get("driver_exit_code"),
        started_at=_time(entry.get("start_time")),
        ended_at=_time(entry.get("end_time")),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _zip(folder: Path, package: IO[bytes]) -> str:
    """Write the folder's files; the same files make the same name, under which a cluster keeps one copy."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while block := source.read(2**20):
                    digest.update(block)
                    target.write(block)
    package.seek(0, os.SEEK_END)
    return f"_ray_pkg_{digest.hexdigest()[:40]}.zip"


def _reason(error: Exception) -> str:
    """What an error of requests means, without its nest of others."""
    import requests

    if isinstance(error, requests.ConnectTimeout):
        return f"nothing answers within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, requests.Timeout):
        return f"no answer within {READ_TIMEOUT_S:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted here"
    text = str(error)
    for sign, meaning in (
        ("Connection refused", "nothing listens there"),
        ("resolve", "no host of that name"),
        ("Name or service", "no host of that name"),
        ("unreachable", "there is no way to that host"),
    ):
        if sign.lower() in text.lower():
            return meaning
    return "the connection broke"
