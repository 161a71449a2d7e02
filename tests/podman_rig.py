"""docker-compose.yml on podman: what stands in for a Docker engine where there is none, and leaves nothing behind.

`.ci/podman` makes what is needed in the folder COMPOSE_RIG; what differs from a Docker engine is said there.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from clusters import clean_environment, command_of

ROOT = Path(__file__).parent.parent
BASE_IMAGE, RUNTIME_IMAGE = "localhost/vaesearch-base:bookworm", "localhost/vaesearch-runtime"
PROJECT_LABEL = "com.docker.compose.project"
HEALTH_EVERY_S = 1.0


def missing() -> str | None:
    """Why no compose file can be run here, or None."""
    if not (folder := os.environ.get("COMPOSE_RIG")):
        return "COMPOSE_RIG names no folder that .ci/podman has filled"
    if os.getuid() != 0:
        return "podman's networks need root"
    if not (Path(folder) / "ready").exists():
        return f".ci/podman has not filled {folder}; podman.log there says why"
    return None


class Podman:
    """Podman with a Docker engine's socket, and Compose v2 that speaks to it."""

    def __init__(self, rig: Path, folder: Path) -> None:
        self._compose = rig / "compose/usr/bin/docker-compose"
        self.environment = clean_environment() | {
            "CONTAINERS_CONF": str(rig / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(rig / "storage.conf"),
            "BUILDAH_FORMAT": "docker",  # the other one knows no health checks
            "DOCKER_HOST": f"unix://{folder}/podman.sock",
        }

    def __call__(self, *arguments: str, timeout: float = 180) -> str:
        done = subprocess.run(
            ["podman", *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def compose(
        self, *arguments: str, folder: Path, timeout: float = 300, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._compose, "--project-directory", folder, *arguments],
            env=self.environment | variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build_runtime(self) -> None:
        """The first stage of the Dockerfile: all but Python's packages, which are mounted."""
        dockerfile = ROOT / "cluster" / "deploy" / "Dockerfile"
        arguments = ("--target", "runtime", "--build-arg", f"BASE={BASE_IMAGE}", "-t", RUNTIME_IMAGE)
        self("build", "-q", "-f", str(dockerfile), *arguments, str(ROOT), timeout=300)


@contextlib.contextmanager
def podman() -> Iterator[Podman]:
    folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))  # short: the name of a socket
    engine = Podman(Path(os.environ["COMPOSE_RIG"]), folder)
    service = subprocess.Popen(
        ["podman", "system", "service", "--time=0", engine.environment["DOCKER_HOST"]],
        env=engine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "podman.sock").exists():
            assert service.poll() is None, "podman offers no socket"
            assert time.monotonic() < deadline, "podman offers no socket"
            time.sleep(0.1)
        yield engine
    finally:
        service.terminate()
        service.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


class Project:
    """docker-compose.yml under a name and in a folder of its own, with this environment mounted."""

    def __init__(self, engine: Podman, name: str, folder: Path, port: int, **variables: str) -> None:
        self.engine, self.name, self.folder = engine, name, folder
        self.url = f"http://127.0.0.1:{port}"
        self.variables = {
            "VAESEARCH_PORT": str(port),
            "TEST_VENV": sys.prefix,
            "TEST_PYTHON": sys.base_prefix,
            "TEST_REPOSITORY": str(ROOT),
            **variables,
        }
        self.containers: set[str] = set()  # ids of all that there ever were

    def compose(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        files = ("-f", str(ROOT / "docker-compose.yml"), "-f", str(ROOT / "tests" / "compose.override.yml"))
        return self.engine.compose(
            "-p", self.name, *files, *arguments, folder=self.folder, timeout=timeout, **self.variables
        )

    def up(self) -> None:
        done = self.compose("up", "--detach", "--wait", "--no-build", "--pull", "never")
        self.containers |= set(self._listed("ps", "--all", "--quiet", "--no-trunc"))
        assert done.returncode == 0, done.stderr + self.logs()

    def down(self) -> None:
        done = self.compose("down", "--volumes", "--timeout", "5")
        assert done.returncode == 0, done.stderr

    def exec(self, service: str, *command: str, timeout: float = 180, **variables: str) -> str:
        """The output of a command in a container. By podman itself: what Compose starts stays watched for minutes."""
        given = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
        return self.engine("exec", *given, f"{self.name}-{service}", *command, timeout=timeout)

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "30").stdout

    def left(self) -> list[str]:
        """What there is of it: containers, networks, volumes, processes that watch its containers."""
        watchers = [
            command
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and "conmon" in (command := command_of(int(path.name)))
        ]
        return [
            *self._listed("ps", "--all", "--quiet"),
            *self._listed("network", "ls", "--quiet"),
            *self._listed("volume", "ls", "--quiet"),
            *(command for command in watchers if any(container in command for container in self.containers)),
        ]

    @contextlib.contextmanager
    def health_checked(self) -> Iterator[None]:
        """Podman leaves it to systemd to run the health checks; here this does."""
        over = threading.Event()

        def check() -> None:
            while not over.wait(HEALTH_EVERY_S):
                with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                    for container in self._listed("ps", "--quiet"):
                        self._check(container)

        thread = threading.Thread(target=check, name="health", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(60)

    def _check(self, container: str) -> None:
        with contextlib.suppress(AssertionError):  # not healthy, or gone
            self.engine("healthcheck", "run", container)

    def _listed(self, *command: str) -> list[str]:
        return self.engine(*command, "--filter", f"label={PROJECT_LABEL}={self.name}").split()
