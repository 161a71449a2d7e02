"""A Ray cluster of one machine for tests: its own ports, folder and token, gone with all its processes at the end."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Head:
    """A head that is up. `url` is its dashboard's, `address` that of its GCS, `results` the storage of its studies."""

    url: str
    address: str
    token: str
    token_file: Path
    folder: Path
    pid: int

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def environment(self) -> dict[str, str]:
        """Of a process that is let in, and knows nothing else of this or another cluster."""
        return clean_environment() | {"RAY_AUTH_TOKEN_PATH": str(self.token_file)}


def clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VAESEARCH_", "OMP_"))}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@contextlib.contextmanager
def ray_head(
    *, num_cpus: int = 2, num_gpus: int = 0, extra: Mapping[str, str] | None = None, options: tuple[str, ...] = ()
) -> Iterator[Head]:
    """extra: variables of its processes, and so of the jobs' on it. options: more of `ray start`'s."""
    folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))  # short: names of Unix sockets end at 107 characters
    token, token_file = secrets.token_hex(32), folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    gcs, dashboard, agent, client = free_ports(4)
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *(f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--object-store-memory={200 * 2**20}"),
        *(f"--temp-dir={folder / 'ray'}", *options),
    ]
    environment = clean_environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as in cluster.runtime: all servers on loopback
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "VAESEARCH_STORAGE": str(folder / "results"),
        **(extra or {}),
    }
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token, token_file, folder, process.pid)
        _wait_until_it_is_a_node(head, process, folder / "head.log")
        yield head
    finally:
        end_family(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def end_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that descend from it; what those have started meanwhile ends by itself without them."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


def descendants(root: int) -> set[int]:
    """The processes below one."""
    processes = {int(path.name): _parent_of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, size = {root}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in processes.items() if parent in found}
    return found - {root}


def is_alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _wait_until_it_is_a_node(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Its dashboard answers before that."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while "ALIVE" not in _states_of_nodes(head):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _states_of_nodes(head: Head) -> list[str]:
    """As its dashboard tells them; none as long as it does not answer."""
    with contextlib.closing(http.client.HTTPConnection(head.url.removeprefix("http://"), timeout=10)) as connection:
        try:
            connection.request("GET", "/nodes?view=summary", headers={"Authorization": f"Bearer {head.token}"})
            nodes = json.load(connection.getresponse())["data"]["summary"]
            return [node["raylet"]["state"] for node in nodes]
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return []
