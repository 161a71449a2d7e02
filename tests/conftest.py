"""Shared by all tests: one torch thread, and one Ray for those that need it."""

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from cluster.runtime import Runtime, ray_runtime
from search import cli
from search.results import Study
from search.spec import StudySpec
from search.study import run_study


class OneRay(LoadScopeScheduling):
    """Of two processes that test, one has all files that need the one Ray; no file is torn apart.

    (pytest-xdist's own groups, 3.8, are without effect under pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if _needs_ray(self.config.rootpath / file) else file


@functools.cache
def _needs_ray(file: Path) -> bool:
    return any(fixture in file.read_text(encoding="utf-8") for fixture in ("ray_here", "small_study"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    return OneRay(config, log)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two cores are shared with Ray's workers: torch's default of all cores is slower by far there."""
    torch.set_num_threads(1)


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`vaesearch ...` in this process -> exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vaesearch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        sys.stdout.flush()
        captured = capfd.readouterr()
        return left.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Runtime]:
    """The one Ray of this test run: two CPUs, no GPU, on loopback. `run_study` uses it as it finds it."""
    with ray_runtime(num_cpus=2, num_gpus=0) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def small_spec(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    """Six trials of a few tenths of a second each on the digits, one after the other; some are healthy to their end."""
    return StudySpec.model_validate(
        {
            "name": "small",
            "model": {"hidden_dims": [32]},
            "train": {"kl_warmup_epochs": 0, "lr_schedule": "constant", "batch_size": 32},
            "space": {
                "activation": ["tanh", "leaky_relu", "silu"],
                "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
                "latent_dim": {"low": 2, "high": 16, "log": True},
            },
            "budget": {"trials": 6, "max_epochs": 8, "max_consecutive_failures": 2, "max_retries": 1},
            "sampler": {"startup_trials": 3},
            "scheduler": {"grace_epochs": 2, "reduction_factor": 2},
            "export": {"top": 2},
            "resources": {"concurrency": 1},
            "storage": {"path": str(tmp_path_factory.mktemp("studies"))},
        }
    )


@pytest.fixture(scope="session")
def small_study(ray_here: Runtime, small_spec: StudySpec) -> Study:
    """`small_spec`, run to its end. To be read only: work on a copy of its folder."""
    return run_study(small_spec)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """A place on an S3 server on loopback, whose credentials are in the environment, and the server's process."""
    server = Path(sys.executable).with_name("moto_server")
    if not server.exists():
        pytest.skip("moto_server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    credentials = {
        "AWS_ACCESS_KEY_ID": "not-a-key",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in credentials}
    os.environ.update(credentials)
    process = subprocess.Popen(
        [server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.05)
        from pyarrow import fs

        query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield f"s3://bucket/studies?{query}", process.pid
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture
def s3_url(s3_server: tuple[str, int]) -> str:
    return s3_server[0]
